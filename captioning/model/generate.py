"""Captions from an image: the same tokens as `model.generate`, several times faster."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderModel,
)

from captioning import cli
from captioning.model import constrain
from captioning.model.captioner import Bundle


class _BeamCache(EncoderDecoderCache):
    """The keys and values of several beams: those of the image are the same for all and need no reordering."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.self_attention_cache.reorder_cache(cast(torch.LongTensor, beam_idx))


@torch.no_grad()
def generate_tokens(
    model: VisionEncoderDecoderModel,
    states: torch.Tensor,
    prompt: Sequence[int] = (),
    logits_processor: LogitsProcessorList | None = None,
    **settings,
) -> torch.Tensor:
    """What `model.generate` returns for an encoder's output, several times faster.

    The image's keys and values are computed once per image and not once per beam, and they are neither projected again
    nor copied at every step.

    Args:
        states: (batch, encoder tokens, hidden size)
        prompt: token ids that each caption begins with.
        logits_processor: as in `model.generate`.
        settings: as in `model.generate`, such as `num_beams` and `max_new_tokens`.

    Returns:
        Token ids, (batch * num_return_sequences, length), the start token first, then `prompt`.
    """
    decoder: Any = model.decoder
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    if hasattr(model, "enc_to_dec_proj"):
        states = model.enc_to_dec_proj(states)
    start = torch.full((len(states), 1), config.decoder_start_token_id, device=states.device)
    of_image = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache(config=decoder.config))
    decoder(input_ids=start, encoder_hidden_states=states, past_key_values=of_image, use_cache=True)
    of_image.cross_attention_cache.batch_repeat_interleave(max(config.num_beams or 1, config.num_return_sequences or 1))
    cache = _BeamCache(DynamicCache(config=decoder.config), of_image.cross_attention_cache)
    start = torch.cat([start, start.new_tensor([*prompt]).expand(len(start), -1)], 1)
    return decoder.generate(
        start,
        attention_mask=torch.ones_like(start),
        generation_config=config,
        logits_processor=logits_processor,
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
    if bundle.wishes is not None:
        found = constrain.search(generate_tokens, bundle, states, 1, pixel_values, **settings)
        return [best.text for best, *_ in found]
    return decode(bundle.tokenizer, generate_tokens(bundle.model, states, **settings))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor | Sequence[Sequence[int]]) -> list[str]:
    """Token ids (batch, length) -> captions, special tokens left out and white space tidied."""
    texts = tokenizer.batch_decode(
        cast(torch.Tensor, tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [" ".join(text.split()) for text in texts]


# ---- many images

Key = TypeVar("Key")
Made = TypeVar("Made")


def in_batches(
    bundle: Bundle,
    pictures: Iterable[tuple[Key, np.ndarray]],
    batch_size: int,
    make: Callable[[Bundle, torch.Tensor], Sequence[Made]],
    total: int | None = None,
    description: str | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Key, Made, float]]:
    """Each picture's key with what `make` makes of it, and its share of the seconds; a bar on stderr shows the rate.

    Args:
        pictures: their contents are uint8 pixels (3, height, width).
        make: takes the bundle and normalised pixels, (batch, channels, height, width); returns one thing per image.
        total: how many pictures there are; no bar is shown for one batch.
        after_batch: called when everything of a batch has been taken.
    """
    pictures = iter(pictures)
    with cli.bar(total=total, unit="image", desc=description, disable=(total or 0) <= batch_size) as bar:
        while batch := list(itertools.islice(pictures, batch_size)):
            began = time.perf_counter()
            stacked = torch.from_numpy(np.stack([pixels for _, pixels in batch])).to(bundle.model.device)
            made = make(bundle, bundle.pixels.normalise(stacked))
            seconds = (time.perf_counter() - began) / len(batch)
            yield from ((key, one, seconds) for (key, _), one in zip(batch, made, strict=True))
            after_batch()
            bar.update(len(batch))


BATCH_SIZE = 16  # images; scores that are told are computed with it, for another one rounds otherwise


def caption_all(
    bundle: Bundle,
    images: Iterable[tuple[Key, Image.Image]],
    total: int,
    description: str,
    batch_size: int = BATCH_SIZE,
    make: Callable[[Bundle, torch.Tensor], Sequence[Made]] = generate,  # type: ignore[assignment]
) -> dict[Key, Made]:
    """The caption of each image, by its key.

    Args:
        make: as in `in_batches`.
    """
    pictures = ((key, bundle.pixels(image)) for key, image in images)
    made = in_batches(bundle, pictures, batch_size, make, total, description)
    return {key: caption for key, caption, _ in made}
