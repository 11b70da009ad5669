"""Do captions of real photographs obey what is asked of them, and what does that cost in CIDEr-D and in time?

    python tests/benchmarks/wishes.py RUN_FOLDER --data_path processed_data --split validation

Each line is one wish: how many captions obey it, how many end where no sentence ends, CIDEr-D, and seconds of one core
for each image, encoder aside. `length -2` to `length +2` ask for exactly so many words less or more than the image's
caption has by itself. `--only NAME` runs one wish; `--output FILE` appends each result to a file of JSON Lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning import cli
from captioning.data.folder import load_prepared
from captioning.model import captioner, constrain, fast, generate, parts
from captioning.model.wishes import Wishes, words_of
from captioning.scores.metrics import coco_scores
from captioning.training.batches import CaptionDataset
from captioning.training.features import FeatureCache

# Words that no English clause ends with.
ARTICLES_AND_VERBS = "a an the is are its his her their while as"
PREPOSITIONS = "of in on at with and or to by from for through into"
OPEN = frozenset(f"{ARTICLES_AND_VERBS} {PREPOSITIONS}".split())

WISHES: dict[str, Wishes] = {
    "nothing": Wishes(),
    "prefix": Wishes(prefix="A photo of"),
    "min_words 14": Wishes(min_words=14),
    "max_words 8": Wishes(max_words=8),
    "max_characters 125": Wishes(max_characters=125),
    "max_characters 40": Wishes(max_characters=40),
    "must dog red": Wishes(must=("dog", "red")),
    "without man woman": Wishes(without=("man", "woman")),
    "no_repeat_ngram_size 2": Wishes(no_repeat_ngram_size=2),
    "repetition_penalty 1.3": Wishes(repetition_penalty=1.3),
    "length_penalty 2": Wishes(length_penalty=2.0),
    "temperature 0.7, top_p 0.9": Wishes(temperature=0.7, top_p=0.9),
    "sentence": Wishes(case="sentence"),
    "all": Wishes(
        prefix="A photo of", max_words=16, max_characters=90, must=("dog",), without=("man", "woman"),
        no_repeat_ngram_size=2, case="sentence",
    ),
    "all, drawn": Wishes(
        prefix="A photo of", max_words=16, max_characters=90, must=("dog",), without=("man", "woman"),
        no_repeat_ngram_size=2, case="sentence", temperature=0.7,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_path", type=Path)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, default=1000, help="images")
    parser.add_argument("--only", nargs="+", help="names of wishes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    parts.quiet_transformers()
    torch.set_num_threads(1)

    split = load_prepared(args.data_path)[0][args.split]
    bundle = captioner.load(str(args.model_path))
    dataset = CaptionDataset(split, bundle.pixels)
    precision = torch.bfloat16 if fast.multiplies_in_bfloat16() else torch.float32  # as train.py made them
    cache = FeatureCache(bundle, args.data_path / ".features", 16, cli.note, precision)
    features = cache.features(dataset, args.split)
    ids = split.image_id[: args.limit]
    references = dict(zip(ids, split.captions, strict=False))
    images = torch.arange(len(ids), dtype=torch.float32)[:, None, None, None]  # what is drawn depends on them

    def tell(name: str, captions: list[str], asked: Callable[[int], Wishes], seconds: float) -> None:
        obeyed = sum(not asked(row).problems(text) for row, text in enumerate(captions))
        ends = sum((words_of(text.rstrip(".")) or ["a"])[-1].lower() in OPEN for text in captions)
        cider = coco_scores(dict(zip(ids, captions, strict=True)), references, rouge=False)["cider_d"]
        share = seconds / len(ids)
        found = {"wish": name, "images": len(ids), "obey": obeyed, "open_end": ends, "cider_d": cider, "seconds": share}
        print(f"{name:28}{obeyed:>6} of {len(ids)}{ends:>6}{cider:>9.4f}{share:>8.3f} s", flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(found) + "\n")

    def write(rows: np.ndarray, asked: Wishes) -> list[str]:
        own = dataclasses.replace(bundle, wishes=asked)
        saved = bundle.model.generation_config.max_new_tokens
        constrain.make_room(own)
        texts: list[str] = []
        with torch.inference_mode():
            for start in range(0, len(rows), 16):
                some = rows[start : start + 16]
                states = torch.from_numpy(np.stack([features[row] for row in some])).float()
                found = constrain.search(generate.generate_tokens, own, states, 1, images[some])
                texts += [best.text for best, *_ in found]
        bundle.model.generation_config.max_new_tokens = saved
        return texts

    every = np.arange(len(ids))
    for name, asked in WISHES.items():
        if args.only and name not in args.only:
            continue
        began = time.process_time()
        texts = write(every, asked)
        tell(name, texts, lambda _, asked=asked: asked, time.process_time() - began)  # type: ignore[misc]
    names = [f"length {more:+d}" for more in (-2, -1, 1, 2)] + ["length within 2"]
    if args.only and not set(names) & set(args.only):
        return
    natural = [len(words_of(text)) for text in write(every, Wishes())]
    for name in names:
        if args.only and name not in args.only:
            continue

        def window(length: int, name: str = name) -> Wishes:
            if name == "length within 2":
                return Wishes(min_words=max(1, length - 2), max_words=length + 2)
            exact = max(1, length + int(name.split()[1]))
            return Wishes(min_words=exact, max_words=exact)

        began = time.process_time()
        found = [""] * len(ids)
        for length in sorted(set(natural)):
            rows = np.array([row for row in every if natural[row] == length])
            for row, text in zip(rows, write(rows, window(length)), strict=True):
                found[row] = text
        tell(name, found, lambda row: window(natural[row]), time.process_time() - began)


if __name__ == "__main__":
    main()
