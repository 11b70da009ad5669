"""What a run was: command, times, machine, versions, fingerprints; and `config.yaml`, with which it can be repeated.

record = Record(words)
with record.phase("training"):
    ...
record.result(...)                  # plain values, for results.json
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from captioning.scores.names import SCORE_NAMES
from captioning.training.progress import peak_memory

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "pillow")
CODE = Path(__file__).resolve().parents[2]


class Record:
    """Takes notes of a run from its start.

    Args:
        words: the command line, as the user gave it.
    """

    def __init__(self, words: Sequence[str]):
        self.words = without_secrets(words)
        self.date = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def move(self, source: str, target: str, seconds: float) -> None:
        """Say that so much of the time of one phase belonged to another."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def result(self, device: torch.device, **more: Any) -> dict[str, Any]:
        """All notes as plain values.

        Args:
            more: what else is to be told, such as fingerprints.
        """
        peak = peak_memory(device)
        return {
            "command": shlex.join(["train.py", *self.words]),
            "date": self.date.isoformat(),
            "seconds": {
                **{name: round(seconds, 1) for name, seconds in self.seconds.items()},
                "all": round(time.perf_counter() - self.began, 1),
            },
            "peak_memory_gb": None if peak is None else round(peak / 1e9, 2),
            **more,
            "machine": machine(),
            "git": revision(),
        }


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line without the token of the hub."""
    words, secret = list(words), "--hub_token"
    for position, word in enumerate(words):
        option = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if option == secret and "=" in word:
            words[position] = f"{secret}=..."
        elif option == secret and position + 1 < len(words):
            words[position + 1] = "..."
    return words


def machine() -> dict[str, Any]:
    """Processor, threads, GPUs, memory, system."""
    import psutil

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            name = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(name, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def revision(folder: Path = CODE) -> str | None:
    """The commit of a folder's code, with `-dirty` where it was changed since; None: it is no git checkout."""
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run gives."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of each evaluation on validation, in order: epoch, step, training loss, scores."""
    rows, train_loss = [], None
    for entry in log_history:
        train_loss = entry.get("loss", train_loss)
        if "eval_loss" in entry:
            scores = {key: entry[f"eval_{key}"] for key in SCORE_NAMES if f"eval_{key}" in entry}
            rows.append({"epoch": entry.get("epoch"), "step": entry.get("step"), "train_loss": train_loss, **scores})
    return rows
