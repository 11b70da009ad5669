"""A part of COCO's full size: memory by the image, so small that all of it stays under 1.5 GB.

`tests/benchmarks/scale.py` measures whole runs. Here the images are not decoded, which takes most of the time and a
memory that does not depend on their number.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FULL = 82_783 + 40_504
RUN = """
import os, sys, tempfile
from pathlib import Path
sys.path[:0] = ["tests/benchmarks"]
import dataloader, scale

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "x.jpg"
    file.touch()
    captions = [f"a {colour} {thing} beside {number} others" for colour in ("red", "green")
                for thing in ("dog", "cat", "bus") for number in range(300)]
    scale.lay_out(Path(folder) / "coco", [file], captions, float(sys.argv[1]))
    data = os.urandom(25_000)
    dataloader.prepare_image = lambda record, short_side: dataloader.Prepared(bytes(data))
    arguments = ["--limit_data=0", "--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
    dataloader.main([f"--coco_dir={folder}/coco", f"--save_path={folder}/out", *arguments])
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def peak(share: float) -> float:
    """Megabytes."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(share)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"in all  {round(82_783 * share) + round(40_504 * share):>7,} images" in done.stdout
    return int(done.stdout.split()[-1]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_stays_under_the_bound_at_full_size():
    small, large = peak(1 / 128), peak(1 / 32)
    full = large + (large - small) / (FULL / 32 - FULL / 128) * (FULL - FULL / 32)
    print(f"{small:.0f} MB, {large:.0f} MB, {full:.0f} MB expected at full size")
    assert full < 1500
