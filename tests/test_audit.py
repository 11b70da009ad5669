"""What is odd about a data set is found, counted and said; copies of one image stay in one split."""

import random
import sys

import pytest
from conftest import ROOT
from PIL import Image

import dataloader
from captioning.data import choose, near
from captioning.data.audit import audit, language_of
from captioning.data.records import Record

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import near as benchmark


def photograph(seed: int) -> Image.Image:
    """Smooth noise in colour, as unlike others as photographs are."""
    rng = random.Random(seed)
    noise = Image.frombytes("RGB", (9, 7), rng.randbytes(189)).resize((240, 180), Image.Resampling.BICUBIC)
    return Image.blend(noise, Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize((240, 180)), 0.2)


def test_copies_are_grouped_and_others_are_not():
    rng = random.Random(0)
    originals = [photograph(seed) for seed in range(60)]
    copies = [benchmark.plant(image, benchmark.PLANTS[n % 6], rng) for n, image in enumerate(originals[:30])]
    groups = near.find_groups([near.sketch_of(image) for image in originals + copies])
    assert groups == [*range(60), *range(30)]
    assert near.find_groups([]) == [] and near.find_groups([b"", b""]) == [0, 1]


def test_plain_images_and_sets_that_look_alike_are_not_one_group():
    plain = [near.sketch_of(Image.new("RGB", (64, 48), colour)) for colour in ("red", "red", "blue")]
    assert near.find_groups(plain) == [0, 0, 2], "equal ones are copies"
    alike = [photograph(0).copy() for _ in range(40)]
    for number, image in enumerate(alike):
        image.paste((number * 6, 20, 90), (10 + 4 * number, 60, 50 + 4 * number, 110))
    groups = near.find_groups([near.sketch_of(image) for image in alike])
    assert len(set(groups)) > 20


def test_of_very_many_images_copies_are_found_by_their_hash(monkeypatch):
    monkeypatch.setattr(near, "MOST", 3)
    images = [photograph(0), photograph(1), photograph(0), photograph(2)]
    assert near.find_groups([near.sketch_of(image)[: near.HASH] for image in images]) == [0, 1, 0, 3]


def test_a_group_stays_in_one_split_and_the_numbers_are_kept():
    records = [Record(n, f"{n}.jpg", f"{n}.jpg", ("a",)) for n in range(100)]
    groups = [n // 2 if n < 40 else n for n in range(100)]
    splits = choose.divide(records, list(choose.SPLITS), 0.1, 0.1, groups)
    assert [splits.count(split) for split in choose.SPLITS] == [80, 10, 10]
    assert all(splits[n] == splits[n + 1] for n in range(0, 40, 2))


@pytest.mark.parametrize("groups", [[0] * 12, [n // 3 for n in range(12)], [n // 6 for n in range(12)]])
def test_large_groups_leave_no_split_empty(groups):
    records = [Record(n, f"{n}.jpg", f"{n}.jpg", ("a",)) for n in range(12)]
    splits = choose.divide(records, list(choose.SPLITS), 0.1, 0.1, groups)
    assert set(splits) == set(choose.SPLITS)


def test_planted_copies_come_into_one_split(tmp_path, capsys):
    rng = random.Random(1)
    for number in range(40):
        image = photograph(number)
        image.save(tmp_path / f"{number}.png")
        benchmark.plant(image, benchmark.PLANTS[number % 6], rng).save(tmp_path / f"{number}_copy.png")
        for name in (f"{number}.txt", f"{number}_copy.txt"):
            (tmp_path / name).write_text(f"picture {number} of a row")
    arguments = ["--encoder=tiny", "--decoder=tiny", "--num_proc=1", "--limit_data=0"]
    preview = tmp_path / "preview.png"
    dataloader.main([f"--data={tmp_path}", f"--save_path={tmp_path / 'out'}", f"--preview={preview}", *arguments])
    from datasets import load_from_disk

    splits = load_from_disk(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 64, "validation": 8, "test": 8}
    for rows in splits.values():
        names = set(rows["file_name"])
        assert all(f"{name.split('.')[0].split('_')[0]}_copy.png" in names for name in names)
    out = capsys.readouterr().out
    assert "audit: 80 images that are nearly the same as another of their split" in out
    assert preview.is_file()


def of_captions(*captions: list[str]) -> list[str]:
    records = [Record(n, f"{n}.jpg", f"{n}.jpg", tuple(own)) for n, own in enumerate(captions)]
    return [finding.line() for finding in audit({"train": records}, {"train": list(range(len(records)))}, False)]


def test_captions_that_are_odd_are_counted():
    lines = of_captions(["A dog.", "a  dog."], ["a cat", " "], ["a cat", ""], ["A cat"], ["a bird"])
    assert lines == [
        "2 empty captions (such as 1.jpg; 2.jpg): left out",
        "1 captions that their image has twice (such as 0.jpg): kept",
        "1 captions that 3 images or more have (such as 3 images have 'a cat'): kept",
    ]
    assert of_captions(["a dog"], ["a cat"]) == []


def test_captions_in_another_language_are_counted():
    english = [[f"a dog is running with the ball number {n}"] for n in range(9)]
    lines = of_captions(*english, ["ein Hund steht auf dem Gras und spielt"], ["собака бежит"], ["一只狗在跑"])
    assert [line.split(" (")[0] for line in lines] == [
        "1 captions in Cyrillic letters, where most are in Latin ones",
        "1 captions in Cjk letters, where most are in Latin ones",
        "1 captions in German, it seems, where most are in English",
    ]


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("Un chien court sur la plage avec une balle", ("LATIN", "French")),
        ("Un perro corre por la playa con una pelota", ("LATIN", "Spanish")),
        ("Собака бежит по пляжу и в море", ("CYRILLIC", "Russian")),
        ("كلب يركض", ("ARABIC", "")),
        ("A man as a clown", ("LATIN", "")),
        ("?!", ("", "")),
    ],
)
def test_languages(caption, language):
    assert language_of(caption) == language


@pytest.mark.slow
def test_planted_copies_in_real_photographs(shared):
    result = benchmark.main(["--images", str(shared / "flickr8k" / "images")])
    assert result["found"] == 1 and result["false"] <= 0.01 and result["seconds"] < 180
