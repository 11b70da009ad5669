"""Diversity and hallucination: equal to plain computations, and right on captions that can be checked by eye."""

import random
import statistics

import pytest

from captioning.scores.diversity import NAMES, diversity, nouns, of_people, self_bleu
from captioning.scores.metrics import coco_scores

WORDS = ["a", "the", "man", "dog", "red", "runs", "sits", "on", "grass", "water"]


def test_self_bleu_is_bleu_against_every_other_caption():
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(40)]
    captions += captions[:3]
    plain = [
        coco_scores({0: caption}, {0: captions[:row] + captions[row + 1 :]})["bleu_4"]
        for row, caption in enumerate(captions)
    ]
    assert self_bleu(captions) == pytest.approx(statistics.fmean(plain), rel=1e-9)
    assert self_bleu(["a dog"]) == 0 and self_bleu(["a b c d e"] * 3) == pytest.approx(1)


REFERENCES = {
    1: ["A brown dog is running on the grass.", "The dog in the grass plays."],
    2: ["A man in a red shirt rides a horse.", "The man and the horse on the grass."],
    3: ["Two dogs run after a man.", "A man, two dogs and a ball."],
    4: ["A woman with a ball.", "The woman throws the ball ."],
    5: ["Three men on the grass with a horse", "A ball and a woman in the shirt"],
    6: ["A dog with the shirt", "The shirt of a woman and a dog"],
}


def test_nouns_are_learnt_from_the_references():
    from captioning.scores.ptb import tokenize

    found = nouns(tokenize([caption for own in REFERENCES.values() for caption in own]))
    assert found == {"dog", "grass", "man", "horse", "ball", "woman", "shirt"}  # no red, brown, rides, runs


def test_nouns_that_no_reference_has_are_counted():
    captions = {
        1: "a dog on the grass",  # right
        2: "two men with a ball",  # man is there, ball is not
        3: "a woman and a horse",  # neither is
        4: "something red",  # no noun
        5: "a man, a horse, a ball and a shirt",
        6: "dogs",  # dog is there
    }
    found = diversity(captions, REFERENCES)
    assert set(found) == set(NAMES)
    assert found["unseen_nouns"] == pytest.approx(3 / 11) and found["unseen_captions"] == pytest.approx(2 / 6)
    assert found["distinct"] == 1 and found["commonest"] == pytest.approx(1 / 6)
    assert found["vocabulary"] == len({word for c in captions.values() for word in c.replace(",", "").split()})


def test_the_same_caption_everywhere():
    found = diversity(dict.fromkeys(REFERENCES, "A dog."), REFERENCES)
    assert found["distinct"] == pytest.approx(1 / 6) and found["commonest"] == 1 and found["vocabulary"] == 2


def test_people_are_measured_against_each_other():
    people = of_people(REFERENCES | {7: ["A cat."]})
    assert people == diversity(
        {i: own[0] for i, own in REFERENCES.items()}, {i: own[1:] for i, own in REFERENCES.items()}
    )


def test_other_languages_have_no_nouns_and_no_captions_nothing():
    found = diversity({1: "Собака бежит"}, {1: ["Собака бежит по траве", "Большая собака"]})
    assert set(found) == {"distinct", "commonest", "vocabulary", "self_bleu_4"}
    assert diversity({}, {}) == {} and of_people({1: ["one"]}) == {}
