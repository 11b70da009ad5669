"""Flags in a file: `config.yaml`, which every run folder has, and `train.py --config`, which takes flags from it.

    words = with_config(["--config", "run/config.yaml", "--seed=1"], ours, theirs)
    text = dump(args, training)

A file holds a mapping of flags, without their dashes, to values. It may leave out any of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError, cli
from captioning.training import flags

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

FLAG = "--config"
# Told also where they have their defaults: people look for them, or the defaults are those of the machine.
ALWAYS = {"seed", "learning_rate", "per_device_train_batch_size", "use_cpu", "bf16", "dataloader_num_workers"}
LENGTH = {"epochs", "num_train_epochs", "max_steps"}  # they say one thing: of a training's length one is enough
# What repeats a run is not what it was called with in the shell, nor who may upload it.
LEFT_OUT = {"config", "resume_from_checkpoint", "help_all", "debug", "hub_token"}
HEAD = """# Every flag of this run, with its value. To repeat it:
#
#     python train.py --config {config} --output_dir ANOTHER_FOLDER
#
# On the same machine, with the same versions, that gives the same weights to the bit.

"""


def with_config(words: Sequence[str], ours: Mapping[str, Any], theirs: Mapping[str, str]) -> list[str]:
    """A command line in which the flags of its `--config` stand as words; those that it gives itself stay.

    Args:
        ours: {name: default} of our flags.
        theirs: {name: type} of the Trainer's.

    Raises:
        InputError: the file cannot be read, or names a flag that does not exist.
    """
    words = list(words)
    file = None
    for position, word in enumerate(words):
        if word == FLAG and position + 1 < len(words):
            file = words[position + 1]
        elif word.startswith(f"{FLAG}="):
            file = word.partition("=")[2]
    if file is None:
        return words
    given = {_name(word) for word in words if word.startswith("--")}
    if given & LENGTH:
        given |= LENGTH
    values = _read(Path(file))
    for name in values:
        if name not in ours and name not in theirs:
            raise InputError(f"{FLAG} '{file}': unknown flag '{name}'; {cli.hint(f'--{name}', _options(ours, theirs))}")
    found: list[str] = []
    for name, value in values.items():
        if name not in given and name not in LEFT_OUT:
            found += _words(name, value, ours.get(name, ...), theirs.get(name, ""))
    return [*found, *words]


def _name(word: str) -> str:
    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    return name.removeprefix("no_")


def _options(*names: Collection[str]) -> list[str]:
    return [f"--{name}" for group in names for name in group]


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{FLAG} '{file}' cannot be read: {error.strerror}; name a YAML file of flags") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{FLAG} '{file}' is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{FLAG} '{file}' holds no mapping of flags to values, such as 'epochs: 10'; correct it")
    return {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}


def _words(name: str, value: Any, default: Any, kind: str) -> list[str]:
    """A flag as words of the command line.

    Args:
        default: of our flag; ... for one of the Trainer's.
        kind: the type of the Trainer's flag.
    """
    if value is None or value == []:
        return []
    if default is not ...:
        if isinstance(value, bool):
            # A flag with an optional number, such as --freeze_encoder, is on without one, and off at its default.
            return [f"--{name}"] if value else [f"--no-{name}"] if default is True else []
    elif isinstance(value, bool) and kind != "bool":
        value = "yes" if value else "no"  # YAML takes a bare `no` for false
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def dump(args: Any, training: Seq2SeqTrainingArguments, defaults: Mapping[str, Any], file: Path) -> str:
    """What `config.yaml` holds: every flag of a run that works here, with its value, ours first.

    The Trainer's flags that have their default stand in comments. Some of them are refused where they have no effect.

    Args:
        args: our `Arguments`.
        defaults: {name: default} of the Trainer's flags.
        file: where it will lie, as the user named the folder.
    """
    ours = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name not in LEFT_OUT}
    if ours["freeze_encoder"] == math.inf:
        ours["freeze_encoder"] = True
    ours["epochs"] = None if training.max_steps > 0 else training.num_train_epochs
    theirs = {field.name: getattr(training, field.name) for field in dataclasses.fields(training) if field.init}
    theirs = {name: theirs[name] for name in theirs if name in flags.WORKS - LEFT_OUT - LENGTH}
    if training.max_steps > 0:
        theirs["max_steps"] = training.max_steps
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        theirs.pop(name)  # another name of activation_checkpointing
    theirs["report_to"] = list(training.report_to or ()) or "none"
    told = set(ALWAYS)
    for strategy, steps in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if _plain(theirs[strategy]) == "steps":
            told |= {strategy, steps}
        else:
            del theirs[steps]
    plain = {name: _plain(value) for name, value in theirs.items()}
    active = {name: value for name, value in plain.items() if name in told or value != _plain(defaults.get(name))}
    rest = {name: value for name, value in plain.items() if name not in active}
    head = HEAD.format(config=file)
    comments = "".join(f"# {line}\n" for line in _yaml(rest).splitlines())
    own = _yaml({name: _plain(value) for name, value in ours.items()})
    return f"{head}{own}\n# Of the Trainer:\n{_yaml(active)}\n# These have their defaults:\n{comments}"


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120) if values else ""


def _plain(value: Any) -> Any:
    """A value as YAML can hold it."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
