"""Files that are whole or not there, locks, JSON, full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from captioning import InputError


@contextlib.contextmanager
def replacing(path: Path, keep: bool = True) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    With `keep=False` it never does: a temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield part
        if keep:
            with part.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave the name with nothing behind it
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed inside `replacing` left in `folder`."""
    for part in folder.glob(".[0-9]*.*"):
        process = part.name.split(".")[1]
        if process.isdecimal() and not _is_running(int(process)):
            part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there os.kill would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` for this process; yields whether it is held.

    The hold ends with the process, however that ends, and data workers that it forks do not inherit it. The file is
    removed at the end of the block; its folder, created where there is none, stays. On a file system without locks
    nobody is refused.

    Args:
        wait: for another process that holds it; otherwise yields False then.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    # Not its soft locks: where there are no others it would warn on stderr.
    held = filelock.FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        held.acquire()
    except filelock.Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise
    try:
        yield True
    finally:
        # Removed while it is held: afterwards it may be another's.
        with contextlib.suppress(OSError):  # Windows does not remove what is open
            path.unlink()
        held.release()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON with letters as they are, for people to read; `options` are those of `json.dumps`.

    Halves of characters (lone surrogates) are escaped, because a file in UTF-8 cannot hold them.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return re.sub("[\ud800-\udfff]", lambda half: json.dumps(half[0])[1:-1], text)


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file of weights is as long as its header says."""
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room on the disk, or of room in a quota or limit."""
    of_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers and safetensors tell the number in words only
    number = int(of_rust[1]) if of_rust else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: Path, remedy: str = "correct the file") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        remedy: what to do when it holds something else.

    Raises:
        InputError: it is missing, not UTF-8 JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"'{path}' is not a JSON file in UTF-8 (line {line}: {error}); {remedy}") from None
    except (ValueError, RecursionError) as error:  # with line and column, but for a number of thousands of digits
        raise InputError(f"'{path}' is not a JSON file ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, not a JSON object; {remedy}")
    return content
