"""Caption scores: {image id: caption} against {image id: [references]} -> numbers that match the papers'.

BLEU-1..4, ROUGE-L and CIDEr-D follow the official COCO caption evaluation (pycocoevalcap), its tokenizer
included, without Java: equal to it within floating-point rounding. ROUGE-1, ROUGE-2 and ROUGE-Lsum are those
of the `rouge_score` package. Plain Python; importing this module is cheap (no torch, no numpy).

    from captioning.metrics import coco_scores
    coco_scores({42: "a dog runs"}, {42: ["A dog is running.", "The brown dog runs."]})
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import count, pairwise
from typing import NamedTuple

from captioning import InputError
from captioning.scores.ptb import tokenize

COCO_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
PROTOCOL = (
    "one caption per image against all of its references; BLEU-1..4, ROUGE-L and CIDEr-D as in the official "
    "COCO caption evaluation (PTB tokenisation, punctuation removed); ROUGE-1, ROUGE-2 and ROUGE-Lsum as in "
    "rouge_score, best over the references"
)
ROUGE_KEYS = ("rouge_1", "rouge_2", "rouge_lsum")


def coco_scores(
    predictions: dict[int, str],
    references: dict[int, list[str]],
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
    hypothesis_of = dict(zip(predictions, tokenize(predictions.values()), strict=True))
    hypotheses = [hypothesis_of[i] for i in ids]
    flat = tokenize([caption for captions in references.values() for caption in captions])

    # The official code splits on any white space for BLEU and CIDEr, and on " " alone for ROUGE-L. It matters
    # for an empty caption, which is no word for the former and one empty word for the latter, and for the
    # no-break spaces that the tokenizer leaves inside phone numbers.
    counted = _count_ngrams(hypotheses + flat)
    counted, flat_counted = counted[: len(ids)], iter(counted[len(ids) :])
    flat = iter(flat)
    targets = [[next(flat) for _ in captions] for captions in references.values()]
    counted_targets = [[next(flat_counted) for _ in captions] for captions in references.values()]

    columns = _bleu(counted, counted_targets)
    columns["rouge_l"] = _mean_and_each([_rouge_l(h, ts) for h, ts in zip(hypotheses, targets, strict=True)])
    columns["cider_d"] = _mean_and_each(_cider_d(counted, counted_targets))
    if rouge:
        rows = [_rouge_score(predictions[i], references[i]) for i in ids]
        for key, values in zip(ROUGE_KEYS, zip(*rows, strict=True) if rows else [(), (), ()], strict=True):
            columns[key] = _mean_and_each(list(values))

    scores = {name: score for name, (score, _) in columns.items()}
    if not per_image:
        return scores
    return scores, {i: {name: each[k] for name, (_, each) in columns.items()} for k, i in enumerate(ids)}


def _check(predictions, references) -> None:
    """Refuse what cannot be scored, naming the first offender."""
    for name, value in (("predictions", predictions), ("references", references)):
        if not isinstance(value, dict):
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


class _Counted(NamedTuple):
    """A tokenised caption as n-grams."""

    length: int  # words
    counts: list[dict[int, int]]  # {1-gram: how often}, ..., {4-gram: how often}


def _count_ngrams(captions: list[str], number: defaultdict[str, int] | None = None, bits: int = 0) -> list[_Counted]:
    """Count the n-grams, n = 1..4, of tokenised captions.

    Words are numbered from 1, and an n-gram is the integer that has its words' numbers as digits: unlike a
    tuple of strings it is quick to make and to hash, and no work for the garbage collector.

    Args:
        number: what earlier calls numbered, where n-grams of several calls are to be compared ...
        bits: ... and the size of a digit in them.
    """
    number = defaultdict(count(1).__next__) if number is None else number
    rows = [[number[word] for word in caption.split()] for caption in captions]
    bits = bits or len(number).bit_length()
    counted = []
    for words in rows:
        grams, counts = words, [_count(words)]
        for n in range(1, 4):
            grams = [gram << bits | word for gram, word in zip(grams, words[n:], strict=False)]
            counts.append(_count(grams))
        counted.append(_Counted(len(words), counts))
    return counted


def _count(items: list) -> dict:
    """{item: how often}; `Counter` is slow to make, and few captions repeat anything."""
    counts = dict.fromkeys(items, 1)
    return counts if len(counts) == len(items) else Counter(items)


def _mean_and_each(values: list[float]) -> tuple[float, list[float]]:
    return (math.fsum(values) / len(values) if values else 0.0), values


def _bleu(hypotheses: list[_Counted], targets: list[list[_Counted]]) -> dict[str, tuple[float, list[float]]]:
    """BLEU-1..4 as {name: (score of the corpus, [score of each image])}."""
    each, total = [], [0] * 10
    for hypothesis, references in zip(hypotheses, targets, strict=True):
        length = hypothesis.length
        correct = []  # n-grams that a reference has, as often as the reference that has them most
        for n, counts in enumerate(hypothesis.counts):
            matched = {}
            for reference in references:
                other = reference.counts[n]
                for gram in counts.keys() & other.keys():
                    matched[gram] = max(matched.get(gram, 0), min(counts[gram], other[gram]))
            correct.append(sum(matched.values()))
        guess = [max(0, length - n) for n in range(4)]
        closest = min([(abs(reference.length - length), reference.length) for reference in references])[1]
        row = [*correct, *guess, length, closest]
        each.append(_bleu_from_counts(row))
        total = [a + b for a, b in zip(total, row, strict=True)]
    corpus = _bleu_from_counts(total) if each else [0.0] * 4
    return {f"bleu_{n + 1}": (corpus[n], [scores[n] for scores in each]) for n in range(4)}


def _bleu_from_counts(row: list[int]) -> list[float]:
    """BLEU-1..4 from matched n-grams (4), n-grams (4), length, closest reference length.

    The two constants are the official code's; they decide the score when nothing matches.
    """
    correct, guess, (length, closest) = row[:4], row[4:8], row[8:]
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(4):
        product *= (correct[n] + tiny) / (guess[n] + small)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def _rouge_l(hypothesis: str, targets: list[str], beta: float = 1.2) -> float:
    """ROUGE-L of one tokenised caption, from the best precision and the best recall (not the best F)."""
    words = hypothesis.split(" ")
    positions = _positions(words)
    precision = recall = 0.0
    for target in targets:
        target_words = target.split(" ")
        common = _lcs(positions, len(words), target_words)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(target_words))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _positions(words: list[str]) -> dict[str, int]:
    """{word: bit mask of where it stands in `words`}."""
    masks = {}
    for position, word in enumerate(words):
        masks[word] = masks.get(word, 0) | 1 << position
    return masks


def _lcs(positions: dict[str, int], length: int, other: list[str]) -> int:
    """Length of the longest common subsequence of `length` words with `positions`, and `other`.

    One row of the usual table is one integer (Hyyro, 2004): as many additions as `other` has words.
    """
    ones = row = (1 << length) - 1
    for word in other:
        matches = row & positions.get(word, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & ones
    return length - row.bit_count()


def _squared_idf(targets: Iterable[list[_Counted]]) -> tuple[float, dict[int, float]]:
    """Squared inverse document frequencies, a document being all references of one image.

    Returns:
        That of the n-grams of one image, which are most, and of those of none; and {n-gram: that of the others}.
    """
    document_frequency, images = Counter(), 0
    for references in targets:
        document_frequency.update(set().union(*[grams for ref in references for grams in ref.counts]))
        images += 1
    log_images = math.log(max(1, images))
    return log_images**2, {g: (log_images - math.log(df)) ** 2 for g, df in document_frequency.items() if df > 1}


def _cider_d(
    hypotheses: list[_Counted],
    targets: list[list[_Counted]],
    idf: tuple[float, dict[int, float]] | None = None,
    sigma: float = 6.0,
) -> list[float]:
    """CIDEr-D of each image: mean over n and references of a clipped tf-idf cosine, times 10.

    Two official details are easy to lose: the length in the Gaussian penalty is the number of *bigrams*,
    and an n-gram that no reference has gets the idf of one that occurs in a single image.

    Args:
        idf: of `_squared_idf`; by default that of `targets`, as in the official code.
    """
    once, table = idf or _squared_idf(targets)
    squared_idf = table.get

    def norm(grams: dict[int, int]) -> float:
        return math.sqrt(sum([times * times * squared_idf(gram, once) for gram, times in grams.items()]))

    scores = []
    for hypothesis, references in zip(hypotheses, targets, strict=True):
        norms = list(map(norm, hypothesis.counts))
        score = 0.0
        for reference in references:
            similarity = 0.0
            for grams, others, grams_norm in zip(hypothesis.counts, reference.counts, norms, strict=True):
                others_norm = norm(others)
                if grams_norm and others_norm:
                    products = [
                        min(grams[gram], others[gram]) * others[gram] * squared_idf(gram, once)
                        for gram in grams.keys() & others.keys()
                    ]
                    similarity += sum(products) / (grams_norm * others_norm)
            delta = max(hypothesis.length - 1, 0) - max(reference.length - 1, 0)
            score += similarity * math.exp(-(delta**2) / (2 * sigma**2))
        scores.append(10 * score / 4 / len(references))
    return scores


def _rouge_score(prediction: str, references: list[str]) -> tuple[float, float, float]:
    """(rouge1, rouge2, rougeLsum) as `rouge_score.rouge_scorer.RougeScorer(...).score_multi` gives them.

    Computed here because the package takes seconds where this takes tenths; the package itself is called for
    captions of several lines, where ROUGE-Lsum is more than a longest common subsequence.
    """
    if any("\n" in text for text in (prediction, *references)):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=False)
        best = scorer.score_multi(references, prediction)
        return tuple(float(best[name].fmeasure) for name in ("rouge1", "rouge2", "rougeLsum"))
    words, ones, twos = _rouge_words(prediction)
    positions = _positions(words)
    best = [0.0, 0.0, 0.0]
    for reference in references:
        ref_words, ref_ones, ref_twos = _rouge_words(reference)
        overlaps = (
            (sum((ones & ref_ones).values()), len(words), len(ref_words)),
            (sum((twos & ref_twos).values()), max(len(words) - 1, 0), max(len(ref_words) - 1, 0)),
            (_lcs(positions, len(words), ref_words), len(words), len(ref_words)),
        )
        for k, (common, size, ref_size) in enumerate(overlaps):
            if common:
                precision, recall = common / size, common / ref_size
                best[k] = max(best[k], 2 * precision * recall / (precision + recall))
    return tuple(best)


def _rouge_words(text: str) -> tuple[list[str], Counter, Counter]:
    """The words of `rouge_score` (lower case, runs of a-z and 0-9), and the counts of its 1- and 2-grams."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return words, Counter(words), Counter(pairwise(words))


def _coco_caption_metric():
    """Make the `evaluate.Metric`; only on demand, for importing `evaluate` takes seconds."""
    import evaluate
    from datasets import Features, Sequence, Value

    class CocoCaptionMetric(evaluate.Metric):
        """`coco_scores` as an `evaluate.Metric`: no hub, no network.

            metric = CocoCaptionMetric()
            metric.add_batch(predictions=["a dog"], references=[["A dog.", "One dog runs."]])
            metric.compute()

        One prediction and a list of references for each image; `compute(rouge=False)` leaves out the
        `rouge_score` numbers. Returns the same dict as `coco_scores`.
        """

        def _info(self):
            return evaluate.MetricInfo(
                description="BLEU-1..4, ROUGE-L and CIDEr-D as the official COCO caption evaluation "
                "computes them, and ROUGE-1, ROUGE-2, ROUGE-Lsum as rouge_score does.",
                citation="",
                inputs_description="predictions: one caption per image; references: its captions.",
                features=Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
            )

        def _compute(self, predictions, references, rouge=True):
            return coco_scores(dict(enumerate(predictions)), dict(enumerate(map(list, references))), rouge=rouge)

    CocoCaptionMetric.__qualname__ = "CocoCaptionMetric"
    return CocoCaptionMetric


def __getattr__(name):
    if name == "CocoCaptionMetric":
        globals()[name] = metric = _coco_caption_metric()
        return metric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
