"""ROUGE (Lin, 2004, https://aclanthology.org/W04-1013) in two kinds.

* `rouge_l`: as in the official COCO caption evaluation, on tokenised captions.
* `rouge_score`: ROUGE-1, ROUGE-2 and ROUGE-Lsum as in the `rouge_score` package, on raw captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

BETA = 1.2  # of the official ROUGE-L: how much more recall counts than precision


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """The official ROUGE-L of one tokenised caption, 0 to 1.

    Precision and recall are the longest common subsequence's share of the caption and of the reference. The best
    precision P and the best recall R over the references give (1 + beta^2) P R / (R + beta^2 P), which is not the best
    F score. Words are separated by " " alone, so that an empty caption is one empty word, as in the official code.
    """
    words = caption.split(" ")
    positions = _positions(words)
    precision = recall = 0.0
    for reference in references:
        reference_words = reference.split(" ")
        common = _common_subsequence(positions, len(words), reference_words)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(reference_words))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def rouge_score(caption: str, references: Sequence[str]) -> tuple[float, float, float]:
    """(rouge1, rouge2, rougeLsum) as `rouge_score.rouge_scorer.RougeScorer(...).score_multi` gives them.

    Each is the best F score over the references, without stemming. They are computed here because the package takes
    seconds where this takes tenths. The package itself is called for captions of several lines, where ROUGE-Lsum is
    more than a longest common subsequence.
    """
    if any("\n" in text for text in (caption, *references)):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=False)
        best = scorer.score_multi(references, caption)
        return float(best["rouge1"].fmeasure), float(best["rouge2"].fmeasure), float(best["rougeLsum"].fmeasure)
    words, ones, twos = _rouge_words(caption)
    positions = _positions(words)
    best_1 = best_2 = best_l = 0.0
    for reference in references:
        other_words, other_ones, other_twos = _rouge_words(reference)
        size, other_size = len(words), len(other_words)
        best_1 = max(best_1, _f_score((ones & other_ones).total(), size, other_size))
        best_2 = max(best_2, _f_score((twos & other_twos).total(), size - 1, other_size - 1))
        best_l = max(best_l, _f_score(_common_subsequence(positions, size, other_words), size, other_size))
    return best_1, best_2, best_l


def _rouge_words(text: str) -> tuple[list[str], Counter[str], Counter[tuple[str, str]]]:
    """The words of `rouge_score` (lower case, runs of a-z and 0-9), and the counts of its 1- and 2-grams."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return words, Counter(words), Counter(pairwise(words))


def _f_score(common: int, size: int, other_size: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / size, common / other_size
    return 2 * precision * recall / (precision + recall)


def _positions(words: Sequence[str]) -> dict[str, int]:
    """{word: bit mask of where it stands in `words`}."""
    masks: dict[str, int] = {}
    for position, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << position
    return masks


def _common_subsequence(positions: dict[str, int], length: int, other: Sequence[str]) -> int:
    """Length of the longest common subsequence of `length` words with `positions`, and `other`.

    One row of the usual table is one integer (Hyyro, 2004, "Bit-parallel LCS-length computation revisited"): the work
    is one addition for each word of `other`.
    """
    ones = row = (1 << length) - 1
    for word in other:
        matches = row & positions.get(word, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & ones
    return length - row.bit_count()
