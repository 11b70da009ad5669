"""Caption scores: {image id: caption} against {image id: [references]} -> numbers that match the papers'.

    from captioning.scores.metrics import coco_scores
    coco_scores({42: "a dog runs"}, {42: ["A dog is running.", "The brown dog runs."]})
    evaluate(...)      # the same, with the scores of each image, a signature, and what intervals are drawn from

BLEU-1..4, ROUGE-L and CIDEr-D follow the official COCO caption evaluation (pycocoevalcap), its tokenizer included,
without Java: equal to it within floating-point rounding. ROUGE-1, ROUGE-2 and ROUGE-Lsum are those of the `rouge_score`
package. Where the references are not in English, words are those of `words.choose`, and `protocol` says so. Importing
this module is cheap (no torch, no numpy).

Each score has a file with its formula and its paper. A new one is computed in `coco_scores` and named in `names`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, overload

from captioning import InputError
from captioning.scores import bleu, ngrams
from captioning.scores.cider import InverseDocumentFrequencies, cider_d, document_frequencies
from captioning.scores.names import ROUGE_KEYS
from captioning.scores.rouge import rouge_l, rouge_score
from captioning.scores.signature import signature_of
from captioning.scores.words import ENGLISH, Words, choose


def protocol(references: Iterable[Sequence[str]]) -> str:
    """What the scores against these references are, in one sentence.

    Args:
        references: the captions of each image.
    """
    return _protocol(_words(references))


def _protocol(words: Words) -> str:
    return f"one caption per image against all of its references; {words.protocol}, best over the references"


def _words(references: Iterable[Sequence[str]]) -> Words:
    return choose(caption for captions in references for caption in captions)


@overload
def coco_scores(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    per_image: Literal[False] = ...,
    rouge: bool = ...,
) -> dict[str, float]: ...


@overload
def coco_scores(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    per_image: Literal[True],
    rouge: bool = ...,
) -> tuple[dict[str, float], dict[int, dict[str, float]]]: ...


def coco_scores(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    per_image: bool = False,
    rouge: bool = True,
) -> dict[str, float] | tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Score one caption per image against all of the image's references.

    Args:
        predictions: {image id: caption}. An empty caption is allowed and scores 0; only if a reference has
            no words either, ROUGE-L is 1, as in the official code.
        references: {image id: captions}, the same ids, at least one caption each; any order of ids.
        per_image: also return the scores of every image.
        rouge: also compute rouge_1, rouge_2 and rouge_lsum.

    Returns:
        {name: score}, or ({name: score}, {image id: {name: score}}) with `per_image`.

        bleu_1..bleu_4  0..1   corpus BLEU (Papineni et al., 2002), closest reference length. Per image: the
                               same formula on that image alone; the corpus score is not their mean.
        rouge_l         0..1   F score with beta = 1.2 of the best precision and the best recall over the
                               references (Lin, 2004), mean over images.
        cider_d         0..~10 CIDEr-D (Vedantam et al., 2015), n = 1..4, sigma = 6, mean over images.
                               Document frequencies come from `references`: the score of an image depends on
                               the others, and a set of one image scores 0.
        rouge_1, rouge_2, rouge_lsum  0..1  what `rouge_score` gives on the raw strings without stemming
                               (use_stemmer=False): best F-measure over the references, mean over images.

        What a word is depends on the language of the references, see `protocol`.

        Everything is 0 for an empty set.

    Raises:
        InputError: the ids differ, an image has no reference, or a caption is not a string.
    """
    found = evaluate(predictions, references, rouge)
    return (found.scores, found.per_image()) if per_image else found.scores


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of captions, and what each image adds to them.

    Attributes:
        ids: of the images, in the order of every list below.
        scores: {name: score of the set}, see `coco_scores`.
        each: {name: score of each image}. A score of the set is their mean, but for BLEU and for what is in `sums`.
        bleu_statistics: of each image, see `bleu.statistics`.
        sums: {name: (numerators, denominators)} of scores that are a ratio of two sums over the images.
        protocol: what the scores are, in one sentence.
        signature: the same for machines, see `signature`.
    """

    ids: list[int]
    scores: dict[str, float]
    each: dict[str, list[float]]
    bleu_statistics: list[list[int]]
    protocol: str
    signature: str
    sums: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)

    def per_image(self) -> dict[int, dict[str, float]]:
        """{image id: {name: score}}"""
        return {i: {key: values[k] for key, values in self.each.items()} for k, i in enumerate(self.ids)}

    def with_ratio(self, name: str, numerators: Mapping[int, float], denominators: Mapping[int, float]) -> Evaluation:
        """Itself with one more score, which comes first: a ratio of two sums, such as nats and tokens, by image id."""
        above, below = [numerators[i] for i in self.ids], [denominators[i] for i in self.ids]
        return replace(
            self,
            scores={name: math.fsum(above) / math.fsum(below), **self.scores},
            each={name: [one / other for one, other in zip(above, below, strict=True)], **self.each},
            sums={name: (above, below), **self.sums},
        )

    def with_means(self, **each: Sequence[float]) -> Evaluation:
        """Itself with more scores, which are means over the images; of each the scores in the order of `ids`."""
        means = {name: math.fsum(values) / len(values) for name, values in each.items()}
        return replace(self, scores=self.scores | means, each=self.each | {k: list(v) for k, v in each.items()})


def evaluate(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    rouge: bool = True,
    more: Mapping[str, Callable[[str, Sequence[str]], float]] | None = None,
) -> Evaluation:
    """As `coco_scores`, with all that it depends on.

    Args:
        more: other scores of one caption against its references, by name. That of the set is their mean.
    """
    _check(predictions, references)
    ids = list(references)
    words = _words(references.values())
    # Each dict in its own order, as in the official code: what follows a caption can matter to the tokenizer.
    token_of = dict(zip(predictions, words.tokenize(predictions.values()), strict=True))
    tokens = [token_of[i] for i in ids]
    flat = iter(words.tokenize([caption for captions in references.values() for caption in captions]))
    reference_tokens = [[next(flat) for _ in captions] for captions in references.values()]
    said = list(map(ngrams.count, tokens))
    written = [list(map(ngrams.count, captions)) for captions in reference_tokens]

    statistics = bleu.statistics(said, written)
    bleus = list(map(bleu.bleu_of, statistics))
    each: dict[str, list[float]] = {f"bleu_{n + 1}": [row[n] for row in bleus] for n in range(4)}
    each["rouge_l"] = list(map(rouge_l, tokens, reference_tokens))
    each["cider_d"] = cider_d(said, written, InverseDocumentFrequencies(*document_frequencies(written)))
    if rouge:
        rows = [rouge_score(predictions[i], references[i], words.split) for i in ids]
        each |= {key: [row[k] for row in rows] for k, key in enumerate(ROUGE_KEYS)}
    for name, score in (more or {}).items():
        each[name] = [float(score(predictions[i], references[i])) for i in ids]

    # BLEU of the corpus is not the mean over its images.
    scores = {key: math.fsum(values) / len(values) if values else 0.0 for key, values in each.items()}
    scores |= {f"bleu_{n + 1}": score for n, score in enumerate(bleu.bleu_of(bleu.total(statistics)))}
    return Evaluation(ids, scores, each, statistics, _protocol(words), signature_of(references.values(), words))


def _check(predictions: Any, references: Any) -> None:
    """Refuse what cannot be scored, naming the first offender."""
    for name, value in (("predictions", predictions), ("references", references)):
        if not isinstance(value, Mapping):
            raise InputError(f"{name} must be a dict keyed by image id, not {type(value).__name__}.")
    for missing, where, other in (
        (references.keys() - predictions.keys(), "references", "prediction"),
        (predictions.keys() - references.keys(), "predictions", "reference"),
    ):
        if missing:
            example = min(missing, key=str)
            raise InputError(
                f"{len(missing)} image(s) of the {where} have no {other}, for example id {example!r}: "
                "pass one prediction and at least one reference for the same ids."
            )
    for image_id, caption in predictions.items():
        if not isinstance(caption, str):
            raise InputError(
                f"The prediction of image {image_id!r} is {type(caption).__name__}, not a string: "
                "pass one decoded caption per image."
            )
        captions = references[image_id]
        if isinstance(captions, str) or not isinstance(captions, list | tuple):
            raise InputError(
                f"The references of image {image_id!r} are {type(captions).__name__}, not a list of strings: "
                "wrap them in a list."
            )
        if not captions:
            raise InputError(f"Image {image_id!r} has no reference: drop the image or give it a caption.")
        for reference in captions:
            if not isinstance(reference, str):
                raise InputError(
                    f"A reference of image {image_id!r} is {type(reference).__name__}, not a string: "
                    "drop it or convert it."
                )


@cache
def _coco_caption_metric() -> type:
    """Make the class on demand, because importing `evaluate` takes seconds and loads torch."""
    import evaluate
    from datasets import Features, List, Value

    class CocoCaptionMetric(evaluate.Metric):
        """`coco_scores` as an `evaluate.Metric`. It needs no network.

            from captioning.scores.metrics import CocoCaptionMetric
            metric = CocoCaptionMetric()
            metric.add_batch(predictions=["a dog"], references=[["A dog.", "One dog runs."]])
            metric.compute()

        It takes one prediction and a list of references for each image, and returns what `coco_scores` returns.
        `compute(rouge=False)` leaves out rouge_1, rouge_2 and rouge_lsum.
        """

        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=_protocol(ENGLISH),
                citation="",
                inputs_description="predictions: one caption per image; references: its captions.",
                features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
            )

        def _compute(self, predictions: list[str], references: list[list[str]], rouge: bool = True) -> dict[str, float]:
            return coco_scores(dict(enumerate(predictions)), dict(enumerate(references)), rouge=rouge)

    CocoCaptionMetric.__qualname__ = "CocoCaptionMetric"  # its instances can be pickled, and found by name
    return CocoCaptionMetric


def __getattr__(name: str) -> type:
    if name == "CocoCaptionMetric":
        return _coco_caption_metric()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
