"""CIDEr-D (Vedantam et al., 2015, https://arxiv.org/abs/1411.5726), as in the official COCO caption evaluation.

An n-gram counts for more, the fewer images have it in their references. A caption with the n-grams g, and a reference
with the n-grams r, n being 1, 2, 3 or 4, are

    sim(g, r) = sum over n-grams of min(g, r) * r * idf^2  /  (|g| |r|),    idf = log(images) - log(images with it)

similar, and the score is

    CIDEr-D = 10 * mean over n and references of  sim(g, r) * exp(-(difference of lengths)^2 / (2 * 6^2))

Two official details are easy to lose: the length is the number of *bigrams*, and an n-gram that no reference has gets
the idf of one that a single image has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from captioning.scores.ngrams import ORDERS, Ngrams

SIGMA = 6.0  # of the Gaussian penalty


def document_frequencies(references: Iterable[Sequence[Ngrams]]) -> tuple[int, dict[int, int]]:
    """How many images there are, and how many of them have each n-gram in their references, if several have.

    Args:
        references: of each image.
    """
    images, frequencies = 0, Counter[int]()
    for captions in references:
        frequencies.update(set().union(*[grams for caption in captions for grams in caption.counts]))
        images += 1
    return images, {gram: times for gram, times in frequencies.items() if times > 1}


class InverseDocumentFrequencies:
    """How rare each n-gram is.

    Args:
        images: how many there are.
        frequencies: {n-gram: how many images have it in their references}. Most n-grams are in those of one image;
            they are left out.
    """

    def __init__(self, images: int, frequencies: Mapping[int, int]):
        log_images = math.log(max(1, images))
        self._once = log_images**2
        self._squared = {gram: (log_images - math.log(times)) ** 2 for gram, times in frequencies.items()}

    def squared(self, gram: int) -> float:
        """The square of the inverse document frequency."""
        return self._squared.get(gram, self._once)

    def norms(self, caption: Ngrams) -> list[float]:
        """|g| for n = 1, 2, 3, 4."""
        return [
            math.sqrt(sum([(times * times) * self.squared(gram) for gram, times in grams.items()]))
            for grams in caption.counts
        ]


def cider_d(
    captions: Sequence[Ngrams], references: Sequence[Sequence[Ngrams]], idf: InverseDocumentFrequencies
) -> list[float]:
    """CIDEr-D of each caption against its references, 0 to 10.

    Args:
        captions: one or several of an image, in any order.
        references: of each caption, one or more.
        idf: officially of all images that are evaluated.
    """
    scores: list[float] = []
    last: Sequence[Ngrams] = ()
    own_norms: list[list[float]] = []
    for caption, own in zip(captions, references, strict=True):
        norms = idf.norms(caption)
        if own is not last:  # captions of one image follow each other where there are several
            last, own_norms = own, [idf.norms(reference) for reference in own]
        score = 0.0
        for reference, reference_norms in zip(own, own_norms, strict=True):
            score += _similarity(caption, norms, reference, reference_norms, idf)
        scores.append(10 * score / ORDERS / len(own))
    return scores


def _similarity(
    caption: Ngrams,
    norms: Sequence[float],
    reference: Ngrams,
    reference_norms: Sequence[float],
    idf: InverseDocumentFrequencies,
) -> float:
    """The sum over n of the formula above, times the penalty for another length."""
    similarity = 0.0
    for grams, others, norm, other_norm in zip(caption.counts, reference.counts, norms, reference_norms, strict=True):
        if norm and other_norm:
            products = [
                min(times, others[gram]) * others[gram] * idf.squared(gram)
                for gram, times in grams.items()
                if gram in others
            ]
            similarity += sum(products) / (norm * other_norm)
    delta = max(caption.length - 1, 0) - max(reference.length - 1, 0)  # in bigrams
    return similarity * math.exp(-(delta**2) / (2 * SIGMA**2))
