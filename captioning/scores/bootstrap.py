"""How much a score would differ with other images: bootstrap intervals, and two captioners compared.

    intervals(evaluation)            ->  {"cider_d": (0.674, 0.776), ...}
    differences(ours, theirs)        ->  {"cider_d": Difference(value=0.021, low=-0.003, high=0.045, p=0.09), ...}

The bootstrap (Efron, 1979; Koehn, 2004, https://aclanthology.org/W04-3250, for scores of texts) draws as many images
as there are, with replacement, many times, and scores each draw. 95 % of these scores lie in the interval, as many
below it as above it. It says what other images of the same kind would change. It says nothing of another seed of the
training.

Of each image only its statistics are kept. The scores of a draw follow from their sums: BLEU of the corpus from its
counts of n-grams, the loss from nats and tokens, every other score as a mean over images. The document frequencies of
CIDEr-D stay those of the whole split, so that an image has the same score in each draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from captioning.scores.bleu import ORDERS, SMALL, TINY

if TYPE_CHECKING:
    import numpy as np

    from captioning.scores.metrics import Evaluation

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
BLOCK = 2_000_000  # images drawn at a time, which keeps memory below 50 MB

PROTOCOL = (
    f"{LEVEL:.0%} percentile bootstrap over images, {RESAMPLES:,} resamples; "
    "the document frequencies of CIDEr-D stay those of the split"
)


@dataclass(frozen=True)
class Difference:
    """A score of one captioner minus that of another, on the same images.

    Attributes:
        value: on all images.
        low, high: its 95 % interval by the paired bootstrap.
        p: of the hypothesis that there is no difference, two-sided, by the same draws (Riezler and Maxwell, 2005,
            https://aclanthology.org/W05-0908): the share of draws whose difference is as far from `value` as `value` is
            from 0. At least 1 / (resamples + 1). One image says nothing of others: 1.
    """

    value: float
    low: float
    high: float
    p: float


def intervals(evaluation: Evaluation, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each score; none if there are no images."""
    return intervals_of(replicates(evaluation, resamples, seed) if evaluation.ids else {})


def intervals_of(drawn: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The same of scores that were drawn already."""
    return {name: _interval(scores) for name, scores in drawn.items()}


def differences(
    ours: Evaluation, theirs: Evaluation, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Difference]:
    """Each score of `ours` minus that of `theirs`, both drawn with the same images.

    Raises:
        ValueError: they are not of the same images in the same order.
    """
    if ours.ids != theirs.ids:
        raise ValueError("These evaluations are of different images, or of another order.")
    if not ours.ids:
        return {}
    return differences_of(ours, theirs, *(replicates(one, resamples, seed) for one in (ours, theirs)))


def differences_of(
    ours: Evaluation, theirs: Evaluation, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> dict[str, Difference]:
    """The same of scores that were drawn already, `first` of `ours` and `second` of `theirs`."""
    found = {}
    for name in first.keys() & second.keys():
        drawn, value = first[name] - second[name], ours.scores[name] - theirs.scores[name]
        # Differences of rounding are none. Two equal captioners must not differ with certainty, and where few images
        # differ, many draws are exactly as far from `value` as it is from 0.
        rounding = 1e-12 * max(1.0, abs(ours.scores[name]), abs(theirs.scores[name]))
        as_far = int((abs(drawn - value) >= abs(value) - rounding).sum())
        low, high = _interval(drawn)
        found[name] = Difference(value, low, high, (as_far + 1) / (len(drawn) + 1) if len(ours.ids) > 1 else 1.0)
    return {name: found[name] for name in ours.scores if name in found}


def replicates(evaluation: Evaluation, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, np.ndarray]:
    """The scores of each draw: {name: (resamples,)}.

    Which images are drawn depends on their number and on `seed` alone. So the draws of two captioners are paired.
    """
    import numpy as np

    means = [name for name in evaluation.each if not name.startswith("bleu_")]
    columns = np.array(
        [
            *zip(*evaluation.bleu_statistics, strict=True),
            *(evaluation.each[name] for name in means if name not in evaluation.sums),
            *(column for pair in evaluation.sums.values() for column in pair),
        ],
        dtype=np.float64,
    )
    images = columns.shape[1]
    sums = np.concatenate([times @ columns.T for times in _draws(images, resamples, seed)]).T
    bleu, rest = sums[: 2 * ORDERS + 2], iter(sums[2 * ORDERS + 2 :])
    drawn = {f"bleu_{n + 1}": scores for n, scores in enumerate(_bleu(bleu))}
    drawn |= {name: next(rest) / images for name in means if name not in evaluation.sums}
    for name in evaluation.sums:
        numerator = next(rest)
        drawn[name] = numerator / next(rest)
    return {name: drawn[name] for name in evaluation.scores}


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each draw holds each image, in blocks: (draws, images), float64."""
    import numpy as np

    random = np.random.default_rng(seed)
    at_a_time = max(1, BLOCK // images)
    for begin in range(0, resamples, at_a_time):
        draws = min(at_a_time, resamples - begin)
        chosen = random.integers(images, size=(draws, images), dtype=np.int32)
        times = np.empty((draws, images))
        for row in range(draws):
            times[row] = np.bincount(chosen[row], minlength=images)
        yield times


def _bleu(sums: np.ndarray) -> list[np.ndarray]:
    """`bleu.bleu_of` of many corpora: (10, corpora) -> four times (corpora,)."""
    import numpy as np

    correct, guess, (length, closest) = sums[:ORDERS], sums[ORDERS:-2], sums[-2:]
    ratio = (length + TINY) / (closest + SMALL)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    products = np.cumprod((correct + TINY) / (guess + SMALL), axis=0)
    return [products[n] ** (1 / (n + 1)) * penalty for n in range(ORDERS)]


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
