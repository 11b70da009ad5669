"""Stage 2: fine-tune a vision encoder and a GPT-2 decoder into an image captioner.

    python train.py --data_path ./processed_data --epochs 10                    # one GPU, or the CPU
    accelerate launch --multi_gpu train.py --data_path ./processed_data         # every GPU of the machine
    accelerate launch --num_processes 2 --cpu train.py --data_path ./processed_data
    python train.py --encoder tiny --decoder tiny --epochs 22    # random weights, for a try

Writes the run folder: model, tokenizer, image processor, checkpoints, results.json, predictions_test.json,
report.html, training_curves.png, gallery.png, README.md. The table of test scores goes to stdout.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.files import only_process
from captioning.training import resilience

# Our defaults where they differ from those of Seq2SeqTrainingArguments.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "label_smoothing_factor": 0.1,
    "logging_steps": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "cider_d",
    "predict_with_generate": True,
    "remove_unused_columns": False,
    "report_to": "none",
    # Otherwise decided by transformers' log level, which is at errors only.
    "disable_tqdm": False,
    # Rank 0 computes cached features while the others wait.
    "ddp_timeout": 7200,
    # A loss that is not a number is to be seen, not logged as zero.
    "logging_nan_inf_filter": False,
    "seed": 0,
}

# Flags of Seq2SeqTrainingArguments, the least that each can be, and what it has to stay below.
LIMITS = (
    ("per_device_train_batch_size", 1, math.inf),
    ("per_device_eval_batch_size", 1, math.inf),
    ("gradient_accumulation_steps", 1, math.inf),
    ("generation_num_beams", 1, math.inf),
    ("generation_max_length", 1, math.inf),
    ("dataloader_num_workers", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("label_smoothing_factor", 0, 1),
    ("adam_beta1", 0, 1),
    ("adam_beta2", 0, 1),
    ("seed", 0, 2**32),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data_path DATA_PATH] [--output_dir OUTPUT_DIR] [flags]",
        description="Train an image captioner on a folder that dataloader.py wrote.",
        epilog="Every flag of transformers.Seq2SeqTrainingArguments works too (--learning_rate, --lr_scheduler_type, "
        "--adam_beta1, --bf16, --per_device_train_batch_size, --gradient_accumulation_steps, "
        "--label_smoothing_factor, --report_to, ...): see --help_all.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data and output")
    data.add_argument("--data_path", type=Path, default=Path("processed_data"), help="what dataloader.py wrote")
    data.add_argument("--output_dir", type=Path, default=Path("vit-gpt2-coco"), help="the run folder to write")
    data.add_argument("--epochs", type=float, help="passes over the training images (default: 10)")
    data.add_argument(
        "--resume_from_checkpoint",
        metavar="DIR",
        help="continue from this checkpoint; auto: from the newest whole one",
    )
    parts = parser.add_argument_group("model")
    parts.add_argument("--encoder", help="a preset (tiny, small, base), folder or hub id (default: as in the data)")
    parts.add_argument("--decoder", help="a preset (tiny, small, base), folder or hub id (default: as in the data)")
    parts.add_argument("--model_path", metavar="DIR", help="start from the captioner in this run folder")
    parts.add_argument(
        "--freeze_encoder",
        nargs="?",
        type=float,
        const=math.inf,
        default=0,
        metavar="EPOCHS",
        help="keep the encoder as it is, or do so for the first EPOCHS",
    )
    parts.add_argument(
        "--cross_attention_epochs",
        type=float,
        default=0,
        metavar="N",
        help="in the first N epochs train the cross-attention only (default: 0)",
    )
    parts.add_argument(
        "--cache_features",
        action="store_true",
        help="with --freeze_encoder: keep the encoder's output in DATA_PATH/.features",
    )
    parts.add_argument(
        "--augment",
        nargs="?",
        type=int,
        const=2,
        default=0,
        metavar="VARIANTS",
        help="a random crop, colours and mirroring of each image anew in every epoch; with --cache_features, so many "
        "variants in turn, the image as it is included (default: off; 2 where no number follows)",
    )
    parts.add_argument(
        "--dropout",
        type=float,
        metavar="RATE",
        help="of the decoder (default: its own, 0.1 for GPT-2)",
    )
    rates = parser.add_argument_group("learning rates (--learning_rate is for parts that start from random weights)")
    for part, default in (("encoder", "2e-5"), ("decoder", "1e-4"), ("cross_attention", "1e-4")):
        help_text = f"of the {part.replace('_', '-')} when it is pretrained (default: {default})"
        rates.add_argument(f"--{part}_lr", type=float, metavar="RATE", help=help_text)
    rest = parser.add_argument_group("other")
    rest.add_argument(
        "--self_critical_epochs",
        type=float,
        default=0,
        metavar="N",
        help="the last N epochs maximise CIDEr-D on sampled captions (default: 0)",
    )
    rates.add_argument(
        "--self_critical_lr",
        type=float,
        default=1e-4,
        metavar="RATE",
        help="of every part in those epochs, at most (default: 1e-4)",
    )
    rest.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="all captions of an image in one decoder sequence: the same loss, several times faster (default: on)",
    )
    rest.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop when N evaluations in a row were not better than the best one (default: train to the end)",
    )
    rest.add_argument("--help_all", action="store_true", help="show every flag of Seq2SeqTrainingArguments as well")
    rest.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def training_argument_types() -> dict[str, str]:
    """Names and annotations of the Trainer's flags, read from its source: importing it takes seconds.

    A misspelt flag is so reported at once.
    """
    package = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    fields = {}
    for file in ("training_args.py", "training_args_seq2seq.py"):
        for node in ast.parse((package / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                        fields[statement.target.id] = ast.unparse(statement.annotation)
    return fields


def check_rest(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Refuse flags that nobody knows and numbers that are none, before anything heavy is imported."""
    types = training_argument_types()
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {f"--{name}" for name in types} | {f"--no_{name}" for name in types if types[name].startswith("bool")}
    for position, word in enumerate(rest):
        if not word.startswith("--"):
            continue
        option, _, value = word.partition("=")
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help_all lists every flag"
            parser.error(f"unknown flag {option}{hint}")
        if not value and position + 1 < len(rest) and not rest[position + 1].startswith("--"):
            value = rest[position + 1]
        kind = types.get(option.removeprefix("--"), "").split(" | ")[0]
        if kind in ("int", "float") and value:
            try:
                int(value) if kind == "int" else float(value)
            except ValueError:
                parser.error(f"{option} takes {'an integer' if kind == 'int' else 'a number'}, not '{value}'")


def missing_cpu_processes() -> int:
    """How many processes `accelerate launch --cpu --num_processes N` was asked for and left to MPI to start.

    Without MPI it starts one, and tells it of the others by MASTER_ADDR only; N stands on its command line.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if not asked or {"RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):
        return 0
    import psutil  # accelerate needs it too

    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--num_processes", "--num-processes", type=int, default=0)
    try:
        return finder.parse_known_args(psutil.Process(os.getppid()).cmdline())[0].num_processes
    except psutil.Error:
        return 0


def parse_arguments(argv: list[str] | None):
    """Our flags, and the Trainer's arguments made of the other flags and our defaults."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if not args.help_all:
        check_rest(parser, rest)
        if args.cache_features and args.freeze_encoder != math.inf:
            parser.error("--cache_features needs --freeze_encoder: features of a moving encoder cannot be kept")
        if args.augment and (args.augment < 0 or (args.augment < 2 and args.cache_features)):
            parser.error(f"--augment {args.augment} is below 2 variants of each image")
        for flag in ("freeze_encoder", "cross_attention_epochs", "self_critical_epochs"):
            if getattr(args, flag) < 0:
                parser.error(f"--{flag} {getattr(args, flag):g} is below 0")
        if args.self_critical_epochs and not args.packing:
            parser.error("--self_critical_epochs needs packing: leave --no-packing out")
        if not 0 < args.self_critical_lr < math.inf:
            parser.error(f"--self_critical_lr {args.self_critical_lr:g} is not above 0 and finite")
        if args.dropout is not None and not 0 <= args.dropout < 1:
            parser.error(f"--dropout {args.dropout:g} is not between 0 and 1")
        given = {word.split("=")[0] for word in rest}
        if args.epochs is not None and given & {"--num_train_epochs", "--max_steps"}:
            parser.error("--epochs and --num_train_epochs or --max_steps say two things; give one of them")
        if args.patience is not None and args.patience < 1:
            parser.error(f"--patience {args.patience} is below 1")
        if args.epochs is not None and not 0 < args.epochs < math.inf:
            parser.error(f"--epochs {args.epochs:g} is not above 0 and finite")
        if args.output_dir.exists() and not args.output_dir.is_dir():
            parser.error(f"--output_dir '{args.output_dir}' is a file; name a folder")
        if any(folder.is_file() for folder in args.output_dir.absolute().parents):
            parser.error(f"--output_dir '{args.output_dir}' lies below a file; name another folder")
        find_checkpoint(args)
        if not (args.data_path / "dataset.json").is_file():
            parser.error(f"--data_path '{args.data_path}' is not a folder of dataloader.py; did you run it?")
        if args.resume_from_checkpoint is None and any(args.output_dir.glob("checkpoint-*")):
            parser.error(
                f"--output_dir '{args.output_dir}' holds checkpoints of an earlier run; continue it with "
                "--resume_from_checkpoint auto, remove the folder, or name another"
            )

        if processes := missing_cpu_processes():
            cli.note(f"starting {processes} CPU processes with torch.distributed.run")
            words = sys.argv[1:] if argv is None else argv
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            os.execv(sys.executable, [sys.executable, *launcher, str(Path(__file__).resolve()), *words])

    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

    from captioning.model import parts

    parts.quiet_transformers()
    trainer_parser = HfArgumentParser(Seq2SeqTrainingArguments, allow_abbrev=False, prog=parser.prog)
    trainer_parser.set_defaults(**DEFAULTS)
    if args.help_all:
        parser.print_help()
        trainer_parser.print_help()
        sys.exit(0)
    own = [f"--output_dir={args.output_dir}"]
    if not given & {"--num_train_epochs", "--max_steps"}:
        own.append(f"--num_train_epochs={10 if args.epochs is None else args.epochs}")
    defaults = device_defaults()
    defaults["bf16"] &= not given & {"--fp16", "--use_cpu"}
    trainer_parser.set_defaults(**defaults)
    trainer_parser.error = parser.error
    try:
        training, unused = trainer_parser.parse_args_into_dataclasses([*own, *rest], return_remaining_strings=True)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(str(error).strip().splitlines()[0]) from error
    if unused:
        raise InputError(f"'{unused[0]}' belongs to no flag")
    check_training(training)
    if args.patience and training.eval_strategy == "no":
        raise InputError("--patience needs evaluations: leave it or --eval_strategy no out")
    return args, training


def check_training(training) -> None:
    """Refuse what the Trainer would accept and stumble over later, and set what follows from other flags."""
    for flag, must in (
        ("predict_with_generate", True),
        ("remove_unused_columns", False),
        ("eval_do_concat_batches", True),
        ("batch_eval_metrics", False),
        ("dataloader_drop_last", False),
    ):
        if getattr(training, flag) != must:
            raise InputError(f"--{flag} {not must} cannot work here: every image is captioned and scored; leave it out")
    for flag, least, limit in LIMITS:
        value = getattr(training, flag)
        if value is not None and not least <= value < limit:
            reason = f"below {least}" if value < least else f"not between {least} and {limit}"
            raise InputError(f"--{flag} {value} is {reason}")
    if training.max_steps < 1 and training.max_steps != -1:
        raise InputError(f"--max_steps {training.max_steps} is below 1")
    for flag in ("learning_rate", "num_train_epochs"):
        if not 0 < getattr(training, flag) < math.inf:
            raise InputError(f"--{flag} {getattr(training, flag):g} is not above 0 and finite")
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in SCORES:
        raise InputError(f"--metric_for_best_model '{metric}' is not a score; choose from {', '.join(SCORES)}")
    for tracker in training.report_to:
        if tracker in ("tensorboard", "wandb", "mlflow") and importlib.util.find_spec(tracker) is None:
            raise InputError(f"--report_to {tracker} needs that package: pip install {tracker}")
    if training.dataloader_num_workers == 0:
        training.dataloader_persistent_workers = False
    if training.n_gpu > 1:
        # torch's DataParallel, which the Trainer would use, copies the model at every step.
        cli.note(f"{training.n_gpu} GPUs are here, one is used; 'accelerate launch --multi_gpu train.py' uses all")
        training._n_gpu = 1


def device_defaults() -> dict[str, Any]:
    """What depends on the machine: half precision and the number of data workers."""
    import torch

    # On a CPU, bfloat16 pays only where the processor multiplies in it.
    processor = torch.cpu.get_capabilities()
    half_on_cpu = bool(processor.get("amx_bf16") or processor.get("avx512_bf16"))
    forced_to_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # accelerate launch --cpu
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, min(8, (os.cpu_count() or 1) // (2 * processes)))
    on_cuda = torch.cuda.is_available() and not forced_to_cpu
    on_cpu = forced_to_cpu or not torch.accelerator.is_available()
    return {
        # Said aloud, because the Trainer takes bfloat16 for a GPU's otherwise.
        "use_cpu": on_cpu,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else on_cpu and half_on_cpu,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": on_cuda,
    }


def check_tokenizer(args: argparse.Namespace, tokenizer, description: dict[str, Any]) -> None:
    """A pretrained decoder only understands its own token ids."""
    from captioning.model import parts

    if args.decoder in parts.DECODER_PRESETS or args.decoder == description["decoder"]:
        return
    theirs = parts.load_tokenizer(args.decoder)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"--decoder '{args.decoder}' has another tokenizer than the data in '{args.data_path}', which was made "
            f"for '{description['decoder']}'; run dataloader.py with --decoder '{args.decoder}'"
        )


def learning_rates(args: argparse.Namespace, training, net, new: set[str]) -> dict[str, float]:
    """By part: its own flag, else the base rate where it starts from random weights, else a gentle one."""
    from captioning.model.captioner import PARTS, part_of

    gentle = {"encoder": 2e-5, "decoder": 1e-4, "cross_attention": 1e-4}
    fresh = {part_of(name) for name, _ in net.named_parameters() if name in new}
    rates = {}
    for part in PARTS:
        own = getattr(args, f"{part}_lr")
        if own is not None and not 0 < own < math.inf:
            raise InputError(f"--{part}_lr {own:g} is not above 0 and finite")
        rates[part] = own or (training.learning_rate if part in fresh else gentle[part])
    return rates


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to continue from, None to start anew."""
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() in ("auto", "true"):
        return resilience.newest_checkpoint(args.output_dir)
    if reason := resilience.damage(Path(asked)):
        raise InputError(
            f"--resume_from_checkpoint '{asked}' is not a whole checkpoint folder: {reason}; name another "
            "checkpoint-*, or auto for the newest whole one"
        )
    return Path(asked)


def main(argv: list[str] | None = None) -> int:
    args, training = parse_arguments(argv)
    with resilience.explained(training), resilience.stoppable(training), only_run_in(args.output_dir, training):
        return train(args, training)


@contextlib.contextmanager
def only_run_in(folder: Path, training) -> Iterator[None]:
    """The run folder for this run alone."""
    if training.process_index:  # the first process holds it for all
        yield
        return
    with only_process(folder / ".lock") as alone:
        if not alone:
            raise InputError(f"--output_dir '{folder}' belongs to a training that is running; name another folder")
        yield


def train(args: argparse.Namespace, training) -> int:
    """Everything between the arguments and the run folder."""
    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers import EarlyStoppingCallback, set_seed

    from captioning.data import folder
    from captioning.model import captioner, parts
    from captioning.model.packing import can_pack
    from captioning.scores.reward import CiderReward
    from captioning.show import run_folder
    from captioning.training import batches
    from captioning.training.features import cached_features
    from captioning.training.self_critical import SelfCritical
    from captioning.training.trainer import CaptionTrainer

    say = cli.note if training.process_index == 0 else lambda _: None

    # Data
    disable_progress_bar()
    splits, description = folder.load_prepared(args.data_path)
    tokenizer = parts.load_tokenizer(args.data_path, "--data_path")
    args.encoder = args.encoder or description["encoder"]
    args.decoder = args.decoder or description["decoder"]
    same_encoder = args.encoder == description["encoder"]
    if same_encoder:
        image_processor = parts.load_image_processor(args.data_path, "--data_path")
    else:
        image_processor = parts.load_image_processor(args.encoder, whole=not description.get("center_crop"))
    check_tokenizer(args, tokenizer, description)
    pixels = parts.Pixels(image_processor)
    datasets = {
        split: batches.CaptionDataset(rows, pixels, split == "train" and args.augment > 0, training.seed)
        for split, rows in splits.items()
    }
    references = {
        image_id: captions
        for split in ("validation", "test")
        for image_id, captions in zip(splits[split]["image_id"], splits[split]["captions"], strict=True)
    }
    say(
        f"data: {args.data_path}, "
        + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
        + f" images; {description['source']}"
    )

    # Model
    set_seed(training.seed)
    if args.model_path:
        net, new = captioner.load(args.model_path).model, set()
    else:
        net = captioner.build(args.encoder, args.decoder, tokenizer)
        new = captioner.new_parameters(net, args.encoder, args.decoder)
    if args.dropout is not None:
        captioner.set_dropout(net, args.dropout)
    frozen = args.freeze_encoder >= training.num_train_epochs
    if frozen:
        net.encoder.requires_grad_(False)
    positions = net.decoder.config.max_position_embeddings
    longest = highest = 0
    for labels in (labels for rows in splits.values() for captions in rows["labels"] for labels in captions):
        longest, highest = max(longest, len(labels)), max(highest, *labels)
    if highest >= len(tokenizer):
        raise InputError(
            f"--data_path '{args.data_path}' was made for another tokenizer than lies in it: its labels hold token "
            f"{highest}, and the tokenizer has {len(tokenizer)} tokens; run dataloader.py again"
        )
    generated = training.generation_max_length or net.generation_config.max_new_tokens
    if max(longest, generated + 1) > positions:
        raise InputError(
            f"--decoder '{args.decoder}' has {positions} positions, and the longest caption {longest} tokens "
            f"({generated} are generated at most); run dataloader.py with a smaller --max_length"
        )
    # What the captions are scored with is what the model is saved with.
    if training.generation_num_beams:
        net.generation_config.num_beams = training.generation_num_beams
    if training.generation_max_length:
        net.generation_config.max_new_tokens = training.generation_max_length
    bundle = captioner.Bundle(net, tokenizer, image_processor)
    rates = learning_rates(args, training, net, new)
    every, trained = captioner.count_parameters(net)
    say(f"model: {args.encoder} -> {args.decoder}, {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained")
    used = {part: rate for part, rate in rates.items() if not (part == "encoder" and frozen)}
    say("learning rates: " + ", ".join(f"{part} {rate:g}" for part, rate in used.items()))

    precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    if training.device.type == "cpu" and training.bf16:
        # There torch's fused attention is two to five times slower than plain matrix products.
        net.set_attn_implementation("eager")

    if args.cache_features:
        net.to(training.device)
        for split, dataset in datasets.items():
            folder, variants = args.data_path / ".features", range(args.augment if dataset.augment else 1)
            with training.main_process_first(desc="features"):
                dataset.features = [
                    cached_features(
                        bundle, dataset, folder, split, training.per_device_eval_batch_size, say, variant, precision
                    )
                    for variant in variants
                ]

    # Training
    if args.packing and not can_pack(net):
        if args.self_critical_epochs:
            raise InputError(f"--self_critical_epochs needs packing, which --decoder '{args.decoder}' cannot do")
        args.packing = False
        say(f"packing: off, because the decoder '{args.decoder}' does not keep packed captions apart")
    images = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    say(
        f"device: {training.device}, {training.world_size} process(es), {str(precision).removeprefix('torch.')}; "
        f"{images} images per update, {training.dataloader_num_workers} data worker(s) each; "
        f"captions {'packed per image' if args.packing else 'one per row'}"
    )
    if args.packing and training.train_sampling_strategy == "group_by_length":
        sampler = batches.LengthSampler(datasets["train"].lengths(), training.train_batch_size, training.seed)
        say(f"padding: {sampler.padding():.1%} of the decoder's positions, sorting within {sampler.window} batches")
    self_critical = None
    if args.self_critical_epochs:
        train_rows = splits["train"]
        captions = dict(zip(train_rows["image_id"], train_rows["captions"], strict=True))
        self_critical = SelfCritical(args.self_critical_epochs, CiderReward(captions), args.self_critical_lr)
    start = net.config.decoder_start_token_id
    trainer = CaptionTrainer(
        bundle,
        references,
        rates,
        {"encoder": max(args.freeze_encoder, args.cross_attention_epochs), "decoder": args.cross_attention_epochs},
        self_critical,
        args=training,
        data_collator=batches.Collator(start, tokenizer.pad_token_id, args.packing),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
    )
    if args.patience:
        trainer.add_callback(EarlyStoppingCallback(args.patience))
    checkpoint = find_checkpoint(args)
    if args.resume_from_checkpoint:
        say(
            f"going on from {checkpoint}"
            if checkpoint
            else f"no whole checkpoint in '{args.output_dir}': starting anew"
        )
    trained = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.images:
        say(speed(trainer, trained.metrics["train_runtime"]))
    if trainer.is_world_process_zero():
        captioner.save(bundle, args.output_dir)  # before any evaluation in half precision rounds the weights

    # Scores of the checkpoint that is kept. The test split is seen here, once.
    best = training.load_best_model_at_end and trainer.state.best_model_checkpoint
    kept = trainer.state.best_global_step if best else None
    validation = evaluation_at(kept, trainer.state) if kept else strip(trainer.evaluate(), "eval_")
    test = strip(trainer.predict(datasets["test"]).metrics, "test_")
    if trainer.is_world_process_zero():
        # Epochs, or true for all of them: infinity is no JSON.
        names = {"encoder": args.encoder, "decoder": args.decoder, "freeze_encoder": frozen or args.freeze_encoder}
        recipe = {flag: getattr(args, flag) for flag in RECIPE}
        run = run_folder.Run(
            predictions=trainer.predictions,
            validation=validation,
            test=test,
            log_history=trainer.state.log_history,
            steps=trainer.state.global_step,
            kept=kept,
            names=names,
            recipe=recipe,
            learning_rates=trainer.learning_rates,
            settings=training.to_sanitized_dict(),
            decoding=net.generation_config.to_diff_dict(),
            description=description,
            tensorboard=run_folder.tensorboard_log(trainer.callback_handler.callbacks),
        )
        run_folder.write(args.output_dir, run, splits["test"])
        print(table(validation, test))
        say(f"written to {args.output_dir}; next: python inference.py --model_path {args.output_dir} --image_path ...")
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
    return 0


# Flags of ours that results.json tells besides the Trainer's, the encoder and the decoder.
RECIPE = (
    "model_path",
    "cross_attention_epochs",
    "cache_features",
    "augment",
    "dropout",
    "packing",
    "self_critical_epochs",
    "self_critical_lr",
    "patience",
)
SCORES = (
    "loss",
    "bleu_1",
    "bleu_2",
    "bleu_3",
    "bleu_4",
    "rouge_l",
    "cider_d",
    "rouge_1",
    "rouge_2",
    "rouge_lsum",
)


def strip(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name: metrics[prefix + name] for name in SCORES if prefix + name in metrics}


def evaluation_at(step: int, state) -> dict[str, float]:
    """The validation scores of a step, as they were logged."""
    return next(strip(entry, "eval_") for entry in state.log_history if entry["step"] == step and "eval_loss" in entry)


def table(validation: dict[str, float], test: dict[str, float]) -> str:
    lines = [f"{'':<12}{'validation':>12}{'test':>10}"]
    lines += [f"{name:<12}{validation[name]:>12.4f}{test[name]:>10.4f}" for name in SCORES]
    return "\n".join(lines)


def speed(trainer, seconds: float) -> str:
    """One line on what a training of `seconds` did, evaluations counted apart."""
    from captioning.training.progress import peak_memory

    seconds -= trainer.evaluated
    images = trainer.images * trainer.args.world_size
    line = f"trained on {images:,} images in {seconds:,.0f} s: {images / seconds:.1f} images/s"
    line += f", {int(trainer.captions) * trainer.args.world_size / seconds:.1f} captions/s"
    line += f"; {trainer.waited / seconds:.1%} of that waiting for data; evaluations {trainer.evaluated:,.0f} s"
    peak = peak_memory(trainer.args.device)
    return line + (f"; peak memory {peak / 1e9:.1f} GB" if peak else "")


if __name__ == "__main__":
    cli.run(main)
