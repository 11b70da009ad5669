"""COCO 2014 and Karpathy annotations -> one record per image, and the download of COCO 2014.

Nothing here opens an image: a record says where its file lies and what people wrote about it.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioning import InputError
from captioning.files import read_json, write_whole

COCO_URL = "http://images.cocodataset.org"
PARTS = ("train2014", "val2014")
ANNOTATIONS_ZIP = "annotations/annotations_trainval2014.zip"  # 241 MB
NO_NETWORK_HINT = "pass --coco_dir with a COCO 2014 you have, or --sample to draw a small data set"


@dataclass(frozen=True)
class Record:
    """One image and everything people wrote about it."""

    image_id: int
    file_name: str  # as in the annotations
    path: Path  # where the image lies, or will lie once fetched
    captions: tuple[str, ...]
    url: str | None = None  # where to fetch the image from when it is not at `path` yet


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
    _refuse_repeated_ids(pools, coco_dir)
    return pools


def _read_part(coco_dir: Path, part: str, url: str | None) -> list[Record]:
    path = coco_dir / "annotations" / f"captions_{part}.json"
    content = read_json(path)
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
        records = [
            _record(
                image["id"],
                image["file_name"],
                coco_dir / part,
                captions[image["id"]],
                url and f"{url}/{part}/{image['file_name']}",
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is not in COCO's captions format ({error} is missing or malformed); "
            "it needs 'images' with 'id' and 'file_name', and 'annotations' with 'image_id' and 'caption'"
        ) from None
    if len(captions) != len(records):
        raise InputError(f"'{path}' lists the same image id twice; remove the double entries")
    return sorted(records, key=lambda record: record.image_id)


def read_karpathy(file: Path, image_dir: Path) -> dict[str, list[Record]]:
    """The records of `train`, `validation` and `test` from a file in the Karpathy format.

    `restval` counts as train, as in nearly every paper since Karpathy and Fei-Fei 2015
    (https://arxiv.org/abs/1412.2306). An entry's `filepath` (COCO has one) is a folder below `image_dir`.

    Raises:
        InputError: the file is missing or malformed, or an image id occurs twice.
    """
    if not image_dir.is_dir():
        raise InputError(f"--image_dir '{image_dir}' is not a folder; name the folder that holds the images")
    splits = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    pools: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for position, image in enumerate(read_json(file).get("images", [])):
        try:
            record = _record(
                image.get("cocoid", image.get("imgid", position)),
                image["filename"],
                image_dir / _inside(image.get("filepath", "")),
                [sentence["raw"] for sentence in image["sentences"]],
                None,
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


def _record(image_id: int, file_name: str, folder: Path, captions: Iterable[str], url: str | None) -> Record:
    if not isinstance(image_id, int) or isinstance(image_id, bool):
        raise TypeError(f"image id {image_id!r}")
    captions = tuple(captions)
    if not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"a caption of image {image_id}")
    return Record(image_id, file_name, folder / _inside(file_name), captions, url)


def _inside(name: str) -> str:
    """`name`, refused when it would leave the folder it is joined to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InputError(f"file name {name!r} in the annotations leaves the image folder; correct the file")
    return name


def _refuse_repeated_ids(pools: dict[str, list[Record]], source: Path) -> None:
    seen: set[int] = set()
    for records in pools.values():
        for record in records:
            if record.image_id in seen:
                raise InputError(f"image id {record.image_id} occurs twice in '{source}'; remove one entry")
            seen.add(record.image_id)


def fetch_annotations(cache_dir: Path, url: str = COCO_URL) -> Path:
    """Fetch COCO 2014's captions into `cache_dir`, laid out as a `coco_dir`; returns `cache_dir`.

    Images are fetched later, one by one, when they are chosen (`Record.url`).

    Raises:
        InputError: the server cannot be reached or answers something else.
    """
    wanted = [f"annotations/captions_{part}.json" for part in PARTS]
    if all((cache_dir / name).is_file() for name in wanted):
        return cache_dir
    archive = cache_dir / "annotations_trainval2014.zip.part"
    cache_dir.mkdir(parents=True, exist_ok=True)
    _download(f"{url}/{ANNOTATIONS_ZIP}", archive)
    try:
        with zipfile.ZipFile(archive) as members:
            for name in wanted:
                # Only the two members we name are read, so that nothing can climb out of the folder.
                write_whole(cache_dir / name, members.read(name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{url}/{ANNOTATIONS_ZIP} is not COCO's annotation archive: {error}") from None
    finally:
        archive.unlink(missing_ok=True)
    return cache_dir


def _download(url: str, path: Path) -> None:
    import requests
    from tqdm import tqdm

    try:
        with requests.get(url, stream=True, timeout=30, headers={"Accept-Encoding": "identity"}) as answer:
            if answer.status_code != 200:
                raise InputError(f"{url} answered {answer.status_code}; {NO_NETWORK_HINT}")
            size = int(answer.headers.get("Content-Length", 0)) or None
            with (
                path.open("wb") as file,
                tqdm(total=size, unit="B", unit_scale=True, desc="captions", file=sys.stderr) as bar,
            ):
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except requests.RequestException as error:
        path.unlink(missing_ok=True)
        raise InputError(f"cannot fetch {url} ({type(error).__name__}); {NO_NETWORK_HINT}") from None
