"""Captions by image, out of files: predictions of any captioner, and references that need no prepared folder.

    references = read_references(Path("captions_val2014.json"))
    found = read_predictions([Path("captions.jsonl")], references)
    found.captions                    # {image id: caption}

A prediction names its image by the image's id, a number or a text of one, or by the name of its file. So what
`inference.py --output` writes can be scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.data import forms, tables
from captioning.data.tables import IMAGE_NAMES, Wanted

Key = Any  # an image's id, a number or a text

IDS = ("image_id", "imageid", "cocoid", "img_id", "imgid")
PATHS = tuple(name for name in IMAGE_NAMES if name not in (*IDS, "id"))
CAPTIONS = ("caption", "prediction", "predicted_caption", "generated_caption", "pred", "hypothesis", "text")
FORMAT = 'COCO\'s results format, a list of {"image_id": int, "caption": str}, nor what inference.py --output writes'


@dataclass
class References:
    """What people wrote about each image.

    Attributes:
        captions: at least one for each image, by the image's id.
        names: the file name of each image, as far as it is known.
        source: where they are from, for a person to read.
        parts: in which parts they were read, likewise.
    """

    captions: dict[Key, list[str]]
    names: dict[Key, str]
    source: str
    parts: str = ""


@dataclass
class Predictions:
    """Captions that have references.

    Attributes:
        captions: one for each image, by the image's id.
        others: those of images without references, by id or path.
        failed: how many entries hold the reason why there is no caption.
    """

    captions: dict[Key, str] = field(default_factory=dict)
    others: dict[Key, str] = field(default_factory=dict)
    failed: int = 0


# ---- references


def read_references(file: Path, split: str = "") -> References:
    """The references in an annotation file: COCO's captions, a Karpathy file, or a table of images and captions.

    Args:
        split: train, validation or test; it counts where the file says which image is of which split.

    Raises:
        InputError: it is none of these, or has no caption of that split.
    """
    what = f"--references '{file}'"
    if not file.is_file():
        raise InputError(f"{what} is not a file; name an annotation file such as captions_val2014.json")
    content = tables.load_json(file) if file.suffix.lower() == ".json" else None
    captions: dict[Key, list[str]] = {}
    names: dict[Key, str] = {}
    if content is not None and forms.is_coco(content):
        rows = _coco_rows(file, content)
    else:
        rows, has_splits = _table_rows(file, content, what)
        if has_splits:
            rows = (row for row in rows if row[3] == split)
    for image_id, name, own, _ in rows:
        key = image_id if image_id is not None else name
        captions.setdefault(key, []).extend(caption for caption in own if caption.strip())
        names.setdefault(key, name)
    without = [key for key, own in captions.items() if not own]
    for key in without:
        del captions[key]
    if not captions:
        raise InputError(f"{what} holds no captions{f' of the {split} split' if split else ''}; check the file")
    if without:
        cli.note(f"{what}: {len(without):,} images without a caption are left out")
    return References(captions, {key: name for key, name in names.items() if key in captions and name}, file.name)


Reference = tuple[Key | None, str, list[str], str]  # id, file name, captions, split


def _coco_rows(file: Path, content: dict[str, Any]) -> Iterator[Reference]:
    own: dict[Any, list[str]] = {}
    try:
        for note in content["annotations"]:
            own.setdefault(as_key(note["image_id"]), []).extend(
                tables.captions_of(note["caption"] if "caption" in note else note["captions"])
            )
        for image in content["images"]:
            key = as_key(image["id"])
            yield key, str(image.get("file_name") or ""), own.get(key, []), ""
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--references '{file}' is not in COCO's captions format ({error} is missing or malformed); "
            "it needs 'images' with 'id', and 'annotations' with 'image_id' and 'caption'"
        ) from None


def _table_rows(file: Path, content: Any, what: str) -> tuple[Iterator[Reference], bool]:
    table = tables.read_json_table(file, content) if content is not None else tables.read_table(file)
    columns = tables.choose_columns(table, Wanted()) if table else None
    if table is None or columns is None:
        raise InputError(f"{what} is no file of images and captions; give COCO's JSON, a Karpathy file or a table")
    ids = columns.image_id or next((name for name in (*IDS, "id") if name in table.names), "")

    def rows() -> Iterator[Reference]:
        for cells in table.rows():
            key = as_key(cells.get(ids)) if ids else None
            name = str(cells.get(columns.image) or "") if columns.image != ids else ""
            own = [text for column in columns.captions for text in tables.captions_of(cells.get(column))]
            yield key, name, own, (tables.split_of_value(cells.get(columns.split)) or "") if columns.split else ""

    return rows(), bool(columns.split)


def as_key(value: Any) -> Key | None:
    """An image's id: a whole number also where it is written as a text or with a fraction of 0; None: no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        value = value.strip()
        number = tables.as_id(value.removesuffix(".0"))
        return number if number is not None else value or None
    return tables.as_id(value)


# ---- predictions


def read_predictions(files: Sequence[Path], references: References, subset: bool = False) -> Predictions:
    """The captions in some files, each for an image of `references`.

    The files hold COCO's results format, an object of captions by id, JSON Lines, CSV or TSV; in UTF-8, with a mark at
    the start or without.

    Args:
        subset: images without a prediction, and predictions without references, are left out.

    Raises:
        InputError: a file is none of these, captions an image twice, or the images differ and `subset` is off.
    """
    by_name = _Names(references.names)
    found = Predictions()
    for file in files:
        for image_id, path, caption in _entries(file):
            key = image_id if image_id in references.captions else None
            if key is None:
                key = by_name.find(path or (image_id if isinstance(image_id, str) else ""), file)
            elif path and by_name.is_of_another(path, key):
                raise InputError(
                    f"--predictions '{file}': the image with the id {image_id} is '{path}' there and "
                    f"'{references.names[key]}' in the references; they are captions of other data"
                )
            if caption is None:
                found.failed += 1
            elif key in found.captions or (key is None and (image_id or path) in found.others):
                raise InputError(
                    f"--predictions '{file}' captions an image twice; keep one caption per image ({image_id or path})"
                )
            elif key is None:
                found.others[image_id if image_id is not None else path] = caption
            else:
                found.captions[key] = caption
    missing = references.captions.keys() - found.captions.keys()
    name = f"--predictions '{files[0]}'" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if found.failed:
        cli.note(f"{name}: {found.failed:,} entries have no caption, but the reason why")
    if subset:
        if not found.captions:
            raise InputError(f"{name}: none of its captions is of an image of the references{_example(found.others)}")
        return found
    for ids, problem in (
        (missing, "of the split have no prediction"),
        (found.others, "are captioned and not in the split"),
    ):
        if ids:
            raise InputError(
                f"{name}: {len(ids):,} images {problem}, such as {min(ids, key=_order)}; it has to caption each image "
                "of the --split once, or --subset scores the images that both have"
            )
    return found


def _order(key: Key) -> tuple[bool, Key]:
    return isinstance(key, str), key


def _example(keys: Iterable[Key]) -> str:
    return next((f", such as {key}" for key in keys), "")


class _Names:
    """Finds the id of an image by its path, which may have more or fewer folders than its name in the references."""

    def __init__(self, names: Mapping[Key, str]):
        self._exact: dict[str, Key | None] = {}
        self._loose: dict[str, Key | None] = {}
        for key, name in names.items():
            parts = name.replace("\\", "/").split("/")
            self._add(self._exact, "/".join(parts), key)
            for start in range(1, len(parts)):
                self._add(self._loose, "/".join(parts[start:]), key)

    @staticmethod
    def _add(table: dict[str, Key | None], name: str, key: Key) -> None:
        table[name] = key if name not in table else None

    def is_of_another(self, path: str, key: Key) -> bool:
        """Whether a path is the whole name of an image, and of another one than `key`."""
        return self._exact.get(path.replace("\\", "/"), key) not in (key, None)

    def find(self, path: str, file: Path) -> Key | None:
        """The id; None: there is no such image.

        Raises:
            InputError: several images have that name.
        """
        parts = path.replace("\\", "/").removeprefix("./").split("/")
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            for table in (self._exact, self._loose):
                if name in table:
                    key = table[name]
                    if key is None:
                        raise InputError(
                            f"--predictions '{file}': several images of the references are named '{name}'; "
                            "name them by image_id"
                        )
                    return key
        return None


def _entries(file: Path) -> Iterator[tuple[Key | None, str, str | None]]:
    """(id, path, caption) of each entry; None for the caption of an image that could not be captioned."""
    try:
        for row in _rows(file):
            image_id = next((row[name] for name in IDS if row.get(name) is not None), None)
            path = next((row[name] for name in PATHS if isinstance(row.get(name), str) and row[name]), "")
            if image_id is None and not path:
                image_id = row["id"] if "id" in row else row["image_id"]
            if isinstance(image_id, bool) or not isinstance(image_id, int | float | str | None):
                raise TypeError(f"image_id {image_id!r}")
            caption = next((row[name] for name in CAPTIONS if row.get(name) is not None), None)
            failed = bool(row.get("error")) and not caption
            if not failed and not isinstance(caption, str):
                raise TypeError(f"image_id {image_id!r}, caption {caption!r}" if "caption" in row else "no 'caption'")
            yield as_key(image_id), path, None if failed else caption
    except OSError as error:
        raise InputError(f"cannot read --predictions '{file}': {error.strerror}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--predictions '{file}' is not in {FORMAT} ({type(error).__name__}: {error})") from None
    except InputError as error:
        raise InputError(f"--predictions '{file}' is not in {FORMAT} ({error})") from None


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    content = tables.load_json(file)
    if isinstance(content, dict):
        for key in ("annotations", "predictions", "results", "captions"):
            if isinstance(content.get(key), list):
                content = content[key]
                break
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        if "caption" in content:  # JSON Lines of one line
            return [content]
        # {id: caption}, or {id: [caption]} as pycocoevalcap takes it
        single = {key: own[0] if isinstance(own, list) and len(own) == 1 else own for key, own in content.items()}
        return [{"image_id": key, "caption": own} for key, own in single.items()]
    table = None if content is not None else tables.read_table(file)
    if table is None:
        raise InputError(f"it is neither JSON nor a table of captions, but {_kind(content)}")
    return table.rows()


def _kind(content: Any) -> str:
    return "something else" if content is None else f"a {type(content).__name__}"
