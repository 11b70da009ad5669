"""The flags of train.py: ours, and those of transformers' Trainer with our defaults.

    args, rest = read(argv)                     # ours, checked in a moment: nothing heavy is imported
    training = training_arguments(args, rest)   # a Seq2SeqTrainingArguments

Each of our flags is one field of `Arguments`, with its default, its unit, its help and, in `__post_init__`, its check.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError, cli
from captioning.cli import flag
from captioning.files import refuse_links
from captioning.training import config, flags, precision, resilience

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

DATA, MODEL, OTHER = "data and output", "model", "other"
RATES = "learning rates (--learning_rate is for parts that start from random weights)"


@dataclass(frozen=True)
class Arguments:
    """Our own flags.

    Raises:
        InputError: a value cannot be, or two flags exclude each other.
    """

    data_path: list[Path] = flag(
        [Path("processed_data")],
        DATA,
        "what dataloader.py wrote; several folders, or a pattern such as 'part-*', are the parts of --shard, read "
        "together",
        metavar="DIR",
    )
    output_dir: Path = flag(Path("vit-gpt2-coco"), DATA, "the run folder to write")
    epochs: float | None = flag(None, DATA, "passes over the training images (default: 10)")
    resume_from_checkpoint: str | None = flag(
        None, DATA, "continue from this checkpoint; auto: from the newest whole one", metavar="DIR"
    )

    encoder: list[str] | None = flag(
        None,
        MODEL,
        "a preset (mit, tiny, small, base), folder or hub id; or two, side by side (default: as in the data)",
        metavar="NAME",
    )
    decoder: str | None = flag(None, MODEL, "a preset (tiny, small, base), folder or hub id (default: as in the data)")
    model_path: str | None = flag(None, MODEL, "start from the captioner in this run folder", metavar="DIR")
    freeze_encoder: float = flag(
        0.0,
        MODEL,
        "keep the encoder as it is, or do so for the first EPOCHS (default: train it)",
        nargs="?",
        const=math.inf,
        metavar="EPOCHS",
    )
    cross_attention_epochs: float = flag(
        0.0, MODEL, "in the first N epochs train the cross-attention only (default: 0)", metavar="N"
    )
    cache_features: bool = flag(False, MODEL, "with --freeze_encoder: keep the encoder's output in DATA_PATH/.features")
    augment: int = flag(
        0,
        MODEL,
        "crop, colour and mirror each image at random, anew in each epoch; with --cache_features, make VARIANTS of "
        "each image, itself included, and show one per epoch in turn (default: off; VARIANTS is 2 if not given)",
        nargs="?",
        const=2,
        metavar="VARIANTS",
    )
    mirror: bool = flag(
        True,
        MODEL,
        "with --augment: mirror images too, unless a caption says left or right in one of the languages that "
        "captioning/training/directions.py lists; --no-mirror for others",
    )
    lora: int | None = flag(
        None,
        MODEL,
        "train adapters of this rank in the decoder, and its cross-attention (pip install peft; default: all of it)",
        metavar="RANK",
    )
    dropout: float | None = flag(None, MODEL, "of the decoder (default: its own, 0.1 for GPT-2)", metavar="RATE")

    encoder_lr: float | None = flag(None, RATES, "of the encoder when it is pretrained (default: 2e-5)", metavar="RATE")
    decoder_lr: float | None = flag(None, RATES, "of the decoder when it is pretrained (default: 1e-4)", metavar="RATE")
    cross_attention_lr: float | None = flag(
        None, RATES, "of a pretrained cross-attention (default: 1e-4)", metavar="RATE"
    )
    self_critical_lr: float = flag(
        1e-4, RATES, "of every part in self-critical epochs, at most (default: 1e-4)", metavar="RATE"
    )

    self_critical_epochs: float = flag(
        0.0, OTHER, "the last N epochs maximise CIDEr-D on sampled captions (default: 0)", metavar="N"
    )
    packing: bool = flag(
        True, OTHER, "all captions of an image in one decoder sequence: the same loss, several times faster"
    )
    patience: int | None = flag(
        None,
        OTHER,
        "stop when N evaluations in a row were not better than the best one (default: train to the end)",
        metavar="N",
    )
    config: Path | None = flag(
        None,
        OTHER,
        "take flags from this file, such as the config.yaml of a run folder, which repeats that run; flags of the "
        "command line come first",
        metavar="YAML",
    )
    help_all: bool = flag(False, OTHER, "show every flag of Seq2SeqTrainingArguments as well")
    debug: bool = cli.debug_flag()

    def __post_init__(self):
        if self.cache_features and self.freeze_encoder != math.inf:
            raise InputError("--cache_features needs --freeze_encoder: features of a moving encoder cannot be kept")
        if self.augment and (self.augment < 0 or (self.augment < 2 and self.cache_features)):
            raise InputError(f"--augment {self.augment} is below 2 variants of each image")
        if not self.mirror and not self.augment:
            raise InputError("--no-mirror has no use without --augment, which alone mirrors images; leave it out")
        cli.check_encoders(self.encoder or ())
        for name in ("encoder", "decoder"):
            if self.model_path and getattr(self, name):
                raise InputError(f"--model_path brings its own {name}: leave --{name} out")
        for name in ("freeze_encoder", "cross_attention_epochs", "self_critical_epochs"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name} {getattr(self, name):g} is below 0")
        if self.self_critical_epochs and not self.packing:
            raise InputError("--self_critical_epochs needs packing: leave --no-packing out")
        for name in ("epochs", "encoder_lr", "decoder_lr", "cross_attention_lr", "self_critical_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value:g} is not above 0 and finite")
        if self.lora is not None and self.lora < 1:
            raise InputError(f"--lora {self.lora} is below 1, the lowest rank of a matrix")
        if self.lora and importlib.util.find_spec("peft") is None:
            raise InputError("--lora needs peft, which is not installed: pip install peft")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout {self.dropout:g} is not between 0 and 1")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"--patience {self.patience} is below 1")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise InputError(f"--output_dir '{self.output_dir}' is a file; name a folder")
        if any(folder.is_file() for folder in self.output_dir.absolute().parents):
            raise InputError(f"--output_dir '{self.output_dir}' lies below a file; name another folder")
        refuse_links(self.output_dir, "--output_dir")
        checkpoint = self.checkpoint()
        for folder in self.folders():
            cache = folder / ".features"
            if self.cache_features and cache.is_symlink():
                raise InputError(f"'{cache}' is a link, and nothing is written through one; put a folder in its place")
            if self.cache_features:
                refuse_links(cache, "--data_path")
        self._refuse_another_run(checkpoint)

    def _refuse_another_run(self, checkpoint: Path | None) -> None:
        """Refuse an `--output_dir` in which this run would destroy another, or files that are no run's."""
        folder = self.output_dir
        if os.environ.get("RANK", "0") != "0":  # it writes nothing there
            return
        if checkpoint and checkpoint.resolve().parent == folder.resolve():
            return
        if not self._looks_for_one() and any(folder.glob("checkpoint-*")):
            raise InputError(
                f"--output_dir '{folder}' holds checkpoints of an earlier run; continue it with "
                "--resume_from_checkpoint auto, remove the folder, or name another"
            )
        there = next((name for name in FINISHED if (folder / name).exists()), None)
        if not there and (file := folder / "config.yaml").is_file() and not config.is_ours(file):
            there = file.name
        if there:
            raise InputError(
                f"--output_dir '{folder}' holds a {there}, which this run would replace; name another folder, or "
                "remove it"
            )

    def _looks_for_one(self) -> bool:
        """Whether `--resume_from_checkpoint` takes the newest checkpoint of `--output_dir`, if there is one."""
        return (self.resume_from_checkpoint or "").lower() in ("auto", "true")

    def folders(self) -> list[Path]:
        """The folders that `--data_path` names.

        Raises:
            InputError: one is no folder of dataloader.py.
        """
        return cli.prepared_folders(self.data_path)

    @property
    def data(self) -> str:
        """`--data_path` as it was given."""
        return " ".join(map(str, self.data_path))

    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from, None to start anew.

        Raises:
            InputError: the one that was named is not whole.
        """
        asked = self.resume_from_checkpoint
        if asked is None or asked.lower() == "false":
            return None
        if self._looks_for_one():
            return resilience.newest_checkpoint(self.output_dir)
        if reason := resilience.damage(Path(asked)):
            raise InputError(
                f"--resume_from_checkpoint '{asked}' is not a whole checkpoint folder: {reason}; name another "
                "checkpoint-*, or auto for the newest whole one"
            )
        return Path(asked)

    def recipe(self) -> dict[str, Any]:
        """The flags that results.json tells besides the Trainer's, the encoder, the decoder and the rates.

        Those that had no effect are left out.
        """
        told = ["model_path", "cross_attention_epochs", "cache_features", "augment", "lora", "dropout", "packing"]
        told += ["self_critical_epochs", "patience"]
        told += ["mirror"] if self.augment else []
        told += ["self_critical_lr"] if self.self_critical_epochs else []
        return {name: getattr(self, name) for name in told}


# What a run writes into its folder at its end.
FINISHED = ("model.safetensors", "config.json", "results.json", "README.md", "report.html")

# ---- the Trainer's flags

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
    # Parameters that no loss reaches are frozen: to look for them in each update takes time.
    "ddp_find_unused_parameters": False,
    # A loss that is not a number is to be seen, not logged as zero.
    "logging_nan_inf_filter": False,
    "seed": 0,
}


def read(argv: Sequence[str] | None) -> tuple[Arguments, list[str]]:
    """Our flags, and the words that are left for the Trainer's.

    Ends the process with exit code 2 where a flag is unknown or a value cannot be, before anything heavy is imported;
    and with 0 where help was asked for.
    """
    parser = cli.build_parser(
        Arguments,
        "Train an image captioner on a folder that dataloader.py wrote.",
        usage="%(prog)s [--data_path DATA_PATH] [--output_dir OUTPUT_DIR] [flags]",
        epilog="Every flag of transformers.Seq2SeqTrainingArguments works too (--learning_rate, --lr_scheduler_type, "
        "--adam_beta1, --bf16, --per_device_train_batch_size, --gradient_accumulation_steps, "
        "--label_smoothing_factor, --report_to, ...): see --help_all.",
    )
    words = sys.argv[1:] if argv is None else list(argv)
    if {"--help_all", "--help-all"} & set(words):
        print_every_flag(parser)
        sys.exit(0)
    kinds = training_argument_types()
    theirs = [f"--{name}" for name in kinds] + [f"--no_{name}" for name, kind in kinds.items() if kind == "bool"]
    try:
        ours = {field.name: field for field in dataclasses.fields(Arguments)}
        words = config.with_config(words, ours, kinds)
    except InputError as error:
        parser.error(str(error))
    args, rest = cli.parse_known(Arguments, parser, words, theirs)
    for option, value in values(rest).items():
        kind = kinds.get(option.removeprefix("--"))
        if kind in ("int", "float") and value:
            try:
                int(value) if kind == "int" else float(value)
            except ValueError:
                parser.error(f"{option} takes {'an integer' if kind == 'int' else 'a number'}, not '{value}'")
    if args.epochs is not None and values(rest).keys() & {"--num_train_epochs", "--max_steps"}:
        parser.error("--epochs and --num_train_epochs or --max_steps say two things; give one of them")
    return args, rest


def print_every_flag(parser: argparse.ArgumentParser) -> None:
    """Print our help, and that of the Trainer's flags with the defaults that they have on this machine."""
    parser.print_help()
    theirs = trainer_parser()
    theirs.set_defaults(**device_defaults(), num_train_epochs=10)
    ours = {action.dest for action in parser._actions}
    for action in theirs._actions:
        if action.dest in ours:
            action.help = argparse.SUPPRESS
    text = theirs.format_help()
    print("\nflags of transformers.Seq2SeqTrainingArguments:")
    print(text[text.index("  --") :], end="")


def values(words: Sequence[str]) -> dict[str, str]:
    """{option: its value, "" if it has none} of words such as `--bf16 --seed 3 --learning_rate=1e-4`."""
    found = {}
    for position, word in enumerate(words):
        if word.startswith("--"):
            option, _, value = word.partition("=")
            if not value and position + 1 < len(words) and not words[position + 1].startswith("--"):
                value = words[position + 1]
            found[option] = value
    return found


@functools.cache
def training_argument_types() -> dict[str, str]:
    """{name: annotation without `| None`} of the Trainer's flags, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    fields = {}
    for file in ("training_args.py", "training_args_seq2seq.py"):
        for node in ast.parse((package / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                        fields[statement.target.id] = ast.unparse(statement.annotation).split(" | ")[0]
    return fields


def trainer_parser():
    """The parser of the Trainer's flags, with our defaults."""
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments

    parser = HfArgumentParser(Seq2SeqTrainingArguments, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    return parser


def trainer_defaults() -> dict[str, Any]:
    """The defaults of the Trainer's flags: ours, where they differ from its own."""
    parser = trainer_parser()
    return {action.dest: parser.get_default(action.dest) for action in parser._actions}


def training_arguments(args: Arguments, rest: Sequence[str]) -> Seq2SeqTrainingArguments:
    """The Trainer's arguments: our defaults, those of this machine, and the words that `read` left.

    Raises:
        InputError: a value cannot be, or cannot work here.
    """
    given = values(rest)
    flags.refuse_words(given, os.environ)
    wish = precision.asked(given, os.environ)
    own = [f"--output_dir={args.output_dir}"]
    if not given.keys() & {"--num_train_epochs", "--max_steps"}:
        own.append(f"--num_train_epochs={10 if args.epochs is None else args.epochs}")
    defaults = device_defaults() | saving_defaults(given)
    on_cpu = "--use_cpu" in given and given["--use_cpu"].lower() in precision.YES
    if on_cpu:
        from captioning.model.fast import multiplies_in_bfloat16

        defaults |= {"bf16": multiplies_in_bfloat16(), "dataloader_pin_memory": False}
    if wish is not None:
        defaults |= {kind: kind == wish.kind for kind in ("bf16", "fp16")}
    parser = trainer_parser()
    parser.set_defaults(**defaults)
    parser.error = _refuse
    try:
        training, unused = parser.parse_args_into_dataclasses([*own, *rest], return_remaining_strings=True)
    except (ValueError, ImportError, RuntimeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if unused:
        raise InputError(f"'{unused[0]}' belongs to no flag")
    precision.refuse_float16(training, wish)
    flags.check(training, given)
    if args.lora and (training.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise InputError("--lora cannot learn with use_reentrant, which lets no gradient pass by frozen embeddings")
    if args.patience and training.eval_strategy == "no":
        raise InputError("--patience needs evaluations: leave it or --eval_strategy no out")
    for option, name in (("--eval_steps", "eval_strategy"), ("--save_steps", "save_strategy")):
        strategy = getattr(training, name)
        if option in given and strategy != "steps":
            raise InputError(f"{option} has no effect with --{name} {strategy.value}; leave one of the two out")
    if training.hub_token:
        # The library writes its arguments into each checkpoint and uploads them.
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    # What follows from other flags
    if training.dataloader_num_workers == 0:
        training.dataloader_persistent_workers = False
    if training.lr_scheduler_type.value in ("reduce_lr_on_plateau", "greedy"):
        # They watch the score that chooses the checkpoint. By default they wait for it to fall, as a loss does.
        mode = "max" if training.greater_is_better else "min"
        training.lr_scheduler_kwargs = {"mode": mode, **(training.lr_scheduler_kwargs or {})}
    if training.n_gpu > 1:
        # torch's DataParallel, which the Trainer would use, copies the model at every step.
        cli.note(f"{training.n_gpu} GPUs are here, one is used; 'accelerate launch --multi_gpu train.py' uses all")
        training._n_gpu = 1
    return training


def saving_defaults(given: Mapping[str, str]) -> dict[str, Any]:
    """When to evaluate and to save, where only part of it was said.

    The kept checkpoint is the one with the best evaluation, so that each checkpoint has its evaluation.

    Args:
        given: the Trainer's flags on the command line, with their values.
    """
    by_steps = given.get("--eval_steps") or given.get("--save_steps")
    evaluating = given.get("--eval_strategy", "steps" if "--eval_steps" in given else None)
    saving = given.get("--save_strategy", "steps" if "--save_steps" in given else None)
    if evaluating == "no" or saving == "no":
        return {
            "eval_strategy": evaluating or "epoch",
            "save_strategy": saving or "epoch",
            "load_best_model_at_end": False,
        }
    if not (evaluating or saving):
        return {}
    if not evaluating and saving == "best":  # which says what is saved, not when
        evaluating = "steps" if by_steps else "epoch"
    defaults: dict[str, Any] = {"eval_strategy": evaluating or saving, "save_strategy": saving or evaluating}
    if "steps" in defaults.values():
        steps = float(by_steps or 0.1)  # of all updates, where it is below 1
        defaults |= {"eval_steps": steps, "save_steps": steps}
    return defaults


def images_per_update(training: TrainingArguments) -> int:
    """Over all processes."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


@dataclass(frozen=True)
class Length:
    """How long a training is, in updates.

    Attributes:
        per_epoch: updates in a pass over the training images; the last one of a pass may hold fewer images.
        total: in all.
    """

    per_epoch: int
    total: int

    def updates(self, epochs: float) -> int:
        """The update that begins after so many epochs; `total` where that is at the end or beyond it."""
        return self.total if epochs == math.inf else min(self.total, round(epochs * self.per_epoch))


def length(training: TrainingArguments, images: int) -> Length:
    """The length of a training on so many images, however it was given: in epochs or in updates."""
    per_epoch = max(1, math.ceil(images / images_per_update(training)))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    return Length(per_epoch, total)


def _refuse(message: str):
    raise InputError(message)


def device_defaults() -> dict[str, Any]:
    """What depends on the machine: half precision and the number of data workers."""
    import torch

    from captioning.model.fast import bfloat16_pays

    forced_to_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"  # accelerate launch --cpu
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(1, min(8, (os.cpu_count() or 1) // (2 * processes)))
    on_cuda = torch.cuda.is_available() and not forced_to_cpu
    on_cpu = forced_to_cpu or not torch.accelerator.is_available()
    return {
        # Said aloud, because the Trainer takes bfloat16 for a GPU's otherwise.
        "use_cpu": on_cpu,
        "bf16": bfloat16_pays("cuda" if on_cuda else "cpu" if on_cpu else "another"),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": on_cuda,
    }


# ---- what accelerate's launcher was asked for


def start_missing_processes(script: str, argv: Sequence[str] | None) -> None:
    """Replace this process by torch's launcher where `accelerate launch` leaves the others to MPI. Otherwise return.

    On CPUs accelerate starts one process, and tells it of the others by MASTER_ADDR only. How many were asked for is
    read by accelerate's own parser, from its own command line and its config file, see `_launch`.

    Raises:
        InputError: several processes were asked for, and the process that did so did not start this one with these
            words.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if not asked or {"RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"} & set(os.environ):
        return
    launch = _launch()
    if launch is None:
        raise InputError(
            "accelerate was asked for several processes and starts one of them on CPUs, and does not say how many; "
            "start them with 'torchrun --nproc_per_node N train.py' instead"
        )
    machines, rank = int(launch("num_machines") or 1), int(launch("machine_rank") or 0)
    here = max(1, int(launch("num_processes") or 1) // machines)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={here}"]
    if machines > 1:
        address = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
        launcher += [f"--nnodes={machines}", f"--node_rank={rank}"]
        launcher += [f"--{name.lower()}={value}" for name, value in address.items()]
    else:
        launcher.append("--standalone")
    cli.note(f"starting {here} CPU processes with torch.distributed.run" + (f", machine {rank}" * (machines > 1)))
    words = sys.argv[1:] if argv is None else argv
    os.execv(sys.executable, [sys.executable, *launcher, str(Path(script).resolve()), *words])


def forget_what_nobody_asked() -> None:
    """Take a precision out of the environment that accelerate's launcher put there for want of an answer.

    It says "no" where neither its command line nor its config file names a precision. Then ours is the default.
    """
    if os.environ.get(precision.LAUNCHER, "").lower() != "no":
        return
    if (launch := _launch()) is not None and launch("mixed_precision") is None:
        del os.environ[precision.LAUNCHER]


def _launch() -> Callable[[str], Any] | None:
    """What `accelerate launch`, which started this process, was told: by its command line, else by its config file.

    Nothing is guessed: the parent's command line, as accelerate reads it, has to end with this process's own words.

    Returns:
        A function of a setting's name, whose value is None where nobody gave it; None where the parent is another.
    """
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    names = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    try:
        words = psutil.Process(os.getppid()).cmdline()
        begin = next(i for i, word in enumerate(words) if word.rpartition("/")[2] in names)
        if not any("accelerate" in word for word in words[: begin + 1]):
            return None
        args = launch_command_parser().parse_args(words[begin + 1 :])
    except (psutil.Error, StopIteration, SystemExit):
        return None
    if args.training_script_args != sys.argv[1:]:
        return None
    file = args.config_file or (default_config_file if Path(default_config_file).is_file() and not args.cpu else None)
    config = load_config_from_file(file) if file else None

    def setting(name: str) -> Any:
        given = getattr(args, name)
        return given if given is not None else getattr(config, name, None)

    return setting
