"""One set of drawn images in every form in which people keep their own: `FORMS[name](folder, pictures)` writes it."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pictures import encoded

from captioning.data import scenes


@dataclass(frozen=True)
class Picture:
    number: int
    name: str
    split: str  # train, validation or test
    data: bytes  # a JPEG
    captions: list[str]


def draw(count: int = 60) -> list[Picture]:
    """Scenes with two captions each, one of them with commas and quotes in it."""
    rng = random.Random(0)
    pictures = []
    for number in range(count):
        image, captions, _ = scenes.draw_scene(rng)
        split = "validation" if number % 10 == 4 else "test" if number % 10 == 7 else "train"
        own = [captions[0], f'{captions[1][:-1]}, drawn as "number {number}", and nothing else.']
        pictures.append(Picture(number, f"scene_{number:03d}.jpg", split, encoded(image, "JPEG", quality=90), own))
    return pictures


def images(folder: Path, pictures: list[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / picture.name).write_bytes(picture.data)


def rows(path: Path, header: list[str] | None, lines: list[list], encoding: str = "utf-8", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, **options)
        writer.writerows([header, *lines] if header else lines)


def a_row_each(pictures: list[Picture]) -> list[list]:
    return [[picture.name, caption] for picture in pictures for caption in picture.captions]


def as_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


Write = Callable[[Path, list[Picture]], Path]  # returns what --data names
FORMS: dict[str, Write] = {}
WITH_SPLITS: set[str] = set()  # forms that say which split an image belongs to


def form(splits: bool = False):
    def add(write: Write) -> Write:
        name = write.__name__.replace("_", " ")
        FORMS[name] = write
        if splits:
            WITH_SPLITS.add(name)
        return write

    return add


@form()
def sidecar_txt(folder, pictures):
    images(folder, pictures)
    for picture in pictures:
        (folder / picture.name).with_suffix(".txt").write_text("\n".join(picture.captions) + "\n")
    return folder


@form(splits=True)
def sidecar_caption_in_split_folders(folder, pictures):
    for picture in pictures:
        place = folder / {"train": "Train", "validation": "val", "test": "test"}[picture.split]
        images(place, [picture])
        (place / picture.name).with_suffix(".caption").write_text("\r\n".join(picture.captions))
    return folder


@form(splits=True)
def imagefolder_jsonl(folder, pictures):
    for split, name in (("train", "train"), ("validation", "validation"), ("test", "test")):
        own = [picture for picture in pictures if picture.split == split]
        images(folder / name, own)
        lines = [json.dumps({"file_name": picture.name, "captions": picture.captions}) for picture in own]
        (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@form()
def imagefolder_csv(folder, pictures):
    images(folder, pictures)
    rows(folder / "metadata.csv", ["file_name", "text"], a_row_each(pictures))
    return folder


@form()
def imagefolder_parquet(folder, pictures):
    import pyarrow
    from pyarrow import parquet

    images(folder / "images", pictures)
    content = {"file_name": [f"images/{p.name}" for p in pictures], "caption": [p.captions for p in pictures]}
    parquet.write_table(pyarrow.table(content), folder / "metadata.parquet")
    return folder


@form(splits=True)
def csv_with_a_split_column(folder, pictures):
    images(folder / "pics", pictures)
    lines = [[f"pics\\{p.name}", caption, p.split] for p in pictures for caption in p.captions]
    rows(folder / "data.csv", ["Image", "Caption", "Split"], lines, encoding="utf-8-sig")
    return folder / "data.csv"


@form()
def csv_of_absolute_paths(folder, pictures):
    images(folder / "elsewhere", pictures)
    lines = [[str(folder / "elsewhere" / name), caption] for name, caption in a_row_each(pictures)]
    rows(folder / "annotations" / "data.csv", ["path", "description"], lines)
    return folder / "annotations" / "data.csv"


@form()
def csv_of_another_machine(folder, pictures):
    images(folder / "photos", pictures)
    lines = [[f"C:\\Users\\anna\\photos\\{name}", caption] for name, caption in a_row_each(pictures)]
    rows(folder / "data.csv", ["filepath", "caption"], lines)
    return folder


@form()
def csv_of_semicolons_without_a_header(folder, pictures):
    images(folder, pictures)
    rows(folder / "data.csv", None, a_row_each(pictures), delimiter=";")
    return folder


@form()
def csv_with_bare_commas(folder, pictures):
    images(folder, pictures)
    (folder / "data.csv").write_text("".join(f"{name},{caption}\n" for name, caption in a_row_each(pictures)))
    return folder


@form()
def csv_of_lists(folder, pictures):
    images(folder, pictures)
    rows(folder / "data.csv", ["filename", "raw"], [[p.name, json.dumps(p.captions)] for p in pictures])
    return folder


@form()
def csv_of_numbered_columns(folder, pictures):
    images(folder, pictures)
    rows(folder / "data.csv", ["image", "caption_1", "caption_2"], [[p.name, *p.captions] for p in pictures])
    return folder


@form()
def tsv_in_utf_16(folder, pictures):
    images(folder, pictures)
    rows(folder / "data.tsv", ["image", "caption"], a_row_each(pictures), encoding="utf-16", delimiter="\t")
    return folder


@form(splits=True)
def json_lines(folder, pictures):
    images(folder / "images", pictures)
    lines = [json.dumps({"image": p.name, "caption": p.captions, "set": p.split}) for p in pictures]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@form()
def json_by_file_name(folder, pictures):
    images(folder / "images", pictures)
    as_json(folder / "data.json", {p.name: p.captions for p in pictures})
    return folder


@form(splits=True)
def tables_of_each_split(folder, pictures):
    images(folder / "images", pictures)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        rows(folder / f"{name}.csv", ["image", "caption"], a_row_each([p for p in pictures if p.split == split]))
    return folder


@form()
def kaggle_flickr8k(folder, pictures):
    images(folder / "Images", pictures)
    rows(folder / "captions.txt", ["image", "caption"], a_row_each(pictures))
    return folder


@form(splits=True)
def flickr8k_token_with_official_splits(folder, pictures):
    images(folder / "Flicker8k_Dataset", pictures)
    text = folder / "Flickr8k_text"
    text.mkdir()
    lines = [f"{p.name}#{n}\t{caption}\n" for p in pictures for n, caption in enumerate(p.captions)]
    (text / "Flickr8k.token.txt").write_text("".join(lines))
    (text / "Flickr8k.lemma.token.txt").write_text("".join(lines).lower())
    crowd = [f"{p.name}\t{p.name}#2\t1\t3\t0\n" for p in pictures]
    (text / "CrowdFlowerAnnotations.txt").write_text("".join(crowd))
    (text / "readme.txt").write_text("Flickr8k, a data set.\n")
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        names = [p.name for p in pictures if p.split == split]
        (text / f"Flickr_8k.{name}Images.txt").write_text("\n".join(names) + "\n")
    return folder


@form()
def flickr30k_results(folder, pictures):
    images(folder / "flickr30k_images" / "flickr30k_images", pictures)
    lines = [f"{p.name}| {n}| {caption}\n" for p in pictures for n, caption in enumerate(p.captions)]
    lines[3] = lines[3].replace("| 1| ", "| 1   ")  # as one line of the real file is
    text = "image_name| comment_number| comment\n" + "".join(lines)
    (folder / "flickr30k_images" / "results.csv").write_text(text)
    return folder


@form()
def flickr30k_token(folder, pictures):
    images(folder / "flickr30k-images", pictures)
    lines = [f"{p.name}#{n}\t{caption}\n" for p in pictures for n, caption in enumerate(p.captions)]
    (folder / "results_20130124.token").write_text("".join(lines))
    return folder


def coco_lists(pictures: list[Picture]) -> dict:
    return {
        "images": [{"id": p.number, "file_name": p.name} for p in pictures],
        "annotations": [
            {"id": 9 * p.number + n, "image_id": p.number, "caption": caption}
            for p in pictures
            for n, caption in enumerate(p.captions)
        ],
    }


@form(splits=True)
def coco_2017(folder, pictures):
    for split, name in (("train", "train2017"), ("validation", "val2017"), ("test", "test2017")):
        own = [p for p in pictures if p.split == split]
        images(folder / "images" / name, own)
        as_json(folder / "annotations" / f"captions_{name}.json", coco_lists(own))
        as_json(folder / "annotations" / f"instances_{name}.json", {"images": [], "annotations": [{"bbox": []}]})
    return folder


@form()
def nocaps(folder, pictures):
    images(folder / "images", pictures)
    as_json(folder / "nocaps_4500_captions.json", coco_lists(pictures))
    return folder


@form(splits=True)
def textcaps(folder, pictures):
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        own = [p for p in pictures if p.split == split]
        images(folder / "train_images", own)
        entries = [
            {
                "image_id": p.name[:-4],
                "image_path": f"{name}/{p.name}",
                "caption_str": caption,
                "reference_strs": p.captions,
                "set_name": name,
            }
            for p in own
            for caption in p.captions
        ]
        as_json(folder / f"TextCaps_0.1_{name}.json", {"dataset_name": "textcaps", "data": entries})
    return folder


def entries(pictures: list[Picture], splits: bool = True) -> list[dict]:
    return [
        {"filename": p.name, "imgid": p.number, "sentences": [{"raw": caption} for caption in p.captions]}
        | ({"split": {"validation": "val"}.get(p.split, p.split)} if splits else {})
        for p in pictures
    ]


@form(splits=True)
def karpathy(folder, pictures):
    images(folder / "images", pictures)
    as_json(folder / "dataset.json", {"dataset": "own", "images": entries(pictures)})
    return folder


@form()
def karpathy_without_splits_as_a_list(folder, pictures):
    images(folder, pictures)
    as_json(folder / "dataset.json", entries(pictures, splits=False))
    return folder / "dataset.json"


@form(splits=True)
def karpathy_of_strings_with_text_ids(folder, pictures):
    images(folder / "val2014", pictures)
    own = [
        {
            "filename": p.name,
            "filepath": "val2014",
            "cocoid": f"id {p.number}",
            "split": {"validation": "valid"}.get(p.split, p.split),
            "sentences": p.captions,
        }
        for p in pictures
    ]
    as_json(folder / "dataset.json", {"images": own})
    return folder


@form(splits=True)
def karpathy_a_row_each(folder, pictures):
    images(folder / "images", pictures)
    own = [
        {"filename": p.name, "split": {"validation": "dev"}.get(p.split, p.split), "sentences": [{"raw": caption}]}
        for p in pictures
        for caption in p.captions
    ]
    as_json(folder / "dataset.json", {"images": own})
    return folder


def dataset(pictures: list[Picture]):
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"image": Image(), "file_name": Value("string"), "captions": List(Value("string"))})
    content = {
        "image": [{"bytes": p.data, "path": None} for p in pictures],
        "file_name": [p.name for p in pictures],
        "captions": [p.captions for p in pictures],
    }
    return Dataset.from_dict(content, features=features)


@form()
def datasets_dataset(folder, pictures):
    dataset(pictures).save_to_disk(str(folder / "data"), num_shards=2)
    return folder / "data"


@form(splits=True)
def datasets_dataset_dict(folder, pictures):
    from datasets import DatasetDict

    splits = ("train", "validation", "test")
    whole = DatasetDict({split: dataset([p for p in pictures if p.split == split]) for split in splits})
    whole.save_to_disk(str(folder / "data"))
    return folder / "data"


@form(splits=True)
def parquet_as_on_the_hub(folder, pictures):
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        own = dataset([p for p in pictures if p.split == split])
        for number in range(2):
            own.shard(2, number).to_parquet(str(folder / "data" / f"{split}-{number:05d}-of-00002.parquet"))
    return folder


def write_tar(path: Path, pictures: list[Picture], texts: Callable[[Picture], dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for p in pictures:
            for name, content in {p.name: p.data, **texts(p)}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@form(splits=True)
def webdataset(folder, pictures):
    for split in ("train", "validation", "test"):
        own = [p for p in pictures if p.split == split]
        for number in range(2):
            path = folder / f"{split}-{number:06d}.tar"
            write_tar(path, own[number::2], lambda p: {f"{p.name[:-4]}.txt": "\n".join(p.captions).encode()})
    return folder


@form()
def img2dataset(folder, pictures):
    import pyarrow
    from pyarrow import parquet

    for number in range(3):
        own = pictures[number::3]
        write_tar(
            folder / f"{number:05d}.tar",
            own,
            lambda p: {f"{p.name[:-4]}.json": json.dumps({"caption": p.captions, "status": "success"}).encode()},
        )
        urls = {"url": [f"http://127.0.0.1:9/{p.name}" for p in own], "caption": [p.captions[0] for p in own]}
        parquet.write_table(pyarrow.table(urls), folder / f"{number:05d}.parquet")
        as_json(folder / f"{number:05d}_stats.json", {"count": len(own)})
    return folder


@form()
def captions_of_inference(folder, pictures):
    images(folder / "photos", pictures)
    own = [{"path": f"photos/{p.name}", "caption": caption} for p in pictures for caption in p.captions]
    as_json(folder / "captions.json", own)
    return folder


@form()
def predictions_beside_images(folder, pictures):
    images(folder, pictures)
    own = [{"image_id": p.number, "caption": caption} for p in pictures for caption in p.captions]
    as_json(folder / "predictions_test.json", own)
    return folder
