"""The n-grams of tokenised captions, n = 1..4, which BLEU and CIDEr-D compare.

Every word has a number, the same in the whole process. An n-gram is one integer with the numbers of its words as
digits: unlike a tuple of strings it is quick to make and to hash, and it is no work for the garbage collector. So the
n-grams of any two captions can be compared, wherever they were counted. The numbers mean nothing in another process or
in a file.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import NamedTuple

ORDERS = 4  # n = 1..4
BITS = 32  # of a digit: no memory holds so many different words

_numbers: dict[str, int] = {}
_next = itertools.count(1)


class Ngrams(NamedTuple):
    """The n-grams of one caption."""

    length: int  # words
    counts: list[dict[int, int]]  # {1-gram: how often}, ..., {4-gram: how often}, in the caption's order


def count(caption: str) -> Ngrams:
    """The n-grams of a tokenised caption, whose words are separated by white space."""
    words = [_numbers.get(word) or _numbered(word) for word in caption.split()]
    grams, counts = words, [_count(words)]
    for n in range(1, ORDERS):
        grams = [gram << BITS | word for gram, word in zip(grams, words[n:], strict=False)]
        counts.append(_count(grams))
    return Ngrams(len(words), counts)


def _numbered(word: str) -> int:
    return _numbers.setdefault(word, next(_next))  # of two threads that meet it at once, one gives its number


def _count(grams: list[int]) -> dict[int, int]:
    """{n-gram: how often}. `Counter` is slow to make, and few captions repeat anything."""
    counts = dict.fromkeys(grams, 1)
    return counts if len(counts) == len(grams) else Counter(grams)
