"""Files that are whole or not there, never written through a link; locks, JSON, full disks.

Folders come from strangers too. A link in one of them, under a name that is about to be written, may lead to any file
of the user's. So what is new is made under a name that nobody can know, and put in its place by renaming; what is
continued is opened by `open_in_place`; and `refuse_links` looks through a folder that a library is about to fill.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from captioning import InputError, foreign
from captioning.foreign import MOST_BYTES

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none

# ---- writing


def check_target(path: Path, what: str = "") -> None:
    """Refuse a place where no file can be written: a link, a folder, a pipe, a device.

    Args:
        what: the flag that names it.

    Raises:
        InputError: it is one of these.
    """
    name = f"{what} '{path}'".lstrip()
    try:
        kind = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(kind):
        raise InputError(f"{name} is a link, and nothing is written through one; remove it, or name the file itself")
    if stat.S_ISDIR(kind):
        raise InputError(f"{name} is a folder; name a file")
    if not stat.S_ISREG(kind):
        raise InputError(f"{name} is not a regular file; name another")


@contextlib.contextmanager
def replacing(path: Path, keep: bool = True) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    With `keep=False` it never does: a temporary file. An empty file of that name is there already, which this process
    made.

    Raises:
        InputError: at `path` is a link, or no regular file.
    """
    path = Path(path)
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.{path.name[-50:]}")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
    try:
        yield part
        if keep:
            with part.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave the name with nothing behind it
            check_target(path)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def open_in_place(path: Path, append: bool = False) -> BinaryIO:
    """A file that is written to where it lies, to continue it; an empty one is made where there is none.

    Args:
        append: every write goes to its end; otherwise it can be read and written anywhere.

    Raises:
        InputError: it is a link, has another name besides (a hard link), or is no regular file.
    """
    check_target(path)
    flags = os.O_CREAT | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, flags | (os.O_WRONLY | os.O_APPEND if append else os.O_RDWR), 0o666)
    opened = os.fstat(handle)
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
        os.close(handle)
        raise InputError(f"'{path}' is a link to another file, or no regular file; remove it")
    return os.fdopen(handle, "ab" if append else "r+b")


def make_folder(path: Path, within: Path) -> None:
    """Make a folder and those above it; below `within`, which the user named, none of them may be a link.

    Raises:
        InputError: one is.
    """
    for place in (path, *path.parents):
        if place == within:
            break
        if place.is_symlink():
            raise InputError(f"'{place}' is a link, and nothing is written through one; put a folder in its place")
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone. What cannot be removed stays."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


# Endings of what is written into a run folder.
WRITTEN = (".json", ".safetensors", ".bin", ".pt", ".pth", ".txt", ".jinja", ".png", ".html", ".md")


def refuse_links(folder: Path, what: str) -> None:
    """Refuse a folder to write to that holds links to files or to outside, pipes, devices, or folders for files.

    A link to a folder of its own is harmless. `folder` itself may be a link: the user named it.

    Args:
        what: the flag that names it.

    Raises:
        InputError: one is there.
    """
    outside = folder.resolve()
    for at, folders, files in os.walk(folder):
        for name in folders:
            path = Path(at, name)
            if path.is_symlink() and not path.resolve().is_relative_to(outside):
                raise InputError(
                    f"{what} '{folder}' holds a link to another folder, '{path}', and nothing is written through one; "
                    "remove it, or name another folder"
                )
            if not path.is_symlink() and path.suffix in WRITTEN:
                raise InputError(f"'{path}' is a folder, and a file of that name is written; remove it")
        for name in files:
            path = Path(at, name)
            if path.is_symlink():
                raise InputError(
                    f"{what} '{folder}' holds a link, '{path}', and nothing is written through one; remove it, or name "
                    "another folder"
                )
            if not stat.S_ISREG(path.lstat().st_mode) and not stat.S_ISSOCK(path.lstat().st_mode):
                raise InputError(f"'{path}' is not a regular file; remove it, or name another folder than '{folder}'")


def remove_leftovers(folder: Path, name: str = "", idle: float = 0) -> None:
    """Remove what processes that were killed inside `replacing` left in `folder`.

    Args:
        name: of the file that they were to replace, where the folder is the user's; "": of any.
        idle: seconds without a change, where another machine, whose processes nobody here knows, may write there too.
    """
    for part in folder.glob(f".[0-9]*.{'*.' + glob.escape(name[-50:]) if name else '*'}"):
        process = part.name.split(".")[1]
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):  # another process has removed it, or it is a folder
                if not idle or time.time() - part.lstat().st_mtime >= idle:
                    part.unlink()


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

    Raises:
        InputError: at `path` is a link, or no regular file.
    """
    import filelock

    check_target(path)
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
    """Write bytes, or text as UTF-8; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON with letters as they are, for people to read; `options` are those of `json.dumps`.

    Halves of characters (lone surrogates) are escaped, because a file in UTF-8 cannot hold them.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return re.sub("[\ud800-\udfff]", lambda half: json.dumps(half[0])[1:-1], text)


def utf8(name: str) -> str:
    """A file's name as text that UTF-8 can hold, for people to read and for files: a disk's names are any bytes."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # halves of characters, out of JSON
        return name.encode("utf-8", "backslashreplace").decode()


def plain(value: Any) -> Any:
    """`value` with what strict JSON holds: a number that is not finite becomes None, what is no value a text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Enum):
        return plain(value.value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file of weights is as long as its header says."""
    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def fingerprint(folder: Path) -> str:
    """A few letters that change with the model, tokenizer or settings in a folder; weights are read in samples."""
    digest = hashlib.sha256()
    for path in sorted([*folder.iterdir(), *folder.glob("onnx/*.onnx")]):
        if path.suffix in (".safetensors", ".bin", ".onnx") or path.name.endswith(("config.json", "tokenizer.json")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for at in range(0, size, max(size // 64, 1)):
                    file.seek(at)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room on the disk, or of room in a quota or limit."""
    of_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers and safetensors tell the number in words only
    number = int(of_rust[1]) if of_rust else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: Path, remedy: str = "correct the file", most: int = MOST_BYTES) -> dict[str, Any]:
    """A JSON object from a file, read within limits.

    Args:
        remedy: what to do when it holds something else.
        most: bytes.

    Raises:
        InputError: it is missing, no regular file, too long, not UTF-8 JSON, nested too deep, or not an object.
    """
    content = foreign.read_json(path, remedy, most)
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds a {type(content).__name__}, not a JSON object; {remedy}")
    return content
