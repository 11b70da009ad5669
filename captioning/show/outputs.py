"""Files of captions that lose no work: each caption is on disk as soon as it is made, and the same command goes on.

    with outputs.Captions(Path("captions.csv"), made_with, "continue") as captions:
        if not captions.has(name):
            captions.write({"path": name, "caption": "a dog"})      # or {"path": name, "error": "why there is none"}
        captions.flush()                                            # after each batch

`.jsonl`, `.csv` and `.tsv` are appended to. A `.json`, which has to be whole to be read, is written anew every few
seconds out of a hidden file of lines beside it, which goes when all is done. A record that a kill or a full disk cut
short is dropped before the next one is written. A hidden `.NAME.made_with` keeps the model and the settings, so that
captions of another model are never mixed in without a word.
"""

# ruff: noqa: PTH122 (names of files are strings here, as in `sources`)

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from captioning import InputError, cli
from captioning.data.sources import Source
from captioning.files import json_text, lock, open_in_place, read_json, remove_leftovers, replacing, write_whole
from captioning.show import entries
from captioning.show.entries import Entry

Mode = Literal["continue", "append", "overwrite"]

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
SYNC_EVERY = 2.0  # seconds between two times that a file is forced to the disk, which only a power cut needs
LIST_EVERY = 2.0  # seconds between two times that a .json is written anew ...
SHARE = 0.05  # ... which may take this share of the time


class Captions:
    """A file of captions, one entry for each image; the class of `.jsonl`, `.csv`, `.tsv` and `.json` alike.

    Args:
        file: its ending decides the form.
        made_with: the model and the settings; those of a file that is there have to be the same.
        mode: what to do with a file that is there: "continue" it if it was made with the same, "append" to it
            whatever it was made with, or "overwrite" it.
        columns: of a table.
        key: the field that names the image.

    Attributes:
        done: the names of the images that have a caption.

    A new file appears, and one that is overwritten goes, with the first entry or at the end without an error: a model
    that cannot be loaded costs nobody a file.

    Raises:
        InputError: the file is of another form or was made with something else, or another process writes to it.
    """

    def __init__(
        self, file: Path, made_with: Mapping[str, Any], mode: Mode, columns: Iterable[str] = (), key: str = "path"
    ):
        self.file, self.made_with, self.mode, self.key = file, made_with, mode, key
        ending = file.suffix.lower()
        self.form: _Lines | _Table = _Table(list(columns), ending) if ending in (".csv", ".tsv") else _Lines()
        # A JSON list is written out of a file of lines.
        self.lines = file if ending != ".json" else _beside(file, "lines")
        self.done: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._raw: BinaryIO | None = None
        self._synced = self._listed = 0.0  # when
        self._unsynced = self._unlisted = False
        self._cost = 0.0  # seconds that writing the JSON list took

    def __enter__(self) -> Captions:
        if not self._stack.enter_context(lock(_beside(self.file, "lock"), wait=False)):
            raise InputError(f"another process writes to '{self.file}'; name another file, or --shard the work")
        try:
            for name in (self.file.name, self.lines.name):
                remove_leftovers(self.file.parent, name)
            if self.mode != "overwrite" and self.file.is_file() and self.file.stat().st_size > 0:
                self._check_made_with()
                self._take_over()
                self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if not self._raw and not error:
                self._begin()
            if self._raw:
                with self._raw:
                    os.fsync(self._raw.fileno())
            if self._raw and self.lines != self.file:
                # After an error the list is as new as can be; if the disk is full, it stays as it was.
                with contextlib.suppress(*([OSError] if error else [])):
                    self._write_list()
                    if not error:
                        self.lines.unlink()
        finally:
            self._stack.close()

    def has(self, name: str) -> bool:
        return name in self.done

    def write(self, entry: Entry) -> None:
        """Append an entry, whole or not at all.

        Raises:
            OSError: the disk is full, or something else is wrong with it.
        """
        handle = (self._raw or self._begin()).fileno()
        end = os.fstat(handle).st_size
        data = self.form.record(entry)
        try:
            written = os.write(handle, data)
            while written < len(data):  # the disk is nearly full: the rest fails, and says so
                written += os.write(handle, data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, end)
            error.filename = str(self.file)
            raise
        self._unsynced = self._unlisted = True
        if "error" not in entry:
            self.done.add(entry[self.key])

    def flush(self) -> None:
        """Let what was written be seen, and outlast a power cut, if that has not been done for a while."""
        now = time.monotonic()
        if self._raw and self._unsynced and now - self._synced > SYNC_EVERY:
            os.fsync(self._raw.fileno())
            self._synced, self._unsynced = now, False
        if self.lines != self.file and self._unlisted and now - self._listed > max(LIST_EVERY, self._cost / SHARE):
            self._write_list()
            self._listed, self._unlisted = time.monotonic(), False
            self._cost = self._listed - now

    # ---- the start

    def _begin(self) -> BinaryIO:
        write_whole(self.lines, self.form.header())
        if self.lines != self.file:
            self._write_list()
        return self._open()

    def _open(self) -> BinaryIO:
        write_whole(_beside(self.file, "made_with"), json_text(self.made_with, indent=1) + "\n")
        self._raw = open_in_place(self.lines, append=True)
        return self._raw

    def _check_made_with(self) -> None:
        if self.mode == "append":
            return
        choice = "add --append to write more into it, or --overwrite to start anew, or name another file"
        if not says_what_made_it(self.file):
            raise InputError(f"'{self.file}' is there, and nothing says what made it; {choice}")
        try:
            earlier = read_json(_beside(self.file, "made_with"))
        except InputError:
            earlier = {}
        now = json.loads(json.dumps(self.made_with))
        for name in sorted(earlier.keys() | now.keys()):
            if earlier.get(name) != now.get(name):
                raise InputError(
                    f"'{self.file}' was made with {name} {earlier.get(name, 'unset')}, and not "
                    f"{now.get(name, 'unset')}; {choice}"
                )

    def _take_over(self) -> None:
        """Keep the captions of an earlier run; images that failed then are tried again."""
        if self.lines != self.file and not self.lines.is_file():
            with replacing(self.lines) as part, part.open("wb") as opened:
                opened.writelines(self.form.record(entry) for entry in _list_of(self.file, self.key))
        ours = _beside(self.file, "made_with").exists()
        changed = False
        for record, entry in self._entries(ours):
            failed = bool(entry and entry.get("error"))
            changed |= failed or not record.endswith(b"\n")
            if entry and not failed:
                self.done.add(entry[self.key])
        if changed or self._cut:
            with replacing(self.lines) as part, part.open("wb") as opened:
                for record, entry in self._entries(ours):
                    if not (entry and entry.get("error")):
                        opened.write(record if record.endswith(b"\n") else record + b"\n")
        if self._cut:
            cli.note(f"the last entry of '{self.lines}' was cut short: it is left out, and made anew")

    def _entries(self, ours: bool) -> Iterator[tuple[bytes, Entry | None]]:
        """The records and what they hold, None for a head. Of a file of `ours`, an end cut short is left out."""
        self._cut = False
        with self.lines.open("rb") as opened:
            for number, (record, whole) in enumerate(self.form.split(opened), 1):
                if not whole and ours:
                    self._cut = True
                    return
                yield record, self.form.entry(record, number, self.file, self.key)

    def _write_list(self) -> None:
        """Write the JSON list out of the lines, as they are; memory does not grow with them."""
        with replacing(self.file) as part, part.open("wb") as target, self.lines.open("rb") as source:
            before = b"[\n"
            for record, whole in self.form.split(source):
                if whole:
                    target.write(before + record.rstrip(b"\n"))
                    before = b",\n"
            target.write(b"[]\n" if before == b"[\n" else b"\n]\n")


def _beside(file: Path, what: str) -> Path:
    """A hidden file that belongs to `file`."""
    return file.with_name(f".{file.name}.{what}")


def says_what_made_it(file: Path) -> bool:
    """Whether a file of captions is one of ours."""
    return _beside(file, "made_with").exists()


def write_made_with(file: Path, content: str, made_with: Mapping[str, Any]) -> None:
    """Write a file as a whole, and beside it what made it, so that `was_made_with` knows later."""
    _beside(file, "made_with").unlink(missing_ok=True)  # or a run that dies in between leaves the wrong one
    write_whole(file, content)
    write_whole(_beside(file, "made_with"), json_text(made_with, indent=1) + "\n")


def was_made_with(file: Path, made_with: Mapping[str, Any]) -> bool:
    """Whether a file is there, and was made with the same model, settings and data."""
    try:
        return file.is_file() and read_json(_beside(file, "made_with")) == json.loads(json.dumps(made_with))
    except (InputError, OSError):
        return False


def _list_of(file: Path, key: str) -> list[Entry]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(content, list) or not all(isinstance(entry, dict) and key in entry for entry in content):
            raise ValueError
    except (ValueError, RecursionError):
        raise _other_form(file, f"a list of objects with '{key}'") from None
    return content


def _other_form(file: Path, form: str) -> InputError:
    return InputError(f"'{file}' is there and is no file of captions ({form}); --overwrite it, or name another file")


# ---- forms


class _Lines:
    """JSON Lines: a record is a line."""

    def header(self) -> bytes:
        return b""

    def record(self, entry: Entry) -> bytes:
        return json_text(entry).encode() + b"\n"

    def split(self, file: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
        """(record, whether it is whole); only the last one may not be."""
        for line in file:
            if line.strip():
                yield line, line.endswith(b"\n")

    def entry(self, record: bytes, number: int, file: Path, key: str) -> Entry | None:
        try:
            entry = json.loads(record.decode("utf-8-sig"))
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                raise ValueError
        except (ValueError, RecursionError):
            raise _other_form(file, f"line {number} is no object with '{key}'") from None
        return entry


class _Table:
    """CSV or TSV as spreadsheets write it: a cell with a delimiter, a quote or a line break is quoted."""

    def __init__(self, columns: list[str], ending: str):
        self.columns = columns
        self.options: dict[str, Any] = {"delimiter": "\t" if ending == ".tsv" else ",", "lineterminator": "\n"}

    def header(self) -> bytes:
        return self._line(self.columns)

    def record(self, entry: Entry) -> bytes:
        cells = entries.cells(entry)
        return self._line([cells.get(column, "") for column in self.columns])

    def _line(self, cells: list[Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, **self.options).writerow(cells)
        return text.getvalue().encode("utf-8", "replace")  # half of a character has no place in UTF-8

    def split(self, file: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
        record = b""
        for line in file:
            record += line
            if record.count(b'"') % 2 == 0 and line.endswith(b"\n"):
                yield record, True
                record = b""
        if record:
            yield record, False

    def entry(self, record: bytes, number: int, file: Path, key: str) -> Entry | None:
        text = record.decode("utf-8-sig", "replace")
        cells = next(csv.reader(io.StringIO(text, newline=""), **self.options), [])
        if number == 1:
            if cells != self.columns:
                raise _other_form(file, f"its first line is not {self.options['delimiter'].join(self.columns)}")
            return None
        entry = dict(zip(self.columns, cells, strict=False))
        if entry.get("error"):
            return {key: entry[key], "error": entry["error"]}
        return entry


# ---- a text beside each image


class Sidecars:
    """A text of the image's name beside each image. One that is there stays, whoever wrote it, unless told otherwise.

    Args:
        ending: `.txt` or `.caption`.
        sources: all the images. `photo.jpg` and `photo.png` get texts of their full names, `photo.jpg.txt`.
    """

    def __init__(self, ending: str, sources: Iterable[Source], overwrite: bool):
        self.ending, self.overwrite = ending, overwrite
        self._written: set[str] = set()
        stems: dict[str, int] = {}
        for source in sources:
            if not source.is_file:
                kind = "an archive" if source.inner else "an address"
                raise InputError(f"--sidecar writes beside files, and '{source.name}' is in {kind}; use --output")
            stem = os.path.splitext(source.path)[0]
            stems[stem] = stems.get(stem, 0) + 1
        self._shared = {stem for stem, count in stems.items() if count > 1}

    def path(self, source: Source) -> Path:
        stem = os.path.splitext(source.path)[0]
        return Path((source.path if stem in self._shared else stem) + self.ending)

    def has(self, source: Source) -> bool:
        return not self.overwrite and os.path.lexists(self.path(source))

    def write(self, source: Source, caption: str) -> None:
        write_whole(self.path(source), caption + "\n")


# ---- all of them together


class Outputs:
    """Where the captions of images go: any of a file, an ImageFolder's metadata, and a text beside each image.

    An image is done when each of them has it. One that lacks it alone gets what the others have already.

    Args:
        output: a file of captions, see `Captions`.
        metadata: the `metadata.jsonl` of a folder, with the keys `file_name`, `text` and, where it is known,
            `confidence`.
        sidecars: see `Sidecars`.
    """

    def __init__(
        self, output: Captions | None = None, metadata: Captions | None = None, sidecars: Sidecars | None = None
    ):
        self.output, self.metadata, self.sidecars = output, metadata, sidecars
        self._stack = contextlib.ExitStack()

    def __bool__(self) -> bool:
        return bool(self.output or self.metadata or self.sidecars)

    def __enter__(self) -> Outputs:
        for file in (self.output, self.metadata):
            if file:
                self._stack.enter_context(file)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def __str__(self) -> str:
        """Where they go, in words."""
        places = [f"'{file.file}'" for file in (self.output, self.metadata) if file]
        return " and ".join(places + (["the texts beside the images"] if self.sidecars else []))

    def has(self, source: Source) -> bool:
        return bool(self) and (
            (not self.output or self.output.has(source.name))
            and (not self.metadata or self.metadata.has(_below_root(source)))
            and (not self.sidecars or self.sidecars.has(source))
        )

    def write(self, source: Source, entry: Entry) -> None:
        """Write what `--json` says of an image to each place that lacks it.

        Raises:
            OSError: the disk is full, or something else is wrong with it.
        """
        if self.output and not self.output.has(source.name):
            self.output.write(entry)
        if entry.get("needs_review"):
            return  # there is a draft, and no caption
        if self.metadata and not self.metadata.has(_below_root(source)):
            sure = {"confidence": entry["confidence"]} if "confidence" in entry else {}
            self.metadata.write({"file_name": _below_root(source), "text": entry["caption"], **sure})
        if self.sidecars and not self.sidecars.has(source):
            self.sidecars.write(source, entry["caption"])

    def fail(self, source: Source, reason: str) -> None:
        """Write why there is no caption, where there is room for that."""
        if self.output and not self.output.has(source.name):
            self.output.write({"path": source.name, "error": reason})

    def flush(self) -> None:
        for file in (self.output, self.metadata):
            if file:
                file.flush()


def _below_root(source: Source) -> str:
    return os.path.relpath(source.name, source.root).replace(os.sep, "/")


def of_shard(file: Path, part: tuple[int, int] | None) -> Path:
    """The file of one machine: `captions.json` -> `captions.2-of-4.json`."""
    return file.with_name(f"{file.stem}.{part[0]}-of-{part[1]}{file.suffix}") if part else file
