"""Nothing is written through a link: every file that the three scripts write, with a link in its place.

What a link leads to is a stand-in in the test's own folder, whose bytes are the same afterwards.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from captioning import InputError, files
from captioning.data import download, folder
from captioning.model import captioner, parts
from captioning.show import curves, pages
from captioning.training import batches, features

KEPT = b"what the user made"


@pytest.fixture
def mine(tmp_path):
    """A file and a folder of the user's, outside of any folder that a script is given."""
    place = tmp_path / "mine"
    (place / "folder").mkdir(parents=True)
    (place / "file").write_bytes(KEPT)
    (place / "folder" / "file").write_bytes(KEPT)
    yield place
    assert [path.read_bytes() for path in (place / "file", place / "folder" / "file")] == [KEPT, KEPT]
    assert sorted(path.name for path in place.rglob("*")) == ["file", "file", "folder"]


def plant(link: Path, target: Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link


# ---- the helpers

WRITERS = {
    "a whole file": lambda path: files.write_whole(path, "new"),
    "a lock": lambda path: files.lock(path, wait=False).__enter__(),
    "a file that is continued": lambda path: files.open_in_place(path),
    "a file that grows": lambda path: files.open_in_place(path, append=True),
    "curves": lambda path: curves.draw_curves([{"loss": 1.0, "epoch": 1.0, "step": 1}], path),
    "a picture": lambda path: pages.draw_gallery(
        [{"image": Image.new("RGB", (8, 8)), "caption": "a", "reference": "b"}], path, "a person"
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_what_is_no_file_of_its_own_is_refused_or_replaced(writer, kind, mine, tmp_path):
    path = tmp_path / "given" / "name.png"
    path.parent.mkdir()
    if kind == "hard link":
        path.hardlink_to(mine / "file")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        plant(path, mine / ("file" if kind == "link" else "new"))
    if kind == "hard link" and "continued" not in writer and "grows" not in writer:
        WRITERS[writer](path)  # a new file takes the name; a lock is empty
        return
    with pytest.raises(InputError, match=r"name\.png' is (a link|a folder|not a regular file)"):
        WRITERS[writer](path)


def test_a_temporary_name_cannot_be_known(tmp_path):
    names = set()
    for _ in range(3):
        with files.replacing(tmp_path / "file") as part:
            names.add(part.name)
            part.write_text("x")
    assert len(names) == 3 and [path.name for path in tmp_path.iterdir()] == ["file"]
    left = tmp_path / ".999999999.0123abcd.file"
    left.touch()
    files.remove_leftovers(tmp_path)
    assert not left.exists()


def test_a_folder_on_the_way_that_is_a_link_is_refused_below_what_the_user_named(mine, tmp_path):
    plant(tmp_path / "named", mine / "folder")  # the user named it: it is followed
    files.make_folder(tmp_path / "named", tmp_path / "named")
    plant(tmp_path / "given" / "inner", mine / "folder")
    for below in ("inner", "inner/deeper"):
        with pytest.raises(InputError, match="inner' is a link, and nothing is written through one"):
            files.make_folder(tmp_path / "given" / below, tmp_path / "given")


def test_a_link_is_removed_and_not_what_it_leads_to(mine, tmp_path):
    files.remove(plant(tmp_path / "link", mine / "folder"))
    assert not (tmp_path / "link").is_symlink()


# ---- train.py

RUN_FILES = [
    *(".lock", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "preprocessor_config.json", "predictions_test.json", "results.json", "report.html"),
    *("training_curves.png", "gallery.png", "runs/events", "checkpoint-1/model.safetensors"),
    *("checkpoint-1/optimizer.pt", "checkpoint-1/scheduler.pt", "checkpoint-1/rng_state.pth"),
    *("checkpoint-1/trainer_state.json", "checkpoint-1/training_args.bin"),
]
RUN_FOLDERS = ["checkpoint-1", "checkpoint-2", "runs", ".part", ".part-0"]


def training(few, out, *more):
    words = [f"--data_path={few}", f"--output_dir={out}", "--use_cpu", "--bf16=False", "--dataloader_num_workers=0"]
    return [*words, "--epochs=1", *more]


@pytest.mark.parametrize("name", [*RUN_FILES, *RUN_FOLDERS])
@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint=auto"]], ids=["new", "resumed"])
def test_a_run_folder_with_links_is_refused_at_once(name, resume, few, mine, tmp_path, monkeypatch, capsys):
    plant(tmp_path / "run" / name, mine / ("folder" if name in RUN_FOLDERS else "file"))
    assert run("train", training(few, tmp_path / "run", *resume), monkeypatch) == 2
    error = capsys.readouterr().err
    assert "nothing is written through one" in error and "Traceback" not in error and "starting" not in error


def test_a_run_folder_that_is_itself_a_link_is_where_the_user_wants_it(tmp_path):
    (tmp_path / "disk" / "checkpoint-1").mkdir(parents=True)
    plant(tmp_path / "run", tmp_path / "disk")
    plant(tmp_path / "disk" / "best", tmp_path / "disk" / "checkpoint-1")
    files.refuse_links(tmp_path / "run", "--output_dir")


@pytest.fixture
def cached(few, prepared, tmp_path):
    """A cache of features for some images, and their data set."""
    tokenizer = parts.load_tokenizer(few)
    torch.manual_seed(0)
    bundle = captioner.Bundle(captioner.build("tiny", "tiny", tokenizer), tokenizer, parts.load_image_processor(few))
    dataset = batches.CaptionDataset(folder.load_prepared(few)[0]["train"], parts.Pixels(bundle.image_processor))
    said = []
    return features.FeatureCache(bundle, tmp_path / "data" / ".features", 4, said.append), dataset, said


@pytest.mark.parametrize("ending", ["npy", "lock"])
def test_a_cache_of_features_is_not_written_through_links(ending, cached, mine):
    cache, dataset, _ = cached
    plant(cache.folder / f"train-{cache.fingerprint(dataset)}.000000.{ending}", mine / "file")
    with pytest.raises(InputError, match="is a link, and nothing is written through one"):
        cache.features(dataset, "train")


def test_a_cache_in_a_folder_that_is_a_link_is_refused(cached, mine, few, tmp_path, monkeypatch, capsys):
    cache, dataset, _ = cached
    plant(cache.folder, mine / "folder")
    with pytest.raises(InputError, match="features' is a link, and nothing is written through one"):
        cache.features(dataset, "train")
    data = shutil.copytree(few, tmp_path / "copy")
    flags = ["--freeze_encoder", "--cache_features"]
    for link, target in ((".features/train-0123.000000.npy", "file"), (".features", "folder")):
        plant(data / link, mine / target)
        assert run("train", training(data, tmp_path / "run", *flags), monkeypatch) == 2
        assert "nothing is written through one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
        "other shape",
        "other numbers",
        "objects",
        "cut",
        "longer",
    ],
)
def test_features_that_came_with_the_data_are_used_only_if_they_fit(content, cached, tmp_path):
    cache, dataset, said = cached
    right = np.array(cache.features(dataset, "train"))
    path = cache.folder / f"train-{cache.fingerprint(dataset)}.000000.npy"
    whole = path.read_bytes()
    others = {
        "other shape": np.zeros((*right.shape[:2], 1), np.float16),
        "other numbers": np.zeros(right.shape, np.float32),
        "objects": np.array([None] * 3, dtype=object),
    }
    with path.open("wb") as file:
        if content in others:
            np.save(file, others[content])
        else:
            file.write({"cut": whole[:-1], "longer": whole + b"\0"}.get(content, content))
    assert np.array_equal(cache.features(dataset, "train"), right)
    assert any("computed anew" in line for line in said)


def test_a_bundle_is_not_saved_through_links(cached, mine, tmp_path):
    bundle = cached[0].bundle
    for name in (".part", ".part-0"):
        plant(tmp_path / "run" / name, mine / "folder")
    captioner.save(bundle, tmp_path / "run")
    plant(tmp_path / "run" / "config.json", mine / "file")
    with pytest.raises(InputError, match=r"config\.json' is a link"):
        captioner.save(bundle, tmp_path / "run")
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".part-")]


# ---- inference.py and dataloader.py


@pytest.mark.parametrize("words", [["--output={}"], ["--json", "--output={}"], ["--explain={}"]], ids=" ".join)
def test_an_output_of_inference_that_is_a_link_is_refused_at_once(words, mine, tmp_path, monkeypatch, capsys):
    place = plant(tmp_path / "out.png", mine / "file")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    words = [word.format(place) for word in words]
    assert run("inference", ["--model_path=./none", "--image_path", tmp_path / "photo.png", *words], monkeypatch) == 2
    assert "out.png' is a link, and nothing is written through one" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["predictions", "per_image", "results"])
def test_scores_are_not_written_through_links(kind, few, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    plant(tmp_path / "run" / f"scored_test_{kind}.json", mine / "file")
    assert run("inference", [f"--model_path={tmp_path / 'run'}", f"--data_path={few}"], monkeypatch) == 2
    assert "is a link, and nothing is written through one" in capsys.readouterr().err
    (tmp_path / "run" / "mine.json").write_text("[]")
    plant(tmp_path / "run" / "mine_scores_per_image.json", mine / "file")
    words = [f"--predictions={tmp_path / 'run' / 'mine.json'}", f"--data_path={few}"]
    assert run("inference", words, monkeypatch) == 2
    assert "is a link, and nothing is written through one" in capsys.readouterr().err


def test_the_preview_of_dataloader_is_not_drawn_through_a_link(mine, tmp_path, monkeypatch, capsys):
    place = plant(tmp_path / "sheet.png", mine / "file")
    assert run("dataloader", ["--sample", f"--save_path={tmp_path / 'out'}", f"--preview={place}"], monkeypatch) == 2
    assert "sheet.png' is a link" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".out.lock", ".out.partial", ".out.partial.old"])
def test_beside_a_prepared_folder_no_link_is_followed(name, mine, tmp_path):
    plant(tmp_path / name, mine / ("file" if name == ".out.lock" else "folder"))
    try:
        with folder.replaced(tmp_path / "out") as work:
            assert not work.is_symlink()
            (work / "file").write_text("new")
    except InputError as error:
        assert name == ".out.lock" and "is a link" in str(error)
    else:
        assert (tmp_path / "out" / "file").read_text() == "new" and not (tmp_path / "out").is_symlink()


def test_hidden_links_of_a_folder_that_is_replaced_stay_links(mine, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("dataset.json", "dataset_dict.json"):
        (tmp_path / "out" / name).write_text("{}")
    plant(tmp_path / "out" / ".notes", mine / "file")
    with folder.replaced(tmp_path / "out") as work:
        (work / "dataset.json").write_text("{}")
    assert (tmp_path / "out" / ".notes").is_symlink()


@pytest.mark.parametrize("name", ["annotations", "train2014"])
def test_what_is_fetched_is_not_put_through_links(name, mine, tmp_path):
    cache = tmp_path / "cache"
    plant(cache / name, mine / "folder")
    client = download.Client()
    with pytest.raises(InputError, match=f"{name}' is a link, and nothing is written through one"):
        if name == "annotations":
            download.fetch_annotations(cache, "http://127.0.0.1:9", client)
        else:
            record = download.Record(1, "1.jpg", cache / name / "1.jpg", ("a dog",), "http://127.0.0.1:9/1.jpg")
            download.fetcher(client, cache, False)([record])
