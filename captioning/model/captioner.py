"""Build, load and save {model, tokenizer, image processor} as one bundle.

The model is the stock `transformers.VisionEncoderDecoderModel`.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from captioning import InputError
from captioning.model.parts import (
    BUNDLE_HINT,
    DECODER_PRESETS,
    ENCODER_PRESETS,
    Pixels,
    load_image_processor,
    load_tokenizer,
    read_config,
    require_safetensors,
    resolve,
)

# What makes any GPT-2 faster: no dropout on the attention weights, which rules out the fused kernels (the dropout after
# each layer stays), and gelu_new as one kernel instead of eight, under the name that it has in PyTorch.
FASTER: dict[str, Any] = {"attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
# How captions are decoded unless told otherwise.
DECODING = {"num_beams": 3, "max_new_tokens": 40}


@dataclass
class Bundle:
    """What a run folder holds, ready to use."""

    model: VisionEncoderDecoderModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any

    @functools.cached_property
    def pixels(self) -> Pixels:
        """The image processor in two steps, see `Pixels`."""
        return Pixels(self.image_processor)

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature that torch gives it


# ---- build


def build_encoder(name: str):
    """A vision encoder in float32 from a preset, a folder or a hub id."""
    if name in ENCODER_PRESETS:
        return ViTModel(ViTConfig(**ENCODER_PRESETS[name]))
    folder = resolve(name, "--encoder")
    config = read_config(folder, "--encoder")
    # CLIP and SigLIP come as two towers; captioning needs the one that sees.
    config = getattr(config, "vision_config", config)
    if config.model_type == "clip_vision_model":
        # CLIP trains its last layer for the class token alone. What the patches hold before it describes more: on a
        # part of COCO, CIDEr-D 0.76 against 0.59 on validation. (https://arxiv.org/abs/2304.08485 found the same.)
        config.num_hidden_layers -= 1
    require_safetensors(folder, "--encoder")
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


def build_decoder(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2 family decoder in float32, with cross-attention, whose vocabulary is the tokenizer's."""
    if name in DECODER_PRESETS:
        tokens = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        settings = {**DECODER_PRESETS[name], **FASTER, **tokens, "is_decoder": True, "add_cross_attention": True}
        return GPT2LMHeadModel(GPT2Config(**settings, vocab_size=len(tokenizer)))
    folder = resolve(name, "--decoder")
    config = read_config(folder, "--decoder")
    if config.model_type != "gpt2":
        raise InputError(f"--decoder '{name}' is a {config.model_type}; name a model of the GPT-2 family")
    require_safetensors(folder, "--decoder")
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


# ---- parts


PARTS = ("cross_attention", "decoder", "encoder")


def is_cross_attention(parameter: str) -> bool:
    """Whether a parameter belongs to what connects the decoder to the image."""
    return ".crossattention." in parameter or ".ln_cross_attn." in parameter or parameter.startswith("enc_to_dec_proj")


def part_of(parameter: str) -> str:
    """Which of PARTS a parameter of the captioner belongs to."""
    if is_cross_attention(parameter):
        return "cross_attention"
    return parameter.split(".")[0]


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


def _stores_cross_attention(folder: Path) -> bool:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if any("crossattention" in name for name in tensors.keys()):  # noqa: SIM118 (not a dict)
                return True
    return False


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that training moves."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


# ---- load and save


def load(path: str | os.PathLike) -> Bundle:
    """The model, tokenizer and image processor of a run folder (or of a captioner on the hub), in float32.

    Raises:
        InputError: the folder is missing, incomplete, or not a vision encoder-decoder with safetensors weights.
    """
    if not Path(path).exists() and str(path).startswith((".", "/", "~")):
        raise InputError(f"--model_path '{path}' does not exist; {BUNDLE_HINT}")
    folder = resolve(path, "--model_path")
    config = read_config(folder, "--model_path")
    if config.model_type != "vision-encoder-decoder":
        raise InputError(f"--model_path '{path}' is a {config.model_type}, not an image captioner; {BUNDLE_HINT}")
    require_safetensors(folder, "--model_path")
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
