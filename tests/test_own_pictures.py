"""`--data PATH`: every form of one set of images gives the same rows; what is not known is refused in one sentence."""

import io
import tarfile
import unicodedata
from collections import Counter

import own
import pytest
from conftest import run
from datasets import Image, load_from_disk
from httpserver import Server, body

import dataloader
from captioning import InputError
from captioning.data.recognise import recognise
from captioning.data.tables import Wanted

PICTURES = own.draw()
TINY = ["--encoder=tiny", "--decoder=tiny", "--num_proc=1", "--limit_data=0"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The rows of the Karpathy form, by file name."""
    folder = tmp_path_factory.mktemp("expected")
    return prepared(folder, own.FORMS["karpathy"](folder, PICTURES))


def prepared(folder, *arguments):
    """file name -> (split, image id, captions, image bytes) of what dataloader.py makes."""
    words = [f"--data={argument}" if not str(argument).startswith("--") else argument for argument in arguments]
    assert dataloader.main([*words, *TINY, f"--save_path={folder / 'out'}"]) == 0
    found = {}
    for split, rows in load_from_disk(str(folder / "out")).items():
        for row in rows.with_format(None).cast_column("image", Image(decode=False)):
            found[row["file_name"]] = (split, row["image_id"], row["captions"], row["image"]["bytes"])
    return found


@pytest.mark.parametrize("name", own.FORMS)
def test_the_same_images_give_the_same_rows_in_every_form(name, tmp_path, expected):
    found = prepared(tmp_path, own.FORMS[name](tmp_path, PICTURES))
    by_name = {file_name.rsplit("/", 1)[-1]: row for file_name, row in found.items()}
    assert len(by_name) == len(found) == len(PICTURES)
    assert {n: row[1:] for n, row in by_name.items()} == {n: row[1:] for n, row in expected.items()}
    if name in own.WITH_SPLITS:
        assert {n: row[0] for n, row in by_name.items()} == {n: row[0] for n, row in expected.items()}
    else:
        assert Counter(row[0] for row in by_name.values()) == {"train": 48, "validation": 6, "test": 6}


# Odd tables, and what is read of each image


def table(name, line, header="", encoding="utf-8"):
    """A table with a line for each image, which lies beside it."""

    def make(folder):
        own.images(folder, PICTURES[:6])
        text = header + "".join(line.format(name=p.name, stem=p.name[:-4], n=p.number) for p in PICTURES[:6])
        (folder / name).write_bytes(text.encode(encoding))
        return folder

    return make


def listed(entry):
    """A JSON list with an object for each image."""

    def make(folder):
        own.images(folder, PICTURES[:6])
        own.as_json(folder / "data.json", [entry(p) for p in PICTURES[:6]])
        return folder

    return make


def by_key(content):
    """A JSON object, from the images by number."""

    def make(folder):
        own.images(folder / "images", PICTURES[:6])
        own.as_json(folder / "data.json", content(PICTURES[:6]))
        return folder

    return make


def conversation(p):
    said = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a dog"}]
    return {"id": p.number, "image": p.name, "conversations": said}


def texts_in_another_case(folder):
    own.images(folder, PICTURES[:6])
    for p in PICTURES[:6]:
        (folder / p.name).rename(folder / f"{p.name[:-4].title()}.JPG")
        (folder / f"{p.name[:-4]}.TXT").write_text("a dog\n\n")
    return folder


ODD = {
    "texts in another case": (texts_in_another_case, ["a dog"]),
    "an object by stems": (
        by_key(lambda own: {p.name[:-4]: ["a dog", "two dogs"] for p in own}),
        ["a dog", "two dogs"],
    ),
    "an object of splits": (
        by_key(
            lambda own: {
                "train": [{"image": p.name, "caption": "a dog"} for p in own[:5]],
                "val": [{"image": p.name, "caption": "a dog"} for p in own[5:]],
            }
        ),
        ["a dog"],
    ),
    "conversations": (listed(conversation), ["a dog"]),
    "splits with a year": (
        table("x.csv", "{name},a dog,train2014\n", "image,caption,split\n"),
        ["a dog"],
    ),
    "commas in the middle": (
        table("x.csv", "{name},a dog, running,train\n", "image,caption,split\n"),
        ["a dog, running"],
    ),
    "a line for Excel": (table("x.csv", "{name};a dog\n", "sep=;\nimage;caption\n"), ["a dog"]),
    "names in Chinese": (table("x.csv", "{name},一只狗在跑\n", "图片,描述\n"), ["一只狗在跑"]),
    "captions first": (table("x.tsv", "a dog, running\t{name}\n"), ["a dog, running"]),
    "names without an ending": (table("x.csv", "{stem},a dog\n", "id,caption\n"), ["a dog"]),
    "a quote that opens a line": (table("x.token", '{name}#0\t"Sit" said the man\n'), ['"Sit" said the man']),
    "one bare quote": (table("x.token", '{name}#0\t"Sit, a man says\n'), ['"Sit, a man says']),
    "quoted commas after a space": (table("x.csv", '{name}, "a dog, running"\n'), ["a dog, running"]),
    "a list of Python": (table("x.csv", "{name};['a dog', 'a cat']\n", "image;raw\n"), ["a dog", "a cat"]),
    "words": (listed(lambda p: {"filename": p.name, "tokens": ["a", "dog"]}), ["a dog"]),
    "lists of words": (listed(lambda p: {"filename": p.name, "sentences": [["a", "dog"], ["dog"]]}), ["a dog", "dog"]),
    "sentences of words": (listed(lambda p: {"filename": p.name, "sentences": [{"tokens": ["a", "dog"]}]}), ["a dog"]),
    "addresses": (table("x.csv", "http://127.0.0.1:9/{name}?w=1,a dog\n", "url,caption\n"), ["a dog"]),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tables_are_read(kind, tmp_path):
    make, captions = ODD[kind]
    found = recognise(str(make(tmp_path)), Wanted(), tmp_path, tmp_path)
    records = [record for pool in found.pools.values() for record in pool]
    assert len(records) == 6 and {record.captions for record in records} == {tuple(captions)}
    if kind == "addresses":
        assert {record.url for record in records} == {f"http://127.0.0.1:9/{p.name}?w=1" for p in PICTURES[:6]}
        assert records[0].file_name == "scene_000.jpg"
    else:
        assert all(record.is_there() for record in records)


def only_images(folder):
    own.images(folder, PICTURES[:3])
    return folder


def a_sheet(folder):
    (folder / "captions.xlsx").write_text("x")
    return only_images(folder)


def two_tables(folder):
    for name in ("a", "b"):
        own.rows(folder / f"{name}.csv", ["image", "caption"], own.a_row_each(PICTURES[:3]))
    return only_images(folder)


A_DOG = table("x.csv", "{name},a dog\n", "image,caption\n")
REFUSED = {
    "a header alone": (table("x.csv", "", "image,caption\n"), {}, "give 'x.csv' the columns file_name and caption"),
    "nothing": (lambda folder: folder, {}, "found nothing.*put images there"),
    "images alone": (only_images, {}, r"found 3 \.jpg\); write the captions of 'scene_000\.jpg' to 'scene_000\.txt'"),
    "a sheet": (a_sheet, {}, r"found 3 \.jpg, 1 \.xlsx\); save 'captions\.xlsx' as CSV"),
    "no such path": (lambda folder: "no/such/thing", {}, "--data 'no/such/thing' does not exist"),
    "two tables": (two_tables, {}, "several tables .*name one of them, or all"),
    "another column": (A_DOG, {"caption_column": "words"}, "--caption_column 'words' .*it has image, caption"),
    "a split of no name": (
        table("x.csv", "{name},a dog,holiday\n", "image,caption,split\n"),
        {},
        "the split 'holiday' in row 1 .* is none of train, val and test",
    ),
    "another encoding": (table("x.csv", "{name},собака\n", "image,caption\n", "cp1251"), {}, "is not text in UTF-8"),
    "a quote left open": (
        table("x.csv", '{name},"a dog\n', "image,caption\n"),
        {},
        r"a quote that is opened before line \d+ .*is never closed",
    ),
    "a tar that is none": (lambda folder: (folder / "x.tar").write_text("x" * 2000) and folder, {}, "is not a tar"),
    "a folder of no images": (A_DOG, {"image_dir": own.Path("nowhere")}, "--image_dir 'nowhere' is not a folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_refused_in_one_sentence(kind, tmp_path):
    make, wanted, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        recognise(str(make(tmp_path)), Wanted(**wanted), tmp_path, tmp_path / "spool")
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_columns_can_be_named(tmp_path):
    own.images(tmp_path, PICTURES[:6])
    lines = [[f"thumb_{p.name}", p.name, "the same", "a dog", "val" if p.number < 2 else "train"] for p in PICTURES[:6]]
    own.rows(tmp_path / "x.csv", ["image", "original", "caption", "what", "when"], lines)
    found = recognise(str(tmp_path), Wanted("original", "what", "when"), tmp_path, tmp_path)
    assert {split: len(pool) for split, pool in found.pools.items()} == {"train": 4, "validation": 2}
    assert found.pools["train"][0].captions == ("a dog",) and found.pools["train"][0].is_there()


@pytest.mark.parametrize("name", ["Café.jpg", "Cafe\u0301.jpg", "КОШКА Й.JPG", "a b.jpeg", "Photo.JPG", "pic.JFIF"])
def test_names_are_found_in_another_case_and_unicode_form(name, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / name).write_bytes(PICTURES[0].data)
    for written in (name, name.lower(), name.upper(), unicodedata.normalize("NFD", name), f"gone\\{name}"):
        (tmp_path / "x.csv").write_text(f"image,caption\n{written},a dog\n", encoding="utf-8")
        (record,) = recognise(str(tmp_path / "x.csv"), Wanted(), tmp_path, tmp_path).pools[""]
        assert record.is_there(), written


def test_one_name_in_two_folders_is_the_one_that_agrees_best(tmp_path):
    for folder in ("train", "val"):
        own.images(tmp_path / "pictures" / folder, PICTURES[:1])
    for written, found in (("val/scene_000.jpg", "val"), ("x/train/scene_000.jpg", "train"), ("scene_000.jpg", "")):
        (tmp_path / "x.csv").write_text(f"image,caption\n{written},a dog\n")
        (record,) = recognise(str(tmp_path / "x.csv"), Wanted(), tmp_path, tmp_path).pools[""]
        assert record.is_there() == bool(found) and (not found or record.path.parent.name == found)


def test_several_are_joined_with_new_numbers(tmp_path):
    own.FORMS["karpathy"](tmp_path / "one", PICTURES[:30])
    own.FORMS["sidecar txt"](tmp_path / "two", PICTURES[30:])
    found = prepared(tmp_path, tmp_path / "one", tmp_path / "two")
    assert sorted(row[1] for row in found.values()) == list(range(60))
    assert {name: found[name][0] for name in found if name < "scene_030"} == {p.name: p.split for p in PICTURES[:30]}


@pytest.mark.parametrize("missing", ["validation", "test", "validation test", "train"])
def test_missing_splits_are_drawn_and_others_kept(missing, tmp_path):
    pictures = [p for p in PICTURES if p.split not in missing.split()]
    found = prepared(tmp_path, own.FORMS["karpathy"](tmp_path, pictures))
    counts = Counter(row[0] for row in found.values())
    assert set(counts) == {"train", "validation", "test"} and sum(counts.values()) == len(pictures)
    if missing != "train":
        kept = {p.name: p.split for p in pictures if p.split != "train"}
        assert {name: found[name][0] for name in kept} == kept


def test_a_limit_takes_its_share_of_each_pool(tmp_path):
    pictures = [p for p in PICTURES if p.split != "validation"]
    folder = own.FORMS["karpathy"](tmp_path, pictures)
    assert len(prepared(tmp_path, folder, "--limit_data=20")) == 54, "the last of two counts"
    dataloader.main([f"--data={folder}", *TINY, "--limit_data=20", f"--save_path={tmp_path / 'out'}"])
    counts = {split: len(rows) for split, rows in load_from_disk(str(tmp_path / "out")).items()}
    assert sum(counts.values()) == 20 and counts["test"] == 2 and counts["validation"] == 2


def test_addresses_are_fetched_and_kept(tmp_path, monkeypatch):
    routes = {f"/{p.name}": body(p.data) for p in PICTURES[:8]}
    with Server(routes) as server:
        lines = [[server.url(f"/{p.name}"), p.captions[0]] for p in PICTURES[:8]]
        own.rows(tmp_path / "x.csv", ["url", "caption"], lines)
        arguments = ["--data", tmp_path / "x.csv", *TINY, "--cache_dir", tmp_path / "cache"]
        for _ in range(2):
            assert run("dataloader", [*arguments, "--save_path", tmp_path / "out"], monkeypatch) == 0
        assert len(server.requests) == 8, "the second run is served from the cache"
    names = [name for rows in load_from_disk(str(tmp_path / "out")).values() for name in rows["file_name"]]
    assert sorted(names) == [p.name for p in PICTURES[:8]]


def test_a_data_set_of_the_hub_by_its_id(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": own.dataset(PICTURES)}))
    found = recognise("somebody/pictures", Wanted(), tmp_path, tmp_path / "spool")
    assert found.form == "a DatasetDict of `datasets` from the hub" and len(found.pools["train"]) == 60
    assert found.pools["train"][7].read() == PICTURES[7].data
    streamed = own.dataset(PICTURES).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda name: streamed)
    found = recognise("somebody/pictures", Wanted(), tmp_path, tmp_path / "spool2")
    assert found.pools[""][7].read() == PICTURES[7].data


def test_a_tar_cut_short_gives_what_came_before(tmp_path, capsys):
    own.write_tar(tmp_path / "0.tar", PICTURES, lambda p: {f"{p.name[:-4]}.txt": b"a dog"})
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: len(data) // 2])
    found = recognise(str(tmp_path), Wanted(), tmp_path, tmp_path)
    assert 20 < len(found.pools[""]) < 40
    assert "is cut short" in capsys.readouterr().err


def coco_again(folder, **changes):
    """COCO's form in which an image stands twice, the second time with these changes."""
    own.images(folder, PICTURES)
    rows = [{"id": p.number, "file_name": p.name} for p in PICTURES]
    notes = [{"image_id": p.number, "caption": caption} for p in PICTURES for caption in p.captions]
    own.as_json(folder / "captions.json", {"images": [*rows, rows[0] | changes], "annotations": notes})
    return folder


def test_an_image_that_coco_s_form_lists_twice_has_its_captions_once(tmp_path, expected):
    found = prepared(tmp_path, coco_again(tmp_path / "mine"))
    assert {name: row[2] for name, row in found.items()} == {name: row[2] for name, row in expected.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": PICTURES[1].name}, "has two images with the id 0"),
        ({"id": [1]}, "is not in COCO's captions format"),
    ],
)
def test_an_id_of_two_images_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, coco_again(tmp_path / "mine", **changes))


def test_what_macos_adds_to_a_tar_is_left_out(tmp_path, expected):
    path = tmp_path / "mine.tar"
    with tarfile.open(path, "w") as tar:
        for p in PICTURES:
            for name, data in ((p.name, p.data), (p.name[:-4] + ".txt", "\n".join(p.captions).encode())):
                for member, content in ((f"._{name}", b"\0\5\26\7"), (name, data)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    found = prepared(tmp_path, path)
    assert {name: row[2] for name, row in found.items()} == {name: row[2] for name, row in expected.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.csv", ",,,\n,,,\n"), ("quotes.txt", '""\n'), ("number.json", "3"), ("true.json", "true")],
)
def test_odd_files_beside_a_table_are_no_tables(name, content, tmp_path, expected):
    own.images(tmp_path, PICTURES)
    own.rows(tmp_path / "captions.csv", ["file_name", "caption"], own.a_row_each(PICTURES))
    (tmp_path / name).write_text(content)
    found = prepared(tmp_path, tmp_path)
    assert {name: row[2] for name, row in found.items()} == {name: row[2] for name, row in expected.items()}


def test_an_address_that_is_none_or_odd_costs_one_image_at_most(tmp_path):
    with Server({f"/a%00{p.name}": body(p.data) for p in PICTURES[:8]}) as server:
        lines = [[server.url(f"/a%00{p.name}"), p.captions[0]] for p in PICTURES[:8]]
        own.rows(tmp_path / "web.csv", ["url", "caption"], [*lines, ["http://[x/a.jpg", "a dog"]])
        found = prepared(tmp_path, tmp_path / "web.csv", f"--cache_dir={tmp_path / 'cache'}", "--skip_missing")
    assert sorted(found) == [f"a_{p.name}" for p in PICTURES[:8]]


def test_file_names_may_be_any_bytes(tmp_path):
    own.images(tmp_path / "mine", PICTURES[:6])
    for p in PICTURES[:6]:
        (tmp_path / "mine" / (p.name[:-4] + ".txt")).write_text(p.captions[0])
    for ending in (".jpg", ".txt"):
        (tmp_path / "mine" / (PICTURES[0].name[:-4] + ending)).rename(tmp_path / "mine" / f"caf\udce9{ending}")
    found = prepared(tmp_path, tmp_path / "mine")
    assert found["caf\\xe9.jpg"][2] == PICTURES[0].captions[:1] and len(found) == 6
