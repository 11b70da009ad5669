"""A model that says the same of every image, or one word over and over, is told apart from one that does not."""
# ruff: noqa: RUF001

import pytest

from captioning.scores.monotony import repeats_itself, warning

VARIED = [f"a dog number {number} on a field" for number in range(20)]


def test_the_same_caption_for_half_of_the_images():
    assert warning(["a dog"] * 12) == (
        "12 of 12 images (100%) have the caption 'a dog': the model hardly looks at them; train longer, on more "
        "images, or from pretrained weights"
    )
    assert warning(["A dog."] * 5 + ["a  dog"] * 5 + VARIED[:10]).startswith(
        "10 of 20 images (50%) have the caption 'A"
    )
    assert warning(["a dog"] * 9 + VARIED[:11]) is None
    assert warning(["a dog"] * 9) is None, "too few images to say"
    assert warning([""] * 12).startswith("12 of 12 images (100%) have the caption ''")
    assert warning(VARIED) is None
    assert warning([]) is None


def test_what_people_say_too_is_no_reason_to_warn():
    captions = ["normal chest"] * 12
    assert warning(captions, [["Normal chest.", "nothing to see"]] * 8 + [["a broken rib"]] * 4) is None
    assert warning(captions, [["Normal chest."]] * 5 + [["a broken rib"]] * 7).startswith("12 of 12")


@pytest.mark.parametrize(
    "caption",
    [
        "a " * 40,
        "dog dog dog dog dog cat dog dog",
        "a man with a hat and a hat and a hat and a hat",
        "the cat the cat the cat the cat",
        "狗" * 10,
        "in front of a in front of a in front of a dog",
    ],
)
def test_a_caption_that_repeats_itself(caption):
    assert warning([caption]).startswith("The caption repeats itself, '")
    assert warning([caption, *VARIED[:8]]).startswith("1 of 9 captions repeat")
    assert warning([caption, *VARIED[:12]]) is None, "one of many"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "no no no no no no no",
        "a man in a hat and a woman in a coat and a dog on a leash",
        "a dog and a cat and a bird and a horse and a cow",
        "on the left a cat on the right a cat on the table a cup",
        "two men two women two children and two dogs stand side by side by the sea",
        "一只黑狗在雪地里奔跑，一只白狗在草地里奔跑",
        "红色的圆，蓝色的圆，绿色的圆",
    ],
)
def test_a_caption_that_does_not(caption):
    assert warning([caption]) is None


def test_a_long_caption_is_cut_off():
    assert warning(["word " * 500]) == (
        f"The caption repeats itself, '{'word ' * 11}word…'; train longer, on more images, or from pretrained weights"
    )
    assert repeats_itself(["a"] * 8)
    assert not repeats_itself(["a"] * 7)
