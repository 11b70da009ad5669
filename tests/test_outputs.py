"""A batch loses no work: captions are on disk as they are made, and the same command goes on, whatever stopped it."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import caller, contents
from datasets import load_from_disk
from forked import Training
from PIL import Image

import dataloader
import inference
from captioning import InputError
from captioning.show import entries, outputs

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
MADE_WITH = {"model": "run", "weights": "0123"}
# What people's file names and models' captions may hold.
NAMES = [
    "a.jpg",
    "b c.jpg",
    'quote".jpg',
    "comma,.jpg",
    "tab\t.jpg",
    "line\nbreak.jpg",
    "кот.jpg",
    "日本.jpg",
    "=1+1.jpg",
]
TEXTS = ["a dog", 'she says "yes"', "one, two", "a\ttab", "", "собака 犬", "\u2028", "'", "the last"]


def opened(file, mode="continue", made_with=MADE_WITH):
    return outputs.Captions(file, made_with, mode, entries.columns(1))


def write(file, names, mode="continue", made_with=MADE_WITH):
    with opened(file, mode, made_with) as captions:
        for name, text in zip(names, TEXTS, strict=False):
            if not captions.has(name):
                captions.write({"path": name, "caption": text})
                captions.flush()


def read(file) -> list[tuple[str, str]]:
    """(path, caption or error) of each entry, by a reader of the standard library."""
    if file.suffix == ".json":
        rows = json.loads(file.read_text())
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.open()]
    else:
        with file.open(newline="") as text:
            rows = list(csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ","))
    return [(row["path"], row.get("caption") or row.get("error") or "") for row in rows]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_form_holds_what_it_was_given_and_goes_on(tmp_path, ending):
    whole, parts = tmp_path / f"whole{ending}", tmp_path / f"parts{ending}"
    write(whole, NAMES)
    for count in (3, 5, len(NAMES)):
        write(parts, NAMES[:count])
    assert read(whole) == list(zip(NAMES, TEXTS, strict=True))
    assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for file in (whole, parts) for name in (file.name, f".{file.name}.made_with")
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_cut_anywhere_goes_on_to_the_same_file(tmp_path, ending):
    """A kill may leave any number of the bytes of the last entry."""
    whole = tmp_path / f"whole{ending}"
    write(whole, NAMES)
    lines = whole if ending != ".json" else tmp_path / "lines"
    if ending == ".json":
        with opened(tmp_path / "other.json") as captions:
            for name, text in zip(NAMES, TEXTS, strict=True):
                captions.write({"path": name, "caption": text})
            shutil.copy(tmp_path / ".other.json.lines", lines)
    data = lines.read_bytes()
    start = len(outputs.Captions(whole, {}, "continue", entries.columns(1)).form.header())
    for end in range(max(start, 1), len(data), 29 if ending == ".json" else 7):
        file = tmp_path / f"cut{ending}"
        write(file, [])
        if ending == ".json":
            (tmp_path / ".cut.json.lines").write_bytes(data[:end])
        else:
            file.write_bytes(data[:end])
        write(file, NAMES)
        assert file.read_bytes() == whole.read_bytes(), end
        file.unlink()


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_something_else_made_is_neither_mixed_nor_destroyed(tmp_path, ending):
    file = tmp_path / f"captions{ending}"
    write(file, NAMES[:3])
    before = file.read_bytes()
    for made_with, message in (
        ({**MADE_WITH, "weights": "4567"}, "was made with weights 0123, and not 4567; add --append"),
        ({**MADE_WITH, "num_beams": 5}, "was made with num_beams unset, and not 5"),
    ):
        with pytest.raises(InputError, match=message):
            write(file, NAMES, made_with=made_with)
    Path(tmp_path, f".captions{ending}.made_with").unlink()
    with pytest.raises(InputError, match="is there, and nothing says what made it; add --append"):
        write(file, NAMES)
    assert file.read_bytes() == before
    write(file, NAMES[:5], "append", {"model": "another"})
    assert read(file) == list(zip(NAMES[:5], TEXTS[:5], strict=True))
    write(file, NAMES[5:6], "overwrite")
    assert read(file) == [(NAMES[5], TEXTS[0])]


def test_files_of_another_form_are_refused(tmp_path):
    for name, content in (
        ("a.json", "{}"),
        ("b.json", "[1]"),
        ("c.json", "not JSON"),
        ("d.jsonl", "[1]\n"),
        ("e.jsonl", '{"image_id": 1}\n'),
        ("f.csv", "image,text\na.jpg,a dog\n"),
        ("g.tsv", "path,caption,error\na.jpg,a dog,\n"),
    ):
        file = tmp_path / name
        file.write_text(content)
        with pytest.raises(InputError, match=r"is no file of captions .*; --overwrite it, or name another file"):
            write(file, NAMES, "append")
        assert file.read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == [name]
        file.unlink()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_persons_last_line_without_an_end_is_kept(tmp_path, ending):
    file = tmp_path / f"captions{ending}"
    write(file, NAMES[:2])
    Path(tmp_path, f".captions{ending}.made_with").unlink()
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    write(file, NAMES[:3], "append")
    assert read(file) == list(zip(NAMES[:3], TEXTS[:3], strict=True))


def test_a_second_process_is_refused(tmp_path):
    with opened(tmp_path / "captions.csv"), pytest.raises(InputError, match="another process writes to"):
        write(tmp_path / "captions.csv", NAMES)


@pytest.mark.parametrize("ending", ENDINGS)
def test_failures_are_kept_with_their_reason_and_tried_again(tmp_path, ending):
    file = tmp_path / f"captions{ending}"
    with opened(file) as captions:
        captions.write({"path": "a.jpg", "error": "no such file"})
        captions.write({"path": "b.jpg", "caption": "a dog"})
    assert read(file) == [("a.jpg", "no such file"), ("b.jpg", "a dog")]
    with opened(file) as captions:
        assert not captions.has("a.jpg") and captions.has("b.jpg")
        captions.write({"path": "a.jpg", "caption": "a cat"})
    assert read(file) == [("b.jpg", "a dog"), ("a.jpg", "a cat")]


def test_a_json_list_can_be_read_at_any_time(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "LIST_EVERY", 0)
    monkeypatch.setattr(outputs, "SHARE", 1e9)
    file = tmp_path / "captions.json"
    with opened(file) as captions:
        assert not file.exists()
        for count, name in enumerate(NAMES, 1):
            captions.write({"path": name, "caption": "a dog"})
            captions.flush()
            assert len(read(file)) == count


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_cuts_no_entry(tmp_path, ending):
    """In a process of its own, where a file has room for 4,000 bytes."""
    file = tmp_path / f"captions{ending}"
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
            with opened(file) as captions:
                for number in range(1000):
                    captions.write({"path": f"{number}.jpg", "caption": "a dog runs"})
                    captions.flush()
        except OSError as error:
            os._exit(7 if error.filename == str(file) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with opened(file) as captions:
        assert 50 < len(captions.done) < 300
        for number in range(300):
            if not captions.has(f"{number}.jpg"):
                captions.write({"path": f"{number}.jpg", "caption": "a dog runs"})
    assert [path for path, _ in read(file)] == [f"{number}.jpg" for number in range(300)]


def test_half_of_a_character_is_written_in_every_form(tmp_path):
    for ending in ENDINGS:
        file = tmp_path / f"captions{ending}"
        with opened(file) as captions:
            captions.write({"path": "a.jpg", "caption": "half \ud83d"})
        assert read(file) == [("a.jpg", "half ?" if ending in (".csv", ".tsv") else "half \ud83d")]


def test_alternatives_have_columns_of_their_own(tmp_path):
    file = tmp_path / "captions.csv"
    best = [{"caption": "a dog", "score": -0.5}, {"caption": "a cat", "score": -0.7}]
    with outputs.Captions(file, MADE_WITH, "continue", entries.columns(3)) as captions:
        captions.write({"path": "a.jpg", **best[0], "alternatives": best})
    assert file.read_text() == "path,caption,score,alternative_2,alternative_3,error\na.jpg,a dog,-0.5,a cat,,\n"


# ---- inference.py


def draw(folder, count, start=0) -> None:
    rng = np.random.default_rng(start)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number:05d}.jpg")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    draw(folder, 6)
    return folder


@pytest.fixture
def run(untrained, capsys):
    return caller(untrained, capsys)


def plain(run, *arguments) -> list[tuple[str, ...]]:
    return [tuple(line.split("\t")) for line in run(*arguments)[1].splitlines()]


def test_the_same_command_goes_on_and_a_wrong_one_is_refused(run, photos, tmp_path):
    file = tmp_path / "captions.csv"
    first = run("--image_path", photos / "00000.jpg", photos / "00001.jpg", "--output", file)
    assert first[0] == 0 and "2 captions written to" in first[2]
    code, out, err = run("--image_path", photos, "--output", file)
    assert (code, out) == (0, "")
    assert "2 of 6 images are in" in err and "4 captions written to" in err
    assert dict(read(file)) == {
        str(photos / f"{number:05d}.jpg"): dict(read(file))[str(photos / f"{number:05d}.jpg")] for number in range(6)
    }
    assert len(read(file)) == 6
    before = file.read_bytes()
    assert "6 of 6 images are in" in run("--image_path", photos, "--output", file)[2]
    with pytest.raises(InputError, match="was made with num_beams unset, and not 1; add --append"):
        run("--image_path", photos, "--output", file, "--num_beams", 1)
    assert file.read_bytes() == before
    assert "6 captions written" in run("--image_path", photos, "--output", file, "--num_beams=1", "--overwrite")[2]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_model_that_cannot_be_loaded_costs_no_file(untrained, photos, tmp_path, ending, monkeypatch, capsys):
    """The refusal leaves a new file unmade, and one that is to be overwritten as it was."""
    damaged, there = tmp_path / "damaged", tmp_path / f"there{ending}"
    shutil.copytree(untrained, damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    there.write_text("a person's own work")
    for model in ("no-such-model", tmp_path / "no-such-model", damaged):
        for file in (tmp_path / f"new{ending}", there):
            arguments = ["--image_path", photos, "--output", file, "--overwrite", "--model_path", model]
            assert conftest.run("inference", arguments, monkeypatch) == 2
            assert str(model) in capsys.readouterr().err
            assert not (tmp_path / f"new{ending}").exists() and there.read_text() == "a person's own work"


def test_what_fails_is_listed_and_in_the_file(run, photos, tmp_path):
    (photos / "bad.jpg").write_text("text")
    file = tmp_path / "captions.jsonl"
    code, _, err = run("--image_path", photos, photos / "gone.jpg", "--output", file)
    assert code == 1 and "2 of 8 images could not be captioned:" in err
    failed = [row for row in map(json.loads, file.open()) if "error" in row]
    assert {Path(row["path"]).name for row in failed} == {"bad.jpg", "gone.jpg"}
    assert all(row["error"] in err for row in failed)
    Image.new("RGB", (8, 8)).save(photos / "bad.jpg")
    code, _, err = run("--image_path", photos, "--output", file)
    assert code == 0 and "6 of 7 images are in" in err
    assert len(read(file)) == 7 and '"error"' not in file.read_text()


def test_a_text_beside_each_image(run, photos):
    captions = {Path(path).stem: text for path, text in plain(run, "--image_path", photos)}
    (photos / "00003.txt").write_text("written by a person\n")
    (photos / "00000.png").write_bytes((photos / "00000.jpg").read_bytes())
    code, out, err = run("--image_path", photos, "--sidecar", ".txt")
    assert (code, out) == (0, "")
    assert "1 of 7 images are in the texts beside the images already" in err
    assert (photos / "00003.txt").read_text() == "written by a person\n"
    assert (photos / "00001.txt").read_text() == captions["00001"] + "\n"
    assert (photos / "00000.jpg.txt").read_text() == (photos / "00000.png.txt").read_text() == captions["00000"] + "\n"
    before = contents(photos)
    assert "7 of 7 images" in run("--image_path", photos, "--sidecar", ".txt")[2]
    assert contents(photos) == before
    run("--image_path", photos, "--sidecar", ".txt", "--overwrite")
    assert (photos / "00003.txt").read_text() == captions["00003"] + "\n"
    # The texts are no lists of images, also where a shell names everything in the folder.
    assert len(plain(run, "--image_path", *sorted(photos.iterdir()))) == 7


def test_metadata_makes_an_image_folder_that_dataloader_reads_back(run, photos, tmp_path):
    draw(photos / "deep", 4, 10)
    captions = {os.path.relpath(path, photos): text for path, text in plain(run, "--image_path", photos)}
    code, out, _ = run("--image_path", photos, "--metadata")
    assert (code, out) == (0, "")
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").open()]
    assert {row["file_name"]: row["text"] for row in rows} == captions
    target = tmp_path / "processed"
    flags = ["--encoder=tiny", "--decoder=tiny", "--limit_data=0", "--num_proc=1"]
    assert dataloader.main([f"--data={photos}", f"--save_path={target}", *flags]) == 0
    read_back = {
        name: own
        for split in load_from_disk(str(target)).values()
        for name, own in zip(split["file_name"], split["captions"], strict=True)
    }
    assert read_back == {name: [text] for name, text in captions.items()}
    (photos / ".metadata.jsonl.made_with").unlink()
    with pytest.raises(InputError, match="nothing says what made it"):
        run("--image_path", photos, "--metadata")


def test_several_places_at_once_and_one_that_lacks_some(run, photos, tmp_path):
    file = tmp_path / "captions.tsv"
    run("--image_path", photos / "00000.jpg", "--output", file)
    code, _, err = run("--image_path", photos, "--output", file, "--sidecar=.caption", "--metadata")
    assert code == 0 and "already" not in err
    texts = {path.stem: path.read_text().strip() for path in photos.glob("*.caption")}
    assert texts == {Path(path).stem: text for path, text in read(file)} and len(texts) == 6


def test_shards_write_files_of_their_own_that_join_to_the_whole(run, photos, tmp_path):
    whole = tmp_path / "whole.jsonl"
    run("--image_path", photos, "--output", whole)
    for number in (1, 2, 3, 4):
        run("--image_path", photos, "--output", tmp_path / "captions.jsonl", "--shard", f"{number}/4")
    shards = sorted(tmp_path.glob("captions.*-of-4.jsonl"))
    joined = [line for shard in shards for line in shard.open()]
    assert len(shards) == 4 and sorted(joined) == sorted(whole.open())


def test_a_part_of_no_images_is_an_empty_file_and_no_error(run, photos, tmp_path):
    file = tmp_path / "captions.json"
    code, out, err = run("--image_path", photos / "00000.jpg", "--output", file, "--shard", "2/2")
    assert (code, out) == (0, "") and "part 2/2 is empty: there are 1 images" in err
    assert read(tmp_path / "captions.2-of-2.json") == []
    assert run("--image_path", photos / "00000.jpg", "--shard", "2/2")[0] == 0
    (photos / "00000.txt").write_text("written by a person")
    with pytest.raises(InputError, match=r"--image_path .*00000\.txt names no image; name a file or a folder"):
        run("--image_path", photos / "00000.txt")


def test_parts_give_texts_the_names_that_the_whole_gives_them(run, photos):
    (photos / "00000.png").write_bytes((photos / "00000.jpg").read_bytes())
    for number in range(1, 8):
        assert run("--image_path", photos, "--sidecar=.txt", "--shard", f"{number}/7")[0] == 0
    assert sorted(path.name for path in photos.glob("*.txt")) == [
        "00000.jpg.txt",
        "00000.png.txt",
        *(f"{number:05d}.txt" for number in range(1, 6)),
    ]


def test_archives_lists_and_folders_without_those_inside(run, photos, tmp_path, monkeypatch):
    expected = [text for _, text in plain(run, "--image_path", photos)]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.iterdir():
            archive.write(path, f"in/{path.name}")
    found = plain(run, "--image_path", tmp_path / "photos.zip")
    assert [text for _, text in found] == expected
    assert found[0][0] == f"{tmp_path}/photos.zip/in/00000.jpg"
    draw(photos / "deep", 2, 50)
    assert len(plain(run, "--image_path", photos, "--no-recursive")) == 6
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(f"{photos / '00001.jpg'}\n{photos / '00000.jpg'}\n".encode()))
    )
    assert [text for _, text in plain(run, "-")] == expected[1::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=captions.txt"], "ends in none of .json, .jsonl, .csv, .tsv"),
        (["--output=captions"], "ends in none of"),
        (["--sidecar=.doc"], "invalid choice: '.doc'"),
        (["--append"], "--append is for --output and --metadata"),
        (["--overwrite"], "--overwrite needs --output"),
        (["--output=x.csv", "--append", "--overwrite"], "give one of them"),
        (["--output=x.csv", "--json"], "no cells"),
        (["--metadata"], "--metadata describes one folder"),
        (["--shard=0/4"], "--shard 0/4 is not a part such as 1/4"),
        (["--shard=5/4"], "is not a part such as 1/4"),
    ],
)
def test_flags_that_cannot_be(arguments, message, untrained, capsys):
    with pytest.raises(SystemExit) as stopped:
        inference.main([f"--model_path={untrained}", "--image_path=x.jpg", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_places_where_no_text_can_lie(run, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "00000.jpg", "a.jpg")
    with pytest.raises(InputError, match="is in an archive; use --output"):
        run("--image_path", tmp_path / "photos.zip", "--sidecar=.txt")
    with pytest.raises(InputError, match="is in an address; use --output"):
        run("--image_path", "https://example.com/a.jpg", "--sidecar=.txt")


# ---- kills, full disks, Ctrl-C


class Fault:
    """Called in a process first: it hears Ctrl-C, also where tests run in the background; its files have some room."""

    def __init__(self, room: int | None):
        self.room = room

    def __call__(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.RLIM_INFINITY))


def peak_memory(process: int) -> int:
    """Bytes that a process had in memory at most; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def batch_through_faults(untrained: Path, photos: Path, file: Path, batch_size: int) -> list[str]:
    """A batch that is killed twice, meets a full disk, is stopped by Ctrl-C, and then goes to its end.

    Returns:
        What each of the five processes did, with its peak memory.
    """
    names = sorted(map(str, photos.iterdir()))
    lines = file if file.suffix != ".json" else file.with_name(f".{file.name}.lines")
    flags = [f"--model_path={untrained}", "--device=cpu", f"--image_path={photos}", f"--output={file}"]

    def made() -> int:
        return lines.read_bytes().count(b".jpg") if lines.exists() else 0

    told = []
    for number, fault in enumerate(("kill -9", "kill -9", "full disk", "Ctrl-C", "none"), 1):
        before, peak = made(), 0
        goal = len(names) * number // 5
        room = lines.stat().st_size * 3 // 2 if fault == "full disk" else None
        log = file.with_name(f"{number}.log")
        batch = Training([*flags, f"--batch_size={batch_size}"], log, Fault(room), script="inference")
        while batch.process.is_alive():
            peak = max(peak, peak_memory(batch.process.pid))
            if fault in ("kill -9", "Ctrl-C") and made() >= goal:
                batch.send(signal.SIGKILL if fault == "kill -9" else signal.SIGINT)
                break
            time.sleep(0.005)
        code = batch.wait(600)
        assert code == {"kill -9": -9, "full disk": 2, "Ctrl-C": 130, "none": 0}[fault], batch.said()
        said = {"full disk": "the disk is full; make room", "Ctrl-C": "the same command goes on from there"}.get(
            fault, ""
        )
        assert said in batch.said()
        if fault == "none":
            assert [path for path, _ in sorted(read(file))] == names, "none lost, none twice"
            made_in_all = len(names)
        else:
            made_in_all = made()
            assert before < made_in_all < len(names)
            read(file) if file.suffix == ".json" else None  # valid, whatever happened
        told.append(f"{fault}: {made_in_all - before:,} captions, peak memory {peak / 1e6:.0f} MB")
    return told


@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_no_caption_is_lost_or_made_twice(untrained, tmp_path, ending):
    draw(tmp_path / "photos", 50)
    told = batch_through_faults(untrained, tmp_path / "photos", tmp_path / f"captions{ending}", 2)
    assert len(told) == 5


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_ten_thousand_images_with_two_kills_a_full_disk_and_ctrl_c(untrained, tmp_path, ending):
    draw(tmp_path / "photos", 10_000)
    told = batch_through_faults(untrained, tmp_path / "photos", tmp_path / f"captions{ending}", 64)
    print("\n".join([ending, *told]))
    peaks = [float(line.split()[-2]) for line in told]
    assert max(peaks) < 1.15 * min(peaks), "memory does not grow with the captions"
