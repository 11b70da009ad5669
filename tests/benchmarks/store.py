"""What `--store` gives beside the captioner alone, and beside the store alone, on a split of real photographs.

    python tests/benchmarks/store.py RUN --data_path DATA --split validation --half 1 --weights 0.5 8 --changed 20

The store is DATA's training images. The first line is the captioner alone with its own beams; the others are compared
with it on the same images by the paired bootstrap. Captions are made of the encoder's output as training keeps it
(`--cache_features`), so that seconds are those of one core for each image without the encoder.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ensemble import Way, compared

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning import cli
from captioning.data.folder import load_prepared
from captioning.model import captioner, generate, neighbours, parts
from captioning.show.store import Store
from captioning.training.batches import CaptionDataset
from captioning.training.features import FeatureCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--half", type=int, choices=(0, 1), help="images at even or at odd places (default: all)")
    parser.add_argument("--limit", type=int, default=1_000_000, help="images, the first ones")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the features")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 8.0], help="values of --store_weight")
    parser.add_argument("--changed", type=int, default=0, help="show the first captions that the first weight changes")
    args = parser.parse_args()
    parts.quiet_transformers()
    torch.set_num_threads(1)

    splits = load_prepared(args.data_path)[0]
    bundle = captioner.load(args.run)
    cache = FeatureCache(bundle, args.data_path / ".features", 16, cli.note, getattr(torch, args.dtype))
    features = {
        name: cache.features(CaptionDataset(splits[name], bundle.pixels), name) for name in ("train", args.split)
    }
    vectors = np.concatenate(
        [neighbours.vectors_of(block.whole(), bundle.model.encoder) for block in features["train"].parts]
    )
    rows = list(range(len(splits[args.split]))[slice(args.half, None, None if args.half is None else 2)])[: args.limit]
    references = {splits[args.split].image_id[row]: splits[args.split].captions_of(row) for row in rows}

    began = time.process_time()
    whole = Store(splits["train"].captions, vectors)
    print(f"store: {len(vectors):,} images, {time.process_time() - began:.1f} s once their features are there")

    def alone(states: torch.Tensor) -> list[str]:
        return generate.decode(bundle.tokenizer, generate.generate_tokens(bundle.model, states))

    def with_store(weight: float) -> Callable[[torch.Tensor], list[str]]:
        store = copy.copy(whole)
        store.weight = weight
        return lambda states: [best.text for best, *_ in store.captions_of(bundle, states)]

    def store_alone(states: torch.Tensor) -> list[str]:
        """Of the neighbours' captions the one that agrees best with all of them."""
        return [whole.agreeing(rows, 1)[0] for rows in whole.nearest(bundle, states)]

    def of(way: Callable[[torch.Tensor], list[str]]) -> Way:
        seen = features[args.split]
        return lambda rows: way(torch.from_numpy(np.stack([seen[row] for row in rows])).float())

    ways: dict[str, Callable[[torch.Tensor], list[str]]] = {
        "the captioner alone": alone,
        "the store alone": store_alone,
    }
    ways |= {f"--store_weight {weight:g}": with_store(weight) for weight in args.weights}
    said = compared([(name, of(way)) for name, way in ways.items()], rows, references)
    pairs = zip(said["the captioner alone"], said[f"--store_weight {args.weights[0]:g}"], strict=True)
    changed = [pair for pair in pairs if pair[0] != pair[1]]
    print(f"{len(changed):,} captions of {len(rows):,} change")
    for before, after in changed[: args.changed]:
        print(f"| {before} | {after} |")


if __name__ == "__main__":
    main()
