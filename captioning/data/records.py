"""One image and what people wrote about it, wherever the image lies: a file, or inside a tar, an Arrow or Parquet file.

Nothing here opens an image: `Record.read` gives its encoded bytes, also in a worker process.
"""

from __future__ import annotations

import bisect
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError
from captioning.data import images
from captioning.data.fetch import MAX_BYTES


@dataclass(frozen=True, slots=True)
class Member:
    """Where an image lies inside a file that holds many.

    Attributes:
        at: the first byte in a tar; the row in an Arrow or Parquet file.
        size: bytes, in a tar.
        column: of an Arrow or Parquet file; "" for a tar.
    """

    at: int
    size: int = 0
    column: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One image and everything people wrote about it. A million of them take about half a gigabyte."""

    image_id: int
    file_name: str  # as in the annotations
    location: str | os.PathLike  # where the image lies, or will lie once fetched, or the file that holds it
    captions: tuple[str, ...]
    url: str | None = None  # where to fetch the image from when it is not at `location` yet
    size: tuple[int, int] | None = None  # width and height in pixels, where the annotations say
    member: Member | None = None  # which image of the file at `location`

    @property
    def path(self) -> Path:
        """`location`: kept as a string, which takes a third of the memory of a Path."""
        return Path(self.location)

    def is_there(self) -> bool:
        """Whether the image lies at `path`."""
        # Not Path.is_file, which raises where a name is too long.
        return os.path.isfile(self.location)

    def has_caption(self) -> bool:
        """Whether anybody wrote anything about it but white space."""
        return any(caption.strip() for caption in self.captions)

    def read(self) -> bytes:
        """The encoded bytes of the image.

        Raises:
            InputError: they cannot be read.
        """
        if self.member is None:
            return images.read_bytes(self.path)
        if self.member.size > MAX_BYTES:
            raise InputError(f"'{self.file_name}' has more than {MAX_BYTES:,} bytes; make the image smaller")
        try:
            if not self.member.column:
                with self.path.open("rb") as file:
                    file.seek(self.member.at)
                    return file.read(self.member.size)
            return encoded(_column(os.fspath(self.location), self.member.column).row(self.member.at))
        except (OSError, ValueError, IndexError, StopIteration) as error:
            raise InputError(f"cannot read '{self.file_name}' in '{self.location}': {error}; get it again") from None


def encoded(cell: Any) -> bytes:
    """The image in a cell: bytes, or `datasets`' {"bytes", "path"}, or a path."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return images.read_bytes(Path(cell))
    return cell or b""


@functools.lru_cache(maxsize=8)  # in each process
def _column(path: str, column: str) -> _ArrowColumn | _ParquetColumn:
    return (_ParquetColumn if path.endswith(".parquet") else _ArrowColumn)(path, column)


class _ArrowColumn:
    """A column of an Arrow stream or file, mapped into memory."""

    def __init__(self, path: str, column: str):
        self.values = open_arrow(path).column(column)

    def row(self, index: int) -> Any:
        return self.values[index].as_py()


def open_arrow(path: str):
    """The table of an Arrow file, mapped into memory, not read."""
    import pyarrow

    source = pyarrow.memory_map(path)
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


class _ParquetColumn:
    """A column of a Parquet file, a few rows at a time.

    Reading rows in ascending order costs one pass. Going back starts the row group again.
    """

    def __init__(self, path: str, column: str):
        from pyarrow import parquet

        self.file, self.column = parquet.ParquetFile(path, buffer_size=1 << 20), column
        self.starts = [0]
        for group in range(self.file.num_row_groups):
            self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)
        self.group, self.first, self.batch, self.batches = -1, 0, None, iter(())

    def row(self, index: int) -> Any:
        group = bisect.bisect_right(self.starts, index) - 1
        if group != self.group or index < self.first:
            self.group, self.first, self.batch = group, self.starts[group], None
            self.batches = self.file.iter_batches(16, row_groups=[group], columns=[self.column])
        while self.batch is None or index >= self.first + len(self.batch):
            self.first += len(self.batch) if self.batch is not None else 0
            self.batch = next(self.batches)
        return self.batch.column(0)[index - self.first].as_py()
