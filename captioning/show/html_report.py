"""`report.html`: everything that a person wants to know of a run, in one file that can be opened or mailed.

    html = report_page(results, log_history, split, predictions)

The values are computed here and laid out in `report.html.jinja`.
"""

from __future__ import annotations

import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from captioning.scores import metrics, monotony
from captioning.scores.names import BRIEF_KEYS, SCORE_NAMES
from captioning.scores.words import choose
from captioning.show import tables, wording
from captioning.show.curves import draw_panels
from captioning.show.templates import data_uri, render, thumbnail

if TYPE_CHECKING:
    from captioning.data.folder import Split
    from captioning.scores.confidence import Calibration, Judged

SHOWN = 6  # images in each of: the best, the worst, the unchosen
LONGEST = 20  # words; longer captions share a row
FREQUENT = 10  # captions, and words that the model never says
BAR_WIDTH = 5.5  # rem, of the longest bar

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


NOT_JUDGED: dict[str, Any] = {"confidence": "", "words": []}


class Bar(NamedTuple):
    """A share of captions."""

    text: str
    rem: str  # the width of its bar; "" for none


def report_page(
    results: Mapping[str, Any],
    log_history: Sequence[dict],
    split: Split,
    predictions: Mapping[int, str],
    judged: Mapping[int, Judged] | None = None,
    calibration: Calibration | None = None,
    each: Mapping[int, Mapping[str, float]] | None = None,
) -> str:
    """The page of a run.

    Args:
        results: what `results.json` holds.
        log_history: `trainer.state.log_history`.
        split: the test split of `processed_data`.
        predictions: the caption of each of its images, by id.
        judged: how probable each of them is.
        calibration: how sure each is by that; None: nothing is said of it.
        each: the scores of each image, by id; None: they are computed.

    Returns:
        An HTML document. Every caption and name in it is escaped, control characters are left out.
    """
    references = split.references
    if each is None:
        _, each = metrics.coco_scores(dict(predictions), references, per_image=True, rouge=False)
    return render(
        "report.html.jinja",
        title=wording.title(results["model"]["encoder"], results["model"]["decoder"]),
        images=results["data"]["images"],
        chosen=results["checkpoint"] != "last",
        source=results["data"]["source"],
        author=wording.author(results["data"]["source"]),
        protocol=results["protocol"],
        scores=_scores(results),
        curves=_curves(log_history, results["step"]),
        speech=_speech(predictions, references, results.get("diversity", {})),
        examples=_examples(split, predictions, references, each, judged, calibration),
        sure=_sure(results.get("confidence")),
        settings=_settings(results),
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


# ---- sections: the values of each


def _scores(results: Mapping[str, Any]) -> dict[str, Any]:
    validation, test = results["validation"], results["test"]
    return {
        "caption": f"Scores of step {results['step']:,}: {results['checkpoint']}",
        "head": ["score", f"validation ({validation['images']:,} images)", f"test ({test['images']:,} images)"],
        "rows": [
            (name, *(tables.with_interval(split, key) for split in (validation, test)))
            for key, name in SCORE_NAMES.items()
            if test.get(key) is not None
        ],
        "interval": results.get("interval", ""),
        "signature": test.get("signature", ""),
    }


def _curves(log_history: Sequence[dict], kept: int) -> dict[str, Any]:
    panels = []
    for title, png in draw_panels(log_history, kept):
        # Lines and letters need few colours: a third of the bytes.
        picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        panels.append((title, data_uri(picture, "PNG")))
    # Of two evaluations of a step the first counts, as in the picture.
    evaluations = {entry["step"]: entry for entry in reversed(log_history) if "eval_loss" in entry and "step" in entry}
    evaluations = dict(sorted(evaluations.items()))
    logged = {key for entry in evaluations.values() for key in entry}
    shown = [key for key in ("loss", *BRIEF_KEYS) if f"eval_{key}" in logged]
    alt = f"By epoch: {', '.join(title for title, _ in panels)}."
    if len(evaluations) > 1:
        first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
        alt += " From the first evaluation to the last, " + ", ".join(
            f"{SCORE_NAMES[key]} goes from {first[f'eval_{key}']:.3f} to {last[f'eval_{key}']:.3f}"
            for key in shown
            if f"eval_{key}" in first and f"eval_{key}" in last
        )
    return {
        "panels": panels,
        "alt": alt,
        "head": ["epoch", "step", *(SCORE_NAMES[key] for key in shown)],
        "rows": [
            (
                f"{entry.get('epoch', 0):g}" + (" (kept)" if step == kept else ""),
                f"{step:,}",
                *(f"{entry[f'eval_{key}']:.3f}" if f"eval_{key}" in entry else "" for key in shown),
            )
            for step, entry in evaluations.items()
        ],
    }


def _speech(
    predictions: Mapping[int, str], references: Mapping[int, Sequence[str]], diversity: Mapping[str, Any]
) -> dict[str, Any]:
    """Lengths, vocabulary, repetition: how the model speaks, against how the references do."""
    texts = {
        "said": list(predictions.values()),
        "firsts": [captions[0] for captions in references.values()],
        "all": [caption for captions in references.values() for caption in captions],
    }
    tokenize = choose(texts["all"]).tokenize  # as they were scored
    words = {name: [text.split() for text in tokenize(captions)] for name, captions in texts.items()}
    labels = ["captions", "words, mean", "words, shortest to longest", "different words", "captions that differ"]
    columns = [_overview(texts[name], words[name]) for name in texts]

    spoken = {word for caption in words["said"] for word in caption}
    written = Counter(word for caption in words["all"] for word in caption)
    covered = sum(times for word, times in written.items() if word in spoken) / (written.total() or 1)
    unsaid = Counter({word: times for word, times in written.items() if word not in spoken})

    count = Counter(" ".join(caption.split()) for caption in predictions.values())
    frequent, images = count.most_common(FREQUENT), len(predictions)
    share = frequent[0][1] / images
    return {
        "overview": [
            *zip(labels, *columns, strict=True),
            *((*row, "") for row in (tables.diversity_rows(**diversity) if diversity else ())),
        ],
        "covered": _percent(covered),
        "unsaid": [f"{word} ({times:,})" for word, times in unsaid.most_common(2 * FREQUENT)],
        "images": images,
        "different": len(count),
        "frequent": [(caption, f"{times:,}", _percent(times / images, 1)) for caption, times in frequent],
        "top_share": _percent(share),
        "warning": monotony.warning(list(predictions.values()), [references[i] for i in predictions]),
        "lengths": _lengths([len(caption) for caption in words["said"]], [len(caption) for caption in words["all"]]),
    }


def _overview(texts: Sequence[str], words: Sequence[Sequence[str]]) -> list[str]:
    lengths = [len(caption) for caption in words]
    different = {" ".join(text.split()).lower() for text in texts}
    return [
        f"{len(texts):,}",
        f"{statistics.fmean(lengths):.1f}",
        f"{min(lengths)} to {max(lengths)}",
        f"{len({word for caption in words for word in caption}):,}",
        _percent(len(different) / len(texts)),
    ]


def _lengths(said: Sequence[int], written: Sequence[int]) -> list[tuple[str, Bar, Bar]]:
    """(words, the model's share of captions with so many, the references') each."""
    ours, theirs = _shares(said), _shares(written)
    highest = max(*ours.values(), *theirs.values())
    return [
        (
            f"{length} or more" if length == LONGEST else str(length),
            _bar(ours.get(length, 0), highest),
            _bar(theirs.get(length, 0), highest),
        )
        for length in range(min(*ours, *theirs), max(*ours, *theirs) + 1)
    ]


def _shares(lengths: Sequence[int]) -> dict[int, float]:
    counts = Counter(min(length, LONGEST) for length in lengths)
    return {length: times / len(lengths) for length, times in counts.items()}


def _bar(share: float, highest: float) -> Bar:
    text = "0" if not share else "<1 %" if share < 0.01 else _percent(share)
    return Bar(text, f"{BAR_WIDTH * share / highest:.2f}" if share else "")


def _sure(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section on confidence: a sentence, and the points of the reliability plot."""
    if found is None:
        return None
    most = max(one["count"] for one in found["bins"])
    return {
        "good": f"{found['right_from_cider_d']:g}",
        "auroc": "" if found["auroc"] is None else f"{found['auroc']:.2f}",
        "error": f"{found['expected_calibration_error']:.3f}",
        "gain": f"{found['cider_d_gained_without_the_least_sure_fifth']:+.3f}",
        # Areas that grow with the number of captions.
        "points": [(one["confidence"], one["right"], 2 + 5 * math.sqrt(one["count"] / most)) for one in found["bins"]],
        "rows": [(_percent(one["confidence"]), _percent(one["right"]), f"{one['count']:,}") for one in found["bins"]],
    }


def _examples(
    split: Split,
    predictions: Mapping[int, str],
    references: Mapping[int, list[str]],
    each: Mapping[int, Mapping[str, float]],
    judged: Mapping[int, Judged] | None,
    calibration: Calibration | None,
) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(name, how they were chosen, cards) of each group."""
    ids = split.image_id
    # CIDEr-D is 0 for many bad captions: among those, the overlap decides.
    ranked = sorted(range(len(ids)), key=lambda row: (each[ids[row]]["cider_d"], each[ids[row]]["rouge_l"]))
    number = min(SHOWN, len(ids))
    even = [round((position + 0.5) * len(ids) / number - 0.5) for position in range(number)]

    def cards(rows: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "name": split.names[row],
                "picture": thumbnail(split.image(row)),
                "caption": predictions[ids[row]],
                **(_certainty(judged[ids[row]], calibration) if judged and calibration else NOT_JUDGED),
                "references": references[ids[row]],
                "scores": [(SCORE_NAMES[key], each[ids[row]][key]) for key in ("cider_d", "bleu_4", "rouge_l")],
            }
            for row in rows
        ]

    return [
        ("Unchosen", "Evenly spaced in the order of the split, whatever their scores.", cards(even)),
        ("The best", "By CIDEr-D.", cards(ranked[::-1][:number])),
        ("The worst", "By CIDEr-D.", cards(ranked[:number])),
    ]


def _certainty(caption: Judged, calibration: Calibration) -> dict[str, Any]:
    """What a card tells of how sure a caption is."""
    words = [(text, calibration.doubtful(value)) for text, value in caption.words]
    return {"confidence": f"{calibration.caption(caption):.2f}", "words": words}


def _settings(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(name, settings and their values) of each group that has any."""
    groups = {
        "Model": _without_folders(results["model"], "encoder", "decoder"),
        "Recipe": {
            key: value
            for key, value in _without_folders(results.get("recipe", {}), "model_path").items()
            if value is not None
        },
        "Learning rates": results.get("learning_rates", {}),
        "Training": {key: results["training"][key] for key in SETTINGS if _has_effect(key, results["training"])},
        "Captions are generated with": results["decoding"],
        "Data": {
            key: value
            for key, value in _without_folders(results["data"], "encoder", "decoder").items()
            if key != "versions"
        },
        "Versions": results["versions"],
        "This run": results.get("run", {}),
    }
    return [(name, [(key, _flat(value)) for key, value in group.items()]) for name, group in groups.items() if group]


def _has_effect(key: str, training: Mapping[str, Any]) -> bool:
    """Whether one of the Trainer's settings decided anything in a run."""
    if key == "num_train_epochs" and (training.get("max_steps") or 0) > 0:
        return False
    if key == "metric_for_best_model" and training.get("load_best_model_at_end") is False:
        return False
    return key in training and training[key] not in (None, False, -1)


def _without_folders(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """`settings` with names at `keys` in the place of paths."""
    return {
        key: wording.name_of(value) if key in keys and value is not None else value for key, value in settings.items()
    }


def _flat(value: Any) -> Any:
    """A setting as one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(str(_flat(part)) for part in value) or "none"
    return "none" if value is None else value
