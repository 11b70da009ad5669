"""How near an update comes to this machine's own matrix products.

    OMP_NUM_THREADS=1 python tests/benchmarks/roofline.py

The matrix products of one update of 16 images, forward and backward, are recorded with their operands. Then each is
called by itself until its time is known: together that is the least an update could take, if nothing but products took
time. A product of two squares tells what the machine reaches at best. Models and images are those of precision.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bench
import precision

from captioning.model.fast import multiplies_in_bfloat16
from captioning.training.trainer import CaptionTrainer

CASES = ("features of 384 -> small (256)", "the demo: mit (128) -> tiny (128)")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")
RECORDED = 3  # the update whose products are recorded; the first ones are warming up


class Recorder(TorchDispatchMode):
    """Keeps each matrix product that is called: its operands once, and how often there were some of their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()
        self.calls: dict[Any, tuple[torch._ops.OpOverload, tuple, dict]] = {}
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if any(name in func.name() for name in PRODUCTS):
            shapes = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else str(x) for x in args]
            key = (func.name(), *shapes)
            self.counts[key] += 1
            self.calls.setdefault(key, (func, args, kwargs))
            if func.overloadpacket in flop_registry:
                self.operations += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def seconds(self) -> dict[str, float]:
        """What all of them take, each by itself and warm, by the kind of product."""
        found: dict[str, float] = defaultdict(float)
        for key, count in self.counts.items():
            func, args, kwargs = self.calls[key]
            found[func.name().removeprefix("aten::")] += count * alone(functools.partial(func, *args, **kwargs))
        return dict(found)


@torch.no_grad()
def alone(call: Callable[[], Any], least: float = 0.1) -> float:
    """Seconds of a call, the median of calls for `least` seconds, and of three at least."""
    call()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(case: str, half: bool, updates: int) -> None:
    encoder, decoder, kind = precision.CASES[case]
    recorder, step = Recorder(), CaptionTrainer.training_step

    def recorded(trainer, *args, **kwargs):
        if trainer.state.global_step == RECORDED:
            with recorder:
                return step(trainer, *args, **kwargs)
        return step(trainer, *args, **kwargs)

    class Clock(precision.Clock):
        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter())

    with mock.patch.object(CaptionTrainer, "training_step", recorded), mock.patch.object(precision, "Clock", Clock):
        times = precision.seconds(encoder, decoder, kind, half, updates, 3000)
    update = statistics.median(times)
    products = recorder.seconds()
    own, best = sum(products.values()), 1e12 * bench.peak_rate(half)
    print(f"{case}, {'bfloat16' if half else 'float32'}, {torch.get_num_threads()} thread(s)")
    print(f"  an update            {update:7.3f} s   median of {len(times)}")
    print(f"  its products alone   {own:7.3f} s   {own / update:.0%} of it")
    for name, seconds in sorted(products.items(), key=lambda item: -item[1]):
        print(f"    {name:<45} {seconds:7.3f} s")
    print(f"  {recorder.operations / 1e9:.1f} GFLOP of matrix products; a large square: {best / 1e9:.0f} GFLOP/s")
    print(f"  of the square's rate: {recorder.operations / update / best:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=25, help="the first two are not counted")
    parser.add_argument("--cases", nargs="*", default=CASES, help="of precision.py")
    args = parser.parse_args()
    for case in args.cases:
        measure(case, multiplies_in_bfloat16(), args.updates)


if __name__ == "__main__":
    main()
