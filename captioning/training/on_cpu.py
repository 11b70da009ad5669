"""Attention and dropout of a decoder that learns in bfloat16 on a CPU: the same results with fewer passes over memory.

    prepare(model.decoder)  # before training

Matrix products in bfloat16 are so fast that what lies between them takes 40 % of an update. Torch's eager attention
turns scores into float32 and probabilities back; its fused attention is two to five times slower than plain products;
and its dropout draws an integer for each element. The modules and their weights stay GPT-2's own.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "bfloat16_on_cpu"


def prepare(decoder: Any) -> None:
    """Let every attention and every dropout of a decoder be those below."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    decoder.set_attn_implementation(ATTENTION)
    for module in decoder.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = Dropout


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention; what is written to memory has the type of the query, sums are taken in float32.

    Args:
        query: (batch, heads, queries, head size)
        key, value: (batch, heads, keys, head size)
        attention_mask: (batch or 1, heads or 1, queries, keys), added to the scores.
        scaling: of the scores.
        dropout: probability that a weight of the attention is left out.

    Returns:
        (batch, queries, heads, head size), and no weights.
    """
    # Contiguous rows are copied quickly here, and slowly where a product would have to transpose them first.
    scores = (query.contiguous() * scaling) @ key.contiguous().transpose(-1, -2)
    if attention_mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    with torch.autocast("cpu", enabled=False):  # which would copy the scores to float32; the kernel sums in it anyway
        weights = scores.softmax(-1)
    if dropout:
        weights = drop(weights, dropout)
    return (weights @ value.contiguous()).transpose(1, 2), None


class Dropout(torch.nn.Dropout):
    """`drop` while it is trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drop(x, self.p) if self.training and self.p else x


def drop(x: torch.Tensor, rate: float) -> torch.Tensor:
    """`x` with each element set to 0 with probability `rate`, and the others scaled by 1 / (1 - rate).

    From 16 random bits for each element, so that the rate is rounded to 1 / 65536. Torch's takes four times as long.
    """
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    below = round(rate * 2**16) - 2**15
    kept = torch.ge(bits[: x.numel()].view(x.shape), below, out=torch.empty(x.shape, dtype=x.dtype))
    return x * kept.div_(1 - rate)
