"""A run folder without a training: made-up captions and scores of small pictures, as `run_folder.write` takes them."""

from __future__ import annotations

from pictures import encoded
from PIL import Image

from captioning.data.folder import Split
from captioning.scores.metrics import evaluate
from captioning.show.run_folder import Run

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
THINGS = ("ball", "box", "kite", "car")


def split(count: int) -> Split:
    """`count` plain pictures of 48 x 36 pixels with three captions each."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    rows: dict[str, list] = {"image_id": [], "file_name": [], "image": [], "captions": [], "labels": []}
    for index in range(count):
        colour, thing = COLOURS[index % len(COLOURS)], THINGS[index // len(COLOURS) % len(THINGS)]
        place = f"place {index}"
        rows["image_id"].append(1000 + index)
        rows["file_name"].append(f"{index}.png")
        rows["image"].append({"bytes": encoded(Image.new("RGB", (48, 36), colour)), "path": None})
        rows["captions"].append([f"A {colour} {thing} in {place}.", f"There is a {thing} in {place}.", f"A {thing}."])
        rows["labels"].append([[1, 0]] * 3)
    features = {"image_id": Value("int64"), "file_name": Value("string"), "image": Picture()}
    features |= {"captions": List(Value("string")), "labels": List(List(Value("int32")))}
    return Split(Dataset.from_dict(rows, features=Features(features)))


def run(test_split: Split, **changed) -> Run:
    """A run of two epochs; every third caption is a bad one."""
    predictions = {
        image_id: "the picture." if index % 3 else captions[index % 2].lower()
        for index, (image_id, captions) in enumerate(zip(test_split.image_id, test_split.captions, strict=True))
    }
    references = test_split.references
    said = predictions | changed.get("predictions", {})
    nats, tokens = ({i: value + i % 7 for i in references} for value in (20.0, 9.0))
    evaluation = evaluate(said, references).with_ratio("loss", nats, tokens)
    history: list[dict] = []
    for step in range(1, 21):
        history.append({"loss": 2 + 2 / step, "epoch": step / 10, "step": step})
        if step % 10 == 0:
            history.append(
                {f"eval_{key}": value * step / 20 for key, value in evaluation.scores.items()} | {"epoch": step / 10}
            )
            history[-1]["step"] = step
    values = {
        "predictions": predictions,
        "validation": evaluation,
        "test": evaluation,
        "log_history": history,
        "steps": 20,
        "kept": 20,
        "names": {"encoder": "tiny", "decoder": "tiny", "freeze_encoder": 0},
        "recipe": {"model_path": None, "packing": True, "augment": 0},
        "learning_rates": {"encoder": 1e-3, "decoder": 1e-3, "cross_attention": 1e-3},
        "settings": {
            "metric_for_best_model": "cider_d",
            "label_smoothing_factor": 0.1,
            "seed": 0,
            "num_train_epochs": 2,
        },
        "decoding": {"num_beams": 3, "max_new_tokens": 32},
        "evaluations": [{"epoch": 1.0, "step": 10, "train_loss": 2.2, **evaluation.scores}],
        "notes": {"command": "train.py --epochs 2", "machine": {"processor": "a processor", "gpus": []}, "git": None},
        "versions": {"python": "3", "transformers": "5"},
        "description": {
            "source": "drawn scenes",
            "encoder": "tiny",
            "decoder": "tiny",
            "images": {"train": 900, "validation": 80, "test": len(test_split)},
            "versions": {"pillow": "1.0"},
        },
    }
    return Run(**(values | changed))
