"""COCO 2014 and Karpathy annotations -> one record per image.

Nothing here opens an image: a record says where its file lies and what people wrote about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from captioning import InputError
from captioning.cli import note
from captioning.data.find import Finder
from captioning.data.records import Record
from captioning.files import read_json

COCO_URL = "http://images.cocodataset.org"
PARTS = ("train2014", "val2014")
MOST_BYTES = 4_000_000_000  # of annotations; those of COCO 2014 have 66 MB
NO_NETWORK_HINT = "pass --coco_dir with a COCO 2014 you have, or --sample to draw a small data set"


def read_coco(coco_dir: Path, url: str | None = None) -> dict[str, list[Record]]:
    """The records of `train2014` and `val2014` from a COCO 2014 root, each sorted by image id.

    Args:
        coco_dir: holds `annotations/captions_{train,val}2014.json`, `train2014/` and `val2014/`.
        url: the mirror that images missing from `coco_dir` are fetched from; None: they count as missing.

    Raises:
        InputError: an annotation file is missing or malformed, or an image id occurs twice.
    """
    if not coco_dir.is_dir():
        raise InputError(f"--coco_dir '{coco_dir}' is not a folder; {NO_NETWORK_HINT}")
    pools = {part: _read_part(coco_dir, part, url) for part in PARTS}
    if url is None:
        finder = Finder([coco_dir])
        pools = {part: [_found(record, finder, part) for record in records] for part, records in pools.items()}
    _refuse_repeated_ids(pools, coco_dir)
    return pools


def _read_part(coco_dir: Path, part: str, url: str | None) -> list[Record]:
    path = coco_dir / "annotations" / f"captions_{part}.json"
    # With a mirror the annotations come from there too, and are not the user's to correct.
    remedy = "delete it, and the same command fetches it again" if url else "correct the file"
    content = read_json(path, remedy, MOST_BYTES)
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        without_image = 0
        for annotation in content["annotations"]:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                without_image += 1
        records = [
            _record(
                image["id"],
                image["file_name"],
                coco_dir / part,
                captions[image["id"]],
                url and f"{url}/{part}/{quote(image['file_name'], errors='replace')}",
                (image.get("width"), image.get("height")),
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not in COCO's captions format ({error} is missing or malformed); "
            "it needs 'images' with 'id' and 'file_name', and 'annotations' with 'image_id' and 'caption'"
        ) from None
    if len(captions) != len(records):
        raise InputError(f"'{path}' lists the same image id twice; remove the double entries")
    if without_image:
        note(f"'{path}': {without_image:,} captions of images that it does not list are left out")
    return sorted(records, key=lambda record: record.image_id)


def _found(record: Record, finder: Finder, part: str) -> Record:
    """The record of an image that lies in another of the usual folders, such as `images/train2014`."""
    if record.is_there():
        return record
    return replace(record, location=finder.find(record.file_name, part) or record.location)


def read_karpathy(file: Path, image_dir: Path) -> dict[str, list[Record]]:
    """The records of `train`, `validation` and `test` from a file in the Karpathy format.

    `captioning.data.recognise` reads its relatives too; this strict reader says what is wrong with a file. `restval`
    counts as train, as in nearly every paper since Karpathy and Fei-Fei 2015
    (https://arxiv.org/abs/1412.2306). An entry's `filepath` (COCO has one) is a folder below `image_dir`.

    Raises:
        InputError: the file is missing or malformed, or an image id occurs twice.
    """
    if not image_dir.is_dir():
        raise InputError(f"--image_dir '{image_dir}' is not a folder; name the folder that holds the images")
    splits = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    pools: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    images = read_json(file, most=MOST_BYTES).get("images")
    for position, image in enumerate(images if isinstance(images, list) else []):
        try:
            record = _record(
                image.get("cocoid", image.get("imgid", position)),
                image["filename"],
                image_dir / inside(image.get("filepath", ""), "filepath"),
                [sentence["raw"] for sentence in image["sentences"]],
            )
            pools[splits[image["split"]]].append(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"'{file}' is not in the Karpathy format (image number {position}: {error}); it needs "
                "'filename', 'split' (train, restval, val or test) and 'sentences' with 'raw'"
            ) from None
    if not any(pools.values()):
        raise InputError(f"'{file}' lists no images; is it a Karpathy file such as dataset_coco.json?")
    _refuse_repeated_ids(pools, file)
    return {name: sorted(records, key=lambda record: record.image_id) for name, records in pools.items()}


def _record(
    image_id: int,
    file_name: str,
    folder: Path,
    captions: Iterable[str],
    url: str | None = None,
    size: tuple[Any, Any] = (None, None),
) -> Record:
    if not isinstance(image_id, int) or isinstance(image_id, bool) or not -(2**63) <= image_id < 2**63:
        raise TypeError(f"image id {str(image_id)[:30]!r}")
    captions = tuple(captions)
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"a caption of image {image_id}")
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise TypeError(f"a caption of image {image_id}, half of a surrogate pair,")
    path = folder / inside(file_name)
    known = all(type(side) is int and side > 0 for side in size)
    return Record(image_id, file_name, str(path), captions, url, size if known else None)


def inside(name: str, what: str = "file name") -> str:
    """`name`, refused when it would leave the folder it is joined to, or is no name at all."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InputError(f"{what} {name!r} in the annotations leaves the image folder; correct the file")
    if what == "file name" and not path.name:
        raise InputError(f"{what} {name!r} in the annotations names no file; correct the file")
    return name


def _refuse_repeated_ids(pools: dict[str, list[Record]], source: Path) -> None:
    seen: set[int] = set()
    for records in pools.values():
        for record in records:
            if record.image_id in seen:
                raise InputError(f"image id {record.image_id} occurs twice in '{source}'; remove one entry")
            seen.add(record.image_id)
