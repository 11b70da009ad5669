"""What --image_path names: folders, patterns, lists, archives; and what is wrong with them, in one sentence."""

import gzip
import io
import os
import random
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from captioning import InputError
from captioning.data import packed
from captioning.data.sources import expand, part_of, pictures


def jpeg(colour=(10, 200, 30)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 24), colour).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a.png", "deep/er/c.jpg", ".hidden/d.jpg", "notes.txt", "film.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg())
    return folder


def names(sources, root):
    return [os.path.relpath(source.name, root) for source in sources]


def test_a_folder_with_the_folders_in_it_or_without(photos, tmp_path, capsys):
    assert names(expand([str(photos)]), photos) == ["a.png", "b.jpg", "deep/er/c.jpg"]
    assert names(expand([str(photos)], recursive=False), photos) == ["a.png", "b.jpg"]
    with pytest.raises(InputError, match="holds no images itself"):
        expand([str(photos / "deep")], recursive=False)
    (photos / "round").symlink_to(photos)
    (photos / "link.jpg").symlink_to(photos / "b.jpg")
    assert names(expand([str(photos)]), photos) == ["a.png", "b.jpg", "deep/er/c.jpg", "link.jpg"]
    assert "1 links to folders" in capsys.readouterr().err


def test_patterns_take_images_and_leave_texts(photos):
    assert names(expand([f"{photos}/*"]), photos) == ["a.png", "b.jpg"]
    assert names(expand([f"{photos}/**/*.jpg"]), photos) == ["b.jpg", "deep/er/c.jpg"]
    assert names(expand([f"{photos}/de*"]), photos) == ["deep/er/c.jpg"]
    (photos / "no_ending").write_bytes(jpeg())
    assert names(expand([f"{photos}/no_*"]), photos) == ["no_ending"]


def test_an_image_named_twice_is_one(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    assert len(expand(["photos/b.jpg", "./photos/b.jpg", str(photos / "b.jpg"), "photos/../photos/b.jpg"])) == 1


LISTS = {
    "lines": b"a.png\nb.jpg\n",
    "a mark at the start, and line ends of Windows": b"\xef\xbb\xbfa.png\r\n\r\nb.jpg",
    "PowerShell": "a.png\r\nb.jpg\r\n".encode("utf-16"),
    "NUL, as find -print0 ends names": b"a.png\0b.jpg\0",
}


@pytest.mark.parametrize("form", LISTS)
def test_a_list_in_a_file_or_on_stdin(photos, monkeypatch, form):
    file = photos / "list.txt"
    file.write_bytes(LISTS[form])
    expected = ["a.png", "b.jpg"]
    assert names(expand([str(file)]), photos) == expected  # beside the list
    monkeypatch.chdir(photos)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LISTS[form])))
    assert [source.name for source in expand(["-"])] == expected


def test_a_list_names_folders_and_addresses_too_and_strange_names(photos):
    strange = photos / "a name\twith\ta tab.jpg"
    strange.write_bytes(jpeg())
    file = photos.parent / "list.lst"
    file.write_text(f"{photos / 'deep'}\nhttps://example.com/x.jpg\n{strange}\n{photos / 'gone.jpg'}\n")
    found = expand([str(file)])
    assert [source.name for source in found[1:]] == [
        "https://example.com/x.jpg",
        str(strange),
        str(photos / "gone.jpg"),
    ]
    assert [source.is_there() for source in found] == [True, True, True, False]


def test_lists_that_are_none(photos, capsys):
    empty = photos / "empty.txt"
    empty.write_bytes(b"\n \n")
    with pytest.raises(InputError, match="is empty; write a path into each line"):
        expand([str(empty)])
    (photos / "b.txt").write_text("a dog runs\n")
    assert names(expand([str(photos / "b.jpg"), str(photos / "b.txt")]), photos) == ["b.jpg"]
    assert "is taken for a caption, and left out" in capsys.readouterr().err
    (photos / "outer.txt").write_text(f"{empty}\n")
    with pytest.raises(InputError, match="names another list"):
        expand([str(photos / "outer.txt")])


def test_a_name_that_is_not_utf8_is_told_from_another(tmp_path):
    try:
        for name in (b"/caf\xe9.jpg", b"/caf\xe8.jpg"):
            Path(os.fsdecode(os.fsencode(tmp_path) + name)).write_bytes(jpeg())
    except OSError:
        pytest.skip("a file system that only knows UTF-8")
    found = expand([str(tmp_path)])
    assert names(found, tmp_path) == ["caf\\xe8.jpg", "caf\\xe9.jpg"]
    assert found[0].image().size == (32, 24)


# ---- archives


def make_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


MEMBERS = {
    "b.jpg": jpeg((255, 0, 0)),
    "in/a.jpg": jpeg((0, 0, 255)),
    "in/notes.txt": b"no image",
    "__MACOSX/x.jpg": b"",
}


def make_packed(path, members):
    return make_tar(path, members, f"w:{path.name.rpartition('.')[2].replace('tgz', 'gz')}")


KINDS = [
    (make_zip, "x.zip"),
    (make_tar, "x.tar"),
    *((make_packed, f"x.{ending}") for ending in ("tgz", "tar.gz", "tar.bz2", "tar.xz")),
]


@pytest.mark.parametrize(("make", "name"), KINDS)
def test_an_archive_is_read_in_place(tmp_path, make, name):
    path = make(tmp_path / name, MEMBERS)
    found = expand([str(path)])
    assert names(found, tmp_path) == [f"{name}/b.jpg", f"{name}/in/a.jpg"]
    assert found[0].image().getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=4)
    assert found[1].image().getpixel((5, 5)) == pytest.approx((0, 0, 255), abs=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(("make", "name"), KINDS)
def test_what_is_wrong_with_one_member_is_said_of_it(tmp_path, make, name):
    path = make(tmp_path / name, {"../../up.jpg": jpeg(), "/abs.jpg": jpeg(), "bad.jpg": b"text", "good.jpg": jpeg()})
    reasons = []
    read = list(pictures(expand([str(path)]), 64, None, 4, lambda source, reason: reasons.append(reason)))
    assert [picture.source.inner for picture in read] == ["good.jpg"]
    assert sum("its name leaves the archive" in reason for reason in reasons) == 2
    assert any("bad.jpg" in reason and "not a" in reason for reason in reasons)


def test_a_compressed_tar_is_read_in_one_pass(tmp_path, monkeypatch):
    """In its own order, whatever is left out; and any order gives what a plain tar gives."""
    members = {f"{(7 * number) % 40:02}.jpg": jpeg((number, 0, 0)) for number in range(40)}
    plain = expand([str(make_tar(tmp_path / "x.tar", members))])
    sources = expand([str(make_packed(tmp_path / "x.tar.gz", members))])
    assert [source.inner for source in sources] == list(members)
    assert sorted(source.inner for source in sources) == [source.inner for source in plain]
    places = []
    seek = packed.Unpacked.seek
    monkeypatch.setattr(packed.Unpacked, "seek", lambda self, at, *more: places.append(at) or seek(self, at, *more))
    for some in (sources, sources[1::3], part_of(sources, (2, 2))):
        places.clear()
        read = list(pictures(some, 64, None, 4, lambda source, reason: pytest.fail(reason)))
        assert [picture.source for picture in read] == some and places == sorted(places)
    assert {source.inner: source.read() for source in sources[::-1]} == members
    assert {source.inner: source.read() for source in plain} == members


def test_a_compressed_tar_that_is_more_than_it_says(tmp_path, monkeypatch, capsys):
    def made(name, chunks):
        path = tmp_path / name
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(chunks)
        return str(path)

    def header(name, size, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo(name)
        info.size, info.type = size, kind
        return info.tobuf(tarfile.GNU_FORMAT)

    monkeypatch.setattr(packed, "ALWAYS_ALLOWED", 10_000_000)
    bomb = made("bomb.tar.gz", [header("a.jpg", 10_000_000), bytes(10_000_000), bytes(1024)])
    with pytest.raises(InputError, match=r"bomb.tar.gz' unpacks to more than [\d,]+ bytes.*tar -xf '.*name the folder"):
        expand([bomb])
    claims = made("claims.tar.gz", [header("a.jpg", 8**11 - 1), bytes(1024)])
    with pytest.raises(InputError, match="unpacks to more than"):
        expand([claims])
    long = made("long.tar.gz", [header("././@LongLink", 60_000_000, tarfile.GNUTYPE_LONGNAME)])
    with pytest.raises(InputError, match="is no whole tar behind its compression; get it again"):
        expand([long])
    with pytest.raises(InputError, match="is no whole tar behind its compression"):
        expand([made("text.tar.gz", [b"hello" * 300])])
    noise = {f"{number}.jpg": jpeg() + random.Random(number).randbytes(5000) for number in range(9)}
    whole = make_packed(tmp_path / "whole.tar.gz", noise)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    capsys.readouterr()
    sources, reasons = expand([str(cut)]), []
    read = list(pictures(sources, 64, None, 4, lambda source, reason: reasons.append(reason)))
    assert 0 < len(read) < 9 and len(read) + len(reasons) == len(sources)
    assert "is cut short" in capsys.readouterr().err
    monkeypatch.setattr(packed, "MOST_MEMORY", 1_000_000)
    with pytest.raises(InputError, match="needs more than 1,000,000 bytes of memory; compress it again with xz -6"):
        expand([str(make_packed(tmp_path / "x.tar.xz", MEMBERS))])


def test_a_zip_that_is_more_than_it_says(tmp_path):
    """A member that unpacks to gigabytes, or whose data are damaged, costs one sentence and little memory."""
    path = make_zip(tmp_path / "bomb.zip", {"a.jpg": bytes(60_000_000)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="more than 50,000,000 bytes"):
        expand([str(path)])[0].read()
    for unlimited in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # 200 bytes of bzip2 may be gigabytes
        path = make_zip(tmp_path / f"bomb{unlimited}.zip", {"a.jpg": bytes(60_000_000)}, compression=unlimited)
        tracemalloc.start()
        with pytest.raises(InputError, match=r"it is not packed by deflate, as usual; unpack the archive"):
            expand([str(path)])[0].read()
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()
    path = make_zip(tmp_path / "damaged.zip", {"a.jpg": jpeg() * 20}, compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jpg.*the archive is damaged there"):
        expand([str(path)])[0].read()


def encrypted(data: bytes, count: int) -> bytes:
    """The flag of encryption set in the first `count` members of a zip."""
    data = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        for _ in range(count):
            start = data.index(mark, start + 1)
            data[start + at] |= 1
    return bytes(data)


def test_encrypted_zips(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.jpg": jpeg(), "b.jpg": jpeg()})
    whole = path.read_bytes()
    path.write_bytes(encrypted(whole, 1))
    first, second = expand([str(path)])
    with pytest.raises(InputError, match=r"a\.jpg'?: it is encrypted; unpack the archive with its password"):
        first.read()
    assert second.image().size == (32, 24)
    other = tmp_path / "all.zip"
    other.write_bytes(encrypted(whole, 2))
    with pytest.raises(InputError, match="is encrypted; unpack it with its password"):
        expand([str(other)])


def test_archives_that_are_none(tmp_path, capsys, monkeypatch):
    whole = make_tar(tmp_path / "whole.tar", {f"{number}.jpg": jpeg() for number in range(9)}).read_bytes()
    zipped = make_zip(tmp_path / "whole.zip", {"a.jpg": jpeg()}).read_bytes()
    for name, data, message in (
        ("text.zip", b"hello", "is not a whole zip archive"),
        ("cut.zip", zipped[: len(zipped) // 2], "is not a whole zip archive"),
        ("empty.zip", b"PK\x05\x06" + bytes(18), "holds no images"),
        ("text.tar", b"hello" * 300, "is no whole tar"),
        ("empty.tar", bytes(10240), "holds no images"),
        ("packed.tar.gz", b"\x1f\x8b", "is no whole tar behind its compression; get it again"),
        ("photo.jpg.gz", b"", "is not read in place; unpack it with gunzip '.*photo.jpg.gz', and name what it holds"),
        ("x.tar.zst", b"", "unpack it with tar --zstd -xf"),
        ("x.7z", b"", "unpack it with 7z x"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=message) as refused:
            expand([str(path)])
        assert "\n" not in str(refused.value) and name in str(refused.value)
    monkeypatch.setattr("captioning.data.sources.LONGEST_LIST", 40)
    with pytest.raises(InputError, match="lists its contents in more than 40 bytes; divide it"):
        expand([str(tmp_path / "whole.zip")])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(expand([str(cut)])) < 9
    assert "is cut short" in capsys.readouterr().err


def test_parts_are_all_and_none_twice(photos):
    sources = expand([str(photos)])
    parts = [part_of(sources, (number, 2)) for number in (1, 2)]
    assert sorted([*parts[0], *parts[1]], key=lambda source: source.name) == sources
    assert abs(len(parts[0]) - len(parts[1])) <= 1 and part_of(sources, None) == sources
