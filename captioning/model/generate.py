"""Captions from an image: the same tokens as `model.generate`, several times faster."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessorList,
    VisionEncoderDecoderModel,
)

from captioning.model import constrain
from captioning.model.captioner import Bundle, decode


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
