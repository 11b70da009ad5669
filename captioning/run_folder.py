"""What a run folder holds besides the model and its checkpoints: scores, captions, pictures, model card.

    run_folder.write(folder, trainer, test_rows, validation, test, names, description, kept)

Each file is written whole or not at all.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captioning import report
from captioning.files import write_whole
from captioning.metrics import PROTOCOL


def write(
    folder: Path,
    trainer,
    test_rows,
    validation: Mapping[str, float],
    test: Mapping[str, float],
    names: Mapping[str, Any],
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
        "decoding": trainer.bundle.model.generation_config.to_diff_dict(),
        "training": training.to_sanitized_dict(),
        "data": description,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "datasets", "accelerate", "pillow")},
        },
    }
    write_whole(folder / "results.json", json.dumps(content, indent=2, default=str) + "\n")
    report.draw_curves(trainer.state.log_history, folder / "training_curves.png", kept)
    report.draw_gallery(
        [
            {"image": row["image"], "caption": predictions[row["image_id"]], "reference": row["captions"][0]}
            for row in test_rows.select(range(min(20, len(test_rows))))
        ],
        folder / "gallery.png",
    )
    write_whole(folder / "README.md", model_card(names, test, description))


def model_card(names: Mapping[str, Any], test: Mapping[str, float], description: Mapping[str, Any]) -> str:
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in test.items())
    return f"""---
library_name: transformers
pipeline_tag: image-to-text
tags: [image-captioning, vision-encoder-decoder]
---

# Image captioner: {names["encoder"]} -> {names["decoder"]}

Trained on {description["images"]["train"]:,} images ({description["source"]}).

| test ({description["images"]["test"]:,} images) | |
|---|---|
{scores}

Protocol: {PROTOCOL}.

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

model = VisionEncoderDecoderModel.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
image_processor = AutoImageProcessor.from_pretrained(".", backend="pil")

image = Image.open("photo.jpg").convert("RGB")
tokens = model.generate(**image_processor(image, return_tensors="pt"))
print(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
```
"""
