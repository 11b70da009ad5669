"""The text encoder of tests/benchmarks/text_tower.py finds images by words, and knows a wrong noun."""

import itertools
import random
import sys

import numpy as np
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import text_tower

COLOURS, THINGS, PLACES = ("red", "blue", "green", "black"), ("dog", "cat", "ball", "boat"), ("grass", "sand", "snow")


def splits():
    """An image for every combination; its embedding is the sum of a vector for each of its three words."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=32) for word in (*COLOURS, *THINGS, *PLACES)}
    entries, known = [], {}
    for number, words in enumerate(itertools.product(COLOURS, THINGS, PLACES)):
        colour, thing, place = words
        texts = [f"a {colour} {thing} on the {place}", f"on the {place} the {thing} is {colour}", f"a {thing}"]
        entries.append({"filename": f"{number}", "sentences": [{"raw": text} for text in texts]})
        known[f"{number}"] = sum(vectors[word] for word in words)
    random.Random(0).shuffle(entries)
    mean = text_tower.unit(np.stack([known[entry["filename"]] for entry in entries[:36]])).mean(0)
    return text_tower.Split(entries[:36], known, mean), text_tower.Split(entries[36:], known, mean)


def test_it_learns_words_and_a_wrong_noun_lies_below(monkeypatch):
    monkeypatch.setattr(text_tower, "BATCH", 36)
    torch.manual_seed(0)
    training, others = splits()
    tower = text_tower.Tower(training.captions, 32, width=32, dropout=0.0)
    assert {"dog", "ball", "sand"} <= tower.things
    before = text_tower.measured(tower, others)
    text_tower.train(tower, training, others, epochs=60, rng=random.Random(0))
    found = text_tower.measured(tower, others)
    # "a dog" stands with several images, so one caption in three finds its own by chance.
    assert found["image R@1"].mean() > 0.6 > 0.3 > before["image R@1"].mean()
    assert np.nanmean(found["noun"]) > 0.9


def test_another_noun_is_one_other_word():
    training, _ = splits()
    tower = text_tower.Tower(training.captions, 32, width=8, dropout=0.0)
    rng = random.Random(0)
    for caption in training.captions:
        other = tower.exchanged(caption, rng)
        ((before, after),) = ((a, b) for a, b in zip(caption, other, strict=True) if a != b)
        assert before in tower.things and after in tower.things
    assert tower.exchanged(["it", "is", "red"], rng) is None


def test_a_share_is_of_each_image():
    shares = text_tower.of_images(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 3)
    assert shares[0] == 0.5 and np.isnan(shares[1]) and shares[2] == 1
