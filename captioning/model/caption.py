"""A generated caption with what the model thinks of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Caption:
    """A generated caption and how probable the model finds it.

    Attributes:
        text: without special tokens, as it is shown.
        score: what beam search ranks by: the sum of `log_probabilities` over their number to the power of the length
            penalty, which is 1 unless the model says otherwise, and then their mean. Natural logarithm, at most 0.
            The tokens of a prefix that was asked for do not count.
        tokens: ids, those of a prefix included, and the end token where one was generated.
        log_probabilities: of each token, given the image and the tokens before it.
        given: how many of the tokens are a prefix's.
    """

    text: str
    score: float
    tokens: list[int]
    log_probabilities: list[float]
    given: int = 0

    @property
    def mean(self) -> float:
        """The mean log-probability of the tokens that the model chose."""
        chosen = self.log_probabilities[self.given :]
        return math.fsum(chosen) / len(chosen)
