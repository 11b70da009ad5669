"""What a run folder holds for people: report.html, the model card, TensorBoard's pictures, the upload to the hub."""

import base64
import copy
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from datasets import load_from_disk
from huggingface_hub import ModelCard
from PIL import Image

from captioning.show import html_report, run_folder

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a page holds."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(trained, prepared):
    """(results, log_history, test rows, predictions) of the trained run."""
    results = json.loads((trained / "results.json").read_text())
    checkpoint = max(trained.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    entries = json.loads((trained / "predictions_test.json").read_text())
    predictions = {entry["image_id"]: entry["caption"] for entry in entries}
    return results, history, load_from_disk(str(prepared))["test"], predictions


# ---- report.html


def test_the_report_is_one_file_that_fetches_and_runs_nothing(trained):
    text = (trained / "report.html").read_text()
    page = Page(text)
    assert len(text) < 1_000_000
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert "default-src 'none'" in text
    targets = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert targets and all(target.startswith(("data:image/", "#")) for target in targets)
    assert "url(" not in text and "@import" not in text and not re.search(r"\son\w+=", text)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {target[1:] for target in targets if target.startswith("#")} <= ids
    for uri in (target for target in targets if target.startswith("data:")):
        base64.b64decode(uri.split(",")[1], validate=True)


def test_the_report_can_be_heard_and_read_on_a_phone(trained):
    page = Page((trained / "report.html").read_text())
    assert page.all("html")[0]["lang"] == "en" and page.all("title")
    assert page.all("meta")[1]["content"].startswith("width=device-width")
    assert [len(page.all(tag)) for tag in ("h1", "main", "header")] == [1, 1, 1]
    assert all(image["alt"].strip() for image in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) and all("scope" in head for head in page.all("th"))
    # What scrolls sideways can be reached with the keyboard, and has a name.
    for _, attributes in page.tags:
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [value / 255 for value in bytes.fromhex(digits)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_have_the_contrast_that_accessibility_asks_for():
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in html_report.STYLE.split("@media"))
    for colours in (light, dark):
        for ground in ("ground", "card"):
            for ink in ("ink", "quiet"):
                brighter, darker = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)  # WCAG 2.2, AA


def test_the_report_shows_scores_settings_and_captions(trained, run):
    results, _, rows, predictions = run
    text = " ".join(" ".join(Page((trained / "report.html").read_text()).text).split())
    for name in ("bleu_4", "cider_d", "rouge_2"):
        assert f"{results['test'][name]:.3f}" in text and f"{results['validation'][name]:.3f}" in text
    assert results["protocol"] in text
    for setting in ("label_smoothing_factor", "num_beams", "encoder", "cross_attention", "transformers"):
        assert setting in text
    for heading in ("The best", "The worst", "Unchosen", "Most frequent captions", "Lengths"):
        assert heading in text
    shown = [caption for caption in predictions.values() if caption in text]
    assert len(shown) >= 3
    assert sum(reference in text for captions in rows["captions"] for reference in captions) >= 18


def test_best_and_worst_are_those_by_cider(trained, prepared, run):
    from captioning.scores.metrics import coco_scores

    results, history, rows, _ = run
    # Captions by people for half of the images, and one word for the rest.
    references = dict(zip(rows["image_id"], rows["captions"], strict=True))
    good = {image_id: captions[0] for image_id, captions in list(references.items())[::2]}
    mixed = {image_id: good.get(image_id, "word") for image_id in references}
    page = html_report.report_page(results, history, rows, mixed)
    parts = re.split(r"<h3>(The best|The worst|Unchosen)</h3>", page)
    named = zip(parts[1::2], parts[2::2], strict=True)
    ids = {name: list(map(int, re.findall(r"image (\d+)</p>", part))) for name, part in named}
    assert set(ids["The best"]) <= set(good) and not set(ids["The worst"]) & set(good)
    assert [len(found) for found in ids.values()] == [6, 6, 6]
    scores = coco_scores(mixed, references, per_image=True)[1]
    assert [scores[i]["cider_d"] for i in ids["The best"]] == sorted(
        (values["cider_d"] for values in scores.values()), reverse=True
    )[:6]
    assert f"{scores[ids['The best'][0]]['cider_d']:.2f}" in parts[2]


def test_a_model_that_says_the_same_of_every_image_is_seen_at_once(run):
    results, history, rows, predictions = run
    same = html_report.report_page(results, history, rows, dict.fromkeys(predictions, "a dog."))
    assert 'class="warn"' in same and "was said of 120 out of 120 (100 %)" in same
    varied = {image_id: f"a dog {image_id}." for image_id in predictions}
    assert 'class="warn"' not in html_report.report_page(results, history, rows, varied)


def test_captions_of_any_kind_are_text_and_nothing_else(run):
    results, history, rows, predictions = run
    odd = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[31m\x00\x9b", "\u202eabc", "\ud800", ""]
    odd += ["猫が木の上で寝ている", "&amp;", "w" * 5000, "\N{FAMILY}\u200d\N{DOG FACE}"]
    captions = {image_id: odd[i % len(odd)] for i, image_id in enumerate(predictions)}
    rows = rows.select(range(30)).map(lambda row: {"captions": [*odd[:2], "a dog"]}, load_from_cache_file=False)
    captions = {image_id: captions[image_id] for image_id in rows["image_id"]}
    results = copy.deepcopy(results)
    results["model"]["encoder"] = "/home/somebody/<b>encoder</b>"
    results["recipe"]["model_path"] = "/home/somebody/<b>run</b>"
    results["data"]["source"] = "<i>source</i>"
    text = html_report.report_page(results, history, rows, captions)
    page = Page(text)
    text.encode()  # no lone surrogate
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert "somebody" not in text and not set("\x1b\x00\x9b\u202e") & set(text)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_few_images_make_a_report_too(run, images):
    results, _, rows, predictions = run
    rows = rows.select(range(images))
    captions = {image_id: predictions[image_id] for image_id in rows["image_id"]}
    assert Page(html_report.report_page(results, [], rows, captions)).all("img")


def test_local_folders_are_not_given_away():
    name = html_report.name_of
    assert name("/home/somebody/weights/vit/") == "vit" and name("../shared/vit") == "vit" and name("a/b/c") == "c"
    assert name("google/vit-base") == "google/vit-base" and name("tiny") == "tiny" and name("gpt2") == "gpt2"


# ---- the model card


def test_the_model_card_holds_the_results_as_the_hub_reads_them(trained, run):
    results = run[0]
    card = ModelCard.load(trained / "README.md")  # parses the metadata and the model-index with the hub's own classes
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-to-text"
    assert card.data.model_name == trained.name
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["BLEU-4"].metric_value == round(results["test"]["bleu_4"], 4)
    assert found["CIDEr-D"].metric_type == "cider" and found["BLEU-4"].metric_type == "bleu"
    assert len(found) == 10
    assert {(result.dataset_name, result.dataset_split) for result in found.values()} == {("drawn scenes", "test")}
    assert card.data.base_model is None  # both parts are presets
    assert "Protocol: one caption per image" in card.text


def test_a_model_card_names_what_the_model_was_made_of_if_the_hub_knows_it(run, tmp_path):
    results = copy.deepcopy(run[0])
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


# ---- while it trains


def test_each_evaluation_shows_the_same_images_captions(trained):
    # The progress bar is drawn in between.
    said = re.findall(r"(validation loss|    image (\d+): (.*))", (trained.parent / "stderr.txt").read_text())
    assert [bool(image) for _, image, _ in said] == [False, True, True, True] * 2
    assert [image for _, image, _ in said[1:4]] == [image for _, image, _ in said[5:]]
    assert all(caption.strip() for _, image, caption in said if image)


class Hub:
    """As much of the hub's HTTP interface as an upload of small files needs, on 127.0.0.1."""

    def __init__(self):
        hub = self
        self.requests, self.files, self.created = [], {}, []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def answer(self, content, status=200):
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def handle_any(self):
                data, path = self.body(), self.path.split("?")[0]
                hub.requests.append((self.command, path, self.headers.get("Authorization")))
                url = f"http://127.0.0.1:{self.server.server_port}"
                if path == "/api/whoami-v2":
                    return self.answer({"name": "somebody", "type": "user", "orgs": []})
                if path == "/api/repos/create":
                    hub.created.append(json.loads(data))
                    return self.answer({"url": f"{url}/somebody/run", "id": "somebody/run"})
                if path.endswith("/preupload/main"):
                    # Files that are no text go over LFS, as on the hub.
                    def mode(name):
                        return "lfs" if name.endswith((".safetensors", ".bin")) else "regular"

                    paths = [file["path"] for file in json.loads(data)["files"]]
                    modes = [{"path": name, "uploadMode": mode(name), "shouldIgnore": False} for name in paths]
                    return self.answer({"files": modes})
                if path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(data)["objects"]
                    actions = [
                        {**one, "actions": {"upload": {"href": f"{url}/upload/{one['oid']}", "header": {}}}}
                        for one in objects
                    ]
                    return self.answer({"transfer": "basic", "objects": actions})
                if path.startswith("/upload/"):
                    hub.files[path.rsplit("/", 1)[1]] = data
                    return self.answer({})
                if path.endswith("/commit/main"):
                    for line in map(json.loads, data.decode().splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                        if line["key"] == "lfsFile":
                            hub.files[line["value"]["path"]] = hub.files.pop(line["value"]["oid"])
                    return self.answer(
                        {"commitUrl": f"{url}/somebody/run/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
                    )
                if path == "/api/validate-yaml":
                    return self.answer({"errors": [], "warnings": []})
                return self.answer({"id": "somebody/run", "sha": "0" * 40, "siblings": []})

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_a_run_is_pushed_to_the_hub_and_shown_in_tensorboard(prepared, tmp_path):
    folder = tmp_path / "run"
    with Hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        flags = ["--max_steps=2", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=False"]
        flags += ["--push_to_hub", "--hub_model_id=somebody/run", "--hub_private_repo=true", "--report_to=tensorboard"]
        flags += ["--generation_num_beams=1", "--generation_max_length=8"]
        command = [sys.executable, ROOT / "train.py", f"--data_path={prepared}", f"--output_dir={folder}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "run" and hub.created[0]["visibility"] == "private"
    assert {token for _, _, token in hub.requests if token} == {"Bearer hf_test"}
    # What was written is what was pushed, and nothing of the checkpoints.
    names = "config.json generation_config.json model.safetensors tokenizer.json preprocessor_config.json"
    names += " README.md report.html results.json predictions_test.json training_curves.png gallery.png"
    for name in names.split():
        assert hub.files[name] == (folder / name).read_bytes(), name
    assert not any("checkpoint" in name for name in hub.files)
    assert not any(b"hf_test" in content for content in hub.files.values())
    assert ModelCard(hub.files["README.md"].decode()).data.eval_results

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.glob("runs/*"))), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"gallery", "training_curves"}
    assert "train/loss" in events.Tags()["scalars"]
    picture = events.Images("gallery")[0]
    assert (picture.width, picture.height) == Image.open(folder / "gallery.png").size and picture.step == 2
