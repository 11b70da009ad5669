"""A captioner that was exported to ONNX: images -> captions with onnxruntime, without torch and transformers.

    bundle = load("exported")                        # what `inference.py --export onnx` wrote
    captions = generate(bundle, pixel_values)        # as the functions of that name in generate.py and explain.py

The folder is laid out as users of transformers.js and onnxruntime know it; `onnx_export.py` says what the graphs take
and give.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning import InputError, cli
from captioning.files import read_json
from captioning.foreign import check, whole
from captioning.model import beam_search
from captioning.model.beam_search import Decoding
from captioning.model.caption import Caption, ranked
from captioning.model.limits import PROCESSOR
from captioning.model.strip import middle

ENCODER, DECODER = "encoder_model", "decoder_model_merged"
INT8 = "_quantized"
SCORED_TOGETHER = 32  # captions: with GPT-2's vocabulary and 40 tokens their logits take 260 MB


class Pixels:
    """An image processor's two steps, as in `parts.Pixels`: the same pixels, bit for bit.

    Args:
        settings: a `preprocessor_config.json`.

    Raises:
        InputError: it does something else than resize, crop, rescale and normalise.
    """

    def __init__(self, settings: Mapping[str, Any], what: str):
        try:
            self.resize = dict(settings["size"]) if settings.get("do_resize") else {}
            self.crop = dict(settings["crop_size"]) if settings.get("do_center_crop") else {}
            self.resample = Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
            self.scale = np.float32(settings["rescale_factor"] if settings.get("do_rescale") else 1.0)
            normalised = bool(settings.get("do_normalize"))
            self.mean = np.array(settings["image_mean"] if normalised else 0.0, np.float32).reshape(-1, 1, 1)
            self.std = np.array(settings["image_std"] if normalised else 1.0, np.float32).reshape(-1, 1, 1)
            if set(self.resize) not in ({"height", "width"}, {"shortest_edge"}, set()):
                raise ValueError(f"size {self.resize}")
            if settings.get("do_pad") or settings.get("crop_pct"):
                raise ValueError("it pads, or crops by a share")
            shape = self(Image.new("RGB", (64, 48))).shape
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{what} has a preprocessor_config.json that cannot be used ({reason})") from None
        self.height, self.width = shape[1:]

    @property
    def resized_side(self) -> int:
        """The shorter side, in pixels, that images are resized to before any crop."""
        return max(self.resize.values() or self.crop.values() or (self.height, self.width))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> uint8 (3, height, width), resized and cropped."""
        if edge := self.resize.get("shortest_edge"):
            image = middle(image, edge)
            width, height = image.size
            longer = int(edge * max(image.size) / min(image.size))
            image = image.resize((edge, longer) if width <= height else (longer, edge), self.resample)
        elif self.resize:
            image = image.resize((self.resize["width"], self.resize["height"]), self.resample)
        pixels = np.asarray(image).transpose(2, 0, 1)
        return np.ascontiguousarray(_cropped(pixels, self.crop["height"], self.crop["width"]) if self.crop else pixels)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (batch, 3, height, width) -> float32 of the same shape."""
        return (pixels.astype(np.float32) * self.scale - self.mean) / self.std


def _cropped(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of (3, rows, columns); where it is too small, black is added around it, as transformers does."""
    rows, columns = pixels.shape[1:]
    top, left = (rows - height) // 2, (columns - width) // 2
    if top < 0 or left < 0:
        above, before = math.ceil(max(height - rows, 0) / 2), math.ceil(max(width - columns, 0) / 2)
        around = np.zeros((3, max(height, rows), max(width, columns)), np.uint8)
        around[:, above : above + rows, before : before + columns] = pixels
        pixels, top, left = around, max(top + above, 0), max(left + before, 0)
    return pixels[:, top : top + height, left : left + width]


@dataclasses.dataclass
class OnnxBundle:
    """What an exported folder holds, ready to use."""

    encoder: Any  # onnxruntime.InferenceSession
    decoder: Any
    tokenizer: Any  # tokenizers.Tokenizer
    pixels: Pixels
    decoding: Decoding
    positions: int  # that the decoder has for a caption's tokens
    int8: bool

    @functools.cached_property
    def special_tokens(self) -> frozenset[int]:
        """The ids that stand for no text, such as the end token's."""
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, one in added.items() if one.special)

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Token ids -> captions, special tokens left out and white space tidied."""
        texts = self.tokenizer.decode_batch(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Each token by itself as text, special tokens too."""
        return self.tokenizer.decode_batch([[token] for token in tokens], skip_special_tokens=False)

    def batch(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 pixels (3, height, width) of several images -> normalised, (images, 3, height, width)."""
        return self.pixels.normalise(np.stack(pictures))

    @property
    def cache(self) -> list[Any]:
        """The decoder's inputs that hold its keys and values."""
        return [one for one in self.decoder.get_inputs() if one.name.startswith("past_key_values.")]


def load(path: str | os.PathLike, int8: bool = False) -> OnnxBundle:
    """The captioner of an exported folder.

    Args:
        int8: take the weights of 8 bits. They are also taken where there are no others.

    Raises:
        InputError: onnxruntime is not installed, or the folder is incomplete or damaged.
    """
    what = f"--model_path '{path}'"
    try:
        import onnxruntime
        import tokenizers
    except ImportError as error:
        raise InputError(
            f"{what} is in ONNX, which needs a package that is not installed: pip install {error.name}"
        ) from None
    folder = Path(path)
    graphs = folder / "onnx"
    if not int8 and not (graphs / f"{ENCODER}.onnx").is_file():
        int8 = True
        cli.note("the folder holds int8 weights only: they are used")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = _threads()
    sessions = []
    for name in (ENCODER, DECODER):
        file = graphs / f"{name}{INT8 if int8 else ''}.onnx"
        if not file.is_file():
            raise InputError(f"{what} has no onnx/{file.name}; export it again with inference.py --export onnx")
        try:
            sessions.append(onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]))
        except Exception as error:  # onnxruntime's errors have no common class of their own
            reason = str(error).splitlines()[0]
            raise InputError(f"'{file}' is not a whole ONNX file ({reason}); export it again") from None
    tokenizer_file = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # a plain Exception is what tokenizers raises
        raise InputError(f"'{tokenizer_file}' cannot be read ({error}); export it again") from None
    settings = read_json(folder / "preprocessor_config.json", "export it again")
    check(settings, PROCESSOR, f"the preprocessor_config.json of {what}", "export it again")
    sizes = check(
        read_json(folder / "config.json", "export it again").get("decoder", {}),
        {"n_positions": whole(2, 1_000_000), "vocab_size": whole(1, 4_000_000)},
        f"the decoder in the config.json of {what}",
        "export it again",
        needed=("n_positions", "vocab_size"),
    )
    positions = sizes["n_positions"]
    searched = read_json(folder / "generation_config.json", "export it again")
    decoding = Decoding.read(searched, sizes["vocab_size"], positions, what)
    encoder, decoder = sessions
    bundle = OnnxBundle(encoder, decoder, tokenizer, Pixels(settings, what), decoding, positions, int8)
    _check(bundle, what)
    return bundle


def _threads() -> int:
    """As many as PyTorch takes: OMP_NUM_THREADS, or those that this process may run on; 0: onnxruntime chooses."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit():
        return int(told)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return usable if usable < (os.cpu_count() or 0) else 0


def _check(bundle: OnnxBundle, what: str) -> None:
    """Refuse a folder whose parts do not belong together."""
    shape = bundle.encoder.get_inputs()[0].shape[1:]
    made = [3, bundle.pixels.height, bundle.pixels.width]
    takes = {one.name for one in bundle.decoder.get_inputs()}
    if shape != made:
        raise InputError(f"{what} has a preprocessor_config.json for pixels {made}, and its encoder takes {shape}")
    if not {"input_ids", "encoder_hidden_states"} <= takes or not bundle.cache:
        raise InputError(f"{what} has a decoder that takes {sorted(takes)}; export it with inference.py --export onnx")


class Rows:
    """The decoder with its cache, at the first token of each image: a `beam_search.Step`.

    Args:
        states: what `encode` returns.
    """

    def __init__(self, bundle: OnnxBundle, states: np.ndarray):
        self.decoder, self.states, self.shapes = bundle.decoder, states, [one.shape for one in bundle.cache]
        self.names = [one.name for one in bundle.cache]
        self.outputs = [name.replace("past_key_values", "present") for name in self.names]
        self.past: list[np.ndarray] = []

    def __call__(self, tokens: np.ndarray, came_from: np.ndarray | None) -> np.ndarray:
        if not self.past:
            self.past = self._empty(len(tokens))
        if came_from is not None:
            self.past = [part[came_from] for part in self.past]
        logits, *self.past = self.decoder.run(["logits", *self.outputs], self._feeds(tokens, self.past))
        return logits[:, -1]

    def all_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Of each token's successor, (rows, tokens, vocabulary), without the cache; rows of an image together."""
        return self.decoder.run(["logits"], self._feeds(tokens, self._empty(len(tokens))))[0]

    def _empty(self, rows: int) -> list[np.ndarray]:
        return [np.zeros((rows, heads, 0, width), np.float32) for _, heads, _, width in self.shapes]

    def _feeds(self, tokens: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
        feeds = dict(zip(self.names, past, strict=True))
        return {"input_ids": tokens, "encoder_hidden_states": self.states, **feeds}


def encode(bundle: OnnxBundle, pixel_values: np.ndarray) -> np.ndarray:
    """Normalised pixels (batch, 3, height, width) -> what the decoder reads of the images, (batch, tokens, numbers)."""
    return bundle.encoder.run(["last_hidden_state"], {"pixel_values": pixel_values})[0]


def generate(bundle: OnnxBundle, pixel_values: np.ndarray) -> list[str]:
    """Captions for normalised pixels (batch, 3, height, width), one per image, in order."""
    states = encode(bundle, pixel_values)
    return bundle.decode(beam_search.search(Rows(bundle, states), len(states), bundle.decoding).tolist())


def best_captions(bundle: OnnxBundle, pixel_values: np.ndarray, count: int = 1) -> list[list[Caption]]:
    """The best captions of each image, the best one first; as `explain.best_captions`."""
    states = encode(bundle, pixel_values)
    settings = bundle.decoding
    wide = dataclasses.replace(settings, num_beams=max(count, settings.num_beams))
    sequences = beam_search.search(Rows(bundle, states), len(states), wide, count)
    images = max(1, SCORED_TOGETHER // count)
    chosen: list[list[float]] = []
    for first in range(0, len(states), images):
        part = sequences[first * count : (first + images) * count]
        logits = Rows(bundle, states[first : first + images]).all_logits(part[:, :-1])
        values = beam_search.log_softmax(logits)
        chosen += np.take_along_axis(values, part[:, 1:, None], 2)[..., 0].tolist()
    generated = sequences[:, 1:].tolist()
    of_image = (row // count for row in range(len(generated)))
    rows = zip(of_image, bundle.decode(generated), generated, chosen, strict=True)
    return ranked(rows, len(states), settings.end, settings.length_penalty)


def refuse_small_images(bundle: OnnxBundle, data_path: Path, model_path: str) -> None:
    """As `parts.refuse_small_images`, for the images of `data_path`."""
    of_data = Pixels(read_json(data_path / "preprocessor_config.json"), f"--data_path '{data_path}'")
    stored = max(of_data.resized_side, round(max(of_data.height, of_data.width) * 8 / 7))
    if stored < bundle.pixels.resized_side:
        raise InputError(
            f"the images of --data_path '{data_path}' are stored with {stored} px, and '{model_path}' sees "
            f"{bundle.pixels.resized_side}; run dataloader.py with the --encoder and --decoder that it was trained with"
        )
