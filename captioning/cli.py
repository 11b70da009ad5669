"""What the three scripts share at the command line: flags, error messages, exit codes, one-line notes.

A script's flags are a dataclass. Each field is one flag, with its default, its unit and its help; `__post_init__`
checks them all, and raises InputError for what cannot be:

    @dataclass(frozen=True)
    class Arguments:
        limit_data: int = flag(2000, "which images", "images in all; 0: every image", metavar="N")
        debug: bool = debug_flag()

        def __post_init__(self):
            if self.limit_data < 0:
                raise InputError(f"--limit_data {self.limit_data} is negative; give a number of images, or 0 for all")

    args = parse(Arguments, argv, description="...")
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import gc
import glob
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from captioning import InputError
from captioning.files import is_full_disk

A = TypeVar("A")


def flag(default: Any, group: str, help: str, **options) -> Any:
    """A field of a dataclass of flags.

    Args:
        default: None where the flag has none; its help then says what happens without it.
        group: the heading that it stands under in --help.
        help: one line, with the unit and what special values mean.
        options: of `argparse.ArgumentParser.add_argument`: metavar, choices, nargs, const.
    """
    metadata = {"group": group, "help": help, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def debug_flag() -> Any:
    """`--debug`, which every script has."""
    return flag(False, "other", "show the traceback of every error")


def prepared_folders(words: Sequence[Path], flag: str = "--data_path") -> list[Path]:
    """The folders of `dataloader.py` that a flag names: each word is a folder, or a pattern of several.

    Raises:
        InputError: one is no such folder, or a pattern matches nothing.
    """
    folders: list[Path] = []
    for word in words:
        if word.exists() or not glob.has_magic(str(word)):
            folders.append(word)
            continue
        matching = sorted(map(Path, glob.glob(str(word))))
        if not matching:
            raise InputError(f"{flag} '{word}' matches nothing; check the pattern")
        folders += matching
    for folder in folders:
        if not (folder / "dataset.json").is_file():
            raise InputError(f"{flag} '{folder}' is not a folder of dataloader.py; did you run it?")
    return folders


def check_encoders(names: Sequence[str]) -> None:
    """Refuse more encoders than two, and one twice.

    Raises:
        InputError: `--encoder` says so.
    """
    if len(names) > 2:
        raise InputError(f"--encoder names {len(names)} encoders; give one, or two that see side by side")
    if len(names) == 2 and names[0] == names[1]:
        raise InputError(f"--encoder names '{names[0]}' twice; give it once, or another beside it")


def one_or_two(names: Sequence[str]) -> str | list[str]:
    """The words of `--encoder` as files tell them: one name, or a list of two."""
    return names[0] if len(names) == 1 else list(names)


def encoders(told: str | Sequence[str]) -> list[str]:
    """The names of one encoder or of two, from what files tell of them."""
    return [told] if isinstance(told, str | os.PathLike) else list(told)


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage of every flag above it."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")


def build_parser(kind: type, description: str, **options) -> argparse.ArgumentParser:
    """The parser of a dataclass of flags.

    A field's annotation decides how its value is read: `bool` takes no value (`--no-NAME` switches off what is on by
    default; `bool | None` takes both), `list[X]` takes one or more, `X | None` is read as X.
    """
    parser = _Parser(description=description, allow_abbrev=False, **options)
    hints = typing.get_type_hints(kind)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        options = dict(field.metadata)
        group = options.pop("group")
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default not in (None, [], "") and default is not False and "(default" not in options["help"]:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] += f" (default: {'on' if default is True else shown})"
        options["help"] = options["help"].replace("%", "%%")
        value = _value_type(hints[field.name])
        if value is bool:
            options["action"] = argparse.BooleanOptionalAction if default in (True, None) else "store_true"
        elif typing.get_origin(value) is list:
            options |= {"nargs": options.get("nargs", "+"), "type": typing.get_args(value)[0]}
        else:
            options["type"] = value
        groups[group].add_argument(f"--{field.name}", default=default, **options)
    return parser


def _value_type(annotation: Any) -> Any:
    """`X | None` -> X."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    return annotation


def parse(kind: type[A], argv: Sequence[str] | None, description: str, positional: str | None = None, **options) -> A:
    """The command line as an instance of `kind`. Ends the process with exit code 2 where it cannot be one.

    Args:
        positional: the field, a list of words, that takes words which belong to no flag.
    """
    return parse_known(kind, build_parser(kind, description, **options), argv, positional=positional)[0]


def parse_known(
    kind: type[A],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    others: Iterable[str] | None = None,
    positional: str | None = None,
) -> tuple[A, list[str]]:
    """As `parse`, and the words that belong to flags of somebody else.

    Args:
        others: the names of those flags, such as `--learning_rate`; None: there are none, and no words may be left.
    """
    known = [option for action in parser._actions for option in action.option_strings] + list(others or ())
    words = [with_underscores(word, known) for word in (sys.argv[1:] if argv is None else argv)]
    namespace, rest = parser.parse_known_args(words)
    for word in rest:
        option = word.split("=")[0]
        # Neither stdin nor a negative number is a flag.
        if word.startswith("-") and option not in known and not re.fullmatch(r"-|-\.?\d.*", word):
            parser.error(f"unknown flag {option}; {hint(option, known)}")
    if positional and rest and not getattr(namespace, positional):
        setattr(namespace, positional, rest)
        rest = []
    if rest and others is None:
        parser.error(f"'{rest[0]}' belongs to no flag; --help lists every flag")
    try:
        return kind(**vars(namespace)), rest
    except InputError as error:
        parser.error(str(error))


def with_underscores(word: str, known: Iterable[str]) -> str:
    """`--limit-data=5` -> `--limit_data=5`, where only that is a known flag."""
    option, equals, value = word.partition("=")
    spelt = "--" + option[2:].replace("-", "_")
    dashed = "--" + option[2:].replace("_", "-")
    if option.startswith("--") and option not in known:
        for other in (spelt, dashed):
            if other in known:
                return other + equals + value
    return word


# What people type -> what they look for: the first of these that the script has, or the last, which is a sentence.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "--lr": ("--learning_rate",),
    "--batch_size": ("--batch_size", "--per_device_train_batch_size"),
    "--train_batch_size": ("--per_device_train_batch_size",),
    "--eval_batch_size": ("--per_device_eval_batch_size",),
    "--bs": ("--batch_size", "--per_device_train_batch_size"),
    "--epoch": ("--epochs",),
    "--num_epochs": ("--epochs",),
    "--resume": ("--resume_from_checkpoint",),
    "--checkpoint": ("--resume_from_checkpoint", "--model_path"),
    "--device": ("--device", "say --use_cpu, or name GPUs in the environment variable CUDA_VISIBLE_DEVICES"),
    "--gpu": ("--device", "the environment variable CUDA_VISIBLE_DEVICES chooses the GPUs"),
    "--gpus": ("--device", "the environment variable CUDA_VISIBLE_DEVICES chooses the GPUs"),
    "--no_cuda": ("--use_cpu", "--device"),
    "--cpu": ("--use_cpu", "--device"),
    "--image": ("--image_path", "--image_dir"),
    "--images": ("--image_path", "--image_dir"),
    "--img": ("--image_path", "--image_dir"),
    "--input": ("--image_path", "--coco_dir", "--data_path"),
    "--model": ("--model_path", "--encoder"),
    "--checkpoint_path": ("--model_path", "--resume_from_checkpoint"),
    "--data": ("--data_path", "--coco_dir"),
    "--data_dir": ("--data_path", "--coco_dir"),
    "--dataset": ("--data_path", "--coco_dir"),
    "--out": ("--output", "--output_dir", "--save_path"),
    "--output_path": ("--output", "--output_dir", "--save_path"),
    "--output_dir": ("--save_path", "--output"),
    "--save_path": ("--output_dir", "--output"),
    "--save_dir": ("--save_path", "--output_dir", "--output"),
    "--limit": ("--limit_data",),
    "--num_workers": ("--num_proc", "--dataloader_num_workers"),
    "--workers": ("--num_proc", "--dataloader_num_workers"),
    "--beam_size": ("--num_beams", "--generation_num_beams"),
    "--beams": ("--num_beams", "--generation_num_beams"),
    "--num_beams": ("--generation_num_beams",),
    "--max_new_tokens": ("--generation_max_length",),
    "--wd": ("--weight_decay",),
    "--accumulation_steps": ("--gradient_accumulation_steps",),
    "--fp32": ("--bf16 False",),
    "--half": ("--bf16",),
    # Gone in transformers 5
    "--warmup_ratio": ("--warmup_steps, which below 1 is a share of all steps",),
    "--evaluation_strategy": ("--eval_strategy",),
    "--logging_dir": ("the environment variable TENSORBOARD_LOGGING_DIR names the folder of TensorBoard's log",),
    "--group_by_length": ("--train_sampling_strategy group_by_length",),
    "--overwrite_output_dir": ("remove the folder, or name another with --output_dir",),
    "--per_gpu_train_batch_size": ("--per_device_train_batch_size",),
    "--gradient_checkpointing": ("--activation_checkpointing",),
    "--half_precision_backend": ("--bf16 or --fp16 alone are enough",),
    "--use_ipex": ("--bf16 alone is enough",),
    "--tokenizer": ("--decoder",),
}


# Flags that people look for in the wrong script.
ELSEWHERE = {
    "dataloader.py": ("--limit_data", "--coco_dir", "--karpathy_json", "--image_dir", "--save_path", "--max_length"),
    "train.py": ("--epochs", "--learning_rate", "--lr", "--freeze_encoder", "--cache_features", "--output_dir"),
    "inference.py": ("--image_path", "--image", "--num_beams", "--explain", "--serve", "--alternatives"),
}


def hint(option: str, known: Iterable[str]) -> str:
    """What somebody who typed an unknown flag may have meant."""
    known = list(known)
    spelt = "--" + option.lstrip("-").replace("-", "_").lower()
    for other in (spelt, *USUAL_NAMES.get(spelt, ())):
        if other.split(",")[0].split(" ")[0] in known:
            return f"did you mean {other}?"
    if spelt in USUAL_NAMES and not USUAL_NAMES[spelt][-1].startswith("--"):
        return USUAL_NAMES[spelt][-1]
    for script, flags in ELSEWHERE.items():
        if spelt in flags:
            return f"it is a flag of {script}"
    close = difflib.get_close_matches(spelt, known, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists every flag"


def note(message: str) -> None:
    """One line about what was decided, on stderr: stdout carries results only. Control characters are escaped."""
    print("\n".join(map(printable, message.split("\n"))), file=sys.stderr, flush=True)


LINES_EVERY = 30.0  # seconds between two lines of a bar in a file


def bar(**options: Any) -> Any:
    """A `tqdm` progress bar on stderr, with the rate and what remains; in a file a line now and then.

    Args:
        options: of `tqdm`: total, unit, desc, initial, disable, leave.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(file=sys.stderr, dynamic_ncols=True, **options)

    class Lines(tqdm):
        def moveto(self, n: int) -> None:
            """Nowhere: a file has no cursor."""

        @staticmethod
        def status_printer(file):
            begun = False

            def show(status: str) -> None:
                nonlocal begun
                if status.strip():
                    file.write(("\n" if begun else "") + status)
                elif begun:
                    file.write("\n")
                begun = bool(status.strip())
                file.flush()

            return show

    return Lines(file=sys.stderr, mininterval=LINES_EVERY, ncols=100, **options)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large packages, or load a model, without Python's search for unreachable cycles.

    PyTorch and transformers make a million objects, which the search would walk through again and again. None of those
    that the first of these blocks makes goes before the process ends: later searches leave them out too.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def run(main: Callable[[], int | None]) -> None:
    """Call a script's `main` and exit: 2 with one sentence for bad input, 130 for Ctrl-C.

    An InputError with an `exit_code` of its own decides otherwise: 1 where running again goes on from what is done.
    """
    try:
        code = main()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        name = sys.argv[0].rsplit("/", 1)[-1]
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    except BrokenPipeError:
        # The reader (head, say) has gone. Nothing more can be said to it, not even at interpreter exit.
        sys.stdout = None
        code = 1
    except Exception as error:
        full = is_full_disk(error)
        if "--debug" in sys.argv or not (full or isinstance(error, OSError)):
            raise
        name = sys.argv[0].rsplit("/", 1)[-1]
        file, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        where = f"'{file}': " if file else ""
        what = "the disk is full; make room and run the same command again" if full else reason or error
        print(f"{name}: error: {where}{what}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        if "--debug" in sys.argv:
            raise
        print(f"\n{str(error) or 'stopped'}", file=sys.stderr)
        code = 130
    gc.freeze()  # what is left goes with the process: Python would search it for cycles first, for a second
    sys.exit(code)


def parse_shard(shard: str) -> tuple[int, int]:
    """`--shard I/N` as two numbers.

    Raises:
        InputError: it is none.
    """
    number, _, parts = shard.partition("/")
    if number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts):
        return int(number), int(parts)
    raise InputError(f"--shard {shard} is not a part such as 1/4, the first of four")


JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a caption cannot drive the terminal.

    The two joiners stay: words of Persian and of the languages of India are spelt with them.
    """
    return "".join(
        char if char.isprintable() or char in JOINERS else char.encode("unicode_escape").decode() for char in text
    )
