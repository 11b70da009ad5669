"""How often the interval of a difference holds 0 where there is none, with real captions.

    python tests/benchmarks/coverage.py a/predictions_test.json b/predictions_test.json --data_path processed_data

In each of 100 repeats the two change captions at random, image by image, so that neither is better. A 95 % interval has
to hold 0 in about 95 of them.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exchange import covered  # noqa: E402

from captioning.data.folder import load_prepared  # noqa: E402
from captioning.scores.metrics import evaluate  # noqa: E402


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("predictions", type=Path, nargs=2, help="captions in COCO's results format")
    parser.add_argument("--data_path", type=Path, required=True, help="what dataloader.py wrote")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    args = parser.parse_args(argv)
    rows = load_prepared(args.data_path)[0][args.split]
    references = rows.references
    pair = []
    for file in args.predictions:
        entries = json.loads(file.read_text(encoding="utf-8"))
        pair.append(evaluate({entry["image_id"]: entry["caption"] for entry in entries}, references))
    for name, count in covered((pair[0], pair[1]), random.Random(0), resamples=2_000).items():
        print(f"{name:<12}{count:>4} of 100")


if __name__ == "__main__":
    main()
