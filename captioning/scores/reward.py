"""CIDEr-D as a reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count

from captioning.scores.metrics import _cider_d, _count_ngrams, _Counted, _squared_idf
from captioning.scores.ptb import tokenize

END = " </s>"  # no word of any caption: the tokenizer would have split it


class CiderReward:
    """CIDEr-D of sampled captions, the document frequencies being those of the training captions.

    Every caption, sampled or written by a person, is given an end mark as its last word, so that one that stops in
    mid-sentence ("a man with a") earns less than one that ends as people end (https://arxiv.org/abs/2003.09971
    discusses the baseline that goes with it; the bad endings are well known).

    Args:
        references: {image id: its captions}, of the images to be trained on.
    """

    BITS = 24  # of a word's number: more words than any data set has

    def __init__(self, references: Mapping[int, Sequence[str]]):
        self._number = defaultdict(count(1).__next__)
        tokenized = iter(tokenize([caption for captions in references.values() for caption in captions]))
        self._references = {i: [next(tokenized) + END for _ in captions] for i, captions in references.items()}
        self._idf = _squared_idf(map(self._count, self._references.values()))

    def __call__(self, image_ids: Sequence[int], captions: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """
        Args:
            image_ids: which image each caption describes.
            captions: what is to be rewarded, one or several for an image.
            ended: whether the caption came to an end by itself.

        Returns:
            CIDEr-D of each caption, 0 to 10.
        """
        texts = [text + END * end for text, end in zip(tokenize(captions), ended, strict=True)]
        targets = {i: self._count(self._references[i]) for i in set(image_ids)}
        return _cider_d(self._count(texts), [targets[i] for i in image_ids], self._idf)

    def _count(self, captions: list[str]) -> list[_Counted]:
        return _count_ngrams(captions, self._number, self.BITS)
