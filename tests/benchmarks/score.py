"""Score captions with captioning.scores.metrics and with the official evaluation: same numbers? how fast?

    python tests/benchmarks/score.py                                # the official code in this environment
    python tests/benchmarks/score.py --oracle_python PATH           # ... in another one
    CAPTIONING_SHARED=DIR python tests/benchmarks/score.py          # the captions are elsewhere

Prints two markdown tables. The official code (`pip install pycocoevalcap`, and Java) is optional: without it
only our own times are printed. The captions are coco2014/, flickr8k/ and captions_val2017.json in the folder
CAPTIONING_SHARED, by default `shared` beside the repository; those that are missing are left out.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import oracle  # noqa: E402

from captioning.scores.bootstrap import RESAMPLES, intervals  # noqa: E402
from captioning.scores.metrics import coco_scores, evaluate  # noqa: E402
from captioning.scores.names import COCO_KEYS  # noqa: E402
from captioning.scores.ptb import tokenize  # noqa: E402


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--oracle_python", default=sys.executable, help="interpreter of an environment with pycocoevalcap"
    )
    args = parser.parse_args(argv)

    shared = Path(os.environ.get("CAPTIONING_SHARED", ROOT.parent / "shared"))
    jobs = benchmark_jobs(read_captions(shared))
    if not jobs:
        raise SystemExit(f"There are no captions in {shared}: set CAPTIONING_SHARED to a folder that has them.")
    reason = why_no_oracle(args.oracle_python)
    if reason:
        print(f"**The official evaluation is absent ({reason}): no comparison, only our own times.**\n")

    ours = [score(job) for job in jobs.values()]
    theirs = [None] * len(jobs) if reason else oracle.run(list(jobs.values()), args.oracle_python)

    print("Seconds: tokenisation included, one process, without the rouge_score numbers.\n")
    print(
        "| set | images | captions | token mismatches | "
        + " | ".join(f"Δ {key}" for key in COCO_KEYS)
        + " | Δ per image | ours s | official s | ratio |"
    )
    print("|---|" + "---:|" * 13)
    for (name, job), mine, official in zip(jobs.items(), ours, theirs, strict=True):
        captions = len(job["predictions"]) + sum(map(len, job["references"]))
        row = [name, len(job["predictions"]), captions, *compare(mine, official), f"{mine['seconds']:.2f}"]
        if official:
            row += [f"{official['seconds']:.2f}", f"{official['seconds'] / mine['seconds']:.1f}"]
        else:
            row += ["-", "-"]
        print("| " + " | ".join(map(str, row)) + " |")
    print("\nΔ: largest relative difference from the official value.")
    print_intervals(jobs["speed: 5,000 x 5"])


def print_intervals(job: dict) -> None:
    """Print how long the intervals of all scores take, which is nothing that the official code has."""
    found = evaluate(dict(enumerate(job["predictions"])), dict(enumerate(job["references"])))
    intervals(found, resamples=10)  # imports numpy
    begin, own = time.perf_counter(), time.process_time()
    intervals(found)
    seconds, own = time.perf_counter() - begin, time.process_time() - own
    print(
        f"\n95 % intervals of {len(found.scores)} scores, {len(found.ids):,} images, {RESAMPLES:,} resamples: "
        f"{seconds:.2f} s, of the core's own time {own:.2f} s"
    )


def why_no_oracle(python: str) -> str:
    """Why the official evaluation cannot run, or an empty string."""
    for command, reason in (
        ([python, "-c", "import pycocoevalcap"], f"pycocoevalcap is not installed in {python}"),
        (["java", "-version"], "there is no java"),
    ):
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return reason
    return ""


def read_captions(shared: Path) -> dict[str, list[list[str]]]:
    """{name of a dataset: [captions of each image]} of what there is."""
    found = {}
    for name, file in (("COCO 2014 sample", "coco2014"), ("Flickr8k", "flickr8k")):
        path = shared / file / f"dataset_{file.removesuffix('2014')}.json"
        if path.exists():
            images = json.loads(path.read_text())["images"]
            found[name] = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    path = shared / "captions_val2017.json"
    if path.exists():
        images = {}
        for annotation in json.loads(path.read_text())["annotations"]:
            images.setdefault(annotation["image_id"], []).append(annotation["caption"])
        found["COCO val2017"] = list(images.values())
    return found


def benchmark_jobs(datasets: dict[str, list[list[str]]]) -> dict[str, dict]:
    """{name: {"predictions": [caption], "references": [[caption]]}}, an entry per image."""
    jobs = {}
    for name, images in datasets.items():
        images = [captions for captions in images if len(captions) > 1]
        jobs[f"{name}, human"] = _job([(captions[0], captions[1:]) for captions in images])
    if not jobs:
        return jobs
    images = [captions for captions in list(datasets.values())[-1] if len(captions) > 1]
    rng = random.Random(0)
    jobs["1,000 perturbed"] = _job([(perturb(captions[0], rng), captions[1:]) for captions in images[:1000]])
    for count in (1, 2, 10):
        jobs[f"{count} image(s)"] = _job([(captions[0], captions[1:]) for captions in images[:count]])
    shifted = [captions[0] for captions in images[1:5000] + images[:1]]
    jobs["speed: 5,000 x 5"] = _job(
        [(caption, captions[:5]) for caption, captions in zip(shifted, images[:5000], strict=True)]
    )
    return jobs


def _job(rows: list[tuple[str, list[str]]]) -> dict:
    return {"predictions": [row[0] for row in rows], "references": [row[1] for row in rows]}


def perturb(caption: str, rng: random.Random) -> str:
    """The caption with its words shuffled, cut short, left out altogether, or repeated."""
    words = caption.split()
    kind = rng.randrange(4)
    if kind == 0:
        rng.shuffle(words)
    elif kind == 1:
        words = words[: rng.randrange(len(words))]
    elif kind == 2:
        words = []
    else:
        words = [word for word in words for _ in range(rng.randint(1, 4))]
    return " ".join(words)


def score(job: dict) -> dict:
    """The same as `oracle.evaluate`, with captioning.scores.metrics."""
    predictions, references = dict(enumerate(job["predictions"])), dict(enumerate(job["references"]))
    begin = time.perf_counter()
    scores, per_image = coco_scores(predictions, references, per_image=True, rouge=False)
    seconds = time.perf_counter() - begin
    return {
        "scores": scores,
        "per_image": list(per_image.values()),
        "predictions": tokenize(job["predictions"]),
        "references": tokenize([caption for captions in job["references"] for caption in captions]),
        "seconds": seconds,
    }


def compare(mine: dict, official: dict | None) -> list[str]:
    """Token mismatches, and the largest relative difference of every score and of all scores per image."""
    if official is None:
        return ["-"] * (2 + len(COCO_KEYS))
    tokens = [caption for captions in official["references"] for caption in captions] + official["predictions"]
    mismatches = sum(a != b for a, b in zip(mine["references"] + mine["predictions"], tokens, strict=True))
    pairs = list(zip(mine["per_image"], official["per_image"], strict=True))
    return [
        str(mismatches),
        *[f"{difference(mine['scores'][key], official['scores'][key]):.0e}" for key in COCO_KEYS],
        f"{max(difference(a[key], b[key]) for a, b in pairs for key in COCO_KEYS):.0e}",
    ]


def difference(ours: float, theirs: float) -> float:
    """Relative difference; values below 1e-12 count as 0, for they are the rounding of a 0."""
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


if __name__ == "__main__":
    main()
