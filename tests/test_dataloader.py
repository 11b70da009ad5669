"""Stage 1: exactly N RGB images, split by image, tokenised with one end token each, written whole."""

import filecmp
import io
import json
import os
import zipfile
from collections import Counter

import pytest
from coco import coco_folder, photographs, write
from conftest import script
from datasets import load_from_disk
from httpserver import Server, body
from PIL import Image

import dataloader
from captioning import InputError
from captioning.data import annotations, choose, folder
from captioning.model.parts import load_tokenizer
from captioning.show import pages


@pytest.fixture(scope="module")
def coco_dir(tmp_path_factory):
    """30 train2014 and 20 val2014 images; 4 and 3 of them not RGB, 1 missing, 1 broken, 1 without captions."""
    root = tmp_path_factory.mktemp("coco")
    captions = ["A small dog runs.", "a dog   is running\n", "Dog"]
    train = dict.fromkeys(range(1, 31), captions) | {30: ["  "]}
    coco_folder(root, train, dict.fromkeys(range(101, 121), captions))
    train_names = [f"COCO_train2014_{i:012d}.jpg" for i in range(1, 31)]
    val_names = [f"COCO_val2014_{i:012d}.jpg" for i in range(101, 121)]
    photographs(root / "train2014", train_names)
    photographs(root / "val2014", val_names)
    photographs(root / "train2014", train_names[:3], "L")
    photographs(root / "train2014", train_names[3:4], "CMYK")
    photographs(root / "val2014", val_names[:3], "L")
    (root / "train2014" / train_names[5]).unlink()
    broken = root / "train2014" / train_names[6]
    broken.write_bytes(broken.read_bytes()[:400])
    return root


def prepare(coco_dir, save_path, *arguments):
    code = dataloader.main(
        [
            f"--coco_dir={coco_dir}",
            f"--save_path={save_path}",
            "--encoder=tiny",
            "--decoder=tiny",
            "--num_proc=1",
            *map(str, arguments),
        ]
    )
    assert code == 0
    return load_from_disk(str(save_path)), json.loads((save_path / "dataset.json").read_text())


def ids(splits):
    return {name: rows["image_id"] for name, rows in splits.items()}


def test_exactly_n_images_split_by_image(coco_dir, tmp_path):
    splits, _ = prepare(coco_dir, tmp_path / "out", "--limit_data", 20, "--val_share", 0.2, "--test_share", 0.1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 14, "validation": 4, "test": 2}
    every = [i for values in ids(splits).values() for i in values]
    assert len(set(every)) == 20
    assert all(i < 100 for i in splits["train"]["image_id"])
    assert all(i > 100 for name in ("validation", "test") for i in splits[name]["image_id"])


def test_train_is_filled_from_val2014_where_train2014_is_short(coco_dir, tmp_path):
    splits, description = prepare(coco_dir, tmp_path / "out", "--limit_data", 38)
    # 23 usable images in train2014: the other 7 come from val2014.
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "validation": 4, "test": 4}
    assert sum(i > 100 for i in splits["train"]["image_id"]) == 7
    assert len({i for values in ids(splits).values() for i in values}) == 38
    assert description["dropped"]["mode CMYK"] == 1


def test_all_there_are_is_said_and_drops_are_counted_by_reason(coco_dir, tmp_path, capsys):
    splits, description = prepare(coco_dir, tmp_path / "out", "--limit_data", 2000)
    assert sum(map(len, splits.values())) == 40
    assert description["dropped"] == {
        "mode CMYK": 1,
        "mode L": 6,
        "missing": 1,
        "no caption": 1,
        "unreadable": 1,
    }
    out = capsys.readouterr().out
    assert "40 images: all there are (2,000 were asked for)" in out
    assert "6 mode L" in out


def test_the_preview_shows_what_was_kept_and_what_was_dropped_and_why(coco_dir, tmp_path, monkeypatch):
    drawn = []
    real = pages.draw_contact_sheet
    monkeypatch.setattr(pages, "draw_contact_sheet", lambda *arguments: (drawn.append(arguments), real(*arguments)))
    prepare(coco_dir, tmp_path / "data", "--limit_data=0", "--preview", tmp_path / "preview.png")
    kept, dropped, path, counts, *_ = drawn[0]
    splits = load_from_disk(str(tmp_path / "data"))
    assert len(kept) == 3 * 5 and {item["title"].split(",")[0] for item in kept} == {"train", "validation", "test"}
    assert kept[0]["caption"] == splits["train"][0]["captions"][0]
    assert counts == (sum(map(len, splits.values())), 10)
    reasons = Counter(item["reason"] for item in dropped)
    assert reasons == {"mode L": 5, "mode CMYK": 1, "missing": 1, "unreadable": 1, "no caption": 1}  # 5 of 6 grey ones
    assert {item["reason"] for item in dropped if item["image"] is None} == {"missing", "unreadable"}
    with Image.open(path) as sheet:
        assert sheet.width == pytest.approx(1040, abs=6)


def test_columns_follow_the_contract(coco_dir, tmp_path):
    splits, _ = prepare(coco_dir, tmp_path / "out", "--limit_data", 10)
    rows = splits["train"]
    types = {name: str(feature) for name, feature in rows.features.items()}
    assert list(types) == ["image_id", "file_name", "image", "captions", "labels"]
    row = rows[0]
    assert row["captions"] == ["A small dog runs.", "a dog   is running\n", "Dog"]
    # Stored for a random crop of what the tiny encoder sees (64 px), aspect kept.
    assert (row["image"].mode, row["image"].size) == ("RGB", (88, 73))
    tokenizer = load_tokenizer(tmp_path / "out")
    for labels, text in zip(row["labels"], ["a small dog runs.", "a dog is running", "dog"], strict=True):
        assert labels[-1] == tokenizer.eos_token_id
        assert Counter(labels)[tokenizer.eos_token_id] == 1
        assert tokenizer.decode(labels[:-1]).strip() == text


def test_long_captions_are_truncated_and_still_end(coco_dir, tmp_path):
    splits, description = prepare(coco_dir, tmp_path / "out", "--limit_data", 10, "--max_length", 3)
    eos = load_tokenizer(tmp_path / "out").eos_token_id
    lengths = Counter(len(labels) for row in splits["train"]["labels"] for labels in row)
    assert max(lengths) == 3
    assert all(labels[-1] == eos for row in splits["train"]["labels"] for labels in row)
    assert description["captions_truncated"] == 20  # two of three captions of each image are longer


def test_the_same_arguments_give_the_same_bytes_whatever_num_proc(coco_dir, tmp_path):
    for name, processes in (("a", 1), ("b", 2)):
        prepare(coco_dir, tmp_path / name, "--limit_data", 30, "--num_proc", processes)
    compared = filecmp.dircmp(tmp_path / "a", tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert not compared.left_only and not compared.right_only
    _, different, errors = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert (different, errors) == ([], [])
    assert len(files) > 9


def test_another_seed_chooses_other_images(coco_dir, tmp_path):
    first, _ = prepare(coco_dir, tmp_path / "a", "--limit_data", 20, "--seed", 1)
    second, _ = prepare(coco_dir, tmp_path / "b", "--limit_data", 20, "--seed", 2)
    assert set(first["train"]["image_id"]) != set(second["train"]["image_id"])


def test_karpathy_splits_stay_apart_and_are_whole_without_a_limit(tmp_path):
    images = [
        {"filename": f"{i}.jpg", "imgid": i, "split": split, "sentences": [{"raw": f"picture {i}"}]}
        for i, split in enumerate(["train"] * 12 + ["restval"] * 4 + ["val"] * 5 + ["test"] * 6)
    ]
    write(tmp_path / "dataset.json", {"images": images})
    photographs(tmp_path / "images", [image["filename"] for image in images])
    for limit, expected in ((0, (16, 5, 6)), (10, (8, 1, 1)), (26, (16, 4, 6))):
        save_path = tmp_path / f"out{limit}"
        dataloader.main(
            [
                f"--karpathy_json={tmp_path / 'dataset.json'}",
                f"--image_dir={tmp_path / 'images'}",
                f"--save_path={save_path}",
                f"--limit_data={limit}",
                "--encoder=tiny",
                "--decoder=tiny",
                "--num_proc=1",
            ]
        )
        splits = load_from_disk(str(save_path))
        assert tuple(len(splits[name]) for name in ("train", "validation", "test")) == expected
        assert all(i < 16 for i in splits["train"]["image_id"])
        assert all(i >= 21 for i in splits["test"]["image_id"])


def test_a_folder_of_other_things_is_never_replaced(coco_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\)"):
        prepare(coco_dir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_running_again_replaces_the_folder_and_keeps_hidden_files(coco_dir, tmp_path):
    save_path = tmp_path / "out"
    prepare(coco_dir, save_path, "--limit_data", 20)
    (save_path / ".gitkeep").touch()
    splits, _ = prepare(coco_dir, save_path, "--limit_data", 10)
    assert sum(map(len, splits.values())) == 10
    assert (save_path / ".gitkeep").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(coco_dir, tmp_path, monkeypatch):
    save_path = tmp_path / "out"
    prepare(coco_dir, save_path, "--limit_data", 10)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(folder, "tokenise", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(coco_dir, save_path, "--limit_data", 20)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sum(map(len, load_from_disk(str(save_path)).values())) == 10


def test_a_preview_that_cannot_be_written_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        dataloader.main(["--preview=/no/such/folder/x.png"])
    assert stopped.value.code == 2
    assert "--preview '/no/such/folder/x.png' is a folder, or lies in none" in capsys.readouterr().err


def die(record, short_side):
    os._exit(1)


def test_a_killed_process_ends_the_run_in_one_sentence(coco_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "prepare_image", die)
    with pytest.raises(InputError, match="one of --num_proc 2 processes was killed"):
        prepare(coco_dir, tmp_path / "out", "--num_proc", 2)
    assert list(tmp_path.iterdir()) == []


def test_the_sample_as_a_user_prepares_it(prepared):
    splits = load_from_disk(str(prepared))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1800, "validation": 80, "test": 120}
    assert all(len(captions) == len(set(captions)) == 5 for captions in splits["train"]["captions"])
    summary = (prepared.parent / "stdout.txt").read_text()
    for expected in ("1,800 images", "9,000 captions", "12 mode L", "kB per image", "example: COCO_train2014_"):
        assert expected in summary
    assert len(list((prepared / "sample" / "test2014").glob("*.jpg"))) == 8


def test_the_sample_keeps_combinations_for_the_test_split(prepared):
    images = json.loads((prepared / "sample" / "dataset_coco.json").read_text())["images"]
    combinations = {
        split: [i["combination"] for i in images if i["split"] == split] for split in ("train", "val", "test")
    }
    train = set(combinations["train"])
    words = {word for combination in train for word in combination.split()}
    unseen = [combination for combination in combinations["test"][::2] if combination not in train]
    assert len(unseen) == 60, "every other scene of the test split"
    assert {word for combination in unseen for word in combination.split()} <= words, "made of parts that train shows"


def test_without_a_network_one_sentence_says_what_to_do(tmp_path):
    # A port that nobody listens on stands for a machine without a network.
    done = script(
        "dataloader.py",
        f"--save_path={tmp_path / 'out'}",
        f"--cache_dir={tmp_path}",
        "--coco_url=http://127.0.0.1:9",
    )
    assert done.returncode == 1, "running again may help"
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--coco_dir" in done.stderr and "--sample" in done.stderr
    assert not (tmp_path / "out").exists()


def test_coco_is_fetched_image_by_image_and_kept_for_later_runs(coco_dir, tmp_path):
    """From a real server on this machine, laid out as COCO's: the captions as a zip, images one by one."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for part in ("train2014", "val2014"):
            name = f"annotations/captions_{part}.json"
            members.write(coco_dir / name, name)
    routes = {"/annotations/annotations_trainval2014.zip": body(archive.getvalue())}
    for path in coco_dir.glob("*2014/*.jpg"):
        routes[f"/{path.parent.name}/{path.name}"] = body(path.read_bytes())
    with Server(routes) as server:
        arguments = [
            f"--coco_url={server.url('')}",
            f"--cache_dir={tmp_path / 'cache'}",
            "--encoder=tiny",
            "--decoder=tiny",
            "--num_proc=1",
        ]
        dataloader.main([*arguments, f"--save_path={tmp_path / 'fetched'}", "--limit_data=10"])
        fetched = [request.path for request in server.requests if request.path.endswith(".jpg")]
        assert 10 <= len(fetched) == len(set(fetched)) < 20, "what was chosen, and replacements for what was dropped"
        seen = len(server.requests)
        dataloader.main([*arguments, f"--save_path={tmp_path / 'again'}", "--limit_data=10"])
        assert len(server.requests) == seen, "the second run is served from the cache"
    same, _ = prepare(coco_dir, tmp_path / "local", "--limit_data", 10)
    for name in ("fetched", "again"):
        assert ids(load_from_disk(str(tmp_path / name))) == ids(same)
        assert load_from_disk(str(tmp_path / name))["train"][0]["image"] == same["train"][0]["image"]


def test_two_thousand_real_images_take_under_60_mb(shared, tmp_path):
    """Measured on the full-size photographs, the largest ones; most of the shared images came smaller."""
    pools = annotations.read_coco(shared / "coco2014")
    sizes = []
    for record in pools["train2014"] + pools["val2014"]:
        with Image.open(record.path) as image:
            if min(image.size) < 400 or image.mode != "RGB":
                continue
        sizes.append(len(choose.prepare_image(record, 256).data))
    assert len(sizes) > 100
    tokenizer_and_tables = 4_000_000
    assert 2000 * sum(sizes) / len(sizes) + tokenizer_and_tables < 60_000_000
