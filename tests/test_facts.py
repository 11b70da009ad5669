"""Facts of drawn scenes: what each wording says, which captions are right, and that the drawings are plain to see."""

import random

import pytest

from captioning.data import scenes
from captioning.data.facts import Facts, facts, more_scores, right

ONE = "A small red circle on a white background."


def drawn(count: int):
    rng = random.Random(7)
    return [scenes.draw_scene(rng, unseen=number % 2 == 0) for number in range(count)]


def test_every_wording_of_a_scene_states_the_same_facts():
    for _, captions, _ in drawn(300):
        assert len(captions) == 5
        stated = [facts(caption) for caption in captions]
        assert None not in stated
        assert len({said._replace(background=None) for said in stated}) == 1, captions
        assert len({said.background for said in stated} - {None}) == 1, captions  # it is named, and is one
        assert all(right(caption, captions) for caption in captions)


def test_captions_of_other_scenes_are_not_right():
    captions = [captions for _, captions, _ in drawn(200)]
    same = [{said._replace(background=None) for said in map(facts, group)} for group in captions]
    for i, group in enumerate(captions):
        for j in range(i):
            if same[i] != same[j]:
                assert not any(right(caption, captions[j]) for caption in group)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("One red circle, and it is small.", Facts((("red", "circle"),), "one", size="small")),
        (
            "a single large star drawn in black on grey",
            Facts((("black", "star"),), "one", size="large", background="grey"),
        ),
        ("Four stars, all of them purple.", Facts((("purple", "star"),), "four")),
        (
            "There is a red star below a blue circle on a grey background.",
            Facts((("blue", "circle"), ("red", "star")), "two", relation="above", background="grey"),
        ),
    ],
)
def test_facts_of_a_caption(caption, expected):
    assert facts(caption) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog on a beach",
        "red",
        "a red circle on a white background",  # no size
        "a small red circle and it is small",
        "a small circle",
        "red squares",
        "a group of blue stars",  # no number
        "three blue stars all of them blue",
        "three red circle",
        "a red circle left of a square",
        "a red circle and a blue square",
        "a red circle left of a blue square left of a green star",
        "a single small star drawn in red on grey on a grey background",
        "a small orange circle on a white background",
    ],
)
def test_what_identifies_no_scene_has_no_facts(caption):
    assert facts(caption) is None
    assert not right(caption, [ONE])


def test_right_and_wrong_captions():
    beside = ["A red circle left of a blue square.", "A blue square right of a red circle on a grey background."]
    assert right("a blue square right of a red circle", beside)
    assert right("there is a red circle left of a blue square on a grey background", beside)
    for wrong in (
        "a blue square left of a red circle",  # the other side
        "a red square left of a blue circle",
        "a red circle above a blue square",
        "a red circle left of a blue square on a white background",
        "a small red circle on a grey background",
        "two red circles on a grey background",
    ):
        assert not right(wrong, beside), wrong
    assert right("A SMALL red circle, on a white background", [ONE])
    assert not right("a large red circle on a white background", [ONE])
    assert right("Anything at all!", ["anything at all"])  # a reference that is no drawn scene's
    assert more_scores(scenes.SOURCE) == {"facts_right": right} and more_scores("COCO 2014") == {}
