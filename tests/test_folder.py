"""A split of a prepared folder: columns without images, images by one door, rows that workers can read too."""

import io
import pickle
import random
import tracemalloc

import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import EpsImagePlugin, Image

from captioning import InputError
from captioning.data.folder import Split, load_prepared

FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "image": ImageFeature(),
        "captions": List(Value("string")),
        "labels": List(List(Value("int32"))),
    }
)
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
(x) =
%%EOF
"""


def encoded(kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((48, 32), 60).convert(mode).save(file, kind)
    return file.getvalue()


def rows(images: list[bytes | None]) -> Dataset:
    rng = random.Random(0)
    labels = [[[rng.randrange(9) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))] for _ in images]
    content = {
        "image_id": [100 + number for number in range(len(images))],
        "file_name": [f"{number}.jpg" for number in range(len(images))],
        "image": [None if image is None else {"bytes": image, "path": None} for image in images],
        "captions": [["a dog"] * len(own) for own in labels],
        "labels": labels,
    }
    return Dataset.from_dict(content, features=FEATURES)


def test_a_split_gives_what_the_rows_hold(tmp_path):
    half = rows([encoded(), encoded("JPEG", "L"), encoded("WEBP"), encoded("GIF"), encoded("BMP")])
    concatenate_datasets([half, half]).save_to_disk(str(tmp_path), num_shards=3)
    whole = load_from_disk(str(tmp_path))
    for expected in (whole, whole.select(range(3, 9)), whole.select([7, 0, 4])):
        split = pickle.loads(pickle.dumps(Split(expected)))
        assert len(split) == len(expected)
        for name in ("image_id", "file_name", "captions"):
            assert getattr(split, name) == list(expected[name])
        assert [split.labels(index) for index in range(len(split))] == list(expected["labels"])
        assert split.lengths().tolist() == [sum(map(len, labels)) for labels in expected["labels"]]
        of_captions, of_images = split.caption_lengths()
        assert of_captions.tolist() == [len(own) for labels in expected["labels"] for own in labels]
        assert of_images.tolist() == list(map(len, expected["labels"]))
        assert [split.captions_of(index) for index in range(len(split))] == split.captions
        assert list(split.captions_in_turn()) == split.captions
        assert split.labelled(1) == {"image_id": split.image_id[1], "labels": split.labels(1)}
        assert list(split.encoded_images()) == [split.encoded(index) for index in range(len(split))]
        for index in range(len(split)):
            assert split.image(index).tobytes() == expected[index]["image"].convert("RGB").tobytes()
        assert split.select([2, 0]).image_id == [split.image_id[2], split.image_id[0]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (EPS, "not a JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or JPEG 2000 image"),
        (
            b"<html>404</html>",
            "it looks like a web page, not a JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or JPEG 2000 image",
        ),
        (encoded()[:-30], "the image is damaged or cut short"),
        (b"", "it is empty"),
        (None, "it is empty"),
    ],
)
def test_an_image_that_is_none_is_named_and_starts_nothing(content, reason, tmp_path, monkeypatch):
    # Pillow by itself calls Ghostscript for an EPS: a program of that name tells.
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: > '{started}'\nexit 0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    split = Split(rows([encoded(), content]))
    with pytest.raises(InputError) as refused:
        split.image(1)
    name = "image 101 (1.jpg) of the prepared data"
    assert str(refused.value) == f"{name} cannot be read ({reason}); run dataloader.py again"
    assert not started.exists()
    if content == EPS:
        with pytest.raises(OSError):
            Image.open(io.BytesIO(content)).load()
        assert started.exists(), "the test would notice"


def test_columns_are_read_without_images(monkeypatch):
    split = Split(rows([b"no image"] * 3))
    monkeypatch.setattr(Split, "encoded", None)
    assert (split.image_id, split.file_name[0], split.captions[2][0]) == ([100, 101, 102], "0.jpg", "a dog")
    assert len(split.lengths()) == 3


def test_what_training_reads_takes_a_few_bytes_an_image(tmp_path):
    """Whatever the number of images: their captions, names and ids are read row by row."""
    few = rows([b"no image"] * 500)
    concatenate_datasets([few] * 40).save_to_disk(str(tmp_path))

    def peak(images: int) -> int:
        split = Split(load_from_disk(str(tmp_path)).select(range(images)))
        tracemalloc.start()
        kept = [split.lengths(), split.caption_lengths()]
        for index in range(0, images, images // 50):
            split.labelled(index), split.captions_of(index), split.encoded(index)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(kept[0]) == images
        return taken

    peak(1000)  # what is loaded once
    assert (peak(20_000) - peak(2000)) / 18_000 < 40


def test_a_prepared_folder_is_three_splits(prepared):
    splits, description = load_prepared(prepared)
    assert {name: len(split) for name, split in splits.items()} == description["images"]
    assert splits["test"].image(0).mode == "RGB"
