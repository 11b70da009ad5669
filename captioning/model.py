"""Build, load and save {model, tokenizer, image processor} as one bundle, and generate captions with it.

The model is the stock `transformers.VisionEncoderDecoderModel`. An encoder or a decoder is named by a preset
(random weights, no network), a local folder, or an id on the Hugging Face hub; weights are safetensors only.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from captioning import InputError
from captioning.files import is_whole_safetensors

ENCODER_PRESETS: dict[str, dict[str, int]] = {
    # 64 patches of 8 px: 0.5 M parameters, for drawn scenes and tests.
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    # ViT-S/16 and ViT-B/16 (https://arxiv.org/abs/2010.11929), untrained.
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
}
DECODER_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "small": {"n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "base": {},
}
# What makes any GPT-2 faster: no dropout on the attention weights, which rules out the fused kernels (the dropout after
# each layer stays), and gelu_new as one kernel instead of eight, under the name that it has in PyTorch.
FASTER = {"attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
# The largest vocabulary that a preset's tokenizer may learn from the training captions.
VOCABULARY = {"tiny": 1_000, "small": 5_000, "base": 50_257}
# How captions are decoded unless told otherwise.
DECODING = {"num_beams": 3, "max_new_tokens": 40}
END_OF_TEXT = "<|endoftext|>"
BUNDLE_HINT = "name a run folder that train.py wrote"


@dataclass
class Bundle:
    """What a run folder holds, ready to use."""

    model: VisionEncoderDecoderModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any


def quiet_transformers() -> None:
    """Only errors from transformers: what a user should know is said by the scripts, in one line each."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# ---- where weights come from


@functools.cache
def _hub_is_reachable() -> bool:
    """One short request, so that a machine with no network answers in seconds and not after every retry."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        return False
    return True


def resolve(name: str | os.PathLike, what: str, weights: bool = True) -> Path:
    """The local folder of an encoder, a decoder or a trained captioner, fetched from the hub if it is an id.

    Args:
        name: a local folder or a hub id such as `openai-community/gpt2`.
        what: how messages call it, such as `--decoder`.
        weights: False fetches the configuration, tokenizer and preprocessor files only.

    Raises:
        InputError: no such folder, no such id, or no network and the id was never fetched before.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise InputError(f"{what} '{name}' is not a folder, and not an id on the Hugging Face hub either")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(
            snapshot_download(
                str(name),
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=not _hub_is_reachable(),
            )
        )
    except (OSError, ValueError) as error:
        reason = "is not on the Hugging Face hub" if _hub_is_reachable() else "is not here and the hub is not reachable"
        remedy = BUNDLE_HINT if what == "--model_path" else "name a local folder or a preset: tiny, small, base"
        raise InputError(f"{what} '{name}' {reason} ({type(error).__name__}); {remedy}") from None


def _require_safetensors(folder: Path, what: str) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        if not is_whole_safetensors(file):
            raise InputError(f"{what} '{folder}' has a damaged {file.name}, cut short perhaps; copy or write it again")
    if weights:
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{what} '{folder}' holds pickled weights ({pickled[0]}), which can run code when they are opened; "
            "convert them to safetensors first"
        )
    raise InputError(
        f"{what} '{folder}' holds no model.safetensors; name a folder or a hub id with safetensors weights"
    )


def _read_config(folder: Path, what: str):
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if "auto_map" in raw:
            raise InputError(f"{what} '{folder}' asks to run code of its own (auto_map), which is never done")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except OSError:
        raise InputError(f"{what} '{folder}' has no config.json; it is not a model folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{what} '{folder}' has a config.json that transformers cannot use: {error}") from None


# ---- tokenizer and image processor


def load_tokenizer(name: str | os.PathLike, what: str = "--decoder") -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder folder or hub id, with a padding token.

    GPT-2 has none; padding is masked by length everywhere here, so that its end-of-text token can serve.
    """
    folder = resolve(name, what, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{what} '{name}' has no usable tokenizer ({str(error).splitlines()[0]})") from None
    if not tokenizer("a dog", add_special_tokens=False)["input_ids"]:
        # Without its files transformers makes an empty one from config.json, and every caption would be empty.
        raise InputError(
            f"{what} '{name}' has no usable tokenizer (it knows no words); copy the tokenizer's files there"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {what} '{name}' has no end-of-sequence token; name a GPT-2 style decoder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-cased byte-level BPE tokenizer learnt from captions, shaped like GPT-2's.

    Lower case, because annotators disagree on the first letter and the official scores ignore case: two spellings
    of every first word would split the probability that beam search compares.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_image_processor(encoder: str | os.PathLike, what: str = "--encoder", whole: bool = False):
    """The image processor of an encoder preset, folder or hub id.

    Always the Pillow implementation, so that training and inference see the same pixels whether or not
    torchvision happens to be installed.

    Args:
        whole: resize the whole image to the square that the encoder sees, as ViT's image processor does, where the
            image processor would crop it: captions speak of what lies at the margins too.
    """
    if encoder in ENCODER_PRESETS:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        side = ViTConfig(**ENCODER_PRESETS[encoder]).image_size
        return ViTImageProcessorPil(size={"height": side, "width": side}, resample=3)
    folder = resolve(encoder, what, weights=False)
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"{what} '{encoder}' has no usable preprocessor_config.json ({str(error).splitlines()[0]})"
        ) from None
    if whole and image_processor.do_center_crop:
        crop = dict(image_processor.crop_size)
        size = {"height": crop["height"], "width": crop["width"]}
        settings = {**image_processor.to_dict(), "do_center_crop": False, "do_resize": True, "size": size}
        image_processor = type(image_processor).from_dict(settings)
    return image_processor


def resized_side(image_processor) -> int:
    """The shorter side, in pixels, that the image processor resizes to before any crop."""
    return _longest_of(image_processor.size)


def input_side(image_processor) -> int:
    """The side, in pixels, of what the encoder sees: the crop where there is one, the resized image otherwise."""
    return _longest_of(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)


def _longest_of(size) -> int:
    size = dict(size)
    sides = [size[key] for key in ("shortest_edge", "height", "width") if size.get(key)]
    if not sides:
        raise InputError(f"the image processor's size {size} names neither height and width nor shortest_edge")
    return max(sides)


# ---- the model


def build_encoder(name: str):
    """A vision encoder in float32 from a preset, a folder or a hub id."""
    if name in ENCODER_PRESETS:
        return ViTModel(ViTConfig(**ENCODER_PRESETS[name]))
    folder = resolve(name, "--encoder")
    config = _read_config(folder, "--encoder")
    # CLIP and SigLIP come as two towers; captioning needs the one that sees.
    config = getattr(config, "vision_config", config)
    if config.model_type == "clip_vision_model":
        # CLIP trains its last layer for the class token alone. What the patches hold before it describes more: on a
        # part of COCO, CIDEr-D 0.76 against 0.59 on validation. (https://arxiv.org/abs/2304.08485 found the same.)
        config.num_hidden_layers -= 1
    _require_safetensors(folder, "--encoder")
    try:
        # float32 said aloud: transformers 5 otherwise keeps the stored dtype, and float16 fails to learn.
        encoder = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load --encoder '{name}': {str(error).splitlines()[0]}") from None
    if encoder.main_input_name != "pixel_values" or not hasattr(encoder.config, "hidden_size"):
        raise InputError(f"--encoder '{name}' is a {config.model_type}, not a vision encoder with patch states")
    return encoder


def build_decoder(name: str, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """A GPT-2 family decoder in float32, with cross-attention, whose vocabulary is the tokenizer's."""
    if name in DECODER_PRESETS:
        config = GPT2Config(
            **DECODER_PRESETS[name],
            **FASTER,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            is_decoder=True,
            add_cross_attention=True,
        )
        return GPT2LMHeadModel(config)
    folder = resolve(name, "--decoder")
    config = _read_config(folder, "--decoder")
    if config.model_type != "gpt2":
        raise InputError(f"--decoder '{name}' is a {config.model_type}; name a model of the GPT-2 family")
    _require_safetensors(folder, "--decoder")
    config.is_decoder, config.add_cross_attention = True, True
    config.attn_pdrop = FASTER["attn_pdrop"]
    if config.activation_function == "gelu_new":
        config.activation_function = FASTER["activation_function"]
    try:
        decoder = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load --decoder '{name}': {str(error).splitlines()[0]}") from None
    if len(tokenizer) > decoder.config.vocab_size:
        raise InputError(
            f"the data set's tokenizer has {len(tokenizer):,} tokens and --decoder '{name}' only "
            f"{decoder.config.vocab_size:,}; run dataloader.py with --decoder '{name}'"
        )
    return decoder


def build(encoder: str, decoder: str, tokenizer: PreTrainedTokenizerBase) -> VisionEncoderDecoderModel:
    """A captioner from an encoder and a decoder, ready to train.

    Parameters that no caption loss can reach (a pooler, a masked-image token) are frozen, so that they cost no
    optimiser state and distributed training does not wait for their gradients.

    Raises:
        InputError: either name cannot be loaded, or they do not fit the tokenizer.
    """
    model = VisionEncoderDecoderModel(encoder=build_encoder(encoder), decoder=build_decoder(decoder, tokenizer))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokens = {
        "decoder_start_token_id": start,
        "bos_token_id": start,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(tokens)
    model.config.vocab_size = model.decoder.config.vocab_size
    model.generation_config = GenerationConfig(**tokens, **DECODING)
    _freeze_unreachable(model)
    return model


def _freeze_unreachable(model: VisionEncoderDecoderModel) -> None:
    side = model.encoder.config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    pixels = torch.zeros(1, getattr(model.encoder.config, "num_channels", 3), height, width)
    with torch.enable_grad():
        logits = model(
            pixel_values=pixels, decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])
        ).logits
    reached, pending = set(), [logits.grad_fn]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in visited:
                visited.add(parent)
                pending.append(parent)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in reached)


def set_dropout(model: VisionEncoderDecoderModel, rate: float) -> None:
    """Let the decoder's layers and embeddings drop `rate` of their outputs in training; its attention weights none."""
    model.decoder.config.resid_pdrop = model.decoder.config.embd_pdrop = rate
    for name, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith("attn_dropout"):
            module.p = rate


def new_parameters(model: VisionEncoderDecoderModel, encoder: str, decoder: str) -> set[str]:
    """Names of the parameters that start from random weights."""
    names = {name for name, _ in model.named_parameters() if name.startswith("enc_to_dec_proj.")}
    if encoder in ENCODER_PRESETS:
        names |= {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    if decoder in DECODER_PRESETS:
        names |= {name for name, _ in model.named_parameters() if name.startswith("decoder.")}
    elif not _stores_cross_attention(resolve(decoder, "--decoder")):
        names |= {name for name, _ in model.named_parameters() if is_cross_attention(name)}
    return names


def is_cross_attention(parameter: str) -> bool:
    """Whether a parameter belongs to what connects the decoder to the image."""
    return ".crossattention." in parameter or ".ln_cross_attn." in parameter or parameter.startswith("enc_to_dec_proj")


def _stores_cross_attention(folder: Path) -> bool:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any("crossattention" in name for name in tensors.keys()):  # noqa: SIM118 (not a dict)
                return True
    return False


def load(path: str | os.PathLike) -> Bundle:
    """The model, tokenizer and image processor of a run folder (or of a captioner on the hub), in float32.

    Raises:
        InputError: the folder is missing, incomplete, or not a vision encoder-decoder with safetensors weights.
    """
    if not Path(path).exists() and str(path).startswith((".", "/", "~")):
        raise InputError(f"--model_path '{path}' does not exist; {BUNDLE_HINT}")
    folder = resolve(path, "--model_path")
    config = _read_config(folder, "--model_path")
    if config.model_type != "vision-encoder-decoder":
        raise InputError(f"--model_path '{path}' is a {config.model_type}, not an image captioner; {BUNDLE_HINT}")
    _require_safetensors(folder, "--model_path")
    try:
        model = VisionEncoderDecoderModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the weights of '{path}': {str(error).splitlines()[0]}") from None
    tokenizer = load_tokenizer(folder, "--model_path")
    image_processor = load_image_processor(folder, "--model_path")
    return Bundle(model.eval(), tokenizer, image_processor)


def save(bundle: Bundle, path: str | os.PathLike) -> None:
    """Write a bundle so that `VisionEncoderDecoderModel.from_pretrained(path)` and `load(path)` read it.

    Each file takes its place when all are written: an interruption leaves an earlier bundle as it was.
    """
    part = Path(path, ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
    try:
        for piece in (bundle.model, bundle.tokenizer, bundle.image_processor):
            piece.save_pretrained(part)
        for file in part.iterdir():
            file.replace(Path(path, file.name))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that training moves."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


# ---- captions


class _BeamCache(EncoderDecoderCache):
    """The keys and values of several beams: those of the image are the same for all and need no reordering."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


@torch.no_grad()
def generate_tokens(model: VisionEncoderDecoderModel, states: torch.Tensor, **settings) -> torch.Tensor:
    """What `model.generate` returns for an encoder's output, several times faster.

    The image's keys and values are computed once per image and not once per beam, and they are neither projected again
    nor copied at every step.

    Args:
        states: (batch, encoder tokens, hidden size)
        settings: as in `model.generate`, such as `num_beams` and `max_new_tokens`.

    Returns:
        Token ids, (batch * num_return_sequences, length), the start token first.
    """
    decoder = model.decoder
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    if hasattr(model, "enc_to_dec_proj"):
        states = model.enc_to_dec_proj(states)
    start = torch.full((len(states), 1), config.decoder_start_token_id, device=states.device)
    of_image = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache(config=decoder.config))
    decoder(input_ids=start, encoder_hidden_states=states, past_key_values=of_image, use_cache=True)
    of_image.cross_attention_cache.batch_repeat_interleave(max(config.num_beams or 1, config.num_return_sequences or 1))
    cache = _BeamCache(DynamicCache(config=decoder.config), of_image.cross_attention_cache)
    return decoder.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=config,
        encoder_hidden_states=states,
        past_key_values=cache,
    )


@torch.inference_mode()
def generate(bundle: Bundle, pixel_values: torch.Tensor, **settings) -> list[str]:
    """Captions for normalised pixels.

    Args:
        pixel_values: (batch, channels, height, width), on the model's device.
        settings: as in `model.generate`.

    Returns:
        One caption per image, in order.
    """
    states = bundle.model.encoder(pixel_values=pixel_values).last_hidden_state
    return decode(bundle.tokenizer, generate_tokens(bundle.model, states, **settings))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
    """Token ids (batch, length) -> captions, special tokens left out and white space tidied."""
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [" ".join(text.split()) for text in texts]
