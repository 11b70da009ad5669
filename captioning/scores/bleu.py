"""BLEU-1..4 (Papineni et al., 2002, https://aclanthology.org/P02-1040), as in the official COCO caption evaluation.

The modified precision p of the n-grams is the share of a caption's n-grams that are in a reference, an n-gram counted
no more often than in the reference that has it most often. BLEU-n is the geometric mean of the first n precisions,
times a penalty for captions that are shorter than their references:

    BLEU-n = (p_1 * ... * p_n)^(1/n) * min(1, exp(1 - closest reference length / length))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from captioning.scores.ngrams import ORDERS, Ngrams


def statistics(captions: Sequence[Ngrams], references: Sequence[Sequence[Ngrams]]) -> list[list[int]]:
    """Of each caption: n-grams that match (4), n-grams (4), length, closest reference length.

    They are all that BLEU depends on. The statistics of a corpus are the sums of those of its captions.

    Args:
        captions: one of each image.
        references: of each image, one or more.
    """
    return [_statistics(caption, own) for caption, own in zip(captions, references, strict=True)]


def total(rows: Sequence[Sequence[int]]) -> list[int]:
    """The statistics of a corpus; those of no caption are zeros."""
    return list(map(sum, zip(*rows, strict=True))) or [0] * (2 * ORDERS + 2)


def _statistics(caption: Ngrams, references: Sequence[Ngrams]) -> list[int]:
    correct = []
    for n, counts in enumerate(caption.counts):
        matched: dict[int, int] = {}
        for reference in references:
            other = reference.counts[n]
            for gram in counts.keys() & other.keys():
                matched[gram] = max(matched.get(gram, 0), min(counts[gram], other[gram]))
        correct.append(sum(matched.values()))
    guess = [max(0, caption.length - n) for n in range(ORDERS)]
    closest = min([(abs(reference.length - caption.length), reference.length) for reference in references])[1]
    return [*correct, *guess, caption.length, closest]


TINY, SMALL = 1e-15, 1e-9  # the official code's; they decide the score when nothing matches


def bleu_of(row: Sequence[int]) -> list[float]:
    """BLEU-1..4 of the statistics of a caption or of a corpus."""
    correct, guess, (length, closest) = row[:ORDERS], row[ORDERS:-2], row[-2:]
    ratio = (length + TINY) / (closest + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (correct[n] + TINY) / (guess[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores
