"""Where the parts of a captioner come from: presets, the hub or a folder; tokenizer; image processor.

An encoder or a decoder is named by a preset (random weights, no network), a local folder, or an id on the Hugging Face
hub.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SegformerConfig,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging

from captioning import InputError
from captioning.cli import encoders, note
from captioning.files import is_full_disk, read_json, write_whole
from captioning.model import two_encoders  # noqa: F401 (from here on transformers knows their configuration)
from captioning.model.limits import check_files, check_processor, check_sides, read_settings
from captioning.model.strip import middle

MOST_TOKENS = 4_000_000  # of a tokenizer
MOST_SIDE = 4096  # pixels, of what an encoder sees

ENCODER_PRESETS: dict[str, dict[str, Any]] = {
    # A Mix Transformer (SegFormer's encoder, https://arxiv.org/abs/2105.15203) of 36 tokens of 10 px, 0.2 M parameters,
    # for drawn scenes. Its patches overlap and its layers hold small convolutions: from random weights it learns
    # outlines in minutes, for which a ViT needs many times the images.
    "mit": {
        "image_size": 60,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [48, 128],
        "hidden_size": 128,
        "patch_sizes": [9, 3],
        "strides": [5, 2],
        "sr_ratios": [4, 1],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "drop_path_rate": 0.0,
        "initializer_range": 0.1,  # 0.02 is for layers ten times as wide
        "reshape_last_stage": False,  # (batch, tokens, hidden size)
    },
    # A ViT of 64 patches of 8 px: 0.5 M parameters, for tests.
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
DECODER_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": 0.09,  # 0.02 is for layers of 768
    },
    "small": {"n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "base": {},
}
# The largest vocabulary that a preset's tokenizer may learn from the training captions.
VOCABULARY = {"tiny": 1_000, "small": 5_000, "base": 50_257}
END_OF_TEXT = "<|endoftext|>"
# The name of an encoder, or those of two that see side by side.
Encoder = str | Sequence[str]
CAPTIONER = "vision-encoder-decoder"  # the model_type of a run folder
BUNDLE_HINT = "name a run folder that train.py wrote"


def preset_config(encoder: str) -> Any:
    """The configuration of an encoder preset."""
    return (SegformerConfig if encoder == "mit" else ViTConfig)(**ENCODER_PRESETS[encoder])


def quoted(named: Encoder) -> str:
    """How messages call an encoder, or two: --encoder 'A' 'B'."""
    return "--encoder " + " ".join(f"'{name}'" for name in encoders(named))


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
        InputError: no such folder, no such id, or no network and the id was never fetched before; or the hub refuses,
            or goes away in the middle.
    """
    folder = Path(name)
    if folder.is_dir():
        check_files(folder, f"{what} '{name}'")
        return folder
    if what == "--model_path" and str(name).startswith((".", "/", "~")):
        raise InputError(f"--model_path '{name}' does not exist; {BUNDLE_HINT}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise InputError(f"{what} '{name}' is not a folder, and not an id on the Hugging Face hub either")
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        offline = not _hub_is_reachable()
        folder = snapshot_download(
            str(name), allow_patterns=list(patterns), ignore_patterns=["*/*"], local_files_only=offline
        )
        return Path(folder)

    if weights and _hub_is_reachable():
        note(f"{what} '{name}': from the Hugging Face hub, or from its cache")
    try:
        folder = fetch("*.json", "*.txt", *(["*.safetensors"] if weights else []))
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch("*.json", "*.txt", "pytorch_model*.bin")
        check_files(folder, f"{what} '{name}'")
        return folder
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if is_full_disk(error):
            raise
        remedy = BUNDLE_HINT if what == "--model_path" else "name a local folder or a preset: tiny, small, base"
        remedy = "name a local folder" if what == "--clip" else remedy
        raise InputError(f"{what} '{name}' {_why_not_fetched(error, remedy)}") from None


def _why_not_fetched(error: Exception, remedy: str) -> str:
    """What the user is told of a fetch that failed: what happened, and what to do, by default `remedy`."""
    from huggingface_hub import errors

    kind = type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return f"asks for its terms to be accepted ({kind}); accept them on its page, then run 'hf auth login'"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"is not on the Hugging Face hub, or is private ({kind}); {remedy}"
    if _hub_is_reachable():
        return f"was not fetched in full: the Hugging Face hub does not answer ({kind}); run the same command again"
    return f"is not here and the hub is not reachable ({kind}); {remedy}"


def read_config(folder: Path, what: str):
    """The configuration of a model folder, of the class that its `model_type` names.

    Raises:
        InputError: there is none, it cannot be, or it asks for code or for other packages.
    """
    name = f"{what} '{folder}'"
    settings = read_settings(folder, name)
    kind = settings.get("model_type")
    try:
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            config = CONFIG_MAPPING[kind].from_dict(settings)
        else:  # of old, without a type; or none that is known
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the class of a configuration makes of settings that cannot be
        raise InputError(f"{name} has a config.json that transformers cannot use: {brief(error)}") from None
    check_sides(config, name)
    for part in ("encoder", "vision_config"):
        check_sides(getattr(config, part, None), name)
    return config


def brief(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    said = " ".join(str(error).split())
    return (said if len(said) <= 300 else said[:297] + "...") or type(error).__name__


@contextlib.contextmanager
def refusing(message: str) -> Iterator[None]:
    """Turn whatever a library raises in the block into an InputError with that message, and the reason behind it.

    It is for what is built of a stranger's files only, where a list of what may be raised is never whole.

    Raises:
        InputError: something was raised. A full disk and Ctrl-C are what they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise
        raise InputError(message.format(reason=brief(error))) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        raise InputError(message.format(reason=brief(error))) from None


def literal(text: str) -> str:
    """`text` for `refusing`, braces and all."""
    return text.replace("{", "{{").replace("}", "}}")


def encoder_config(folder: Path, what: str):
    """The configuration of a vision encoder.

    Raises:
        InputError: it is not one that can be used here.
    """
    return _that_sees(read_config(folder, what), f"{what} '{folder}'")


def decoder_config(folder: Path, what: str):
    """The configuration of a decoder of the GPT-2 family.

    Raises:
        InputError: it is another kind of model.
    """
    return _that_speaks(read_config(folder, what), f"{what} '{folder}'")


def _that_sees(config: Any, what: str) -> Any:
    # CLIP and SigLIP come as two towers; captioning needs the one that sees.
    config = getattr(config, "vision_config", config)
    if config.model_type == "siglip2_vision_model":
        raise InputError(
            f"{what} is a SigLIP 2 for images of any shape (NaFlex), which are not supported; name one for a fixed "
            "size, such as google/siglip2-base-patch16-224"
        )
    return config


def _that_speaks(config: Any, what: str) -> Any:
    if config.model_type != "gpt2":
        raise InputError(f"{what} is a {config.model_type}; name a model of the GPT-2 family")
    return config


def refuse_other_kinds(encoder: Encoder, decoder: str) -> list[Any]:
    """Refuse models that train.py cannot use, by their configuration alone, before any data are prepared for them.

    A run folder may stand for both.

    Returns:
        The configuration of each encoder; None for a folder without one: a tokenizer alone, say.

    Raises:
        InputError: the encoder sees no images, or the decoder is not of the GPT-2 family.
    """
    from transformers import MODEL_MAPPING

    found = []
    for name in encoders(encoder):
        seeing = preset_config(name) if name in ENCODER_PRESETS else _config_there(name, "--encoder", ())
        if seeing is not None and seeing.model_type == CAPTIONER:
            seeing = seeing.encoder
        elif seeing is not None:
            seeing = _that_sees(seeing, f"--encoder '{name}'")
            if getattr(MODEL_MAPPING.get(type(seeing), None), "main_input_name", None) != "pixel_values":
                raise InputError(f"--encoder '{name}' is a {seeing.model_type}, not a vision encoder with patch states")
        found.append(seeing)
    speaking = _config_there(decoder, "--decoder", DECODER_PRESETS)
    if speaking is not None and speaking.model_type != CAPTIONER:
        _that_speaks(speaking, f"--decoder '{decoder}'")
    return found


def _config_there(name: str, what: str, presets: Collection[str]) -> Any:
    folder = Path() if name in presets else resolve(name, what, weights=False)
    return read_config(folder, what) if name not in presets and (folder / "config.json").is_file() else None


# ---- tokenizer


def load_tokenizer(name: str | os.PathLike, what: str = "--decoder") -> PreTrainedTokenizerBase:
    """The tokenizer of a decoder folder or hub id, with a padding token.

    GPT-2 has none; padding is masked by length everywhere here, so that its end-of-text token can serve.
    """
    return tokenizer_in(resolve(name, what, weights=False), f"{what} '{name}'")


def tokenizer_in(folder: Path, what: str) -> PreTrainedTokenizerBase:
    """The same of a folder that `resolve` gave; `what` is how messages call it, such as "--decoder 'gpt2'"."""
    with refusing(literal(what) + " has no usable tokenizer ({reason})"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokens = tokenizer("a dog", add_special_tokens=False)["input_ids"]
        if not all(isinstance(token, int) and 0 <= token < MOST_TOKENS for token in (*tokens, len(tokenizer))):
            raise ValueError(f"its tokens have numbers such as {tokens[:2]}")
        tokenizer.decode(tokens, skip_special_tokens=True)
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None and not 0 <= token < MOST_TOKENS:
                raise ValueError(f"a special token has number {token}")
    if not tokens:
        # Without its files transformers makes an empty one from config.json, and every caption would be empty.
        raise InputError(f"{what} has no usable tokenizer (it knows no words); copy the tokenizer's files there")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {what} has no end-of-sequence token; name a GPT-2 style decoder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Write a tokenizer's files, so that transformers 4 reads them as well.

    Version 5 has a new name for the class of a tokenizer that belongs to no model, and still knows the old one.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


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


# ---- image processor


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

        side = int(preset_config(str(encoder)).image_size)  # presets are square
        return ViTImageProcessorPil(size={"height": side, "width": side}, resample=3)
    return image_processor_in(resolve(encoder, what, weights=False), f"{what} '{encoder}'", whole)


def image_processor_in(folder: Path, what: str, whole: bool = False):
    """The same of a folder that `resolve` gave; `what` is how messages call it, such as "--encoder 'x'"."""
    check_processor(folder, what)
    with refusing(literal(what) + " has no usable preprocessor_config.json ({reason})"):
        image_processor = _dinov3_without_torchvision(folder) or AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
        _refuse_odd(image_processor)
    if whole and image_processor.do_center_crop:
        crop = dict(image_processor.crop_size)
        size = {"height": crop["height"], "width": crop["width"]}
        settings = {**image_processor.to_dict(), "do_center_crop": False, "do_resize": True, "size": size}
        image_processor = type(image_processor).from_dict(settings)
    return image_processor


def _refuse_odd(image_processor) -> None:
    """Raise ValueError, or what else comes of it, where an image processor does not make pictures of one size."""
    if max(resized_side(image_processor), input_side(image_processor)) > MOST_SIDE:
        raise ValueError(f"it makes pictures of more than {MOST_SIDE:,} pixels a side")
    pixels = Pixels(image_processor)
    shapes = set()
    for size in ((64, 48), (48, 64)):
        made = pixels(Image.new("RGB", size))
        pixels.normalise(torch.from_numpy(made)[None])
        if made.dtype != np.uint8 or made.ndim != 3 or made.shape[0] != 3:
            raise ValueError(f"it makes {made.dtype} of shape {'x'.join(map(str, made.shape))} of a picture")
        shapes.add(made.shape)
    if len(shapes) > 1:
        raise ValueError("it leaves pictures of several sizes; name height and width, or a crop")
    image_processor.to_dict()


def _dinov3_without_torchvision(folder: Path):
    """DINOv3's image processor as one of Pillow; None for any other.

    Its own class needs torchvision. It rescales before it resizes, which differs by the rounding to 8 bits.
    """
    file = folder / "preprocessor_config.json"
    settings = read_json(file, "correct it") if file.is_file() else {}
    if not str(settings.get("image_processor_type")).startswith("DINOv3ViT"):
        return None
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 2}
    known = ("size", "resample", "image_mean", "image_std", "do_resize", "do_rescale", "do_normalize", "rescale_factor")
    own = {name: settings[name] for name in known if settings.get(name) is not None}
    return ViTImageProcessorPil(**{"size": {"height": 224, "width": 224}, **imagenet, **own})


def resized_side(image_processor) -> int:
    """The shorter side, in pixels, that the image processor resizes to before any crop."""
    return _longest_of(image_processor.size)


def input_side(image_processor) -> int:
    """The side, in pixels, of what the encoder sees: the crop where there is one, the resized image otherwise."""
    return _longest_of(image_processor.crop_size if image_processor.do_center_crop else image_processor.size)


def stored_side(image_processor) -> int:
    """The shorter side, in pixels, that images are stored with: room for a random crop, 256 for a model of 224."""
    return max(resized_side(image_processor), round(input_side(image_processor) * 8 / 7))


def refuse_small_images(of_data, image_processor, data_path: str, encoder: Encoder, decoder: str) -> None:
    """Refuse images that were stored for a smaller model.

    Args:
        of_data: the image processor that the data were prepared for.
        image_processor: of the model that is to see them.
        encoder, decoder: what to prepare the data for instead.

    Raises:
        InputError: the images have less detail than the model sees.
    """
    stored, seen = stored_side(of_data), resized_side(image_processor)
    if stored < seen:
        raise InputError(
            f"the images of --data_path '{data_path}' are stored with {stored} px, and '{encoders(encoder)[0]}' sees "
            f"{seen}; run dataloader.py with {quoted(encoder)} --decoder '{decoder}'"
        )


def _longest_of(size) -> int:
    size = dict(size)
    sides = [size[key] for key in ("shortest_edge", "height", "width") if size.get(key)]
    if not sides:
        raise InputError(f"the image processor's size {size} names neither height and width nor shortest_edge")
    return max(sides)


class Pixels:
    """An image processor split in two: geometry on the worker (uint8), arithmetic on the device (float32).

    `normalise(self(image))` equals `image_processor(image)`; uint8 is a quarter of the bytes to copy.
    """

    def __init__(self, image_processor):
        self.image_processor = image_processor
        size = dict(image_processor.size) if image_processor.do_resize else {}
        self.edge = None if size.get("longest_edge") else size.get("shortest_edge")
        scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        mean, std = 0.0, 1.0
        if image_processor.do_normalize:
            mean, std = image_processor.image_mean, image_processor.image_std
        self.scale = scale
        self.mean = torch.tensor(mean).reshape(-1, 1, 1)
        self.std = torch.tensor(std).reshape(-1, 1, 1)

    @property
    def resized_side(self) -> int:
        """The shorter side, in pixels, that images are resized to before any crop."""
        return resized_side(self.image_processor)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what comes out."""
        return self(Image.new("RGB", (64, 48))).shape[1:]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> uint8 (3, height, width), resized and cropped."""
        image = middle(image, self.edge)
        return self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (batch, 3, height, width) -> float32 of the same shape, on the same device."""
        scaled = pixels.to(torch.float32) * self.scale
        return (scaled - self.mean.to(pixels.device)) / self.std.to(pixels.device)
