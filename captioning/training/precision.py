"""What matrix products are computed in, and why: what was asked for, else what a run began with, else what pays.

    wish = asked(given, os.environ)                 # of the flags and of accelerate's launcher
    reason = settle(training, wish, checkpoint)     # in training.bf16 and training.fp16; for the log
    refuse_others(training)                         # one precision for all processes

Features, training and the evaluations on the way follow it. Final scores are computed in float32, as `inference.py`
computes them. A checkpoint keeps the precision of its run, so that the run goes on in it on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from captioning import InputError
from captioning.training.resilience import kept_of_run

if TYPE_CHECKING:
    import torch
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

LAUNCHER = "ACCELERATE_MIXED_PRECISION"
NAMES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
YES, NO = ("true", "yes", "t", "y", "1", ""), ("false", "no", "f", "n", "0")


class Wish(NamedTuple):
    """A precision that was asked for.

    Attributes:
        kind: "bf16", "fp16" or "no".
        by: the words that asked for it.
    """

    kind: str
    by: str


def asked(given: Mapping[str, str], environment: Mapping[str, str]) -> Wish | None:
    """What the command line asks for, or accelerate's launcher by the environment.

    Args:
        given: the Trainer's flags on the command line, with their values.
        environment: its ACCELERATE_MIXED_PRECISION counts, see `arguments.forget_what_nobody_asked`.

    Raises:
        InputError: the two contradict each other, or the launcher asks for something else.
    """
    flags = {kind: given[f"--{kind}"].lower() for kind in ("bf16", "fp16") if f"--{kind}" in given}
    wish = next((Wish(kind, f"--{kind}") for kind, value in flags.items() if value in YES), None)
    if wish is None and flags.get("bf16") in NO:
        wish = Wish("no", "--bf16 False")
    kind = environment.get(LAUNCHER, "").lower()
    if not kind:
        return wish
    by = f"accelerate's --mixed_precision {kind}"
    if kind not in NAMES:
        raise InputError(f"{by} is none of {', '.join(NAMES)}; give one of them")
    refused = [f"--{name} False" for name, value in flags.items() if name == kind and value in NO]
    other = wish.by if wish is not None and wish.kind != kind and kind != "no" else None
    if refused or other:
        raise InputError(f"{by} and {other or refused[0]} say two things; leave one of them out")
    return wish or Wish(kind, by)


def of(training: Seq2SeqTrainingArguments) -> torch.dtype:
    """What matrix products are computed in."""
    import torch

    return getattr(torch, name_of(training))


def name_of(training: TrainingArguments) -> str:
    """The same as a word."""
    return NAMES["bf16" if training.bf16 else "fp16" if training.fp16 else "no"]


def refuse_float16(training: Seq2SeqTrainingArguments, wish: Wish | None) -> None:
    """Raises:
    InputError: float16 on a CPU, where it is accepted and float32 would run.
    """
    if training.fp16 and training.device.type == "cpu":
        by = wish.by if wish else "--fp16"
        raise InputError(f"{by} needs a GPU; on a CPU choose --bf16, or --bf16 False for float32")


def settle(training: Seq2SeqTrainingArguments, wish: Wish | None, checkpoint: Path | None) -> str:
    """Decide on the precision where nobody asked for one, and put it into `training`.

    Args:
        wish: of `asked`.
        checkpoint: the run goes on from it.

    Returns:
        The precision and its reason, for the log.
    """
    if wish is not None:
        reason = wish.by
    elif before := checkpoint and kept_of_run(checkpoint).get("precision"):
        training.bf16, training.fp16 = before == "bfloat16", before == "float16"
        reason = "as the run began"
    elif training.device.type == "cpu":
        reason = "this processor multiplies in it" if training.bf16 else "this processor does not multiply in bfloat16"
    else:
        reason = "this GPU multiplies in it" if training.bf16 else "this device does not multiply in bfloat16"
    training.mixed_precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    return f"{NAMES[training.mixed_precision]} ({reason})"


def refuse_others(training: Seq2SeqTrainingArguments) -> None:
    """To be called by all processes together.

    Raises:
        InputError: one has settled on another precision than the first: its machine multiplies otherwise.
    """
    if training.world_size == 1:
        return
    import torch

    found: list[Any] = [None] * training.world_size
    torch.distributed.all_gather_object(found, name_of(training))
    for other, name in enumerate(found):
        if name != found[0]:
            raise InputError(
                f"process {other} would train in {name} and process 0 in {found[0]}, as their machines compute; give "
                "--bf16 or --bf16 False to all of them"
            )
