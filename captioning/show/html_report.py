"""`report.html`: everything that a person wants to know of a run, in one file that can be opened or mailed.

    html = report_page(results, log_history, test_rows, predictions)

Nothing is fetched and nothing runs: pictures are embedded, there is no script, and the page's own policy forbids both.
"""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from captioning.scores import metrics, ptb
from captioning.show import report

SHOWN = 6  # images in each of: the best, the worst, the unchosen
LONGEST = 20  # words; longer captions share a row
FREQUENT = 10  # captions, and words that the model never says
PICTURE_SIDE = 360  # pixels; about 20 kB each
OFTEN = 0.25  # share of the images with one and the same caption from which the page warns

# Of the Trainer's settings, those that a run is judged by; results.json holds them all.
SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "train_sampling_strategy",
    "metric_for_best_model",
    "seed",
)

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f5f6f7; --ink: #16181b; --quiet: #565c63;
  --line: #d9dce0; --model: #2f83bf; --people: #b9bec5; --warn: #8a3f02; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --card: #1f2228; --ink: #e8eaed; --quiet: #a8b0b9; --line: #3a3f47;
    --model: #56a8de; --people: #6a7078; --warn: #f0a460; }
  img.chart { filter: invert(.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
a { color: inherit; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
p, figcaption { max-width: 46rem; }
.quiet, caption, figcaption { color: var(--quiet); }
.warn { border-left: .3rem solid var(--warn); padding-left: .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; overflow-wrap: normal; }
th[scope=row] { min-width: 5rem; }
.number { text-align: right; }
td.number, .share { white-space: nowrap; }
.bar { display: inline-block; height: .7rem; margin-right: .4rem; border-radius: 2px; background: var(--model); }
.bar.people { background: var(--people); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
img.chart { min-width: 44rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr));
  gap: 1rem; padding: 0; }
.cards > li { list-style: none; background: var(--card); border-radius: .5rem; overflow: hidden; }
.cards img { width: 100%; height: 13rem; object-fit: contain; background: rgb(128 128 128 / 15%); }
.cards .text { padding: .75rem; }
.cards .said { font-weight: 600; margin: 0 0 .35rem; }
.cards ul { margin: .35rem 0 0; padding-left: 1.1rem; color: var(--quiet); }
.cards .scores { margin: 0; color: var(--quiet); font-size: .9rem; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; padding: .4rem 0; }
"""


def report_page(
    results: Mapping[str, Any], log_history: Sequence[dict], test_rows, predictions: Mapping[int, str]
) -> str:
    """The page of a run.

    Args:
        results: what `results.json` holds.
        log_history: `trainer.state.log_history`.
        test_rows: the test split of `processed_data`: `image_id`, `image`, `captions`.
        predictions: the caption of each of its images, by id.

    Returns:
        An HTML document. Every caption and name in it is escaped, control characters are left out.
    """
    references = dict(zip(test_rows["image_id"], test_rows["captions"], strict=True))
    _, each = metrics.coco_scores(dict(predictions), references, per_image=True, rouge=False)
    title = f"Image captioner: {name_of(results['model']['encoder'])} → {name_of(results['model']['decoder'])}"
    sections = {
        "Scores": _scores(results),
        "Curves": _curves(log_history, results),
        "What it says": _speech(predictions, references),
        "Best, worst and unchosen": _examples(test_rows, predictions, each),
        "Settings": _settings(results),
    }
    links = "".join(f'<li><a href="#s{i}">{_text(name)}</a></li>' for i, name in enumerate(sections))
    body = "".join(
        f'<section aria-labelledby="s{i}"><h2 id="s{i}">{_text(name)}</h2>{content}</section>'
        for i, (name, content) in enumerate(sections.items())
    )
    images = results["data"]["images"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>Trained on {images["train"]:,} images ({_text(results["data"]["source"])}), the checkpoint chosen on
{images["validation"]:,} others, scored once on {images["test"]:,} more.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>{body}</main>
</body>
</html>
"""


def name_of(part: str) -> str:
    """The name of an encoder or decoder without the folders it lies in, which are nobody's business; hub ids stay."""
    part = str(part)
    return part.rstrip("/").rsplit("/", 1)[-1] if part.startswith(("/", ".", "~")) or part.count("/") > 1 else part


def _text(value: Any) -> str:
    """`value` as HTML text: escaped, and without the characters that control a terminal or turn the writing round."""
    kept = "".join(char if char.isprintable() or char in "\u200c\u200d" else " " for char in str(value))
    return html.escape(kept)


def _said(caption: str) -> str:
    """A caption as HTML, in whatever direction it is written."""
    return f'<bdi dir="auto">{_text(caption).strip() or "(empty)"}</bdi>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table that scrolls by itself where it is wider than the screen; the first cell of a row is its header.

    `head` is text, the cells are HTML; `numbers` are the columns that are aligned right.
    """
    numbers = set(numbers)

    def cell(tag: str, column: int, content: str, scope: str = "") -> str:
        attributes = (f' scope="{scope}"' if scope else "") + (' class="number"' if column in numbers else "")
        return f"<{tag}{attributes}>{content}</{tag}>"

    def line(row: Sequence[str]) -> str:
        first, *others = row
        return cell("th", 0, first, "row") + "".join(cell("td", i, content) for i, content in enumerate(others, 1))

    top = "".join(cell("th", i, _text(name), "col") if name else "<td></td>" for i, name in enumerate(head))
    lines = "".join(f"<tr>{line(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(caption)}"><table><caption>{_text(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _picture(image: Image.Image) -> str:
    """A data URI of the image, PICTURE_SIDE pixels at most."""
    image = image.convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=75, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


# ---- sections


def _scores(results: Mapping[str, Any]) -> str:
    validation, test = results["validation"], results["test"]
    rows = [
        (_text(name), f"{validation[key]:.3f}" if key in validation else "", f"{test[key]:.3f}")
        for key, name in report.SCORE_NAMES.items()
        if key in test
    ]
    kept = f"Scores of step {results['step']:,}: {results['checkpoint']}"
    head = ["score", f"validation ({validation['images']:,} images)", f"test ({test['images']:,} images)"]
    loss = "The loss is the mean cross-entropy of the references in nats per token; the lower the better."
    return (
        _table(kept, head, rows, numbers=(1, 2)) + f"<p>Protocol: {_text(results['protocol'])}.</p>"
        f'<p class="quiet">{loss} CIDEr-D goes from 0 to 10 and is about 1 for a good model; the other scores go from '
        "0 to 1.</p>"
    )


def _curves(log_history: Sequence[dict], results: Mapping[str, Any]) -> str:
    data = io.BytesIO()
    report.draw_curves(log_history, data, results["step"])
    # Lines and letters need few colours: a third of the bytes.
    small = Image.open(data).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    small.save(packed, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
    evaluations = {entry["step"]: entry for entry in reversed(log_history) if "eval_loss" in entry and "step" in entry}
    evaluations = dict(sorted(evaluations.items()))
    shown = ("loss", "bleu_1", "bleu_4", "rouge_l", "cider_d")
    alt = "Train loss, validation loss and validation scores by epoch."
    if len(evaluations) > 1:
        first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
        alt += " From the first evaluation to the last, " + ", ".join(
            f"{report.SCORE_NAMES[key]} goes from {first['eval_' + key]:.3f} to {last['eval_' + key]:.3f}"
            for key in shown
            if f"eval_{key}" in first and f"eval_{key}" in last
        )
    rows = [
        (
            f"{entry.get('epoch', 0):g}" + (" (kept)" if step == results["step"] else ""),
            f"{step:,}",
            *(f"{entry[f'eval_{key}']:.3f}" if f"eval_{key}" in entry else "" for key in shown),
        )
        for step, entry in evaluations.items()
    ]
    head = ["epoch", "step", *(report.SCORE_NAMES[key] for key in shown)]
    table = _table("Every evaluation on validation", head, rows, numbers=range(1, len(head)))
    return (
        '<figure class="scroll" role="region" tabindex="0" aria-label="Curves">'
        f'<img class="chart" width="1500" height="720" src="{uri}" alt="{_text(alt)}"></figure>'
        f"<details><summary>The same in numbers</summary>{table}</details>"
    )


def _speech(predictions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> str:
    """Lengths, vocabulary, repetition: how the model speaks, against how people do."""
    said = list(map(str.split, ptb.tokenize(predictions.values())))
    firsts = list(map(str.split, ptb.tokenize([captions[0] for captions in references.values()])))
    people = list(map(str.split, ptb.tokenize([caption for captions in references.values() for caption in captions])))
    spoken = {word for words in said for word in words}

    def column(captions: list[list[str]], texts: Iterable[str]) -> list[str]:
        lengths = sorted(map(len, captions))
        texts = [" ".join(text.split()).lower() for text in texts]
        vocabulary = {word for words in captions for word in words}
        return [
            f"{len(captions):,}",
            f"{statistics.fmean(lengths):.1f}",
            f"{lengths[0]} to {lengths[-1]}",
            f"{len(vocabulary):,}",
            f"{100 * len(set(texts)) / len(texts):.0f} %",
        ]

    labels = ["captions", "words, mean", "words, shortest to longest", "different words", "captions that differ"]
    columns = [
        column(said, predictions.values()),
        column(firsts, (captions[0] for captions in references.values())),
        column(people, (caption for captions in references.values() for caption in captions)),
    ]
    head = ["", "the model", "one reference per image", "all references"]
    overview = _table("The model beside people", head, zip(labels, *columns, strict=True), numbers=(1, 2, 3))

    count = Counter(" ".join(caption.split()) for caption in predictions.values())
    frequent = count.most_common(FREQUENT)
    top, times = frequent[0]
    share = times / len(predictions)
    sentence = (
        f"<p>{len(count):,} different captions for {len(predictions):,} images. The most frequent one went to "
        f"{times:,} of them ({100 * share:.0f} %).</p>"
    )
    if share >= OFTEN and len(predictions) > 1:
        sentence = (
            f'<p class="warn" role="note"><strong>The model says the same of many images:</strong> {_said(top)} was '
            f"said of {times:,} out of {len(predictions):,} ({100 * share:.0f} %). It has hardly learnt to look yet; "
            "train longer, on more images, or from pretrained weights.</p>"
        )
    captions = _table(
        "The most frequent captions",
        ["caption", "images", "share"],
        ((_said(caption), f"{times:,}", f"{100 * times / len(predictions):.1f} %") for caption, times in frequent),
        numbers=(1, 2),
    )
    unsaid = Counter(word for words in people for word in words if word not in spoken).most_common(2 * FREQUENT)
    missing = ", ".join(f"{_text(word)} ({times:,})" for word, times in unsaid)
    known = sum(len(words) for words in people)
    covered = sum(word in spoken for words in people for word in words) / known if known else 0
    vocabulary = (
        f"<p>The words that the model uses make up {100 * covered:.0f} % of all words in the references. The most "
        f"frequent ones that it never says: {missing or 'none'}.</p>"
    )
    return (
        overview
        + vocabulary
        + "<h3>Most frequent captions</h3>"
        + sentence
        + captions
        + "<h3>Lengths</h3>"
        + _lengths([len(words) for words in said], [len(words) for words in people])
    )


def _lengths(said: Sequence[int], people: Sequence[int]) -> str:
    ours, theirs = (Counter(min(length, LONGEST) for length in lengths) for lengths in (said, people))
    highest = max(
        [count[length] / total for count, total in ((ours, len(said)), (theirs, len(people))) for length in count]
    )

    def bar(part: float, who: str) -> str:
        if not part:
            return "0"
        width = 5.5 * part / highest  # rem
        share = f"{100 * part:.0f} %" if part >= 0.01 else "&lt;1 %"
        return f'<span class="share"><span class="bar {who}" style="width:{width:.2f}rem"></span>{share}</span>'

    rows = [
        (
            f"{length} or more" if length == LONGEST else str(length),
            bar(ours[length] / len(said), "model"),
            bar(theirs[length] / len(people), "people"),
        )
        for length in range(min(*ours, *theirs), max(*ours, *theirs) + 1)
    ]
    head = ["words", "the model", "references"]
    return _table("Share of captions with so many words", head, rows)


def _examples(test_rows, predictions: Mapping[int, str], each: Mapping[int, Mapping[str, float]]) -> str:
    ids = list(test_rows["image_id"])
    # CIDEr-D is 0 for many bad captions: among those, the overlap decides.
    ranked = sorted(range(len(ids)), key=lambda row: (each[ids[row]]["cider_d"], each[ids[row]]["rouge_l"]))
    number = min(SHOWN, len(ids))
    even = [round((position + 0.5) * len(ids) / number - 0.5) for position in range(number)]
    groups = (
        ("The best", "By CIDEr-D.", ranked[::-1][:number]),
        ("The worst", "By CIDEr-D.", ranked[:number]),
        ("Unchosen", "Evenly spaced in the order of the split, whatever their scores.", even),
    )
    parts = []
    for name, how, rows in groups:
        cards = "".join(_card(test_rows[row], predictions[ids[row]], each[ids[row]]) for row in rows)
        parts.append(f'<h3>{name}</h3><p class="quiet">{how}</p><ul class="cards">{cards}</ul>')
    return "".join(parts)


def _card(row: Mapping[str, Any], caption: str, scores: Mapping[str, float]) -> str:
    people = "".join(f"<li>{_said(reference)}</li>" for reference in row["captions"])
    shown = ", ".join(f"{report.SCORE_NAMES[key]}&nbsp;{scores[key]:.2f}" for key in ("cider_d", "bleu_4", "rouge_l"))
    return (
        f'<li><img loading="lazy" src="{_picture(row["image"])}" alt="{_text(row["captions"][0]).strip()}">'
        f'<div class="text"><p class="said">{_said(caption)}</p><p class="scores">{shown}, image {row["image_id"]}</p>'
        f'<ul aria-label="References">{people}</ul></div></li>'
    )


def _settings(results: Mapping[str, Any]) -> str:
    def flat(content: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [
            (
                _text(key),
                _text(", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value),
            )
            for key, value in content.items()
        ]

    training = {key: results["training"][key] for key in SETTINGS if key in results["training"]}
    model = {**results["model"], "encoder": name_of(results["model"]["encoder"])}
    model["decoder"] = name_of(model["decoder"])
    data = {key: name_of(value) if key in ("encoder", "decoder") else value for key, value in results["data"].items()}
    groups = {
        "Model": model,
        "Recipe": {
            key: name_of(value) if key == "model_path" else value
            for key, value in results.get("recipe", {}).items()
            if value is not None
        },
        "Learning rates": results.get("learning_rates", {}),
        "Training": training,
        "Captions are generated with": results["decoding"],
        "Data": {key: value for key, value in data.items() if key != "versions"},
        "Versions": results["versions"],
    }
    return (
        "".join(
            f"<details><summary>{name}</summary>{_table(name, ['setting', 'value'], flat(content))}</details>"
            for name, content in groups.items()
            if content
        )
        + '<p class="quiet">Every setting stands in results.json beside this page.</p>'
    )
