"""The forms in which people keep images with captions, one function each; every one yields the same `Item`s.

No image is opened here, and none is unpacked: what lies in a tar, an Arrow or a Parquet file is read where it lies.
"""

# ruff: noqa: PTH118, PTH119, PTH122 (names are strings here: a million Paths take half a gigabyte)

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.data.annotations import inside
from captioning.data.find import Finder, plain
from captioning.data.images import SUFFIXES
from captioning.data.records import Member, Record
from captioning.data.tables import (
    SAMPLE,
    Columns,
    Table,
    Wanted,
    as_id,
    captions_of,
    choose_columns,
    open_text,
    read_arrow,
    split_of_name,
    split_of_value,
)

TEXTS = (".txt", ".caption", ".json")  # beside an image, in the order in which they are looked for


@dataclass(slots=True)
class Item:
    """One image, or one caption of it, as a data set lists it.

    Attributes:
        name: what tells images apart: a file name, or an address.
        split: train, validation or test; "" where the data do not say.
        image_id: where the data have a number.
        location: where the image lies; "" where a `Finder` has to look for it.
        hint: the folder that it is expected in.
        member: which image of the file at `location`.
        key: what tells images apart where neither name nor location does.
        url: where it is fetched from when it lies nowhere.
    """

    name: str
    captions: list[str]
    split: str = ""
    image_id: int | None = None
    location: str = ""
    hint: str = ""
    member: Member | None = None
    key: str = ""
    url: str | None = None
    size: tuple[int, int] | None = None


# ---- a text beside each image


def sidecars(root: Path, files: Iterable[str]) -> Iterator[Item]:
    """`photo.jpg` and `photo.txt`, or `photo.caption`: several lines are several captions.

    Args:
        files: every file below `root`, with its path.
    """
    files = list(files)
    texts = {file: file for file in files if file.lower().endswith(TEXTS)}
    # `photo.txt` also belongs to `Photo.JPG`, unless there is a `photo.jpg` that it is of.
    alike: dict[str, list[str]] = {}
    for text in texts:
        alike.setdefault(plain(text), []).append(text)
    several = Counter(plain(os.path.splitext(file)[0]) for file in files if not file.lower().endswith(TEXTS))
    texts |= {name: own[0] for name, own in alike.items() if len(own) == 1 and name not in texts}
    for file in files:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() not in SUFFIXES:
            continue
        names = [name for end in TEXTS for name in (stem + end, file + end)]
        if several[plain(stem)] == 1:
            names += [plain(name) for name in names]
        beside = next((texts[name] for name in names if name in texts), None)
        name = os.path.relpath(file, root).replace(os.sep, "/")
        captions = _captions_in(Path(beside)) if beside else []
        yield Item(name, captions, _split_of_folders(name), None, file)


def _captions_in(file: Path) -> list[str]:
    try:
        with open_text(file) as opened:
            text = opened.read(1 << 20)
        if file.suffix.lower() == ".json":
            return captions_of(json.loads(text))
    except UnicodeError:
        raise InputError(f"'{file}' is not text in UTF-8; save it again in that encoding") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is not JSON ({error}); correct it") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _split_of_folders(name: str) -> str:
    """The split that one of the folders of a path is named after."""
    return next((split for folder in name.split("/")[:-1] if (split := split_of_name(folder))), "")


# ---- a table


def table_items(table: Table, columns: Columns, finder: Finder, split: str = "") -> Iterator[Item]:
    """The rows of a table: CSV, JSON, Karpathy's JSON, Parquet, a `Dataset`; one for each caption, or a list."""
    folder = table.path.parent
    by_name = bool(table.embedded) and (bool(columns.image) or _named_twice(table))
    for row, cells in enumerate(table.rows()):
        captions = [
            caption
            for column in columns.captions
            for caption in captions_of(cells.get(column), tokens=column.lower() == "tokens")
        ]
        own_split = split
        if columns.split and cells.get(columns.split) not in (None, ""):
            own_split = split_of_value(cells[columns.split]) or ""
            if not own_split:
                raise InputError(
                    f"the split '{str(cells[columns.split])[:50]}' in row {row + 1} of '{table.path}' is none of "
                    "train, val and test; correct it, or name another column with --split_column (none: there is none)"
                )
        image_id = as_id(cells.get(columns.image_id)) if columns.image_id else None
        if table.embedded:
            cell = cells.get(columns.image or table.embedded)
            value = cell.get("path") if isinstance(cell, dict) else cell
            name = os.path.basename(str(value).replace("\\", "/")) if value else f"{table.path.stem}-{row:06d}"
            key = f"{own_split}/{value}" if by_name and value else f"{table.path}/{row}"
            member = Member(row, column=table.embedded)
            yield Item(name, captions, own_split, image_id, str(table.path), member=member, key=key)
            continue
        value = cells.get(columns.image)
        if value in (None, ""):
            continue
        name = _image_name(value)
        if as_id(value) is not None:
            number = as_id(value)
            image_id = number if image_id is None else image_id
            if number is not None and (found := finder.find_number(number)):
                yield Item(os.path.basename(found), captions, own_split, image_id, found)
                continue
        if columns.folder and cells.get(columns.folder):
            name = f"{inside(str(cells[columns.folder]), 'filepath')}/{name}"
        if name.lower().startswith(("http://", "https://")):
            yield Item(name, captions, own_split, image_id, url=name)
        else:
            beside = os.path.join(folder, name.replace("\\", "/"))
            yield Item(name, captions, own_split, image_id, beside if os.path.isfile(beside) else "", own_split)


def _named_twice(table: Table) -> bool:
    """Whether two rows whose images have one name hold one image: there is a row for each caption, then."""
    seen: dict[str, int] = {}
    for row, cells in enumerate(itertools.islice(table.rows(), SAMPLE)):
        cell = cells.get(table.embedded)
        name = cell.get("path") if isinstance(cell, dict) else None
        if name and name in seen:
            pair = [
                Record(0, name, str(table.path), (), member=Member(at, column=table.embedded))
                for at in (seen[name], row)
            ]
            return pair[0].read() == pair[1].read()
        if name:
            seen[name] = row
    return False


def _image_name(value: Any) -> str:
    """A cell's file name: without `./` before it, and without the number of the caption behind it."""
    if isinstance(value, dict):
        value = value.get("path") or ""
    name = str(value).strip().removeprefix("./")
    stem, mark, number = name.rpartition("#")
    return stem if mark and number.isdecimal() and os.path.splitext(stem)[1].lower() in SUFFIXES else name


# ---- COCO's two lists


def is_coco(content: Any) -> bool:
    """Whether a JSON value has COCO's lists of images and of captions."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    notes = content.get("annotations")
    return isinstance(notes, list) and any(
        isinstance(note, dict) and "image_id" in note and ("caption" in note or "captions" in note)
        for note in notes[:1000]
    )


def coco(path: Path, content: dict[str, Any], finder: Finder) -> Iterator[Item]:
    """COCO's captions of any year, VizWiz, nocaps and their kind."""
    captions: dict[Any, list[str]] = {}
    try:
        for note in content["annotations"]:
            own = captions.setdefault(note["image_id"], [])
            own += captions_of(note["caption"] if "caption" in note else note["captions"])
        images: dict[Any, dict[str, Any]] = {}
        for image in content["images"]:
            if images.setdefault(image["id"], image)["file_name"] != image["file_name"]:
                raise InputError(f"'{path}' has two images with the id {image['id']}; correct it")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not in COCO's captions format ({error} is missing or malformed); "
            "it needs 'images' with 'id' and 'file_name', and 'annotations' with 'image_id' and 'caption'"
        ) from None
    split = split_of_name(path.stem) or ""
    hint = next((word for word in path.stem.split("_") if split_of_name(word)), "")
    # Either the images are here, or they are fetched; one that is missing among others is missing.
    here = any(finder.find(str(image["file_name"]), hint) for image in itertools.islice(images.values(), 100))
    for image_id, image in images.items():
        sides: Any = image.get("width"), image.get("height")
        known = all(type(side) is int and side > 0 for side in sides)
        url = None if here else image.get("coco_url") or image.get("url")
        url = url if isinstance(url, str) else None
        size = sides if known else None
        own = captions.get(image_id, [])
        yield Item(str(image["file_name"]), own, split, as_id(image_id), hint=hint, url=url, size=size)


# ---- tars


def webdataset(tars: list[Path], root: Path) -> Iterator[Item]:
    """Tars of WebDataset and img2dataset: `0001.jpg` with `0001.txt` or `0001.json`. One pass reads the texts only.

    A tar's name, or that of a folder below `root`, may say the split.
    """
    for path in tars:
        split = split_of_name(path.stem) or _split_of_folders(os.path.relpath(path, root).replace(os.sep, "/"))
        kept = 0
        try:
            with tarfile.open(path, "r:") as tar:
                key = ""
                files: dict[str, Any] = {}
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    if name.startswith(".") or "__MACOSX" in folder:  # macOS keeps its own notes beside each file
                        continue
                    stem, _, ending = name.partition(".")
                    if f"{folder}/{stem}" != key:
                        yield from _sample(path, split, files)
                        key, files = f"{folder}/{stem}", {}
                    ending = ending.lower()
                    if f".{ending.rpartition('.')[2]}" in SUFFIXES:
                        kept += 1
                        files.setdefault("image", (member.name, Member(member.offset_data, member.size)))
                    elif ending in ("txt", "text", "caption", "json") and member.size < 1 << 20:
                        text = tar.extractfile(member)
                        files[ending] = text.read() if text else b""
                yield from _sample(path, split, files)
        except tarfile.ReadError as error:
            if not kept:
                with path.open("rb") as file:
                    packed = file.read(2) == b"\x1f\x8b"
                if packed:
                    raise InputError(f"'{path}' is compressed as a whole; run gunzip on it first") from None
                raise InputError(f"'{path}' is not a tar, or damaged ({error}); get it again") from None
            yield from _sample(path, split, files)
        with path.open("rb") as file:
            file.seek(-512, os.SEEK_END)
            if any(file.read()):  # a whole tar ends in zeros
                cli.note(f"'{path}' is cut short: {kept:,} images in it are used")


def _sample(path: Path, split: str, files: dict[str, Any]) -> Iterator[Item]:
    if "image" not in files:
        return
    name, member = files["image"]
    captions: list[str] = []
    for ending in ("txt", "text", "caption", "json"):
        if ending in files and not captions:
            text = files[ending].decode("utf-8", "replace")
            try:
                captions = captions_of(json.loads(text)) if ending == "json" else text.splitlines()
            except (ValueError, RecursionError):
                cli.note(f"'{name}' in '{path}' has a caption that is not JSON; it is left out")
    captions = [caption.strip() for caption in captions if caption.strip()]
    yield Item(
        name.rpartition("/")[2],
        captions,
        split or _split_of_folders(name),
        None,
        str(path),
        "",
        member,
        f"{path}:{member.at}",
    )


# ---- datasets


def hugging_face(dataset: Any, wanted: Wanted, name: str, spool: Path) -> Iterator[Item]:
    """A `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`.

    Args:
        name: of the data set, for messages.
        spool: a folder for those that do not lie on disk as Arrow files.
    """
    from datasets import Dataset, Image, IterableDataset

    splits = {"": dataset} if isinstance(dataset, Dataset | IterableDataset) else dict(dataset)
    for split, rows in splits.items():
        known = split_of_value(split) or split_of_name(str(split)) or ""
        if not known and rows is not dataset and len(splits) > 1:
            cli.note(f"split '{split}' of {name} is none of train, validation and test; its images are divided")
        if isinstance(rows, IterableDataset):
            for column, kind in (rows.features or {}).items():
                if isinstance(kind, Image):
                    rows = rows.cast_column(column, Image(decode=False))  # or each image is encoded anew
            options = {"features": rows.features, "cache_dir": str(spool)}
            rows = Dataset.from_generator(_again, gen_kwargs={"rows": rows}, **options)
        if not rows.cache_files or rows._indices is not None:
            rows.save_to_disk(spool / f"{split or 'all'}")
            rows = Dataset.load_from_disk(str(spool / f"{split or 'all'}"))
        for file in rows.cache_files:
            table = read_arrow(Path(file["filename"]))
            columns = choose_columns(table, wanted)
            if columns is None:
                raise InputError(
                    f"{name} has no column of images, or none of captions (columns: {', '.join(table.names)}); name "
                    "them with --image_column and --caption_column"
                )
            yield from table_items(table, columns, Finder([table.path.parent]), known)


def _again(rows) -> Iterator[Any]:
    yield from rows


# ---- official splits


def split_lists(texts: Iterable[Path], names: Iterable[str]) -> dict[str, str]:
    """The split of each image that lists such as `Flickr_8k.trainImages.txt` name: file name, or its stem -> split.

    Args:
        texts: files that may be such lists.
        names: some images of the data set.
    """
    known = {form for name in names for form in (os.path.basename(name), os.path.splitext(os.path.basename(name))[0])}
    found: dict[str, str] = {}
    for path in sorted(texts):
        split = split_of_name(path.stem)
        if split is None:
            continue
        try:
            with open_text(path) as file:
                lines = [line.strip() for line in file if line.strip()]
        except UnicodeError:
            continue
        if lines and sum(line in known for line in lines) > 0.5 * len(lines):
            found.update(dict.fromkeys(lines, split))
    return found
