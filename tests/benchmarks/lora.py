"""Adapters beside full fine-tuning: memory and updates a second for a decoder of gpt2-medium's size.

    OMP_NUM_THREADS=1 python tests/benchmarks/lora.py

The weights are random, of the shape of gpt2-medium (24 layers of 1,024, 50,257 tokens, 355 M parameters) and with a
cross-attention to 197 vectors of 384 numbers, as a cached ViT-S/16 gives them. It trains as train.py does, in bfloat16
where the processor multiplies in it, on random features with five captions of ten words an image. Each way has a
process of its own, whose peak memory is the kernel's figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}  # https://huggingface.co/openai-community/gpt2-medium
FEATURES = (197, 384)


def measure(rank: int, updates: int, batch: int) -> dict[str, float]:
    """One training, in this process."""
    import torch
    from precision import WORDS, Rows, timed
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, set_seed

    from captioning.model import captioner, lora, parts
    from captioning.model.fast import multiplies_in_bfloat16

    set_seed(0)
    tokenizer = parts.train_tokenizer([" ".join(WORDS)] * 3, 1000)
    settings = {**MEDIUM, **captioner.FASTER, "is_decoder": True, "add_cross_attention": True}
    with torch.device("meta"):  # the usual random numbers of a model of this size take a minute
        model = VisionEncoderDecoderModel(
            encoder=AutoModel.from_config(parts.preset_config("small")), decoder=GPT2LMHeadModel(GPT2Config(**settings))
        )
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.config.decoder_start_token_id = 0
    model.encoder.requires_grad_(False)
    if bfloat16 := multiplies_in_bfloat16():  # as train.py chooses
        model.set_attn_implementation("eager")
    if rank:
        lora.add(model, rank)
    model.encoder.pooler.requires_grad_(False)
    every, trained = captioner.count_parameters(model)
    bundle = captioner.Bundle(model, tokenizer, parts.load_image_processor("small"))
    seconds = timed(bundle, Rows(tokenizer, 224, FEATURES), updates, batch, bfloat16)
    state = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {
        "every": every / 1e6,
        "trained": trained / 1e6,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9,
        "learning": 3 * state / 1e9,  # a gradient and AdamW's two means of each number
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9,
        "seconds": statistics.median(seconds),
        "threads": torch.get_num_threads(),
        "bfloat16": bfloat16,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="*", type=int, default=[0, 8, 64], help="0: all of the decoder learns")
    parser.add_argument("--updates", type=int, default=6, help="of each run; the first two are not counted")
    parser.add_argument("--turns", type=int, default=2, help="runs of each rank")
    parser.add_argument("--batch", type=int, default=4, help="images an update")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(measure(args.rank, args.updates, args.batch)))
        return
    found: dict[int, list[dict]] = {rank: [] for rank in args.ranks}
    for _ in range(args.turns):
        for rank, runs in found.items():
            words = [f"--rank={rank}", f"--updates={args.updates}", f"--batch={args.batch}"]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(rank, runs[-1], file=sys.stderr, flush=True)
    print(
        "| | M trained | weights | gradients, optimiser | peak | processor s/update |\n|---|---:|---:|---:|---:|---:|"
    )
    for rank, runs in found.items():
        one, seconds = runs[0], statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak"] for run in runs)
        print(
            f"| {f'rank {rank}' if rank else 'all'} | {one['trained']:.1f} of {one['every']:.1f} | "
            f"{one['weights']:.2f} GB | {one['learning']:.2f} GB | {peak:.2f} GB | {seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
