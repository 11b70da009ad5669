"""Processor seconds per update in float32 and in bfloat16, by the widths of encoder and decoder.

    OMP_NUM_THREADS=1 python tests/benchmarks/precision.py

A model of random weights trains on random images, 16 at a time with five captions of ten words each, as in `train.py`:
bfloat16 with plain attention, float32 with torch's fused one. The two take turns; the median update of each is shown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning.data.folder import encode_captions
from captioning.model import captioner, parts
from captioning.training import batches
from captioning.training.trainer import CaptionTrainer

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "ai", "ou")]
# Name: encoder, decoder, whether the encoder is trained, frozen, or its features are cached.
CASES = {
    "the demo: mit (128) -> tiny (128)": ("mit", "tiny", "trained"),
    "tiny (128) -> tiny (128)": ("tiny", "tiny", "trained"),
    "features of 128 -> tiny (128)": ("tiny", "tiny", "cached"),
    "tiny (128) -> 256": ("tiny", "small", "trained"),
    "features of 384 -> tiny (128)": ("small", "tiny", "cached"),
    "features of 384 -> 192": ("small", "w192", "cached"),
    "features of 384 -> small (256)": ("small", "small", "cached"),
    "features of 384 -> 384": ("small", "w384", "cached"),
    "ViT of 192, 64 patches -> 128": ("v192", "tiny", "trained"),
    "ViT of 256, 64 patches -> 128": ("v256", "tiny", "trained"),
    "ViT-S/16 (384) -> tiny (128), frozen": ("small", "tiny", "frozen"),
    "ViT-S/16 (384) -> small (256)": ("small", "small", "trained"),
    "ViT-B/16 (768) -> base (768)": ("base", "base", "trained"),
}
for width in (192, 256):
    parts.ENCODER_PRESETS[f"v{width}"] = {
        **parts.ENCODER_PRESETS["tiny"],
        "hidden_size": width,
        "intermediate_size": 2 * width,
    }
for width in (192, 384):
    parts.DECODER_PRESETS[f"w{width}"] = {**parts.DECODER_PRESETS["small"], "n_embd": width}


class Rows(torch.utils.data.Dataset):
    """Random images, or the random output of an encoder, with five captions of ten words."""

    def __init__(self, tokenizer, size: int, features: tuple[int, int] | None, count: int = 64):
        rng = np.random.default_rng(0)
        self.rows = []
        for image_id in range(count):
            captions = [" ".join(rng.choice(WORDS, 10)) for _ in range(5)]
            row = {"image_id": image_id, "labels": encode_captions(tokenizer, captions, 40)[0]}
            if features:
                row["features"] = rng.standard_normal(features).astype(np.float16)
            else:
                row["pixels"] = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self)]

    def lengths(self):
        return [sum(map(len, row["labels"])) for row in self.rows]


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.process_time())


def seconds(encoder: str, decoder: str, kind: str, half: bool, updates: int, vocabulary: int) -> list[float]:
    tokenizer = parts.train_tokenizer([" ".join(WORDS)] * 3, vocabulary)
    set_seed(0)
    model = captioner.build(encoder, decoder, tokenizer)
    if half:
        model.set_attn_implementation("eager")
    processor = parts.load_image_processor(encoder if encoder in ("mit", "tiny", "small", "base") else "tiny")
    bundle = captioner.Bundle(model, tokenizer, processor)
    size = parts.ENCODER_PRESETS[encoder].get("image_size", 224)
    if kind != "trained":
        model.encoder.requires_grad_(False)
    features = None
    if kind == "cached":
        features = (
            (size // parts.ENCODER_PRESETS[encoder].get("patch_size", 16)) ** 2 + 1,
            model.encoder.config.hidden_size,
        )
    return timed(bundle, Rows(tokenizer, size, features), updates, 16, half)


def timed(bundle: captioner.Bundle, rows: Rows, updates: int, images: int, half: bool) -> list[float]:
    """Train on the CPU; the processor seconds of each update but the first two.

    Args:
        images: in an update.
        half: multiply in bfloat16.
    """
    clock, tokenizer = Clock(), bundle.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        args = Seq2SeqTrainingArguments(
            output_dir=folder,
            max_steps=updates,
            bf16=half,
            use_cpu=True,
            per_device_train_batch_size=images,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        collator = batches.Collator(tokenizer.bos_token_id, tokenizer.pad_token_id, True)
        CaptionTrainer(bundle, {}, {}, args=args, data_collator=collator, train_dataset=rows, callbacks=[clock]).train()
    return [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="of each run; the first two are not counted")
    parser.add_argument("--turns", type=int, default=3, help="runs of each precision")
    parser.add_argument("--cases", nargs="*", default=[], help="words of the cases to run (default: all)")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s); {torch.cpu.get_capabilities().get('architecture', '')}")
    print(f"{'':<40}{'float32':>10}{'bfloat16':>10}{'ratio':>8}", flush=True)
    for name, (encoder, decoder, kind) in CASES.items():
        if args.cases and not any(word in name for word in args.cases):
            continue
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.turns):
            for half in found:
                found[half] += seconds(
                    encoder, decoder, kind, half, args.updates, 50_257 if decoder == "base" else 1000
                )
        full, short = (statistics.median(found[half]) for half in (False, True))
        print(f"{name:<40}{full:>9.3f}s{short:>9.3f}s{full / short:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
