"""What each mistake of the usual recipe takes, and what each ingredient of ours gives: one change at a time.

    python tests/benchmarks/ablate.py mistakes --data_path karpathy -- --epochs 10
    python tests/benchmarks/ablate.py ingredients --data_path flickr --train_images 2000 --seeds 0 1 -- --epochs 12
    python tests/benchmarks/ablate.py ingredients --only "default" "batches of 64 images" --data_path flickr
    python tests/benchmarks/ablate.py decoding --data_path flickr --model_path run-flickr

Every row of `mistakes` and `ingredients` is a training by train.py with a frozen encoder and cached features; what
follows `--` goes to all of them. Mistakes are made on the training captions alone: losses and scores are measured in
the same way for every row. A row whose results lie in --output_dir already is not trained again. Prints a Markdown
table, of what is there so far with --table. Checkpoints are chosen on validation; the test split is scored once per
training. `decoding` captions the validation split of a trained captioner in several ways.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@dataclass
class Row:
    """A training that differs from the default by `arguments` of train.py, by `patches` made before it, or by both."""

    arguments: tuple[str, ...] = ()
    patches: tuple[Callable[[], None], ...] = ()


# ---- mistakes


def labels_become(change: Callable[[list[list[int]]], list[list[int]]]) -> None:
    """Change the training captions' token ids (those of an image at a time), and no others."""
    from captioning.training.trainer import CaptionTrainer

    original = CaptionTrainer.__init__

    def changed(self, *args, **kwargs):
        split = kwargs["train_dataset"].split
        labels = [change(split.labels(index)) for index in range(len(split))]
        split.labels = labels.__getitem__
        split.lengths = lambda: [sum(map(len, captions)) for captions in labels]
        original(self, *args, **kwargs)

    CaptionTrainer.__init__ = changed  # type: ignore[method-assign]


def batches_become(change: Callable[[Any, dict], dict]) -> None:
    """Change the training batches, those of evaluations not; `change` is given the trainer and a batch."""
    from captioning.training.trainer import CaptionTrainer

    original = CaptionTrainer.compute_loss

    def changed(self, model, inputs, *args, **kwargs):
        return original(self, model, change(self, inputs), *args, **kwargs)

    CaptionTrainer.compute_loss = changed  # type: ignore[method-assign]


def end_masked() -> None:
    """The end has the id of the padding, and is masked with it: it is never a target."""
    labels_become(lambda captions: [caption[:-1] for caption in captions])


def padding_unmasked() -> None:
    """Captions are padded to 64 tokens, and the padding is learnt as if it were words."""
    labels_become(lambda captions: [caption + caption[-1:] * (64 - len(caption)) for caption in captions])


def first_caption_only() -> None:
    labels_become(lambda captions: captions[:1])


def cut_short(tokens: int = 20) -> Callable[[], None]:
    """Longer captions lose what follows, their end included."""
    return lambda: labels_become(lambda captions: [caption[:tokens] for caption in captions])


def shifted_twice() -> None:
    """The target of each position is the token after the next one, as in transformers 4.50 to 4.5x."""
    from captioning.model.packing import IGNORED

    def change(trainer, inputs):
        labels, segments = inputs["labels"], inputs["segment_ids"]
        following = labels.roll(-1, 1).masked_fill(segments.roll(-1, 1) != segments, IGNORED)
        following[:, -1] = IGNORED
        positions = (following.flatten() != IGNORED).nonzero().flatten()
        return {**inputs, "labels": following, "label_positions": positions}

    batches_become(change)


# What people copy leaves the learning rate, its warm-up and the schedule at the Trainer's defaults.
TRAINERS_RATE = ("--learning_rate", "5e-5")
NO_WARM_UP = ("--warmup_steps", "0", "--lr_scheduler_type", "linear")
CAP = ("--generation_max_length", "20")

MISTAKES = {
    "default": Row(),
    "labels shifted twice": Row(patches=(shifted_twice,)),
    "end masked": Row(patches=(end_masked,)),
    "padding unmasked": Row(patches=(padding_unmasked,)),
    "one caption of each image": Row(patches=(first_caption_only,)),
    "captions and generation cut at 20 tokens": Row(CAP, (cut_short(),)),
    "no warm-up, linear decay": Row(NO_WARM_UP),
    "one rate for all, the Trainer's 5e-5": Row(TRAINERS_RATE),
    "the last five together": Row(
        (*CAP, *NO_WARM_UP, *TRAINERS_RATE), (cut_short(), first_caption_only, padding_unmasked)
    ),
    "all of them": Row(
        (*CAP, *NO_WARM_UP, *TRAINERS_RATE), (cut_short(), first_caption_only, padding_unmasked, shifted_twice)
    ),
}


# ---- ingredients


def weight_average(decay: float) -> Callable[[], None]:
    """Evaluate and keep an exponential moving average of the weights instead of the weights."""

    def patch():
        import torch
        from transformers import TrainerCallback

        from captioning.training.trainer import CaptionTrainer

        class Average(TrainerCallback):
            def __init__(self, model):
                self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self.average = [weight.detach().clone() for weight in self.weights]

            def on_step_end(self, args, state, control, **kwargs):
                # A young average would hold the random weights for long.
                keep = min(decay, (1 + state.global_step) / (10 + state.global_step))
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 1 - keep)

            def swap(self):
                for weight, average in zip(self.weights, self.average, strict=True):
                    own = weight.detach().clone()
                    weight.data.copy_(average)
                    average.copy_(own)

        init, evaluate_and_save = CaptionTrainer.__init__, CaptionTrainer._maybe_log_save_evaluate

        def changed_init(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.average = Average(self.model)
            self.add_callback(self.average)

        def with_average(self, *args, **kwargs):
            self.average.swap()
            try:
                return evaluate_and_save(self, *args, **kwargs)
            finally:
                self.average.swap()

        CaptionTrainer.__init__, CaptionTrainer._maybe_log_save_evaluate = changed_init, with_average

    return patch


def one_caption_at_random() -> None:
    """An epoch shows one caption of each training image, not all of them."""
    import numpy as np

    from captioning.training.batches import CaptionDataset
    from captioning.training.trainer import CaptionTrainer

    class OneCaption(CaptionDataset):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            chosen = np.random.default_rng((self.seed, index)).integers(len(row["labels"]))
            return {**row, "labels": [row["labels"][chosen]]}

    original = CaptionTrainer.__init__

    def changed(self, *args, **kwargs):
        kwargs["train_dataset"].__class__ = OneCaption
        original(self, *args, **kwargs)

    CaptionTrainer.__init__ = changed  # type: ignore[method-assign]


def text_first(epochs: int) -> Callable[[], None]:
    """In so many first epochs the decoder sees nothing of the images: it learns the language of the captions alone."""

    def change(trainer, inputs):
        return {**inputs, "features": inputs["features"] * 0} if trainer.state.epoch < epochs else inputs

    return lambda: batches_become(change)


def patches_dropped(share: float) -> Callable[[], None]:
    """In training the decoder sees a random part of each image's patches (https://arxiv.org/abs/2208.07220)."""

    def change(trainer, inputs):
        import torch

        features = inputs["features"]
        count, tokens, width = features.shape
        kept = torch.rand(count, tokens).argsort(1)[:, : round(tokens * (1 - share)), None]
        return {**inputs, "features": features.gather(1, kept.expand(-1, -1, width))}

    return lambda: batches_become(change)


def preset(**settings) -> Callable[[], None]:
    """The decoder preset `small` with other sizes."""

    def patch():
        from captioning.model import parts

        parts.DECODER_PRESETS["small"].update(settings)

    return patch


INGREDIENTS = {
    "default": Row(),
    "no label smoothing": Row(("--label_smoothing_factor", "0")),
    "label smoothing 0.2": Row(("--label_smoothing_factor", "0.2")),
    "linear schedule": Row(("--lr_scheduler_type", "linear")),
    "learning rate 5e-4": Row(("--learning_rate", "5e-4")),
    "learning rate 2e-3": Row(("--learning_rate", "2e-3")),
    "batches of 32 images": Row(("--per_device_train_batch_size", "32")),
    "batches of 64 images": Row(("--per_device_train_batch_size", "64")),
    "batches in random order": Row(("--train_sampling_strategy", "random")),
    "AdamW betas 0.9, 0.999": Row(("--adam_beta2", "0.999")),
    "weight decay 0.1": Row(("--weight_decay", "0.1")),
    "no dropout": Row(("--dropout", "0")),
    "dropout 0.2": Row(("--dropout", "0.2")),
    "dropout 0.3": Row(("--dropout", "0.3")),
    "decoder of width 384": Row(patches=(preset(n_embd=384, n_head=6),)),
    "decoder of width 512": Row(patches=(preset(n_embd=512, n_head=8),)),
    "decoder of 6 layers": Row(patches=(preset(n_layer=6),)),
    "weight average 0.999": Row(patches=(weight_average(0.999),)),
    "one caption at random": Row(patches=(one_caption_at_random,)),
    "three of the epochs on text alone": Row(patches=(text_first(3),)),
    "half of the patches dropped": Row(patches=(patches_dropped(0.5),)),
    "two variants of each image": Row(("--augment", "2")),
    "four variants of each image": Row(("--augment", "4")),
    "cross-attention alone for two of the epochs": Row(("--cross_attention_epochs", "2")),
    "self-critical for the last quarter": Row(("--self_critical_epochs", "3")),
}
GROUPS = {"mistakes": MISTAKES, "ingredients": INGREDIENTS}


# ---- decoding

DECODINGS: tuple[dict[str, Any], ...] = (
    *({"num_beams": beams} for beams in (1, 2, 3, 4, 5, 8)),
    *({"num_beams": 3, "length_penalty": penalty} for penalty in (0.0, 0.5, 1.5, 2.0)),
    {"num_beams": 3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 3},
    {"num_beams": 3, "repetition_penalty": 1.2},
)


def compare_decodings(args: argparse.Namespace) -> None:
    """Print the validation scores of one captioner under each of DECODINGS."""
    import torch
    from tqdm import tqdm

    from captioning.data import folder
    from captioning.model import captioner, generate, parts
    from captioning.scores import metrics
    from captioning.training import arguments, batches

    parts.quiet_transformers()
    bundle = captioner.load(args.model_path)
    rows = folder.load_prepared(args.data_path)[0]["validation"]
    references = rows.references
    pixels = parts.Pixels(bundle.image_processor)
    dataset = batches.CaptionDataset(rows, pixels)
    states = []
    half = arguments.device_defaults()["bf16"]  # as evaluations during training
    if half:
        bundle.model.set_attn_implementation("eager")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for start in tqdm(range(0, len(rows), 32), desc="encoder"):
            pictures = [torch.from_numpy(dataset.image(i)) for i in range(start, min(start + 32, len(rows)))]
            states.append(bundle.model.encoder(pixels.normalise(torch.stack(pictures))).last_hidden_state)
        print("| decoding | words | BLEU-4 | ROUGE-L | CIDEr-D |\n|---|---:|---:|---:|---:|")
        for settings in DECODINGS:
            captions = []
            for part in states:
                captions += generate.decode(bundle.tokenizer, generate.generate_tokens(bundle.model, part, **settings))
            scores = metrics.coco_scores(dict(zip(rows.image_id, captions, strict=True)), references, rouge=False)
            words = statistics.mean(len(caption.split()) for caption in captions)
            name = ", ".join(f"{key} {value}" for key, value in settings.items())
            cells = " | ".join(f"{scores[key]:.3f}" for key in ("bleu_4", "rouge_l", "cider_d"))
            print(f"| {name} | {words:.1f} | {cells} |", flush=True)


# ---- running and tabulating


def first_images(count: int) -> Callable[[], None]:
    """Train on so many images only."""

    def patch():
        from captioning.data import folder

        whole = folder.load_prepared

        def changed(folder):
            splits, description = whole(folder)
            splits["train"] = splits["train"].select(range(count))
            return splits, description

        folder.load_prepared = changed

    return patch


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("group", choices=(*GROUPS, "decoding"))
    parser.add_argument("--data_path", type=Path, required=True, help="what dataloader.py wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("ablations"), help="a folder for each training")
    parser.add_argument("--model_path", type=Path, default=Path("vit-gpt2-coco"), help="a run folder, for decoding")
    parser.add_argument("--train_images", type=int, metavar="N", help="train on the first N only (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows (default: all)")
    parser.add_argument("--table", action="store_true", help="train nothing; tabulate what is there")
    parser.add_argument("--one", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    if args.group == "decoding":
        compare_decodings(args)
        return
    rows = GROUPS[args.group]
    if args.one:
        train_one(rows[args.one], args, rest)
        return
    if unknown := set(args.only or ()) - set(rows):
        parser.error(f"--only '{unknown.pop()}' is not a row; choose from: {'; '.join(rows)}")
    chosen = args.only or list(rows)
    if not args.table:
        for seed in args.seeds:
            for name in chosen:
                run(name, seed, args, words)
    print(table({name: results(name, args) for name in chosen}))


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    return args.output_dir / f"{slug}-{seed}"


def run(name: str, seed: int, args: argparse.Namespace, words: list[str]) -> None:
    """Train a row in a process of its own: patches must not meet."""
    folder = folder_of(name, seed, args)
    if (folder / "results.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    own, rest = (words, []) if "--" not in words else (words[: words.index("--")], words[words.index("--") + 1 :])
    command = [sys.executable, __file__, *own, "--one", name, "--", f"--output_dir={folder}", f"--seed={seed}", *rest]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def train_one(row: Row, args: argparse.Namespace, rest: list[str]) -> None:
    import train
    from captioning import cli

    limit = (first_images(args.train_images),) if args.train_images else ()
    for patch in (*limit, *row.patches):
        patch()
    fixed = [f"--data_path={args.data_path}", "--freeze_encoder", "--cache_features"]
    cli.run(lambda: train.main([*fixed, *rest, *row.arguments]))


def results(name: str, args: argparse.Namespace) -> list[dict]:
    files = [folder_of(name, seed, args) / "results.json" for seed in args.seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


COLUMNS = (
    ("validation", "loss", "loss"),
    ("validation", "cider_d", "CIDEr-D"),
    ("test", "bleu_4", "test BLEU-4"),
    ("test", "rouge_2", "ROUGE-2"),
    ("test", "rouge_l", "ROUGE-L"),
    ("test", "cider_d", "CIDEr-D"),
)


def table(rows: dict[str, list[dict]]) -> str:
    """Means over the seeds; behind the validation CIDEr-D that chooses, each seed's own."""
    lines = [
        "| change | trainings | validation " + " | ".join(title for *_, title in COLUMNS) + " |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for name, trainings in rows.items():
        if not trainings:
            continue
        cells = []
        for split, key, _ in COLUMNS:
            values = [training[split][key] for training in trainings]
            cell = f"{statistics.mean(values):.3f}"
            if (split, key) == ("validation", "cider_d") and len(values) > 1:
                cell += " (" + ", ".join(f"{value:.3f}" for value in values) + ")"
            cells.append(cell)
        lines.append(f"| {name} | {len(trainings)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
