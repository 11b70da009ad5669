"""A tar that is compressed as a whole (gzip, bzip2, xz), read forwards; nothing is unpacked onto the disk.

    with open_tar("more.tar.gz") as tar:     # or a .tar as it is
        for member in tar: ...
    stream = Unpacked("more.tar.gz")
    stream.seek(member.offset_data); stream.read(member.size)

Reading forwards costs one pass. Going back begins at the start again, so members are asked for in the archive's order.
"""

# ruff: noqa: PTH123 (strings: see `sources`)

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, cast

from captioning import InputError
from captioning.data.fetch import MAX_BYTES

# What a zip's members may be packed by. Of bzip2 and LZMA, zipfile unpacks all that it has read at once, without a
# limit: a few bytes may become gigabytes.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
OPEN: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
STARTS = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00"}
# What reading such a file raises where it is damaged or cut short.
ERRORS = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
# Photographs hardly shrink, drawings do, and a bomb is a thousand times as large as its file.
MOST_GROWTH = 200  # times
ALWAYS_ALLOWED = 1_000_000_000  # bytes
MOST_MEMORY = 256_000_000  # bytes that an xz may ask for; `xz -9` asks for 65 million


def kind(path: str) -> str:
    """How a file is compressed, by its first bytes; "" if it is not, or otherwise.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    return next((name for name, mark in STARTS.items() if start.startswith(mark)), "")


@contextlib.contextmanager
def open_tar(path: str) -> Iterator[tarfile.TarFile]:
    """A tar, compressed or not, to be read forwards.

    Raises:
        InputError: see `Unpacked`.
        tarfile.TarError, or one of ERRORS: it is no tar, damaged, or cannot be read.
    """
    if kind(path):
        with Unpacked(path) as stream, tarfile.open(fileobj=cast(Any, stream), mode="r:") as tar:
            yield tar
    else:
        with tarfile.open(path, "r:") as tar:
            yield tar


class Unpacked(io.RawIOBase):
    """The unpacked bytes of a file, as `tarfile` reads them. No read and no seek is larger than it has reason to be.

    Raises:
        InputError: the file unpacks to far more than it should, or asks for too much memory.
        OSError: it cannot be read.
    """

    def __init__(self, path: str):
        self.path, how = path, kind(path)
        self.most = max(ALWAYS_ALLOWED, MOST_GROWTH * os.path.getsize(path))  # noqa: PTH202
        if how == "xz":
            self._check_memory()
        self.stream = OPEN[how](path, "rb")

    def _check_memory(self) -> None:
        with open(self.path, "rb") as file:
            try:
                lzma.LZMADecompressor(memlimit=MOST_MEMORY).decompress(file.read(1 << 16), max_length=1)
            except lzma.LZMAError as error:
                if "limit" in str(error):
                    raise InputError(
                        f"'{self.path}' needs more than {MOST_MEMORY:,} bytes of memory; compress it again with xz -6"
                    ) from None

    def _check(self, end: int) -> None:
        if end > self.most:
            raise InputError(
                f"'{self.path}' unpacks to more than {self.most:,} bytes, too much for its size; unpack it with "
                f"tar -xf '{self.path}', and name the folder"
            )

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on; nothing in a tar has a use for more at once than an image may have."""
        if not 0 <= size <= MAX_BYTES + 1:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self._check(self.stream.tell() + size)
        return self.stream.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._check(offset)
        return self.stream.seek(offset)

    def tell(self) -> int:
        return self.stream.tell()

    def close(self) -> None:
        if not self.closed and hasattr(self, "stream"):
            self.stream.close()
        super().close()
