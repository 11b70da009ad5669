"""Ours beside the recipe that everybody copies, on the same images, in one run.

    python tests/benchmarks/bench.py                 # everything: prepare, train, infer, score
    python tests/benchmarks/bench.py train --size small
    python tests/benchmarks/bench.py --images DIR    # a COCO 2014 root instead of drawn scenes

The standard recipe, written as well as it can be: one row per caption, float32 pixels stored on disk by
`datasets.map`, captions padded to 128 tokens, the encoder run once per caption, float32, AdamW; at inference one
image at a time, float32, 4 beams. Weights are random, of the size named: base is ViT-Base (86 M) and GPT-2 (124 M).
Each measurement runs in a process of its own, whose peak memory is the kernel's figure. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import score  # noqa: E402 (beside this file)

CAPTION_LENGTH = 20  # tokens generated: random weights never stop by themselves
CASES = {
    "prepare": ("standard", "ours"),
    "train": ("standard", "ours", "ours, cached"),
    "infer": ("standard", "ours", "ours, bfloat16", "ours, plain products"),
    "score": ("standard", "ours"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="all", choices=("all", *CASES))
    parser.add_argument("--size", default="base", choices=("base", "small", "tiny"), help="of encoder and decoder")
    parser.add_argument("--images", type=Path, help="a COCO 2014 root (default: drawn scenes at 480 px)")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, for each case at least")
    parser.add_argument("--batch", type=int, default=4, help="images per training batch (8: over 20 GB)")
    parser.add_argument("--workers", type=int, help="processes that read our training images (default: as train.py)")
    parser.add_argument(
        "--oracle_python", default=sys.executable, help="of an environment with pycocoevalcap and Java, for score"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        what, case = args.case.split(":")
        print(json.dumps(MEASURES[what](case, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.images = args.images or draw_photographs(Path(folder))
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.size}", file=sys.stderr)
        print("| figure | ours | standard | ratio | peak memory, ours | standard |\n|---|---:|---:|---:|---:|---:|")
        for what in CASES if args.what == "all" else (args.what,):
            if what == "score" and (reason := score.why_no_oracle(args.oracle_python)):
                print(f"score: left out, the official code is absent ({reason})", file=sys.stderr)
                continue
            results = {case: run_case(what, case, args) for case in CASES[what]}
            standard = results.pop("standard")
            for case, result in results.items():
                for figure, value in result["figures"].items():
                    theirs = standard["figures"][figure]
                    better = theirs / value if figure.startswith("kB") else value / theirs
                    print(
                        f"| {what}{case.removeprefix('ours')}: {figure} | {value:.2f} | {theirs:.2f} | {better:.1f}x "
                        f"| {result['peak'] / 1e9:.2f} GB | {standard['peak'] / 1e9:.2f} GB |",
                        flush=True,
                    )


def run_case(what: str, case: str, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, f"--case={what}:{case}", f"--size={args.size}", f"--images={args.images}"]
    command += [f"--seconds={args.seconds}", f"--batch={args.batch}", f"--oracle_python={args.oracle_python}"]
    if args.workers is not None:
        command.append(f"--workers={args.workers}")
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def result(figures: dict[str, float]) -> dict:
    import torch

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"figures": figures, "peak": peak}


# ---- the same images and captions for both


def draw_photographs(folder: Path) -> Path:
    """The drawn scenes, enlarged and given noise, so that decoding costs what a photograph's does."""
    from PIL import Image

    from captioning.data import scenes

    scenes.SPLITS = {"train": 120, "val": 40, "test": 40}
    scenes.draw(folder)
    for path in folder.glob("*2014/*.jpg"):
        with Image.open(path) as scene:
            enlarged = scene.resize((640, 480))
            noise = Image.effect_noise((640, 480), 40).convert(scene.mode)
            Image.blend(enlarged, noise, 0.2).save(path, quality=90)
    return folder


def records(args: argparse.Namespace):
    """RGB records with five captions each, in a fixed order."""
    from PIL import Image

    from captioning.data import annotations

    for pool in annotations.read_coco(args.images).values():
        for record in pool:
            with Image.open(record.path) as image:
                if image.mode == "RGB" and len(record.captions) >= 5:
                    yield record


def build(args: argparse.Namespace):
    """The model of the size asked for, a tokenizer with GPT-2's vocabulary size, and the image processor."""
    import torch
    from transformers import GPT2Config

    from captioning.model import captioner, parts

    parts.quiet_transformers()
    torch.manual_seed(0)
    tokenizer = parts.train_tokenizer((c for record in records(args) for c in record.captions), 5000)
    net = captioner.build(args.size, args.size, tokenizer)
    if args.size == "base":
        net.decoder.resize_token_embeddings(GPT2Config().vocab_size, mean_resizing=False)
    bundle = captioner.Bundle(net, tokenizer, parts.load_image_processor(args.size))
    bundle.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return bundle


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[int], None], seconds: float) -> tuple[int, float]:
    """Call `step(number)` for some time, at least twice; it should have been called before, to warm up.

    Returns:
        How often it was called, and for how many seconds.
    """
    synchronise()
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or number < 2:
        number += 1
        step(number)
        synchronise()
    return number, time.perf_counter() - started


def peak_rate(bfloat16: bool) -> float:
    """TFLOP/s of a large matrix product, which no model can exceed."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    calls, seconds = timed(lambda _: a @ b, 3)
    return calls * 2 * side**3 / seconds / 1e12


# ---- measurements


def measure_prepare(case: str, args: argparse.Namespace) -> dict:
    # Imported before the clock starts, for both.
    import datasets  # noqa: F401

    import dataloader  # noqa: F401
    from captioning.data import annotations
    from captioning.model import captioner, generate, parts  # noqa: F401

    count = sum(map(len, annotations.read_coco(args.images).values()))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if case == "ours":
            save_path = prepare_ours(args, Path(folder))
        else:
            save_path = Path(folder) / "standard"
            count = prepare_standard(args, save_path)
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in save_path.rglob("*") if file.is_file())
    return result({"images/s per core": count / seconds, "kB on disk per image": size / count / 1e3})


def prepare_ours(args: argparse.Namespace, folder: Path) -> Path:
    import dataloader

    save_path = folder / "processed_data"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dataloader.main(
            [
                f"--coco_dir={args.images}",
                f"--save_path={save_path}",
                f"--encoder={args.size}",
                f"--decoder={args.size}",
                "--limit_data=0",
                "--num_proc=1",
            ]
        )
    return save_path


def prepare_standard(args: argparse.Namespace, save_path: Path) -> int:
    """`datasets.map` to float32 pixels and padded labels, one row per caption; returns the number of images."""
    from datasets import Dataset
    from PIL import Image

    from captioning.model import parts

    rows = [(str(record.path), caption) for record in records(args) for caption in record.captions]
    tokenizer = parts.train_tokenizer((caption for _, caption in rows), 5000)
    processor = parts.load_image_processor(args.size)

    def transform(batch):
        pixels = [Image.open(path).convert("RGB") for path in batch["path"]]
        tokens = tokenizer(batch["caption"], padding="max_length", max_length=128, truncation=True)
        return {"pixel_values": processor(pixels, return_tensors="np").pixel_values, "labels": tokens["input_ids"]}

    dataset = Dataset.from_dict({"path": [path for path, _ in rows], "caption": [caption for _, caption in rows]})
    mapped = dataset.map(transform, batched=True, batch_size=64, remove_columns=["path", "caption"])
    mapped.save_to_disk(str(save_path))
    return len({path for path, _ in rows})


def measure_train(case: str, args: argparse.Namespace) -> dict:
    """Captions per second of training; ours is `CaptionTrainer` on a prepared folder, its data workers included."""
    from captioning.training import arguments

    bundle = build(args)
    if case == "standard":
        seen, seconds, flops = train_standard(bundle, args)
    else:
        seen, seconds, flops = train_ours(bundle, args, cached=case == "ours, cached")
    bfloat16 = case != "standard" and arguments.device_defaults()["bf16"]
    utilisation = flops / seconds / 1e12 / peak_rate(bfloat16)
    return result({"captions/s": seen / seconds, "% of the matrix-product peak": 100 * utilisation})


def train_standard(bundle, args: argparse.Namespace) -> tuple[int, float, float]:
    """One row per caption, padded to 128 tokens, float32. Its stored pixels are given it from memory.

    Returns:
        Captions trained on, seconds, and floating-point operations.
    """
    import numpy as np
    import torch

    from captioning.data import images

    net, device = bundle.model.train(), bundle.model.device
    eos, start = bundle.tokenizer.eos_token_id, net.config.decoder_start_token_id
    chosen = list(records(args))[:64]
    stored = {
        record.image_id: bundle.image_processor(images.open_image(record.path), return_tensors="np").pixel_values[0]
        for record in chosen
    }
    rows = [(record.image_id, caption) for record in chosen for caption in record.captions[:5]]
    size = 5 * args.batch
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step(number: int) -> None:
        some = [rows[(number * size + i) % len(rows)] for i in range(size)]
        pixel_values = torch.from_numpy(np.stack([stored[image_id] for image_id, _ in some])).to(device)
        texts = [caption + bundle.tokenizer.eos_token for _, caption in some]
        encoded = bundle.tokenizer(texts, padding="max_length", max_length=128, return_tensors="pt").to(device)
        ends = encoded.input_ids == eos
        labels = encoded.input_ids.masked_fill(ends & (ends.cumsum(1) > 1), -100)
        inputs = torch.cat([torch.full_like(labels[:, :1], start), encoded.input_ids[:, :-1]], 1)
        logits = net(pixel_values=pixel_values, decoder_input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()

    flops = operations(lambda: step(0))
    steps, seconds = timed(step, args.seconds)
    return steps * size, seconds, steps * flops


def train_ours(bundle, args: argparse.Namespace, cached: bool) -> tuple[int, float, float]:
    import torch
    from transformers import Seq2SeqTrainingArguments, TrainerCallback

    from captioning.data import folder
    from captioning.training import arguments, batches, features
    from captioning.training.trainer import CaptionTrainer

    with tempfile.TemporaryDirectory() as work:
        splits, _ = folder.load_prepared(prepare_ours(args, Path(work)))
        rows = batches.CaptionDataset(splits["train"], bundle.pixels)
        settings = {
            **arguments.DEFAULTS,
            **arguments.device_defaults(),
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "per_device_train_batch_size": args.batch,
            "output_dir": work,
            "disable_tqdm": True,
            "max_steps": 1_000_000,
        }
        if args.workers is not None:
            settings.update(dataloader_num_workers=args.workers, dataloader_persistent_workers=args.workers > 0)
        if cached:
            bundle.model.encoder.requires_grad_(False)
            rows.features = [features.FeatureCache(bundle, Path(work), 16, lambda _: None).features(rows, "train")]
        start, pad = bundle.model.config.decoder_start_token_id, bundle.tokenizer.pad_token_id
        trainer = CaptionTrainer(
            bundle,
            {},
            {},
            args=Seq2SeqTrainingArguments(**settings),
            data_collator=batches.Collator(start, pad),
            train_dataset=rows,
        )
        measured: dict[str, Any] = {}

        class Stopwatch(TrainerCallback):
            """Starts after three updates, and stops the training when time is up."""

            def on_step_end(self, args_, state, control, **kwargs):
                synchronise()
                now = time.perf_counter()
                if state.global_step == 3:
                    measured.update(
                        begun=now, captions=int(trainer.throughput.captions), waited=trainer.throughput.waited
                    )
                elif state.global_step > 5 and now - measured["begun"] > args.seconds:
                    measured["seconds"] = now - measured["begun"]
                    control.should_training_stop = True

        trainer.add_callback(Stopwatch)
        trainer.train()
        captions, seconds = int(trainer.throughput.captions) - measured["captions"], measured["seconds"]
        waiting = (trainer.throughput.waited - measured["waited"]) / seconds
        print(f"{'cached features' if cached else 'training'}: {waiting:.1%} of the time waiting", file=sys.stderr)

        some = trainer.data_collator([rows[i] for i in range(args.batch)])
        some = {name: tensor.to(bundle.model.device) for name, tensor in some.items()}
        some_captions = int((some["labels"] == bundle.tokenizer.eos_token_id).sum())
        bundle.model.train()
        with torch.autocast(bundle.model.device.type, torch.bfloat16, enabled=settings["bf16"]):
            flops = operations(lambda: trainer.compute_loss(bundle.model, some).backward())
        return captions, seconds, flops * captions / some_captions


def operations(call: Callable[[], None]) -> float:
    """Floating-point operations of `call`, those of matrix products, a multiply-add counting as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure_infer(case: str, args: argparse.Namespace) -> dict:
    """Images per second, from files to captions, 4 beams; ours is what `inference.py` does with a folder."""
    import torch

    from captioning.data import images, sources
    from captioning.model import caption, fast, generate

    bundle = build(args)
    bundle.model.eval()
    paths = [str(record.path) for record in records(args)]
    settings: dict[str, Any] = {"num_beams": 4, "max_new_tokens": CAPTION_LENGTH, "min_new_tokens": CAPTION_LENGTH}
    size = 1 if case == "standard" else 16
    dtype = "bfloat16" if case.endswith("bfloat16") else "float32"
    if case != "standard" and not case.endswith("plain products") and bundle.model.device.type == "cpu":
        fast.prepare(bundle.model, dtype)
    make = fast.in_dtype(functools.partial(generate.generate, **settings), bundle.model.device, dtype)
    endless = [sources.Source(path) for path in paths] * 1000
    read = sources.pictures(endless, 512, bundle.pixels, 2 * size, lambda source, reason: None)
    made = caption.in_batches(bundle, ((picture, picture.content) for picture in read), size, make)

    def step(number: int) -> None:
        if case == "standard":
            image = images.open_image(paths[number % len(paths)])
            x = bundle.image_processor(image, return_tensors="pt").pixel_values
            bundle.tokenizer.batch_decode(bundle.model.generate(x.to(bundle.model.device), **settings))
        else:
            list(itertools.islice(made, size))

    with torch.inference_mode():
        step(0)
        steps, seconds = timed(step, args.seconds)
    return result({"images/s": size * steps / seconds})


def measure_score(case: str, args: argparse.Namespace) -> dict:
    """Seconds to score 5,000 captions against five references each, the official code being the standard."""
    draw = random.Random(0)
    pool = [record.captions for record in records(args)]
    references = [draw.choice(pool)[:5] for _ in range(5000)]
    job = {"predictions": [draw.choice(captions) for captions in references], "references": references}
    done = score.score(job) if case == "ours" else score.oracle.run([job], args.oracle_python)[0]
    return result({"captions/s": len(references) / done["seconds"]})


MEASURES = {"prepare": measure_prepare, "train": measure_train, "infer": measure_infer, "score": measure_score}

if __name__ == "__main__":
    main()
