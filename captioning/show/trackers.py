"""What the Trainer's trackers are given at the end of a run: the scores of the kept weights, the pictures, the report.

    log_run(trainer.callback_handler.callbacks, folder, results, steps)

While it trains, the Trainer itself writes losses and validation scores to TensorBoard, Weights & Biases or MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from captioning.scores.names import SCORE_NAMES
from captioning.show import tables

PICTURES = ("training_curves", "gallery")
REPORT = "report.html"


def log_run(callbacks: Iterable[Any], folder: Path, results: Mapping[str, Any], step: int) -> None:
    """Give a finished run to each tracker that the Trainer used.

    Args:
        callbacks: of the Trainer.
        folder: the run folder, complete.
        results: what its `results.json` holds.
        step: the last update.
    """
    for callback in callbacks:
        log = LOGS.get(type(callback).__name__)
        if log is not None:
            log(callback, folder, results, step)


def scores_of(results: Mapping[str, Any]) -> dict[str, float]:
    """{"test/cider_d": 0.725, "test/cider_d_low": ..., ...} of the kept weights, on both splits."""
    found = {}
    for split in ("validation", "test"):
        for key in SCORE_NAMES:
            if results[split].get(key) is not None:
                found[f"{split}/{key}"] = results[split][key]
                if interval := results[split].get("intervals", {}).get(key):
                    found[f"{split}/{key}_low"], found[f"{split}/{key}_high"] = interval
    return found


def _tensorboard(callback: Any, folder: Path, results: Mapping[str, Any], step: int) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=callback.logging_dir) as writer:  # the Trainer has closed its own
        for name in PICTURES:
            with Image.open(folder / f"{name}.png") as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(name, pixels, step, dataformats="HWC")
        for name, value in scores_of(results).items():
            writer.add_scalar(name, value, step)
        # It shows no pages: the scores as text, and where the page lies.
        table = tables.scores({name: results[name] for name in ("validation", "test")})
        text = "\n".join(f"    {line}" for line in table.splitlines())
        writer.add_text("report", f"{text}\n\nThe whole report: {REPORT} in the run folder.", step)


def _wandb(callback: Any, folder: Path, results: Mapping[str, Any], step: int) -> None:
    import wandb

    if wandb.run is None:
        return
    content: dict[str, Any] = {name: wandb.Image(str(folder / f"{name}.png")) for name in PICTURES}
    content["report"] = wandb.Html((folder / REPORT).read_text(encoding="utf-8"), inject=False)
    wandb.log({**scores_of(results), **content, "train/global_step": step})
    wandb.finish()


def _mlflow(callback: Any, folder: Path, results: Mapping[str, Any], step: int) -> None:
    import mlflow

    last = mlflow.active_run() or mlflow.last_active_run()  # the callback has ended its own
    if last is None:
        return
    mine = mlflow.active_run() is None
    if mine:
        mlflow.start_run(run_id=last.info.run_id)
    mlflow.log_metrics(scores_of(results), step=step)
    for name in (*(f"{name}.png" for name in PICTURES), REPORT, "results.json"):
        mlflow.log_artifact(str(folder / name))
    if mine:
        mlflow.end_run()


LOGS = {"TensorBoardCallback": _tensorboard, "WandbCallback": _wandb, "MLflowCallback": _mlflow}
