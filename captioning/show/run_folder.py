"""What a run folder holds besides the model and its checkpoints: scores, captions, pictures, model card.

    write(folder, Run(predictions=..., validation=..., test=..., ...), test_split)

Each file is written whole or not at all.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from captioning import cli
from captioning.data.folder import in_parts
from captioning.files import json_text, plain, write_whole
from captioning.scores import bootstrap
from captioning.scores.confidence import reliability_of
from captioning.scores.names import SCORE_NAMES
from captioning.show import tables, wording
from captioning.show.curves import draw_curves
from captioning.show.html_report import report_page
from captioning.show.pages import draw_gallery

if TYPE_CHECKING:
    from captioning.data.folder import Split
    from captioning.scores.confidence import Calibration, Judged
    from captioning.scores.metrics import Evaluation

GALLERY = 20  # images, the first ones of the test split
NEEDED = ("torch", "transformers", "pillow")  # by the model card's code
TRIED_WITH = "4.57 and 5.23"  # where the model card's code gives the captions of inference.py
TWO_ENCODERS = """
Two encoders see side by side here, which transformers alone does not know: the code needs the folder `captioning` of
the trainer beside it, and runs nothing that comes with the model.
"""


@dataclass(frozen=True)
class Run:
    """A training that has ended, as plain values."""

    predictions: Mapping[int, str]  # image id -> caption, of the test split
    validation: Evaluation  # of the weights that are kept
    test: Evaluation
    log_history: Sequence[dict]  # `trainer.state.log_history`
    steps: int  # updates that were made
    kept: int | None  # the step of the checkpoint that is kept; None: the last one
    names: Mapping[str, Any]  # `encoder`, `decoder`, and for how long it was `freeze_encoder`
    recipe: Mapping[str, Any]  # the other flags of train.py that are not the Trainer's
    learning_rates: Mapping[str, float]  # by part of the model
    settings: Mapping[str, Any]  # the Trainer's, `Seq2SeqTrainingArguments.to_sanitized_dict()`
    decoding: Mapping[str, Any]  # how captions are generated, `GenerationConfig.to_diff_dict()`
    description: Mapping[str, Any]  # the data's dataset.json
    evaluations: Sequence[Mapping[str, Any]]  # epoch, step and scores of each evaluation on validation
    notes: Mapping[str, Any]  # command, date, seconds, machine, fingerprints and more, see `training.record`
    versions: Mapping[str, str]
    judged: Mapping[int, Judged] = field(default_factory=dict)  # how probable each of `predictions` is
    calibration: Calibration | None = None  # how sure captions are, by that


def write(folder: Path, run: Run, test_split: Split) -> dict[str, Any]:
    """Write every file but the model's into `folder`, which exists; returns what `results.json` holds."""
    captions = test_split.results(run.predictions)
    write_whole(folder / "predictions_test.json", json_text(captions, indent=1) + "\n")  # COCO's results format
    each = run.test.per_image()
    results = results_of(run) | sureness(run, each)
    references = test_split.references
    results["diversity"] = tables.diversity_of(run.predictions, references)
    write_whole(folder / "results.json", json_text(results, indent=2, allow_nan=False) + "\n")
    write_whole(
        folder / "report.html",
        report_page(results, run.log_history, test_split, run.predictions, run.judged, run.calibration, each),
    )
    draw_curves(run.log_history, folder / "training_curves.png", run.kept)
    items = [
        {
            "image": test_split.image(row),
            "title": test_split.names[row],
            "caption": run.predictions[test_split.image_id[row]],
            "reference": test_split.captions[row][0],
        }
        for row in range(min(GALLERY, len(test_split)))
    ]
    draw_gallery(items, folder / "gallery.png", wording.author(run.description["source"]))
    write_whole(folder / "README.md", model_card(results, folder.resolve().name))
    return results


def sureness(run: Run, each: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """What `results.json` holds of the confidence of the test captions."""
    if run.calibration is None:
        return {}
    confidences = {image_id: run.calibration.caption(caption) for image_id, caption in run.judged.items()}
    cider_d = {image_id: scores["cider_d"] for image_id, scores in each.items()}
    return {"confidence": reliability_of(confidences, cider_d)}


def results_of(run: Run) -> dict[str, Any]:
    """What `results.json` holds."""
    results = {
        "protocol": run.test.protocol,
        "interval": bootstrap.PROTOCOL,
        "checkpoint": f"best {run.settings['metric_for_best_model']} on validation" if run.kept else "last",
        "step": run.kept or run.steps,
        "validation": tables.scores_of(run.validation),
        "test": tables.scores_of(run.test),
        "model": dict(run.names),
        "recipe": dict(run.recipe),
        "learning_rates": dict(run.learning_rates),
        "decoding": dict(run.decoding),
        "training": dict(run.settings),
        "data": dict(run.description),
        "evaluations": list(run.evaluations),
        "run": dict(run.notes),
        "versions": dict(run.versions),
    }
    return plain(results)


def model_card(results: Mapping[str, Any], name: str) -> str:
    """The run folder's README.md: metadata that the Hugging Face Hub reads, scores, and how to use the model.

    Args:
        results: what `results.json` holds.
        name: of the model.
    """
    names, data, test, versions = results["model"], results["data"], results["test"], results["versions"]
    # Only what was fetched from the hub has a name there; a local folder's would be a wrong link.
    encoders = cli.encoders(names["encoder"])
    parts = [part for part in (*encoders, names["decoder"]) if is_hub_id(part)]
    licensed = [encoder if is_hub_id(encoder) else "the encoder" for encoder in encoders]
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-to-text",
        license="other",
        license_name="not-chosen",
        tags=["image-captioning", "vision-encoder-decoder"],
        base_model=parts or None,
        eval_results=[
            EvalResult(
                task_type="image-to-text",
                task_name="Image Captioning",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", data["source"].lower()).strip("-"),
                dataset_name=data["source"],
                dataset_split="test",
                dataset_args={"images": test["images"]},
                metric_type=key.split("_")[0] if key != "loss" else key,
                metric_name=SCORE_NAMES[key],
                metric_value=round(test[key], 4),
            )
            for key in SCORE_NAMES
            if test.get(key) is not None and math.isfinite(test[key])
        ],
    )
    tried = TRIED_WITH if len(encoders) == 1 else "5.23"
    title = wording.title(names["encoder"], names["decoder"])
    scores = "\n".join(
        f"| {SCORE_NAMES[key]} | {test[key]:.4f} | {tables.between(test['intervals'].get(key))} |"
        for key in SCORE_NAMES
        if test.get(key) is not None
    )
    card = f"""---
{metadata.to_yaml()}
---

# {title}

Trained on {data["images"]["train"]:,} images ({data["source"]}{in_parts(data)}). `report.html` shows its captions,
`results.json` holds its settings.

| test ({test["images"]:,} images) | | 95 % interval |
|---|---:|---:|
{scores}

Protocol: {results["protocol"]}. A reference is a caption written by {wording.author(data["source"])}. The interval is
a {results["interval"]}. Signature: `{test["signature"]}`

```python
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel
{"import captioning.model.two_encoders  # of the trainer" if len(encoders) > 1 else ""}
folder = "."  # this one; or the id of this model on the Hugging Face Hub
model = VisionEncoderDecoderModel.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")  # upright
image = Image.new("RGB", photo.size, "white")
image.paste(photo, mask=photo)  # what is transparent becomes white
tokens = model.generate(**image_processor(image, return_tensors="pt"))
print(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
```
{TWO_ENCODERS if len(encoders) > 1 else ""}
Tried with transformers {tried}. Version 5 has no `pipeline("image-to-text")` any more: use the code above. The
model was trained with these versions:

```
pip install {" ".join(f"{name}=={versions[name]}" if name in versions else name for name in NEEDED)}
```

**Without PyTorch.** The scripts of the trainer, with this folder beside them, export the model for onnxruntime, and
caption with that:

```
pip install onnxruntime onnx onnxscript
python inference.py --export onnx --model_path {shlex.quote(name)} --output exported
python inference.py --model_path exported photo.jpg
```

**In a browser.** `python inference.py --serve --in_browser --model_path exported` serves a page that captions there. In
a page of your own, transformers.js reads the folder. It searches greedily and resizes in its own way, so that its
captions differ:

```js
import {{ env, pipeline }} from "@huggingface/transformers";
env.allowLocalModels = true; // the folder lies at /models/exported
const captioner = await pipeline("image-to-text", "exported");
console.log(await captioner("photo.jpg"));
```

**Licence.** Whoever publishes this model chooses one, and writes it into `license` above. It has to fit those of
{", ".join(dict.fromkeys(licensed))},
{names["decoder"] if is_hub_id(names["decoder"]) else "the decoder"} and the data ({data["source"]}).
"""
    return ModelCard(card).content


def is_hub_id(name: str) -> bool:
    """Whether an encoder or decoder was named by its id on the Hugging Face Hub, not by a preset or a folder."""
    if Path(name).exists():
        return False
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|(distil)?gpt2(-(medium|large|xl))?", name))
