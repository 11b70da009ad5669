"""Files that are either the old ones or the new ones, never half of either."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

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
def locked_folder(folder: Path) -> Iterator[bool]:
    """`folder`, created, for this process alone; yields False when another process has it.

    The lock goes with the process, however it ends, and stays with the folder when that is renamed.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here
        folder.mkdir(parents=True, exist_ok=True)
        yield True
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks
                yield True
                return
            # Its last owner may have renamed it in the meantime.
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                yield True
                return
        finally:
            os.close(handle)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file of weights is as long as its header says."""
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


@contextlib.contextmanager
def only_process(lock: Path) -> Iterator[bool]:
    """Hold `lock` for this process without its children; yields False when another one holds it.

    The hold goes with the process, however it ends. The file goes with the block, and so does its folder where nothing
    else is in it. Where there are no such locks (Windows), nobody is refused.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                # Not flock: data workers would inherit it, and they outlive a killed run for some seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                yield False
                return
            except OSError:  # a file system without locks
                pass
            if not (lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())):
                continue  # its last holder has removed it in the meantime
            try:
                yield True
                return
            finally:
                lock.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there is something in it
                    lock.parent.rmdir()


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError when it is missing, not UTF-8 JSON, or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"'{path}' does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also: not UTF-8, a number of thousands of digits
        raise InputError(f"'{path}' is not a JSON file ({error}); delete it and fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, not a JSON object")
    return content
