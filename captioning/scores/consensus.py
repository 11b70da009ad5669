"""How well a caption agrees with those of other images: its CIDEr-D against them.

agreement = Agreement([["a dog runs", ...], ...])          # the captions of every image of a store
agreement(["a dog sits", "a cat sits"], [3, 17, 4])        # -> [1.52, 0.08], against those of three of them
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from captioning.scores import ngrams
from captioning.scores.cider import InverseDocumentFrequencies, cider_d, document_frequencies
from captioning.scores.words import choose


class Agreement:
    """CIDEr-D of captions against those of some images, with the document frequencies of all images.

    Args:
        captions: of every image, one or more.
    """

    def __init__(self, captions: Sequence[Sequence[str]]):
        self.words = choose(itertools.chain.from_iterable(captions))
        flat = map(ngrams.count, self.words.tokenize(itertools.chain.from_iterable(captions)))
        self.counted = [[next(flat) for _ in own] for own in captions]
        self.idf = InverseDocumentFrequencies(*document_frequencies(self.counted))

    def __call__(self, captions: Iterable[str], images: Sequence[int]) -> list[float]:
        """Of each caption the mean over all captions of these images, 0 to 10.

        Args:
            images: their places in the store.
        """
        others = [caption for image in images for caption in self.counted[image]]
        counted = list(map(ngrams.count, self.words.tokenize(captions)))
        return cider_d(counted, [others] * len(counted), self.idf) if others else [0.0] * len(counted)
