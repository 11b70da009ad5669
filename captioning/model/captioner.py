"""Build, load and save {model, tokenizer, image processor} as one bundle.

The model is the stock `transformers.VisionEncoderDecoderModel`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
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
from transformers.modeling_outputs import BaseModelOutput

from captioning import InputError
from captioning.cli import encoders, note
from captioning.files import check_target, read_json, remove
from captioning.foreign import either, list_of, text
from captioning.model.grid import as_tokens
from captioning.model.limits import decoding_schema, decoding_settings
from captioning.model.parts import (
    BUNDLE_HINT,
    CAPTIONER,
    DECODER_PRESETS,
    ENCODER_PRESETS,
    Encoder,
    Pixels,
    brief,
    decoder_config,
    encoder_config,
    image_processor_in,
    literal,
    load_image_processor,
    preset_config,
    quoted,
    read_config,
    refuse_other_kinds,
    refusing,
    resolve,
    save_tokenizer,
    tokenizer_in,
)
from captioning.model.two_encoders import side_by_side
from captioning.model.weights import is_cross_attention, load_weights
from captioning.model.wishes import Wishes

# What makes any GPT-2 faster: no dropout on the attention weights, which rules out the fused kernels (the dropout after
# each layer stays), and gelu_new as one kernel instead of eight, under the name that it has in PyTorch.
FASTER: dict[str, Any] = {"attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# How captions are decoded unless told otherwise.
DECODING = {"num_beams": 3, "max_new_tokens": 40}
# What a run folder notes of the names of its parts.
NOTED = {"encoder": either(text(4096), list_of(text(4096), 2, 2)), "decoder": text(4096)}


@dataclass
class Bundle:
    """What a run folder holds, ready to use.

    Attributes:
        wishes: what its captions are asked to be; None: as the model writes them by itself.
    """

    model: VisionEncoderDecoderModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    wishes: Wishes | None = None

    @functools.cached_property
    def pixels(self) -> Pixels:
        """The image processor in two steps, see `Pixels`."""
        return Pixels(self.image_processor)

    @property
    def image_processors(self) -> list[Any]:
        """Those of its encoders, of which most captioners have one."""
        return [self.image_processor]

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature that torch gives it

    def batch(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 pixels (3, height, width) of images -> normalised, (images, 3, height, width), on its device."""
        return self.pixels.normalise(torch.from_numpy(np.stack(pictures)).to(self.model.device))

    @functools.cached_property
    def special_tokens(self) -> frozenset[int]:
        """The ids that stand for no text, such as the end token's."""
        return frozenset(self.tokenizer.all_special_ids)

    def decode(self, tokens: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
        """As the function of that name."""
        return decode(self.tokenizer, tokens)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token by itself as text, special tokens too."""
        return self.tokenizer.batch_decode([[token] for token in tokens], clean_up_tokenization_spaces=False)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
    """Token ids (batch, length) -> captions, special tokens left out and white space tidied."""
    texts = tokenizer.batch_decode(
        cast(torch.Tensor, tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [" ".join(text.split()) for text in texts]


# ---- build


def build_encoder(named: Encoder) -> tuple[PreTrainedModel, set[str]]:
    """A vision encoder in float32 from a preset, a folder or a hub id, and the names of what is random in it.

    Two names give both side by side, see `two_encoders`.
    """
    names = encoders(named)
    if len(names) == 1:
        return _build_encoder(names[0])
    (first, new_first), (second, new_second) = map(_build_encoder, names)
    both = side_by_side(first, second, [Pixels(load_image_processor(name)) for name in names])
    give_patch_states(both, quoted(names))
    return both, {f"first.{name}" for name in new_first} | {f"second.{name}" for name in new_second}


def _build_encoder(name: str) -> tuple[PreTrainedModel, set[str]]:
    if name in ENCODER_PRESETS:
        encoder = AutoModel.from_config(preset_config(name))
        return encoder, set(encoder.state_dict())
    what = f"--encoder '{name}'"
    folder = resolve(name, "--encoder")
    config = encoder_config(folder, "--encoder")
    kind: Any = AutoModel
    dropped = -1
    if config.model_type == "vit_mae":
        # Its own class hides random patches, also when it captions. The weights are those of a ViT.
        known = ViTConfig().to_dict().keys() - {"model_type", "architectures"}
        config, kind = ViTConfig(**{key: value for key, value in config.to_dict().items() if key in known}), ViTModel
    elif config.model_type == "clip_vision_model":
        # CLIP trains its last layer for the class token alone. What the patches hold before it describes more: on a
        # part of COCO, CIDEr-D 0.76 against 0.59 on validation. (https://arxiv.org/abs/2304.08485 found the same.)
        config.num_hidden_layers -= 1
        dropped = config.num_hidden_layers
    encoder, new = load_weights(kind, folder, config, what, surplus=lambda weight: f".layers.{dropped}." in weight)
    give_patch_states(encoder, what)
    return encoder, new


def give_patch_states(encoder: Any, what: str) -> None:
    """See to it that an encoder returns (batch, patches, hidden size), and that its config tells the hidden size.

    Convolutional encoders (ConvNeXt, ResNet) return a map of features, (batch, hidden size, rows, columns): it is
    flattened. Plain `transformers`, which does not know that, cannot use such a captioner.

    Raises:
        InputError: what it returns is neither, or it takes other inputs than pixels.
    """
    refusal = InputError(f"{what} is a {encoder.config.model_type}, not a vision encoder with patch states")
    if encoder.main_input_name != "pixel_values":
        raise refusal
    encoder.register_forward_hook(_flatten)
    try:
        states = _states(encoder, blank_image(encoder.config), what)
    except InputError:
        raise
    except Exception:  # whatever a model of another kind makes of pixels
        raise refusal from None
    if states.dim() != 3:
        raise refusal
    if getattr(encoder.config, "hidden_size", None) != states.shape[2]:
        encoder.config.hidden_size = states.shape[2]


@torch.no_grad()
def _states(encoder: Any, pixels: torch.Tensor, what: str) -> torch.Tensor:
    """What an encoder makes of an image, where that is finite."""
    training, device = encoder.training, next(encoder.parameters()).device
    try:
        states = encoder.eval()(pixel_values=pixels.to(device))[0]
    finally:
        encoder.train(training)
    if device.type != "meta" and not torch.isfinite(states).all():
        raise InputError(f"{what} computes numbers that are not finite; copy it again or name another")
    return states


def refuse_misfit(encoder: Any, image_processor: Any, what: str) -> None:
    """Refuse an image processor whose pixels the encoder does not take, such as those of another image size.

    Args:
        encoder: one that `give_patch_states` has seen, or one on "meta", where nothing is computed.

    Raises:
        InputError: they do not fit, or the image processor cannot be used at all.
    """
    try:
        pixels = Pixels(image_processor)
        shape = pixels.normalise(torch.from_numpy(pixels(Image.new("RGB", (64, 48))))[None]).shape
    except Exception as error:  # whatever an image processor makes of settings that cannot be
        raise InputError(
            f"{what} has a preprocessor_config.json that cannot be used ({brief(error)}); correct it"
        ) from None
    if next(encoder.parameters()).device.type != "meta" and shape == blank_image(encoder.config).shape:
        return  # `give_patch_states` has tried these
    try:
        _states(encoder, torch.zeros(shape), what)
    except InputError:
        raise
    except Exception:  # whatever an encoder makes of pixels that it does not take
        side = getattr(encoder.config, "image_size", None)
        raise InputError(
            f"{what} has a preprocessor_config.json for {shape[2]}x{shape[3]} pixels, which its model does not take"
            + (f" (its config.json says {side})" if side else "")
            + "; correct one of them"
        ) from None


def check_parts(encoder: Encoder, decoder: str, image_processor: Any) -> None:
    """Refuse names that train.py cannot use, before any data are prepared for them; no weights are read.

    Args:
        image_processor: of the encoder; of two, that of the first one.

    Raises:
        InputError: as `refuse_other_kinds` and `refuse_misfit`.
    """
    names = encoders(encoder)
    processors = [image_processor, *map(load_image_processor, names[1:])]
    blanks = []
    for name, config, processor in zip(names, refuse_other_kinds(encoder, decoder), processors, strict=True):
        if config is None:
            return
        with (
            refusing(literal(f"--encoder '{name}'") + " has a config.json that no model can be built of: {reason}"),
            torch.device("meta"),
        ):
            blanks.append(AutoModel.from_config(config))
        refuse_misfit(blanks[-1], processor, f"--encoder '{name}'")
    if len(names) > 1:
        for name, blank in zip(names, blanks, strict=True):
            give_patch_states(blank, f"--encoder '{name}'")
        first, second = blanks
        refuse_misfit(side_by_side(first, second, [*map(Pixels, processors)]), image_processor, quoted(names))


def _flatten(encoder, inputs, outputs):
    states = outputs[0]
    if torch.is_tensor(states) and (states.dim() == 4 or not hasattr(outputs, "attentions")):
        # VisionEncoderDecoderModel asks for attentions, which those without any attention do not name.
        return BaseModelOutput(last_hidden_state=as_tokens(states))
    return outputs


def blank_image(config: Any) -> torch.Tensor:
    """Pixels of the size that an encoder takes: (1, channels, height, width)."""
    side = getattr(config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else side
    return torch.zeros(1, getattr(config, "num_channels", 3), height, width)


def build_decoder(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, set[str]]:
    """A GPT-2 family decoder in float32, with cross-attention, and the names of what is random in it.

    Its vocabulary is the tokenizer's.
    """
    if name in DECODER_PRESETS:
        tokens = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
        settings = {**DECODER_PRESETS[name], **FASTER, **tokens, "is_decoder": True, "add_cross_attention": True}
        decoder = GPT2LMHeadModel(GPT2Config(**settings, vocab_size=len(tokenizer)))
        return decoder, set(decoder.state_dict())
    folder = resolve(name, "--decoder")
    config = decoder_config(folder, "--decoder")
    config.is_decoder, config.add_cross_attention = True, True
    config.attn_pdrop = FASTER["attn_pdrop"]
    if config.activation_function == "gelu_new":
        config.activation_function = FASTER["activation_function"]
    decoder, new = load_weights(AutoModelForCausalLM, folder, config, f"--decoder '{name}'", absent=is_cross_attention)
    if len(tokenizer) > decoder.config.vocab_size:
        raise InputError(
            f"the data set's tokenizer has {len(tokenizer):,} tokens and --decoder '{name}' only "
            f"{decoder.config.vocab_size:,}; run dataloader.py with --decoder '{name}'"
        )
    return decoder, new


def build(encoder: Encoder, decoder: str, tokenizer: PreTrainedTokenizerBase) -> VisionEncoderDecoderModel:
    """A captioner from an encoder and a decoder, ready to train; see `assemble`."""
    return assemble(encoder, decoder, tokenizer)[0]


def assemble(
    encoder: Encoder, decoder: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[VisionEncoderDecoderModel, set[str]]:
    """A captioner from an encoder, or two, and a decoder, ready to train, and what learns from random values on.

    Parameters that no caption loss can reach (a pooler, a masked-image token) are frozen, so that they cost no
    optimiser state and distributed training does not wait for their gradients. Where these alone are random, their
    part counts as pretrained: a classifier's ViT comes without a pooler.

    Raises:
        InputError: either name cannot be loaded, or they do not fit the tokenizer.
    """
    (seeing, new_seeing), (speaking, new_speaking) = build_encoder(encoder), build_decoder(decoder, tokenizer)
    model = VisionEncoderDecoderModel(encoder=seeing, decoder=speaking)
    config: Any = model.config
    for part in (config.encoder, config.decoder):
        part._name_or_path = ""  # a folder of this machine, which is nobody's business
    new = {f"encoder.{name}" for name in new_seeing} | {f"decoder.{name}" for name in new_speaking}
    new |= {name for name, _ in model.named_parameters() if name.startswith("enc_to_dec_proj.")}
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
    ignore_own_generation(model)
    _freeze_unreachable(model)
    return model, {name for name, parameter in model.named_parameters() if name in new and parameter.requires_grad}


def ignore_own_generation(model: VisionEncoderDecoderModel) -> None:
    """Leave the captioner's generation settings the only ones.

    A decoder may come with settings of its own, such as sampling, which `generate` would mix in.
    """
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(model.generation_config, name) for name in names}
    model.decoder.generation_config = GenerationConfig(**settings)


def _freeze_unreachable(model: VisionEncoderDecoderModel) -> None:
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.enable_grad():
        logits = model(pixel_values=blank_image(model.encoder.config), decoder_input_ids=start).logits
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


def part_of(parameter: str) -> str:
    """Which of PARTS a parameter of the captioner belongs to."""
    if is_cross_attention(parameter):
        return "cross_attention"
    return parameter.split(".")[0]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that training moves."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


# ---- load and save


def load(path: str | os.PathLike, flag: str = "--model_path") -> Bundle:
    """The model, tokenizer and image processor of a run folder (or of a captioner on the hub), in float32.

    Args:
        flag: what messages call the path.

    Raises:
        InputError: the folder is missing, incomplete, or not a vision encoder-decoder, or lacks weights.
    """
    folder = resolve(path, flag)
    config = read_config(folder, flag)
    if config.model_type != CAPTIONER:
        raise InputError(f"{flag} '{path}' is a {config.model_type}, not an image captioner; {BUNDLE_HINT}")
    what = f"{flag} '{path}'"
    tokenizer = tokenizer_in(folder, what)
    decoding = _decoding(folder, config, tokenizer, what)
    model, _ = load_weights(VisionEncoderDecoderModel, folder, config, what, generation_config=decoding)
    give_patch_states(model.encoder, f"the encoder of {what}")
    ignore_own_generation(model)
    image_processor = image_processor_in(folder, what)
    refuse_misfit(model.encoder, image_processor, what)
    _refuse_mute(model, tokenizer, what)
    return Bundle(model.eval(), tokenizer, image_processor)


def _decoding(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase, what: str) -> GenerationConfig:
    """How a captioner's folder says that captions are generated, as far as it is used here.

    Special tokens that it does not say, or that its model does not have, are those of its tokenizer.
    """
    file = folder / "generation_config.json"
    content = read_json(file if file.exists() else folder / "config.json")
    vocabulary = getattr(config.decoder, "vocab_size", None)
    positions = getattr(config.decoder, "max_position_embeddings", None)
    if not isinstance(vocabulary, int) or not isinstance(positions, int):
        raise InputError(f"{what} has a decoder, {config.decoder.model_type}, that does not generate text")
    if not file.exists():  # as in folders of old
        content = {name: content[name] for name in decoding_schema(vocabulary, positions) if name in content}
    unknown = {name: content[name] for name in SPECIAL if type(content.get(name)) is int}
    unknown = {name: token for name, token in unknown.items() if not 0 <= token < vocabulary}
    content = {name: value for name, value in content.items() if name not in unknown}
    settings, dropped = decoding_settings(content, vocabulary, positions, what)
    dropped = sorted({*dropped, *unknown})
    if dropped:
        note(f"{what}: generation_config.json says {', '.join(dropped)[:200]}, which is not used here; left out")
    for name in ("decoder_start_token_id", *SPECIAL):
        for token in (getattr(config, name, None), getattr(tokenizer, name, None)):
            if name not in settings and type(token) is int and 0 <= token < vocabulary:
                settings[name] = token
    start = next((settings[name] for name in SPECIAL if name in settings), None)
    if not isinstance(settings.setdefault("decoder_start_token_id", start), int):
        raise InputError(f"{what} does not say decoder_start_token_id in its generation_config.json; add it")
    with refusing(literal(what) + " has a generation_config.json that cannot be used ({reason}); correct it"):
        return GenerationConfig(**settings)


@torch.no_grad()
def _refuse_mute(model: VisionEncoderDecoderModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Refuse a captioner that cannot say a word: its decoder fails, or its settings do not go together."""
    vocabulary = model.decoder.config.vocab_size
    if any(token is not None and token >= vocabulary for token in (tokenizer.eos_token_id, tokenizer.pad_token_id)):
        raise InputError(f"{what} has a tokenizer for more tokens than its model has ({vocabulary:,}); copy its own")
    with refusing(literal(what) + " cannot caption ({reason}); name another"):
        states = BaseModelOutput(last_hidden_state=torch.zeros(1, 2, model.encoder.config.hidden_size))
        start = torch.tensor([[model.generation_config.decoder_start_token_id]])
        logits = model.eval()(encoder_outputs=states, decoder_input_ids=start).logits
        if not torch.isfinite(logits).all():
            raise InputError(f"{what} computes numbers that are not finite; copy it again or name another")
        net: Any = model
        net.generate(encoder_outputs=states, max_new_tokens=1, max_length=None)


def _named_as_before(model: VisionEncoderDecoderModel) -> dict[str, torch.Tensor]:
    """The weights, those of CLIP's and SigLIP's encoders under the names that they have in transformers 4.

    Version 5 reads both; it gives other encoders their old names by itself.
    """
    state = model.state_dict()
    if model.encoder.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return state
    return {re.sub(r"^encoder\.(?!vision_model\.)", "encoder.vision_model.", name): state[name] for name in state}


def names_of(path: str | os.PathLike) -> dict[str, Any]:
    """The names of a captioner's encoder and decoder: as train.py noted them in the folder, or their kinds."""
    folder = resolve(path, "--model_path", weights=False)
    config = read_config(folder, "--model_path")
    seeing = [getattr(config.encoder, part).model_type for part in ("first", "second") if hasattr(config.encoder, part)]
    names = {"encoder": seeing or config.encoder.model_type, "decoder": config.decoder.model_type}
    with contextlib.suppress(InputError):
        noted = read_json(folder / "results.json").get("model")
        if isinstance(noted, dict):
            names |= {part: noted[part] for part in names if part in noted and NOTED[part](noted[part]) is None}
    return names


def let_others_read(folder: Path) -> None:
    """Whoever may read the rest of a folder may read its weights, which safetensors writes for their owner alone."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def save(bundle: Bundle, path: str | os.PathLike) -> None:
    """Write a bundle so that `VisionEncoderDecoderModel.from_pretrained(path)` and `load(path)` read it.

    Each file takes its place when all are written: an interruption leaves an earlier bundle as it was.
    """
    for left in Path(path).glob(".part-*"):  # of a run that was killed here
        remove(left)
    Path(path).mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=path))
    try:
        bundle.model.save_pretrained(part, state_dict=_named_as_before(bundle.model))
        save_tokenizer(bundle.tokenizer, part)
        bundle.image_processor.save_pretrained(part)
        let_others_read(part)
        for file in part.iterdir():
            check_target(Path(path, file.name))
            file.replace(Path(path, file.name))
    finally:
        remove(part)
