"""A model that says the same of every image, or one word over and over, is told apart from one that does not."""
# ruff: noqa: RUF001

from types import SimpleNamespace

import pytest

import inference
from captioning.scores.monotony import repeats_itself, warning
from captioning.training.progress import Progress

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
    assert warning([caption]).startswith("the caption repeats itself, '")
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
        f"the caption repeats itself, '{'word ' * 11}word…'; train longer, on more images, or from pretrained weights"
    )
    assert repeats_itself(["a"] * 8)
    assert not repeats_itself(["a"] * 7)


# ---- where it is said


def test_training_warns_once_and_only_in_its_second_half(capsys):
    captions = dict.fromkeys(range(20), "a a a a a a a a")
    trainer = SimpleNamespace(
        predictions=captions, references={number: ["a dog"] for number in captions}, name_of="image {}".format
    )
    progress = Progress(trainer)

    def said(step: int) -> list[str]:
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=100)
        progress.on_log(None, state, None, logs={"eval_loss": 1.0, "epoch": step / 10})
        lines = capsys.readouterr().err.splitlines()
        assert sum("validation loss" in line for line in lines) == 1
        return [line for line in lines if line.startswith("warning: ")]

    assert said(10) == said(40) == []
    (line,) = said(60)
    assert "20 of 20 images (100%) have the caption 'a a a a" in line
    assert said(70) == said(100) == []


def test_captioning_warns_on_stderr(capsys):
    inference.warn_of_monotony(["a dog"] * 12)
    inference.warn_of_monotony(["a dog"])
    inference.warn_of_monotony(["go\x1b go\x1b go\x1b go\x1b go go go go"])
    out, err = capsys.readouterr()
    assert not out
    same, repeated = err.splitlines()
    assert same.startswith("warning: 12 of 12 images")
    assert repeated.startswith("warning: the caption repeats itself, 'go\\x1b go")
