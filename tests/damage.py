"""Damaged folders: each value of each JSON file replaced by nasty ones, each file cut, flipped, or no file at all.

    for damage in damages(folder): ...                        # what can be done to a right folder
    outcomes = try_all([(folder, damage), ...], opens)        # what comes of opening each one

They are opened in a few processes with limits of time and memory, one after the other; one that dies or hangs is told
and replaced.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 2.5, 3, 10**6, 10**9, 10**30, -(10**12), 1e308, float("nan")),
    *("", "many", "\x1b[2J\ud800", "x" * 100_000, [], ["tiny", 1], [[[]] * 50] * 3, {}, {"a": {"b": [1]}}),
]
KINDS = (
    "cut",
    "empty",
    "flip",
    "longer",
    "text",
    "list",
    "deep",
    "gone",
    "dangling",
    "pipe",
    "device",
    "folder",
    "page",
)
SECONDS = 5.0  # of the processor, besides what a right folder takes
WALL = 40.0  # seconds until a process that does nothing is given up
MEMORY = 1_000_000_000  # bytes, besides what a right folder takes


@dataclass(frozen=True)
class Damage:
    """What is done to one file of a folder.

    Attributes:
        file: its path inside of the folder.
        kind: one of KINDS, or "value".
        keys: which value of a JSON file.
        seed: which nasty value takes its place; for the other kinds, where in the file.
    """

    file: str
    kind: str
    keys: tuple = ()
    seed: int = 0

    def __str__(self) -> str:
        where = "/".join(map(str, self.keys))
        return f"{self.file}: {self.kind} {where} {self.seed}"


def damages(folder: Path, flips: int = 40) -> Iterator[Damage]:
    """Everything that is done to a folder, in a fixed order.

    Args:
        flips: bytes of each file that are not JSON, each in a case of its own.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            for keys in places(json.loads(path.read_text())):
                for seed in range(len(NASTY)):
                    yield Damage(file, "value", keys, seed)
        for kind in KINDS:
            for seed in range(flips if kind == "flip" and path.suffix != ".json" else 6 if kind == "flip" else 1):
                yield Damage(file, kind, seed=seed)


def places(content: Any, keys: tuple = ()) -> Iterator[tuple]:
    """The keys of every value in a JSON value; of long ones, such as a vocabulary, of the first members only."""
    if keys:
        yield keys
    members = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for at, (key, value) in enumerate(members):
        if len(content) <= 80 or at < 3:
            yield from places(value, (*keys, key))


def damaged(folder: Path, damage: Damage, copy: Path) -> Path:
    """A copy of a folder, damaged; its other files are links to the same bytes."""
    shutil.copytree(folder, copy, copy_function=os.link)
    path = copy / damage.file
    data = path.read_bytes()
    path.unlink()
    rng = random.Random(f"{damage.file} {damage.seed}")
    if damage.kind == "value":
        content = json.loads(data)
        place = content
        for key in damage.keys[:-1]:
            place = place[key]
        place[damage.keys[-1]] = NASTY[damage.seed]
        path.write_text(json.dumps(content))
    elif damage.kind == "pipe":
        os.mkfifo(path)
    elif damage.kind == "device":
        path.symlink_to("/dev/zero")
    elif damage.kind == "dangling":
        path.symlink_to(copy / "nowhere")
    elif damage.kind == "folder":
        path.mkdir()
    elif damage.kind == "flip" and data:
        place = rng.choice(
            (rng.randrange(len(data)), rng.randrange(len(data)) % 4000, -1 - rng.randrange(len(data)) % 4000)
        )
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
    elif damage.kind != "gone":
        texts = {"empty": b"", "text": b"hello", "list": b"[1]", "deep": b"[" * 100_000, "page": b"<html>404</html>"}
        texts |= {"cut": data[: len(data) // 2], "longer": data + data[-100:]}
        path.write_bytes(texts[damage.kind])
    return copy


# ---- opening them

Opens = Callable[[Path], Any]


def try_all(cases: Sequence[tuple[Path, Damage]], opens: Opens, processes: int = 2) -> list[str]:
    """What comes of each case: "worked", "refused: SENTENCE", or whatever else, which should not be.

    Args:
        opens: opens a folder as a script would, with all that is needed of it; a function of a module.
    """
    context = multiprocessing.get_context("fork")
    outcomes: dict[int, str] = {}
    shares = [list(range(number, len(cases), processes)) for number in range(processes)]
    running: list[Any] = [None] * processes
    with tempfile.TemporaryDirectory(prefix="captioning-damage-") as place:
        while any(shares):
            for number, share in enumerate(shares):
                if not share:
                    continue
                if running[number] is None:
                    ours, theirs = context.Pipe()
                    arguments = (theirs, [cases[at] for at in share], opens, Path(place, f"{number}-{len(share)}"))
                    process = context.Process(target=_work, args=arguments)
                    process.start()
                    theirs.close()
                    running[number] = (process, ours, time.monotonic())
                process, ours, since = running[number]
                try:
                    if ours.poll(0.02):
                        outcomes[share.pop(0)] = ours.recv()
                        running[number] = (process, ours, time.monotonic()) if share else None
                        if not share:
                            process.join()
                    elif time.monotonic() - since > WALL:
                        process.kill()
                        process.join()
                        outcomes[share.pop(0)] = "hung"
                        running[number] = None
                except EOFError:
                    process.join()
                    outcomes[share.pop(0)] = f"died with {process.exitcode}"
                    running[number] = None
    return [outcomes[at] for at in range(len(cases))]


def _work(pipe, cases: Sequence[tuple[Path, Damage]], opens: Opens, place: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    place.mkdir()
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    opens(cases[0][0])  # what a right folder takes
    resource.setrlimit(resource.RLIMIT_AS, (own + 2 * MEMORY, own + 2 * MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number, (folder, damage) in enumerate(cases):
        copy = damaged(folder, damage, place / str(number))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, SECONDS + 1)
        began = time.process_time()
        try:
            opens(copy)
            outcome = "worked"
        except InputError as error:
            sentence = str(error)
            fine = "\n" not in sentence and 10 < len(sentence) < 1500
            outcome = f"refused: {sentence}" if fine else f"no sentence: {sentence!r}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:300]}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if time.process_time() - began > SECONDS:
            outcome = f"took {time.process_time() - began:.1f} s: {outcome}"
        if grown > MEMORY:
            outcome = f"took {grown / 1e9:.1f} GB: {outcome}"
        shutil.rmtree(copy, ignore_errors=True)
        pipe.send(outcome)
    os._exit(0)
