"""Intervals and comparisons of scores: equal to plain resampling, and right about chance."""

import math
import random
import statistics

import numpy as np
import pytest
from exchange import covered

from captioning.scores import bootstrap
from captioning.scores.metrics import evaluate
from captioning.scores.signature import differences, signature

WORDS = [
    "a",
    "the",
    "man",
    "dog",
    "red",
    "blue",
    "runs",
    "sits",
    "on",
    "in",
    "grass",
    "water",
    "big",
    "small",
    "ball",
    "with",
    "and",
]


def sentence(rng) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))


def captions_of(images: int, seed: int = 0) -> tuple[dict[int, str], dict[int, list[str]]]:
    rng = random.Random(seed)
    references = {i: [sentence(rng) for _ in range(rng.randint(1, 5))] for i in range(images)}
    return {i: said_of(captions[0], rng) for i, captions in references.items()}, references


def said_of(reference: str, rng) -> str:
    return " ".join(word if rng.random() < 0.6 else rng.choice(WORDS) for word in reference.split())


def lengths(caption, references) -> float:
    return float(len(caption))


@pytest.fixture(scope="module")
def evaluation():
    predictions, references = captions_of(40)
    found = evaluate(predictions, references, more={"length": lengths})
    return found.with_ratio("loss", {i: 3.0 + i for i in references}, {i: 1.0 + i % 5 for i in references})


def test_replicates_are_those_of_plain_resampling(evaluation):
    drawn = bootstrap.replicates(evaluation, resamples=50, seed=3)
    predictions, references = captions_of(40)
    assert set(drawn) == set(evaluation.scores) and {"loss", "length", "bleu_4", "cider_d"} <= set(drawn)
    rng = np.random.default_rng(3)
    for row, chosen in enumerate(rng.integers(40, size=(50, 40), dtype=np.int32)):
        # Drawn images as a set of their own: an image that is drawn twice counts twice.
        said = {place: predictions[i] for place, i in enumerate(chosen)}
        plain = evaluate(said, {place: references[i] for place, i in enumerate(chosen)}, more={"length": lengths})
        for name, value in plain.scores.items():
            if name != "cider_d":  # whose document frequencies would be those of the draw
                assert drawn[name][row] == pytest.approx(value, rel=1e-12), name
        cider = statistics.fmean(evaluation.each["cider_d"][i] for i in chosen)
        assert drawn["cider_d"][row] == pytest.approx(cider, rel=1e-12)
        nats, tokens = evaluation.sums["loss"]
        assert drawn["loss"][row] == pytest.approx(sum(nats[i] for i in chosen) / sum(tokens[i] for i in chosen))


def test_blocks_change_nothing(evaluation, monkeypatch):
    whole = bootstrap.replicates(evaluation, resamples=100)
    monkeypatch.setattr(bootstrap, "BLOCK", 280)
    for name, values in bootstrap.replicates(evaluation, resamples=100).items():
        assert values == pytest.approx(whole[name], rel=1e-12), name


def test_an_interval_is_as_wide_as_the_standard_error_says(evaluation):
    for name in ("rouge_l", "cider_d", "rouge_1", "length"):
        values = evaluation.each[name]
        error = statistics.stdev(values) / len(values) ** 0.5
        low, high = bootstrap.intervals(evaluation)[name]
        assert low < evaluation.scores[name] < high
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1), name


def test_a_difference_is_drawn_with_the_same_images():
    predictions, references = captions_of(60)
    rng = random.Random(1)
    worse = {i: said_of(caption, rng) for i, caption in predictions.items()}
    better, other = evaluate(predictions, references), evaluate(worse, references)
    found = bootstrap.differences(better, other)
    assert list(found) == list(better.scores)
    for name, difference in found.items():
        assert difference.value == pytest.approx(better.scores[name] - other.scores[name])
        assert difference.low < difference.value < difference.high
    # For a mean over images the paired bootstrap is that of the differences of each image.
    pairs = [a - b for a, b in zip(better.each["cider_d"], other.each["cider_d"], strict=True)]
    width = found["cider_d"].high - found["cider_d"].low
    assert width / (2 * 1.96 * statistics.stdev(pairs) / 60**0.5) == pytest.approx(1, abs=0.1)
    assert found["rouge_1"].low > 0 and found["rouge_1"].p < 0.01
    turned = bootstrap.differences(other, better)["rouge_1"]
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-found["rouge_1"].value, -found["rouge_1"].high, -found["rouge_1"].low)
    )
    assert turned.p == found["rouge_1"].p


def test_p_is_that_of_a_plain_count():
    predictions, references = captions_of(30)
    other = {i: said_of(caption, random.Random(i)) if i % 5 == 0 else caption for i, caption in predictions.items()}
    ours, theirs = evaluate(predictions, references), evaluate(other, references)
    found = bootstrap.differences(ours, theirs, resamples=500, seed=2)["rouge_l"]
    pairs = np.array(ours.each["rouge_l"]) - np.array(theirs.each["rouge_l"])
    drawn = [pairs[rows].mean() for rows in np.random.default_rng(2).integers(30, size=(500, 30), dtype=np.int32)]
    count = sum(abs(value - pairs.mean()) >= abs(pairs.mean()) - 1e-12 for value in drawn)
    assert 0.02 < found.p < 0.98 and found.p == pytest.approx((count + 1) / 501)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_draws_that_are_as_far_count_where_few_images_differ():
    """Of 200 images 4 differ, by 1 each. A draw with none of them, or with 8 or more, is as far as the value, 4/200."""
    references = {i: ["a dog runs"] for i in range(200)}
    ours, theirs = (
        evaluate(dict.fromkeys(references, "a dog"), references, more={"right": lambda caption, _, good=good: good})
        for good in (1.0, 0.0)
    )
    ours.each["right"] = [float(i < 4) for i in range(200)]
    ours.scores["right"] = 4 / 200
    found = bootstrap.differences(ours, theirs)["right"]
    share = sum(math.comb(200, n) * 0.02**n * 0.98 ** (200 - n) for n in range(201) if n == 0 or n >= 8)
    assert found.value == 0.02 and found.p == pytest.approx(share, abs=0.01)


def test_one_image_tells_no_difference():
    references = {1: ["a dog runs"]}
    found = bootstrap.differences(evaluate({1: "a dog runs"}, references), evaluate({1: "a cat"}, references))
    assert found["rouge_l"].value > 0 and {difference.p for difference in found.values()} == {1}


def test_equal_captions_do_not_differ():
    predictions, references = captions_of(20)
    for difference in bootstrap.differences(*[evaluate(predictions, references)] * 2).values():
        assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_the_interval_of_two_equally_good_captioners_covers_zero():
    """Captions of the two are exchanged at random, image by image, so that neither is better."""
    predictions, references = captions_of(200)
    other = {i: said_of(references[i][0], random.Random(i)) for i in references}
    pair = evaluate(predictions, references, rouge=False), evaluate(other, references, rouge=False)
    counts = covered(pair, random.Random(5))
    assert all(90 <= count <= 100 for count in counts.values()), counts


def test_evaluations_of_other_images_are_not_compared():
    predictions, references = captions_of(4)
    few = {i: references[i] for i in (0, 1)}
    with pytest.raises(ValueError, match="different images"):
        bootstrap.differences(evaluate(predictions, references), evaluate({i: predictions[i] for i in few}, few))


def test_no_images_and_one_image():
    assert bootstrap.intervals(evaluate({}, {})) == {}
    assert bootstrap.differences(evaluate({}, {}), evaluate({}, {})) == {}
    found = evaluate({1: "a dog"}, {1: ["a dog runs"]})
    assert bootstrap.intervals(found)["rouge_l"] == pytest.approx((found.scores["rouge_l"],) * 2)
    empty = bootstrap.intervals(evaluate({1: "", 2: ""}, {1: ["a dog"], 2: ["a cat"]}))
    assert set(empty.values()) == {(0.0, 0.0)}


# ---- signature


def test_a_signature_tells_what_must_be_the_same():
    references = {1: ["A dog runs.", "One dog."], 2: ["A cat.", "Two cats."]}
    plain = signature(references.values())
    assert plain.startswith("coco-ptb3.4.1|refs:2|n:2|cider:df=split|eos:in reward|rouge:rouge_score|data:")
    assert plain.endswith("|version:1")
    assert evaluate({1: "a", 2: "b"}, references).signature == plain
    # The order of images and of references changes no score.
    assert signature([["Two cats.", "A cat."], ["One dog.", "A dog runs."]]) == plain
    fewer = signature([["A dog runs."], ["A cat.", "Two cats."]])
    assert "|refs:1-2|n:2|" in fewer
    assert differences(plain, plain) == []
    assert [text.split(":")[0] for text in differences(plain, fewer)] == ["refs", "data"]
    assert "refs: 2 and 1-2" in differences(plain, fewer)
    assert signature([["一只黑狗。"]]).startswith("coco-characters|refs:1|n:1|")
    assert "|rouge:unicode|" in signature([["Квадрат слева"]])
    assert differences(signature([["一只黑狗。"]]), plain)[0] == "protocol: coco-characters and coco-ptb3.4.1"
    assert "|refs:0|n:0|" in signature([])
    assert signature([["half \ud800 of a letter"]])
