"""processed_data/, written and read.

with replaced(target) as folder:                                  # whole in the end, or not there
    writer = SplitWriter(folder)
    writer.keep("train", record, jpeg)                            # for each image
    writer.finish(tokenizer, max_length=64)
    (folder / DESCRIPTION).write_text(describe(...))

splits, description = load_prepared(target)
splits["train"].image(0), splits["train"].captions[0], splits["train"].labels(0)
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from captioning import InputError, foreign
from captioning.data import images
from captioning.data.check import AGAIN, check
from captioning.data.choose import SPLITS
from captioning.data.records import Record
from captioning.files import lock, read_json, remove

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pyarrow
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = "dataset.json"
# What stands in a prepared folder, besides hidden files and the tokenizer's, whose names differ.
WRITTEN = (DESCRIPTION, "dataset_dict.json", *SPLITS, "preprocessor_config.json", "sample")
OF_TOKENIZERS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
SHARD_SIZE = 500_000_000  # bytes of one Arrow file, about
# What is used of a description, which may come from somebody else.
COUNT = foreign.whole(0, 2**40)
DESCRIBED = {
    "source": foreign.text(least=1),
    "encoder": foreign.either(foreign.text(4096, 1), foreign.list_of(foreign.text(4096, 1), 2, 2)),
    "decoder": foreign.text(4096, 1),
    "images": foreign.object_of(COUNT, most=100),
    "max_length": foreign.whole(2, 1_000_000),
    "center_crop": foreign.either(foreign.flag, foreign.null),
    "captions_truncated": COUNT,
    "dropped": foreign.object_of(COUNT),
    "versions": foreign.object_of(foreign.text()),
    "shard": foreign.either(foreign.text(100), foreign.null),
}
NEEDED = ("source", "encoder", "decoder", "images")


# ---- the folder


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its place when the block ends without an error.

    Hidden files of the folder that is replaced are kept. What a run that was killed left beside it is cleared away,
    and a folder that it had just set aside is put back.

    Raises:
        InputError: something else is there, or another run is writing to it.
    """
    _check(target)
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--save_path '{target}' lies below a file; name another folder") from None
    work = target.with_name(f".{target.name}.partial")
    old = work.with_name(f"{work.name}.old")
    with lock(target.with_name(f".{target.name}.lock"), wait=False) as ours:
        if not ours:
            raise InputError(
                f"another run is writing to --save_path '{target}'; wait until it has ended, or name another folder"
            )
        if old.is_dir() and not old.is_symlink() and not target.exists():
            old.rename(target)
        for left in (old, work):
            remove(left)
        work.mkdir()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        _move_into_place(work, target, old)


def _check(target: Path) -> None:
    """Refuse to replace a folder that `dataloader.py` did not write, or one that holds more than it wrote."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--save_path '{target}' is a file; name a folder")
    if not target.is_dir():
        return
    names = sorted(entry.name for entry in target.iterdir() if not entry.name.startswith("."))
    ours = {"dataset_dict.json", DESCRIPTION} <= set(names)  # others too call a file dataset.json
    others = [name for name in names if not (ours and _is_ours(name))]
    if others:
        raise InputError(
            f"--save_path '{target}' holds other files ({others[0]}); "
            + ("move them elsewhere, or name a new folder" if ours else "name a new folder, or one made by this script")
        )


def _is_ours(name: str) -> bool:
    """Whether an entry of a prepared folder has a name that `dataloader.py` writes."""
    return name in WRITTEN or name.startswith(OF_TOKENIZERS)


def _move_into_place(work: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            for hidden in target.glob(".*"):
                if hidden.is_file():  # a link stays a link: what it leads to is no part of the folder
                    shutil.copy2(hidden, work / hidden.name, follow_symlinks=False)
            target.rename(old)
        work.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise InputError(
            f"the data set is finished in '{work}' but cannot be moved to '{target}' ({error.strerror}); "
            "move it yourself, or use it where it is"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


# ---- written


class SplitWriter:
    """Writes the splits to a folder as `datasets.load_from_disk` reads them; memory does not grow with the images.

    The rows wait in files of their own until the last is there, for a tokenizer may be trained on their captions, and
    a pool may have to be divided.
    """

    def __init__(self, folder: Path):
        self.folder, self.spool = folder, folder / ".spool"
        self.spool.mkdir()
        self.writers: dict[str, Any] = {}  # pool -> ArrowWriter

    def keep(self, pool: str, record: Record, data: bytes) -> None:
        """Add a row to a split, or to a pool that will be divided: an image that is encoded as `data`."""
        if pool not in self.writers:
            self.writers[pool] = self._open(pool)
        self.writers[pool].write(
            {
                "image_id": record.image_id,
                "file_name": record.file_name,
                "image": {"bytes": data, "path": None},
                "captions": [caption for caption in record.captions if caption.strip()],
            }
        )

    def _open(self, pool: str):
        from datasets import Features, Image, List, Value
        from datasets.arrow_writer import ArrowWriter

        features = {"image_id": Value("int64"), "file_name": Value("string"), "image": Image()}
        features = Features({**features, "captions": List(Value("string"))})
        return ArrowWriter(features=features, path=str(self.spool / pool), writer_batch_size=256)

    def finish(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, divided: Mapping[str, Sequence[str]] | None = None
    ) -> int:
        """Write the splits with their `labels`; returns how many captions were truncated to `max_length`.

        Args:
            divided: the split of each row of the pools that are none.
        """
        truncated = 0
        shards = {split: _Shards(self.folder / split) for split in SPLITS}
        for pool, writer in self.writers.items():
            writer.finalize()
            splits = iter(divided[pool]) if divided and pool in divided else itertools.repeat(pool)
            truncated += _copy(self.spool / pool, shards, splits, tokenizer, max_length)
        for of_split in shards.values():
            of_split.finish()
        (self.folder / "dataset_dict.json").write_text(json.dumps({"splits": list(SPLITS)}), encoding="utf-8")
        shutil.rmtree(self.spool)
        return truncated


def _copy(
    spool: Path,
    shards: Mapping[str, _Shards],
    splits: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> int:
    """Copy the rows of an Arrow stream with the column `labels`, a few hundred at a time, and read, not mapped."""
    import pyarrow

    truncated = 0
    with pyarrow.OSFile(str(spool)) as file, pyarrow.ipc.open_stream(file) as batches:
        for batch in batches:
            labels, cut = tokenise(batch["captions"], tokenizer, max_length)
            truncated += cut
            table = pyarrow.Table.from_batches([batch]).append_column("labels", labels)
            own = list(itertools.islice(splits, len(batch)))
            for split in dict.fromkeys(own):
                rows = table.filter(pyarrow.array([each == split for each in own])) if set(own) != {split} else table
                shards[split].write(rows)
    return truncated


class _Shards:
    """The Arrow files of one split."""

    def __init__(self, folder: Path):
        self.folder, self.size = folder, 0
        self.paths: list[Path] = []
        self.writer: Any = None

    def write(self, table: pyarrow.Table) -> None:
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        if self.writer is None:
            self.folder.mkdir(exist_ok=True)
            self.paths.append(self.folder / f"{len(self.paths)}.arrow")
            features = {**Features.from_arrow_schema(table.schema), "labels": List(List(Value("int32")))}
            self.writer, self.size = ArrowWriter(features=Features(features), path=str(self.paths[-1])), 0
        self.writer.write_table(table)
        self.size += table.nbytes
        if self.size > SHARD_SIZE:
            self.writer.finalize()
            self.writer = None

    def finish(self) -> None:
        """Name the files, and write what lies beside the rows: by the library itself, for one row."""
        from datasets import Dataset

        if self.writer is not None:
            self.writer.finalize()
        folder = self.folder
        rows = Dataset.from_file(str(self.paths[0])).select(range(1))
        # The same arguments give the same bytes; a fingerprint drawn from object ids would not.
        rows._fingerprint = folder.name
        rows.save_to_disk(folder / "one")
        names = [f"data-{number:05d}-of-{len(self.paths):05d}.arrow" for number in range(len(self.paths))]
        for shard, name in zip(self.paths, names, strict=True):
            shard.rename(folder / name)
        state = json.loads((folder / "one" / "state.json").read_text(encoding="utf-8"))
        state["_data_files"] = [{"filename": name} for name in names]
        (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
        (folder / "one" / "dataset_info.json").rename(folder / "dataset_info.json")
        shutil.rmtree(folder / "one")


def tokenise(
    captions: pyarrow.ListArray, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[pyarrow.ListArray, int]:
    """Each image's captions -> their token ids likewise, and how many were truncated."""
    import pyarrow

    of_images = captions.to_pylist()
    # All of them at once: a call of the tokenizer costs more than a caption.
    ids, truncated = encode_captions(tokenizer, list(itertools.chain(*of_images)), max_length)
    rest = iter(ids)
    labels = [list(itertools.islice(rest, len(own))) for own in of_images]
    return pyarrow.array(labels, pyarrow.list_(pyarrow.list_(pyarrow.int32()))), truncated


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int
) -> tuple[list[list[int]], int]:
    """Captions -> token ids, each truncated to `max_length - 1` and ended by exactly one EOS.

    Returns:
        The ids of each caption, and how many captions were truncated.
    """
    eos = tokenizer.eos_token_id
    texts = [" ".join(caption.split()) for caption in captions]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    # A caption that spells out the end token would otherwise end early.
    encoded = [[token for token in ids if token != eos] for ids in encoded]
    truncated = sum(len(ids) > max_length - 1 for ids in encoded)
    return [[*ids[: max_length - 1], eos] for ids in encoded], truncated


def describe(
    source: str, images: dict[str, int], settings: Mapping[str, Any], truncated: int, dropped: Mapping[str, int]
) -> str:
    """The content of `dataset.json`. No dates and no paths of this machine: the same arguments, the same bytes.

    Args:
        source: where the images came from, in words.
        images: how many each split has.
        settings: the arguments that decided the rest, by name.
        truncated: captions that were longer than the settings allow.
        dropped: images by the reason why they were left out.
    """
    content = {
        "source": source,
        "images": images,
        **settings,
        "captions_truncated": truncated,
        "dropped": dict(sorted(dropped.items())),
        "versions": {name: version(name) for name in ("datasets", "pillow", "tokenizers", "transformers")},
    }
    return json.dumps(content, indent=2) + "\n"


# ---- read


class Split:
    """One split of a prepared folder: a row for each image, read from disk when it is asked for.

    Columns are read by themselves, so that captions cost no reading of images. A pickled or forked split maps the same
    files into memory. Whole columns (`image_id`, `captions`, `names`) are kept once they were asked for, at hundreds of
    bytes an image; what training reads of each row is not.

    Args:
        rows: the columns of `processed_data/`, as `datasets.load_from_disk` gives them.
        places: where they come from: folders, and how many rows of each, in order.

    Attributes:
        rows: the same; images stay encoded there: `{"bytes": bytes, "path": None}`.
    """

    def __init__(self, rows: datasets.Dataset, places: Sequence[tuple[Path, int]] = ()):
        from datasets import Image

        self.rows, self.places = rows.cast_column("image", Image(decode=False)), tuple(places)
        self._images = self.rows.select_columns("image")
        self._labels = self.rows.select_columns(["image_id", "labels"])
        self._captions = self.rows.select_columns("captions")
        self._named = self.rows.select_columns([c for c in ("image_id", "file_name") if c in self.rows.column_names])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Iterable[int]) -> Split:
        """The rows at `indices`, in that order."""
        indices = list(indices)
        ends = list(itertools.accumulate(count for _, count in self.places))
        own = itertools.groupby(indices, lambda index: bisect.bisect_right(ends, index)) if ends else ()
        return Split(self.rows.select(indices), [(self.places[at][0], len(list(run))) for at, run in own])

    def parts(self) -> Iterator[tuple[Path, Split]]:
        """The rows of each folder that they come from, one after the other."""
        start = 0
        for folder, count in self.places:
            yield folder, self.select(range(start, start + count))
            start += count

    @cached_property
    def image_id(self) -> list[int]:
        return self._list("image_id")

    @cached_property
    def file_name(self) -> list[str]:
        return self._list("file_name")

    @cached_property
    def names(self) -> list[str]:
        """What people are shown of each image: its file name, or where the data have none its number."""
        if "file_name" not in self.rows.column_names:
            return [f"image {image_id}" for image_id in self.image_id]
        return [name or f"image {number}" for name, number in zip(self.file_name, self.image_id, strict=True)]

    @cached_property
    def captions(self) -> list[list[str]]:
        """Every caption of each image, as the annotators wrote it."""
        return self._list("captions")

    def captions_of(self, index: int) -> list[str]:
        """Every caption of one image."""
        return self._captions[index]["captions"]

    def captions_in_turn(self) -> Iterator[list[str]]:
        """`captions_of` every image in turn."""
        return self._each("captions")

    @property
    def references(self) -> dict[int, list[str]]:
        """`captions` by image id."""
        return dict(zip(self.image_id, self.captions, strict=True))

    def results(self, predictions: Mapping[int, str]) -> list[dict[str, Any]]:
        """Captions by image id in COCO's results format, with file names where the data have them.

        Its readers look at `image_id` and `caption`, and pass over the rest.
        """
        entries: list[dict[str, Any]] = [{"image_id": each, "caption": predictions[each]} for each in self.image_id]
        if "file_name" in self.rows.column_names:
            for entry, name in zip(entries, self.file_name, strict=True):
                entry["file_name"] = name
        return entries

    def labels(self, index: int) -> list[list[int]]:
        """The token ids of each caption of an image; the last id of each is EOS."""
        return self.labelled(index)["labels"]

    def labelled(self, index: int) -> dict[str, Any]:
        """`image_id` and `labels` of an image, in one reading."""
        return self._labels[index]

    def lengths(self) -> np.ndarray:
        """Tokens of all captions of each image, EOS included: int32 (images,)."""
        import numpy as np

        of_captions, counts = self.caption_lengths()
        before = np.concatenate([[0], np.cumsum(of_captions)])  # tokens of the captions before each
        last = np.cumsum(counts)
        return (before[last] - before[last - counts]).astype(np.int32)

    def caption_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each caption, EOS included, one image's captions after another's; and captions of each image.

        Returns:
            int32 (captions,) and int32 (images,).
        """
        import numpy as np
        from pyarrow import compute

        tokens, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for chunk in self._chunks("labels"):
            tokens.append(compute.list_value_length(chunk.flatten()).to_numpy(zero_copy_only=False))
            counts.append(compute.list_value_length(chunk).to_numpy(zero_copy_only=False))
        return np.concatenate(tokens), np.concatenate(counts)

    def highest_token(self) -> int:
        """The highest token id of all captions."""
        from pyarrow import compute

        return max(compute.max(chunk.flatten().flatten()).as_py() or 0 for chunk in self._chunks("labels"))

    def retokenised(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Split:
        """The same images and captions with the token ids of another tokenizer, which are kept in memory."""
        import pyarrow
        from datasets import Dataset, concatenate_datasets

        labels = [tokenise(chunk, tokenizer, max_length)[0] for chunk in self._chunks("captions")]
        column = Dataset(pyarrow.table({"labels": pyarrow.chunked_array(labels)}))
        return Split(concatenate_datasets([self.rows.remove_columns("labels"), column], axis=1), self.places)

    def image(self, index: int) -> PIL.Image.Image:
        """An image in mode RGB.

        Raises:
            InputError: its bytes are not those of an image that `captioning.data.images` opens.
        """
        row = self._named[index]
        name = f"image {row['image_id']}" + (f" ({row['file_name']})" if row.get("file_name") else "")
        try:
            return images.to_rgb(images.decode(self.encoded(index), name), name)
        except images.ImageError as error:
            raise InputError(f"{name} of the prepared data cannot be read ({error.reason}); {AGAIN}") from None

    def encoded(self, index: int) -> bytes:
        """An image's bytes as they are stored, a JPEG where `dataloader.py` wrote them."""
        image = self._images[index]["image"]
        return (image and image["bytes"]) or b""

    def encoded_images(self) -> Iterator[bytes]:
        """`encoded` of every image in turn."""
        for chunk in self._chunks("image"):
            for image in chunk.field("bytes"):
                yield image.as_py() or b""

    @cached_property
    def image_digests(self) -> bytes:
        """The SHA-256 of each encoded image, one after the other."""
        return b"".join(hashlib.sha256(image).digest() for image in self.encoded_images())

    def _list(self, column: str) -> list[Any]:
        return list(self._each(column))

    def _each(self, column: str) -> Iterator[Any]:
        for chunk in self._chunks(column):
            yield from chunk.to_pylist()

    def _chunks(self, column: str) -> Iterator[pyarrow.Array]:
        """A column, up to 1024 rows at a time; other columns are not read."""
        for table in self.rows.select_columns(column).with_format("arrow").iter(1024):
            yield from table[column].chunks


def load_prepared(folders: Path | Sequence[Path]) -> tuple[dict[str, Split], dict[str, Any]]:
    """The splits train, validation and test of a folder that `dataloader.py` wrote, and its `dataset.json`.

    Args:
        folders: one, or the parts that `--shard` made of a data set, in any order.

    Returns:
        The splits, with the rows of the parts one after the other, in the order of their numbers; and the description,
        in which counts are those of all parts, and `parts` is their number.

    Raises:
        InputError: it is no such folder, or not whole; or the parts do not belong together, or one is missing.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    loaded = [(folder, *_load_one(folder)) for folder in folders]
    if len(loaded) == 1:
        folder, own, description = loaded[0]
        return {name: Split(rows, [(folder, len(rows))]) for name, rows in own.items()}, description
    _refuse_strangers(folders, [description for _, _, description in loaded])
    from datasets import concatenate_datasets

    loaded.sort(key=lambda part: _shard(part[2]))
    splits = {}
    for split in SPLITS:
        rows = [(folder, own[split]) for folder, own, _ in loaded]
        places = [(folder, len(each)) for folder, each in rows]
        splits[split] = Split(concatenate_datasets([each for _, each in rows]), places)
    _refuse_shared_images(splits)
    descriptions = [description for _, _, description in loaded]
    whole = {key: value for key, value in descriptions[0].items() if key != "shard"}
    whole["images"] = {split: len(rows) for split, rows in splits.items()}
    whole["captions_truncated"] = sum(description.get("captions_truncated", 0) for description in descriptions)
    dropped = sum((Counter(description.get("dropped", {})) for description in descriptions), Counter())
    return splits, {**whole, "dropped": dict(sorted(dropped.items())), "parts": len(loaded)}


def _shard(description: Mapping[str, Any]) -> tuple[int, int]:
    """The number of a part, and of how many; (0, 0): it is none."""
    shard = str(description.get("shard"))
    if not re.fullmatch(r"\d{1,9}/\d{1,9}", shard):
        return 0, 0
    number, count = map(int, shard.split("/"))
    return number, count


def in_parts(description: Mapping[str, Any]) -> str:
    """In which parts the data were read, such as ", 4 parts"; "" where they are whole."""
    if "parts" in description:
        return f", {description['parts']} parts"
    number, count = _shard(description)
    return f", part {number} of {count} alone" if count > 1 else ""


def _refuse_strangers(folders: Sequence[Path], descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse folders that are not all parts of one data set."""
    first = descriptions[0]
    of_part: dict[tuple[int, int], Path] = {}
    for folder, description in zip(folders, descriptions, strict=True):
        shard = _shard(description)
        if shard == (0, 0):
            raise InputError(
                f"--data_path '{folder}' is not a part of a data set; give it alone, or prepare parts with --shard"
            )
        if shard in of_part:
            raise InputError(
                f"--data_path names part {shard[0]} of {shard[1]} twice, '{of_part[shard]}' and '{folder}'; give each "
                "part once"
            )
        of_part[shard] = folder
        if shard[1] != _shard(first)[1]:
            raise InputError(
                f"--data_path '{folder}' is one of {shard[1]} parts, and '{folders[0]}' one of {_shard(first)[1]}; "
                "give the parts of one division"
            )
        for key in sorted((set(first) | set(description)) - {"shard", "images", "captions_truncated", "dropped"}):
            if description.get(key) != first.get(key):
                raise InputError(
                    f"--data_path '{folder}' has {key} {description.get(key)}, and '{folders[0]}' {first.get(key)}; "
                    "prepare all parts with the same arguments"
                )
        for name in ("tokenizer.json", "preprocessor_config.json"):
            ours, theirs = (place / name for place in (folder, folders[0]))
            if not (ours.is_file() and theirs.is_file() and ours.read_bytes() == theirs.read_bytes()):
                raise InputError(
                    f"'{folder / name}' differs from that of '{folders[0]}'; prepare all parts from the same data"
                )
    parts = _shard(first)[1]
    missing = sorted(set(range(1, parts + 1)) - {part for part, _ in of_part})
    if missing:
        which = f"part {missing[0]} of {parts} is" if len(missing) == 1 else f"{len(missing)} of {parts} parts are"
        flags = ", ".join(f"--shard {number}/{parts}" for number in missing[:10])
        raise InputError(f"{which} missing from --data_path; prepare with {flags}, and name every part")


def _refuse_shared_images(splits: Mapping[str, Split]) -> None:
    """Refuse parts that number an image alike: they are of different data sets, or not of one division."""
    place_of: dict[int, Path] = {}
    for split in splits.values():
        for folder, own in split.parts():
            for image_id in own.image_id:
                if place_of.setdefault(image_id, folder) is not folder:
                    raise InputError(
                        f"image {image_id} lies in '{place_of[image_id]}' and in '{folder}'; prepare all parts from "
                        "the same data"
                    )


def _load_one(folder: Path) -> tuple[Mapping[str, datasets.Dataset], dict[str, Any]]:
    """The rows of each split of one folder, and its `dataset.json`."""
    description = foreign.read_json(folder / DESCRIPTION, AGAIN, finite=True)
    told = foreign.check(description, DESCRIBED, f"'{folder}/{DESCRIPTION}'", AGAIN, NEEDED)
    if set(SPLITS) - set(told["images"]):
        raise InputError(f"'{folder}/{DESCRIPTION}' does not count each split's images; {AGAIN}")
    what = f"--data_path '{folder}'"
    try:
        listed = read_json(folder / "dataset_dict.json", AGAIN)
        states = {split: read_json(folder / split / "state.json", AGAIN) for split in SPLITS}
    except InputError as error:
        reason = str(error).removesuffix(f"; {AGAIN}").removesuffix("; check the path")
        raise InputError(f"{what} cannot be read ({reason}); {AGAIN}") from None
    splits = foreign.list_of(foreign.text())
    foreign.check(listed, {"splits": splits}, f"'{folder}/dataset_dict.json'", AGAIN, ["splits"])
    for split in SPLITS:
        if split not in listed["splits"]:
            raise InputError(f"{what} has no {split} images; {AGAIN}")
        files = foreign.list_of(_file_name)
        foreign.check(states[split], {"_data_files": files}, f"'{folder}/{split}/state.json'", AGAIN, ["_data_files"])
    shards = {split: [folder / split / file["filename"] for file in states[split]["_data_files"]] for split in SPLITS}
    for paths in shards.values():
        if not paths:
            raise InputError(f"{what} has a split without images; {AGAIN}")
    check(folder, shards)
    try:
        rows = {split: _rows(paths) for split, paths in shards.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} cannot be read ({reason}); {AGAIN}") from None
    for split in SPLITS:
        if not len(rows[split]):
            raise InputError(f"{what} has a split without images; {AGAIN}")
    return rows, description


def _file_name(value: Any) -> str | None:
    name = value.get("filename") if isinstance(value, dict) else None
    right = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}", name) and name not in (".", "..")
    return None if right else "an object with the name of a file beside it"


def _rows(paths: Sequence[Path]) -> datasets.Dataset:
    """The rows of Arrow files that `check` has passed. What `datasets` wrote beside them is not needed, or believed."""
    from datasets import Dataset, DatasetInfo, Features, Image, List, Value
    from datasets.table import MemoryMappedTable, concat_tables

    kinds = {"image_id": Value("int64"), "file_name": Value("string"), "image": Image()}
    kinds |= {"captions": List(Value("string")), "labels": List(List(Value("int32")))}
    tables = [MemoryMappedTable.from_file(str(path)) for path in paths]
    features = Features({name: kinds[name] for name in tables[0].column_names if name in kinds})
    names = list(features)
    tables = [table.select(names).cast(features.arrow_schema) for table in tables]
    fingerprint = hashlib.sha256(repr([str(path) for path in paths]).encode()).hexdigest()[:16]
    return Dataset(concat_tables(tables), DatasetInfo(features=features), fingerprint=fingerprint)
