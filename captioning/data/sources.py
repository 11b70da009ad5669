"""Which images are to be captioned: files, folders, patterns, lists of them, archives and addresses -> `Source`s.

    for source in expand(["photos/", "more.zip", "list.txt", "https://host/photo.jpg"]):
        image = source.image()        # RGB, upright, through the one door of `images`

An archive (.zip, .tar, .tar.gz) is read where it lies; nothing is unpacked onto the disk. A list (.txt, or `-` for
stdin) names a path in each line, or ends each with a NUL, as `find -print0` does.
"""

# ruff: noqa: PTH100, PTH110, PTH114, PTH118, PTH119, PTH120, PTH122 (strings: a million Paths take half a gigabyte)

from __future__ import annotations

import functools
import glob
import io
import os
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from captioning import InputError, cli
from captioning.data import images, packed
from captioning.data.fetch import MAX_BYTES
from captioning.data.images import SUFFIXES, ImageError
from captioning.files import utf8

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARCHIVES = (".zip", *TARS)
# Others, and what unpacks them.
UNPACKED_BY = {
    ".tar.zst": "tar --zstd -xf",
    ".tzst": "tar --zstd -xf",
    ".gz": "gunzip",
    ".7z": "7z x",
    ".rar": "unrar x",
}
LISTS = (".txt", ".lst", ".list")
# An archive's list of contents is held in memory.
MOST_MEMBERS = 1_000_000
LONGEST_LIST = 100_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Source:
    """One image to caption.

    Attributes:
        path: a file or an address; of an image in an archive, the archive.
        member: of an archive: a `ZipInfo`, or the offset and the size in a tar, compressed or not.
        inner: the name in the archive.
        root: the folder below which it was found, where a folder was named.
    """

    path: str
    member: Any = None
    inner: str = ""
    root: str = ""

    @property
    def name(self) -> str:
        """As it is printed and written: text that is UTF-8, whatever the file's name is."""
        name = f"{self.path}/{self.inner}" if self.inner else self.path
        return utf8(name)

    @property
    def is_file(self) -> bool:
        """Whether it lies in a file of its own on this machine."""
        return not self.inner and "://" not in self.path

    def is_there(self) -> bool:
        """Whether there is any point in trying to read it."""
        return not self.is_file or os.path.isfile(self.path)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            InputError: there are none, or too many.
        """
        if not self.inner:
            return images.read_bytes(self.path)
        if self.inner.startswith("/") or ".." in self.inner.split("/") or "\\" in self.inner:
            raise ImageError(self.name, "its name leaves the archive", "pack it under another name")
        read = _read_in_zip if isinstance(self.member, zipfile.ZipInfo) else _read_in_tar
        return read(self.path, self.member, self.name)

    @property
    def in_turn(self) -> bool:
        """Whether it is to be read after those before it: going back in its archive takes a new pass."""
        return isinstance(self.member, _Packed)

    def image(self, min_side: int | None = None, data: bytes | None = None) -> Image.Image:
        """The image in mode RGB; `min_side` as in `images.decode`.

        Args:
            data: what `read` returned, where it has been called.

        Raises:
            InputError: it is no image, or cannot be read.
        """
        name = self.name if self.inner else self.path
        data = self.read() if data is None else data
        return images.to_rgb(images.decode(data, name, min_side=min_side), name)


# ---- what the command line names -> sources


def expand(paths: Sequence[str], recursive: bool = True) -> list[Source]:
    """Every image that is named, in order and each once.

    Args:
        paths: addresses, files, folders, patterns, archives, lists of all these, or `-` for a list on stdin.
        recursive: the folders inside a folder count.

    Raises:
        InputError: a folder, a list or an archive without images, a pattern that matches nothing, a broken archive.
    """
    found: dict[tuple[str, str], Source] = {}
    for path in paths:
        for source in _listed(path, recursive) if _is_list(path) else _named(path, recursive):
            where = source.path if "://" in source.path else os.path.abspath(source.path)
            found.setdefault((where, source.inner), source)
    return list(found.values())


def part_of(sources: list[Source], part: tuple[int, int] | None) -> list[Source]:
    """The images of one machine: part (I, N) has each Nth image from the Ith on. All machines have to list the same."""
    return sources[part[0] - 1 :: part[1]] if part else sources


def _named(path: str, recursive: bool) -> list[Source]:
    if "://" in path:
        return [Source(path)]
    if os.path.isdir(path):
        return _folder(path, recursive)
    if os.path.isfile(path):
        return _file(path)
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))
        files = [match for match in matches if os.path.isfile(match)]
        known = [match for match in files if _is_image(match) or match.lower().endswith(ARCHIVES)]
        folders = [match for match in matches if os.path.isdir(match)] if not files else []
        if not files and not folders:
            raise InputError(f"nothing matches '{path}'; check the pattern")
        return [source for match in known or files or folders for source in _named(match, recursive)]
    return [Source(path)]  # reading it will say what is wrong with it


def _file(path: str) -> list[Source]:
    lowered = path.lower()
    if lowered.endswith(".zip"):
        return _zip_members(path)
    if lowered.endswith(TARS):
        return _tar_members(path)
    for ending, command in UNPACKED_BY.items():
        if lowered.endswith(ending):
            raise InputError(
                f"'{path}' is not read in place; unpack it with {command} '{path}', and name what it holds"
            )
    return [Source(path)]


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _folder(root: str, recursive: bool) -> list[Source]:
    found, linked = [], 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))] if recursive else []
        linked += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        found += [path for name in files if os.path.isfile(path := os.path.join(folder, name)) and _is_image(path)]
    if linked:
        cli.note(f"{linked:,} links to folders below '{root}' are not followed; name those folders to have them too")
    if not found:
        below = "" if recursive else " itself (without --no-recursive, the folders in it count too)"
        raise InputError(f"folder '{root}' holds no images{below} ({', '.join(sorted(SUFFIXES))})")
    return [Source(path, root=root) for path in sorted(found)]


# ---- lists


def _is_list(path: str) -> bool:
    return path == "-" or (path.lower().endswith(LISTS) and os.path.isfile(path))


def _listed(path: str, recursive: bool) -> list[Source]:
    """The images that a list names. A caption beside an image, `photo.txt`, is no list."""
    stem = os.path.splitext(path)[0]
    if path != "-" and (_is_image(stem) or any(os.path.isfile(stem + suffix) for suffix in SUFFIXES)):
        cli.note(f"'{path}' lies beside an image of its name: it is taken for a caption, and left out")
        return []
    what = "the list on stdin" if path == "-" else f"the list '{path}'"
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # PowerShell
        data = data.decode("utf-16", "replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    names = [os.fsdecode(line) for line in lines if line.strip()]
    if not names:
        raise InputError(f"{what} is empty; write a path into each line")
    found = []
    for name in names:
        beside = os.path.join(os.path.dirname(path), name)
        if _is_list(name):
            raise InputError(f"{what} names another list, '{name}'; give that to --image_path")
        found += _named(beside if not os.path.exists(name) and os.path.exists(beside) else name, recursive)
    return found


# ---- archives


def _zip_members(path: str) -> list[Source]:
    infos = {info.filename: info for info in _zip(path).infolist() if not info.is_dir() and _is_member(info.filename)}
    if infos and all(info.flag_bits & 1 for info in infos.values()):
        raise InputError(f"'{path}' is encrypted; unpack it with its password, and name the folder")
    return _members(path, dict(sorted(infos.items())))


@functools.lru_cache(maxsize=4)
def _zip(path: str) -> zipfile.ZipFile:
    """An open archive. Several threads may read members of it."""
    refusal = "it is not a whole zip archive; get it again"
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            if _size_of_list(file) > LONGEST_LIST:
                raise InputError(f"'{path}' lists its contents in more than {LONGEST_LIST:,} bytes; divide it")
        return zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror or refusal}") from None
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise InputError(f"cannot read '{path}': {refusal} ({error})") from None


def _size_of_list(file: io.BufferedReader) -> int:
    """Bytes of a zip's list of contents, by the record at its end (APPNOTE.TXT, 4.3.16); it is read as a whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 16) - 100))
    tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    if end < 0 or end + 22 > len(tail):
        return 0  # zipfile will say what is wrong
    (listed,) = struct.unpack_from("<I", tail, end + 12)
    if listed == 0xFFFFFFFF and 0 <= end64 <= len(tail) - 56:
        (listed,) = struct.unpack_from("<Q", tail, end64 + 40)
    return min(listed, size)


def _read_in_zip(path: str, info: zipfile.ZipInfo, name: str) -> bytes:
    if info.flag_bits & 1:
        raise ImageError(name, "it is encrypted", "unpack the archive with its password")
    if info.compress_type not in packed.ZIP_METHODS:
        raise ImageError(name, "it is not packed by deflate, as usual", "unpack the archive, and name the folder")
    try:
        with _zip(path).open(info) as file:
            data = file.read(MAX_BYTES + 1)  # whatever size the archive names
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise ImageError(name, f"the archive is damaged there ({error})", "get it again") from None
    except (zlib.error, EOFError, ValueError, struct.error) as error:
        raise ImageError(name, f"the archive is damaged there ({error})", "get it again") from None
    if len(data) > MAX_BYTES:
        raise ImageError(name, f"more than {MAX_BYTES:,} bytes", "make the image smaller")
    return data


class _Packed(NamedTuple):
    """Where a member of a compressed tar lies in what it unpacks to, in bytes."""

    at: int
    size: int


def _tar_members(path: str) -> list[Source]:
    """The images of a tar by name; of a compressed one, in its own order."""
    found: dict[str, Any] = {}
    count = 0
    compressed = ""
    try:
        compressed = packed.kind(path)
        with packed.open_tar(path) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                count += 1
                if count > MOST_MEMBERS:
                    raise InputError(f"'{path}' holds more than {MOST_MEMBERS:,} files; divide it")
                if member.isreg() and not member.issparse() and _is_member(member.name):
                    where = (member.offset_data, member.size)
                    found.pop(member.name, None)  # the last one of a name counts, and stands where it lies
                    found[member.name] = _Packed(*where) if compressed else where
    except (tarfile.TarError, struct.error, *packed.ERRORS) as error:
        if not found:
            what = f"it is no whole tar{' behind its compression' if compressed else ''}"
            raise InputError(f"cannot read '{path}': {what}; get it again ({error})") from None
        cli.note(f"'{path}' is cut short: the {len(found):,} images before that are used")
    return _members(path, found if compressed else dict(sorted(found.items())))


@functools.lru_cache(maxsize=4)
def _unpacked(path: str) -> tuple[packed.Unpacked, threading.Lock]:
    """An open compressed tar, which one thread reads at a time."""
    return packed.Unpacked(path), threading.Lock()


def _read_in_tar(path: str, member: tuple[int, int], name: str) -> bytes:
    at, size = member
    if size > MAX_BYTES:
        raise ImageError(name, f"more than {MAX_BYTES:,} bytes", "make the image smaller")
    try:
        if isinstance(member, _Packed):
            stream, turn = _unpacked(path)
            with turn:
                stream.seek(at)
                return stream.read(size)
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(at)
            return file.read(size)
    except packed.ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read '{name}': {reason}; get the archive again") from None


def _is_member(name: str) -> bool:
    folders = name.split("/")[:-1]
    return _is_image(name) and not any(folder.startswith("__MACOSX") for folder in folders)


def _members(path: str, found: dict[str, Any]) -> list[Source]:
    if not found:
        raise InputError(f"archive '{path}' holds no images ({', '.join(sorted(SUFFIXES))})")
    return [Source(path, member, name) for name, member in found.items()]


# ---- reading ahead


@dataclass(frozen=True)
class Picture:
    """An image that was read.

    Attributes:
        content: an RGB image, or what was prepared from it.
        seconds: that reading and preparing took.
    """

    source: Source
    content: Any
    seconds: float


def pictures(
    sources: Sequence[Source],
    side: int,
    prepare: Callable[[Image.Image], Any] | None,
    ahead: int,
    failed: Callable[[Source, str], None],
) -> Iterator[Picture]:
    """The images in order, read in the background while the model works, `ahead` of them and no more.

    Args:
        side: pixels; larger images may be decoded at a smaller size whose shorter side is at least this.
        prepare: what is done with the image, in the background too.
        failed: told of each image that cannot be read, and why.
    """

    def read(source: Source, data: bytes | InputError | None) -> Picture | InputError:
        began = time.perf_counter()
        if isinstance(data, InputError):
            return data
        try:
            image = source.image(side, data)
            content = prepare(image) if prepare else image
        except InputError as error:
            return error
        return Picture(source, content, time.perf_counter() - began)

    def in_turn(source: Source) -> bytes | InputError | None:
        try:
            return source.read() if source.in_turn else None
        except InputError as error:
            return error

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        waiting: list[tuple[Source, Future[Picture | InputError]]] = []
        for position in range(len(sources) + ahead):
            if position < len(sources):
                source = sources[position]
                waiting.append((source, pool.submit(read, source, in_turn(source))))
            if position >= ahead or position >= len(sources):
                if not waiting:
                    return
                source, future = waiting.pop(0)
                result = future.result()
                if isinstance(result, InputError):
                    failed(source, str(result))
                else:
                    yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
