"""How sure a caption is: its probability of being right, learnt on the validation split.

    calibration = calibrate(captions, references, "Flickr8k")    # of the validation split
    calibration.caption(captions[42])                            # 0.81
    calibration.of_word(-1.7)                                    # 0.52: how often a person used such a word
    write(folder, calibration); read(folder)

* The **confidence of a caption** is the probability that its CIDEr-D is at least 0.3: that it says about what people
  say of the image. It is a logistic function of two numbers: the mean log-probability of the caption's tokens, and how
  many there are. Others were tried on validation, and added nothing: the least probable token, the margin between
  beams, the agreement of beams, repeated words.
* The **confidence of a word** is the probability that one of the image's references has it, by its own log-probability.
  A word is doubtful where that is below one half.

Both are logistic regressions as in Platt (1999, "Probabilistic outputs for support vector machines"), whose targets
leave room for the mistakes of a small sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError
from captioning.files import json_text, read_json, write_whole
from captioning.scores.metrics import coco_scores
from captioning.scores.words import choose

FILE = "confidence.json"
GOOD = 0.3  # CIDEr-D of a caption that is taken for right
DOUBTFUL = 0.5  # below that confidence, a word is doubtful
LEAST_IMAGES = 2
BINS = 10  # of a reliability plot
RIDGE = 1.0  # what keeps the weights of few captions small; with a thousand it does nothing


@dataclass(frozen=True)
class Judged:
    """A caption and how probable the model found it.

    Attributes:
        text: the caption.
        mean: log-probability of its tokens, natural logarithm, the end token's included.
        tokens: how many there are.
        words: each with the sum of its tokens' log-probabilities.
    """

    text: str
    mean: float
    tokens: int
    words: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Calibration:
    """Two logistic regressions, and what they were learnt from.

    Attributes:
        intercept, mean, tokens: weights of the confidence of a caption.
        word_intercept, word: of that of a word.
        good: CIDEr-D from which a caption counts as right.
        images: captions that it was learnt from.
        right: how many of them were.
        data: where they came from.
    """

    intercept: float
    mean: float
    tokens: float
    word_intercept: float
    word: float
    good: float
    images: int
    right: int
    data: str

    def caption(self, judged: Judged) -> float:
        """The confidence of a caption, 0 to 1."""
        return _sigmoid(self.intercept + self.mean * judged.mean + self.tokens * judged.tokens)

    def of_word(self, log_probability: float) -> float:
        """The confidence of a word, 0 to 1."""
        return _sigmoid(self.word_intercept + self.word * log_probability)

    def doubtful(self, log_probability: float) -> bool:
        """Whether a person is more likely not to use the word."""
        return self.of_word(log_probability) < DOUBTFUL


def calibrate(captions: Mapping[int, Judged], references: Mapping[int, Sequence[str]], data: str) -> Calibration:
    """Learn from the captions of the validation split.

    Args:
        captions: by image id.
        references: of the same images.
        data: their name.

    Raises:
        InputError: there are too few.
    """
    if len(captions) < LEAST_IMAGES:
        raise InputError(f"the confidence of captions needs {LEAST_IMAGES} images to learn from, and {data} has fewer")
    cider = _cider(captions, references)
    right = [cider[image] >= GOOD for image in captions]
    intercept, (mean, tokens) = _logistic([(one.mean, float(one.tokens)) for one in captions.values()], right)
    spoken = _spoken(captions, references)
    word_intercept, (word,) = _logistic([(value,) for value, _ in spoken], [used for _, used in spoken])
    return Calibration(
        intercept=intercept,
        mean=mean,
        tokens=tokens,
        word_intercept=word_intercept,
        word=word,
        good=GOOD,
        images=len(captions),
        right=sum(right),
        data=data,
    )


def _cider(captions: Mapping[int, Judged], references: Mapping[int, Sequence[str]]) -> dict[int, float]:
    said = {image: one.text for image, one in captions.items()}
    own = {image: references[image] for image in said}
    _, each = coco_scores(said, own, per_image=True, rouge=False)
    return {image: scores["cider_d"] for image, scores in each.items()}


def _spoken(captions: Mapping[int, Judged], references: Mapping[int, Sequence[str]]) -> list[tuple[float, bool]]:
    """The log-probability of each word, and whether a reference of its image has it."""
    tokenize = choose(caption for image in captions for caption in references[image]).tokenize
    texts = [word for one in captions.values() for word, _ in one.words]
    read = iter(tokenize(texts))
    found = []
    for image, one in captions.items():
        used = set(" ".join(tokenize(references[image])).split())
        for _, value in one.words:
            if parts := next(read).split():
                found.append((value, used.issuperset(parts)))
    return found


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _logistic(rows: Sequence[Sequence[float]], right: Sequence[bool]) -> tuple[float, list[float]]:
    """Intercept and weights of a logistic regression, by Newton's method.

    The inputs are standardised meanwhile, so that `RIDGE` means the same for each.
    """
    width = len(rows[0]) if rows else 1
    count, positive = len(rows), sum(right)
    means = [math.fsum(row[i] for row in rows) / count if rows else 0.0 for i in range(width)]
    scales = [
        math.sqrt(math.fsum((row[i] - means[i]) ** 2 for row in rows) / count) or 1.0 if rows else 1.0
        for i in range(width)
    ]
    inputs = [[1.0, *((row[i] - means[i]) / scales[i] for i in range(width))] for row in rows]
    high, low = (positive + 1) / (positive + 2), 1 / (count - positive + 2)  # Platt's targets
    targets = [high if one else low for one in right]
    weights = [0.0] * (width + 1)
    for _ in range(50):
        gradient = [0.0, *(RIDGE * weight for weight in weights[1:])]
        hessian = [[(RIDGE if i else 1e-9) * (i == j) for j in range(width + 1)] for i in range(width + 1)]
        for values, target in zip(inputs, targets, strict=True):
            chance = _sigmoid(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            for i, value in enumerate(values):
                gradient[i] += (chance - target) * value
                for j, other in enumerate(values):
                    hessian[i][j] += chance * (1 - chance) * value * other
        step = _solved(hessian, gradient)
        weights = [weight - change for weight, change in zip(weights, step, strict=True)]
        if max(map(abs, step)) < 1e-10:
            break
    slopes = [weight / scale for weight, scale in zip(weights[1:], scales, strict=True)]
    return weights[0] - sum(slope * mean for slope, mean in zip(slopes, means, strict=True)), slopes


def _solved(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """The solution of a small system of equations, by Gauss's elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(size):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


# ---- the run folder


def write(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration in a run folder."""
    meaning = (
        "of a caption of n tokens, x being the mean of their natural log-probabilities: confidence = 1 / (1 + "
        "exp(-(intercept + mean * x + tokens * n))), the probability that its CIDEr-D is at least "
        f"{calibration.good}; of a word with the log-probability y: 1 / (1 + exp(-(word_intercept + word * y))), the "
        "probability that a reference has it"
    )
    write_whole(folder / FILE, json_text({"meaning": meaning, **dataclasses.asdict(calibration)}, indent=2) + "\n")


def read(folder: Path) -> Calibration | None:
    """The calibration of a run folder; None where it has none.

    Raises:
        InputError: it cannot be read.
    """
    file = folder / FILE
    try:
        if not file.exists():
            return None
        content = read_json(file, "make it again with --calibrate")
        values = {field.name: content[field.name] for field in dataclasses.fields(Calibration)}
        for field in dataclasses.fields(Calibration):
            kinds = {"float": (int, float), "int": (int,), "str": (str,)}[str(field.type)]
            value = values[field.name]
            if not isinstance(value, kinds) or isinstance(value, bool) or (value != value):
                raise TypeError(f"{field.name} {value!r}")
        return Calibration(**values)
    except (ValueError, KeyError, TypeError, InputError) as error:
        reason = f"{type(error).__name__}: {error}".removesuffix("; make it again with --calibrate")
        raise InputError(f"'{file}' is no calibration of captions ({reason}); make it again with --calibrate") from None


def missing(flag: str, model_path: str, exported: bool) -> InputError:
    """What to say where a flag needs a calibration and the folder, of a run or `exported`, has none."""
    if exported:
        return InputError(
            f"{flag} needs {FILE}, which '{model_path}' lacks; export a run folder that has it, or copy it from there"
        )
    return InputError(
        f"{flag} needs {FILE}, which '{model_path}' lacks; make it with: python inference.py --model_path {model_path} "
        "--data_path DATA --split validation --calibrate"
    )


# ---- how good it is


@dataclass(frozen=True)
class Bin:
    """Captions of about the same confidence.

    Attributes:
        confidence: their mean.
        right: the share of them that is right.
        count: how many there are.
    """

    confidence: float
    right: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """How well confidence and score of captions agree.

    Attributes:
        auroc: the probability that of a right and a wrong caption the right one is surer (0.5: by chance; ties count
            one half); None where all are right, or none is.
        error: the expected calibration error (Guo et al., 2017, https://arxiv.org/abs/1706.04599): the mean distance of
            confidence and share of right captions over ten equal intervals, weighted by their captions.
        gain: by how much mean CIDEr-D is higher without the fifth that is the least sure.
        bins: those intervals that hold captions.
        good: CIDEr-D of a right caption.
    """

    auroc: float | None
    error: float
    gain: float
    bins: Sequence[Bin]
    good: float


def reliability(confidences: Sequence[float], cider_d: Sequence[float], good: float = GOOD) -> Reliability:
    """How well confidences and CIDEr-D of the same captions agree; at least one caption."""
    right = [value >= good for value in cider_d]
    parts: list[list[int]] = [[] for _ in range(BINS)]
    for number, confidence in enumerate(confidences):
        parts[min(int(confidence * BINS), BINS - 1)].append(number)
    bins = [
        Bin(
            math.fsum(confidences[i] for i in part) / len(part),
            sum(right[i] for i in part) / len(part),
            len(part),
        )
        for part in parts
        if part
    ]
    error = math.fsum(abs(one.confidence - one.right) * one.count for one in bins) / len(confidences)
    order = sorted(range(len(confidences)), key=lambda i: confidences[i])
    surest = order[len(order) // 5 :]
    gain = math.fsum(cider_d[i] for i in surest) / len(surest) - math.fsum(cider_d) / len(cider_d)
    return Reliability(_auroc(confidences, right), error, gain, bins, good)


def reliability_of(confidences: Mapping[Any, float], cider_d: Mapping[Any, float]) -> dict[str, Any]:
    """`reliability` of captions by image id, as results files tell it."""
    ids = list(confidences)
    found = reliability([confidences[i] for i in ids], [cider_d[i] for i in ids])
    return {
        "right_from_cider_d": found.good,
        "auroc": found.auroc,
        "expected_calibration_error": found.error,
        "cider_d_gained_without_the_least_sure_fifth": found.gain,
        "bins": [dataclasses.asdict(one) for one in found.bins],
    }


def told(found: Mapping[str, Any]) -> str:
    """`reliability_of` in one line."""
    ranks = ""
    if found["auroc"] is not None:
        ranks = f"AUROC {found['auroc']:.3f} for CIDEr-D from {found['right_from_cider_d']:g}, "
    return (
        f"confidence: {ranks}expected calibration error {found['expected_calibration_error']:.3f}; without the least "
        f"sure fifth, CIDEr-D changes by {found['cider_d_gained_without_the_least_sure_fifth']:+.3f}"
    )


def _auroc(confidences: Sequence[float], right: Sequence[bool]) -> float | None:
    """By the ranks of the right ones (Mann and Whitney, 1947)."""
    positive = sum(right)
    negative = len(right) - positive
    if not positive or not negative:
        return None
    order = sorted(range(len(right)), key=lambda i: confidences[i])
    ranks, start = 0.0, 0
    while start < len(order):
        stop = start
        while stop < len(order) and confidences[order[stop]] == confidences[order[start]]:
            stop += 1
        ranks += sum(right[i] for i in order[start:stop]) * (start + 1 + stop) / 2
        start = stop
    return (ranks - positive * (positive + 1) / 2) / (positive * negative)
