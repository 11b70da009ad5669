"""A prepared folder's Arrow files, looked through before they are used: damaged ones make Arrow itself crash.

    check(folder, {"train": [Path("train/data-00000-of-00001.arrow")], ...})

The first time they are read in a process of its own, which may die of them. That they were right is then remembered in
the user's own cache, by the size and the times of each file; what a folder says of itself is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError
from captioning.data import images
from captioning.data.fetch import MAX_BYTES
from captioning.files import write_whole
from captioning.foreign import apart, read_bytes, refuse_special

if TYPE_CHECKING:
    import pyarrow

VERSION = "1"  # raised whenever more is looked at
AGAIN = "run dataloader.py again"
MEMORY = 1_000_000_000  # bytes besides the files, which are mapped
BYTES_A_SECOND = 20_000_000  # a slow disk's
MOST_NOTES = 1000  # folders that are remembered
PAGE = 1024  # bytes of an image that say what it is, or that it is a web page
NEEDED = ("image_id", "image", "captions", "labels")


def check(folder: Path, shards: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a prepared folder whose rows cannot be used, once: what was right is remembered.

    Args:
        folder: for messages.
        shards: the Arrow files of each split.

    Raises:
        InputError: a file is damaged; a column is missing or of another kind; an image id is missing or there twice; a
            caption has no tokens, or one below 0; an image is none.
    """
    files = [path for paths in shards.values() for path in paths]
    try:
        for path in files:
            refuse_special(path)
    except OSError as error:
        raise InputError(f"--data_path '{folder}' cannot be read ({error}); {AGAIN}") from None
    state = _state(files)
    note = _cache() / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    with contextlib.suppress(InputError):
        if read_bytes(note, 100) == state:
            return
    size = sum(path.stat().st_size for path in files)
    named = {split: [str(path) for path in paths] for split, paths in shards.items()}
    what = f"--data_path '{folder}'"
    reason = apart(examine, named, what, seconds=60 + size / BYTES_A_SECOND, memory=size + MEMORY)
    if reason is None:
        raise InputError(f"--data_path '{folder}' has damaged Arrow files, which cannot be read; {AGAIN}")
    if reason:
        raise InputError(reason)
    with contextlib.suppress(OSError, InputError):  # without it they are looked through again
        if _state(files) == state:
            write_whole(note, state)
            for old in sorted(note.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_NOTES]:
                old.unlink()


def check_arrow(paths: Sequence[Path], what: str) -> None:
    """Refuse Arrow files of any columns that are damaged.

    Args:
        what: how messages call them.

    Raises:
        InputError: one is.
    """
    for path in paths:
        refuse_special(path)
    size = sum(path.stat().st_size for path in paths)
    seconds = 60 + size / BYTES_A_SECOND
    reason = apart(examine_tables, [str(path) for path in paths], seconds=seconds, memory=size + MEMORY)
    if reason != "":
        raise InputError(f"{what} is not an Arrow file, or damaged ({reason or 'Arrow itself ends'}); get it again")


def examine_tables(paths: Sequence[str]) -> str:
    """What is wrong with Arrow files, "" if nothing is."""
    from captioning.data.records import open_arrow

    try:
        for path in paths:
            open_arrow(path).validate(full=True)
    except Exception as error:  # of pyarrow and Python, whatever damage makes them raise
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "captioning" / "checked"


def _state(files: Sequence[Path]) -> bytes:
    """What changes whenever one of the files does. Times of change cannot be set by who packed them."""
    digest = hashlib.sha256(VERSION.encode())
    for path in files:
        now = path.stat()
        told = (os.fspath(path.resolve()), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_dev)
        digest.update(repr(told).encode())
    return digest.hexdigest().encode()


# ---- in a process of its own


def examine(shards: Mapping[str, Sequence[str]], what: str) -> str:
    """What is wrong with the rows of some Arrow files, "" if nothing is; `what` is how messages call their folder."""
    try:
        for split, paths in shards.items():
            for path in paths:
                _examine_file(path, f"the {split} split of {what}")
        _examine_ids(shards, what)
    except InputError as error:
        return str(error)
    except Exception as error:  # of pyarrow and Python, whatever damage makes them raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"{what} cannot be read ({reason}); {AGAIN}"
    return ""


def open_shard(path: str) -> pyarrow.Table:
    """The table of an Arrow file, mapped into memory, with the columns that are used."""
    from captioning.data.records import open_arrow

    table = open_arrow(path)
    return table.select([name for name in (*NEEDED, "file_name") if name in table.column_names])


def _examine_file(path: str, where: str) -> None:
    table = open_shard(path)
    for name in NEEDED:
        if name not in table.column_names:
            raise InputError(f"{where} has no column '{name}'; {AGAIN}")
    table.validate(full=True)
    for name in table.column_names:
        kind = table.schema.field(name).type
        if not KINDS[name](kind):
            raise InputError(f"{where} has a column '{name}' of another kind ({str(kind)[:100]}); {AGAIN}")
    for batch in table.to_batches(1024):
        _examine_captions(batch, where)
        _examine_images(batch)


def _is_image(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_struct(kind) and any(
        field.name == "bytes" and (types.is_binary(field.type) or types.is_large_binary(field.type)) for field in kind
    )


def _is_list(kind: pyarrow.DataType, depth: int, of: str) -> bool:
    from pyarrow import types

    for _ in range(depth):
        if not (types.is_list(kind) or types.is_large_list(kind)):
            return False
        kind = kind.value_type
    if of == "text":
        return types.is_string(kind) or types.is_large_string(kind)
    return types.is_integer(kind)


KINDS = {
    "image_id": lambda kind: _is_list(kind, 0, "number"),
    "file_name": lambda kind: _is_list(kind, 0, "text"),
    "captions": lambda kind: _is_list(kind, 1, "text"),
    "labels": lambda kind: _is_list(kind, 2, "number"),
    "image": _is_image,
}


def _examine_captions(batch: pyarrow.RecordBatch, where: str) -> None:
    from pyarrow import compute

    ids, captions = batch["image_id"], batch["labels"].flatten()
    if ids.null_count:
        raise InputError(f"{where} has an image without an id; {AGAIN}")
    for name in ("captions", "labels"):
        none = compute.fill_null(compute.equal(compute.list_value_length(batch[name]), 0), True)
        for row in compute.indices_nonzero(none):
            raise InputError(f"image {ids[row.as_py()]} of the prepared data has no {name}; {AGAIN}")
    if batch["captions"].flatten().null_count:
        raise InputError(f"{where} has a caption that is none; {AGAIN}")
    if compute.any(compute.fill_null(compute.equal(compute.list_value_length(captions), 0), True)).as_py():
        raise InputError(f"{where} has a caption without tokens; {AGAIN}")
    tokens = captions.flatten()
    if tokens.null_count:
        raise InputError(f"{where} has a caption with a token that is none; {AGAIN}")
    for extreme in compute.min_max(tokens).as_py().values():
        if not 0 <= (extreme or 0) < 2**31:
            raise InputError(f"{where} has labels that hold {extreme}, which is no token; {AGAIN}")


def _examine_images(batch: pyarrow.RecordBatch) -> None:
    """Refuse images that the one door for images would not open, by their first bytes."""
    from pyarrow import compute

    data = compute.if_else(compute.is_valid(batch["image"]), batch["image"].field("bytes"), None)
    lengths = compute.fill_null(compute.binary_length(data), 0).to_pylist()
    starts = compute.fill_null(compute.binary_slice(data, 0, PAGE), b"").to_pylist()
    names = batch["file_name"].to_pylist() if "file_name" in batch.schema.names else [None] * len(batch)
    for image_id, file_name, length, start in zip(batch["image_id"], names, lengths, starts, strict=True):
        name = f"image {image_id}" + (f" ({file_name})" if file_name else "")
        try:
            images.kind_of(start, name)
            if length > MAX_BYTES:
                raise images.ImageError(name, f"more than {MAX_BYTES:,} bytes", "make the image smaller")
        except images.ImageError as error:
            raise InputError(f"{name} of the prepared data cannot be read ({error.reason}); {AGAIN}") from None


def _examine_ids(shards: Mapping[str, Sequence[str]], what: str) -> None:
    import numpy

    every = numpy.concatenate([ids for paths in shards.values() for path in paths for ids in _ids(path)])
    unique, counts = numpy.unique(every, return_counts=True)
    if len(unique) < len(every):
        raise InputError(f"{what} holds image id {unique[counts > 1][0]} more than once; {AGAIN}")


def _ids(path: str) -> Iterator[Any]:
    for chunk in open_shard(path).column("image_id").chunks:
        yield chunk.to_numpy(zero_copy_only=False)
