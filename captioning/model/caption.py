"""A generated caption with what the model thinks of it, and the captions of many images, by any kind of captioner."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from captioning import cli
from captioning.model import wishes

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


def ids_of_end(told: Any) -> list[int]:
    """The ids that end a caption, of a model's `eos_token_id`: one, a list of several, or None."""
    return [told] if isinstance(told, int) else list(told or ())


def length_to_end(ids: Sequence[int], ends: Sequence[int]) -> int:
    """How many tokens a caption has, its end included; all where it has none."""
    return next((place for place, token in enumerate(ids, 1) if token in ends), len(ids))


def ranked(
    rows: Iterable[tuple[int, str, list[int], list[float]]],
    images: int,
    end: Any,
    penalty: float,
    given: int = 0,
    by_score: bool = True,
) -> list[list[Caption]]:
    """The different captions of each image, the best one first.

    Args:
        rows: of each caption its image, its text, its ids up to the end token and padding after it, and their
            log-probabilities.
        end: the id of the end token, as `ids_of_end` takes it.
        penalty: the length penalty of the score.
        given: how many tokens are a prefix's.
        by_score: the best is the one with the highest score; otherwise the order of `rows` stays.
    """
    found: list[dict[str, Caption]] = [{} for _ in range(images)]
    ends = ids_of_end(end)
    for image, text, ids, values in rows:
        length = length_to_end(ids, ends)
        score = math.fsum(values[given:length]) / (length - given) ** penalty
        found[image].setdefault(text, Caption(text, score, ids[:length], values[:length], given))
    return [
        sorted(captions.values(), key=lambda caption: -caption.score) if by_score else list(captions.values())
        for captions in found
    ]


# ---- words; a bundle is a `captioner.Bundle` or an `onnx_captioner.OnnxBundle`


def shown_words(bundle: Any, caption: Caption) -> list[tuple[str, list[int]]]:
    """The words of a caption as it is shown, each with the positions of its tokens."""
    raw = words_of(bundle, caption.tokens)
    return [(text, raw[first][1]) for text, first in wishes.shown([text for text, _ in raw], caption.text)]


def chosen_words(bundle: Any, caption: Caption) -> list[tuple[str, float]]:
    """The words that the model chose, those of a prefix aside, each with its log-probability."""
    return [
        (text, math.fsum(caption.log_probabilities[i] for i in tokens))
        for text, tokens in shown_words(bundle, caption)
        if tokens[-1] >= caption.given
    ]


def words_of(bundle: Any, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a caption, each with the positions of its tokens.

    Words are what white space separates, and read together they are the decoded caption. Special tokens belong to none,
    and neither do tokens of punctuation that end a word: where a model looks for a full stop says nothing of the word.
    """
    kept = [position for position, token in enumerate(tokens) if token not in bundle.special_tokens]
    if not kept:
        return []
    # A token may be half a letter: what counts is how many words can be read by then.
    prefixes = [[tokens[position] for position in kept[: end + 1]] for end in range(len(kept))]
    read = bundle.decode(prefixes)
    words = read[-1].split()
    counts = [len(text.split()) for text in read]
    for i in reversed(range(len(counts) - 1)):
        counts[i] = min(counts[i], counts[i + 1])  # half a letter that turns out to be a space
    groups: dict[int, list[int]] = {}
    for count, position in zip(counts, kept, strict=True):
        groups.setdefault(max(count, 1), []).append(position)
    found, done = [], 0
    for count, positions in groups.items():
        if count > len(words):
            break  # white space alone
        alone = bundle.decode([[tokens[position]] for position in positions])
        end = len(positions)
        while end > 1 and not any(char.isalnum() for char in alone[end - 1]):
            end -= 1
        found.append((" ".join(words[done:count]), positions[:end]))
        done = count
    return found


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
