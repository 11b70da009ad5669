"""What came from somewhere else: JSON read within limits, and checked by name, type and range before it is used.

    content = read_json(folder / "state.json")             # a regular file, not too long, not nested too deep
    check(content, {"epochs": whole(1, 100), "source": text()}, "'state.json'", "correct the file")
    reason = apart(examine, paths)                         # in a process of its own, which may die of it

A schema names what is used, with a check of each: what else a file holds passes, and nothing is made of it. A check
takes a value and returns None where it is right, or in words what it should be.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from captioning import InputError

Check = Callable[[Any], str | None]
DEEPEST = 64  # lists and objects within each other
MOST_BYTES = 64_000_000  # of a JSON file, a tokenizer's being the longest


# ---- files


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file, which a link may lead to; pipes and devices, which may never end, are not opened.

    Raises:
        InputError: it is not there, no regular file, or longer than `most` bytes.
    """
    try:
        refuse_special(path)
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"'{path}' is not a regular file")
            content = file.read(most + 1)
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"cannot read '{path}': {getattr(error, 'strerror', None) or error}") from None
    if len(content) > most:
        raise InputError(f"'{path}' has more than {most:,} bytes, too many for a file of its kind; get it again")
    return content


def _without_waiting(path, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def refuse_special(path: Path) -> None:
    """Refuse what is there and is no regular file, links followed.

    Raises:
        InputError: it is a folder, a pipe, a device.
        OSError: it is not there.
    """
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind):
        if stat.S_ISDIR(kind):
            raise InputError(f"cannot read '{path}': Is a directory")
        raise InputError(f"'{path}' is not a regular file; get it again")


def read_json(path: Path, remedy: str = "correct the file", most: int = MOST_BYTES, finite: bool = False) -> Any:
    """The value in a JSON file in UTF-8.

    Args:
        remedy: what to do when it holds something else.
        most: bytes.
        finite: refuse NaN and infinity, which are no JSON, but which Python writes, and 1e999.

    Raises:
        InputError: as `read_bytes`; or it is no JSON, or nested deeper than DEEPEST.
    """
    data = read_bytes(path, most)
    try:
        numbers: dict[str, Any] = {"parse_constant": _refuse_number, "parse_float": _finite} if finite else {}
        content = json.loads(data.decode("utf-8-sig"), **numbers)
        del data
        deep = _is_deeper(content, DEEPEST)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"'{path}' is not a JSON file in UTF-8 (line {line}: {error}); {remedy}") from None
    except ValueError as error:  # with line and column, but for a number of thousands of digits
        raise InputError(f"'{path}' is not a JSON file ({error}); {remedy}") from None
    except RecursionError:
        deep = True
    if deep:
        raise InputError(f"'{path}' is not a JSON file for here (a recursion of more than {DEEPEST} levels); {remedy}")
    return content


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} is no number here")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_number(text)


def _is_deeper(content: Any, depth: int) -> bool:
    """Whether a value is nested deeper; level by level, for whoever calls itself may not come back."""
    level = [content]
    for _ in range(depth):
        nested = (value for value in level if isinstance(value, dict | list))
        level = [own for value in nested for own in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return False
    return True


# ---- schemas


def whole(least: float = -math.inf, most: float = math.inf) -> Check:
    """An integer, which true and false are not."""
    wanted = _range("a whole number", least, most)
    return lambda value: None if type(value) is int and least <= value <= most else wanted


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """A finite number."""

    def right(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

    return lambda value: None if right(value) else _range("a number", least, most)


def _range(kind: str, least: float, most: float) -> str:
    if math.isinf(least) and math.isinf(most):
        return kind
    if math.isinf(most):
        return f"{kind} of {least:,} or more"
    return f"{kind} from {least:,} to {most:,}"


def text(most: int = 10_000, least: int = 0) -> Check:
    """Text that can be shown and written: without control characters and halves of characters."""

    def right(value: Any) -> bool:
        return isinstance(value, str) and least <= len(value) <= most and not any(map(_is_odd, value))

    return lambda value: None if right(value) else f"text of {least:,} to {most:,} characters that can be printed"


def _is_odd(char: str) -> bool:
    return char < " " or "\x7f" <= char < "\xa0" or "\ud800" <= char <= "\udfff"


def flag(value: Any) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def null(value: Any) -> str | None:
    return None if value is None else "null"


def one_of(*values: Any) -> Check:
    """One of some values."""
    return lambda value: (
        None
        if any(type(value) is type(each) and value == each for each in values)
        else "one of " + ", ".join(json.dumps(each) for each in values)
    )


def either(*checks: Check) -> Check:
    """What one of several checks passes."""

    def check_each(value: Any) -> str | None:
        wanted = [each(value) for each in checks]
        return None if None in wanted else ", or ".join(map(str, wanted))

    return check_each


def list_of(each: Check, least: int = 0, most: int = 1_000_000) -> Check:
    """A list whose members all pass."""

    def check_all(value: Any) -> str | None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return f"a list with {least:,} to {most:,} members"
        wanted = next((wanted for member in value if (wanted := each(member))), None)
        return wanted and f"a list, each member {wanted}"

    return check_all


def object_of(each: Check, most: int = 100_000) -> Check:
    """An object whose members all pass, whatever their names are."""
    names = text(1000)

    def check_all(value: Any) -> str | None:
        if not isinstance(value, dict) or len(value) > most:
            return f"an object with at most {most:,} members"
        wanted = next((wanted for name in value if (wanted := names(name))), None)
        if wanted:
            return f"an object, each name {wanted}"
        wanted = next((wanted for member in value.values() if (wanted := each(member))), None)
        return wanted and f"an object, each member {wanted}"

    return check_all


def check(
    content: Any, schema: Mapping[str, Check], what: str, remedy: str = "correct the file", needed: Iterable[str] = ()
) -> dict[str, Any]:
    """`content`, an object whose members of the schema's names all pass.

    Args:
        what: how messages call it.
        needed: names that must be there.

    Raises:
        InputError: it is none. The message names the member, its value and what it should be.
    """
    if not isinstance(content, dict):
        raise InputError(f"{what} holds a {type(content).__name__}, not a JSON object; {remedy}")
    for name in needed:
        if name not in content:
            raise InputError(f"{what} does not say '{name}'; {remedy}")
    for name, right in schema.items():
        if name in content and (wanted := right(content[name])):
            raise InputError(f"{what} says {name} {shown(content[name])}, which is not {wanted}; {remedy}")
    return content


def shown(value: Any) -> str:
    """A value for a message, in a few words."""
    if isinstance(value, dict | list) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value):,} members"
    said = ascii(value)
    return said if len(said) <= 80 else said[:77] + "..."


# ---- a process of its own


def apart(work: Callable[..., Any], *arguments: Any, seconds: float, memory: int) -> Any:
    """What `work` returns in a process of its own, which may crash, hang, or ask for too much; None where it does.

    Args:
        work: a function of a module; what it returns can be pickled, and is not None.
        seconds: how long it may take.
        memory: bytes that it may ask for besides what this process has, where the system can tell.
    """
    import multiprocessing

    # A fork takes a hundredth of a second. Elsewhere than on Linux it is not safe once threads have begun.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work_apart, args=(theirs, work, arguments, memory), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _work_apart(pipe, work: Callable[..., Any], arguments: tuple, memory: int) -> None:
    import faulthandler

    faulthandler.disable()
    with contextlib.suppress(OSError):  # what libraries say as they die is for nobody
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + memory, own + memory))
    try:
        pipe.send(work(*arguments))
    except BaseException:  # whatever it is, it is not to be read here
        os._exit(1)
    os._exit(0)
