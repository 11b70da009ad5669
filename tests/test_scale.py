"""A part of COCO's full size: memory by the image, so small that all of it stays under 1.5 GB.

`tests/benchmarks/scale.py` measures whole runs. Here the images are not decoded, which takes most of the time and a
memory that does not depend on their number.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, first_images

FULL = 82_783 + 40_504
RUN = """
import os, sys, tempfile
from pathlib import Path
sys.path[:0] = ["tests/benchmarks"]
import dataloader, scale
from captioning.data import choose

def peak():
    return Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "x.jpg"
    file.touch()
    captions = [f"a {colour} {thing} beside {number} others" for colour in ("red", "green")
                for thing in ("dog", "cat", "bus") for number in range(300)]
    data = b"\\xff\\xd8\\xff" + os.urandom(25_000)  # how a JPEG begins
    choose.prepare_image = lambda record, short_side: choose.Prepared(bytes(data))
    peaks = []
    for share in sys.argv[1:]:
        root = Path(folder) / share
        scale.lay_out(root, [file], captions, float(share))
        arguments = ["--limit_data=0", "--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
        dataloader.main([f"--coco_dir={root}", f"--save_path={folder}/out", *arguments])
        peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_stays_under_the_bound_at_full_size():
    shares = (1 / 128, 1 / 32)
    command = [sys.executable, "-c", RUN, *map(str, shares)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = [round(82_783 * share) + round(40_504 * share) for share in shares]
    for count in counts:
        assert f"in all  {count:>7,} images" in done.stdout
    small, large = (int(peak) / 1000 for peak in done.stdout.splitlines()[-1].split())
    full = large + (large - small) / (counts[1] - counts[0]) * (FULL - counts[1])
    print(f"{small:.0f} MB, {large:.0f} MB, {full:.0f} MB expected at full size")
    assert full < 1500


TRAINING = """
import sys, threading, time
from pathlib import Path
import train

most = 0

def watch():
    global most
    while True:
        most = max(most, int(Path("/proc/self/smaps_rollup").read_text().partition("Anonymous:")[2].split()[0]))
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
train.main(sys.argv[1:])
print(most)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_a_training_on_cached_features_needs_no_more_memory_for_more_images(prepared, tmp_path):
    """In float32, where oneDNN keeps no kernel for each length of a row."""
    peaks = []
    for images in (150, 1500):
        data, run = first_images(prepared, tmp_path / f"data-{images}", train=images), tmp_path / f"run-{images}"
        flags = [f"--data_path={data}", f"--output_dir={run}", "--freeze_encoder", "--cache_features", "--use_cpu"]
        flags += ["--bf16=False", "--max_steps=90", "--eval_strategy=no", "--save_strategy=no"]
        flags += ["--load_best_model_at_end=False", "--dataloader_num_workers=0"]
        command = [sys.executable, "-c", TRAINING, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1000)
    print(f"{peaks[0]:.0f} MB with 150 images, {peaks[1]:.0f} MB with 1,500")
    assert peaks[1] < peaks[0] + 60 < 2000
