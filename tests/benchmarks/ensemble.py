"""What an ensemble of run folders gives beside its members, and what it costs, on a split of real photographs.

    python tests/benchmarks/ensemble.py RUN RUN2 --data_path DATA --split validation --limit 200

Each line is compared with the first, RUN alone, on the same images by the paired bootstrap. The runs have one frozen
encoder. Captions are made of its output as training keeps it (`--cache_features`), so that seconds are those of one
core for each image without the encoder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning import cli
from captioning.data.folder import load_prepared
from captioning.model import captioner, ensemble, generate, parts
from captioning.scores import bootstrap
from captioning.scores.metrics import evaluate
from captioning.training.batches import CaptionDataset
from captioning.training.features import FeatureCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, two or more")
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, default=1_000_000, help="images, the first ones")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the features")
    args = parser.parse_args()
    parts.quiet_transformers()
    torch.set_num_threads(1)

    split = load_prepared(args.data_path)[0][args.split]
    bundles = [captioner.load(run) for run in args.runs]
    cache = FeatureCache(bundles[0], args.data_path / ".features", 16, cli.note, getattr(torch, args.dtype))
    features = cache.features(CaptionDataset(split, bundles[0].pixels), args.split)
    ids = split.image_id[: args.limit]
    references = dict(zip(ids, split.captions, strict=False))
    first = None
    for name, bundle in [*zip(args.runs, bundles, strict=True), ("ensemble", ensemble.join(bundles, args.runs))]:
        texts: list[str] = []
        began = time.process_time()
        with torch.inference_mode():
            for start in range(0, len(ids), 16):
                rows = range(start, min(start + 16, len(ids)))
                states = torch.from_numpy(np.stack([features[row] for row in rows])).float()
                texts += generate.decode(bundle.tokenizer, generate.generate_tokens(bundle.model, states))
        seconds = (time.process_time() - began) / len(ids)
        found = evaluate(dict(zip(ids, texts, strict=True)), references)
        first = first or found
        low, high = bootstrap.intervals(found)["cider_d"]
        less = bootstrap.differences(found, first)["cider_d"]
        print(
            f"{name}: {len(ids):,} images, CIDEr-D {found.scores['cider_d']:.4f} [{low:.3f}, {high:.3f}], difference "
            f"{less.value:+.4f} [{less.low:+.4f}, {less.high:+.4f}], BLEU-4 {found.scores['bleu_4']:.4f}, "
            f"{seconds:.3f} s of a core an image",
            flush=True,
        )


if __name__ == "__main__":
    main()
