"""Packing: all captions of an image in one decoder row.

TODO
"""

from __future__ import annotations

import torch
from transformers import VisionEncoderDecoderModel

IGNORED = -100  # cross_entropy's ignore_index


def packed_attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Which earlier tokens each token may see: those of its own caption.

    Args:
        segment_ids: (batch, length); padding is one segment of its own, so that no row of the mask is empty.

    Returns:
        bool (batch, 1, length, length), True where attention is allowed.
    """
    length = segment_ids.shape[1]
    same_caption = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (same_caption & causal)[:, None]


def decoder_mask(model: VisionEncoderDecoderModel, segment_ids: torch.Tensor) -> torch.Tensor:
    """`packed_attention_mask` as the model's kind of attention takes it."""
    mask = packed_attention_mask(segment_ids)
    if model.decoder.config._attn_implementation == "eager":
        # Eager attention adds its mask to the scores.
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask


@torch.no_grad()
def can_pack(model: VisionEncoderDecoderModel) -> bool:
    """Whether the decoder keeps packed captions apart: two captions, packed and each alone, must give the same logits.

    A kind of attention that takes no mask per position, or a decoder that counts positions itself, does not.
    """
    tokens = torch.arange(1, 5, device=model.device) % model.decoder.config.vocab_size
    features = torch.linspace(-1, 1, 2 * model.encoder.config.hidden_size, device=model.device)
    features = features.view(1, 2, -1)
    training = model.training
    model.eval()
    try:
        packed = model(
            encoder_outputs=(features,),
            decoder_input_ids=torch.cat([tokens, tokens])[None],
            decoder_position_ids=torch.arange(4, device=model.device).repeat(2)[None],
            decoder_attention_mask=decoder_mask(model, torch.tensor([[0] * 4 + [1] * 4], device=model.device)),
            use_cache=False,
        ).logits
        alone = model(encoder_outputs=(features,), decoder_input_ids=tokens[None], use_cache=False).logits
    except (ValueError, TypeError, RuntimeError):
        return False
    finally:
        model.train(training)
    return torch.allclose(packed, alone.repeat(1, 2, 1), atol=1e-3)


class LabelledProjection:
    """Lets a decoder's vocabulary projection see only the positions that have a label, as one row of them.

    The projection is the largest matrix product of a small decoder, and padding needs none of it.

    Attributes:
        positions: (labelled,), indices into the flattened (rows, length); None: every position is projected.
    """

    def __init__(self, projection: torch.nn.Module):
        self.positions: torch.Tensor | None = None
        projection.register_forward_pre_hook(self._select)

    def _select(self, projection, inputs):
        if self.positions is None:
            return None
        return (inputs[0].flatten(0, -2).index_select(0, self.positions)[None],)
