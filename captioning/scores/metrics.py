"""Caption scores: {image id: caption} against {image id: [references]} -> numbers that match the papers'.

    from captioning.scores.metrics import coco_scores
    coco_scores({42: "a dog runs"}, {42: ["A dog is running.", "The brown dog runs."]})

BLEU-1..4, ROUGE-L and CIDEr-D follow the official COCO caption evaluation (pycocoevalcap), its tokenizer included,
without Java: equal to it within floating-point rounding. ROUGE-1, ROUGE-2 and ROUGE-Lsum are those of the `rouge_score`
package. Importing this module is cheap (no torch, no numpy).

Each score has a file with its formula and its paper. A new one is computed in `coco_scores` and named in `names`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, overload

from captioning import InputError
from captioning.scores.bleu import bleu
from captioning.scores.cider import InverseDocumentFrequencies, cider_d
from captioning.scores.names import ROUGE_KEYS
from captioning.scores.ngrams import NgramCounter
from captioning.scores.ptb import tokenize
from captioning.scores.rouge import rouge_l, rouge_score

PROTOCOL = (
    "one caption per image against all of its references; BLEU-1..4, ROUGE-L and CIDEr-D as in the official "
    "COCO caption evaluation (PTB tokenisation, punctuation removed); ROUGE-1, ROUGE-2 and ROUGE-Lsum as in "
    "rouge_score, best over the references"
)


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

        Everything is 0 for an empty set.

    Raises:
        InputError: the ids differ, an image has no reference, or a caption is not a string.
    """
    _check(predictions, references)
    ids = list(references)
    # Each dict in its own order, as in the official code: what follows a caption can matter to the tokenizer.
    token_of = dict(zip(predictions, tokenize(predictions.values()), strict=True))
    tokens = [token_of[i] for i in ids]
    flat = iter(tokenize([caption for captions in references.values() for caption in captions]))
    reference_tokens = [[next(flat) for _ in captions] for captions in references.values()]
    counter = NgramCounter()
    ngrams = list(map(counter.count, tokens))
    reference_ngrams = [list(map(counter.count, captions)) for captions in reference_tokens]

    corpus_bleu, bleus = bleu(ngrams, reference_ngrams)
    each = {f"bleu_{n + 1}": [row[n] for row in bleus] for n in range(4)}
    each["rouge_l"] = list(map(rouge_l, tokens, reference_tokens))
    each["cider_d"] = cider_d(ngrams, reference_ngrams, InverseDocumentFrequencies(reference_ngrams))
    if rouge:
        rows = [rouge_score(predictions[i], references[i]) for i in ids]
        each |= {key: [row[k] for row in rows] for k, key in enumerate(ROUGE_KEYS)}

    # BLEU of the corpus is not the mean over its images.
    scores = {key: math.fsum(values) / len(values) if values else 0.0 for key, values in each.items()}
    scores |= {f"bleu_{n + 1}": score for n, score in enumerate(corpus_bleu)}
    if not per_image:
        return scores
    return scores, {i: {key: values[k] for key, values in each.items()} for k, i in enumerate(ids)}


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
                description=PROTOCOL,
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
