"""Bad input, a table: each kind ends with one sentence that names the value, exit code 2 and nothing half-written.

A row is `"what is wrong": (script, make, message)`: `make(folder)` puts what it needs into an empty folder and returns
the command line, and `message` is a regular expression for the sentence. What is odd but right stands in a second
table, with what comes of it.
"""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, contents, run
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioning import InputError, cli
from captioning.data import annotations, choose, scenes
from captioning.data.folder import SplitWriter
from captioning.data.records import Record
from captioning.model.parts import load_tokenizer, train_tokenizer

Make = Callable[[Path], list]
Row = tuple[str, Make, str]
PRESETS = ["--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
SCENES = [scenes.draw_scene(random.Random(number))[0] for number in range(12)]


def annotation_file(part: str, **changes) -> dict:
    """Six images with two captions each; `changes` replace keys of the first image, or of its first caption."""
    first = 1 if part == "train2014" else 101
    images = [{"id": first + n, "file_name": f"COCO_{part}_{first + n:012d}.jpg"} for n in range(6)]
    captions = [{"image_id": image["id"], "caption": f"{word} dog"} for image in images for word in ("A", "The")]
    for key, value in changes.items():
        entry = (captions if key in ("image_id", "caption") else images)[0]
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return {"images": images, "annotations": captions}


def coco_root(folder: Path, train=None, val=None) -> Path:
    """A COCO 2014 of twelve images; `train` and `val` replace its annotations, a text or bytes as they are."""
    root = folder / "coco"
    for part, content in (("train2014", train), ("val2014", val)):
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        default = annotation_file(part)
        for number, image in enumerate(default["images"]):
            SCENES[number + 6 * (part == "val2014")].save(root / part / image["file_name"])
        content = default if content is None else content
        content = json.dumps(content) if isinstance(content, dict | list) else content
        content = content.encode() if isinstance(content, str) else content
        (root / "annotations" / f"captions_{part}.json").write_bytes(content)
    return root


def prepare(folder: Path, *arguments) -> list:
    return [f"--save_path={folder / 'out'}", *PRESETS, *arguments]


def flags(*arguments) -> Make:
    """Arguments that no file can make right."""
    return lambda folder: prepare(folder, f"--coco_dir={coco_root(folder)}", *arguments)


def train2014(content) -> Make:
    return lambda folder: prepare(folder, f"--coco_dir={coco_root(folder, content)}")


def changed(**changes) -> Make:
    return train2014(annotation_file("train2014", **changes))


def both(change: Callable[[dict], dict]) -> Make:
    contents = [change(annotation_file(part)) for part in annotations.PARTS]
    return lambda folder: prepare(folder, f"--coco_dir={coco_root(folder, *contents)}")


def images_replaced(save: Callable[[Path], None]) -> Make:
    """Every image file of COCO is replaced by what `save` writes, or removes."""

    def make(folder):
        root = coco_root(folder)
        for path in root.glob("*2014/*.jpg"):
            path.unlink()
            save(path)
        return prepare(folder, f"--coco_dir={root}")

    return make


def karpathy(content, image_dir="coco") -> Make:
    def make(folder):
        coco_root(folder)
        file = folder / "dataset.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return prepare(folder, f"--karpathy_json={file}", f"--image_dir={folder / image_dir}", "--limit_data=0")

    return make


def entry(position=0, **changes) -> dict:
    image = {"filename": "x.jpg", "imgid": position, "split": "train", "sentences": [{"raw": "a dog"}]} | changes
    return {key: value for key, value in image.items() if value is not ...}


def with_file(name: str, content: str = "x", *arguments) -> Make:
    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return prepare(folder, f"--coco_dir={coco_root(folder)}", *[a.format(folder=folder) for a in arguments])

    return make


def files(folder: Path, **contents: str) -> Path:
    """A folder with files of these names and contents."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def tokenizer_without_end(folder):
    tokenizer = train_tokenizer(["a dog"], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "decoder")
    return prepare(folder, f"--coco_dir={coco_root(folder)}", f"--decoder={folder / 'decoder'}")


NO_FORMAT = "is not in COCO's captions format"
NO_KARPATHY = "is not in the Karpathy format"
REFUSED: dict[str, Row] = {
    # arguments
    "a negative limit": ("dataloader", flags("--limit_data=-1"), "--limit_data -1 is negative"),
    "a limit below the number of splits": ("dataloader", flags("--limit_data=2"), "--limit_data 2 is too few"),
    "a limit in words": ("dataloader", flags("--limit_data=many"), "invalid int value: 'many'"),
    "half an image": ("dataloader", flags("--limit_data=10.5"), "invalid int value: '10.5'"),
    "no share for validation": ("dataloader", flags("--val_share=0"), r"--val_share 0\.0 is not between 0 and 1"),
    "a share that is no number": ("dataloader", flags("--val_share=nan"), "--val_share nan is not between 0 and 1"),
    "more than all for test": ("dataloader", flags("--test_share=1.5"), r"--test_share 1\.5 is not between 0 and 1"),
    "shares that leave nothing": (
        "dataloader",
        flags("--val_share=0.5", "--test_share=0.5"),
        "leave no images to train on",
    ),
    "room for no word": ("dataloader", flags("--max_length=1"), "--max_length 1 leaves no room for a word"),
    "no process": ("dataloader", flags("--num_proc=0"), "--num_proc 0 is no number of processes"),
    "a seed in words": ("dataloader", flags("--seed=lucky"), "invalid int value: 'lucky'"),
    "an unknown flag": ("dataloader", flags("--limit=3"), r"unknown flag --limit; did you mean --limit_data\?"),
    "two sources": (
        "dataloader",
        flags("--sample"),
        "--data, --coco_dir, --karpathy_json and --sample exclude each other",
    ),
    "a Karpathy file without images": (
        "dataloader",
        lambda folder: prepare(folder, "--karpathy_json=x.json"),
        "--karpathy_json and --image_dir belong together",
    ),
    "images without a Karpathy file": (
        "dataloader",
        lambda folder: prepare(folder, "--image_dir=x"),
        "--karpathy_json and --image_dir belong together",
    ),
    "a mirror by ftp": (
        "dataloader",
        lambda folder: prepare(folder, "--coco_url=ftp://host/coco"),
        "--coco_url 'ftp://host/coco' is not an http or https address",
    ),
    "a mirror without a host": (
        "dataloader",
        lambda folder: prepare(folder, "--coco_url=http://"),
        "--coco_url 'http://' is not an http or https address",
    ),
    "a cache that is a file": (
        "dataloader",
        lambda folder: [(folder / "cache").write_text("x"), *prepare(folder, f"--cache_dir={folder / 'cache'}")][1:],
        "--cache_dir '.*cache' is a file",
    ),
    # encoder and decoder
    "an encoder that does not exist": (
        "dataloader",
        flags("--encoder=no such thing"),
        "--encoder 'no such thing' is not a folder, and not an id",
    ),
    "an encoder that was never fetched": (
        "dataloader",
        flags("--encoder=nobody/nothing"),
        "--encoder 'nobody/nothing' is not here",
    ),
    "an encoder folder without its image processor": (
        "dataloader",
        with_file("encoder/config.json", '{"model_type": "vit"}', "--encoder={folder}/encoder"),
        r"--encoder '.*encoder' has no usable preprocessor_config\.json",
    ),
    "an image processor that is no JSON": (
        "dataloader",
        with_file("encoder/preprocessor_config.json", "{", "--encoder={folder}/encoder"),
        r"--encoder '.*encoder' has no usable preprocessor_config\.json",
    ),
    "a decoder folder without its tokenizer": (
        "dataloader",
        with_file("decoder/config.json", '{"model_type": "gpt2"}', "--decoder={folder}/decoder"),
        "--decoder '.*decoder' has no usable tokenizer",
    ),
    "a tokenizer without an end": ("dataloader", tokenizer_without_end, "has no end-of-sequence token"),
    # where to write
    "a target that is a file": (
        "dataloader",
        with_file("target", "x", "--save_path={folder}/target"),
        "--save_path '.*target' is a file; name a folder",
    ),
    "a target below a file": (
        "dataloader",
        with_file("target", "x", "--save_path={folder}/target/out"),
        "--save_path '.*out' lies below a file",
    ),
    "a target that holds other files": (
        "dataloader",
        with_file("thesis/thesis.tex", "years of work", "--save_path={folder}/thesis"),
        r"--save_path '.*thesis' holds other files \(thesis\.tex\)",
    ),
    "a target that is somebody's data set": (
        "dataloader",
        lambda folder: prepare(
            folder, f"--save_path={files(folder / 'flickr8k', **{'dataset.json': '{}', '1.jpg': 'x'})}"
        ),
        r"--save_path '.*flickr8k' holds other files \(1\.jpg\); name a new folder",
    ),
    "a target with more in it than was written": (
        "dataloader",
        lambda folder: prepare(
            folder,
            "--save_path="
            f"{files(folder / 'out', **{'dataset.json': '{}', 'dataset_dict.json': '{}', 'thesis.tex': 'years'})}",
        ),
        r"--save_path '.*out' holds other files \(thesis\.tex\); move them elsewhere",
    ),
    "pictures in the target": (
        "dataloader",
        lambda folder: [f"--data={files(folder / 'out' / 'mine', a='x')}", f"--save_path={folder / 'out'}"],
        "--save_path '.*out' is replaced as a whole, and --data '.*mine' lies in it",
    ),
    "a preview in the target": (
        "dataloader",
        lambda folder: prepare(
            folder, f"--save_path={files(folder / 'out')}", f"--preview={folder / 'out' / 'sheet.png'}"
        ),
        "--save_path '.*out' is replaced as a whole, and --preview '.*png' lies in it",
    ),
    # COCO's folder
    "no COCO folder": (
        "dataloader",
        lambda folder: prepare(folder, "--coco_dir=nowhere"),
        "--coco_dir 'nowhere' is not a folder",
    ),
    "a COCO folder that is a file": (
        "dataloader",
        with_file("file", "x", "--coco_dir={folder}/file"),
        "--coco_dir '.*file' is not a folder",
    ),
    "a COCO folder that is empty": (
        "dataloader",
        lambda folder: prepare(folder, f"--coco_dir={folder}"),
        r"captions_train2014\.json' does not exist",
    ),
    "annotations that are a folder": (
        "dataloader",
        lambda folder: [
            (folder / "annotations" / "captions_train2014.json").mkdir(parents=True),
            *prepare(folder, f"--coco_dir={folder}"),
        ][1:],
        r"cannot read '.*captions_train2014\.json': Is a directory",
    ),
    "an empty annotation file": ("dataloader", train2014(""), r"captions_train2014\.json' is not a JSON file"),
    "annotations cut short": (
        "dataloader",
        train2014(json.dumps(annotation_file("train2014"))[:200]),
        r"captions_train2014\.json' is not a JSON file",
    ),
    "annotations in Latin-1": (
        "dataloader",
        train2014('{"images": "café"}'.encode("latin-1")),
        "is not a JSON file .*'utf-8' codec can't decode",
    ),
    "annotations in UTF-16": ("dataloader", train2014('{"images": []}'.encode("utf-16")), "is not a JSON file"),
    "annotations nested 100,000 deep": ("dataloader", train2014("[" * 100_000), "is not a JSON file .*recursion"),
    "a number of 5,000 digits": ("dataloader", train2014(f'{{"images": {"9" * 5000}}}'), "is not a JSON file .*4300"),
    "a list of annotations": ("dataloader", train2014([]), "holds a list, not a JSON object"),
    "no images key": ("dataloader", train2014({"annotations": []}), f"{NO_FORMAT} .*'images' is missing"),
    "no annotations key": ("dataloader", train2014({"images": []}), f"{NO_FORMAT} .*'annotations' is missing"),
    "images that are null": ("dataloader", train2014({"images": None, "annotations": []}), NO_FORMAT),
    "images that are words": ("dataloader", train2014({"images": ["dog"], "annotations": []}), NO_FORMAT),
    "an image without an id": ("dataloader", changed(id=...), f"{NO_FORMAT} .*'id' is missing"),
    "an image without a file name": ("dataloader", changed(file_name=...), f"{NO_FORMAT} .*'file_name' is missing"),
    "an id in words": ("dataloader", changed(id="1"), f"{NO_FORMAT} .*image id '1'"),
    "an id that is true": ("dataloader", changed(id=True), f"{NO_FORMAT} .*image id 'True'"),
    "an id with a fraction": ("dataloader", changed(id=1.5), f"{NO_FORMAT} .*image id '1.5'"),
    "an id that is a list": ("dataloader", changed(id=[1]), NO_FORMAT),
    "an id of 70 bits": ("dataloader", changed(id=2**70), f"{NO_FORMAT} .*image id '1180591620717411303424'"),
    "an image id twice": ("dataloader", changed(id=2), "lists the same image id twice"),
    "an image id in both parts": ("dataloader", changed(id=101), "image id 101 occurs twice"),
    "a file name that is a number": ("dataloader", changed(file_name=7), NO_FORMAT),
    "a file name that climbs out": (
        "dataloader",
        changed(file_name="../x.jpg"),
        "'../x.jpg' .*leaves the image folder",
    ),
    "a file name from the root": ("dataloader", changed(file_name="/etc/passwd"), "leaves the image folder"),
    "a file name for Windows": ("dataloader", changed(file_name="..\\x.jpg"), "leaves the image folder"),
    "a file name with a NUL": ("dataloader", changed(file_name="a\0.jpg"), "leaves the image folder"),
    "an empty file name": ("dataloader", changed(file_name=""), "file name '' in the annotations names no file"),
    "a caption of no image id": ("dataloader", changed(image_id=...), f"{NO_FORMAT} .*'image_id' is missing"),
    "a caption that is not there": ("dataloader", changed(caption=...), f"{NO_FORMAT} .*'caption' is missing"),
    "a caption that is null": ("dataloader", changed(caption=None), f"{NO_FORMAT} .*a caption of image 1"),
    "a caption that is a number": ("dataloader", changed(caption=7), f"{NO_FORMAT} .*a caption of image 1"),
    "half of a surrogate pair": (
        "dataloader",
        changed(caption="a dog \ud83d"),
        f"{NO_FORMAT} .*a caption of image 1, half of a surrogate pair",
    ),
    "an empty data set": (
        "dataloader",
        both(lambda content: {"images": [], "annotations": []}),
        r"captions_val2014\.json lists 0 images",
    ),
    "one image for validation and test": (
        "dataloader",
        lambda folder: prepare(
            folder,
            f"--coco_dir={coco_root(folder, None, {'images': [{'id': 9, 'file_name': 'x'}], 'annotations': []})}",
        ),
        r"captions_val2014\.json lists 1 images and validation and test need one each",
    ),
    "no captions at all": (
        "dataloader",
        both(lambda content: {**content, "annotations": []}),
        r"no usable image for train \(dropped: 12 no caption\)",
    ),
    "blank captions only": (
        "dataloader",
        both(lambda c: {**c, "annotations": [{**a, "caption": " \t\n"} for a in c["annotations"]]}),
        r"no usable image for train \(dropped: 12 no caption\)",
    ),
    "no image where the annotations say": (
        "dataloader",
        images_replaced(lambda path: None),
        r"no usable image for train \(dropped: 12 missing\); the first was looked for at '.*/coco/val2014/COCO_val",
    ),
    "grey images only": (
        "dataloader",
        images_replaced(lambda path: SCENES[0].convert("L").save(path)),
        r"no usable image for train \(dropped: 12 mode L\); .* add --convert_rgb",
    ),
    "web pages for images": (
        "dataloader",
        images_replaced(lambda path: path.write_text("<html>404</html>")),
        r"no usable image for train \(dropped: 12 unreadable\); the first is '.*\.jpg', and it looks like a web page",
    ),
    "empty files for images": (
        "dataloader",
        images_replaced(lambda path: path.touch()),
        r"no usable image for train \(dropped: 12 unreadable\)",
    ),
    "symbolic links that go round": (
        "dataloader",
        images_replaced(lambda path: path.symlink_to(path.name)),
        r"no usable image for train \(dropped: 12 missing\)",
    ),
    "symbolic links to a secret": (
        "dataloader",
        images_replaced(lambda path: path.symlink_to("/etc/passwd")),
        r"no usable image for train \(dropped: 12 unreadable\)",
    ),
    # Karpathy files
    "no Karpathy file": (
        "dataloader",
        lambda folder: prepare(folder, "--karpathy_json=no.json", f"--image_dir={folder}"),
        r"'no\.json' does not exist",
    ),
    "no folder of images": (
        "dataloader",
        karpathy({"images": [entry()]}, "none"),
        "--image_dir '.*none' is not a folder",
    ),
    "a Karpathy file of something else": ("dataloader", karpathy({"annotations": []}), "lists no images"),
    "Karpathy images that are null": ("dataloader", karpathy({"images": None}), "lists no images"),
    "Karpathy images that are words": ("dataloader", karpathy({"images": ["a"]}), f"{NO_KARPATHY} .*image number 0"),
    "a split of another name": (
        "dataloader",
        karpathy({"images": [entry(split="holiday")]}),
        f"{NO_KARPATHY} .*'holiday'",
    ),
    "no sentences": ("dataloader", karpathy({"images": [entry(sentences=...)]}), f"{NO_KARPATHY} .*'sentences'"),
    "sentences that are null": ("dataloader", karpathy({"images": [entry(sentences=None)]}), NO_KARPATHY),
    "a sentence without its text": (
        "dataloader",
        karpathy({"images": [entry(sentences=[{"tokens": []}])]}),
        r"no usable image for train \(dropped: 1 no caption\); write a caption",
    ),
    "a sentence that is null": (
        "dataloader",
        karpathy({"images": [entry(sentences=[{"raw": None}])]}),
        r"no usable image for train \(dropped: 1 no caption\); write a caption",
    ),
    "a folder that climbs out": (
        "dataloader",
        karpathy({"images": [entry(filepath="../..")]}),
        r"filepath '\.\./\.\.' .*leaves the image folder",
    ),
    "a Karpathy file with one image": (
        "dataloader",
        karpathy({"images": [entry(filepath="train2014", filename="COCO_train2014_000000000001.jpg")]}),
        r"no usable image for train \(dropped: nothing\); give more of them",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_in_one_sentence(kind, tmp_path, monkeypatch, capsys):
    script, make, message = REFUSED[kind]
    arguments = make(tmp_path)
    before = contents(tmp_path)
    assert run(script, arguments, monkeypatch) == 2
    out, error = capsys.readouterr()
    sentence = error.rstrip("\n").split(f"{script}.py: error: ")[-1]
    assert error.count(f"{script}.py: error: ") == 1 and "\n" not in sentence
    assert re.search(message, sentence), sentence
    assert len(sentence) < 600 and "Traceback" not in error and out == ""
    assert contents(tmp_path) == before, "nothing half-written"


def test_the_design_page_counts_them():
    assert f"{len(REFUSED)} kinds refused, {len(ODD)} odd ones" in (ROOT / "captioning" / "DESIGN.md").read_text()


# Odd, and right

LONG = "a very " * 1500 + "long dog"


def first_caption(*captions) -> Make:
    """Every image has these captions."""

    def change(content):
        ids = [image["id"] for image in content["images"]]
        return {**content, "annotations": [{"image_id": i, "caption": c} for i in ids for c in captions]}

    return both(change)


def replaced_first(save: Callable[[Path], None]) -> Make:
    """The first image of train2014 is what `save` writes."""

    def make(folder):
        root = coco_root(folder)
        path = root / "train2014" / "COCO_train2014_000000000001.jpg"
        path.unlink()
        save(path)
        return prepare(folder, f"--coco_dir={root}")

    return make


def renamed(name: str) -> Make:
    def make(folder):
        root = coco_root(folder, annotation_file("train2014", file_name=name))
        (root / "train2014" / name).parent.mkdir(exist_ok=True)
        (root / "train2014" / "COCO_train2014_000000000001.jpg").rename(root / "train2014" / name)
        return prepare(folder, f"--coco_dir={root}")

    return make


def linked(folder):
    coco_root(folder / "elsewhere")
    (folder / "coco").symlink_to(folder / "elsewhere" / "coco")
    return prepare(folder, f"--coco_dir={folder / 'coco'}")


def deep_png(path):
    Image.new("RGB", (40, 30)).save(path, "PNG")


# what -> (make, images in all, captions of every image (None: the usual ones), what stdout says)
ODD = {
    "an emoji": (first_caption("a 🐶 and a 👩‍👩‍👧"), 12, ["a 🐶 and a 👩‍👩‍👧"], "a 🐶"),
    "right to left": (first_caption("كلب يركض על הדשא"), 12, ["كلب يركض על הדשא"], "كلب"),
    "Chinese": (first_caption("一只狗在草地上跑"), 12, ["一只狗在草地上跑"], "一只狗"),
    "combining marks": (first_caption("a cafe\u0301"), 12, ["a cafe\u0301"], "a cafe"),
    "10,000 characters": (first_caption(LONG), 12, [LONG], "12 captions truncated to 64"),
    "one letter": (first_caption("a"), 12, ["a"], "    a"),
    "punctuation alone": (first_caption("?!"), 12, ["?!"], "    ?!"),
    "the end token in words": (first_caption("a <|endoftext|> dog"), 12, ["a <|endoftext|> dog"], "<|endoftext|>"),
    "a NUL": (first_caption("a\0dog"), 12, ["a\0dog"], r"a\x00dog"),
    "an escape sequence": (first_caption("\x1b[2Jdog\x1b]0;x\x07"), 12, ["\x1b[2Jdog\x1b]0;x\x07"], r"\x1b[2Jdog"),
    "an override of direction": (first_caption("dog \u202egpj.exe"), 12, ["dog \u202egpj.exe"], r"dog \u202egpj.exe"),
    "line breaks": (first_caption("a\r\ndog\u2028runs"), 12, ["a\r\ndog\u2028runs"], r"a\r\ndog\u2028runs"),
    "the same caption twice": (first_caption("a dog", "a dog"), 12, ["a dog", "a dog"], "2: 12"),
    "a blank one among others": (first_caption("", "a dog", " "), 12, ["a dog"], "1: 12"),
    "fifty captions of an image": (first_caption(*map(str, range(50))), 12, [str(n) for n in range(50)], "50: 12"),
    "an image without captions": (
        both(lambda c: {**c, "annotations": c["annotations"][2:]}),
        10,
        None,
        "dropped: 2 no caption",
    ),
    "captions without an image": (
        both(lambda c: {**c, "annotations": [*c["annotations"], {"image_id": 9999, "caption": "a ghost"}]}),
        12,
        None,
        "dropped: nothing",
    ),
    "other keys": (changed(license=[3], id_of_something={"a": 1}), 12, None, "dropped: nothing"),
    "a byte order mark": (
        train2014(b"\xef\xbb\xbf" + json.dumps(annotation_file("train2014")).encode()),
        12,
        None,
        "dropped: nothing",
    ),
    "sizes that are words": (changed(width="wide", height=None), 12, None, "dropped: nothing"),
    "a negative id": (
        both(
            lambda c: {
                "images": [{**i, "id": -i["id"]} for i in c["images"]],
                "annotations": [{**a, "image_id": -a["image_id"]} for a in c["annotations"]],
            }
        ),
        12,
        None,
        "dropped: nothing",
    ),
    "a file name of many kinds": (renamed("-ünï côdé %20 #1?.jpg"), 12, None, "dropped: nothing"),
    "a file name in a folder": (renamed("a/b.jpg"), 12, None, "dropped: nothing"),
    "a file name of 5,000 letters": (changed(file_name="x" * 5000), 11, None, "dropped: 1 missing"),
    "a COCO folder behind a link": (linked, 12, None, "dropped: nothing"),
    "an image that is a folder": (replaced_first(lambda path: path.mkdir()), 11, None, "dropped: 1 missing"),
    "an image that is a pipe": (replaced_first(os.mkfifo), 11, None, "dropped: 1 missing"),
    "an image that is a PNG": (replaced_first(deep_png), 12, None, "dropped: nothing"),
    "an image of one pixel": (
        replaced_first(lambda path: Image.new("RGB", (1, 1)).save(path)),
        12,
        None,
        "dropped: nothing",
    ),
    "an image of one column": (
        replaced_first(lambda path: Image.new("RGB", (1, 3000)).save(path)),
        12,
        None,
        "dropped: nothing",
    ),
    "an image with transparency": (
        replaced_first(lambda path: SCENES[0].convert("RGBA").save(path, "PNG")),
        11,
        None,
        "dropped: 1 mode RGBA",
    ),
    "an image for print": (
        replaced_first(lambda path: SCENES[0].convert("CMYK").save(path)),
        11,
        None,
        "dropped: 1 mode CMYK",
    ),
    "an image cut short": (
        replaced_first(lambda path: path.write_bytes(b"\xff\xd8\xff\xe0")),
        11,
        None,
        "dropped: 1 unreadable",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_but_right_is_taken(kind, tmp_path, monkeypatch, capsys):
    make, total, captions, said = ODD[kind]
    assert run("dataloader", make(tmp_path), monkeypatch) == 0
    out, error = capsys.readouterr()
    assert said in out
    shown = set(out) - set("\n\u200c\u200d")  # joiners are part of words and of emoji
    assert all(map(str.isprintable, shown)), "no character drives the terminal"
    splits = load_from_disk(str(tmp_path / "out"))
    end = load_tokenizer(tmp_path / "out").eos_token_id
    rows = [row for split in splits.values() for row in split]
    assert len(rows) == len({row["image_id"] for row in rows}) == total
    for row in rows:
        assert row["captions"] == (captions or ["A dog", "The dog"])
        assert len(row["labels"]) == len(row["captions"])
        assert all(labels[-1] == end and labels.count(end) == 1 and 1 < len(labels) <= 64 for labels in row["labels"])
    if kind == "captions without an image":
        assert error.count("1 captions of images that it does not list are left out") == 2


# Properties

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
words = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
names = st.from_regex(r"[\w][\w .-]{0,20}\.jpg", fullmatch=True)
image = st.fixed_dictionaries({"id": st.integers(-5, 5) | anything, "file_name": names | anything})
caption = st.fixed_dictionaries({"image_id": st.integers(-5, 5) | anything, "caption": words | anything})
FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FEW
@given(images=st.lists(image, max_size=4) | anything, captions=st.lists(caption, max_size=4) | anything)
def test_annotations_of_any_kind_are_read_or_refused(images, captions, tmp_path, capsys):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part, content in (
        ("train2014", {"images": images, "annotations": captions}),
        ("val2014", {"images": [], "annotations": []}),
    ):
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))
    for read in (
        lambda: annotations.read_coco(root, "http://host"),
        lambda: annotations.read_karpathy(karpathy_file(root), root),
    ):
        try:
            pools = read()
        except InputError as error:
            assert len(str(error)) < 1000
        else:
            for records in pools.values():
                for record in records:
                    assert record.path.resolve().is_relative_to(root.resolve())
                    record.is_there(), record.has_caption()


def karpathy_file(root):
    return root / "annotations" / "captions_train2014.json"


@FEW
@given(
    captions=st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.lists(words, max_size=4), max_size=6),
    rng=st.randoms(),
)
def test_every_caption_comes_to_its_image_in_order(captions, rng, tmp_path):
    (tmp_path / "annotations").mkdir(exist_ok=True)
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in captions]
    entries = [(image_id, position) for image_id, own in captions.items() for position in range(len(own))]
    order = sorted(entries, key=lambda pair: (pair[1], rng.random()))
    notes = [{"image_id": image_id, "caption": captions[image_id][position]} for image_id, position in order]
    rng.shuffle(images)
    for part, content in (("train2014", [images, notes]), ("val2014", [[], []])):
        text = json.dumps(dict(zip(("images", "annotations"), content, strict=True)))
        (tmp_path / "annotations" / f"captions_{part}.json").write_text(text)
    records = annotations.read_coco(tmp_path)["train2014"]
    assert {record.image_id: list(record.captions) for record in records} == captions
    assert [record.image_id for record in records] == sorted(captions)


@settings(FEW, max_examples=40)
@given(
    captions=st.lists(st.lists(words.filter(str.strip), min_size=1, max_size=3), min_size=1, max_size=5),
    longest=st.integers(2, 20),
)
def test_captions_are_stored_as_written_and_end_once(captions, longest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    writer = SplitWriter(folder)
    for split in choose.SPLITS:
        for number, own in enumerate(captions):
            writer.keep(split, Record(number, "x.jpg", Path("x.jpg"), tuple(own)), b"jpeg")
    tokenizer = train_tokenizer((text for own in captions for text in own), 300)
    truncated = writer.finish(tokenizer, longest)
    end, cut = tokenizer.eos_token_id, 0
    splits = load_from_disk(str(folder))
    assert list(splits) == list(choose.SPLITS)
    for rows in splits.values():
        assert rows.select_columns("captions").to_dict() == {"captions": captions}
        for own, labels in zip(captions, rows["labels"], strict=True):
            for text, ids in zip(own, labels, strict=True):
                whole = [token for token in tokenizer(" ".join(text.split())).input_ids if token != end]
                assert ids == [*whole[: longest - 1], end]
                cut += len(whole) > longest - 1
    assert truncated == cut


@FEW
@given(words)
def test_printable_text_drives_no_terminal_and_keeps_the_rest(text):
    shown = cli.printable(text)
    joiners = str.maketrans("", "", cli.JOINERS)  # words are spelt with them
    assert shown.translate(joiners).isprintable()
    assert text != shown or text.translate(joiners).isprintable()
    assert all(character in shown for character in text if character.isprintable())


@FEW
@given(
    st.sampled_from([("train2014", "val2014"), ("train", "validation", "test")]),
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
    st.integers(3, 100) | st.just(0),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
)
def test_a_plan_takes_no_image_twice_and_no_more_than_was_asked_for(names, sizes, limit, val, test):
    pools = {
        name: [Record(1000 * part + n, "x", Path("x"), ("a",)) for n in range(size)]
        for part, (name, size) in enumerate(zip(names, sizes, strict=False))
    }
    try:
        draws = choose.plan(pools, limit, val, test)
    except InputError:
        assert len(pools["val2014"]) < 2
        return
    total = sum(map(len, pools.values()))
    assert all(draw.wanted >= 0 for draw in draws)
    assert sum(draw.wanted for draw in draws) <= min(limit or total, total)
    first = choose.Pools(pools, 0).first_choice(draws)
    assert len({record.image_id for record in first}) == len(first) == sum(draw.wanted for draw in draws)
