"""What a run folder holds besides the model and its checkpoints: scores, captions, pictures, model card.

    run_folder.write(folder, trainer, test_rows, validation, test, names, recipe, description, kept)

Each file is written whole or not at all.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from captioning.files import write_whole
from captioning.scores.metrics import PROTOCOL
from captioning.show import html_report, report


def write(
    folder: Path,
    trainer,
    test_rows,
    validation: Mapping[str, float],
    test: Mapping[str, float],
    names: Mapping[str, Any],
    recipe: Mapping[str, Any],
    description: Mapping[str, Any],
    kept: int | None,
) -> None:
    """Write every file but the model's.

    Args:
        folder: the run folder; it exists.
        trainer: a `CaptionTrainer` that has just captioned the test split.
        test_rows: the test split of `processed_data`.
        validation, test: scores by name, of the weights that are kept.
        names: of the `encoder` and the `decoder`, and whether it was `freeze_encoder`.
        recipe: train.py's other flags.
        description: the data's `dataset.json`.
        kept: the step of the checkpoint that is kept; None: the last one.
    """
    training, predictions = trainer.args, trainer.predictions
    # COCO's results format, in the order of the split
    results = [{"image_id": i, "caption": predictions[i]} for i in test_rows["image_id"]]
    write_whole(folder / "predictions_test.json", json.dumps(results, indent=1) + "\n")
    content = {
        "protocol": PROTOCOL,
        "checkpoint": f"best {training.metric_for_best_model} on validation" if kept else "last",
        "step": kept or trainer.state.global_step,
        "validation": {"images": description["images"]["validation"], **validation},
        "test": {"images": description["images"]["test"], **test},
        "model": dict(names),
        "recipe": dict(recipe),
        "learning_rates": trainer.learning_rates,
        "decoding": trainer.bundle.model.generation_config.to_diff_dict(),
        "training": training.to_sanitized_dict(),
        "data": description,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "pillow")},
        },
    }
    write_whole(folder / "results.json", json.dumps(content, indent=2, default=str) + "\n")
    page = html_report.report_page(content, trainer.state.log_history, test_rows, predictions)
    write_whole(folder / "report.html", page)
    report.draw_curves(trainer.state.log_history, folder / "training_curves.png", kept)
    report.draw_gallery(
        [
            {"image": row["image"], "caption": predictions[row["image_id"]], "reference": row["captions"][0]}
            for row in test_rows.select(range(min(20, len(test_rows))))
        ],
        folder / "gallery.png",
    )
    write_whole(folder / "README.md", model_card(content, folder.resolve().name))
    log_pictures(folder, trainer)


def model_card(results: Mapping[str, Any], name: str) -> str:
    """The run folder's README.md: metadata that the Hugging Face Hub reads, scores, and how to use the model.

    Args:
        results: what `results.json` holds.
        name: of the model.
    """
    names, data, test = results["model"], results["data"], results["test"]
    # Only what was fetched from the hub has a name there; a local folder's would be a wrong link.
    parts = [part for part in (names["encoder"], names["decoder"]) if is_hub_id(part)]
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-to-text",
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
                metric_name=report.SCORE_NAMES[key],
                metric_value=round(test[key], 4),
            )
            for key in report.SCORE_NAMES
            if key in test and math.isfinite(test[key])
        ],
    )
    title = f"Image captioner: {html_report.name_of(names['encoder'])} → {html_report.name_of(names['decoder'])}"
    scores = "\n".join(f"| {report.SCORE_NAMES[key]} | {test[key]:.4f} |" for key in report.SCORE_NAMES if key in test)
    card = f"""---
{metadata.to_yaml()}
---

# {title}

Trained on {data["images"]["train"]:,} images ({data["source"]}). `report.html` shows its captions, `results.json` holds
its settings.

| test ({test["images"]:,} images) | |
|---|---:|
{scores}

Protocol: {results["protocol"]}.

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

folder = "."  # this one; or the id of this model on the Hugging Face Hub
model = VisionEncoderDecoderModel.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

image = Image.open("photo.jpg").convert("RGB")
tokens = model.generate(**image_processor(image, return_tensors="pt"))
print(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
```
"""
    return ModelCard(card).content


def is_hub_id(name: str) -> bool:
    """Whether an encoder or decoder was named by its id on the Hugging Face Hub, not by a preset or a folder."""
    return (bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()) or name == "gpt2"


def log_pictures(folder: Path, trainer) -> None:
    """Show the run folder's pictures in TensorBoard, if it is reported to."""
    if "tensorboard" not in trainer.args.report_to:
        return
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # The Trainer's own log, whose writer was closed when training ended.
    callbacks = trainer.callback_handler.callbacks
    where = next(callback.logging_dir for callback in callbacks if isinstance(callback, TensorBoardCallback))
    with SummaryWriter(log_dir=where) as writer:
        for name in ("training_curves", "gallery"):
            with Image.open(folder / f"{name}.png") as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(name, pixels, trainer.state.global_step, dataformats="HWC")
