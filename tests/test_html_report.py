"""report.html: one file that fetches and runs nothing, can be read by anybody, and is safe whatever a caption says."""

import base64
import copy
import itertools
import json
import re

import madeup
import pytest
from htmlpage import Page

from captioning.data.folder import Split
from captioning.scores.metrics import coco_scores
from captioning.show import html_report, run_folder, wording


@pytest.fixture(scope="module")
def test_split():
    return madeup.split(120)


@pytest.fixture(scope="module")
def folder(test_split, tmp_path_factory):
    """A run folder as `run_folder.write` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    run_folder.write(folder, madeup.run(test_split), test_split)
    return folder


@pytest.fixture
def made(folder, test_split):
    """(results, log_history, test split, predictions) of that folder."""
    run = madeup.run(test_split)
    return json.loads((folder / "results.json").read_text()), run.log_history, test_split, run.predictions


def test_the_report_is_one_file_that_fetches_and_runs_nothing(folder):
    text = (folder / "report.html").read_text()
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


def test_pictures_come_before_numbers_and_every_panel_of_curves_is_a_picture(folder):
    text = (folder / "report.html").read_text()
    headings = re.findall(r'<h2 id="s\d">(.+?)</h2>', text)
    assert headings == ["Captions", "Scores", "Curves", "What it says", "Settings"]
    assert text.index("<img ") < text.index("<table")
    charts = text[text.index('class="charts"') : text.index("</div>", text.index('class="charts"'))]
    assert re.findall(r'alt="(\w+)', charts) == ["Loss", "Validation", "CIDEr"]


def test_the_report_can_be_heard_and_read_on_a_phone(folder):
    page = Page((folder / "report.html").read_text())
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


def test_colours_have_the_contrast_that_accessibility_asks_for(folder):
    style = (folder / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in style.split("@media"))
    for colours in (light, dark):
        for ground in ("ground", "card"):
            for ink in ("ink", "quiet"):
                brighter, darker = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)  # WCAG 2.2, AA


def test_the_report_shows_scores_settings_and_captions(folder, made):
    results, _, split, predictions = made
    text = " ".join(" ".join(Page((folder / "report.html").read_text()).text).split())
    for name in ("bleu_4", "cider_d", "rouge_2"):
        assert f"{results['test'][name]:.3f}" in text and f"{results['validation'][name]:.3f}" in text
    assert results["protocol"] in text
    for setting in ("label_smoothing_factor", "num_beams", "encoder", "cross_attention", "transformers"):
        assert setting in text
    for heading in ("The best", "The worst", "Unchosen", "Most frequent captions", "Lengths"):
        assert heading in text
    shown = [caption for caption in predictions.values() if caption in text]
    assert len(shown) >= 3
    assert sum(reference in text for captions in split.captions for reference in captions) >= 18


def test_best_and_worst_are_those_by_cider(made):
    results, history, split, _ = made
    # Captions by people for half of the images, and one word for the rest.
    references = split.references
    good = {image_id: captions[0] for image_id, captions in list(references.items())[::2]}
    mixed = {image_id: good.get(image_id, "word") for image_id in references}
    page = html_report.report_page(results, history, split, mixed)
    parts = re.split(r"<h3>(The best|The worst|Unchosen)</h3>", page)
    named = zip(parts[1::2], parts[2::2], strict=True)
    of_name = dict(zip(split.file_name, split.image_id, strict=True))
    ids = {name: [of_name[each] for each in re.findall(r"<bdi>([^<]*)</bdi></p>", part)[:6]] for name, part in named}
    assert set(ids["The best"]) <= set(good) and not set(ids["The worst"]) & set(good)
    assert [len(found) for found in ids.values()] == [6, 6, 6]
    scores = coco_scores(mixed, references, per_image=True)[1]
    assert [scores[i]["cider_d"] for i in ids["The best"]] == sorted(
        (values["cider_d"] for values in scores.values()), reverse=True
    )[:6]
    assert f"{scores[ids['The best'][0]]['cider_d']:.2f}" in parts[2]


def test_a_model_that_says_the_same_of_every_image_is_seen_at_once(made):
    results, history, split, predictions = made
    same = html_report.report_page(results, history, split, dict.fromkeys(predictions, "a dog."))
    assert 'class="warn"' in same and "120 of 120 images (100%) have the caption &#39;a dog.&#39;" in same
    varied = {image_id: f"a dog {image_id}." for image_id in predictions}
    assert 'class="warn"' not in html_report.report_page(results, history, split, varied)


def test_captions_of_any_kind_are_text_and_nothing_else(made):
    results, history, split, predictions = made
    odd = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "\x1b[31m\x00\x9b", "\u202eabc", "\ud800", ""]
    odd += ["猫が木の上で寝ている", "&amp;", "w" * 5000, "\N{FAMILY}\u200d\N{DOG FACE}"]
    captions = {image_id: odd[i % len(odd)] for i, image_id in enumerate(predictions)}
    few = split.rows.select(range(30)).map(lambda row: {"captions": [*odd[:2], "a dog"]}, load_from_cache_file=False)
    split = Split(few)
    captions = {image_id: captions[image_id] for image_id in split.image_id}
    results = copy.deepcopy(results)
    results["model"]["encoder"] = "/home/somebody/<b>encoder</b>"
    results["recipe"]["model_path"] = "/home/somebody/<b>run</b>"
    results["data"]["source"] = "<i>source</i>"
    text = html_report.report_page(results, history, split, captions)
    page = Page(text)
    text.encode()  # no lone surrogate
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert "somebody" not in text and not set("\x1b\x00\x9b\u202e") & set(text)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_few_images_make_a_report_too(made, images):
    results, _, split, predictions = made
    split = split.select(range(images))
    captions = {image_id: predictions[image_id] for image_id in split.image_id}
    assert Page(html_report.report_page(results, [], split, captions)).all("img")


def test_local_folders_are_not_given_away():
    name = wording.name_of
    assert name("/home/somebody/weights/vit/") == "vit" and name("../shared/vit") == "vit" and name("a/b/c") == "c"
    assert name("google/vit-base") == "google/vit-base" and name("tiny") == "tiny" and name("gpt2") == "gpt2"


def test_captions_of_a_program_are_not_said_to_be_of_a_person(made):
    results, history, split, predictions = made
    split = split.select(range(4))
    predictions = {image_id: predictions[image_id] for image_id in split.image_id}
    for source, author in (("drawn scenes", "a program"), ("COCO 2014", "a person")):
        results["data"]["source"] = source
        page = html_report.report_page(results, history, split, predictions)
        assert f"A reference is a caption written by {author}." in page
        assert ("a person" in page) == (author == "a person")


def test_the_share_of_right_facts_is_shown_where_there_is_one(made):
    results, history, split, predictions = made
    assert "facts right" not in html_report.report_page(results, history, split, predictions)
    results["validation"]["facts_right"], results["test"]["facts_right"] = 0.987, 0.965
    history = [entry | {"eval_facts_right": 0.987} if "eval_loss" in entry else entry for entry in history]
    text = " ".join(Page(html_report.report_page(results, history, split, predictions)).text)
    assert text.count("facts right") == 2 and "0.965" in text and "0.987" in text
