"""The download against a real server on 127.0.0.1 that misbehaves in every way there is a name for."""

import contextlib
import filecmp
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from email.utils import formatdate

import pytest
from coco import write
from conftest import ROOT, hears_ctrl_c
from datasets import load_from_disk
from httpserver import (
    Server,
    body,
    chunked,
    endless,
    in_turn,
    ranged,
    raw,
    redirect,
    reply,
    short,
    silence,
    stall,
    status,
    unsized,
)

import dataloader
from captioning import InputError, cli
from captioning.data import annotations, download, scenes
from captioning.data.fetch import MAX_REDIRECTS
from captioning.data.folder import replaced

ZIP = f"/{download.ANNOTATIONS_ZIP}"
PARTS = {"train2014": range(1, 61), "val2014": range(101, 121)}
GREY = {3, 17, 18, 40, 105}


def encoded(image, kind="JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A COCO 2014 of 80 drawn scenes, 5 of them grey, with the sizes in its annotations."""
    root, rng = tmp_path_factory.mktemp("original"), random.Random(0)
    for part, ids in PARTS.items():
        (root / part).mkdir()
        content = {"images": [], "annotations": []}
        for image_id in ids:
            scene, captions, _ = scenes.draw_scene(rng)
            name = f"COCO_{part}_{image_id:012d}.jpg"
            (root / part / name).write_bytes(encoded(scene.convert("L") if image_id in GREY else scene))
            content["images"].append({"id": image_id, "file_name": name, "width": 128, "height": 128})
            content["annotations"] += [{"image_id": image_id, "caption": caption} for caption in captions]
        write(root / "annotations" / f"captions_{part}.json", content)
    return root


def packed(root, **others) -> bytes:
    """The archive: the captions, other members before them, and what a hostile one would add."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("annotations/instances_train2014.json", random.Random(1).randbytes(300_000))
        for name in download.ANNOTATIONS:
            members.write(root / name, name)
        for name, content in others.items():
            members.writestr(name, content)
    return archive.getvalue()


@pytest.fixture
def routes(original):
    return {ZIP: ranged(packed(original))} | {
        f"/{path.parent.name}/{path.name}": body(path.read_bytes(), "image/jpeg")
        for path in original.glob("*2014/*.jpg")
    }


@pytest.fixture
def server(routes):
    with Server(routes) as running:
        yield running


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Waits of a hundredth, so that a test of eight retries takes a second."""
    monkeypatch.setattr(download, "FIRST_WAIT", 0.005)
    monkeypatch.setattr(download, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(download, "LONGEST_RETRY_AFTER", 0.3)
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "BLOCK", 1 << 14)


def prepare(server_or_url, folder, *arguments, save_path="out"):
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url("")
    return dataloader.main(
        [
            f"--coco_url={url}",
            f"--cache_dir={folder / 'cache'}",
            f"--save_path={folder / save_path}",
            "--limit_data=30",
            "--encoder=tiny",
            "--decoder=tiny",
            "--num_proc=1",
            *map(str, arguments),
        ]
    )


@pytest.fixture(scope="module")
def undisturbed(original, tmp_path_factory):
    """What a run without a fault writes, and which images it asks for."""
    folder = tmp_path_factory.mktemp("undisturbed")
    routes = {ZIP: ranged(packed(original))} | {
        f"/{path.parent.name}/{path.name}": body(path.read_bytes()) for path in original.glob("*2014/*.jpg")
    }
    with Server(routes) as running:
        prepare(running, folder)
        folder.joinpath("asked").write_text("\n".join(sorted({request.path for request in running.requests} - {ZIP})))
    return folder


def assert_same(one, other):
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    _, different, errors = filecmp.cmpfiles(one, other, files, shallow=False)
    assert (different, errors) == ([], [])


def leftovers(folder):
    return list(folder.rglob(".*"))


def image_route(image_id):
    part = "train2014" if image_id < 100 else "val2014"
    return f"/{part}/COCO_{part}_{image_id:012d}.jpg"


def records(original, server, cache, ids):
    for name in download.ANNOTATIONS:
        write(cache / name, (original / name).read_text())
    pools = annotations.read_coco(cache, server.url(""))
    return [record for part in pools.values() for record in part if record.image_id in ids]


# One image misbehaves, the others arrive

PICTURE = encoded(scenes.draw_scene(random.Random(5))[0])
OTHER_SIZE = encoded(scenes.draw_scene(random.Random(5))[0].resize((64, 64)))
PAGE = b"<!DOCTYPE html><html><body>Log in to use this network</body></html>"


def huge(width, height):
    """A JPEG that claims to be larger than it is."""
    at = PICTURE.index(b"\xff\xc0")
    return PICTURE[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + PICTURE[at + 9 :]


def later(code, when):
    return lambda handler: reply(handler, code=code, headers={"Retry-After": when(), "Content-Length": 0})


def hang_up(handler):
    handler.connection.close()


# name -> (route, what it is called when it does not pass); each of these may pass
PASSING = {
    "408": (status(408), "status 408"),
    "429": (status(429), "status 429"),
    "429 with Retry-After in seconds": (later(429, lambda: 1), "status 429"),
    "429 with Retry-After as a date": (later(429, lambda: formatdate(time.time() + 5, usegmt=True)), "status 429"),
    "429 with Retry-After of a week": (later(429, lambda: 604_800), "status 429"),
    "429 with a Retry-After of nonsense": (later(429, lambda: "soon"), "status 429"),
    "500": (status(500), "status 500"),
    "502": (status(502), "status 502"),
    "503 with Retry-After": (later(503, lambda: 0), "status 503"),
    "504": (status(504), "status 504"),
    "cut in the middle of the body": (short(PICTURE[:700], len(PICTURE)), "cut short"),
    "Content-Length too high": (short(PICTURE, len(PICTURE) + 1000), "cut short"),
    "Content-Length too low": (short(PICTURE, len(PICTURE) // 2), "damaged"),
    "cut in the middle of a chunk": (chunked(PICTURE[:500], ended=False), "cut short"),
    "cut without a Content-Length": (unsized(PICTURE[:-400]), "damaged"),
    "a web page instead": (body(PAGE, "text/html"), "damaged"),
    "a truncated JPEG": (body(PICTURE[: len(PICTURE) // 2]), "damaged"),
    "an empty body": (body(b""), "damaged"),
    "zeros": (body(bytes(len(PICTURE))), "damaged"),
    "another size than annotated": (body(OTHER_SIZE), "damaged"),
}
PASSING |= {
    "a stalled body": (stall(PICTURE[:600], len(PICTURE)), "too slow"),
    "silence": (silence(), "too slow"),
    "a connection that is closed at once": (hang_up, "no connection"),
    "no HTTP": (raw(b"\x00\x01\x02 nonsense\r\n\r\n"), "no connection"),
}
LASTING = {
    "401": (status(401), "status 401"),
    "403": (status(403), "status 403"),
    "404": (status(404), "status 404"),
    "410": (status(410), "status 410"),
    "204": (status(204, b""), "status 204"),
    "a redirect loop": (lambda handler: redirect(handler.path)(handler), "too many redirects"),
    "a redirect to file:": (redirect("file:///etc/passwd"), "redirected to another scheme"),
    "a redirect to ftp:": (redirect("ftp://127.0.0.1/x.jpg"), "redirected to another scheme"),
    "a redirect to data:": (redirect("data:image/jpeg;base64,/9j/"), "redirected to another scheme"),
    "a redirect to nowhere": (redirect("http://[bad/x.jpg"), "not a valid address"),
    "an endless body": (endless(), "too large"),
    "a body said to be endless": (short(b"x", 10**15), "too large"),
    "a compressed body that was not asked for": (body(b"x", Content_Encoding="br"), "compressed"),
    "a bomb of 65,535 x 65,535 pixels": (body(huge(65_535, 65_535)), "damaged"),
    "a bomb of 32,000 x 32,000 pixels": (body(huge(32_000, 32_000)), "damaged"),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_waited_out(fault, original, server, tmp_path):
    route = PASSING[fault][0]
    chosen = records(original, server, tmp_path, {1, 2, 3, 4})
    path = image_route(2)
    server.routes[path] = in_turn(route, route, server.routes[path])
    assert download.fetch_images(chosen, download.Client(), connections=2) == {}
    for record in chosen:
        assert record.path.read_bytes() == (original / "train2014" / record.file_name).read_bytes()
    assert server.count(path) == 3
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("fault", [*PASSING, *LASTING])
def test_a_fault_that_lasts_is_listed_and_costs_no_other_image(fault, original, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_RETRY_AFTER", 0.02)
    monkeypatch.setattr(download, "RETRIES", 4)
    route, reason = {**PASSING, **LASTING}[fault]
    chosen = records(original, server, tmp_path, {1, 2, 3, 4})
    server.routes[image_route(2)] = route
    assert download.fetch_images(chosen, download.Client(), connections=2) == {2: reason}
    assert [record.image_id for record in chosen if record.is_there()] == [1, 3, 4]
    tries = server.count(image_route(2))
    if fault in LASTING and reason != "damaged":
        assert tries == (MAX_REDIRECTS + 1 if "loop" in fault else 1)
    else:
        assert tries == 1 + (download.FEW_RETRIES if reason == "damaged" else download.RETRIES)
    assert not leftovers(tmp_path)


def test_the_design_page_counts_them():
    page = (ROOT / "captioning" / "DESIGN.md").read_text()
    assert f"{len(PASSING)} kinds of faults" in page and f"and {len(LASTING)} more" in page


def test_retry_after_holds_for_all_connections(original, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_RETRY_AFTER", 5)
    chosen = records(original, server, tmp_path, set(range(1, 9)))
    path, seen = image_route(1), []

    def limit(handler):
        seen.append(time.monotonic())
        later(429, lambda: 1)(handler)

    server.routes[path] = in_turn(limit, server.routes[path])
    arrivals = []

    def timed(route):
        # slow enough that the limit comes before the last
        return lambda handler: (arrivals.append(time.monotonic()), time.sleep(0.1), route(handler))

    server.routes |= {image_route(number): timed(server.routes[image_route(number)]) for number in range(2, 9)}
    assert download.fetch_images(chosen, download.Client(), connections=2) == {}
    assert [late for late in arrivals if seen[0] + 0.15 < late < seen[0] + 0.95] == []


def test_a_server_that_goes_and_comes_back(original, routes, tmp_path, capsys):
    with Server(routes) as first:
        port = first.port
        chosen = records(original, first, tmp_path, set(range(1, 31)))
        gone = threading.Event()
        stop_at = first.routes[image_route(12)]
        first.routes[image_route(12)] = lambda handler: (gone.set(), stop_at(handler))
        result = {}
        thread = threading.Thread(target=lambda: result.update(failed=download.fetch_images(chosen, download.Client())))
        thread.start()
        assert gone.wait(10)
    time.sleep(0.1)  # nobody listens now
    with Server(routes, port) as second:
        thread.join(20)
        asked = [request.path for request in second.requests]
    assert result == {"failed": {}}
    assert all(record.is_there() for record in chosen)
    assert asked and len(asked) == len(set(asked))


def test_a_server_that_goes_for_good_ends_the_run_and_the_next_goes_on(routes, undisturbed, tmp_path, capsys):
    with Server(routes) as first:
        port = first.port
        served, lock = [], threading.Lock()

        def gate(route):
            def answer(handler):
                with lock:
                    served.append(handler.path)
                (route if len(served) <= 10 else hang_up)(handler)

            return answer

        first.routes = {path: gate(route) if path != ZIP else route for path, route in routes.items()}
        with pytest.raises(download.Unfinished, match=r"\d+ of \d+ images were fetched and are kept in '.*cache'"):
            prepare(first, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    whole = {f"/{path.parent.name}/{path.name}" for path in (tmp_path / "cache").glob("*2014/*.jpg")}
    assert len(whole) == 10
    with Server(routes, port) as second:
        prepare(second, tmp_path)
        asked = {request.path for request in second.requests}
    assert not asked & (whole | {ZIP})
    assert_same(tmp_path / "out", undisturbed / "out")


def test_a_mirror_that_has_nothing_is_left_soon(routes, original, tmp_path):
    with Server({ZIP: routes[ZIP]}) as empty:
        with pytest.raises(download.Unfinished, match=r"stopped after 20 failures in a row, the last: .*status 404"):
            prepare(empty, tmp_path, "--skip_missing", "--limit_data=0")
        assert len(empty.requests) < 70


# Whole runs


def test_whatever_passes_does_not_change_the_folder(routes, undisturbed, tmp_path):
    asked = (undisturbed / "asked").read_text().split()
    faults = [route for route, _ in PASSING.values()]
    for path, fault in zip(asked, faults * 2, strict=False):
        routes[path] = in_turn(fault, routes[path])
    with Server(routes) as server:
        prepare(server, tmp_path)
    assert len(asked) > len(faults), "every fault was met"
    assert_same(tmp_path / "out", undisturbed / "out")
    assert_same(tmp_path / "cache", undisturbed / "cache")


def test_what_lasts_ends_with_a_choice_and_nothing_is_lost(routes, undisturbed, tmp_path, capsys):
    asked = (undisturbed / "asked").read_text().split()
    lost = {asked[4]: status(404), asked[9]: status(403), asked[12]: status(404)}
    ids = {path: int(path[-16:-4]) for path in lost}
    with Server(routes | lost) as server:
        with pytest.raises(download.Unfinished, match="3 images could not be fetched") as stopped:
            prepare(server, tmp_path)
        assert "--skip_missing" in str(stopped.value) and "run the same command again" in str(stopped.value)
        listed = capsys.readouterr().err
        assert f"status 404: {ids[asked[4]]}, {ids[asked[12]]}" in listed and f"status 403: {ids[asked[9]]}" in listed
        assert not (tmp_path / "out").exists()
        whole = {f"/{path.parent.name}/{path.name}" for path in (tmp_path / "cache").glob("*2014/*.jpg")}
        before = len(server.requests)
        prepare(server, tmp_path, "--skip_missing")
        splits = load_from_disk(str(tmp_path / "out"))
        assert {name: len(rows) for name, rows in splits.items()} == {"train": 24, "validation": 3, "test": 3}
        assert not {i for rows in splits.values() for i in rows["image_id"]} & set(ids.values())
        again = [request.path for request in server.requests[before:]]
        assert set(lost) <= set(again) and len(again) == len(set(again)) and not whole & set(again)
    with Server(routes) as server:  # repaired
        prepare(server, tmp_path)
    assert_same(tmp_path / "out", undisturbed / "out")


def test_the_folder_is_that_of_a_local_coco_and_the_cache_is_one(original, undisturbed, tmp_path):
    expected = load_from_disk(str(undisturbed / "out"))
    for number, root in enumerate((original, undisturbed / "cache")):
        arguments = ["--limit_data=30", "--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
        dataloader.main([f"--coco_dir={root}", f"--save_path={tmp_path / str(number)}", *arguments])
        splits = load_from_disk(str(tmp_path / str(number)))
        for name, rows in expected.items():
            assert splits[name].to_dict() == rows.to_dict()
    assert len(leftovers(undisturbed)) == 0


def test_grey_images_are_replaced_and_no_more_is_fetched(undisturbed):
    splits = load_from_disk(str(undisturbed / "out"))
    ids = {i for rows in splits.values() for i in rows["image_id"]}
    asked = {int(path[-16:-4]) for path in (undisturbed / "asked").read_text().split()}
    assert len(ids) == 30 and not ids & GREY
    assert asked - ids == asked & GREY and asked & GREY, "the rest were found to be grey only once they were here"


def test_an_image_of_the_cache_that_was_damaged_since_is_fetched_again(routes, undisturbed, tmp_path):
    with Server(routes) as server:
        prepare(server, tmp_path)
        victim = sorted((tmp_path / "cache" / "train2014").glob("*.jpg"))[3]
        victim.write_bytes(victim.read_bytes()[:900])
        before = len(server.requests)
        prepare(server, tmp_path)
        assert [request.path for request in server.requests[before:]] == [f"/train2014/{victim.name}"]
    assert_same(tmp_path / "out", undisturbed / "out")


def test_no_room_is_said_before_the_start(server, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 121_000_000))
    monkeypatch.setattr(dataloader, "FETCHED_SIZE", 10_000_000)
    with pytest.raises(InputError, match=r"has 0\.12 GB free and about 0\.30 GB are needed for 30 images; make room"):
        prepare(server, tmp_path)
    assert server.requests[-1].path == ZIP
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 119_000_000))
    with pytest.raises(InputError, match="no room for the captions"):
        prepare(server, tmp_path / "new")


def test_a_password_is_used_and_never_shown(routes, tmp_path, capsys):
    needs = image_route(1)
    with Server({ZIP: routes[ZIP]}) as server:
        url = server.url("", userinfo="me:s3cret")
        with pytest.raises(download.Unfinished) as stopped:
            prepare(url, tmp_path)
        with pytest.raises(download.Unfinished) as nothing:
            prepare("http://me:s3cret@127.0.0.1:9", tmp_path / "new")
        assert server.requests[0].headers["authorization"].startswith("Basic "), needs
    seen = str(stopped.value) + str(nothing.value) + "".join(capsys.readouterr())
    assert "127.0.0.1" in seen and "s3cret" not in seen


@pytest.mark.parametrize(
    ("url", "shown"),
    [("ftp://me:s3cret@host", "ftp://host"), ("file:///etc", "file:///etc"), ("data:,x", "data:,x"), ("host", "host")],
)
def test_other_schemes_are_refused_as_a_mirror(url, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        dataloader.main([f"--coco_url={url}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"--coco_url '{shown}' is not an http or https address" in error and "s3cret" not in error


# The archive


def fetch(server, cache):
    download.fetch_annotations(cache, server.url(""), download.Client())


def assert_captions(original, cache):
    for name in download.ANNOTATIONS:
        assert (cache / name).read_bytes() == (original / name).read_bytes()
    assert sorted(path.name for path in (cache / "annotations").iterdir()) == [
        "captions_train2014.json",
        "captions_val2014.json",
    ]


def test_only_the_captions_are_read_out_of_the_archive(original, server, tmp_path):
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)
    size = sum(
        int(last) - int(first) + 1
        for request in server.requests
        for first, last in [request.headers["range"].removeprefix("bytes=").split("-")]
    )
    assert size < 60_000 < 300_000 < len(packed(original))


def test_a_server_that_ignores_ranges_sends_all_of_it(original, server, tmp_path):
    server.routes[ZIP] = body(packed(original))
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)


def test_all_of_it_is_fetched_again_where_it_was_cut(original, server, tmp_path):
    whole = packed(original)
    server.routes[ZIP] = in_turn(body(whole), short(whole[:100_000], len(whole)), body(whole))
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)


def test_blocks_that_arrived_are_kept_by_an_interrupted_run(original, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 1 << 10)
    honest = server.routes[ZIP]
    server.routes[ZIP] = in_turn(*[honest] * 5, status(404))
    with pytest.raises(download.Unfinished, match=r"cannot fetch the captions: .*status 404.*--sample"):
        fetch(server, tmp_path)
    done = {request.headers["range"] for request in server.requests[1:5]}
    before = len(server.requests)
    server.routes[ZIP] = in_turn(honest, status(503), hang_up, silence(), honest)
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)
    later = [request.headers["range"] for request in server.requests[before + 1 :]]
    assert not done & set(later)
    assert len(later) == len(set(later)) + 3, "three faults, three retries"


def test_blocks_of_another_archive_are_not_mixed_in(original, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 1 << 10)
    old, new = packed(original, old="x" * 5000), packed(original)
    server.routes[ZIP] = in_turn(*[ranged(old)] * 4, ranged(new))
    with pytest.raises(download.Unfinished, match="changed while it was read"):
        fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)


def test_another_run_may_finish_with_the_same_cache(original, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BLOCK", 1 << 10)
    honest = server.routes[ZIP]

    def after_the_other(handler):
        for folder in (tmp_path / "annotations").glob(".blocks-*"):
            shutil.rmtree(folder)
        honest(handler)

    server.routes[ZIP] = in_turn(honest, honest, after_the_other, honest)
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)


def damaged(original):
    data = bytearray(packed(original))
    data[data.index(b"captions_train2014.json") + 200] ^= 0xFF
    return bytes(data)


def encrypted(original):
    data = bytearray(packed(original))
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"annotations/captions_train2014.json"))
    data[at + 8] |= 1
    return bytes(data)


def bomb(original):
    """A member that says it unpacks to 4 GB."""
    data = bytearray(packed(original))
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"annotations/captions_train2014.json"))
    data[at + 24 : at + 28] = b"\xfe\xff\xff\xff"
    return bytes(data)


def honest_bomb(original):
    """Zeros without end behind a modest claim: no more than was claimed is unpacked."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        for name in download.ANNOTATIONS:
            members.writestr(name, bytes(50_000_000))
    data = bytearray(archive.getvalue())
    for name in download.ANNOTATIONS:
        at = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
        data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
        data[at + 16 : at + 20] = zlib.crc32(b"x").to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda original: PAGE, "File is not a zip file"),
        (lambda original: b"", "File is not a zip file"),
        (lambda original: packed(original)[:-5000], "File is not a zip file"),
        (lambda original: packed(original).replace(b"captions_val2014", b"captions_val2015"), "There is no item"),
        (damaged, "Bad CRC-32|invalid|incorrect|Overlapped"),
        (encrypted, "encrypted"),
        (bomb, "would take 4,294,967,294 bytes"),
        (honest_bomb, "Bad CRC-32"),
    ],
    ids=["page", "empty", "cut", "no captions", "damaged", "encrypted", "bomb", "hidden bomb"],
)
def test_what_is_not_cocos_archive_is_refused(make, reason, ranges, original, server, tmp_path):
    content = make(original)
    server.routes[ZIP] = ranged(content) if ranges and content else body(content)
    with pytest.raises(InputError, match=f"is not COCO's archive of annotations.*({reason})"):
        fetch(server, tmp_path)
    assert not any(path.is_file() and path.stat().st_size > 20_000 for path in tmp_path.rglob("*"))
    server.routes[ZIP] = ranged(packed(original))
    fetch(server, tmp_path)
    assert_captions(original, tmp_path)


def test_members_that_climb_out_are_left_alone(original, server, tmp_path):
    link = zipfile.ZipInfo("annotations/link")
    link.external_attr = 0o120777 << 16
    absolute = tmp_path / "absolute-climbed.txt"
    hostile = {"../../climbed.txt": b"x", str(absolute): b"x", "annotations/../../up.json": b"{}"}
    data = io.BytesIO(packed(original, **hostile))
    with zipfile.ZipFile(data, "a") as members:
        members.writestr(link, "/etc/passwd")
    server.routes[ZIP] = ranged(data.getvalue())
    fetch(server, tmp_path / "a" / "b" / "cache")
    assert_captions(original, tmp_path / "a" / "b" / "cache")
    files = {path.name for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()}
    assert files == {"captions_train2014.json", "captions_val2014.json"}
    assert not os.path.lexists(absolute)


@pytest.mark.parametrize("name", ["../../x.jpg", "/etc/passwd", "a\\..\\x.jpg", "", ".", "x\0.jpg"])
def test_a_file_name_that_climbs_out_is_refused_before_anything_is_fetched(name, original, server, tmp_path):
    root = tmp_path / "hostile"
    for part in PARTS:
        content = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
        write(root / f"annotations/captions_{part}.json", content)
    server.routes[ZIP] = ranged(packed(root))
    with pytest.raises(InputError, match=r"leaves the image folder|names no file"):
        prepare(server, tmp_path)
    assert {request.path for request in server.requests} == {ZIP}
    assert not list(tmp_path.rglob("*.jpg"))


def test_a_file_name_cannot_ask_another_server_or_another_file(tmp_path):
    name = "x.jpg?to=//evil@host/#a b"
    for part in PARTS:
        image = {"id": len(part), "file_name": name}
        write(tmp_path / f"annotations/captions_{part}.json", {"images": [image], "annotations": []})
    (record,) = annotations.read_coco(tmp_path, "http://host")["val2014"]
    assert record.url == "http://host/val2014/x.jpg%3Fto%3D//evil%40host/%23a%20b"


# Killed, and run again


def command(server, folder, *arguments):
    waits = "from captioning.data import download as d; d.FIRST_WAIT, d.BLOCK = 0.01, 1 << 12\n"
    code = f"import dataloader; from captioning import cli\n{waits}cli.run(dataloader.main)"
    options = ["--limit_data=30", "--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
    return [
        sys.executable,
        "-c",
        code,
        f"--coco_url={server.url('')}",
        f"--cache_dir={folder / 'cache'}",
        f"--save_path={folder / 'out'}",
        *options,
        *arguments,
    ]


def slowly(content, pause=0.03):
    """Half of it, a pause, the rest: a kill falls between."""

    def route(handler):
        reply(handler, content[: len(content) // 2], headers={"Content-Length": len(content)})
        handler.wfile.flush()
        time.sleep(pause)
        handler.wfile.write(content[len(content) // 2 :])

    return route


def survive_kills(kills, seed, original, routes, undisturbed, folder):
    """Kill a run at random moments, again and again; returns how many were killed, and after how many images each."""
    for path in original.glob("*2014/*.jpg"):
        routes[f"/{path.parent.name}/{path.name}"] = slowly(path.read_bytes())
    rng, killed, phases = random.Random(seed), 0, []
    with Server(routes) as server:
        for number in range(kills):
            server.requests.clear()
            whole = {f"/{path.parent.name}/{path.name}" for path in (folder / "cache").glob("*2014/[!.]*")}
            if len(whole) > 25:  # nothing left to fetch: begin anew
                for path in (folder / "cache").rglob("*.jpg"):
                    path.unlink()
                whole = set()
            process = subprocess.Popen(
                command(server, folder), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            # Every other one soon after a request, which is where most can go wrong.
            moment = rng.uniform(0.2, 8)
            if number % 2 == 0:
                nth = rng.randint(1, 30)
                deadline = time.monotonic() + 60
                while len(server.requests) < nth and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                moment = rng.uniform(0, 0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            killed += process.poll() is None
            process.kill()
            process.wait()
            asked = [request.path for request in server.requests if request.path != ZIP]
            assert not whole & set(asked), "what was whole is not fetched again"
            phases.append(len(asked))
            if (folder / "out").exists():
                assert_same(folder / "out", undisturbed / "out")
        server.requests.clear()
        whole = {f"/{path.parent.name}/{path.name}" for path in (folder / "cache").glob("*2014/[!.]*")}
        subprocess.run(command(server, folder), cwd=ROOT, check=True, capture_output=True)
        assert not whole & {request.path for request in server.requests}
    assert_same(folder / "out", undisturbed / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "out"], "nothing is left beside them"
    assert not leftovers(folder / "cache")
    return killed, phases


def test_two_kills_and_the_folder_is_that_of_an_undisturbed_run(original, routes, undisturbed, tmp_path):
    killed, _ = survive_kills(2, 0, original, routes, undisturbed, tmp_path)
    assert killed >= 1


@pytest.mark.slow
def test_ten_kills_and_the_folder_is_that_of_an_undisturbed_run(original, routes, undisturbed, tmp_path):
    killed, phases = survive_kills(14, 1, original, routes, undisturbed, tmp_path)
    print(f"{killed} of 14 runs were killed, after these numbers of images: {phases}")
    assert killed >= 10


def test_ctrl_c_while_fetching_leaves_nothing_half_written(original, routes, undisturbed, tmp_path):
    for path in original.glob("*2014/*.jpg"):
        routes[f"/{path.parent.name}/{path.name}"] = slowly(path.read_bytes(), 2)
    with Server(routes) as server:
        process = subprocess.Popen(
            command(server, tmp_path),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hears_ctrl_c,
        )
        deadline = time.monotonic() + 60
        while sum(request.path.endswith(".jpg") for request in server.requests) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "Traceback" not in error and error.endswith("stopped\n")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    for path in (tmp_path / "cache").glob("*2014/*.jpg"):
        assert path.read_bytes() == (original / path.parent.name / path.name).read_bytes()


# Two runs at once, and a full disk


def test_two_runs_into_one_folder(routes, undisturbed, tmp_path):
    with Server(routes) as server:
        first = subprocess.Popen(
            command(server, tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        out = tmp_path / "out"
        with pytest.raises(InputError, match=f"another run is writing to --save_path '{out}'; wait until it has ended"):
            prepare(server, tmp_path)
        assert first.wait(60) == 0
    assert_same(out, undisturbed / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_a_lock_goes_with_its_run(server, undisturbed, tmp_path):
    with pytest.raises(RuntimeError), replaced(tmp_path / "out") as work:
        (work / "half").write_text("x")
        with pytest.raises(InputError, match="another run is writing"):
            prepare(server, tmp_path)
        assert (work / "half").exists()
        raise RuntimeError
    prepare(server, tmp_path)
    assert_same(tmp_path / "out", undisturbed / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_a_folder_set_aside_by_a_killed_run_is_put_back(server, tmp_path):
    """Killed between the two renames that replace a folder, and then the next run fails too."""
    prepare(server, tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.partial.old")
    server.routes.clear()
    with pytest.raises(InputError):
        prepare(server, tmp_path, "--seed=7")
    assert len(load_from_disk(str(tmp_path / "out"))["train"]) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_full_disk_is_said_and_nothing_half_written_stays(share, original, undisturbed, tmp_path, capfd):
    """No file may grow beyond a share of the largest: what the system answers then is nearly what a full disk does."""
    limit = int(share * max(path.stat().st_size for path in (undisturbed / "out").rglob("*")))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = [f"--coco_dir={original}", f"--save_path={tmp_path / 'out'}", "--limit_data=30"]
    arguments += ["--encoder=tiny", "--decoder=tiny", "--num_proc=1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: dataloader.main(arguments))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.value.code == 2
    assert "the disk is full; make room" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_fetching_keeps_what_is_whole(server, undisturbed, tmp_path, capfd):
    largest = max(path.stat().st_size for path in (undisturbed / "cache").rglob("*.jpg"))
    prepare(server, tmp_path, "--limit_data=3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: prepare(server, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.value.code == 2 and "the disk is full" in capfd.readouterr().err
    assert sum(map(len, load_from_disk(str(tmp_path / "out")).values())) == 3, "the earlier folder stays"
    assert not leftovers(tmp_path)
    prepare(server, tmp_path)
    assert_same(tmp_path / "out", undisturbed / "out")
