"""Prepared folders from strangers: their Arrow files are looked through once, in a process that may die of them."""

import json
import os
import random
import re
import resource
import shutil
import time

import pytest
from conftest import contents, run
from pictures import drawing, encoded

from captioning import InputError, foreign
from captioning.data import check, folder
from captioning.data.folder import load_prepared

AGAIN = "run dataloader.py again"


def rows(**changed):
    """The columns of three images, as Arrow has them."""
    import pyarrow

    kinds = {
        "image_id": pyarrow.int64(),
        "file_name": pyarrow.string(),
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
        "captions": pyarrow.list_(pyarrow.string()),
        "labels": pyarrow.list_(pyarrow.list_(pyarrow.int32())),
    }
    values = {
        "image_id": [1, 2, 3],
        "file_name": ["1.jpg", None, "3.jpg"],
        "image": [{"bytes": encoded(drawing()), "path": None}] * 3,
        "captions": [["a dog"], ["a cat", "cats"], ["a bus"]],
        "labels": [[[5, 0]], [[6, 0], [7, 0]], [[8, 0]]],
    }
    for name, value in changed.items():
        if isinstance(value, tuple):
            kinds[name], value = value
        values[name] = value
    return pyarrow.table({name: pyarrow.array(values[name], kinds[name]) for name in kinds if values[name] is not None})


def write(table, path):
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def said(tmp_path, *tables) -> str:
    shards = {f"split{at}": [write(table, tmp_path / f"{at}.arrow")] for at, table in enumerate(tables)}
    return check.examine(shards, "it")


def test_right_rows_pass(tmp_path):
    import pyarrow

    large = pyarrow.large_list(pyarrow.large_list(pyarrow.int64()))
    assert said(tmp_path, rows(), rows(image_id=[4, 5, 6], labels=(large, rows()["labels"].to_pylist()))) == ""
    assert said(tmp_path, rows(file_name=None)) == ""


def wrong():
    import pyarrow

    image = encoded(drawing())
    yield "no ids", {"image_id": None}, "has no column 'image_id'"
    yield "an id that is none", {"image_id": [1, None, 3]}, "has an image without an id"
    yield "an id twice", {"image_id": [1, 2, 1]}, "it holds image id 1 more than once"
    yield "ids in words", {"image_id": (pyarrow.string(), list("abc"))}, r"'image_id' of another kind \(string\)"
    yield "a token that is ignored", {"labels": [[[5]], [[-100]], [[1]]]}, "labels that hold -100, which is no token"
    yield "no labels of an image", {"labels": [[[5]], None, [[1]]]}, "image 2 of the prepared data has no labels"
    yield "empty labels", {"labels": [[[5]], [], [[1]]]}, "image 2 of the prepared data has no labels"
    yield "all empty labels", {"labels": [[], [], []]}, "image 1 of the prepared data has no labels"
    yield "an empty caption", {"labels": [[[5]], [[]], [[1]]]}, "has a caption without tokens"
    yield "a caption of null", {"labels": [[[5]], [None], [[1]]]}, "has a caption without tokens"
    yield "a token of null", {"labels": [[[5]], [[1, None]], [[1]]]}, "a token that is none"
    yield "labels of texts", {"labels": (pyarrow.list_(pyarrow.string()), [["a"]] * 3)}, "'labels' of another kind"
    yield "a text of null", {"captions": [["a"], [None], ["b"]]}, "a caption that is none"
    yield "captions of null", {"captions": [["a"], None, ["b"]]}, "image 2 of the prepared data has no captions"
    yield "captions of numbers", {"captions": (pyarrow.list_(pyarrow.int8()), [[1]] * 3)}, "'captions' of another kind"
    yield "an image of null", {"image": [{"bytes": image}, None, {"bytes": image}]}, r"image 2 .*\(it is empty\)"
    yield "bytes of null", {"image": [{"path": "/x.jpg"}, {"bytes": image}, None]}, r"image 1 .*\(it is empty\)"
    yield "a path", {"image": (pyarrow.string(), ["/x.jpg"] * 3)}, r"'image' of another kind \(string\)"
    yield "a page", {"image": [{"bytes": b"<html>"}] * 3}, "image 1 .*it looks like a web page"
    yield "PostScript", {"image": [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0"}] * 3}, r"image 1 .*\(not a JPEG, PNG"


@pytest.mark.parametrize(("change", "message"), [each[1:] for each in wrong()], ids=[each[0] for each in wrong()])
def test_wrong_rows_are_named(change, message, tmp_path):
    reason = said(tmp_path, rows(**change))
    assert re.search(message, reason) and reason.endswith(AGAIN)


def test_an_image_in_two_splits_is_refused(tmp_path):
    assert "it holds image id 3 more than once" in said(tmp_path, rows(), rows(image_id=[3, 4, 5]))


def test_a_right_folder_is_looked_through_once(few, tmp_path, monkeypatch):
    copy = shutil.copytree(few, tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looked = []
    monkeypatch.setattr(check, "apart", lambda *_, **__: looked.append(1) or "")
    for _ in range(3):
        load_prepared(copy)
    assert looked == [1]
    shard = next((copy / "train").glob("*.arrow"))
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as an archive may set it
    load_prepared(copy)
    assert looked == [1, 1]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()  # nothing can be remembered
    load_prepared(copy)
    load_prepared(copy)
    assert looked == [1] * 4


def crash():
    os.kill(os.getpid(), 11)


def hang():
    time.sleep(60)


def fill():
    return len(bytearray(3_000_000_000))


def fail():
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", [crash, hang, fill, fail])
def test_what_kills_a_process_of_its_own_kills_no_other(work, capfd):
    began = time.monotonic()
    assert foreign.apart(work, seconds=0.5, memory=500_000_000) is None
    assert time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")
    assert foreign.apart(len, "abc", seconds=20, memory=500_000_000) == 3


@pytest.mark.parametrize("number", range(24))
def test_a_byte_flipped_anywhere_ends_in_a_sentence_or_in_data_that_can_be_read(number, few, tmp_path):
    """Where Arrow itself dies of it, too: one that is known to is among these."""
    copy = shutil.copytree(few, tmp_path / "data")
    rng = random.Random(number)
    shard = next((copy / rng.choice(("train", "test"))).glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    # The metadata at the beginning and at the end are what breaks most.
    place = rng.choice((rng.randrange(len(content)), rng.randrange(4000), -1 - rng.randrange(4000)))
    content[place] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    try:
        splits, _ = load_prepared(copy)
    except InputError as error:
        assert AGAIN in str(error) and "\n" not in str(error)
        return
    for split in splits.values():
        split.captions, split.file_name, split.lengths(), split.highest_token()
        for row in range(len(split)):
            split.labels(row)
            try:
                split.image(row)
            except InputError as error:
                assert AGAIN in str(error)


NASTY = [None, True, -1, 0, 10**30, 1.5, "", "\x1b[2J", "\ud800", "a" * 20_000, [], ["tiny"], {}, {"a": {}}, [[]] * 3]
FILES = {
    "dataset.json": ["source", "encoder", "decoder", "images", "max_length", "dropped", "shard", "versions"],
    "dataset_dict.json": ["splits"],
    "train/state.json": ["_data_files", "_fingerprint", "_split", "_format_type", "_format_kwargs"],
    "train/dataset_info.json": ["features", "splits", "citation"],
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in FILES.items() for key in keys])
def test_json_of_wrong_kinds_is_refused_or_harmless(file, key, few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "data")
    right = json.loads((copy / file).read_text())
    for value in NASTY:
        (copy / file).write_text(json.dumps(right | {key: value}))
        try:
            splits, description = load_prepared(copy)
        except InputError as error:
            assert str(error).endswith(AGAIN) and len(str(error)) < 700, error
            assert all(char.isprintable() for char in str(error)), error
        else:
            assert len(splits["train"]) == 24 and str(description["source"]).isprintable()


@pytest.mark.parametrize("content", ["3", "[]", '"x"', "null", "{", "", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}"])
@pytest.mark.parametrize("file", FILES)
def test_json_of_wrong_shapes_is_refused_or_harmless(file, content, few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "data")
    (copy / file).write_text(content)
    try:
        load_prepared(copy)
    except InputError as error:
        assert str(error).endswith(AGAIN) and len(str(error)) < 700, error
    else:
        assert file.endswith("dataset_info.json"), "which is not read"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "gone", "dangling"])
@pytest.mark.parametrize("file", ["dataset.json", "dataset_dict.json", "train/state.json", "train/*.arrow"])
def test_files_that_are_none_are_refused(kind, file, few, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(few, tmp_path / "data")
    path = next(copy.glob(file))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    for words in (["train", f"--output_dir={tmp_path / 'run'}"], ["inference", "--model_path=./none"]):
        assert run(words[0], [f"--data_path={copy}", *words[1:]], monkeypatch) == 2
        error = capsys.readouterr().err
        assert error.count(f"{words[0]}.py: error: ") == 1 and "Traceback" not in error


def test_files_are_read_through_links_and_are_not_written(few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "data")
    for path in list(copy.rglob("*.arrow")):
        path.rename(tmp_path / path.parent.name)
        path.symlink_to(tmp_path / path.parent.name)
    before = contents(tmp_path)
    assert len(load_prepared(copy)[0]["test"]) == 4
    assert contents(tmp_path) == before


def test_names_that_leave_the_folder_are_refused(few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "data")
    state = copy / "train" / "state.json"
    right = json.loads(state.read_text())
    for name in ("../test/data-00000-of-00001.arrow", "/dev/zero", "..", ".", "", "a\0b", "x" * 300, 3, None):
        state.write_text(json.dumps(right | {"_data_files": [{"filename": name}]}))
        with pytest.raises(InputError, match=r"says _data_files .* which is not a list"):
            load_prepared(copy)


def test_a_long_number_of_bytes_is_not_read(tmp_path):
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(10**12)  # it holds nothing, and says to be a terabyte
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="has more than 64,000,000 bytes"):
        foreign.read_json(tmp_path / "long.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_what_the_scripts_write_is_what_is_expected(few):
    foreign.check(json.loads((few / "dataset.json").read_text()), folder.DESCRIBED, "it", needed=folder.NEEDED)


@pytest.mark.parametrize("number", range(12))
def test_a_saved_dataset_of_a_stranger_is_read_or_refused(number, few, tmp_path, monkeypatch, capsys):
    """By dataloader.py --data."""
    copy = shutil.copytree(few, tmp_path / "data")
    (copy / "dataset.json").unlink()
    rng = random.Random(number)
    if number < 3:
        path = copy / "train" / ("state.json", "dataset_info.json")[number % 2]
        path.unlink()
        os.mkfifo(path) if number == 2 else path.write_text('{"a":' * 100_000)
    else:
        shard = next((copy / "train").glob("*.arrow"))
        content = bytearray(shard.read_bytes())
        content[-1 - rng.randrange(4000)] ^= 1 << rng.randrange(8)
        shard.write_bytes(content)
    words = [f"--data={copy}", f"--save_path={tmp_path / 'out'}", "--encoder=tiny", "--decoder=tiny", "--limit_data=0"]
    code = run("dataloader", [*words, "--num_proc=1"], monkeypatch)
    error = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in error
    assert (tmp_path / "out").exists() == (code == 0)
    assert code == 2 or number >= 3
