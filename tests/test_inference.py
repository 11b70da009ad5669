"""Stage 3: captions on stdout, failures on stderr, exit codes, and scoring."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, caller, contents, script
from datasets import load_from_disk
from httpserver import Server, body, status
from PIL import Image

import inference
import train
from captioning import InputError
from captioning.scores.metrics import coco_scores
from captioning.show import entries


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture of every kind that people have lying around."""
    folder = tmp_path_factory.mktemp("pictures")
    base = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30)
    rgb = Image.merge("RGB", (base, base.rotate(90).resize(base.size), base.transpose(0)))
    rgb.save(folder / "rgb.jpg")
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.save(folder / "frames.gif", save_all=True, append_images=[rgb.rotate(90)], duration=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture
def run(trained, capsys):
    return caller(trained, capsys)


def test_one_image_prints_its_caption_alone(trained, pictures):
    done = script("inference.py", f"--model_path={trained}", "--image_path", pictures / "rgb.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1 and done.stdout.strip() and "\t" not in done.stdout


def test_several_images_of_any_mode_print_path_and_caption(run, pictures):
    code, out, _ = run("--image_path", pictures, "--batch_size", 3)
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0
    assert [path for path, _ in rows] == sorted(str(path) for path in pictures.iterdir())
    assert all(caption for _, caption in rows)


def test_a_turned_image_is_captioned_upright_and_a_gif_by_its_first_frame(pictures):
    from captioning.data import images

    with Image.open(pictures / "turned.jpg") as turned:
        assert images.open_image(pictures / "turned.jpg").size == turned.size[::-1]
    assert images.open_image(pictures / "frames.gif").mode == "RGB"


def test_captions_do_not_depend_on_the_batch(run, pictures):
    outputs = {run("--image_path", pictures, "--batch_size", size)[1] for size in (1, 3, 16)}
    assert len(outputs) == 1


def test_globs_files_and_repeats(run, pictures):
    code, out, _ = run("--image_path", f"{pictures}/*.png", pictures / "rgb.jpg", pictures / "rgb.jpg")
    assert code == 0
    names = [line.split("\t")[0].rsplit("/", 1)[1] for line in out.splitlines()]
    assert names == ["palette.png", "rgba.png", "rgb.jpg"]


def test_output_writes_json(run, pictures, tmp_path):
    code, out, _ = run("--image_path", pictures, "--output", tmp_path / "captions.json")
    assert (code, out) == (0, "")
    found = json.loads((tmp_path / "captions.json").read_text())
    assert len(found) == 7 and all(set(entry) == {"path", "caption", "confidence"} for entry in found)
    assert {path.name for path in tmp_path.iterdir()} == {"captions.json", ".captions.json.made_with"}


def test_json_says_everything_of_each_image(run, pictures, tmp_path):
    code, out, _ = run("--image_path", pictures, "--json", "--alternatives", 3, "--batch_size", 4)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(found) == 7
    for entry in found:
        said = {"path", "caption", "score", "confidence", "tokens", "words", "alternatives", "seconds"}
        assert set(entry) == said and 0 <= entry["confidence"] <= 1
        values = [token["log_probability"] for token in entry["tokens"]]
        assert max(values) <= 0 and entry["score"] == pytest.approx(sum(values) / len(values), abs=1e-5)
        assert " ".join("".join(token["text"] for token in entry["tokens"][:-1]).split()) == entry["caption"]
        assert entry["tokens"][-1]["text"] == "<|endoftext|>"
        assert entry["alternatives"][0] == {name: entry[name] for name in ("caption", "score", "confidence")}
        assert 1 <= len(entry["alternatives"]) <= 3
        assert entry["seconds"]["read"] > 0 and entry["seconds"]["generate"] > 0
    # With one caption each, they are those of every other form of output.
    plain = [line.split("\t") for line in run("--image_path", pictures)[1].splitlines()]
    output = tmp_path / "captions.jsonl"
    code, out, _ = run("--image_path", pictures, "--json", "--output", output)
    assert (code, out) == (0, "")
    assert [(e["path"], e["caption"]) for e in map(json.loads, output.open())] == [tuple(row) for row in plain]


def test_a_line_of_json_shows_letters_and_escapes_what_drives_a_terminal():
    entry = {"caption": "кот \x1b[31m \x9b \u2028 \U000e0001 \ud800 日本", "path": "a\tb"}
    line = entries.json_line(entry)
    assert line.isprintable() and "кот" in line and "日本" in line
    assert json.loads(line) == entry


def test_alternatives_come_with_their_scores(run, pictures, tmp_path):
    code, out, _ = run("--image_path", pictures / "rgb.jpg", "--alternatives", 4)
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and 1 < len(rows) <= 4
    scores = [float(score) for score, _ in rows]
    assert scores == sorted(scores, reverse=True) and len({caption for _, caption in rows}) == len(rows)
    code, out, _ = run("--image_path", pictures, "--alternatives", 2)
    assert {len(line.split("\t")) for line in out.splitlines()} == {3}
    run("--image_path", pictures / "rgb.jpg", "--alternatives", 4, "--output", tmp_path / "captions.json")
    entry = json.loads((tmp_path / "captions.json").read_text())[0]
    assert [one["caption"] for one in entry["alternatives"]] == [caption for _, caption in rows]


def test_explain_draws_a_picture_and_prints_the_same_caption(run, pictures, tmp_path):
    output = tmp_path / "explanation.png"
    code, out, err = run("--image_path", pictures / "turned.jpg", "--explain", output)
    assert code == 0 and out == run("--image_path", pictures / "turned.jpg")[1]
    assert "explanation written to" in err
    with Image.open(output) as page:
        page.load()
        assert page.format == "PNG" and page.width == 1040
    first = output.read_bytes()
    _, out, _ = run("--image_path", pictures / "turned.jpg", "--explain", output, "--explain_layers", -1, "--json")
    assert json.loads(out)["caption"] and output.read_bytes() != first
    with pytest.raises(InputError, match="--explain draws one image, and --image_path names 7"):
        run("--image_path", pictures, "--explain", output)
    with pytest.raises(InputError, match="no layer 5"):
        run("--image_path", pictures / "rgb.jpg", "--explain", output, "--explain_layers", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.png"]


def test_a_checkpoint_is_a_run_folder_too(trained, pictures, capsys):
    checkpoint = sorted(trained.glob("checkpoint-*"))[-1]
    assert (
        inference.main([f"--model_path={checkpoint}", "--image_path", str(pictures / "rgb.jpg"), "--device=cpu"]) == 0
    )
    assert capsys.readouterr().out.strip()


def test_a_file_name_need_not_be_utf8(run, pictures, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes((pictures / "rgb.jpg").read_bytes())
    except OSError:
        return  # a file system that only knows UTF-8 cannot have such a file
    output = tmp_path / "captions.json"
    code, _, _ = run("--image_path", tmp_path, "--output", output)
    assert code == 0 and "caf\\xe9.jpg" in json.loads(output.read_text())[0]["path"]


def test_in_a_batch_the_good_ones_are_captioned_and_the_bad_ones_listed(run, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes((pictures / "rgb.jpg").read_bytes()[:300])
    code, out, err = run("--image_path", pictures / "rgb.jpg", tmp_path / "text.jpg", cut, tmp_path / "none.jpg")
    assert code == 1
    assert len(out.splitlines()) == 1
    assert "3 of 4 images could not be captioned" in err
    for name in ("text.jpg", "cut.jpg", "none.jpg"):
        assert sum(name in line for line in err.splitlines()) == 1


def bomb(path):
    """A PNG of a few kilobytes that claims and delivers 900 million pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (30_000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    packed = zlib.compress(bytes(1_000_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


def test_each_kind_of_bad_input_is_one_sentence_and_exit_code_2(trained, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty").mkdir()
    for source, expected in (
        (tmp_path / "none.jpg", "no such file"),
        (tmp_path / "text.jpg", "text.jpg"),
        (bomb(tmp_path / "bomb.png"), "too many pixels"),
        ("ftp://example.com/x.jpg", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "*.webp", "nothing matches"),
    ):
        with pytest.raises(InputError) as refused:
            inference.main([f"--model_path={trained}", "--image_path", str(source)])
        message = str(refused.value)
        assert expected in message and "\n" not in message, message
    done = script("inference.py", f"--model_path={trained}", "--image_path", tmp_path / "none.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_urls(run, pictures):
    photo = body((pictures / "rgb.jpg").read_bytes())
    with Server({"/photo.jpg": photo, "/gone.jpg": status(404)}) as server:
        code, out, _ = run("--image_path", server.url("/photo.jpg"))
        assert code == 0
        local = run("--image_path", pictures / "rgb.jpg")[1]
        assert out == local
        with pytest.raises(InputError, match="404"):
            run("--image_path", server.url("/gone.jpg"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --image_path to caption images, or --data_path"),
        (["--image_path", "x.jpg", "--num_beams", "0"], "--num_beams 0 is below 1"),
        (["--image_path", "x.jpg", "--batch_size", "-4"], "--batch_size -4 is below 1"),
        (["--predictions", "x.json"], "--predictions needs --data_path"),
        (["--image_path", "x" * 300, "--output", "/no/such/folder/x.json"], "there is no folder"),
        (["--image_path", "x.jpg", "--output", "/"], "is a folder"),
        (["--image_path", "x.jpg", "--explain", "/no/such/folder/x.png"], "there is no folder"),
        (["--image_path", "x.jpg", "--explain_layers", "1"], "--explain_layers needs --explain"),
        (["--image_path", "x.jpg", "--alternatives", "0"], "--alternatives 0 is not between 1 and 100"),
        (["--data_path", "x", "--alternatives", "2"], "--alternatives is for --image_path"),
        (["--data_path", "x", "--json"], "--json is for --image_path"),
        (["--image_path", "x.jpg", "--model_path", "nope"], "did you run train.py?"),
        (["--data_path", "x", "--model_path", "/"], "did you run it?"),
        (["--predictions", "x.json", "--references", "/no/such.json"], "--references '/no/such.json' is not a file"),
        (["--references", "x.json"], "--references needs --predictions"),
        (["--data_path", "x", "--subset"], "--subset needs --predictions"),
        (["--predictions", "x.json", "--references", "a", "--data_path", "b"], "both hold references"),
        (["--data_path", "x", "--split", "dev"], "invalid choice: 'dev'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        inference.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path=/no/such/run"], "--model_path '/no/such/run' does not exist"),
        (["--device=tpu9"], "--device 'tpu9' cannot be used"),
        (["--max_new_tokens=4000"], "--max_new_tokens 4000 is too long"),
    ],
)
def test_what_cannot_work_is_said(trained, pictures, arguments, message):
    with pytest.raises(InputError, match=message):
        inference.main([f"--model_path={trained}", "--image_path", str(pictures / "rgb.jpg"), *arguments])


def test_help_does_not_wait_for_heavy_imports():
    # Not a timing: what makes it fast is that torch and transformers are not loaded before the arguments are parsed.
    code = (
        "import sys\n"
        "import dataloader, inference, train\n"
        "for script in (dataloader, inference):\n"
        "    try: script.main(['--help'])\n"
        "    except SystemExit: pass\n"
        "try: train.main(['--learning_rte=3'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "set()", done.stderr


def imported(lines) -> set[str]:
    """The modules that `python -X importtime` tells of."""
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_a_caption_loads_nothing_of_data_scores_pages_and_training(untrained, pictures):
    # What takes a tenth of a second or more to import. transformers itself loads accelerate, and scikit-learn where it
    # is installed.
    needless = {"datasets", "evaluate", "gradio", "matplotlib", "nltk", "pandas", "peft"}
    needless |= {"pyarrow", "requests", "rouge_score", "tensorboard", "torchvision", "transformers.trainer"}
    command = [sys.executable, "-X", "importtime", "inference.py", f"--model_path={untrained}", "--device=cpu"]
    command += ["--image_path", str(pictures / "rgb.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    loaded = imported(done.stderr.splitlines())
    assert "torch" in loaded and not loaded & needless


def test_a_training_speaks_before_anything_heavy_is_loaded(few, tmp_path):
    command = [sys.executable, "-X", "importtime", "train.py", f"--data_path={few}", f"--output_dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        lines = list(itertools.takewhile(lambda line: not line.endswith("; starting PyTorch\n"), process.stderr))
        process.kill()
    assert "captioning.cli" in imported(lines)
    assert not imported(lines) & {"torch", "transformers", "datasets", "numpy", "pandas", "accelerate", "yaml"}


def test_a_run_folder_is_scored_on_a_split(trained, prepared, tmp_path, capsys):
    before = json.loads((trained / "results.json").read_text())["test"]
    output = tmp_path / "predictions.json"
    code = inference.main([f"--model_path={trained}", f"--data_path={prepared}", f"--output={output}", "--device=cpu"])
    captured = capsys.readouterr()
    assert code == 0
    table = {line.split()[0]: line.split()[1] for line in captured.out.split("\n\n")[0].splitlines()}
    intervals = {
        line.split()[0]: re.search(r"\[(.*), (.*)\]", line).groups()
        for line in captured.out.split("\n\n")[0].splitlines()
    }
    # The same scores as after training, to the digits shown: the two scripts prepare and generate identically.
    for name, value in table.items():
        assert float(value) == pytest.approx(before[name], abs=6e-5), name
        assert list(map(float, intervals[name])) == pytest.approx(before["intervals"][name], abs=6e-5), name
    assert before["signature"] in captured.err and "|n:120|" in before["signature"]
    assert "official COCO" in captured.err and "test split, 120 images" in captured.err
    predictions = json.loads(output.read_text())
    assert predictions == json.loads((trained / "predictions_test.json").read_text())
    per_image = json.loads((tmp_path / "predictions_per_image.json").read_text())
    assert len(per_image) == 120
    assert per_image[0]["cider_d"] <= per_image[-1]["cider_d"]


def test_scores_in_bfloat16_with_cached_features_are_those_of_the_run_folder(few, tmp_path, capsys):
    """Training may be less exact. What results.json tells is what inference.py computes, to the last digit."""
    folder = tmp_path / "run"
    flags = ["--bf16=True", "--freeze_encoder", "--cache_features", "--epochs=2", "--per_device_train_batch_size=8"]
    train.main([f"--data_path={few}", f"--output_dir={folder}", "--use_cpu", "--dataloader_num_workers=0", *flags])
    results = json.loads((folder / "results.json").read_text())
    for split in ("validation", "test"):
        assert inference.main([f"--model_path={folder}", f"--data_path={few}", f"--split={split}", "--device=cpu"]) == 0
        scored = json.loads((folder / f"scored_{split}_results.json").read_text())
        assert results[split].pop("loss") and results[split]["intervals"].pop("loss")
        assert {name: scored[name] for name in results[split]} == results[split]
    captions = json.loads((folder / "scored_test_predictions.json").read_text())
    assert captions == json.loads((folder / "predictions_test.json").read_text())
    assert "bfloat16" in capsys.readouterr().err


def test_a_photo_needs_no_flag(run, pictures, trained):
    code, out, _ = run(pictures / "rgb.jpg")
    assert code == 0 and out == run("--image_path", pictures / "rgb.jpg")[1] != ""
    assert run(pictures / "rgb.jpg", pictures / "grey.jpg", "--json")[1].count("\n") == 2


def test_scoring_leaves_the_run_folder_s_results_as_they_are(trained, prepared, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = contents(folder)
    assert inference.main([f"--model_path={folder}", f"--data_path={prepared}", "--num_beams=1", "--device=cpu"]) == 0
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    new = {Path(name).name: json.loads(after[name]) for name in after.keys() - before.keys()}
    assert new.pop(".scored_test_predictions.json.made_with")["num_beams"] == 1
    assert set(new) == {f"scored_test_{name}.json" for name in ("predictions", "per_image", "results")}
    results = new["scored_test_results.json"]
    assert results["decoding"]["num_beams"] == 1 and results["images"] == 120 and 0 < results["bleu_1"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path=DATA", "--output=captions.csv"], "give it a name that ends in .json"),
        (["--data_path=DATA", "--output=mine.json"], "'mine.json' is there, and nothing says what made it"),
        (["--data_path=DATA", "--no-recursive"], "--no-recursive has no use with --data_path"),
        (["x.jpg", "--split=train"], "--split has no use with --image_path"),
        (["--export=onnx", "--output=new", "--num_beams=5"], "--num_beams has no use with --export"),
        (["--export=onnx", "--output=new", "--prefix=a"], "--prefix has no use with --export"),
        (["--predictions=mine.json", "--data_path=DATA", "--num_beams=5"], "--num_beams has no use with --predictions"),
        (["--predictions=mine.json", "--references=mine.json", "--json"], "--json has no use with --predictions"),
        (["--predictions=mine.json", "--references=mine.json", "--explain=x.png"], "--explain has no use with"),
        (["--predictions=mine.json", "--references=mine.json", "--alternatives=3"], "--alternatives has no use with"),
        (["--serve", "--batch_size=3"], "--batch_size has no use with --serve"),
        (["--compare", "mine.json", "a.csv", "--data_path=DATA", "--output=a.html"], "'a.csv', which is there"),
    ],
)
def test_what_would_do_nothing_or_overwrite_is_refused(
    arguments, message, untrained, prepared, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.json", "a.csv", "a.html"):
        Path(name).write_text("a person's own work")
    words = [argument.replace("DATA", str(prepared)) for argument in arguments]
    words += [] if "--compare" in words or words[0].startswith("--pred") else [f"--model_path={untrained}"]
    with pytest.raises(SystemExit) as stopped:
        inference.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error, error
    assert {Path(name).read_text() for name in ("mine.json", "a.csv", "a.html")} == {"a person's own work"}


def test_a_folder_that_takes_no_scores_is_named_before_any_caption(untrained, prepared, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("os.access", lambda folder, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit):
        inference.main([f"--model_path={untrained}", f"--data_path={prepared}"])
    assert "which is read-only; name a file in another with --output" in capsys.readouterr().err


def test_anybodys_captions_are_scored(prepared, tmp_path, capsys):
    rows = load_from_disk(str(prepared))["validation"]
    predictions = {row["image_id"]: row["captions"][0] for row in rows.select_columns(["image_id", "captions"])}
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in predictions.items()]))
    assert inference.main([f"--predictions={file}", f"--data_path={prepared}", "--split=validation"]) == 0
    table = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()}
    expected = coco_scores(predictions, dict(zip(rows["image_id"], rows["captions"], strict=True)))
    assert {name: float(value) for name, value in table.items()} == pytest.approx(
        expected | {"facts_right": 1.0}, abs=6e-5
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not in COCO's results format"),
        ('{"1": ["a", "b"]}', "not in COCO's results format"),
        ('[{"image_id": 1}]', "not in COCO's results format"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "captions an image twice"),
        ('[{"image_id": -5, "caption": "a"}]', "have no prediction"),
    ],
)
def test_results_files_that_cannot_be_scored(prepared, tmp_path, content, message):
    file = tmp_path / "theirs.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        inference.main([f"--predictions={file}", f"--data_path={prepared}"])


def test_the_model_cards_snippet_runs(trained, prepared, tmp_path):
    """The usage example of the run folder's README.md, in the folder, with a photo of that name."""
    text = (trained / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    photo = next((prepared / "sample" / "test2014").glob("*.jpg"))
    code = snippet.replace('"."', repr(str(trained))).replace('"photo.jpg"', repr(str(photo)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = script("inference.py", f"--model_path={trained}", "--image_path", photo, "--device=cpu")
    assert done.stdout.strip() == ours.stdout.strip() != ""
