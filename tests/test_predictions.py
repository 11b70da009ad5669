"""Captions in files of every form that people have, scored against a prepared folder or an annotation file."""

import csv
import json

import pytest
from datasets import load_from_disk

import inference
from captioning import InputError
from captioning.data.predictions import as_key, read_predictions, read_references
from captioning.scores.metrics import coco_scores

REFERENCES = {1: ["A red circle.", "a circle"], 2: ["A blue square."], 3: ["Two green stars."]}
NAMES = {1: "train/a.jpg", 2: "val/a.jpg", 3: "COCO_val2014_000000000003.jpg"}
CAPTIONS = {1: "a red circle", 2: "a square", 3: "green stars"}


@pytest.fixture
def annotations(tmp_path):
    """COCO's annotation file, without any image."""
    content = {
        "images": [{"id": key, "file_name": name} for key, name in NAMES.items()],
        "annotations": [
            {"id": 10 * key + at, "image_id": key, "caption": text}
            for key, texts in REFERENCES.items()
            for at, text in enumerate(texts)
        ],
    }
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(content))
    return file


def results(keys=(1, 2, 3)):
    return [{"image_id": key, "caption": CAPTIONS[key]} for key in keys]


def as_csv(delimiter, head=("image_id", "caption")):
    rows = [head, *((NAMES[key] if head[0] == "path" else key, CAPTIONS[key], *head[2:]) for key in CAPTIONS)]
    return "".join(delimiter.join(map(str, row)) + "\n" for row in rows)


FORMS = {
    "results.json": json.dumps(results()),
    "text_ids.json": json.dumps([{**row, "image_id": str(row["image_id"])} for row in results()]),
    "padded_ids.json": json.dumps([{**row, "image_id": f"{row['image_id']:012d}"} for row in results()]),
    "float_ids.json": json.dumps([{**row, "image_id": float(row["image_id"])} for row in results()]),
    "bom.json": "\ufeff" + json.dumps(results()),
    "lines.jsonl": "".join(json.dumps(row) + "\n" for row in results()),
    "lines.json": "\ufeff" + "\r\n".join(json.dumps(row) for row in results()),
    "coco_form.json": json.dumps({"info": {}, "annotations": results()}),
    "by_id.json": json.dumps({str(key): text for key, text in CAPTIONS.items()}),
    "lists_by_id.json": json.dumps({str(key): [text] for key, text in CAPTIONS.items()}),
    "by_path.json": json.dumps([{"path": f"/data/{NAMES[key]}", "caption": text} for key, text in CAPTIONS.items()]),
    "windows.json": json.dumps(
        [{"path": f"C:\\data\\{NAMES[key]}".replace("/", "\\"), "caption": text} for key, text in CAPTIONS.items()]
    ),
    "by_file_name.jsonl": "".join(
        json.dumps({"file_name": NAMES[key], "text": text}) + "\n" for key, text in CAPTIONS.items()
    ),
    "names_as_ids.json": json.dumps([{"image_id": NAMES[key], "caption": text} for key, text in CAPTIONS.items()]),
    "table.csv": as_csv(","),
    "table.tsv": "\ufeff" + as_csv("\t"),
    "paths.csv": as_csv(",", ("path", "caption")),
}


def table(out):
    """{score: value} of what was printed."""
    return {line.split()[0]: float(line.split()[1]) for line in out.split("\n\n")[0].splitlines()}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_the_plain_one(annotations, tmp_path, name):
    file = tmp_path / name
    file.write_text(FORMS[name], encoding="utf-8")
    assert read_predictions([file], read_references(annotations)).captions == CAPTIONS


def test_scores_against_an_annotation_file_without_images(annotations, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results()))
    for flag in ("--references", "--data_path"):
        assert inference.main([f"--predictions={file}", f"{flag}={annotations}"]) == 0
        out, err = capsys.readouterr()
        assert table(out) == pytest.approx(coco_scores(CAPTIONS, REFERENCES), abs=6e-5)
        assert "3 images, captions_val2014.json; one caption per image" in err
    worst_first = json.loads((tmp_path / "results_scores_per_image.json").read_text())
    assert {row["image_id"] for row in worst_first} == {1, 2, 3}


def test_a_subset_is_scored_if_asked_for_and_the_protocol_says_so(annotations, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([*results([1, 2]), {"image_id": 99, "caption": "of another set"}]))
    with pytest.raises(InputError, match=r"1 images of the split have no prediction, such as 3; .* or --subset scores"):
        inference.main([f"--predictions={file}", f"--references={annotations}"])
    assert inference.main([f"--predictions={file}", f"--references={annotations}", "--subset"]) == 0
    out, err = capsys.readouterr()
    assert "; a subset: 2 of 3 images" in err
    ours = {key: REFERENCES[key] for key in (1, 2)}
    expected = coco_scores({key: CAPTIONS[key] for key in ours}, ours)
    assert table(out) == pytest.approx(expected, abs=6e-5)
    file.write_text(json.dumps([{"image_id": 99, "caption": "of another set"}]))
    with pytest.raises(InputError, match="none of its captions is of an image of the references, such as 99"):
        inference.main([f"--predictions={file}", f"--references={annotations}", "--subset"])


def test_several_files_are_one(annotations, tmp_path):
    files = [tmp_path / f"{key}.json" for key in CAPTIONS]
    for key, file in zip(CAPTIONS, files, strict=True):
        file.write_text(json.dumps(results([key])))
    assert read_predictions(files, read_references(annotations)).captions == CAPTIONS
    with pytest.raises(InputError, match=r"captions an image twice; keep one caption per image \(1\)"):
        read_predictions([*files, files[0]], read_references(annotations))


def test_a_name_that_two_images_have_is_not_guessed(annotations, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{"path": "elsewhere/a.jpg", "caption": "a red circle"}]))
    with pytest.raises(InputError, match=r"several images of the references are named 'a\.jpg'; name them by image_id"):
        read_predictions([file], read_references(annotations))


def test_an_entry_with_the_reason_why_there_is_no_caption_counts_as_none(annotations, tmp_path, capsys):
    file = tmp_path / "captions.jsonl"
    rows = [*results([1, 2]), {"path": NAMES[3], "error": "the image is damaged"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="1 images of the split have no prediction"):
        read_predictions([file], read_references(annotations))
    assert "1 entries have no caption, but the reason why" in capsys.readouterr().err
    found = read_predictions([file], read_references(annotations), subset=True)
    assert found.captions == {1: CAPTIONS[1], 2: CAPTIONS[2]} and found.failed == 1


def test_references_of_other_forms(tmp_path):
    karpathy = {
        "images": [
            {"cocoid": 1, "filename": "a.jpg", "split": "test", "sentences": [{"raw": "A dog."}, {"raw": "One dog."}]},
            {"cocoid": 2, "filename": "b.jpg", "split": "train", "sentences": [{"raw": "A cat."}]},
        ]
    }
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps(karpathy))
    found = read_references(file, "test")
    assert (found.captions, found.names) == ({1: ["A dog.", "One dog."]}, {1: "a.jpg"})
    with pytest.raises(InputError, match="holds no captions of the validation split"):
        read_references(file, "validation")
    table = tmp_path / "captions.csv"
    with table.open("w", newline="") as opened:
        csv.writer(opened).writerows([["image", "caption"], ["a.jpg", "A dog."], ["a.jpg", "One dog."]])
    assert read_references(table, "test").captions == {"a.jpg": ["A dog.", "One dog."]}


def test_an_image_without_references_is_left_out_with_a_word(annotations, capsys):
    content = json.loads(annotations.read_text())
    content["images"].append({"id": 4, "file_name": "d.jpg"})
    annotations.write_text(json.dumps(content))
    assert read_references(annotations).captions == REFERENCES
    assert "1 images without a caption are left out" in capsys.readouterr().err


def test_files_that_are_no_references(tmp_path):
    empty = tmp_path / "x.json"
    for content, message in (
        ("[]", "is no file of images and captions"),
        ("{", "is no file of images and captions"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": " "}]}', "holds no captions"),
        ('{"images": [1], "annotations": [{"image_id": 1, "caption": "a"}]}', "is not in COCO's captions format"),
    ):
        empty.write_text(content)
        with pytest.raises(InputError, match=message):
            read_references(empty)


def test_what_an_id_is():
    assert [as_key(value) for value in (7, "7", " 007", 7.0, "7.0", "a.jpg", True, 1.5, None, "")] == [
        *[7] * 5,
        "a.jpg",
        *[None] * 4,
    ]


def test_what_inference_writes_can_be_scored(trained, prepared, tmp_path, capsys):
    """By the names of the files, whatever the folders: the scores are those of scoring the run folder."""
    rows = load_from_disk(str(prepared))["test"]
    written = json.loads((trained / "predictions_test.json").read_text())
    names = dict(zip(rows["image_id"], rows["file_name"], strict=True))
    own = [{"path": f"photos/{names[row['image_id']]}", "caption": row["caption"]} for row in written]
    scores = []
    for name, content in (("theirs.json", written), ("own.json", own)):
        (tmp_path / name).write_text(json.dumps(content))
        assert inference.main([f"--predictions={tmp_path / name}", f"--data_path={prepared}"]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1] != ""
