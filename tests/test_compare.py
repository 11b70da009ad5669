"""Captioners side by side: table, page, CSV, and `inference.py --compare`."""

import csv
import io
import json
import random
import shutil
import statistics
from pathlib import Path

import madeup
import pytest
from htmlpage import Page

import inference
from captioning import InputError
from captioning.scores import bootstrap
from captioning.scores.metrics import coco_scores, evaluate
from captioning.show import compare

IMAGES = 40


@pytest.fixture(scope="module")
def split():
    return madeup.split(IMAGES)


@pytest.fixture(scope="module")
def references(split):
    return split.references


@pytest.fixture(scope="module")
def captions(references):
    """Of three captioners: one is a person, one makes mistakes, one says nothing but <b>."""
    rng = random.Random(0)
    good = {i: own[0].lower() for i, own in references.items()}
    worse = {i: caption if rng.random() < 0.7 else "a kite, perhaps." for i, caption in good.items()}
    return {"good": good, "worse": worse, "bold": dict.fromkeys(good, "<b>a ball</b>")}


@pytest.fixture(scope="module")
def found(captions, references):
    return compare.compare(captions, references)


def test_each_is_compared_with_the_first(found, captions, references):
    assert found.first == "good" and list(found.differences) == ["worse", "bold"]
    evaluations = {name: evaluate(said, references) for name, said in captions.items()}
    for name in ("worse", "bold"):
        plain = bootstrap.differences(evaluations[name], evaluations["good"])
        assert found.differences[name] == plain
    each = {name: coco_scores(said, references, per_image=True)[1] for name, said in captions.items()}
    for key in ("cider_d", "bleu_4", "rouge_1"):
        better, worse, equal = found.wins("worse", key)
        assert better == sum(each["worse"][i][key] > each["good"][i][key] + 1e-9 for i in references)
        assert worse == sum(each["good"][i][key] > each["worse"][i][key] + 1e-9 for i in references)
        assert better + worse + equal == IMAGES and equal > 0
        values = [one.scores[key] for one in evaluations.values()]
        assert found.spread(key) == pytest.approx((statistics.fmean(values), statistics.stdev(values)))


def test_the_images_that_differ_most_are_found(found, captions, references):
    each = {name: coco_scores(said, references, per_image=True)[1] for name, said in captions.items()}
    ranges = {
        i: max(e[i]["cider_d"] for e in each.values()) - min(e[i]["cider_d"] for e in each.values()) for i in references
    }
    shown = found.most_different()
    assert len(shown) == 20 and [ranges[i] for i in shown] == sorted(ranges.values(), reverse=True)[:20]
    same = compare.compare({"a": captions["good"], "b": dict(captions["good"])}, references)
    assert same.most_different() == []
    assert {one.p for one in same.differences["b"].values()} == {1.0}


def test_the_table_shows_scores_differences_and_spread(found):
    blocks = [[line.split() for line in block.splitlines()] for block in compare.table(found).split("\n\n")]
    assert blocks[0][0] == ["good", "worse", "bold", "mean", "std"] and len(blocks) == 3
    scores = {row[0]: row[1:] for row in blocks[0][1:]}
    value, low, high = scores["cider_d"][0], scores["cider_d"][1].strip("[,"), scores["cider_d"][2].strip("]")
    assert float(value) == pytest.approx(found.evaluations["good"].scores["cider_d"], abs=6e-5)
    assert (float(low), float(high)) == pytest.approx(found.intervals["good"]["cider_d"], abs=6e-5)
    assert blocks[1][0][:3] == ["worse", "minus", "good"]
    cider = next(row for row in blocks[1] if row[0] == "cider_d")
    assert cider[1] == f"{found.differences['worse']['cider_d'].value:+.4f}" and cider[4] == "<0.001"
    assert list(map(int, cider[5:])) == list(found.wins("worse", "cider_d"))


def test_every_image_has_a_row_of_csv(found, captions, split, references):
    names = dict(zip(split.image_id, split.file_name, strict=True))
    rows = list(csv.DictReader(io.StringIO(compare.per_image_csv(found, names))))
    assert [int(row["image_id"]) for row in rows] == split.image_id
    each = coco_scores(captions["worse"], references, per_image=True)[1]
    for row in rows:
        image = int(row["image_id"])
        assert row["file_name"] == names[image] and row["caption bold"] == "<b>a ball</b>"
        assert row["caption worse"] == captions["worse"][image]
        assert float(row["cider_d worse"]) == pytest.approx(each[image]["cider_d"], abs=1e-6)


def page_of(found, split, picture=True) -> str:
    row_of = {image_id: row for row, image_id in enumerate(split.image_id)}
    names = dict(zip(split.image_id, split.file_name, strict=True))
    return compare.page(found, "drawn", "a program", names, (lambda i: split.image(row_of[i])) if picture else None)


def test_the_page_is_one_file_with_pictures_and_both_captions(found, captions, split, references):
    text = page_of(found, split)
    page = Page(text)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}
    assert len(page.all("img")) == 20 and all(image["src"].startswith("data:") for image in page.all("img"))
    said = " ".join(" ".join(page.text).split())
    for image_id in found.most_different():
        for name in captions:
            assert captions[name][image_id] in said
        assert references[image_id][1] in said
    assert "worse minus good" in said and "bold minus good" in said and "standard deviation" in said
    assert "By CIDEr-D, good is better than bold" in said
    assert found.evaluations["good"].signature in said and "not corrected for the number of comparisons" in said
    assert not Page(page_of(found, split, picture=False)).all("img")


def test_two_that_cannot_be_told_apart_are_said_to_be_so(captions, references, split):
    one = split.image_id[0]
    other = captions["good"] | {one: "a red ball"}
    found = compare.compare({"run-0": captions["good"], "run-1": other}, references, seeds=True)
    text = " ".join(" ".join(Page(page_of(found, split)).text).split())
    assert "run-1 and run-0 cannot be told apart on these images" in text
    assert "they differ in their seeds alone" in text and "mean" in compare.table(found).split("\n")[0]


def results(seed=0, **changed):
    return {"model": {"encoder": "tiny"}, "training": {"seed": seed, "learning_rate": 1e-3, **changed}}


def test_seeds_of_one_recipe_are_recognised():
    assert compare.differ_in_seeds_alone([results(0), results(1, output_dir="other"), results(2)])
    assert not compare.differ_in_seeds_alone([results(0), results(0)])
    assert not compare.differ_in_seeds_alone([results(0), results(1, learning_rate=1e-4)])
    assert not compare.differ_in_seeds_alone([{}, results(1)]) and not compare.differ_in_seeds_alone([{}, {}])


def test_names_are_as_long_as_they_must_be(tmp_path):
    assert compare.short_names(["/home/me/run-a", "/home/me/run-b/"]) == ["run-a", "run-b"]
    assert compare.short_names(["/home/me/a/run", "b/run"]) == ["a/run", "b/run"]
    assert compare.short_names(["run", "run"]) == ["run (1)", "run (2)"]
    (tmp_path / "theirs.json").touch()
    assert compare.short_names([str(tmp_path / "theirs.json"), "run-b"]) == ["theirs", "run-b"]


# ---- inference.py --compare


@pytest.fixture
def two(prepared, tmp_path, monkeypatch):
    """A run folder and a file, each with captions of the validation split; the current folder is empty."""
    from captioning.data.folder import load_prepared

    rows = load_prepared(prepared)[0]["validation"]
    said = {i: own[0] for i, own in zip(rows.image_id, rows.captions, strict=True)}
    (tmp_path / "run").mkdir()
    for file, captions in (
        (tmp_path / "run" / "predictions_validation.json", said),
        (tmp_path / "theirs.json", dict.fromkeys(said, "a red circle")),
    ):
        file.write_text(json.dumps([{"image_id": i, "caption": caption} for i, caption in captions.items()]))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [str(tmp_path / "run"), str(tmp_path / "theirs.json")]


def test_runs_and_files_are_compared(two, prepared, tmp_path, capsys):
    flags = [f"--data_path={prepared}", "--split=validation"]
    assert inference.main(["--compare", *two, *flags]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:2] == ["run", "theirs"] and "theirs minus run" in out and "facts_right" in out
    assert "captions of predictions_validation.json" in err and "signature: coco-ptb3.4.1|" in err
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "comparison_run_theirs_validation.html",
        "comparison_run_theirs_validation.csv",
    }
    text = (tmp_path / "here" / "comparison_run_theirs_validation.html").read_text()
    assert len(Page(text).all("img")) == 20 and str(tmp_path) not in text
    assert inference.main(["--compare", *two, *flags, f"--output={tmp_path / 'x.html'}"]) == 0
    assert (tmp_path / "x.html").read_text() == text and (tmp_path / "x.csv").is_file()


def test_a_run_without_captions_of_the_split_writes_them(two, trained, prepared, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = [f"--data_path={prepared}", "--split=validation", "--device=cpu"]
    assert inference.main(["--compare", str(tmp_path / "model"), two[0], *flags]) == 0
    assert "has no captions of this split" in capsys.readouterr().err
    own = {
        row["image_id"]: row
        for row in json.loads((tmp_path / "model" / "scored_validation_predictions.json").read_text())
    }
    assert len(own) == 80
    assert inference.main(["--compare", str(tmp_path / "model"), two[0], *flags]) == 0
    assert "captions of scored_validation_predictions.json" in capsys.readouterr().err


def test_captions_of_other_weights_or_settings_are_not_compared(two, trained, prepared, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(trained, model, ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = [f"--data_path={prepared}", "--split=validation", "--device=cpu"]
    assert inference.main([f"--model_path={model}", "--max_words=1", *flags]) == 0
    short = (model / "scored_validation_predictions.json").read_text()
    assert inference.main(["--compare", str(model), two[0], *flags]) == 0
    assert "scored_validation_predictions.json was made otherwise; its model writes them" in capsys.readouterr().err
    plain = (model / "scored_validation_predictions.json").read_text()
    assert plain != short
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"num_beams": 1}))  # as another training may
    assert inference.main(["--compare", str(model), two[0], *flags]) == 0
    assert "was made otherwise" in capsys.readouterr().err


def test_captions_of_other_data_with_the_same_ids_are_refused(two, prepared, tmp_path, capsys):
    from captioning.data.folder import load_prepared

    rows = load_prepared(prepared)[0]["validation"]
    entries = rows.results(dict.fromkeys(rows.image_id, "a red circle"))
    for entry, name in zip(entries, reversed(rows.names), strict=True):
        entry["file_name"] = name
    Path(two[1]).write_text(json.dumps(entries))
    with pytest.raises(InputError, match="they are captions of other data"):
        inference.main(["--compare", *two, f"--data_path={prepared}", "--split=validation"])


def test_another_signature_is_said(two, prepared, tmp_path, capsys):
    kept = {"validation": {"signature": "coco-ptb3.4.1|refs:1|n:3|data:00000000|version:1"}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(kept))
    assert inference.main(["--compare", *two, f"--data_path={prepared}", "--split=validation"]) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if "another signature" in line)
    assert warning.startswith("warning: run was scored under another signature") and "n: 3 and 80" in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "one"], "--compare 'one' names one run; name two or more"),
        (["--compare", "one", "two"], "--compare needs --data_path"),
        (["--compare", "one", "two", "--data_path", "x"], "--compare 'one' does not exist"),
        (
            ["--compare", "one", "two", "--data_path", "x", "--predictions", "y"],
            "--predictions has no use with --compare",
        ),
        (["--compare", ".", ".", "--data_path", "x", "--model_path", "y"], "--model_path has no use with --compare"),
        (["--compare", ".", ".", "--data_path", "x", "--num_beams", "2"], "--num_beams has no use with --compare"),
        (["--compare", ".", ".", "--data_path", "x", "--output", "x.csv"], "a name that ends in .html"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        inference.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_captions_of_other_images_are_refused(two, prepared):
    with pytest.raises(InputError, match="have no prediction"):
        inference.main(["--compare", two[1], two[1], f"--data_path={prepared}", "--split=test"])
