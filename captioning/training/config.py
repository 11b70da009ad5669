"""Flags in a file: `config.yaml`, which every run folder has, and `train.py --config`, which takes flags from it.

    words = with_config(["--config", "run/config.yaml", "--seed=1"], ours, theirs)
    text = dump(args, training)

A file holds a mapping of flags, without their dashes, to values. It may leave out any of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
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
OF_PLACE = {"output_dir", "data_path", "use_cpu", "dataloader_num_workers", "dataloader_persistent_workers"}
DEFAULTS = "# These have their defaults:\n"
OURS = "# Every flag of this run, with its value"
LENGTH = {"epochs", "num_train_epochs", "max_steps"}  # they say one thing: of a training's length one is enough
# What repeats a run is not what it was called with in the shell, nor who may upload it.
LEFT_OUT = {"config", "resume_from_checkpoint", "help_all", "debug", "hub_token"}
HEAD = """{ours}. To repeat it:
#
#     python train.py --config {config} --output_dir ANOTHER_FOLDER
#
# On the same machine, with the same versions, that gives the same weights to the bit.

"""


def with_config(words: Sequence[str], ours: Mapping[str, dataclasses.Field], theirs: Mapping[str, str]) -> list[str]:
    """A command line in which the flags of its `--config` stand as words; those that it gives itself stay.

    Args:
        ours: our flags by name.
        theirs: {name: type} of the Trainer's.

    Raises:
        InputError: the file cannot be read, names a flag that does not exist, or gives one what it cannot be.
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
    for name, value in values.items():
        if name not in ours and name not in theirs:
            raise InputError(f"{FLAG} '{file}': unknown flag '{name}'; {cli.hint(f'--{name}', _options(ours, theirs))}")
        if name in LEFT_OUT and value not in (None, False):
            raise InputError(f"{FLAG} '{file}': '{name}' belongs on the command line; take it out of the file")
        one = "list" not in str(ours[name].type) if name in ours else theirs[name] in ("int", "float", "bool")
        if isinstance(value, list) and one:
            raise InputError(f"{FLAG} '{file}': '{name}' takes one value, not the list {value}; correct it")
    found: list[str] = []
    for name, value in values.items():
        if name not in given and name not in LEFT_OUT:
            found += _words(name, value, ours[name].default if name in ours else ..., theirs.get(name, ""))
    return [*found, *words]


def differences(before: str, now: str) -> list[str]:
    """What differs between two texts of `dump`, such as "epochs 10 (was 20)", besides the place and the machine."""
    old, new = (_all_of(text) for text in (before, now))
    names = [name for name in new if name in old and name not in OF_PLACE and old[name] != new[name]]
    return [f"{name} {new[name]} (was {old[name]})" for name in names]


def _all_of(text: str) -> dict[str, Any]:
    """The flags of a text of `dump`, those in comments too; {}: it is none."""
    import yaml

    own, _, rest = text.partition(DEFAULTS)
    try:
        return yaml.safe_load(own) | (yaml.safe_load(re.sub("(?m)^# ", "", rest)) or {})
    except (yaml.YAMLError, TypeError):
        return {}


def is_ours(file: Path) -> bool:
    """Whether a file is the `config.yaml` of a run."""
    with file.open("rb") as opened:
        return opened.read(len(OURS)) == OURS.encode()


def _name(word: str) -> str:
    return _normal(word.partition("=")[0]).removeprefix("no_")


def _options(*names: Collection[str]) -> list[str]:
    return [f"--{name}" for group in names for name in group]


def _read(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Of a name that stands twice, YAML's own would take the last value without a word."""

        def construct_mapping(self, node, deep=False):
            names = [_normal(str(self.construct_object(key))) for key, _ in node.value]
            if again := next((name for name in names if names.count(name) > 1), None):
                raise InputError(f"{FLAG} '{file}' has '{again}' twice; keep one of them")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise InputError(f"{FLAG} '{file}' cannot be read: {error.strerror}; name a YAML file of flags") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{FLAG} '{file}' is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{FLAG} '{file}' holds no mapping of flags to values, such as 'epochs: 10'; correct it")
    return {_normal(name): value for name, value in values.items()}


def _normal(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


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
    follows = _what_follows(plain)
    usual = {name: _plain(defaults.get(name)) for name in plain} | follows
    active = {name: value for name, value in plain.items() if name in told or value != usual[name]}
    rest = {name: value for name, value in plain.items() if name not in active}
    head = HEAD.format(ours=OURS, config=shlex.quote(str(file)))
    comments = "".join(f"# {line}\n" for line in _yaml(rest).splitlines())
    own = _yaml({name: _plain(value) for name, value in ours.items()})
    return f"{head}{own}\n# Of the Trainer:\n{_yaml(active)}\n{DEFAULTS}{comments}"


def _what_follows(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Flags of the Trainer that follow from others, if nobody says otherwise: with others, they are to be others."""
    metric = theirs["metric_for_best_model"] or ""
    found = {
        "greater_is_better": not metric.endswith("loss"),
        "load_best_model_at_end": "no" not in (theirs["eval_strategy"], theirs["save_strategy"]),
        "dataloader_persistent_workers": theirs["dataloader_num_workers"] > 0,
    }
    if theirs["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        found["lr_scheduler_kwargs"] = {"mode": "max" if found["greater_is_better"] else "min"}
    return found


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
