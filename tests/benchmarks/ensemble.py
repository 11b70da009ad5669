"""What an ensemble of run folders gives beside its members, and what it costs, on a split of real photographs.

    python tests/benchmarks/ensemble.py RUN RUN2 --data_path DATA --split validation --limit 200

Each line is compared with the first, RUN alone, on the same images by the paired bootstrap. Encoders are frozen, and
may differ. Captions are made of their output as training keeps it (`--cache_features`), so that seconds are those of
one core for each image without the encoders. `--output FILE` keeps the captions of each line, to look at or compare.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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

# Places of some images in the split -> their captions.
Way = Callable[[Sequence[int]], list[str]]


def compared(
    ways: Iterable[tuple[str, Way]], rows: Sequence[int], references: Mapping[int, Sequence[str]]
) -> dict[str, list[str]]:
    """The captions of each way to write them; a line for each tells its scores, beside those of the first.

    Args:
        ways: with their names.
        rows: places of the images in the split.
        references: of these images, in the same order.
    """
    first, said = None, {}
    for name, way in ways:
        texts: list[str] = []
        began = time.process_time()
        with torch.inference_mode():
            for start in range(0, len(rows), 16):
                texts += way(rows[start : start + 16])
        seconds = (time.process_time() - began) / len(rows)
        said[name] = texts
        found = evaluate(dict(zip(references, texts, strict=True)), references)
        first = first or found
        low, high = bootstrap.intervals(found)["cider_d"]
        less = bootstrap.differences(found, first)["cider_d"]
        print(
            f"{name}: {len(rows):,} images, CIDEr-D {found.scores['cider_d']:.4f} [{low:.3f}, {high:.3f}], difference "
            f"{less.value:+.4f} [{less.low:+.4f}, {less.high:+.4f}], BLEU-4 {found.scores['bleu_4']:.4f}, "
            f"{seconds:.3f} s of a core an image",
            flush=True,
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, two or more")
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, default=1_000_000, help="images, the first ones")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the features")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    parts.quiet_transformers()
    torch.set_num_threads(1)

    split = load_prepared(args.data_path)[0][args.split]
    bundles = [captioner.load(run) for run in args.runs]
    ids = split.image_id[: args.limit]
    references = dict(zip(ids, split.captions, strict=False))
    together: Any = ensemble.join(bundles, args.runs)
    # The member whose encoder each of the ensemble's is: equal ones run once.
    encoders: Any = together.model.encoder.encoders
    seeing = [next(n for n, one in enumerate(bundles) if one.model.encoder is each) for each in encoders]

    def features(bundle: captioner.Bundle) -> Any:
        cache = FeatureCache(bundle, args.data_path / ".features", 16, cli.note, getattr(torch, args.dtype))
        return cache.features(CaptionDataset(split, bundle.pixels), args.split)

    own = [features(bundle) for bundle in bundles]

    def states(number: int | None, rows: Sequence[int]) -> torch.Tensor:
        """What the encoder of one bundle makes of some images, or that of the ensemble (None)."""
        if number is not None:
            return torch.from_numpy(np.stack([own[number][row] for row in rows])).float()
        return ensemble.joined([states(member, rows) for member in seeing])

    def way(number: int | None, bundle: Any) -> Way:
        def captions(rows: Sequence[int]) -> list[str]:
            return generate.decode(bundle.tokenizer, generate.generate_tokens(bundle.model, states(number, rows)))

        return captions

    ways = [(name, way(number, bundle)) for number, (name, bundle) in enumerate(zip(args.runs, bundles, strict=True))]
    texts_of = compared([*ways, ("ensemble", way(None, together))], range(len(ids)), references)
    if args.output:
        by_id = {name: dict(zip(ids, texts, strict=True)) for name, texts in texts_of.items()}
        args.output.write_text(json.dumps(by_id))


if __name__ == "__main__":
    main()
