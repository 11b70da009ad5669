"""What a model says with how much certainty, and where it looked: token probabilities, the best captions, attention.

explanation = explain(bundle, image)             # an RGB image, as `images.open_image` gives it
explanation.caption.text                         # "a cat on a mat"
explanation.words[1].text, .probability          # "cat", 0.83
explanation.words[1].attention                   # (rows, columns) of the encoder's patch grid
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from captioning import InputError
from captioning.model import constrain
from captioning.model.caption import Caption, ids_of_end, ranked, shown_words
from captioning.model.captioner import Bundle
from captioning.model.generate import decode, generate_tokens
from captioning.model.grid import patch_grid

SCORED_TOGETHER = 32  # captions: with GPT-2's vocabulary and 40 tokens their logits take 260 MB


@dataclass
class Word:
    """A word of a caption.

    Attributes:
        text: with the punctuation that is written to it.
        probability: of its tokens, multiplied; punctuation at its end aside. 0 to 1.
        given: whether it belongs to a prefix that was asked for.
        attention: float (rows, columns) of the patch grid, the mean over its tokens; sums to 1 at most. The rest went
            to tokens that are no place in the image, such as a class token.
    """

    text: str
    probability: float
    attention: np.ndarray
    given: bool = False


@dataclass
class Explanation:
    """A caption, its words, and which part of the image the model saw.

    Attributes:
        alternatives: the best captions, the first of them `caption`.
        region: (left, top, right, bottom) of what the image processor leaves, as fractions of width and height.
    """

    caption: Caption
    words: list[Word]
    alternatives: list[Caption]
    region: tuple[float, float, float, float]


@torch.inference_mode()
def best_captions(bundle: Bundle, pixel_values: torch.Tensor, count: int = 1) -> list[list[Caption]]:
    """The best captions of each image, the best one first.

    Args:
        pixel_values: normalised, (batch, channels, height, width), on the model's device.
        count: how many; the search runs with as many beams at least. Two that read the same count once, so that
            there may be fewer.

    Returns:
        A list for each image. With `count` 1, the caption is the one of `model.generate`.
    """
    states = bundle.model.encoder(pixel_values=pixel_values).last_hidden_state
    return search(bundle, states, count, pixel_values)


@torch.inference_mode()
def search(
    bundle: Bundle, states: torch.Tensor, count: int = 1, pixel_values: torch.Tensor | None = None
) -> list[list[Caption]]:
    """The same of what the encoder made of images.

    Args:
        states: (batch, encoder tokens, hidden size)
        pixel_values: as for `best_captions`; wishes need them.
    """
    model, settings = bundle.model, bundle.model.generation_config
    penalty, by_score = None, True
    if bundle.wishes is None:
        sequences = generate_tokens(
            model,
            states,
            num_beams=max(count, settings.num_beams or 1),
            num_return_sequences=count,
        )
        texts = decode(bundle.tokenizer, sequences[:, 1:])
        images, given = torch.arange(len(sequences)) // count, 0
    else:
        assert pixel_values is not None
        captions = constrain.search(generate_tokens, bundle, states, count, pixel_values)
        flat = [caption for of_image in captions for caption in of_image]
        ids = [torch.tensor([settings.decoder_start_token_id, *caption.tokens]) for caption in flat]
        end, *_ = ids_of_end(settings.eos_token_id)
        sequences = pad_sequence(ids, batch_first=True, padding_value=end).to(states.device)
        texts, given = [caption.text for caption in flat], flat[0].given
        images = torch.arange(len(captions)).repeat_interleave(torch.tensor(list(map(len, captions))))
        penalty = bundle.wishes.length_penalty
        by_score = bundle.wishes.drawn or not bundle.wishes.constrain  # a search puts whole captions before cut ones
    return _scored(bundle, states, images, sequences, texts, penalty, given, by_score)


@torch.inference_mode()
def judge(bundle: Bundle, states: torch.Tensor, captions: Sequence[Sequence[str]]) -> list[list[Caption]]:
    """What the model thinks of captions that somebody else wrote, the most probable one first.

    Args:
        states: (batch, encoder tokens, hidden size)
        captions: of each image any number. They are given back as the model would write them, such as in lower case,
            and those that read the same then count once. What is longer than the decoder's positions is cut off.
    """
    model, settings = bundle.model, bundle.model.generation_config
    images = torch.arange(len(captions)).repeat_interleave(torch.tensor(list(map(len, captions))))
    texts = [" ".join(text.split()) for own in captions for text in own]
    end, *_ = ids_of_end(settings.eos_token_id)
    longest = model.decoder.config.max_position_embeddings
    encoded = bundle.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = [torch.tensor([settings.decoder_start_token_id, *tokens[: longest - 1], end]) for tokens in encoded]
    if not ids:
        return [[] for _ in captions]
    sequences = pad_sequence(ids, batch_first=True, padding_value=end).to(states.device)
    return _scored(bundle, states, images, sequences, decode(bundle.tokenizer, sequences[:, 1:]))


def _scored(
    bundle: Bundle,
    states: torch.Tensor,
    images: torch.Tensor,
    sequences: torch.Tensor,
    texts: Sequence[str],
    penalty: float | None = None,
    given: int = 0,
    by_score: bool = True,
) -> list[list[Caption]]:
    """The captions of each image with the log-probabilities of their tokens, see `ranked`.

    Args:
        images: the image of each row of `sequences`.
        sequences: token ids (rows, length), the start token first.
        penalty: of their length; None: that of the model's settings.
    """
    settings = bundle.model.generation_config
    if penalty is None:
        penalty = 1.0 if settings.length_penalty is None else settings.length_penalty
    images, generated = images.to(states.device), sequences[:, 1:]
    chosen = []  # the tokens' log-probabilities
    for start in range(0, len(sequences), SCORED_TOGETHER):
        part = slice(start, start + SCORED_TOGETHER)
        of_image = images[part]
        logits = bundle.model(
            encoder_outputs=BaseModelOutput(states[of_image]), decoder_input_ids=sequences[part, :-1], use_cache=False
        ).logits
        chosen += logits.float().log_softmax(-1).gather(2, generated[part, :, None])[..., 0].tolist()
    rows = zip(images.tolist(), texts, generated.tolist(), chosen, strict=True)
    return ranked(rows, len(states), settings.eos_token_id, penalty, given, by_score)


@torch.inference_mode()
def explain(
    bundle: Bundle, image: Image.Image, alternatives: int = 1, layers: Sequence[int] | None = None
) -> Explanation:
    """Caption an RGB image and say, word by word, where the model looked.

    Args:
        alternatives: how many of the best captions to return.
        layers: decoder layers whose cross-attention is averaged, counted from 0, or from the last one with -1;
            None: all of them.

    Raises:
        InputError: there is no such layer, or the encoder's tokens are no grid of patches.
    """
    values = bundle.batch([bundle.pixels(image)])
    states = bundle.model.encoder(pixel_values=values).last_hidden_state
    captions = search(bundle, states, alternatives, values)[0]
    best = captions[0]
    rows, columns = patch_grid(states.shape[1], values.shape[-2:], bundle.model.encoder.config)
    attention = cross_attention(bundle, states, best.tokens, layers)[:, -rows * columns :]
    words = []
    for text, tokens in shown_words(bundle, best):
        probability = math.exp(math.fsum(best.log_probabilities[i] for i in tokens))
        looked = attention[tokens].mean(0).reshape(rows, columns)
        words.append(Word(text, probability, looked, tokens[-1] < best.given))
    return Explanation(best, words, captions, seen_region(bundle.image_processor, *image.size))


def cross_attention(
    bundle: Bundle, states: torch.Tensor, tokens: Sequence[int], layers: Sequence[int] | None = None
) -> np.ndarray:
    """How much of its attention the decoder gave to each encoder token when it chose each caption token.

    Args:
        states: the encoder's output for one image, (1, encoder tokens, hidden size).
        tokens: the caption's.
        layers: as in `explain`.

    Returns:
        float32 (caption tokens, encoder tokens), the mean over heads and layers; each row sums to 1.
    """
    decoder = bundle.model.decoder
    start = bundle.model.generation_config.decoder_start_token_id
    inputs = torch.tensor([[start, *tokens[:-1]]], device=states.device)
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")  # the fused kernels do not return weights
    try:
        outputs = bundle.model(
            encoder_outputs=BaseModelOutput(states), decoder_input_ids=inputs, output_attentions=True, use_cache=False
        )
    finally:
        decoder.set_attn_implementation(usual)
    attentions = outputs.cross_attentions  # of each layer: (1, heads, caption tokens, encoder tokens)
    for layer in layers or ():
        if not -len(attentions) <= layer < len(attentions):
            raise InputError(
                f"the decoder has no layer {layer}; its {len(attentions)} layers are 0 to {len(attentions) - 1}"
            )
    chosen = attentions if layers is None else [attentions[layer] for layer in layers]
    return torch.stack([layer[0].float().mean(0) for layer in chosen]).mean(0).cpu().numpy()


def seen_region(image_processor, width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the part of a width x height image that the encoder sees, as fractions."""
    if not image_processor.do_center_crop:
        return (0.0, 0.0, 1.0, 1.0)
    resized = [float(width), float(height)]
    if image_processor.do_resize:
        size = dict(image_processor.size)
        if size.get("shortest_edge"):
            resized = [side * size["shortest_edge"] / min(width, height) for side in (width, height)]
        else:
            resized = [size["width"], size["height"]]
    crop = dict(image_processor.crop_size)
    share = [min(1.0, crop[side] / pixels) for side, pixels in zip(("width", "height"), resized, strict=True)]
    left, top = ((1 - part) / 2 for part in share)
    return (left, top, 1 - left, 1 - top)
