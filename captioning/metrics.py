"""Caption scores: {image id: caption} against {image id: [references]} -> numbers that match the papers'.

BLEU-1..4, ROUGE-L and CIDEr-D follow the official COCO caption evaluation (pycocoevalcap), its tokenizer
included, without Java: equal to it within floating-point rounding. ROUGE-1, ROUGE-2 and ROUGE-Lsum are those
of the `rouge_score` package. Plain Python; importing this module is cheap (no torch, no numpy).

    from captioning.metrics import coco_scores
    coco_scores({42: "a dog runs"}, {42: ["A dog is running.", "The brown dog runs."]})
"""

import math
import re
from collections import Counter

from captioning import InputError
from captioning.ptb import tokenize

COCO_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
ROUGE_KEYS = ("rouge_1", "rouge_2", "rouge_lsum")


def coco_scores(
    predictions: dict[int, str],
    references: dict[int, list[str]],
    per_image: bool = False,
    rouge: bool = True,
) -> dict[str, float] | tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Score one caption per image against all of the image's references.

    Args:
        predictions: {image id: caption}. An empty caption is allowed and scores 0.
        references: {image id: captions}, the same ids, at least one caption each; any order of ids.
        per_image: also return the scores of every image.
        rouge: also compute rouge_1, rouge_2 and rouge_lsum.

    Returns:
        {name: score}, or ({name: score}, {image id: {name: score}}) with `per_image`.

        bleu_1..bleu_4  0..1   corpus BLEU (Papineni et al., 2002), closest reference length. Per image: the
                               same formula on that image alone; the corpus score is not their mean.
        rouge_l         0..1   F score with beta = 1.2 of the best precision and the best recall over the
                               references (Lin, 2004), mean over images.
        cider_d         0..~10 CIDEr-D (Vedantam et al., 2015), n = 1..4, sigma = 6, mean over images. Document
                               frequencies come from `references`, so the score of an image depends on the
                               others, and a set of one image scores 0.
        rouge_1, rouge_2, rouge_lsum  0..1  what `rouge_score` gives on the raw strings without stemming
                               (use_stemmer=False): best F-measure over the references, mean over images.

        Everything is 0 for an empty set.

    Raises:
        InputError: the ids differ, an image has no reference, or a caption is not a string.
    """
    _check(predictions, references)
    ids = list(predictions)
    hypotheses = tokenize([predictions[i] for i in ids])
    flat = iter(tokenize([caption for i in ids for caption in references[i]]))
    targets = [[next(flat) for _ in references[i]] for i in ids]

    # The official code splits on any white space for BLEU and CIDEr, and on " " alone for ROUGE-L. It matters
    # for an empty caption, which is no word for the former and one empty word for the latter, and for the
    # no-break space that the tokenizer leaves inside phone numbers.
    vocabulary = _Vocabulary()
    hypothesis_ngrams = [vocabulary.ngrams(h) for h in hypotheses]
    target_ngrams = [[vocabulary.ngrams(t) for t in ts] for ts in targets]

    columns = _bleu(hypothesis_ngrams, target_ngrams)
    columns["rouge_l"] = _mean_and_each([_rouge_l(h, ts) for h, ts in zip(hypotheses, targets, strict=True)])
    columns["cider_d"] = _mean_and_each(_cider_d(hypothesis_ngrams, target_ngrams))
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


class _Vocabulary(dict):
    """Words as small integers, and captions as counts of n-grams, n = 1..4.

    An n-gram is one integer, (n-1)-gram id and last word hashed together by a dictionary: cheaper to hash
    and to compare than a tuple of strings, and each caption is walked once.
    """

    def ngrams(self, caption: str) -> tuple[int, list[dict]]:
        """(number of words, [counts of 1-grams, ..., counts of 4-grams])."""
        number = self.setdefault
        words = [number(word, len(self)) for word in caption.split()]
        counts = [Counter(words)]
        grams = words
        for n in range(1, 4):
            grams = [number(pair, len(self)) for pair in zip(grams, words[n:], strict=False)]
            counts.append(Counter(grams))
        return len(words), counts


def _mean_and_each(values: list[float]) -> tuple[float, list[float]]:
    return (math.fsum(values) / len(values) if values else 0.0), values


def _bleu(hypotheses, targets) -> dict[str, tuple[float, list[float]]]:
    """Corpus and per-image BLEU-1..4 of counted captions: {name: (score, [score of each image])}."""
    total = [0] * 4, [0] * 4, 0, 0
    correct_total, guess_total, length_total, target_total = total
    each = []
    for (length, counts), refs in zip(hypotheses, targets, strict=True):
        correct = []
        for n in range(4):
            most = {}  # n-gram -> its largest count in any one reference
            for _, ref_counts in refs:
                for gram, count in ref_counts[n].items():
                    if count > most.get(gram, 0):
                        most[gram] = count
            correct.append(sum(min(count, most.get(gram, 0)) for gram, count in counts[n].items()))
        guess = [max(0, length - n) for n in range(4)]
        target = min((abs(ref_length - length), ref_length) for ref_length, _ in refs)[1]
        each.append(_bleu_from_counts(correct, guess, length, target))
        correct_total = [a + b for a, b in zip(correct_total, correct, strict=True)]
        guess_total = [a + b for a, b in zip(guess_total, guess, strict=True)]
        length_total += length
        target_total += target
    corpus = _bleu_from_counts(correct_total, guess_total, length_total, target_total) if each else [0.0] * 4
    return {f"bleu_{n + 1}": (corpus[n], [scores[n] for scores in each]) for n in range(4)}


def _bleu_from_counts(correct, guess, length, target) -> list[float]:
    """BLEU-1..4 from matched n-grams, n-grams, length and closest reference length.

    The two constants are the official code's; they decide the score when nothing matches.
    """
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (target + small)
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


def _cider_d(hypotheses, targets, sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each counted caption: mean over n and references of a clipped tf-idf cosine, times 10.

    Two official details are easy to lose: the length in the Gaussian penalty is the number of *bigrams*,
    and an n-gram no reference has still gets the idf of one that occurs in a single image.
    """
    document_frequency = Counter()
    for refs in targets:
        document_frequency.update({gram for _, counts in refs for grams in counts for gram in grams})
    log_images = math.log(len(targets)) if targets else 0.0
    idf = {gram: log_images - math.log(count) for gram, count in document_frequency.items()}

    def weigh(counts):
        """[({n-gram: tf-idf}, norm) for each n]."""
        vectors = []
        for grams in counts:
            vector = {gram: count * idf.get(gram, log_images) for gram, count in grams.items()}
            vectors.append((vector, math.sqrt(sum([weight * weight for weight in vector.values()]))))
        return vectors

    scores = []
    for (length, counts), refs in zip(hypotheses, targets, strict=True):
        vectors = weigh(counts)
        score = 0.0
        for ref_length, ref_counts in refs:
            delta = max(length - 1, 0) - max(ref_length - 1, 0)
            similarity = 0.0
            for (vector, norm), (ref_vector, ref_norm) in zip(vectors, weigh(ref_counts), strict=True):
                if norm and ref_norm:
                    shared = [
                        min(vector[gram], ref_vector[gram]) * ref_vector[gram]
                        for gram in vector.keys() & ref_vector.keys()
                    ]
                    similarity += sum(shared) / (norm * ref_norm)
            score += similarity * math.exp(-(delta**2) / (2 * sigma**2))
        scores.append(10 * score / 4 / len(refs))
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
        return tuple(best[name].fmeasure for name in ("rouge1", "rouge2", "rougeLsum"))
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
    return words, Counter(words), Counter(zip(words, words[1:], strict=False))


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
            return coco_scores(
                dict(enumerate(predictions)), dict(enumerate(map(list, references))), rouge=rouge
            )

    CocoCaptionMetric.__qualname__ = "CocoCaptionMetric"
    return CocoCaptionMetric


def __getattr__(name):
    if name == "CocoCaptionMetric":
        globals()[name] = metric = _coco_caption_metric()
        return metric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
