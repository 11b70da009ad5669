"""BLEU-1..4 (Papineni et al., 2002, https://aclanthology.org/P02-1040), as in the official COCO caption evaluation.

The modified precision p of the n-grams is the share of a caption's n-grams that are in a reference, an n-gram counted
no more often than in the reference that has it most often. BLEU-n is the geometric mean of the first n precisions,
times a penalty for captions that are shorter than their references:

    BLEU-n = (p_1 * ... * p_n)^(1/n) * min(1, exp(1 - closest reference length / length))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from captioning.scores.ngrams import ORDERS, Ngrams, check_counters


def bleu(captions: Sequence[Ngrams], references: Sequence[Sequence[Ngrams]]) -> tuple[list[float], list[list[float]]]:
    """BLEU of a corpus, and of each of its captions.

    Args:
        captions: one of each image.
        references: of each image, one or more, counted by the counter of `captions`.

    Returns:
        ([BLEU-1..4 of the corpus], [[BLEU-1..4] of each caption]). The corpus's is 0 if there are no captions.

    Raises:
        ValueError: the n-grams are of different counters.
    """
    check_counters({caption.counter for caption in captions} | {r.counter for rs in references for r in rs})
    rows = [_statistics(caption, own) for caption, own in zip(captions, references, strict=True)]
    corpus = _from_statistics(list(map(sum, zip(*rows, strict=True)))) if rows else [0.0] * ORDERS
    return corpus, list(map(_from_statistics, rows))


def _statistics(caption: Ngrams, references: Sequence[Ngrams]) -> list[int]:
    """N-grams that match (4), n-grams (4), length, closest reference length. Those of a corpus are their sums."""
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


def _from_statistics(row: Sequence[int]) -> list[float]:
    """BLEU-1..4. The two constants are the official code's; they decide the score when nothing matches."""
    correct, guess, (length, closest) = row[:ORDERS], row[ORDERS:-2], row[-2:]
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (correct[n] + tiny) / (guess[n] + small)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores
