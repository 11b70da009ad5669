"""What a run folder holds for people: the model card, TensorBoard's pictures, the upload to the hub."""

import base64
import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import madeup
import pytest
from conftest import ROOT
from datasets import load_from_disk
from httpserver import Server, body
from hub import Hub as ModelHub
from hub import Repository
from huggingface_hub import ModelCard
from PIL import Image

import inference
from captioning.data import images
from captioning.data.folder import Split
from captioning.model import parts
from captioning.show import run_folder, tables


@pytest.fixture(scope="module")
def results():
    """What results.json holds of a made-up run."""
    return run_folder.results_of(madeup.run(madeup.split(4)))


# ---- the model card


def test_the_model_card_holds_the_results_as_the_hub_reads_them(results, tmp_path):
    split = madeup.split(4)
    run_folder.write(tmp_path, madeup.run(split), split)
    card = ModelCard.load(tmp_path / "README.md")  # parses the metadata and the model-index with the hub's own classes
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-to-text"
    assert card.data.model_name == tmp_path.name
    assert card.data.license == "other" and "**Licence.**" in card.text
    assert "pip install torch" in card.text and "transformers.js" in card.text
    assert f"--export onnx --model_path {tmp_path.name} --output exported" in card.text
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["BLEU-4"].metric_value == round(results["test"]["bleu_4"], 4)
    assert found["CIDEr-D"].metric_type == "cider" and found["BLEU-4"].metric_type == "bleu"
    assert len(found) == 10
    assert {(result.dataset_name, result.dataset_split) for result in found.values()} == {("drawn scenes", "test")}
    assert card.data.base_model is None  # both parts are presets
    assert "Protocol: one caption per image" in card.text
    assert "A reference is a caption written by a program." in card.text


def test_a_model_card_names_what_the_model_was_made_of_if_the_hub_knows_it(results, tmp_path):
    results = copy.deepcopy(results)
    results["model"] |= {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "gpt2"}
    results["data"]["source"] = 'a: "source" # with --- signs'
    results["test"]["cider_d"] = float("nan")
    (tmp_path / "README.md").write_text(run_folder.model_card(results, "name: [x]"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == ["google/vit-base-patch16-224-in21k", "gpt2"]
    assert data.model_name == "name: [x]" and len(data.eval_results) == 9
    assert data.eval_results[0].dataset_name == 'a: "source" # with --- signs'
    results["model"]["encoder"] = str(tmp_path)
    assert str(tmp_path) not in run_folder.model_card(results, "x")


def test_captions_are_written_in_their_own_letters(tmp_path):
    split = madeup.split(4)
    captions = dict.fromkeys(split.image_id, "Квадрат слева, 左")
    run_folder.write(tmp_path, madeup.run(split, predictions=captions), split)
    assert (tmp_path / "predictions_test.json").read_text(encoding="utf-8").count("Квадрат слева, 左") == 4


def test_the_protocol_is_that_of_the_references_language(tmp_path):
    split = Split(madeup.split(4).rows.map(lambda row: {"captions": ["红色的圆。", "圆"]}, load_from_cache_file=False))
    run_folder.write(tmp_path, madeup.run(split, predictions=dict.fromkeys(split.image_id, "红色的圆")), split)
    for file in ("README.md", "report.html", "results.json"):
        assert "characters as words, for a language without spaces" in (tmp_path / file).read_text(encoding="utf-8")


@pytest.fixture
def photographs(prepared, tmp_path):
    """Drawn scenes as they come out of cameras, phones and drawing programs."""
    scenes = iter(load_from_disk(str(prepared))["validation"]["image"])
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        next(scenes).save(tmp_path / f"turned_{turn}.jpg", exif=exif)
    for number in range(4):
        scene = next(scenes)
        scene.putalpha(Image.radial_gradient("L").resize(scene.size).rotate(90 * number))
        scene.save(tmp_path / f"faded_{number}.png")
    next(scenes).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png", transparency=2)
    for mode, name in (("LA", "grey.png"), ("L", "grey.jpg"), ("CMYK", "print.jpg"), ("RGB", "plain.png")):
        next(scenes).convert(mode).save(tmp_path / name)
    return sorted(tmp_path.iterdir())


def test_the_model_cards_code_gives_the_captions_of_inference(trained, photographs, monkeypatch, tmp_path, capsys):
    expected = tmp_path / "captions.json"
    inference.main([f"--model_path={trained}", f"--output={expected}", "--image_path", *map(str, photographs)])
    code = re.search(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)[1]
    once, _, each = code.rpartition("\n\n")
    monkeypatch.chdir(trained)
    names: dict = {}
    exec(once, names)
    capsys.readouterr()
    for entry in json.loads(expected.read_text()):
        assert '"photo.jpg"' in each
        exec(each.replace('"photo.jpg"', repr(entry["path"])), names)
        assert capsys.readouterr().out.split() == entry["caption"].split(), entry["path"]
        assert names["image"] == images.open_image(entry["path"]), entry["path"]
    assert "Tried with transformers 4.57" in (trained / "README.md").read_text()


def test_transformers_4_knows_the_class_of_the_tokenizer(prepared, trained):
    folders = [prepared, trained, *trained.glob("checkpoint-*")]
    assert len(folders) > 2
    for folder in folders:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert parts.load_tokenizer(folder).eos_token == parts.END_OF_TEXT


# ---- while it trains


def test_each_evaluation_shows_the_same_images_captions(trained):
    # The progress bar is drawn in between.
    said = re.findall(r"(validation loss|    (\S+\.jpg): (.*))", (trained.parent / "stderr.txt").read_text())
    assert [bool(image) for _, image, _ in said] == [False, True, True, True] * 2
    assert [image for _, image, _ in said[1:4]] == [image for _, image, _ in said[5:]]
    assert all(caption.strip() for _, image, caption in said if image)


class Hub(Server):
    """As much of the hub's HTTP interface as an upload of small files needs."""

    def __init__(self):
        super().__init__()
        self.files, self.created = {}, []
        self.default = lambda handler: body(json.dumps(self.answer(handler)).encode(), "application/json")(handler)

    def answer(self, handler) -> dict:
        data, path, url = sent(handler), handler.path.partition("?")[0], self.url("")
        if path == "/api/whoami-v2":
            return {"name": "somebody", "type": "user", "orgs": []}
        if path == "/api/repos/create":
            self.created.append(json.loads(data))
            return {"url": f"{url}/somebody/run", "id": "somebody/run"}
        if path.endswith("/preupload/main"):
            # Files that are no text go over LFS, as on the hub.
            names = [file["path"] for file in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".bin")) else "regular" for name in names}
            return {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{url}/upload/{one['oid']}", "header": {}}}
            return {"transfer": "basic", "objects": objects}
        if path.startswith("/upload/"):
            self.files[path.rsplit("/", 1)[1]] = data
            return {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, data.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.files.pop(line["value"]["oid"])
            return {"commitUrl": f"{url}/somebody/run/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        return {"id": "somebody/run", "sha": "0" * 40, "siblings": []}


def sent(handler) -> bytes:
    """The body of a request."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    parts = []
    while size := int(handler.rfile.readline(), 16):
        parts.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(parts)


def test_a_run_is_pushed_to_the_hub_and_shown_in_tensorboard(few, tmp_path):
    folder = tmp_path / "run"
    with Hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url(""),
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        flags = ["--max_steps=2", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=False"]
        flags += ["--push_to_hub", "--hub_model_id=somebody/run", "--hub_private_repo=true", "--report_to=tensorboard"]
        flags += ["--generation_num_beams=1", "--generation_max_length=8"]
        command = [sys.executable, ROOT / "train.py", f"--data_path={few}", f"--output_dir={folder}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "run" and hub.created[0]["visibility"] == "private"
    assert {request.headers.get("authorization") for request in hub.requests} - {None} == {"Bearer hf_test"}
    # What was written is what was pushed, and nothing of the checkpoints.
    names = "config.json generation_config.json model.safetensors tokenizer.json preprocessor_config.json"
    names += " README.md report.html results.json predictions_test.json training_curves.png gallery.png"
    for name in names.split():
        assert hub.files[name] == (folder / name).read_bytes(), name
    assert not any("checkpoint" in name for name in hub.files)
    assert not any(b"hf_test" in content for content in hub.files.values())
    assert ModelCard(hub.files["README.md"].decode()).data.eval_results

    # Whoever names the model by its id gets the captions of the folder.
    pushed = Repository({}, {name: content for name, content in hub.files.items() if "/" not in name})
    expected, found = tmp_path / "folder.json", tmp_path / "hub.json"
    photographs = [few.parent / f"{number}.png" for number in range(4)]
    for photograph, image in zip(photographs, load_from_disk(str(few))["test"]["image"], strict=True):
        image.save(photograph)
    with ModelHub({"somebody/run": pushed}) as hub:
        for model, output in ((folder, expected), ("somebody/run", found)):
            command = [sys.executable, ROOT / "inference.py", f"--model_path={model}", f"--output={output}"]
            environment = {**os.environ, **hub.environment(tmp_path / "home")}
            done = subprocess.run(
                [*command, *photographs], capture_output=True, text=True, env=environment, timeout=240
            )
            assert done.returncode == 0, done.stderr
        assert "model.safetensors" in hub.fetched("somebody/run")
    assert found.read_bytes() == expected.read_bytes() and len(json.loads(found.read_text())) == 4

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.glob("runs/*"))), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"gallery", "training_curves"}
    assert {"train/loss", "test/cider_d", "test/cider_d_low"} <= set(events.Tags()["scalars"])
    assert "report/text_summary" in events.Tags()["tensors"]
    picture = events.Images("gallery")[0]
    assert (picture.width, picture.height) == Image.open(folder / "gallery.png").size and picture.step == 2


def test_a_score_that_is_no_number_is_left_out(tmp_path):
    split = madeup.split(4)
    run = madeup.run(split)
    odd = dataclasses.replace(
        run.test, scores=run.test.scores | {"loss": math.nan}, sums={"loss": ([math.inf] * 4, [1.0] * 4)}
    )
    results = run_folder.write(tmp_path, dataclasses.replace(run, test=odd), split)
    assert results["test"]["loss"] is None and results["test"]["intervals"]["loss"] == [None, None]
    assert "nan" not in (tmp_path / "README.md").read_text().lower().split()
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert tables.scores({"test": results["test"]}).startswith("bleu_1")
