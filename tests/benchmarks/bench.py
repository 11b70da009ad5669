"""Ours beside the recipe that everybody copies, on the same images, in one run.

    python tests/benchmarks/bench.py                 # everything: prepare, train, infer
    python tests/benchmarks/bench.py train --size small
    python tests/benchmarks/bench.py --images DIR    # a COCO 2014 root instead of drawn scenes

The standard recipe, written as well as it can be: one row per caption, float32 pixels stored on disk by
`datasets.map`, captions padded to 128 tokens, the encoder run once per caption, float32, AdamW; at inference one
image at a time, float32, 4 beams. Weights are random, of the size named: base is ViT-Base (86 M) and GPT-2 (124 M).
Each measurement runs in a process of its own, whose peak memory is the kernel's figure. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

IMAGES_PER_BATCH = 8
CAPTION_LENGTH = 20  # tokens generated: random weights never stop by themselves
CASES = {
    "prepare": ("standard", "ours"),
    "train": ("standard", "ours", "ours, cached"),
    "infer": ("standard", "ours"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", nargs="?", default="all", choices=("all", *CASES))
    parser.add_argument("--size", default="base", choices=("base", "small", "tiny"), help="of encoder and decoder")
    parser.add_argument("--images", type=Path, help="a COCO 2014 root (default: drawn scenes at 480 px)")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, for each case at least")
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
    done = subprocess.run(
        [*command, f"--seconds={args.seconds}"],
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

    from captioning import sample

    sample.SPLITS = {"train": 120, "val": 40, "test": 40}
    sample.draw(folder)
    for path in folder.glob("*2014/*.jpg"):
        with Image.open(path) as scene:
            enlarged = scene.resize((640, 480))
            noise = Image.effect_noise((640, 480), 40).convert(scene.mode)
            Image.blend(enlarged, noise, 0.2).save(path, quality=90)
    return folder


def records(args: argparse.Namespace):
    """RGB records with five captions each, in a fixed order."""
    from PIL import Image

    from captioning import coco

    for pool in coco.read_coco(args.images).values():
        for record in pool:
            with Image.open(record.path) as image:
                if image.mode == "RGB" and len(record.captions) >= 5:
                    yield record


def build(args: argparse.Namespace):
    """The model of the size asked for, a tokenizer with GPT-2's vocabulary size, and the image processor."""
    import torch
    from transformers import GPT2Config

    from captioning import model

    model.quiet_transformers()
    torch.manual_seed(0)
    tokenizer = model.train_tokenizer((c for record in records(args) for c in record.captions), 5000)
    net = model.build(args.size, args.size, tokenizer)
    if args.size == "base":
        net.decoder.resize_token_embeddings(GPT2Config().vocab_size, mean_resizing=False)
    bundle = model.Bundle(net, tokenizer, model.load_image_processor(args.size))
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    return bundle


def rate(step: Callable[[int], int], seconds: float) -> float:
    """Items per second of `step(number)`, which returns how many it did; the first call warms up."""
    import torch

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step(0)
    synchronise()
    started, items, number = time.perf_counter(), 0, 0
    while time.perf_counter() - started < seconds or number < 3:
        number += 1
        items += step(number)
        synchronise()
    return items / (time.perf_counter() - started)


# ---- measurements


def measure_prepare(case: str, args: argparse.Namespace) -> dict:
    import dataloader
    from captioning import coco

    pools = coco.read_coco(args.images)
    count = sum(map(len, pools.values()))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        if case == "ours":
            import contextlib
            import io

            save_path = Path(folder) / "processed_data"
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
        else:
            save_path = Path(folder) / "standard"
            count = prepare_standard(args, save_path)
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in save_path.rglob("*") if file.is_file())
    return result({"images/s per core": count / seconds, "kB on disk per image": size / count / 1e3})


def prepare_standard(args: argparse.Namespace, save_path: Path) -> int:
    """`datasets.map` to float32 pixels and padded labels, one row per caption; returns the number of images."""
    from datasets import Dataset
    from PIL import Image

    from captioning import model

    rows = [(str(record.path), caption) for record in records(args) for caption in record.captions]
    tokenizer = model.train_tokenizer((caption for _, caption in rows), 5000)
    processor = model.load_image_processor(args.size)

    def transform(batch):
        pixels = [Image.open(path).convert("RGB") for path in batch["path"]]
        tokens = tokenizer(batch["caption"], padding="max_length", max_length=128, truncation=True)
        return {"pixel_values": processor(pixels, return_tensors="np").pixel_values, "labels": tokens["input_ids"]}

    dataset = Dataset.from_dict({"path": [path for path, _ in rows], "caption": [caption for _, caption in rows]})
    mapped = dataset.map(transform, batched=True, batch_size=64, remove_columns=["path", "caption"])
    mapped.save_to_disk(str(save_path))
    return len({path for path, _ in rows})


def measure_train(case: str, args: argparse.Namespace) -> dict:
    """Captions per second of forward, backward and update, the reading and resizing of images included."""
    import numpy as np
    import torch

    from captioning import batch, images
    from captioning.trainer import caption_loss

    bundle = build(args)
    net, device = bundle.model.train(), bundle.model.device
    pixels = batch.Pixels(bundle.image_processor)
    chosen = list(records(args))
    start, pad = net.config.decoder_start_token_id, bundle.tokenizer.pad_token_id

    def rows(number: int) -> list[dict]:
        first = number * IMAGES_PER_BATCH
        return [make_row(chosen[(first + i) % len(chosen)]) for i in range(IMAGES_PER_BATCH)]

    def make_row(record):
        labels, _ = batch.encode_captions(bundle.tokenizer, record.captions[:5], 64)
        return {"image_id": record.image_id, "pixels": decoded(record), "labels": labels}

    stored: dict[int, np.ndarray] = {}  # both recipes resize once, before training

    def decoded(record):
        if record.image_id not in stored:
            stored[record.image_id] = pixels(images.open_image(record.path, min_side=256))
        return stored[record.image_id]

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if case == "ours, cached":
        net.encoder.requires_grad_(False).eval()
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        features = {}
        with torch.inference_mode():
            for number in range(4):  # batches; the same four are trained on again and again, as epochs do
                x = pixels.normalise(torch.from_numpy(np.stack([row["pixels"] for row in rows(number)])).to(device))
                features[number] = net.encoder(pixel_values=x).last_hidden_state.to(torch.float16).clone()
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    collate = batch.Collator(start, pad, packed=case != "standard")
    half = torch.autocast(device.type, torch.bfloat16, enabled=case != "standard")

    def step(number: int) -> int:
        if case == "ours, cached":
            number %= 4
        data = {name: tensor.to(device) for name, tensor in collate(rows(number)).items()}
        if case == "standard":
            # Padded to 128, as the tokenizer does when it is told padding="max_length".
            width = 128 - data["labels"].shape[1]
            inputs = {
                "pixel_values": pixels.normalise(data["pixel_values"]),
                "decoder_input_ids": torch.nn.functional.pad(data["decoder_input_ids"], (0, width), value=pad),
            }
            labels = torch.nn.functional.pad(data["labels"], (0, width), value=-100)
        else:
            labels = data["labels"]
            inputs = {
                "decoder_input_ids": data["decoder_input_ids"],
                "decoder_position_ids": data["decoder_position_ids"],
                "decoder_attention_mask": batch.packed_attention_mask(data["segment_ids"]),
            }
            if case == "ours, cached":
                inputs["encoder_outputs"] = (features[number].float(),)
            else:
                inputs["pixel_values"] = pixels.normalise(data["pixel_values"])
        with half:
            logits = net(**inputs, use_cache=False).logits
        caption_loss(logits, labels, None).backward()
        optimiser.step()
        optimiser.zero_grad()
        return 5 * IMAGES_PER_BATCH

    return result({"captions/s": rate(step, args.seconds)})


def measure_infer(case: str, args: argparse.Namespace) -> dict:
    """Images per second, from files to captions, 4 beams."""
    import numpy as np
    import torch

    from captioning import batch, images, model

    bundle = build(args)
    bundle.model.eval()
    pixels = batch.Pixels(bundle.image_processor)
    paths = [record.path for record in records(args)]
    settings = {"num_beams": 4, "max_new_tokens": CAPTION_LENGTH, "min_new_tokens": CAPTION_LENGTH}
    size = 1 if case == "standard" else 16

    def step(number: int) -> int:
        some = [paths[(number * size + i) % len(paths)] for i in range(size)]
        if case == "standard":
            x = bundle.image_processor(images.open_image(some[0]), return_tensors="pt").pixel_values
            bundle.tokenizer.batch_decode(bundle.model.generate(x.to(bundle.model.device), **settings))
        else:
            stacked = np.stack([pixels(images.open_image(path, min_side=256)) for path in some])
            model.generate(bundle, pixels.normalise(torch.from_numpy(stacked).to(bundle.model.device)), **settings)
        return size

    with torch.inference_mode():
        return result({"images/s": rate(step, args.seconds)})


MEASURES = {"prepare": measure_prepare, "train": measure_train, "infer": measure_infer}

if __name__ == "__main__":
    main()
