"""The tokens of an encoder, and the grid of patches that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from captioning import InputError

MOST_EXTRA_TOKENS = 16  # class, distillation and register tokens before the patches


def as_tokens(states: torch.Tensor) -> torch.Tensor:
    """A convolutional network's map of features, (batch, channels, rows, columns), as tokens; tokens stay.

    Returns:
        (batch, tokens, channels)
    """
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states


def patch_grid(tokens: int, size: Sequence[int], config: Any) -> tuple[int, int]:
    """(rows, columns) of the patches that an encoder's last `tokens` tokens stand for.

    Before them come a class token or none, a distillation token (DeiT), registers (DINOv2).

    Args:
        tokens: how many the encoder returns.
        size: (height, width) of its input in pixels.
        config: the encoder's; without a `patch_size` the grid is taken to be square. Of two encoders side by side, the
            first one decides.

    Raises:
        InputError: no grid has about as many patches.
    """
    config = getattr(config, "first", config)
    patch = getattr(config, "patch_size", None)
    if patch:
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        # Swin and its like halve the grid from stage to stage.
        rows, columns = size[0] // high, size[1] // wide
        while rows * columns > tokens:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        if rows * columns > 0 and tokens - rows * columns <= MOST_EXTRA_TOKENS:
            return rows, columns
    else:
        for extra in (0, 1, 2, 5):
            side = math.isqrt(max(tokens - extra, 0))
            if side and side * side == tokens - extra:
                return side, side
    raise InputError(
        f"the {tokens} tokens of a {config.model_type} encoder are no grid of patches, which explanations and encoders "
        "side by side need; name another encoder"
    )
