"""What a person sees of a training while it runs: one bar, scores and captions after each evaluation, the speed."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from captioning import InputError, cli
from captioning.cli import printable
from captioning.scores import monotony
from captioning.scores.names import BRIEF_KEYS, SCORE_NAMES

SAMPLES = 3  # captions shown after each evaluation


class Progress(TrainerCallback):
    """One progress bar for training, for each evaluation a line of scores and a few captions, all on stderr.

    Args:
        trainer: a `CaptionTrainer`, whose `predictions` are those of the last evaluation.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.warned = False
        self.training_bar = self.prediction_bar = None
        self.paused = 0.0  # when the evaluation began that is going on

    def close(self) -> None:
        """End the lines of bars that an error has left open."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = cli.bar(
                total=state.max_steps,
                initial=state.global_step,  # what a resumed run has behind it
                unit="update",
                desc="training",
                disable=args.disable_tqdm,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            self.paused = time.perf_counter()
            self.prediction_bar = cli.bar(
                total=len(eval_dataloader),
                unit="batch",
                desc="evaluation",
                leave=False,
                disable=args.disable_tqdm or not sys.stderr.isatty(),
            )
        self.prediction_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.prediction_bar is None:
            return
        self.prediction_bar.close()
        self.prediction_bar = None
        if self.training_bar is not None and not self.training_bar.disable:
            # What remains is reckoned from the updates alone, or it would jump to hours.
            elapsed = time.perf_counter() - self.paused
            self.training_bar.start_t += elapsed
            self.training_bar.last_print_t += elapsed

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.on_evaluate(args, state, control)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise InputError(
                f"the validation loss became {logs['eval_loss']} by step {state.global_step}; lower --learning_rate, "
                "or train without --fp16"
            )
        for key in ("loss", "reward"):
            if key in logs and self.training_bar is not None:
                self.training_bar.set_postfix_str(f"{key} {logs[key]:.3f}", refresh=False)
        if "eval_loss" in logs:
            shown = [f"{SCORE_NAMES[key]} {logs['eval_' + key]:.3f}" for key in BRIEF_KEYS if "eval_" + key in logs]
            lines = [f"epoch {logs['epoch']:g}  validation loss {logs['eval_loss']:.3f}  {'  '.join(shown)}"]
            said = self.trainer.predictions
            samples = sorted(said)[:: max(1, len(said) // SAMPLES)][:SAMPLES]  # the same ones every time
            lines += [f"    {printable(f'{self.trainer.name_of(image_id)}: {said[image_id]}')}" for image_id in samples]
            # At first every model says the same of all images.
            if not self.warned and 2 * state.global_step >= state.max_steps:
                references = [self.trainer.references[image_id] for image_id in said]
                if warning := monotony.warning(list(said.values()), references):
                    lines.append(f"warning: {printable(warning)}")
                    self.warned = True  # once; train.py says it again at the end, if it is still so
            tqdm.write("\n".join(lines), file=sys.stderr)  # at once: the bar is drawn again after it


@dataclass
class Throughput:
    """What a training did since this process started it.

    Attributes:
        images: seen by this process.
        captions: seen by this process; a tensor on the training's device, so that nobody waits for the device.
        waited: seconds spent waiting for data.
        evaluated: seconds spent on evaluations.
    """

    images: int = 0
    captions: torch.Tensor | int = 0
    waited: float = 0.0
    evaluated: float = 0.0

    def rates(self, seconds: float, world_size: int) -> dict[str, float]:
        """Images and captions a second in a training of `seconds`; evaluations are counted apart."""
        seconds = max(seconds - self.evaluated, 1e-9)
        images, captions = self.images * world_size, int(self.captions) * world_size
        return {
            "images_per_second": round(images / seconds, 1),
            "captions_per_second": round(captions / seconds, 1),
        }

    def line(self, seconds: float, world_size: int, device: torch.device) -> str:
        """One line on a training of `seconds`; evaluations are counted apart."""
        seconds -= self.evaluated
        images, captions = self.images * world_size, int(self.captions) * world_size
        line = f"trained on {images:,} images in {seconds:,.0f} s: {images / seconds:.1f} images/s"
        line += f", {captions / seconds:.1f} captions/s; {self.waited / seconds:.1%} of that waiting for data"
        line += f"; evaluations {self.evaluated:,.0f} s"
        peak = peak_memory(device)
        return line + (f"; peak memory {peak / 1e9:.1f} GB" if peak else "")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors took on an accelerator, or this process in main memory; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
