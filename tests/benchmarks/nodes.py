"""One training on two machines: what it computes, what happens when one of them dies, and how it goes on with one.

    python tests/benchmarks/nodes.py --data_path processed_data                  # two launchers here
    sudo python tests/benchmarks/nodes.py --data_path processed_data --network   # each in a network of its own

Each machine is a `torchrun` with one process. They train with the encoder, and on its cached features. With `--network`
they live in two network namespaces (Linux, as root) that a virtual cable joins, so that nothing but the address of the
first one is known to the second. Prints what was found, and ends with an error where two machines do not do what one
does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 8  # of an update, over all machines
SETTINGS = ["--bf16=False", "--use_cpu", "--dataloader_num_workers=0", "--dropout=0", "--max_grad_norm=0"]
SETTINGS += ["--generation_num_beams=1", "--generation_max_length=8", "--save_total_limit=3"]
CACHED = ("--freeze_encoder", "--cache_features", "--augment=2")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, required=True, help="as train.py takes it; a small one will do")
    parser.add_argument("--network", action="store_true", help="each machine in a network namespace of its own")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work, cable() if args.network else contextlib.nullcontext(HERE) as nodes:
        for name, more in (("moving encoder", ()), ("cached features", CACHED)):
            found = compare(args.data_path, Path(work) / name, nodes, *more)
            print(f"{name}, one machine and two: {found['updates']} updates, ", end="")
            print(f"weights differ by {found['largest']:.1e} at most")
        for victim in (1, 0):
            lost = lose_one(args.data_path, Path(work) / str(victim), nodes, victim)
            print(f"machine {victim} killed: the other one said so after {lost['told']:.1f} s, and its launcher ended")
            print(f"    after {lost['ended']:.1f} s with exit code {lost['code']}:")
            print(f"    {lost['sentence']}")
            print(f"one machine alone went on from {lost['checkpoint']} to update {lost['updates']}")


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        prefix: what a command begins with that runs there.
        address: of the first machine.
        interface: of its network.
    """

    prefix: Sequence[str]
    address: str
    interface: str


HERE = (Node((), "127.0.0.1", "lo"), Node((), "127.0.0.1", "lo"))


@contextlib.contextmanager
def cable() -> Iterator[tuple[Node, Node]]:
    """Two network namespaces with a virtual cable between them."""
    names = [f"captioning-{os.getpid()}-{number}" for number in (0, 1)]
    ends = [f"cap{os.getpid() % 10**6}-{number}" for number in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        first, second = (
            Node(("ip", "netns", "exec", name), "10.77.0.1", end) for name, end in zip(names, ends, strict=True)
        )
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start(nodes: Sequence[Node], words: Sequence[str]) -> list[subprocess.Popen]:
    """A launcher with one process on each machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--nnodes={len(nodes)}"]
    return [
        subprocess.Popen(
            [*node.prefix, *launch, f"--node_rank={rank}", f"--master_addr={node.address}", f"--master_port={port}",
             str(ROOT / "train.py"), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1"},
        )
        for rank, node in enumerate(nodes)
    ]  # fmt: skip


def arguments(data: Path, folder: Path, machines: int, *more: str) -> list[str]:
    size = f"--per_device_train_batch_size={IMAGES // machines}"
    return [f"--data_path={data}", f"--output_dir={folder}", size, *SETTINGS, *more]


def ended(runs: Sequence[subprocess.Popen]) -> list[str]:
    """What each launcher of a training that has to succeed said."""
    said = [run.communicate(timeout=900)[1] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("\n".join(said))
    return said


def compare(data: Path, work: Path, nodes: Sequence[Node], *more: str) -> dict:
    """The same training on one machine and on two: updates, scores and captions have to be the same.

    Args:
        more: further flags. With --cache_features the machines share out the encoder's work, and its bytes have to be
            those that one machine computes.

    Returns:
        updates, and the largest and the mean difference of a weight.
    """
    runs, features = {}, {}
    for machines in (1, 2):
        folder, own = work / f"of {machines}", work / f"data of {machines}"
        shutil.copytree(data, own, ignore=shutil.ignore_patterns(".features"))
        said = ended(start(nodes[:machines], arguments(own, folder, machines, "--epochs=2", *more)))
        features[machines] = {file.name: file.read_bytes() for file in own.glob(".features/*.npy")}
        if f"{machines} process(es), {IMAGES} images per update" not in said[0] or any(
            "CIDEr-D" in s for s in said[1:]
        ):
            raise SystemExit("\n".join(said))
        runs[machines] = json.loads((folder / "results.json").read_text()), load_file(folder / "model.safetensors")
    if features[1] != features[2] or bool(features[1]) != ("--cache_features" in more):
        raise SystemExit(f"features of one machine: {sorted(features[1])}; of two: {sorted(features[2])}")
    (one, weights), (two, others) = runs.values()
    for split in ("validation", "test"):
        for name, value in one[split].items():
            if isinstance(value, float) and abs(value - two[split][name]) > 1e-4 * max(1, abs(value)):
                raise SystemExit(f"{name} of {split} is {value} on one machine and {two[split][name]} on two")
    if one["step"] != two["step"]:
        raise SystemExit(f"{one['step']} updates on one machine, {two['step']} on two")
    differences = [abs(weights[name] - others[name]) for name in weights]
    return {
        "updates": one["step"],
        "largest": max(float(difference.max()) for difference in differences),
        "mean": max(float(difference.mean()) for difference in differences),
    }


def lose_one(data: Path, folder: Path, nodes: Sequence[Node], victim: int) -> dict:
    """Kill a machine's launcher and its process (kill -9) in the middle of a training, and go on with one machine.

    Returns:
        seconds until the other one said so (told) and until its launcher ended (ended), its exit code and its sentence;
        the checkpoint that one machine alone went on from, and the update that it came to.
    """
    runs = start(nodes, arguments(data, folder, 2, "--max_steps=2000", "--save_steps=2", "--eval_strategy=no"))
    deadline = time.monotonic() + 600
    while not (folder / "checkpoint-4" / "trainer_state.json").exists():
        if time.monotonic() > deadline or any(run.poll() is not None for run in runs):
            raise SystemExit("\n".join(run.communicate()[1] for run in runs if run.poll() is not None) or "too slow")
        time.sleep(0.05)
    launcher = psutil.Process(runs[victim].pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        process.kill()
    killed = time.monotonic()
    other = runs[1 - victim]
    said, told = [], {}
    assert other.stderr is not None
    for line in other.stderr:
        said.append(line)
        if "lost another process of this run" in line:
            told[line.strip()] = time.monotonic() - killed
    other.wait()
    ended_after = time.monotonic() - killed
    runs[victim].communicate()
    if not other.returncode or len(told) != 1:
        raise SystemExit("".join(said))
    ((sentence, told_after),) = told.items()
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    last = int(checkpoints[-1].name.rpartition("-")[2]) + 2
    alone = ["--resume_from_checkpoint=auto", f"--max_steps={last}", "--save_steps=2", "--eval_strategy=no"]
    alone_said = ended(start(nodes[:1], arguments(data, folder, 1, *alone)))[0]
    went_on = next(line for line in alone_said.splitlines() if "going on from" in line).rpartition("checkpoint-")[2]
    updates = json.loads((folder / "results.json").read_text())["step"]
    shutil.rmtree(folder)
    return {
        "told": told_after,
        "ended": ended_after,
        "code": other.returncode,
        "sentence": sentence,
        "checkpoint": f"checkpoint-{went_on}",
        "updates": updates,
    }


if __name__ == "__main__":
    main()
