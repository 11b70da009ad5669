"""A captioner as ONNX files, for onnxruntime and transformers.js.

    export("vit-gpt2-coco", Path("exported"))

    exported/
      onnx/encoder_model.onnx               float32
      onnx/decoder_model_merged.onnx
      onnx/encoder_model_quantized.onnx     weights of 8 bits, one scale for each output channel
      onnx/decoder_model_merged_quantized.onnx
      config.json  generation_config.json  preprocessor_config.json  tokenizer.json  tokenizer_config.json
      confidence.json                       how sure captions are, where the run folder says it

The encoder takes and gives:

    pixel_values              (batch_size, 3, height, width), normalised
    last_hidden_state         (batch_size, tokens, layers x 2 x width)

The decoder:

    input_ids                 (batch_size, sequence_length), int64
    encoder_hidden_states     the encoder's last_hidden_state; its first axis is called images
    past_key_values.N.key     and .value, (batch_size, heads, past_sequence_length, width of a head), N from 0
    logits                    (batch_size, sequence_length, vocabulary)
    present.N.key             and .value, the past with the new tokens

The names are those that transformers.js gives a vision encoder-decoder with GPT-2, and at the first token the past has
length 0: one graph serves all tokens, and needs no `use_cache_branch`.

What the encoder gives is its output as the decoder reads it: for each token of the image the keys and values of every
cross-attention layer, so that they are computed once per image and not once per word. `images` may be fewer than the
rows: with beams, the rows of an image follow each other and share its keys and values.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel

from captioning import InputError, cli
from captioning.files import json_text, write_whole
from captioning.model import captioner, onnx_captioner, parts
from captioning.model.beam_search import Decoding
from captioning.model.onnx_captioner import DECODER, ENCODER, INT8
from captioning.model.two_encoders import TwoEncoders

OPSET = 20  # the first with Gelu; onnxruntime 1.17 and newer read it
MOST_BYTES = 2_000_000_000  # of one graph: protocol buffers end there
NEEDS = ("onnx", "onnxscript", "onnxruntime")
# How far a graph may be from PyTorch, as a share of the largest number that PyTorch gives.
TOLERANCE = 1e-3


def check_installed() -> None:
    """Raise InputError where a package is missing; at once, before a model is loaded."""
    for package in NEEDS:
        try:
            __import__(package)
        except ImportError:
            raise InputError(
                f"--export onnx needs {package}, which is not installed: pip install onnxruntime onnx onnxscript"
            ) from None


def export(path: str | os.PathLike, output: Path, complete: Callable[[Path], None] | None = None) -> None:
    """Write the captioner of a run folder as ONNX files into `output`, which is whole or not there.

    Each graph is compared with PyTorch, and the pixels with the image processor's, before the folder gets its name.

    Args:
        complete: writes into the folder what else belongs there.

    Raises:
        InputError: a package is missing, `output` holds something, or the captioner cannot be exported.
    """
    check_installed()
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise InputError(f"--output '{output}' exists and is not an empty folder; name another one")
    parts.quiet_transformers()
    what = f"--model_path '{path}'"
    bundle = captioner.load(path)
    _refuse(bundle, what)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        part.chmod(0o755)  # mkdtemp's folders are their owner's alone
        (part / "onnx").mkdir()
        _write_settings(bundle, part)
        expected = _expected(bundle)
        _write_graphs(bundle, part / "onnx", what)
        _compare(expected, part, what)
        if complete:
            complete(part)
        if output.is_dir():
            output.rmdir()
        part.replace(output)
        for file in sorted(output.glob("onnx/*.onnx")):
            cli.note(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse(bundle: captioner.Bundle, what: str) -> None:
    """Refuse early what cannot be exported or followed without torch."""
    model = bundle.model
    sizes: Any = model.decoder.config
    Decoding.read(model.generation_config.to_diff_dict(), sizes.vocab_size, sizes.max_position_embeddings, what)
    if not hasattr(bundle.tokenizer, "backend_tokenizer"):
        raise InputError(f"{what} has a tokenizer without a tokenizer.json, which onnxruntime's users need")
    pixels = onnx_captioner.Pixels(bundle.image_processor.to_dict(), what)
    noise = np.random.default_rng(0)
    for height, width in ((48, 64), (700, 333), (pixels.height, pixels.width), (224, 225)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        ours, theirs = pixels(image), bundle.pixels(image)
        same = np.array_equal(ours, theirs) and np.array_equal(
            pixels.normalise(ours[None]), bundle.pixels.normalise(torch.from_numpy(theirs)[None]).numpy()
        )
        if not same:
            raise InputError(
                f"{what} has an image processor ({type(bundle.image_processor).__name__}) that does more than resize, "
                "crop, rescale and normalise; it cannot be exported"
            )
    for name, module in ((ENCODER, model.encoder), (DECODER, model.decoder)):
        size = sum(4 * parameter.numel() for parameter in module.parameters())
        if size > MOST_BYTES:
            raise InputError(f"{what} is too large: {name}.onnx would have {size:,} bytes, and 2 GB are the limit")


# ---- settings


def _write_settings(bundle: captioner.Bundle, folder: Path) -> None:
    config = bundle.model.config.to_dict()
    pair = [config["encoder"][part] for part in ("first", "second") if part in config["encoder"]]
    for part in (config, config["encoder"], config["decoder"], *pair):
        part.pop("_name_or_path", None)  # a path of this machine
    write_whole(folder / "config.json", json_text(config, indent=2, sort_keys=True) + "\n")
    bundle.model.generation_config.save_pretrained(folder)
    parts.save_tokenizer(bundle.tokenizer, folder)
    bundle.image_processor.save_pretrained(folder)


# ---- graphs


class Seeing(nn.Module):
    """The encoder, and what the decoder's cross-attention makes of its output."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.encoder
        self.projection = getattr(model, "enc_to_dec_proj", nn.Identity())
        self.keys_values = nn.ModuleList(block.crossattention.c_attn for block in model.decoder.transformer.h)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) -> (images, tokens, layers x 2 x width)."""
        states = self.projection(self.encoder(pixel_values=pixel_values)[0])
        return torch.cat([layer(states) for layer in self.keys_values], -1)


class Writing(nn.Module):
    """The decoder with its cache."""

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder: Any = decoder
        self.layers, self.heads = decoder.config.n_layer, decoder.config.n_head
        self.width = decoder.config.n_embd // self.heads

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past_key_values: list):
        """See the table above."""
        images, tokens, _ = encoder_hidden_states.shape
        of_image = encoder_hidden_states.reshape(images, tokens, 2 * self.layers, self.heads, self.width)
        of_image = of_image.permute(2, 0, 3, 1, 4)  # keys and values in turn, (images, heads, tokens, width)
        own, seen = DynamicCache(config=self.decoder.config), DynamicCache(config=self.decoder.config)
        for layer in range(self.layers):
            own.update(*past_key_values[layer], layer)
            seen.update(of_image[2 * layer], of_image[2 * layer + 1], layer)
        cache = EncoderDecoderCache(own, seen)
        cache.is_updated = dict.fromkeys(range(self.layers), True)
        past, length = past_key_values[0][0].shape[2], input_ids.shape[1]
        positions = past + torch.arange(length)
        hidden = torch.arange(past + length)[None] > positions[:, None]
        mask = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)[None, None]
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions[None],
            encoder_hidden_states=encoder_hidden_states,  # its keys and values are in the cache already
            past_key_values=cache,
            use_cache=True,
        )
        grown: Any = own.layers
        return outputs.logits, [[layer.keys, layer.values] for layer in grown]

    def names(self) -> list[str]:
        """Of the cache's tensors, in order."""
        return [f"{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]

    def example(self, states: torch.Tensor, rows: int, past: int) -> tuple[torch.Tensor, torch.Tensor, list]:
        """Inputs of the right shapes: `rows` for each image, two tokens, numbers that repeat from call to call."""
        rows *= len(states)
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.decoder.config.vocab_size, (rows, 2), generator=random)
        shape = (rows, self.heads, past, self.width)
        cache = [[torch.randn(shape, generator=random) for _ in range(2)] for _ in range(self.layers)]
        return tokens, states, cache


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention in plain operations, which quantise and fuse well; rows of one image share its keys and values."""
    rows, heads, length, width = query.shape
    if module.is_cross_attention:
        images = key.shape[0]
        torch._check(rows % images == 0)
        query = query.reshape(images, rows // images, heads, length, width).transpose(1, 2)
        query, attention_mask = query.reshape(images, heads, rows // images * length, width), None
    weights = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        weights = weights + attention_mask
    found = torch.matmul(weights.softmax(-1), value)
    if module.is_cross_attention:
        found = found.reshape(images, heads, rows // images, length, width).transpose(1, 2)
        found = found.reshape(rows, heads, length, width)
    return found.transpose(1, 2), None


ATTENTION = "several_rows_an_image"
AttentionInterface.register(ATTENTION, _attend)


@torch.no_grad()
def _write_graphs(bundle: captioner.Bundle, folder: Path, what: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = bundle.model
    pixels = _pixels(bundle, 2)
    model.decoder.set_attn_implementation(ATTENTION)
    with contextlib.suppress(ValueError):  # an encoder without attention
        model.encoder.set_attn_implementation("eager")
    seeing, writing = Seeing(model).eval(), Writing(model.decoder).eval()
    _fix_positions(model.encoder, pixels)
    states = seeing(pixels)
    batch, rows = torch.export.Dim("batch_size"), torch.export.Dim("batch_size")
    images, tokens = torch.export.Dim("images"), torch.export.Dim("encoder_sequence_length")
    length, past = torch.export.Dim("sequence_length"), torch.export.Dim("past_sequence_length")
    cli.note("exporting the encoder")
    graphs = {ENCODER: _graph(seeing, (pixels,), ["pixel_values"], ["last_hidden_state"], ({0: batch},), what)}
    cli.note("exporting the decoder")
    takes = ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in writing.names())]
    gives = ["logits", *(f"present.{name}" for name in writing.names())]
    cache = [[{0: rows, 2: past}] * 2] * writing.layers
    shapes = ({0: rows, 1: length}, {0: images, 1: tokens}, cache)
    graphs[DECODER] = _graph(writing, writing.example(states, 3, 3), takes, gives, shapes, what)
    for name, graph in graphs.items():
        graph.save(folder / f"{name}.onnx", external_data=False)
    cli.note("writing int8 weights")
    for name in graphs:
        with _quiet():
            quantize_dynamic(
                folder / f"{name}.onnx",
                folder / f"{name}{INT8}.onnx",
                op_types_to_quantize=["MatMul", "Gather"],  # a Gemm becomes a MatMul first
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )


def _graph(module: nn.Module, inputs: tuple, takes: list[str], gives: list[str], shapes: Any, what: str) -> Any:
    """A module as torch's ONNX program."""
    try:
        with _quiet():
            return torch.onnx.export(
                module,
                inputs,
                input_names=takes,
                output_names=gives,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever a model's own code or the exporter raises
        reason = str(error).strip().splitlines()
        part = f"encoder, a {module.encoder.config.model_type}" if isinstance(module, Seeing) else "decoder"
        raise InputError(
            f"{what} cannot be exported: torch's ONNX exporter refuses its {part} "
            f"({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error


def _fix_positions(encoder: Any, pixels: torch.Tensor) -> None:
    """Compute position embeddings that are resized to the image (DINOv2) once, and not in the graph at every run."""
    if isinstance(encoder, TwoEncoders):
        _fix_positions(encoder.first, pixels)
        _fix_positions(encoder.second, encoder.for_second(pixels))
        return
    embeddings: Any = getattr(encoder, "embeddings", None)
    if not hasattr(embeddings, "interpolate_pos_encoding"):
        return
    usual, found = embeddings.interpolate_pos_encoding, []

    def noted(*args, **options):
        found.append(usual(*args, **options))
        return found[-1]

    embeddings.interpolate_pos_encoding = noted
    try:
        encoder(pixel_values=pixels)
    finally:
        del embeddings.interpolate_pos_encoding
    if found:
        embeddings.register_buffer("resized_positions", found[0].detach().clone(), persistent=False)
        embeddings.interpolate_pos_encoding = lambda *args, **options: embeddings.resized_positions


def _pixels(bundle: captioner.Bundle, count: int) -> torch.Tensor:
    """Normalised pixels of images of noise, smooth enough to look like something."""
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (6, 8, 3), np.uint8)).resize((320, 240)) for _ in range(count)]
    return bundle.batch([bundle.pixels(image) for image in images])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's remarks, which are for their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---- the proof


@torch.no_grad()
def _expected(bundle: captioner.Bundle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, tokens of two rows for each image, and the logits that PyTorch gives them, before anything is changed."""
    pixels = _pixels(bundle, 3)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(bundle.model.decoder.config.vocab_size, (2 * len(pixels), 6), generator=random)
    rows = pixels.repeat_interleave(2, 0)
    return pixels, tokens, bundle.model(pixel_values=rows, decoder_input_ids=tokens).logits


def _compare(expected: tuple[torch.Tensor, torch.Tensor, torch.Tensor], folder: Path, what: str) -> None:
    """Refuse graphs that compute something else than PyTorch does, with all tokens at once or one after the other."""
    pixels, tokens, logits = (values.numpy() for values in expected)
    exported = onnx_captioner.load(folder)
    states = onnx_captioner.encode(exported, pixels)
    rows = onnx_captioner.Rows(exported, states)
    at_once = onnx_captioner.Rows(exported, states).all_logits(tokens)
    one_by_one = np.stack([rows(tokens[:, [place]], None) for place in range(tokens.shape[1])], 1)
    for found in (at_once, one_by_one):
        wrong = np.abs(found - logits).max() / np.abs(logits).max()
        if not wrong <= TOLERANCE:
            raise InputError(f"{what} cannot be exported: the graphs differ from PyTorch by {wrong:.1e} of the range")
