"""Scripts in processes that are cheap to start and to kill: forked from a server that has imported everything."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])  # by the working directory; elsewhere it is slower, and no more


class Training:
    """One process of train.py, or of another script.

    Args:
        arguments: its command line.
        log: a file for its stdout and stderr.
        before: called in the process first; a function of a test module.
        environment: added to its own, such as the RANK of a process among several.
        script: its name.
    """

    def __init__(
        self,
        arguments: list,
        log: Path,
        before: Callable[[], None] | None = None,
        environment: dict | None = None,
        script: str = "train",
    ):
        self.log = log
        words = [str(argument) for argument in arguments]
        self.process = FORKS.Process(target=_run, args=(script, words, log, before, environment or {}))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """Its exit code; -9 where it was killed."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"it did not end in {seconds} s:\n{self.said()}")
        return self.process.exitcode

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive() and time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def several(count: int, arguments: list, folder: Path, before: Callable[[], None] | None = None) -> list[Training]:
    """As many processes as a launcher would start, without the launcher, logs in `folder`."""
    port = free_port()
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Training(arguments, folder / f"{rank}.log", before, {**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in range(count)
    ]


def _run(script, arguments, log, before, environment):
    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    sys.argv = [str(ROOT / f"{script}.py"), *arguments]
    # Its data workers are forked from it as those of a script are, and not from a server of its own.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    from captioning import cli

    main = importlib.import_module(script).main

    torch.set_num_threads(1)
    if before is not None:
        before()
    cli.run(lambda: main(arguments))
