"""Fetch COCO 2014 from a server: the captions out of the archive, then images one by one, into COCO's own layout.

    client = Client()
    fetch_annotations(cache, "http://images.cocodataset.org", client)
    failed = fetch_images(records, client)          # image id -> reason
    fetcher(client, cache, False)(records)          # the same, and ends the run when there are any

A file takes its name only when it is whole and checked, so that whatever stops a run, the next one goes on from there.
"""

from __future__ import annotations

import email.utils
import errno
import queue
import random
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO

from captioning import InputError, cli
from captioning.data import images
from captioning.data.annotations import NO_NETWORK_HINT, PARTS
from captioning.data.fetch import Answer, FetchError, fetch, shown
from captioning.data.packed import ZIP_METHODS
from captioning.data.records import Record
from captioning.files import make_folder, remove, remove_leftovers, replacing, write_whole

ANNOTATIONS_ZIP = "annotations/annotations_trainval2014.zip"  # 241 MB, the captions a small part of it
ANNOTATIONS = [f"annotations/captions_{part}.json" for part in PARTS]
MAX_ARCHIVE = 1_000_000_000  # bytes
MAX_ANNOTATIONS = 500_000_000  # bytes of one unpacked file

CONNECTIONS = 8
RETRIES = 8  # with the waits below a minute and a half
FEW_RETRIES = 2  # of a server that has never answered, or a file that arrives damaged
FIRST_WAIT = 0.5  # seconds; doubled for each further retry
LONGEST_WAIT = 30.0
LONGEST_RETRY_AFTER = 120.0  # a server may ask for more
TIMEOUT = 20.0  # seconds without a byte
DEADLINE = 180.0  # seconds for an image or a block
FAILURES_IN_A_ROW = 20  # then it is not the images
BLOCK = 1 << 20  # bytes of the archive fetched at a time


class Unfinished(InputError):
    """A download that could not be completed; what arrived is kept, and running again goes on from there."""

    exit_code = 1


class Client:
    """Asks servers with patience; its methods may be called from several threads."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._answered = False  # has any server ever
        self._not_before = 0.0  # a server's Retry-After holds for all threads
        self.stopped = threading.Event()

    def get(self, url: str, check: Callable[[bytes], None] | None = None, **options) -> Answer:
        """Fetch `url` as `fetch` does, again and again where that may help.

        Args:
            check: raises InputError when the bytes are not those of the file.

        Raises:
            FetchError: it failed for good.
        """
        attempt = 0
        while True:
            attempt += 1
            self._wait(self._not_before - time.monotonic())
            if "sink" in options:
                options["sink"].restart()
            try:
                answer = fetch(url, session=self._session(), **{"timeout": TIMEOUT, "deadline": DEADLINE} | options)
                self._answered = True
                if check:
                    check(answer.data)
                return answer
            except FetchError as failure:
                error = failure
                self._threads.session = None  # its connections may be in any state
                self._answered |= failure.status is not None
                patient = self._answered
            except InputError as failure:  # of `check`
                error, patient = FetchError(str(failure), "damaged", transient=True), False
            if self.stopped.is_set() or not error.transient or attempt > (RETRIES if patient else FEW_RETRIES):
                raise error
            if error.retry_after:
                self._not_before = time.monotonic() + min(_seconds(error.retry_after), LONGEST_RETRY_AFTER)
            # Jitter, so that connections that failed together do not come back together.
            self._wait(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1))

    def _wait(self, seconds: float) -> None:
        self.stopped.wait(max(0.0, seconds))

    def _session(self):
        if getattr(self._threads, "session", None) is None:
            import requests

            self._threads.session = requests.Session()
        return self._threads.session


def _seconds(retry_after: str) -> float:
    """The header's value, a number of seconds or a date, from now."""
    if retry_after.strip().isdecimal():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


# ---- images


def missing(records: Sequence[Record]) -> list[Record]:
    """The records whose images have yet to be fetched."""
    return [record for record in records if record.url and not record.is_there()]


def fetch_images(
    records: Sequence[Record], client: Client, connections: int = CONNECTIONS, within: Path | None = None
) -> dict[int, str]:
    """Fetch the images that are not at their `path` yet; a bar on stderr shows images, MB/s and the time left.

    Args:
        within: a folder that the user named (default: the one above the images'); no folder below it may be a link.

    Returns:
        The ids of the images that the server does not have, or not whole, and why.

    Raises:
        Unfinished: the server went away, or nothing that it sends is of use.
    """
    from tqdm import tqdm

    wanted = missing(records)
    if not wanted:
        return {}
    for folder in {record.path.parent for record in wanted}:
        make_folder(folder, within or folder.parent)
        remove_leftovers(folder)
    waiting = iter(wanted)
    results: queue.SimpleQueue[tuple[Record, float, int, Exception | None]] = queue.SimpleQueue()
    lock = threading.Lock()

    def work() -> None:
        while not client.stopped.is_set():
            with lock:
                record = next(waiting, None)
            if record is None:
                return
            began = time.monotonic()
            try:
                results.put((record, began, _fetch_image(record, client), None))
            except Exception as error:
                results.put((record, began, 0, error))

    threads = [threading.Thread(target=work, name="images", daemon=True) for _ in range(min(connections, len(wanted)))]
    failed: dict[int, str] = {}
    in_a_row, received, began = 0, 0, time.monotonic()
    arrived = began  # when the last image did
    try:
        for thread in threads:
            thread.start()
        with tqdm(total=len(wanted), unit="image", desc="fetching", file=sys.stderr) as bar:
            for _ in wanted:
                record, asked, size, error = results.get()
                if error is None:
                    in_a_row, arrived, received = 0, time.monotonic(), received + size
                elif isinstance(error, FetchError):
                    in_a_row += 1
                    failed[record.image_id] = error.reason
                    # That server is gone, not this image alone, if nothing else came either.
                    if in_a_row == FAILURES_IN_A_ROW or (not error.reachable and arrived < asked):
                        raise Unfinished(
                            f"stopped after {in_a_row} failures in a row, the last: {error}; {_kept(wanted)}, and the "
                            "same command goes on from there"
                        )
                else:
                    raise error
                bar.set_postfix_str(f"{received / 1e6 / max(time.monotonic() - began, 1e-3):.1f} MB/s", refresh=False)
                bar.update()
    except BaseException:
        client.stopped.set()
        # A thread that is writing ends in a moment; one that waits for the network writes nothing any more.
        patience = time.monotonic() + 1
        for thread in threads:
            if thread.ident:
                thread.join(max(0.0, patience - time.monotonic()))
        raise
    return failed


def _kept(wanted: list[Record]) -> str:
    there = len(wanted) - len(missing(wanted))
    return f"{there:,} of {len(wanted):,} images were fetched and are kept in '{wanted[0].path.parent.parent}'"


def _fetch_image(record: Record, client: Client) -> int:
    """Fetch one image, check it, and put it in its place; returns its bytes."""

    def check(data: bytes) -> None:
        size = images.decode(data, record.file_name).size
        # EXIF may have turned it.
        if record.size and size not in (record.size, record.size[::-1]):
            raise InputError(f"the image is of {size[0]}x{size[1]} pixels, not of {record.size[0]}x{record.size[1]}")

    assert record.url is not None, "it is on a server"
    data = client.get(record.url, check).data
    if not client.stopped.is_set():
        write_whole(record.path, data)
    return len(data)


def list_failures(failed: dict[int, str]) -> list[str]:
    """One line for each reason, with the ids of its images."""
    return [
        f"{reason}: {', '.join(str(image_id) for image_id in sorted(failed) if failed[image_id] == reason)}"
        for reason, _ in Counter(failed.values()).most_common()
    ]


def fetcher(client: Client, cache_dir: Path, skip_missing: bool) -> Callable[[Sequence[Record]], None]:
    """What fetches the images of records into `cache_dir`; images that cannot be had are asked for once.

    Raises:
        Unfinished: by what is returned, when an image cannot be had, unless `skip_missing`.
    """
    given_up: set[int] = set()

    def fetch_all(records: Sequence[Record]) -> None:
        wanted = [record for record in records if record.image_id not in given_up]
        failed = fetch_images(wanted, client, within=cache_dir.expanduser())
        if not failed:
            return
        cli.note(f"{len(failed):,} images could not be fetched, by reason and id:")
        for line in list_failures(failed):
            cli.note(f"  {line}")
        if not skip_missing:
            raise Unfinished(
                f"{len(failed):,} images could not be fetched (listed above); what was fetched is kept in "
                f"'{cache_dir}': run the same command again to try them again, or add --skip_missing to take "
                "other images in their place"
            )
        given_up.update(failed)

    return fetch_all


# ---- captions


def fetch_annotations(cache_dir: Path, url: str, client: Client) -> Path:
    """Fetch COCO 2014's captions into `cache_dir`, laid out as a `coco_dir`; returns `cache_dir`.

    Only the captions are read out of the archive, by range requests, a block at a time: what arrived is kept until
    they are whole. A server that ignores ranges sends all of the archive.

    Raises:
        Unfinished: the server cannot be reached or does not have it.
        InputError: what it has is not COCO's archive.
    """
    from tqdm import tqdm

    wanted = [name for name in ANNOTATIONS if not (cache_dir / name).is_file()]
    if not wanted:
        return cache_dir
    folder = cache_dir / "annotations"
    make_folder(folder, cache_dir)
    remove_leftovers(folder)
    address = f"{url}/{ANNOTATIONS_ZIP}"
    archive = None
    try:
        try:
            archive = RemoteFile(address, client, folder)
        except FetchError as error:
            if error.status != 200:
                raise
        with tqdm(unit="B", unit_scale=True, desc="captions", file=sys.stderr) as bar:
            if archive:
                archive.bar = bar
                with BufferedReader(archive, BLOCK) as file:
                    _unpack(file, address, cache_dir, wanted, bar)
            else:
                with replacing(folder / "annotations.zip", keep=False) as part:
                    with part.open("wb") as file:
                        client.get(address, sink=_Counted(file, bar), max_bytes=MAX_ARCHIVE, deadline=86_400)
                    with part.open("rb") as file:
                        _unpack(file, address, cache_dir, wanted, bar)
    except FetchError as error:
        raise Unfinished(f"cannot fetch the captions: {error}; or {NO_NETWORK_HINT}") from None
    except InputError:
        if archive:
            archive.forget()  # damaged: fetched anew by the next run
        raise
    if archive:
        archive.forget()
    return cache_dir


def _unpack(file: BinaryIO, address: str, cache_dir: Path, wanted: Sequence[str], bar) -> None:
    """Write the members `wanted`, and no others, so that nothing can climb out of the folder; checksums included."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [archive.getinfo(name) for name in wanted]
            bar.total = max(bar.n, sum(member.compress_size for member in members))
            for member in members:
                if member.file_size > MAX_ANNOTATIONS:
                    raise zipfile.BadZipFile(f"{member.filename} would take {member.file_size:,} bytes")
                if member.compress_type not in ZIP_METHODS:
                    raise zipfile.BadZipFile(f"{member.filename} is packed in another way than COCO packs it")
                with (
                    replacing(cache_dir / member.filename) as part,
                    archive.open(member) as packed,
                    part.open("wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked, BLOCK)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        # RuntimeError: encrypted, or packed in a way that zipfile does not know
        reason = error.args[0] if error.args else type(error).__name__
        raise InputError(
            f"{shown(address)} is not COCO's archive of annotations, or damaged ({reason}); try again, or "
            f"{NO_NETWORK_HINT}"
        ) from None


class _Counted:
    """A file to write to that starts again with every attempt, and its bar with it."""

    def __init__(self, file: BinaryIO, bar):
        self.file, self.bar = file, bar

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.bar.update(len(data))

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.bar.reset()


class RemoteFile(RawIOBase):
    """A file on a server, read by range requests of BLOCK bytes, each kept on disk until `forget`.

    Raises:
        FetchError: it cannot be fetched; `status` is 200 where the server ignores ranges.
    """

    def __init__(self, address: str, client: Client, folder: Path):
        super().__init__()
        self.address, self.client, self.bar, self.at = address, client, None, 0
        first = client.get(address, span=(0, 0))
        assert first.total is not None, "the answer to a span says how long the whole is"
        self.total, self.version = first.total, first.version
        # Blocks of another state of the file are of no use.
        self.blocks = folder / f".blocks-{self.total}-{zlib.crc32(self.version.encode()):08x}"
        for other in folder.glob(".blocks-*"):
            if other != self.blocks:
                remove(other)
        make_folder(self.blocks, folder)
        remove_leftovers(self.blocks)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, self.total)[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "before the start")
        self.at = at
        return at

    def readinto(self, buffer) -> int:
        if self.at >= self.total:
            return 0
        start = self.at - self.at % BLOCK
        try:
            block = (self.blocks / str(start)).read_bytes()
        except FileNotFoundError:  # not fetched yet, or forgotten by another run that has finished
            block = self._fetch(start)
        data = block[self.at - start :][: len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _fetch(self, start: int) -> bytes:
        last = min(start + BLOCK, self.total) - 1
        answer = self.client.get(self.address, span=(start, last), max_bytes=BLOCK)
        if (answer.total, answer.version, len(answer.data)) != (self.total, self.version, last + 1 - start):
            raise FetchError(f"{shown(self.address)} changed while it was read; try again", "changed")
        write_whole(self.blocks / str(start), answer.data)
        if self.bar is not None:
            self.bar.update(len(answer.data))
        return answer.data

    def forget(self) -> None:
        """Remove the blocks."""
        remove(self.blocks)
