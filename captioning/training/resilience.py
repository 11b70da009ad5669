"""What a training of hours lives through: kills, Ctrl-C, full disks, too little memory, a loss that is not a number.

with explained(training):               # one sentence for what can go wrong, and how to go on
    with StopSignals() as stop:         # Ctrl-C and SIGTERM ask first, and stop at once the second time
        ...
newest_checkpoint(folder)               # whole ones only
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from captioning import InputError
from captioning.files import is_full_disk, is_whole_safetensors, read_json

STATE = "trainer_state.json"  # the Trainer writes it last
GO_ON = "--resume_from_checkpoint auto"


# ---- checkpoints


def damage(checkpoint: Path) -> str | None:
    """What keeps a folder from being a checkpoint that was written to its end; None for a whole one."""
    try:
        if "global_step" not in read_json(checkpoint / STATE):
            return f"its {STATE} names no step"
        files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    except (InputError, OSError):
        return f"it has no whole {STATE}"
    weights = [file for file in files if file.suffix == ".safetensors"]
    states = [file for file in files if re.fullmatch(r"(optimizer|scheduler|rng_state(_\d+)?)\.(pt|pth)", file.name)]
    for name, found in (("model", weights), ("optimizer", states), ("scheduler", states), ("rng_state", states)):
        if not any(file.name.startswith(name) for file in found):
            return f"its {name} is missing"
    for file in (*weights, *states):
        # torch.save writes a zip archive, whose directory stands at its end.
        if not (is_whole_safetensors(file) if file in weights else zipfile.is_zipfile(file)):
            return f"its {file.name} is cut short"
    return None


def kept_of_run(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the run that it belongs to, see `resumable.Resumed`; {} where there is none."""
    kept: Any = read_json(checkpoint / STATE)
    for name in ("stateful_callbacks", "Resumed", "attributes"):
        kept = kept.get(name) if isinstance(kept, dict) else None
    return kept if isinstance(kept, dict) else {}


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the most updates in a run folder; half-written ones are passed over."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    newest_first = sorted(found, key=lambda path: -int(path.name[11:]))
    return next((path for path in newest_first if damage(path) is None), None)


@contextlib.contextmanager
def whole_checkpoint(folder: Path) -> Iterator[None]:
    """Write a checkpoint in the block; when it fails, what is half written is removed."""
    (folder / STATE).unlink(missing_ok=True)  # of an earlier run, whose other files are about to be replaced
    try:
        yield
    except BaseException:
        if damage(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- stopping


class StopSignals:
    """In its block the first SIGINT (Ctrl-C) or SIGTERM sets `asked`; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python hears no signals, nothing happens.

    Args:
        speak: whether this process says on stderr what comes now.
    """

    def __init__(self, speak: bool = True):
        self.asked = False
        self.speak = speak

    def __enter__(self) -> StopSignals:
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.speak:
            # Past sys.stderr, which may be in the middle of a line of its own.
            os.write(2, b"\nstopping, with a checkpoint; Ctrl-C once more: at once, without\n")


def in_own_group(worker: int, then=None) -> None:
    """For data workers: a terminal's Ctrl-C and a launcher's SIGTERM go to a whole process group.

    The workers leave it, because the update that is to be finished needs them. They end when their parent does.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if then is not None:
        then(worker)


# ---- failures


class LossWatch:
    """Raises at a loss that is not finite, naming its update and images, and never makes an accelerator wait.

    Each loss is copied to the host behind the work that is queued, and looked at when the next one comes: by then the
    device is busy with that one. `check` looks at the last one now, as is due before anything is kept of it.

    Attributes:
        name_of: what people are shown of an image, from its id.
    """

    def __init__(self):
        self._last = None
        self.name_of: Callable[[int], str] = "image {}".format

    def __call__(self, loss, step: int, image_id) -> None:
        """
        Args:
            loss: a scalar tensor, on any device.
            step: the update that it belongs to, counted from 1.
            image_id: (batch,), on any device.
        """
        import torch

        self.check()
        copied = None
        value = loss.detach().to("cpu", non_blocking=True)
        if loss.device.type != "cpu":
            copied = torch.Event(loss.device.type)
            copied.record()
        self._last = (value, copied, step, image_id)
        if copied is None:
            self.check()

    def check(self) -> None:
        """Raises:
        InputError: the last loss was not finite.
        """
        if self._last is None:
            return
        (value, copied, step, image_id), self._last = self._last, None
        if copied is not None:
            copied.synchronize()
        if value.isfinite():
            return
        ids = image_id.tolist()
        shown = ", ".join(map(self.name_of, ids[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise InputError(
            f"the loss became {value.item()} at step {step}, with {shown}; lower --learning_rate, "
            f"or train without --fp16, and go on with {GO_ON}"
        )


@contextlib.contextmanager
def explained(training, evaluating: bool = False) -> Iterator[None]:
    """Turn what can go wrong on a sound data set into an InputError that says what to do; the rest passes.

    Args:
        training: the TrainingArguments.
        evaluating: memory is short in an evaluation, not in training.

    Raises:
        InputError: no memory, no room on the disk, another process gone, or one that a data worker raised.
    """
    try:
        yield
    except InputError as error:
        # Out of a data worker an error comes with its traceback as its text.
        if "\n" not in str(error).strip():
            raise
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error
    except Exception as error:  # the tokenizers' library raises that and nothing narrower for a full disk
        sentence = (
            _lost_process(error, training)
            or _no_room_for_workers(error, training)
            or _full_disk(error, Path(training.output_dir))
            or _no_memory(error, training, evaluating)
        )
        if sentence is None:
            raise
        raise InputError(sentence) from error


def _no_room_for_workers(error: Exception, training) -> str | None:
    """Data workers hand over batches in shared memory, by a socket in the folder of temporary files."""
    full = r"No space left on device|Disk quota exceeded|File too large|No usable temporary directory"
    signs = rf"(?s)DataLoader worker.*({full}|unable to (open|resize|write to|mmap) .*torch_)"
    if not re.search(signs, str(error)):
        return None
    return (
        f"no room for what the data workers hand over, in shared memory (/dev/shm) or in '{_temporary()}'; make room "
        f"there, or leave the workers out with --dataloader_num_workers 0 (now {training.dataloader_num_workers})"
    )


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # it is full, and no other is there
        return os.environ.get("TMPDIR", "/tmp")


def _no_memory(error: Exception, training, evaluating: bool) -> str | None:
    text = str(error)
    if not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
        signs = r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|killed by signal: (Killed|Bus error)"
        if not re.search(signs, text):
            return None
    if "DataLoader worker" in text:
        return f"no memory for the data workers: lower --dataloader_num_workers (now {training.dataloader_num_workers})"
    size = training.per_device_eval_batch_size if evaluating else training.per_device_train_batch_size
    if evaluating:
        what = "evaluation"
        remedy = f"--per_device_eval_batch_size (now {size})" if size > 1 else "--generation_num_beams"
        remedy = f"lower {remedy}"
    elif size > 1:
        what = "training"
        remedy = (
            f"lower --per_device_train_batch_size (now {size}) and raise --gradient_accumulation_steps "
            f"(now {training.gradient_accumulation_steps}) by the same factor: the update stays the same"
        )
    else:
        what, remedy = "training", "one image is too many: try --activation_checkpointing, or a smaller --decoder"
    return f"out of memory in {what}; {remedy}"


def _full_disk(error: Exception, folder: Path) -> str | None:
    full = is_full_disk(error)
    by_torch = isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error))
    if not full and not by_torch:
        return None
    reason = "the disk is full" if full else "the last write failed"
    checkpoint = newest_checkpoint(folder)
    then = f"go on from {checkpoint.name} with {GO_ON}" if checkpoint else "start again"
    return f"'{folder}' could not be written ({reason}); make room and {then}"


def _lost_process(error: Exception, training) -> str | None:
    if training.world_size == 1:
        return None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "DistError" not in kinds and not re.search(r"gloo/|NCCL|Connection (closed|reset) by peer", str(error)):
        return None
    return (
        f"process {training.process_index} lost another process of this run, which ended (its own message says why); "
        f"go on with {GO_ON}"
    )


@contextlib.contextmanager
def stoppable(training) -> Iterator[None]:
    """SIGTERM, which schedulers send, ends the block as Ctrl-C does; one process says how to go on."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        if training.process_index:
            sys.exit(130)
        checkpoint = newest_checkpoint(Path(training.output_dir))
        if not stopped.args and checkpoint:
            raise KeyboardInterrupt(f"stopped; go on from {checkpoint.name} with {GO_ON}") from None
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def leave(code: int) -> NoReturn:
    """End one of several processes, with all its work done, without Python's own clearing up.

    Threads of torch's gloo may still hold tensors, and Python aborts if one of them ends while it shuts down
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
