"""dataloader.py over a data set of COCO 2014's full size: does the time grow with the images only, and the memory not?

    python tests/benchmarks/scale.py                              # a sixteenth, a quarter, and all of it
    python tests/benchmarks/scale.py --shares 0.01 --images DIR   # images of a COCO 2014 root instead of drawn ones
    python tests/benchmarks/scale.py --form csv                   # a CSV of a million rows, five to an image
    python tests/benchmarks/scale.py --form tar                   # tars of a million images with a text each
    python tests/benchmarks/scale.py --form prepared              # a prepared folder: looked through, then opened again
    python tests/benchmarks/scale.py --form indices               # no images: the order of 100 million in an epoch

All of it is 82,783 + 40,504 images with 616,767 captions, a million rows, or 100 million indices. The images are hard
links to a few hundred files, small ones of 64 x 48 pixels where rows are what is measured. Memory is the largest sum
over all processes of the run, each shared page counted once (Linux's Pss): in all, and without the files that are
mapped into memory, which the system takes back when it needs them. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from captioning.data import scenes  # noqa: E402 (found through the path above)

ROWS = 1_000_000
INDICES = 100_000_000
FULL = {"train2014": (82_783, 414_113), "val2014": (40_504, 202_654)}  # images, captions


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 16, 1 / 4, 1], help="of COCO 2014's size")
    parser.add_argument("--images", type=Path, help="a COCO 2014 root (default: drawn scenes at 640 x 480)")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    parser.add_argument("--encoder", default="base", help="decides the stored size: base is 256 px")
    parser.add_argument("--decoder", default="small", help="a preset, or what the tokenizer is taken from")
    parser.add_argument(
        "--form", choices=("coco", "csv", "tar", "prepared", "indices"), default="coco", help="what the data set is"
    )
    args = parser.parse_args(argv)
    if args.form == "prepared":
        return [measure_check(share, args.images) for share in args.shares]
    if args.form == "indices":
        return [measure_order(share) for share in args.shares]
    results = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        files, captions = source(args.images, Path(folder) / "originals")
        print(f"{os.cpu_count()} cores, {args.num_proc} processes, {len(files)} files", file=sys.stderr)
        names = ["images", "captions", "seconds", "images/s", "CPU ms per image"]
        names += ["peak MB", "without mapped files", "folder MB", "rows/s read"]
        print(f"| {' | '.join(names)} |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for share in args.shares:
            root = Path(folder) / f"coco{share}"
            if args.form == "coco":
                counts = lay_out(root, files, captions, share)
            else:
                small = shrunk(files, Path(folder) / "small")
                counts = (lay_out_csv if args.form == "csv" else lay_out_tars)(root, small, captions, share)
            result = measure(root, Path(folder) / "out", args)
            shutil.rmtree(root)
            results.append({"images": sum(images for images, _ in counts), **result})
            speed = results[-1]["images"] / result["seconds"]
            row = [sum(column) for column in zip(*counts, strict=True)] + [result["seconds"], speed]
            result["cpu"] /= results[-1]["images"]
            row += [result[name] for name in ("cpu", "peak", "anonymous", "size", "rows")]
            print("| " + " | ".join(f"{value:,.0f}" for value in row) + " |", flush=True)
    return results


def source(root: Path | None, folder: Path) -> tuple[list[Path], list[str]]:
    """A few hundred files of mode RGB in `folder`, and captions to draw from."""
    folder.mkdir()
    rng = random.Random(0)
    files, captions = [], []
    if root is None:
        for number in range(200):
            scene, own, _ = scenes.draw_scene(rng)
            noise = Image.effect_noise((640, 480), 40).convert("RGB")  # a drawing alone would be a small file
            files.append(folder / f"{number}.jpg")
            Image.blend(scene.resize((640, 480)), noise, 0.3).save(files[-1], quality=85)
            captions += own
        return files, captions
    for part in FULL:
        content = json.loads((root / "annotations" / f"captions_{part}.json").read_text())
        captions += [annotation["caption"] for annotation in content["annotations"]]
        for image in sorted((root / part).glob("*.jpg")):
            with Image.open(image) as opened:
                usable = opened.mode == "RGB" and min(opened.size) >= 400
            if usable and len(files) < 400:
                files.append(folder / image.name)
                files[-1].write_bytes(image.read_bytes())
    return files, captions


def lay_out(root: Path, files: list[Path], captions: list[str], share: float) -> list[tuple[int, int]]:
    """A COCO 2014 root of `share` of its size, with the keys that its annotations have."""
    rng, counts = random.Random(1), []
    (root / "annotations").mkdir(parents=True)
    for part, (all_images, all_captions) in FULL.items():
        (root / part).mkdir()
        number, count = round(all_images * share), round(all_captions * share)
        ids = [2 * position + (part == "val2014") for position in range(number)]
        images, annotations = [], []
        for position, image_id in enumerate(ids):
            name = f"COCO_{part}_{image_id:012d}.jpg"
            (root / part / name).hardlink_to(files[position % len(files)])
            images.append(
                {
                    "license": 5,
                    "file_name": name,
                    "coco_url": f"http://images.cocodataset.org/{part}/{name}",
                    "height": 480,
                    "width": 640,
                    "date_captured": "2013-11-14 16:28:13",
                    "flickr_url": f"http://farm9.staticflickr.com/8186/{image_id}_z.jpg",
                    "id": image_id,
                }
            )
        for position in range(count):
            image_id = ids[position % number]
            annotations.append({"image_id": image_id, "id": position, "caption": rng.choice(captions)})
        content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
        counts.append((number, count))
    return counts


def shrunk(files: list[Path], folder: Path) -> list[Path]:
    """The images at 64 x 48 pixels."""
    folder.mkdir(exist_ok=True)
    for file in files:
        with Image.open(file) as image:
            image.resize((64, 48)).save(folder / file.name, quality=80)
    return sorted(folder.iterdir())


def lay_out_csv(root: Path, files: list[Path], captions: list[str], share: float) -> list[tuple[int, int]]:
    """A CSV of a million rows or a share of them, five for an image."""
    rng, number = random.Random(1), round(ROWS * share / 5)
    root.mkdir()
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for position in range(number):
            name = f"{position // 1000:04d}/{position:07d}.jpg"
            (root / name).parent.mkdir(exist_ok=True)
            os.link(files[position % len(files)], root / name)
            writer.writerows([name, rng.choice(captions)] for _ in range(5))
    return [(number, 5 * number)]


def lay_out_tars(root: Path, files: list[Path], captions: list[str], share: float) -> list[tuple[int, int]]:
    """Tars of 10,000 images with a text each, a million or a share of them."""
    rng, number = random.Random(1), round(ROWS * share)
    images = [file.read_bytes() for file in files]
    root.mkdir()
    for start in range(0, number, 10_000):
        with tarfile.open(root / f"{start // 10_000:05d}.tar", "w") as tar:
            for position in range(start, min(start + 10_000, number)):
                text = rng.choice(captions).encode()
                for ending, content in (("jpg", images[position % len(images)]), ("txt", text)):
                    member = tarfile.TarInfo(f"{position:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
    return [(number, number)]


def measure(root: Path, out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run dataloader.py over all of `root`; seconds, and memory in MB."""
    command = [
        sys.executable,
        str(ROOT / "dataloader.py"),
        f"--{'coco_dir' if args.form == 'coco' else 'data'}={root}",
        "--limit_data=0",
    ]
    command += [f"--save_path={out}", f"--encoder={args.encoder}", f"--decoder={args.decoder}"]
    command += [f"--num_proc={args.num_proc}"]
    began, busy = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peak = anonymous = 0
    while process.poll() is None:
        total, own = memory(process.pid)
        peak, anonymous = max(peak, total), max(anonymous, own)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"dataloader.py ended with {process.returncode}")
    seconds, busy = time.monotonic() - began, cpu_seconds() - busy
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {
        "seconds": seconds,
        "cpu": 1000 * busy,
        "peak": peak / 1e3,
        "anonymous": anonymous / 1e3,
        "size": size / 1e6,
        "rows": rows_per_second(out),
    }


def measure_check(share: float, root: Path | None) -> dict[str, float]:
    """Open a prepared folder of a share of COCO 2014 for the first time, when it is looked through, and again."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    from captioning.data.folder import load_prepared

    image, text = datasets.Image(), datasets.Value("string")
    kinds = {"image_id": datasets.Value("int64"), "file_name": text, "image": image, "captions": datasets.List(text)}
    kinds["labels"] = datasets.List(datasets.List(datasets.Value("int32")))
    counts = {"train": round(FULL["train2014"][0] * share), "validation": round(FULL["val2014"][0] * share / 2)}
    counts["test"] = round(FULL["val2014"][0] * share) - counts["validation"]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        data = Path(folder) / "data"
        files, captions = source(root, Path(folder) / "originals")
        images = [file.read_bytes() for file in (files if root else shrunk(files, Path(folder) / "small"))]
        rng, image_id = random.Random(0), 0
        for split, count in counts.items():
            (data / split).mkdir(parents=True)
            with ArrowWriter(features=datasets.Features(kinds), path=str(data / split / "data.arrow")) as writer:
                for _ in range(count):
                    image_id += 1
                    row = {"image_id": image_id, "file_name": f"{image_id}.jpg"}
                    row["image"] = {"bytes": images[image_id % len(images)], "path": None}
                    row["captions"] = rng.sample(captions, 5)
                    row["labels"] = [[rng.randrange(5000) for _ in range(12)] for _ in range(5)]
                    writer.write(row)
                writer.finalize()
            (data / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        (data / "dataset_dict.json").write_text(json.dumps({"splits": list(counts)}))
        told = {"source": "drawn scenes", "encoder": "tiny", "decoder": "tiny", "images": counts}
        (data / "dataset.json").write_text(json.dumps(told))
        size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
        seconds = []
        for _ in range(2):
            began = time.monotonic()
            load_prepared(data)
            seconds.append(time.monotonic() - began)
    result = {"images": image_id, "size": size / 1e6, "first": seconds[0], "again": seconds[1], "cpu": cpu_seconds()}
    print("| images | folder MB | seconds, looked through | seconds, again | CPU seconds of looking |")
    print("|---:|---:|---:|---:|---:|")
    print(
        f"| {image_id:,} | {size / 1e6:,.0f} | {seconds[0]:.1f} | {seconds[1]:.2f} | {result['cpu']:.1f} |", flush=True
    )
    return result


def measure_order(share: float) -> dict[str, float]:
    """An epoch of 100 million images in the sampler, and a run that goes on from its middle; no image is opened.

    It runs in a process of its own, whose peak memory is the kernel's figure.
    """
    done = subprocess.run(
        [sys.executable, "-c", ORDER, str(round(INDICES * share))], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    result = json.loads(done.stdout)
    print(
        "| images | CPU seconds to begin | of an epoch's order | of skipping half of it | bytes an image at the peak |"
    )
    print("|---:|---:|---:|---:|---:|")
    row = [result["images"], result["begin"], result["epoch"], result["skip"], result["bytes"] / result["images"]]
    print("| {:,} | {:.1f} | {:.1f} | {:.1f} | {:.0f} |".format(*row), flush=True)
    return result


# As train.py uses it: 16 images an update, sorted by length within windows; a run that goes on skips batches.
ORDER = """
import itertools, json, resource, sys, time
import numpy as np
from accelerate.data_loader import SkipBatchSampler
from torch.utils.data import BatchSampler
from captioning.training.batches import LengthSampler

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

count = int(sys.argv[1])
lengths = np.random.default_rng(0).integers(40, 80, count, dtype=np.int32)
before, times = peak(), [time.process_time()]
sampler = LengthSampler(lengths, 16, 0)
times.append(time.process_time())
assert sum(map(len, BatchSampler(sampler, 16, False))) == count
times.append(time.process_time())
rest = next(iter(SkipBatchSampler(BatchSampler(sampler, 16, False), skip_batches=count // 32)))
times.append(time.process_time())
assert rest == list(itertools.islice(sampler, count // 32 * 16, count // 32 * 16 + 16))
found = dict(zip(("begin", "epoch", "skip"), np.diff(times).tolist()))
print(json.dumps({"images": count, "bytes": peak() - before, **found}))
"""


def cpu_seconds() -> float:
    """Of all processes that have ended, their children included: other work on the machine does not change it much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory(session: int) -> tuple[int, int]:
    """Kilobytes of all processes of a session: with and without mapped files."""
    total = anonymous = 0
    for status in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            if os.getsid(int(status.parent.name)) != session:
                continue
            lines = dict(line.split(":") for line in status.read_text().splitlines()[1:])
        except (OSError, ValueError):  # it has ended
            continue
        total += int(lines["Pss"].split()[0])
        anonymous += int(lines["Pss_Anon"].split()[0])
    return total, anonymous


def rows_per_second(folder: Path) -> float:
    """How fast rows are read in random order, image decoded: what training asks of the folder."""
    from captioning.data.folder import load_prepared

    split = load_prepared(folder)[0]["train"]
    order = random.Random(0).sample(range(len(split)), min(500, len(split)))
    began = time.monotonic()
    for position in order:
        split.image(position)
    return len(order) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
