"""The n-grams of tokenised captions, n = 1..4, which BLEU and CIDEr-D compare."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import count
from typing import NamedTuple

ORDERS = 4  # n = 1..4


class Ngrams(NamedTuple):
    """The n-grams of one caption. Compare them with those of the same counter only."""

    length: int  # words
    counts: list[dict[int, int]]  # {1-gram: how often}, ..., {4-gram: how often}, in the caption's order
    counter: NgramCounter


class NgramCounter:
    """Counts n-grams.

    The counter numbers every word that it meets. An n-gram is one integer with the numbers of its words as digits:
    unlike a tuple of strings it is quick to make and to hash, and it is no work for the garbage collector. Therefore
    n-grams of two counters must not be compared, and `check_counters` refuses to.
    """

    BITS = 32  # of a digit: no memory holds so many different words

    def __init__(self) -> None:
        self._number: defaultdict[str, int] = defaultdict(count(1).__next__)

    def count(self, caption: str) -> Ngrams:
        """The n-grams of a tokenised caption, whose words are separated by white space."""
        words = [self._number[word] for word in caption.split()]
        grams, counts = words, [_count(words)]
        for n in range(1, ORDERS):
            grams = [gram << self.BITS | word for gram, word in zip(grams, words[n:], strict=False)]
            counts.append(_count(grams))
        return Ngrams(len(words), counts, self)


def _count(grams: list[int]) -> dict[int, int]:
    """{n-gram: how often}. `Counter` is slow to make, and few captions repeat anything."""
    counts = dict.fromkeys(grams, 1)
    return counts if len(counts) == len(grams) else Counter(grams)


def check_counters(counters: set[NgramCounter]) -> None:
    """Refuse to compare the n-grams of several counters, where equal numbers can mean different words.

    Raises:
        ValueError: there is more than one counter.
    """
    if len(counters) > 1:
        raise ValueError("These n-grams are of different counters: count all captions with one NgramCounter.")
