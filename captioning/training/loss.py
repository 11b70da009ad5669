"""The cross-entropy of captions: forward and backward in one pass over the vocabulary on a CPU.

For a decoder of a few layers the logits are the largest tensor of an update: 1,000 tokens times 5,000 words. Plain
autograd makes seven tensors of that size in float32, each written to memory and read again. Here blocks of a few rows
stay in the processor's cache, and one tensor is written: the gradient, in the type of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from captioning.model.packing import IGNORED

BLOCK = 2**18  # logits at a time: 1 MB in float32, which a core's own cache holds


def caption_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy in nats per token.

    Args:
        logits: (..., vocabulary)
        labels: (...), aligned with `logits` (not shifted again); -100 counts for nothing.
        num_items: tokens to divide by, which under gradient accumulation are those of the whole update; None: those
            of this batch.
        smoothing: label smoothing (https://arxiv.org/abs/1512.00567), 0 to 1.
    """
    labels = labels.flatten()
    counts = labels != IGNORED
    weights = counts / (counts.sum() if num_items is None else num_items)
    return weighted_loss(logits.flatten(0, -2), labels.where(counts, 0), weights, smoothing)


def weighted_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """The sum over tokens of weight times cross-entropy, computed in float32.

    Args:
        logits: (tokens, vocabulary)
        labels: (tokens,), each a word of the vocabulary.
        weights: (tokens,)
        smoothing: label smoothing, 0 to 1.
    """
    if logits.device.type == "cpu":
        return _InBlocks.apply(logits, labels, weights, smoothing)
    losses = functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return (weights * losses).sum()


class _InBlocks(torch.autograd.Function):
    """Of a token with the probabilities p, the label y, the weight w, the smoothing s and V words:

    loss      -w ((1 - s) log p[y] + s / V sum(log p))
    gradient   w (p - s / V), less w (1 - s) at y
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, smoothing: float
    ) -> torch.Tensor:
        vocabulary = logits.shape[1]
        rows = max(1, BLOCK // vocabulary)
        labels, weights = labels[:, None], weights.float()[:, None]
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=logits.device)
        for start in range(0, len(logits), rows):
            here = slice(start, start + rows)
            y, w = labels[here], weights[here]
            log_p = logits[here].log_softmax(-1, dtype=torch.float32)
            each = (1 - smoothing) * log_p.gather(1, y)
            if smoothing:
                each += smoothing / vocabulary * log_p.sum(1, keepdim=True)
            loss -= (w * each).sum()
            if gradient is not None:
                p = log_p.exp_()
                if smoothing:
                    p -= smoothing / vocabulary
                p.scatter_add_(1, y, torch.full_like(w, smoothing - 1))
                gradient[here] = p.mul_(w)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if upstream == 1 else gradient * upstream.to(gradient.dtype), None, None, None
