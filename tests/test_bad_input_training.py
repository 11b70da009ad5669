"""Bad input for train.py and inference.py, a table: one sentence, exit code 2, no traceback, nothing half-written.

A row is `"what is wrong": (script, make, message)`: `make(folder)` puts what it needs into an empty folder and returns
the command line, and `message` is a regular expression for the sentence.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, contents, run
from pictures import encoded
from PIL import Image

from captioning.model import parts

Make = Callable[[Path], list]
Row = tuple[str, Make, str]
# Set by a fixture: the data of `few`, and the run folder of `trained`.
HERE: dict[str, Path] = {}


def training(folder: Path, *arguments, data: Path | None = None) -> list:
    words = [f"--data_path={data or HERE['few']}", f"--output_dir={folder / 'run'}", "--use_cpu", "--bf16=False"]
    return [*words, "--dataloader_num_workers=0", *arguments]


def flags(*arguments) -> Make:
    """Arguments of train.py that no file can make right."""
    return lambda folder: training(folder, *arguments)


def data(change: Callable[[Path], None], *arguments) -> Make:
    """A copy of the prepared data, after a change."""

    def make(folder):
        copy = Path(shutil.copytree(HERE["few"], folder / "data"))
        change(copy)
        return training(folder, *arguments, data=copy)

    return make


def removed(name: str) -> Callable[[Path], None]:
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def description(**changes) -> Callable[[Path], None]:
    def change(folder):
        content = json.loads((folder / "dataset.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "dataset.json").write_text(json.dumps(content))

    return change


def cut(pattern: str, share: float = 0.5) -> Callable[[Path], None]:
    """The first file of that name loses its end."""

    def change(folder):
        path = sorted(folder.glob(pattern))[0]
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return change


def split(name: str, change) -> Callable[[Path], None]:
    """One split of the data, its rows changed."""

    def changed(folder):
        from datasets import load_from_disk

        splits = load_from_disk(str(folder), keep_in_memory=True)
        splits[name] = change(splits[name])
        splits.save_to_disk(str(folder.with_name("changed")))
        for path in folder.with_name("changed").iterdir():
            if path.is_dir():
                shutil.rmtree(folder / path.name)
                shutil.move(path, folder / path.name)
        shutil.rmtree(folder.with_name("changed"))

    return changed


def images_replaced(content: bytes):
    def change(rows):
        from datasets import Image as ImageFeature

        rows = rows.cast_column("image", ImageFeature(decode=False))
        rows = rows.map(lambda row: {"image": {"bytes": content, "path": None}})
        return rows.cast_column("image", ImageFeature())

    return change


def checkpoint(change: Callable[[Path], None]) -> Make:
    """Going on from a checkpoint, after a change."""

    def make(folder):
        newest = max(HERE["trained"].glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        copy = Path(shutil.copytree(newest, folder / newest.name))
        change(copy)
        return training(folder, f"--resume_from_checkpoint={copy}")

    return make


def decoder(folder):
    parts.train_tokenizer(["entirely different words"] * 3, 300).save_pretrained(folder / "decoder")
    return training(folder, f"--decoder={folder / 'decoder'}")


def picture(folder: Path) -> Path:
    Image.new("RGB", (64, 64)).save(folder / "picture.png")
    return folder / "picture.png"


def captioning(*arguments) -> Make:
    """Arguments of inference.py that no file can make right."""
    return lambda folder: [
        f"--image_path={picture(folder)}",
        f"--model_path={HERE['trained']}",
        *[word.format(folder=folder) for word in arguments],
    ]


def bundle(change: Callable[[Path], None]) -> Make:
    """A copy of the run folder, after a change."""

    def make(folder):
        copy = folder / "run"
        copy.mkdir()
        for path in HERE["trained"].iterdir():
            if path.is_file():
                shutil.copy(path, copy)
        change(copy)
        return [f"--image_path={picture(folder)}", f"--model_path={copy}"]

    return make


def pickled(folder):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def config(**changes) -> Callable[[Path], None]:
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def predictions(change) -> Make:
    """A file of predictions for the test split: `change` of the right list of entries, or a text."""

    def make(folder):
        from datasets import load_from_disk

        entries = [{"image_id": i, "caption": "a dog"} for i in load_from_disk(str(HERE["few"]))["test"]["image_id"]]
        content = change(entries)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "results.json").write_bytes(content)
        return [f"--predictions={folder / 'results.json'}", f"--data_path={HERE['few']}"]

    return make


AGAIN = "run dataloader.py again"
FORMAT = "is not in COCO's results format"
REFUSED: dict[str, Row] = {
    # train.py: arguments
    "no epoch": ("train", flags("--epochs=0"), "--epochs 0 is not above 0"),
    "epochs that are no number": ("train", flags("--epochs=nan"), "--epochs nan is not"),
    "epochs without end": ("train", flags("--epochs=inf"), "--epochs inf is not"),
    "epochs in words": ("train", flags("--epochs=ten"), "invalid float value: 'ten'"),
    "two lengths of training": ("train", flags("--epochs=2", "--max_steps=5"), "say two things"),
    "no image in a batch": (
        "train",
        flags("--per_device_train_batch_size=0"),
        "--per_device_train_batch_size 0 is below 1",
    ),
    "half an image in a batch": (
        "train",
        flags("--per_device_train_batch_size=2.5"),
        r"takes an integer, not '2\.5'",
    ),
    "no image in an evaluation's batch": (
        "train",
        flags("--per_device_eval_batch_size=-1"),
        "--per_device_eval_batch_size -1 is below 1",
    ),
    "no accumulation": ("train", flags("--gradient_accumulation_steps=0"), "--gradient_accumulation_steps 0 is below"),
    "a rate below zero": ("train", flags("--learning_rate=-1"), "--learning_rate -1 is not above 0"),
    "a rate that is no number": ("train", flags("--learning_rate=nan"), "--learning_rate nan is not"),
    "a rate of a part below zero": ("train", flags("--decoder_lr=-1"), "--decoder_lr -1 is not above 0"),
    "a rate of a part that is no number": ("train", flags("--encoder_lr=nan"), "--encoder_lr nan is not"),
    "label smoothing above one": (
        "train",
        flags("--label_smoothing_factor=2"),
        "--label_smoothing_factor 2.0 is not",
    ),
    "no beams": ("train", flags("--generation_num_beams=0"), "--generation_num_beams 0 is below 1"),
    "captions of no words": ("train", flags("--generation_max_length=0"), "--generation_max_length 0 is below 1"),
    "captions longer than the decoder": (
        "train",
        flags("--generation_max_length=128"),
        r"--decoder 'tiny' has 128 positions.*\(128 are generated",
    ),
    "steps of none": ("train", flags("--max_steps=0"), "--max_steps 0 is below 1"),
    "a momentum above one": ("train", flags("--adam_beta1=1.5"), "--adam_beta1 1.5 is not between 0 and 1"),
    "a decay below zero": ("train", flags("--weight_decay=-0.1"), "--weight_decay -0.1 is below 0"),
    "a seed below zero": ("train", flags("--seed=-1"), "--seed -1 is below 0"),
    "workers below zero": ("train", flags("--dataloader_num_workers=-2"), "--dataloader_num_workers -2 is below 0"),
    "a schedule that does not exist": ("train", flags("--lr_scheduler_type=wavy"), "invalid choice: 'wavy'"),
    "an optimiser that does not exist": ("train", flags("--optim=best"), "invalid choice: 'best'"),
    "a score that does not exist": (
        "train",
        flags("--metric_for_best_model=bleu4"),
        "'bleu4' is not a score; choose from",
    ),
    "patience of none": ("train", flags("--patience=0"), "--patience 0 is below 1"),
    "patience without evaluations": (
        "train",
        flags("--patience=1", "--eval_strategy=no", "--save_strategy=no", "--load_best_model_at_end=False"),
        "--patience needs evaluations",
    ),
    "a misspelt flag": (
        "train",
        flags("--learning_rte=1"),
        "unknown flag --learning_rte; did you mean --learning_rate?",
    ),
    "a word without a flag": ("train", flags("5"), "'5' belongs to no flag"),
    "features of a moving encoder": ("train", flags("--cache_features"), "--cache_features needs --freeze_encoder"),
    "self-critical and no rate": ("train", flags("--self_critical_lr=0"), "--self_critical_lr 0 is not above 0"),
    "all of the decoder dropped": ("train", flags("--dropout=1"), "--dropout 1 is not between 0 and 1"),
    "adapters of rank 0": ("train", flags("--lora=0"), "--lora 0 is below 1, the lowest rank of a matrix"),
    "adapters of a rank below 0": ("train", flags("--lora=-1"), "--lora -1 is below 1"),
    "adapters of a rank that is no number": ("train", flags("--lora=x"), "argument --lora: invalid int value: 'x'"),
    "frozen for less than no time": ("train", flags("--freeze_encoder=-1"), "--freeze_encoder -1 is below 0"),
    "evaluations and checkpoints apart": (
        "train",
        flags("--eval_strategy=steps", "--save_strategy=epoch"),
        "requires the save and eval strategy to match",
    ),
    # train.py: models
    "an encoder that was never fetched": (
        "train",
        flags("--encoder=no/such-encoder"),
        "--encoder 'no/such-encoder' is not here",
    ),
    "a decoder of another tokenizer": ("train", decoder, "has another tokenizer than the data in"),
    "a model to start from that is not there": (
        "train",
        flags("--model_path=./nowhere"),
        "--model_path './nowhere' does not exist",
    ),
    # train.py: the data
    "no data": (
        "train",
        flags("--data_path=nowhere"),
        "--data_path 'nowhere' is not a folder of dataloader.py; did you",
    ),
    "a description that is no JSON": (
        "train",
        data(written("dataset.json", "{")),
        r"dataset\.json' is not a JSON file",
    ),
    "a description that is a list": ("train", data(written("dataset.json", "[]")), "holds a list, not a JSON object"),
    "a description that is not UTF-8": ("train", data(written("dataset.json", b"\xff\xfe{")), "is not a JSON file"),
    "a description without its decoder": (
        "train",
        data(description(decoder=...)),
        rf"dataset\.json' does not say 'decoder'; {AGAIN}",
    ),
    "a description without its counts": (
        "train",
        data(description(images=...)),
        rf"dataset\.json' does not say 'images'; {AGAIN}",
    ),
    "counts that are words": (
        "train",
        data(description(images="many")),
        rf"dataset\.json' says images 'many', which is not an object .*{AGAIN}",
    ),
    "no training split": ("train", data(removed("train")), f"--data_path '.*data' cannot be read .*{AGAIN}"),
    "no list of splits": (
        "train",
        data(removed("dataset_dict.json")),
        f"--data_path '.*data' cannot be read .*{AGAIN}",
    ),
    "a list of splits that is no JSON": (
        "train",
        data(written("dataset_dict.json", "{")),
        f"--data_path '.*data' cannot be read .*{AGAIN}",
    ),
    "splits cut short": ("train", data(cut("train/*.arrow")), f"--data_path '.*data' cannot be read .*{AGAIN}"),
    "splits of nothing": ("train", data(cut("train/*.arrow", 0)), f"--data_path '.*data' cannot be read .*{AGAIN}"),
    "an empty validation split": (
        "train",
        data(split("validation", lambda rows: rows.select([]))),
        f"has a split without images; {AGAIN}",
    ),
    "an empty training split": (
        "train",
        data(split("train", lambda rows: rows.select([]))),
        f"has a split without images; {AGAIN}",
    ),
    "a split without labels": (
        "train",
        data(split("train", lambda rows: rows.remove_columns("labels"))),
        rf"train split of --data_path '.*data' has no column 'labels'; {AGAIN}",
    ),
    "data made for another tokenizer": (
        "train",
        data(lambda folder: parts.train_tokenizer(["a dog"], 300).save_pretrained(folder)),
        rf"was made for another tokenizer than lies in it: its labels hold token \d+, .* {AGAIN}",
    ),
    "data without its tokenizer": (
        "train",
        data(lambda folder: [removed(path.name)(folder) for path in folder.glob("tokenizer*")]),
        "--data_path '.*data' has no usable tokenizer",
    ),
    "a tokenizer that is no JSON": (
        "train",
        data(written("tokenizer.json", "{")),
        "--data_path '.*data' has no usable tokenizer",
    ),
    "data without its image processor": (
        "train",
        data(removed("preprocessor_config.json")),
        r"'.*data' has no usable preprocessor_config\.json",
    ),
    "images that cannot be read": (
        "train",
        data(split("train", images_replaced(b"<html>404</html>"))),
        rf"image \d+ \(.*\) of the prepared data cannot be read \(it looks like a web page, .*{AGAIN}",
    ),
    "images cut short": (
        "train",
        data(split("train", images_replaced(encoded(Image.new("RGB", (64, 64)))[:-30]))),
        rf"image \d+ \(.*\) of the prepared data cannot be read .*{AGAIN}",
    ),
    "images that a data worker cannot read": (
        "train",
        data(split("train", images_replaced(b"GIF89a")), "--dataloader_num_workers=1"),
        rf"train\.py: error: image \d+ \(.*\) of the prepared data cannot be read .*{AGAIN}",
    ),
    # train.py: the run folder
    "an output that is a file": (
        "train",
        lambda folder: [written("file", "x")(folder), *training(folder, f"--output_dir={folder / 'file'}")][1:],
        "--output_dir '.*file' is a file; name a folder",
    ),
    "an output below a file": (
        "train",
        lambda folder: [written("file", "x")(folder), *training(folder, f"--output_dir={folder / 'file' / 'run'}")][1:],
        "--output_dir '.*run' lies below a file",
    ),
    "an earlier run": (
        "train",
        lambda folder: [
            (folder / "run" / "checkpoint-3").mkdir(parents=True),
            *training(folder),
        ][1:],
        "holds checkpoints of an earlier run; continue it with --resume_from_checkpoint auto",
    ),
    "a checkpoint that is not there": (
        "train",
        flags("--resume_from_checkpoint=nowhere"),
        "'nowhere' is not a whole checkpoint folder: it has no whole trainer_state.json",
    ),
    "a checkpoint without its optimizer": (
        "train",
        checkpoint(removed("optimizer.pt")),
        "is not a whole checkpoint folder: its optimizer is missing",
    ),
    "a checkpoint whose weights are cut short": (
        "train",
        checkpoint(cut("model.safetensors")),
        r"is not a whole checkpoint folder: its model\.safetensors is cut short",
    ),
    "a checkpoint whose state is half": (
        "train",
        checkpoint(cut("trainer_state.json")),
        r"is not a whole checkpoint folder: it has no whole trainer_state\.json",
    ),
    # inference.py: arguments
    "nothing to caption": (
        "inference",
        lambda folder: [f"--model_path={HERE['trained']}"],
        "give --image_path to caption images, or --data_path",
    ),
    "images and data at once": ("inference", captioning("--data_path=x"), "give --image_path to caption images, or"),
    "no beams to search with": ("inference", captioning("--num_beams=0"), "--num_beams 0 is below 1"),
    "no image at a time": ("inference", captioning("--batch_size=-4"), "--batch_size -4 is below 1"),
    "a caption longer than the decoder": (
        "inference",
        captioning("--max_new_tokens=5000"),
        "--max_new_tokens 5000 is too long; the decoder has 128 positions",
    ),
    "a device that does not exist": ("inference", captioning("--device=abacus"), "--device 'abacus' cannot be used"),
    "a split of another name": ("inference", captioning("--split=dev"), "invalid choice: 'dev'"),
    "an output without a folder": (
        "inference",
        captioning("--output={folder}/no/captions.json"),
        "--output '.*captions.json': there is no folder",
    ),
    "an output that is a folder": (
        "inference",
        captioning("--output={folder}"),
        "--output '.*' is a folder; name a file",
    ),
    "an image that is not there": (
        "inference",
        lambda folder: ["--image_path=nowhere.jpg", f"--model_path={HERE['trained']}"],
        r"'nowhere\.jpg'",
    ),
    "a folder without images": (
        "inference",
        lambda folder: [f"--image_path={folder}", f"--model_path={HERE['trained']}"],
        "folder '.*' holds no images",
    ),
    "a pattern of nothing": (
        "inference",
        lambda folder: [f"--image_path={folder}/*.jpg", f"--model_path={HERE['trained']}"],
        r"nothing matches '.*\*\.jpg'",
    ),
    "an ensemble with nobody": (
        "inference",
        captioning("--ensemble=nowhere"),
        r"--ensemble 'nowhere' is not a folder; did you run train\.py\?",
    ),
    "an ensemble with a folder of something else": (
        "inference",
        captioning("--ensemble={folder}"),
        r"--ensemble '.*' has no config\.json",
    ),
    "an ensemble that is to be explained": (
        "inference",
        captioning("--ensemble={folder}", "--explain={folder}/out.png"),
        "--explain shows where one model looked, and --ensemble has several",
    ),
    "a store that is not there": (
        "inference",
        captioning("--store=nowhere"),
        r"--store 'nowhere' is not a folder of dataloader\.py; did you run it\?",
    ),
    "a store for captions that are asked for": (
        "inference",
        lambda folder: captioning(f"--store={HERE['few']}", "--max_words=5")(folder),
        "--store has no use with --max_words; leave one of them out",
    ),
    "a weight without a store": (
        "inference",
        captioning("--store_weight=2"),
        "--store_weight needs --store",
    ),
    "a store that counts less than nothing": (
        "inference",
        lambda folder: captioning(f"--store={HERE['few']}", "--store_weight=-1")(folder),
        "--store_weight -1 is not between 0 and 1000",
    ),
    # inference.py: run folders
    "a model that is not there": (
        "inference",
        captioning("--model_path=./nowhere"),
        "'./nowhere' does not exist; name a",
    ),
    "a model without its tokenizer": (
        "inference",
        bundle(lambda folder: [removed(path.name)(folder) for path in folder.glob("tokenizer*")]),
        "--model_path '.*run' has no usable tokenizer",
    ),
    "a model without its image processor": (
        "inference",
        bundle(removed("preprocessor_config.json")),
        r"--model_path '.*run' has no usable preprocessor_config\.json",
    ),
    "a model without weights": (
        "inference",
        bundle(removed("model.safetensors")),
        r"--model_path '.*run' holds no model\.safetensors",
    ),
    "pickled weights": (
        "inference",
        bundle(pickled),
        r"--model_path '.*run' lacks \d+ of its weights",
    ),
    "weights cut short": (
        "inference",
        bundle(cut("model.safetensors")),
        r"--model_path '.*run' has a damaged model\.safetensors, cut short perhaps",
    ),
    "weights that are a web page": (
        "inference",
        bundle(written("model.safetensors", "<html>404</html>")),
        r"has a damaged model\.safetensors",
    ),
    "weights of a git pointer": (
        "inference",
        bundle(written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
        r"has a damaged model\.safetensors",
    ),
    "no config": ("inference", bundle(removed("config.json")), r"has no config\.json; it is not a model folder"),
    "a config that is no JSON": (
        "inference",
        bundle(written("config.json", "{")),
        r"'.*run' has a config\.json that transformers cannot use",
    ),
    "a config of a list": (
        "inference",
        bundle(written("config.json", "[]")),
        r"'.*run' has a config\.json that transformers cannot use",
    ),
    "a config of another model": (
        "inference",
        bundle(written("config.json", '{"model_type": "bert"}')),
        "is a bert, not an image captioner",
    ),
    "a config with code of its own": (
        "inference",
        bundle(config(auto_map={"AutoModel": "code.Model"})),
        r"asks to run code of its own \(auto_map\), which is never done",
    ),
    # inference.py: scoring
    "predictions without references": (
        "inference",
        lambda folder: ["--predictions=x.json"],
        "--predictions needs --data_path, which holds the references",
    ),
    "predictions that are not there": (
        "inference",
        lambda folder: ["--predictions=nowhere.json", f"--data_path={HERE['few']}"],
        r"cannot read --predictions 'nowhere\.json'",
    ),
    "predictions that are no JSON": ("inference", predictions(lambda entries: b"{"), FORMAT),
    "predictions that are not UTF-8": ("inference", predictions(lambda entries: b'["\xff"]'), FORMAT),
    "predictions that are an object": ("inference", predictions(lambda entries: {"a": 1}), FORMAT),
    "predictions that are a number": ("inference", predictions(lambda entries: 7), FORMAT),
    "predictions without captions": ("inference", predictions(lambda entries: [{"image_id": 1}]), FORMAT),
    "predictions that are lists": ("inference", predictions(lambda entries: [[1, "a dog"]]), FORMAT),
    "a caption that is null": (
        "inference",
        predictions(lambda entries: [{**entries[0], "caption": None}, *entries[1:]]),
        FORMAT,
    ),
    "a caption that is a list of them": (
        "inference",
        predictions(lambda entries: [{**entries[0], "caption": ["a dog"]}, *entries[1:]]),
        FORMAT,
    ),
    "an id that is a list": (
        "inference",
        predictions(lambda entries: [{**entries[0], "image_id": [1]}, *entries[1:]]),
        FORMAT,
    ),
    "an image captioned twice": (
        "inference",
        predictions(lambda entries: [*entries, entries[0]]),
        "captions an image twice; keep one caption per image",
    ),
    "an image without a caption": (
        "inference",
        predictions(lambda entries: entries[1:]),
        "1 images of the split have no prediction, such as 1895; it has to caption each image of the --split once",
    ),
    "ids of another split": (
        "inference",
        predictions(lambda entries: [{**entry, "image_id": entry["image_id"] + 10**6} for entry in entries]),
        r"4 images of the split have no prediction, such as \d+; it has to caption each",
    ),
    "no predictions": ("inference", predictions(lambda entries: []), "4 images of the split have no prediction"),
    "predictions of more than the split": (
        "inference",
        predictions(lambda entries: [*entries, {"image_id": 10**9, "caption": "a dog"}]),
        "1 images are captioned and not in the split, such as 1000000000",
    ),
    "data without its description": (
        "inference",
        lambda folder: [f"--data_path={folder}", f"--model_path={HERE['trained']}"],
        "is not a folder of dataloader.py; did you run it?",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def here(few, trained):
    HERE.update(few=few, trained=trained)


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused_in_one_sentence(kind, tmp_path, monkeypatch, capsys):
    script, make, message = REFUSED[kind]
    arguments = make(tmp_path)
    before = contents(tmp_path)
    assert run(script, arguments, monkeypatch) == 2
    out, error = capsys.readouterr()
    last = error.rstrip("\n").splitlines()[-1]
    sentence = last.split(f"{script}.py: error: ")[-1]
    assert error.count(f"{script}.py: error: ") == 1 and last.startswith(f"{script}.py: error: ")
    assert re.search(message, last), last
    assert len(sentence) < 1500 and "Traceback" not in error and out == ""
    assert contents(tmp_path) == before, "nothing half-written"
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_design_page_counts_them():
    page = (ROOT / "captioning" / "DESIGN.md").read_text()
    assert f"{len(REFUSED)} kinds of bad input to `train.py` and `inference.py`" in page
