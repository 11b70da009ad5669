"""A generated caption with what the model thinks of it, and the captions of many images, by any kind of captioner."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from captioning import cli

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass
class Caption:
    """A generated caption and how probable the model finds it.

    Attributes:
        text: without special tokens, as it is shown.
        score: what beam search ranks by: the sum of `log_probabilities` over their number to the power of the length
            penalty, which is 1 unless the model says otherwise, and then their mean. Natural logarithm, at most 0.
            The tokens of a prefix that was asked for do not count.
        tokens: ids, those of a prefix included, and the end token where one was generated.
        log_probabilities: of each token, given the image and the tokens before it.
        given: how many of the tokens are a prefix's.
    """

    text: str
    score: float
    tokens: list[int]
    log_probabilities: list[float]
    given: int = 0

    @property
    def mean(self) -> float:
        """The mean log-probability of the tokens that the model chose."""
        chosen = self.log_probabilities[self.given :]
        return math.fsum(chosen) / len(chosen)


def ranked(
    rows: Iterable[tuple[int, str, list[int], list[float]]], images: int, end: Any, penalty: float, given: int = 0
) -> list[list[Caption]]:
    """The different captions of each image, the best one first.

    Args:
        rows: of each caption its image, its text, its ids up to the end token and padding after it, and their
            log-probabilities.
        end: the id of the end token.
        penalty: the length penalty of the score.
        given: how many tokens are a prefix's.
    """
    found: list[dict[str, Caption]] = [{} for _ in range(images)]
    for image, text, ids, values in rows:
        length = ids.index(end) + 1 if end in ids else len(ids)
        score = math.fsum(values[given:length]) / (length - given) ** penalty
        found[image].setdefault(text, Caption(text, score, ids[:length], values[:length], given))
    return [sorted(captions.values(), key=lambda caption: -caption.score) for captions in found]


# ---- many images

BATCH_SIZE = 16  # images; scores that are told are computed with it, for another one rounds otherwise

Key = TypeVar("Key")
Made = TypeVar("Made")


def in_batches(
    bundle: Any,
    pictures: Iterable[tuple[Key, np.ndarray]],
    batch_size: int,
    make: Callable[[Any, Any], Sequence[Made]],
    total: int | None = None,
    description: str | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Key, Made, float]]:
    """Each picture's key with what `make` makes of it, and its share of the seconds; a bar on stderr shows the rate.

    Args:
        bundle: `captioner.Bundle` or `onnx_captioner.OnnxBundle`.
        pictures: their contents are uint8 pixels (3, height, width).
        make: takes the bundle and what its `batch` makes of pixels; returns one thing per image.
        total: how many pictures there are; no bar is shown for one batch.
        after_batch: called when everything of a batch has been taken.
    """
    pictures = iter(pictures)
    with cli.bar(total=total, unit="image", desc=description, disable=(total or 0) <= batch_size) as bar:
        while batch := list(itertools.islice(pictures, batch_size)):
            began = time.perf_counter()
            made = make(bundle, bundle.batch([pixels for _, pixels in batch]))
            seconds = (time.perf_counter() - began) / len(batch)
            yield from ((key, one, seconds) for (key, _), one in zip(batch, made, strict=True))
            after_batch()
            bar.update(len(batch))


def caption_all(
    bundle: Any,
    images: Iterable[tuple[Key, Image.Image]],
    total: int,
    description: str,
    make: Callable[[Any, Any], Sequence[Made]],
    batch_size: int = BATCH_SIZE,
) -> dict[Key, Made]:
    """What `make` makes of each image, by its key; see `in_batches`."""
    pictures = ((key, bundle.pixels(image)) for key, image in images)
    return {key: one for key, one, _ in in_batches(bundle, pictures, batch_size, make, total, description)}
