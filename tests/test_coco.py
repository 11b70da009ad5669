"""Annotations -> records."""

import pytest
from coco import coco_folder, write

from captioning import InputError
from captioning.data import annotations


def test_coco_gives_one_record_per_image_with_all_captions(tmp_path):
    pools = annotations.read_coco(coco_folder(tmp_path, {7: ["b", "a"], 3: ["c"]}, {9: []}))
    assert [record.image_id for record in pools["train2014"]] == [3, 7]
    assert pools["train2014"][1].captions == ("b", "a")
    assert pools["train2014"][1].path == tmp_path / "train2014" / "COCO_train2014_000000000007.jpg"
    assert pools["val2014"][0].captions == ()


def test_karpathy_counts_restval_as_train_and_honours_filepath(tmp_path):
    sentences = [{"raw": "A dog ."}, {"raw": "Dog"}]
    entry = {"filename": "x.jpg", "sentences": sentences}
    file = tmp_path / "dataset.json"
    write(
        file,
        {
            "images": [
                {**entry, "imgid": 5, "cocoid": 50, "split": "restval", "filepath": "val2014"},
                {**entry, "imgid": 4, "split": "train"},
                {**entry, "imgid": 6, "split": "val"},
                {**entry, "imgid": 7, "split": "test"},
            ]
        },
    )
    pools = annotations.read_karpathy(file, tmp_path)
    assert {name: [record.image_id for record in records] for name, records in pools.items()} == {
        "train": [4, 50],
        "validation": [6],
        "test": [7],
    }
    assert pools["train"][1].path == tmp_path / "val2014" / "x.jpg"
    assert pools["train"][0].path == tmp_path / "x.jpg"
    assert pools["train"][0].captions == ("A dog .", "Dog")


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "..\\x.jpg"])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    file = tmp_path / "dataset.json"
    write(file, {"images": [{"filename": name, "imgid": 1, "split": "train", "sentences": [{"raw": "x"}]}]})
    with pytest.raises(InputError, match="leaves the image folder"):
        annotations.read_karpathy(file, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not a JSON file"),
        ("[]", "not a JSON object"),
        ({"annotations": []}, "'images' is missing"),
        ({"images": [{"id": 1}], "annotations": []}, "'file_name' is missing"),
        ({"images": [{"id": "1", "file_name": "a"}], "annotations": []}, "image id '1'"),
        ({"images": [], "annotations": [{"id": 1}]}, "'image_id' is missing"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": None}]},
            "a caption",
        ),
        ({"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}, "twice"),
    ],
)
def test_malformed_annotations_are_named(tmp_path, content, message):
    coco_folder(tmp_path, {}, {})
    write(tmp_path / "annotations" / "captions_train2014.json", content)
    with pytest.raises(InputError, match=message):
        annotations.read_coco(tmp_path)


def test_an_id_in_train_and_val_is_refused(tmp_path):
    with pytest.raises(InputError, match="image id 1 occurs twice"):
        annotations.read_coco(coco_folder(tmp_path, {1: ["a"]}, {1: ["b"]}))


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        annotations.read_coco(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"captions_train2014\.json' does not exist"):
        annotations.read_coco(tmp_path)


def test_shared_files_are_read_whole(shared):
    pools = annotations.read_coco(shared / "coco2014")
    assert {part: len(records) for part, records in pools.items()} == {"train2014": 359, "val2014": 1147}
    pools = annotations.read_karpathy(shared / "coco2014" / "dataset_coco.json", shared / "coco2014")
    assert {split: len(records) for split, records in pools.items()} == {
        "train": 1256,
        "validation": 90,
        "test": 160,
    }
    pools = annotations.read_karpathy(shared / "flickr8k" / "dataset_flickr8k.json", shared / "flickr8k" / "images")
    assert {split: len(records) for split, records in pools.items()} == {
        "train": 5999,
        "validation": 1000,
        "test": 700,
    }
    assert all(record.path.is_file() for records in pools.values() for record in records)


def test_only_what_was_fetched_is_to_be_deleted_and_fetched_again(tmp_path):
    coco_folder(tmp_path, {1: ["a"]}, {2: ["b"]})
    write(tmp_path / "annotations" / "captions_val2014.json", '{"images": [],\n"annotations": [}')
    with pytest.raises(InputError, match=r"not a JSON file \(.* line 2 column 17 .*\); correct the file$"):
        annotations.read_coco(tmp_path)
    with pytest.raises(InputError, match=r"; delete it, and the same command fetches it again$"):
        annotations.read_coco(tmp_path, "http://host")
