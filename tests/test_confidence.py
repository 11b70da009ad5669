"""How sure captions are: regressions and measures against what can be computed by hand, and what people are told."""

import dataclasses
import json
import math
import random
import shutil

import numpy as np
import pytest
from conftest import caller
from PIL import Image

import dataloader
import inference
from captioning import InputError
from captioning.data.folder import load_prepared
from captioning.model import explain
from captioning.model.captioner import load
from captioning.scores import confidence
from captioning.scores.confidence import Calibration, Judged
from captioning.show import certainty, serve

PLAIN = Calibration(4.0, 2.0, -0.1, 2.0, 1.0, 0.3, 100, 70, "made up")
OTHERS = ["a dog runs on the grass", "two cats sleep in a red basket", "people walk on a beach", "a boat on a lake"]


def made_up(count=400, seed=0):
    """Captions that are right the more often, the likelier the model finds them."""
    rng = random.Random(seed)
    captions, references = {}, {}
    for image in range(count):
        own, other = rng.sample(OTHERS, 2)
        mean = -rng.random() * 2
        text = own if rng.random() < 1 / (1 + math.exp(-(3 + 3 * mean))) else other
        captions[image] = Judged(text, mean, 10, [(word, mean) for word in text.split()])
        references[image] = [own, f"{own} today"]
    return captions, references


def test_the_regression_finds_the_probabilities():
    captions, references = made_up()
    found = confidence.calibrate(captions, references, "made up")
    assert found.mean == pytest.approx(3, abs=0.8) and found.intercept + 10 * found.tokens == pytest.approx(3, abs=0.8)
    assert found.images == 400 and found.right == sum(captions[i].text == references[i][0] for i in captions)
    others, theirs = made_up(2000, seed=1)
    right = [3.0 * (others[i].text == theirs[i][0]) for i in others]
    measured = confidence.reliability([found.caption(others[i]) for i in others], right)
    assert measured.error < 0.05 and measured.auroc > 0.7 and measured.gain > 0.1


def test_the_regression_is_at_the_minimum_of_its_loss():
    """By gradient, with numpy: Platt's targets, and a small ridge on the standardised weights."""
    captions, references = made_up(120)
    found = confidence.calibrate(captions, references, "made up")
    x = np.array([one.mean for one in captions.values()])
    right = np.array([captions[i].text == references[i][0] for i in captions])
    targets = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    standard = (x - x.mean()) / x.std()
    chance = np.array([found.caption(one) for one in captions.values()])
    assert (chance - targets).sum() == pytest.approx(0, abs=1e-4)
    assert ((chance - targets) * standard).sum() + confidence.RIDGE * found.mean * x.std() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("right", [True, False])
def test_a_few_captions_that_are_all_alike_leave_doubt(right):
    texts = OTHERS[:3]
    captions = {i: Judged(text if right else "zzz", -0.5, 8, [("zzz", -0.5)]) for i, text in enumerate(texts)}
    found = confidence.calibrate(captions, {i: [text] for i, text in enumerate(texts)}, "made up")
    sure = found.caption(captions[0])
    assert 0.7 < sure < 0.9 if right else 0.1 < sure < 0.3
    assert math.isfinite(found.mean) and math.isfinite(found.word)
    with pytest.raises(InputError, match="needs 2 images to learn from, and made up has fewer"):
        confidence.calibrate({0: captions[0]}, {0: ["a"]}, "made up")


def test_the_measures_by_hand():
    found = confidence.reliability([0.1, 0.15, 0.9, 0.95, 0.95], [0.0, 0.5, 0.2, 1.0, 2.0])
    # The pairs of a right and a wrong caption: 0.15 > 0.1, < 0.9; both 0.95 > 0.1, > 0.9.
    assert found.auroc == pytest.approx(5 / 6)
    assert [(b.count, pytest.approx(b.right), pytest.approx(b.confidence)) for b in found.bins] == [
        (2, 0.5, 0.125),
        (3, 2 / 3, 2.8 / 3),
    ]
    assert found.error == pytest.approx((2 * (0.5 - 0.125) + 3 * (2.8 / 3 - 2 / 3)) / 5)
    assert found.gain == pytest.approx(3.7 / 4 - 3.7 / 5)
    assert confidence.reliability([0.5, 0.5], [0.0, 1.0]).auroc == 0.5
    assert confidence.reliability([0.5], [1.0]).auroc is None
    wrong_way_round = confidence.reliability_of({1: 0.9, 2: 0.1}, {1: 0.0, 2: 2.0})
    assert "AUROC 0.000 for" in confidence.told(wrong_way_round)
    assert "AUROC" not in confidence.told(confidence.reliability_of({1: 0.5}, {1: 1.0}))


def test_a_word_counts_as_used_in_any_form_of_punctuation():
    captions = {0: Judged("a dog.", -1, 4, [("a", -0.1), ("dog.", -3.0)]), 1: Judged("x", -1, 2, [("x", -5.0)])}
    found = confidence.calibrate(captions, {0: ["One dog runs", "A dog"], 1: ["a cat"]}, "made up")
    assert found.of_word(-0.1) > found.of_word(-5.0)
    assert PLAIN.doubtful(-2.1) and not PLAIN.doubtful(-1.9)


def test_a_calibration_is_kept_and_read(tmp_path):
    assert confidence.read(tmp_path) is None
    confidence.write(tmp_path, PLAIN)
    assert confidence.read(tmp_path) == PLAIN
    content = json.loads((tmp_path / "confidence.json").read_text())
    assert "CIDEr-D is at least 0.3" in content["meaning"]
    for change in ({"mean": "x"}, {"mean": True}, {"images": None}, {"tokens": float("nan")}):
        (tmp_path / "confidence.json").write_text(json.dumps(content | change))
        with pytest.raises(InputError, match=r"confidence.json' is no calibration of captions \(.*\); make it again"):
            confidence.read(tmp_path)
    (tmp_path / "confidence.json").write_text("{")
    with pytest.raises(InputError, match="is no calibration"):
        confidence.read(tmp_path)


# ---- what people are told


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        base = Image.effect_mandelbrot((90, 90), (-2 + number / 2, -1.5, 1, 1.5), 30)
        bands = (base, base.rotate(90), base.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        Image.merge("RGB", bands).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(trained, capsys):
    def call(*arguments, model=trained):
        return caller(model, capsys)(*arguments)

    return call


def test_training_learns_it_and_tells_it_everywhere(trained):
    calibration = confidence.read(trained)
    assert calibration.images == 80 and "validation split" in calibration.data
    results = json.loads((trained / "results.json").read_text())
    assert sum(one["count"] for one in results["confidence"]["bins"]) == 120
    assert 0 <= results["confidence"]["expected_calibration_error"] <= 1
    page = (trained / "report.html").read_text()
    assert "How sure it is" in page and "<circle" in page and "confidence&nbsp;0." in page
    assert "confidence: learnt from 80 captions" in (trained.parent / "stderr.txt").read_text()


def test_every_caption_of_json_has_it(run, trained, photos):
    calibration = confidence.read(trained)
    for line in run("--image_path", photos, "--json", "--alternatives", 2)[1].splitlines():
        entry = json.loads(line)
        values = [token["log_probability"] for token in entry["tokens"]]
        judged = Judged("", sum(values) / len(values), len(values))
        assert entry["confidence"] == pytest.approx(calibration.caption(judged), abs=1e-3)
        assert " ".join(word["text"] for word in entry["words"]) == entry["caption"]
        for word in entry["words"]:
            assert word["confidence"] == pytest.approx(calibration.of_word(word["log_probability"]), abs=1e-3)
            assert word["doubtful"] == (calibration.of_word(word["log_probability"]) < 0.5)
        assert all(0 <= one["confidence"] <= 1 for one in entry["alternatives"])


def test_what_is_less_sure_is_left_to_a_person(run, photos, tmp_path):
    every = [json.loads(line) for line in run("--image_path", photos, "--json")[1].splitlines()]
    limit = sorted(entry["confidence"] for entry in every)[1]
    code, out, err = run("--image_path", photos, "--min_confidence", limit)
    sure = [f"{entry['path']}\t{entry['caption']}" for entry in every if entry["confidence"] >= limit]
    assert code == 0 and out.splitlines() == sure
    unsure = next(entry for entry in every if entry["confidence"] < limit)
    assert f"1 of 3 images are left to a person, below --min_confidence {limit:g}:" in err and unsure["path"] in err
    _, out, _ = run("--image_path", photos, "--min_confidence", limit, "--json")
    entry = next(e for e in map(json.loads, out.splitlines()) if e["path"] == unsure["path"])
    assert (entry["caption"], entry["needs_review"], entry["draft"]) == ("", True, unsure["caption"])
    _, _, err = run("--image_path", photos, "--min_confidence", limit, "--output", tmp_path / "captions.csv")
    assert "2 captions written to" in err
    code, out, _ = run("--image_path", photos, "--min_confidence", 1)
    assert (code, out) == (0, "")


def test_files_for_training_have_sure_captions_only(run, photos, tmp_path):
    """`metadata.jsonl` tells the confidence, a text beside an image does not; what is doubtful has neither."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    every = {name: json.loads(run(folder / name, "--json")[1]) for name in ("0.png", "1.png", "2.png")}
    limit = sorted(entry["confidence"] for entry in every.values())[1]
    assert run("--image_path", folder, "--metadata", "--sidecar=.txt", "--min_confidence", limit)[0] == 0
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    sure = {name: entry for name, entry in every.items() if entry["confidence"] >= limit}
    assert {row["file_name"]: row["text"] for row in rows} == {name: one["caption"] for name, one in sure.items()}
    for row in rows:
        assert row["confidence"] == pytest.approx(sure[row["file_name"]]["confidence"], abs=1e-3)
    texts = {file.with_suffix(".png").name: file.read_text() for file in folder.glob("*.txt")}
    assert texts == {name: one["caption"] + "\n" for name, one in sure.items()}
    # Without a limit, the same folder is read back as data, the column of numbers aside.
    shutil.rmtree(folder)
    shutil.copytree(photos, folder)
    assert run("--image_path", folder, "--metadata")[0] == 0
    flags = [f"--data={folder}", "--encoder=tiny", "--decoder=tiny", "--limit_data=0"]
    assert dataloader.main([*flags, f"--save_path={tmp_path / 'data'}"]) == 0
    splits, _ = load_prepared(tmp_path / "data")
    kept = {name: own for split in splits.values() for name, own in zip(split.names, split.captions, strict=True)}
    assert kept == {name: [entry["caption"]] for name, entry in every.items()}


def test_a_run_folder_without_it_says_how_to_make_it(run, trained, photos, few, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", "confidence.json"))
    entry = json.loads(run("--image_path", photos / "0.png", "--json", model=folder)[1])
    assert "confidence" not in entry and "words" not in entry
    with pytest.raises(
        InputError, match=r"--min_confidence needs confidence.json, which .* lacks; make it with: python"
    ):
        run("--image_path", photos, "--min_confidence", 0.5, model=folder)
    code, _, err = run(f"--data_path={few}", "--split=validation", "--calibrate", model=folder)
    assert code == 0 and "learnt from 4 of them, written to confidence.json" in err and "confidence: AUROC" in err
    assert confidence.read(folder).images == 4
    each = json.loads((folder / "scored_validation_per_image.json").read_text())
    assert all(0 <= row["confidence"] <= 1 for row in each)
    assert "confidence" in json.loads((folder / "scored_validation_results.json").read_text())
    assert "confidence" in json.loads(run("--image_path", photos / "0.png", "--json", model=folder)[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x.jpg", "--min_confidence", "1.5"], "--min_confidence 1.5 is not between 0 and 1"),
        (["--data_path", "x", "--min_confidence", "0.5"], "--min_confidence is for --image_path"),
        (["--data_path", "x", "--calibrate"], "--calibrate needs --data_path and --split validation"),
        (["x.jpg", "--calibrate"], "--calibrate needs --data_path and --split validation"),
        (
            ["--data_path", "x", "--split", "validation", "--calibrate", "--model_path", "a/b"],
            "needs the folder of a run",
        ),
    ],
)
def test_flags_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit):
        inference.main(flags)
    assert message in capsys.readouterr().err


def test_the_page_and_the_explanation_mark_doubtful_words(trained, photos, tmp_path):
    bundle = load(trained)
    doubts = dataclasses.replace(PLAIN, word_intercept=-5.0)
    answer = serve.Captioner(bundle, calibration=doubts).file(str(photos / "0.png"))
    assert answer.sure.startswith("Confidence: ") and "; doubtful: " in answer.sure
    assert serve.Captioner(bundle).file(str(photos / "0.png")).sure == ""
    found = explain.explain(bundle, Image.open(photos / "0.png").convert("RGB"))
    assert all(word["doubtful"] for word in certainty.explained(found.words, doubts))
    assert not any(word["doubtful"] for word in certainty.explained(found.words, None))


def test_a_visitor_of_the_page_asks_for_a_caption(trained, photos):
    captioner = serve.Captioner(load(trained))
    plain = captioner.file(str(photos / "0.png")).caption
    nothing = {"prefix": "", "min_words": None, "must": "", "temperature": 0, "seed": 0, "case": "as-is"}
    assert captioner.file(str(photos / "0.png"), nothing).caption == plain
    asked = {"prefix": "Photo:", "must": "zebra, ox", "max_words": 9.0, "case": "sentence", "temperature": 0}
    answer = captioner.file(str(photos / "0.png"), asked)
    assert answer.caption.startswith("Photo: ") and "zebra" in answer.caption and "ox" in answer.caption
    refused = captioner.file(str(photos / "0.png"), {"min_words": 5, "max_words": 3})
    assert refused.message == "Min_words 5 is more than max_words 3." and refused.caption == ""
