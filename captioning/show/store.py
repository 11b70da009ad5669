"""Captions with a store: the captions that people wrote for images which look alike.

    store = Store(captions, vectors)              # of the images of the store
    store.best_captions(bundle, pixel_values)     # in the place of `explain.best_captions`

The captions of an image's neighbours in the store do two things. Those that agree best with the others are candidates
beside what the search finds. And of all candidates the one is chosen that has the highest sum of how probable the
captioner finds it and how well it agrees with the neighbours' captions. Nothing is trained, so that another store takes
effect at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from captioning.model import explain, neighbours
from captioning.model.caption import Caption
from captioning.model.captioner import Bundle
from captioning.scores.consensus import Agreement

# Chosen on validation images, see tests/benchmarks/RESULTS.md.
NEIGHBOURS = 10  # images
WEIGHT = 0.5  # nats of mean log-probability that a CIDEr-D of 1 is worth
BEAMS = 10
CANDIDATES = 10  # captions of neighbours


class Store:
    """Images with captions, ready to be asked for what looks alike.

    Args:
        captions: of each image, one or more.
        vectors: float32 (images, dimensions), see `neighbours.vectors_of`.
        weight: nats of mean log-probability that a CIDEr-D of 1 against the neighbours' captions is worth; 0: they
            have no part, and neither have further beams.
    """

    def __init__(self, captions: Sequence[list[str]], vectors: np.ndarray, weight: float = WEIGHT):
        self.captions, self.gallery, self.weight = captions, neighbours.Gallery(vectors), weight
        self.agreement = Agreement(captions)

    def generate(self, bundle: Bundle, pixel_values: torch.Tensor) -> list[str]:
        """As the function of that name in `model.generate`, with the store."""
        return [best.text for best, *_ in self.best_captions(bundle, pixel_values)]

    @torch.inference_mode()
    def best_captions(self, bundle: Bundle, pixel_values: torch.Tensor, count: int = 1) -> list[list[Caption]]:
        """As `explain.best_captions`, with the store.

        The score and the log-probabilities of a caption are those that the model alone gives it.
        """
        return self.captions_of(bundle, bundle.model.encoder(pixel_values=pixel_values).last_hidden_state, count)

    def captions_of(self, bundle: Bundle, states: torch.Tensor, count: int = 1) -> list[list[Caption]]:
        """The same of what the encoder made of images, (images, tokens, hidden size)."""
        if not self.weight:
            return explain.search(bundle, states, count)
        near = self.nearest(bundle, states)
        found = explain.search(bundle, states, max(count, BEAMS))
        others = explain.judge(bundle, states, [self.agreeing(rows, CANDIDATES) for rows in near])
        return [self._ordered([*own, *more], rows)[:count] for own, more, rows in zip(found, others, near, strict=True)]

    def nearest(self, bundle: Bundle, states: torch.Tensor) -> list[list[int]]:
        """The neighbours of each image, the nearest first, as places in the store."""
        return self.gallery.nearest(neighbours.vectors_of(states, bundle.model.encoder), NEIGHBOURS)

    def agreeing(self, rows: Sequence[int], count: int) -> list[str]:
        """Of the captions of these images those that agree best with all of them."""
        captions = list(dict.fromkeys(caption for row in rows for caption in self.captions[row]))
        agreement = self.agreement(captions, rows)
        return [captions[i] for i in sorted(range(len(captions)), key=lambda i: -agreement[i])[:count]]

    def _ordered(self, captions: list[Caption], rows: Sequence[int]) -> list[Caption]:
        """Different captions of an image, the best one first."""
        by_text: dict[str, Caption] = {}
        for caption in captions:
            by_text.setdefault(caption.text, caption)
        agreement = dict(zip(by_text, self.agreement(by_text, rows), strict=True))
        return sorted(by_text.values(), key=lambda one: -(one.mean + self.weight * agreement[one.text]))
