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
from collections.abc import Iterable, Sequence

from captioning.scores.ngrams import ORDERS, NgramCounter, Ngrams, check_counters

SIGMA = 6.0  # of the Gaussian penalty


class InverseDocumentFrequencies:
    """How rare each n-gram is, a document being all references of one image.

    Args:
        references: of each image, counted by one counter.

    Raises:
        ValueError: the n-grams are of different counters.
    """

    def __init__(self, references: Iterable[Sequence[Ngrams]]):
        images, document_frequency = 0, Counter[int]()
        self.counters: set[NgramCounter] = set()
        for captions in references:
            document_frequency.update(set().union(*[grams for caption in captions for grams in caption.counts]))
            self.counters.update(caption.counter for caption in captions)
            images += 1
        check_counters(self.counters)
        log_images = math.log(max(1, images))
        # Most n-grams are in the references of one image. The table leaves them out.
        self._once = log_images**2
        self._squared = {gram: (log_images - math.log(df)) ** 2 for gram, df in document_frequency.items() if df > 1}

    def squared(self, gram: int) -> float:
        """The square of the inverse document frequency."""
        return self._squared.get(gram, self._once)


def cider_d(
    captions: Sequence[Ngrams], references: Sequence[Sequence[Ngrams]], idf: InverseDocumentFrequencies
) -> list[float]:
    """CIDEr-D of each caption against its references, 0 to 10.

    Args:
        captions: one or several of an image, in any order.
        references: of each caption, one or more.
        idf: officially of all images that are evaluated; all by the counter of `captions` and `references`.

    Raises:
        ValueError: the n-grams are of different counters.
    """
    counters = {caption.counter for caption in captions} | {r.counter for rs in references for r in rs}
    check_counters(counters | idf.counters)

    def norm(grams: dict[int, int]) -> float:
        return math.sqrt(sum([(times * times) * idf.squared(gram) for gram, times in grams.items()]))

    scores = []
    for caption, own in zip(captions, references, strict=True):
        norms = list(map(norm, caption.counts))
        score = 0.0
        for reference in own:
            similarity = 0.0
            for grams, others, grams_norm in zip(caption.counts, reference.counts, norms, strict=True):
                others_norm = norm(others)
                if grams_norm and others_norm:
                    products = [
                        min(times, others[gram]) * others[gram] * idf.squared(gram)
                        for gram, times in grams.items()
                        if gram in others
                    ]
                    similarity += sum(products) / (grams_norm * others_norm)
            delta = max(caption.length - 1, 0) - max(reference.length - 1, 0)  # in bigrams
            score += similarity * math.exp(-(delta**2) / (2 * SIGMA**2))
        scores.append(10 * score / ORDERS / len(own))
    return scores
