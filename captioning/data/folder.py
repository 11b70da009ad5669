"""processed_data/, written and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from captioning import InputError
from captioning.data import images
from captioning.files import read_json

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from transformers import PreTrainedTokenizerBase


class Split:
    """One split of a prepared folder: a row for each image, read from disk when it is asked for.

    Columns are read by themselves, so that captions cost no reading of images. A pickled or forked split maps the same
    files into memory.

    Args:
        rows: the columns of `processed_data/`, as `datasets.load_from_disk` gives them.

    Attributes:
        rows: the same; images stay encoded there: `{"bytes": bytes, "path": None}`.
    """

    def __init__(self, rows: datasets.Dataset):
        from datasets import Image

        self.rows = rows.cast_column("image", Image(decode=False))
        self._images = self.rows.select_columns("image")
        self._labels = self.rows.select_columns("labels")

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Iterable[int]) -> Split:
        """The rows at `indices`, in that order."""
        return Split(self.rows.select(indices))

    @cached_property
    def image_id(self) -> list[int]:
        return self._list("image_id")

    @cached_property
    def file_name(self) -> list[str]:
        return self._list("file_name")

    @cached_property
    def captions(self) -> list[list[str]]:
        """Every caption of each image, as the annotators wrote it."""
        return self._list("captions")

    def labels(self, index: int) -> list[list[int]]:
        """The token ids of each caption of an image; the last id of each is EOS."""
        return self._labels[index]["labels"]

    def lengths(self) -> list[int]:
        """Tokens of all captions of each image, EOS included."""
        lengths: list[int] = []
        for chunk in self._chunks("labels"):
            # Where each image's captions begin in the list of captions, and each caption's tokens in that of tokens.
            captions, tokens = chunk.offsets.to_numpy(), chunk.values.offsets.to_numpy()
            begins = tokens[captions]
            lengths += (begins[1:] - begins[:-1]).tolist()
        return lengths

    def label_extremes(self) -> tuple[int, int]:
        """The tokens of the longest caption, EOS included, and the highest token id."""
        from pyarrow import compute

        longest = highest = 0
        for chunk in self._chunks("labels"):
            captions = chunk.flatten()
            longest = max(longest, compute.max(compute.list_value_length(captions)).as_py() or 0)
            highest = max(highest, compute.max(captions.flatten()).as_py() or 0)
        return longest, highest

    def image(self, index: int) -> PIL.Image.Image:
        """An image in mode RGB.

        Raises:
            InputError: its bytes are not those of an image that `captioning.data.images` opens.
        """
        name = f"image {self.image_id[index]}"
        try:
            return images.to_rgb(images.decode(self.encoded(index), name), name)
        except images.ImageError as error:
            raise InputError(
                f"{name} of the prepared data cannot be read ({error.reason}); run dataloader.py again"
            ) from None

    def encoded(self, index: int) -> bytes:
        """An image's bytes as they are stored, a JPEG where `dataloader.py` wrote them."""
        image = self._images[index]["image"]
        return (image and image["bytes"]) or b""

    def encoded_images(self) -> Iterator[bytes]:
        """`encoded` of every image in turn."""
        for chunk in self._chunks("image"):
            for image in chunk.field("bytes"):
                yield image.as_py() or b""

    def _list(self, column: str) -> list[Any]:
        return [value for chunk in self._chunks(column) for value in chunk.to_pylist()]

    def _chunks(self, column: str) -> Iterator[pyarrow.Array]:
        """A column, up to 1024 rows at a time; other columns are not read."""
        for table in self.rows.select_columns(column).with_format("arrow").iter(1024):
            yield from table[column].chunks

    # A bridge for callers that still take a split for a `datasets.Dataset`.

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self._list(key)
        row = self.rows.select_columns([name for name in self.rows.column_names if name != "image"])[key]
        return {**row, "image": self.image(key)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def select_columns(self, names: list[str]) -> datasets.Dataset:
        return self.rows.select_columns(names)


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


def load_prepared(folder: Path) -> tuple[dict[str, Split], dict[str, Any]]:
    """The splits train, validation and test of a folder that `dataloader.py` wrote, and its `dataset.json`.

    Raises:
        InputError: it is no such folder, or not whole.
    """
    from datasets import load_from_disk

    description = read_json(folder / "dataset.json")
    try:
        splits = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--data_path '{folder}' cannot be read ({reason}); run dataloader.py again") from None
    except IndexError:
        raise InputError(f"--data_path '{folder}' has a split without images; run dataloader.py again") from None
    for split in ("train", "validation", "test"):
        if split not in splits or not len(splits[split]):
            raise InputError(f"--data_path '{folder}' has no {split} images; run dataloader.py again")
        missing = {"image_id", "image", "captions", "labels"} - set(splits[split].column_names)
        if missing:
            raise InputError(
                f"the {split} split of --data_path '{folder}' has no column '{min(missing)}'; run dataloader.py again"
            )
    missing = {"source", "encoder", "decoder", "images"} - set(description)
    if missing:
        raise InputError(f"'{folder}/dataset.json' does not say '{min(missing)}'; run dataloader.py again")
    if not isinstance(description["images"], dict) or set(splits) - set(description["images"]):
        raise InputError(f"'{folder}/dataset.json' does not count each split's images; run dataloader.py again")
    return {name: Split(rows) for name, rows in splits.items()}, description
