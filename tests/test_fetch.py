"""Fetching: addresses, redirects, and servers that misbehave in every way."""

import gzip
import socket
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import free_port
from httpserver import (
    Server,
    body,
    chunked,
    drip,
    drip_headers,
    endless,
    in_turn,
    raw,
    redirect,
    short,
    silence,
    stall,
    status,
    unsized,
)
from pictures import assert_near, drawing, encoded, refusal

from captioning import InputError
from captioning.data.fetch import redirect_target
from captioning.data.images import decode, open_image, read_bytes


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as running:
        yield running


def test_an_image_is_fetched_uncompressed(server):
    server.routes["/a b.png"] = body(b"never")
    server.routes["/a%20b.png"] = body(encoded(drawing()), "text/plain")
    assert_near(open_image(server.url("/a b.png?size=full")), drawing(), 0)
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert server.requests[0].path == "/a%20b.png?size=full"


@pytest.mark.parametrize(
    "address",
    [
        "ftp://host/x.jpg",
        "FILE:///etc/passwd",
        "file:x.jpg",
        "data:image/png;base64,AAAA",
        "gopher://host/x",
        "s3://bucket/x.jpg",
    ],
)
def test_other_schemes_are_refused(address):
    assert "only http and https addresses are fetched" in refusal(open_image, address)


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "http:///x.jpg",
        "http:x.jpg",
        "http://[bad/x.jpg",
        "http://host:port/",
        "http://host:99999/",
        "http://host:0/",
        "http://..bad../x",
        "http://\udcff/",
        "http://%zz/",
        "http://ex\tample/x.jpg",
    ],
)
def test_malformed_addresses_are_refused(address, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    refusal(read_bytes, address)


def no_such_host(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


def test_names_with_a_colon_are_still_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cat:1.png").write_bytes(encoded(drawing()))
    assert open_image("cat:1.png").size == (96, 64)
    assert "no such file" in refusal(open_image, Path("http://host/x.jpg"))
    assert "no such file" in refusal(open_image, "C:\\pictures\\x.jpg")


@pytest.mark.parametrize("code", [204, 206, 301, 304, 400, 403, 404, 418, 500, 503])
def test_any_status_but_200_is_named(server, code):
    server.routes["/x.jpg"] = lambda handler: (handler.send_response(code), handler.end_headers())
    message = refusal(open_image, server.url("/x.jpg"))
    assert f"status {code}" in message and "/x.jpg" in message


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, code):
    server.routes |= {
        "/a": redirect("b/c?d=1#fragment", code),
        "/b/c": redirect("/e", code),
        "/e": redirect(server.url("/f"), code),
        "/f": body(b"found"),
    }
    assert read_bytes(server.url("/a")) == b"found"
    assert [request.path for request in server.requests] == ["/a", "/b/c?d=1", "/e", "/f"]


def test_at_most_five_redirects(server):
    server.routes |= {f"/{step}": redirect(f"/{step + 1}") for step in range(9)}
    server.routes["/9"] = body(b"found")
    assert read_bytes(server.url("/4")) == b"found"
    assert "more than 5 redirects" in refusal(read_bytes, server.url("/3"))
    server.routes["/loop"] = redirect("/loop")
    refusal(read_bytes, server.url("/loop"))
    assert server.count("/loop") == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://host/x.jpg", "data:,x", "//user:secret@[bad/", "http://"]
)
def test_redirects_elsewhere_are_refused(server, target):
    server.routes["/a"] = redirect(target)
    message = refusal(read_bytes, server.url("/a"))
    assert "secret" not in message
    assert ("only http and https" in message) == (not target.startswith(("//", "http")))


def test_no_redirect_leads_from_https_to_http():
    assert "unprotected" in refusal(redirect_target, "https://a/x", "http://b/y", "https://a/x")
    assert redirect_target("https://a/x", "/y", "") == "https://a/y"
    assert redirect_target("http://a/x", "https://b/y", "") == "https://b/y"


def test_a_password_is_sent_but_never_shown(server):
    server.routes |= {"/x": body(b"found"), "/to": redirect("http://me:s3cret@127.0.0.1:1/y")}
    assert read_bytes(server.url("/x", userinfo="me:s3cret")) == b"found"
    assert server.requests[0].headers["authorization"].startswith("Basic ")
    for address in (
        server.url("/404", userinfo="me:s3cret"),
        server.url("/to", userinfo="me:s3cret"),
        "ftp://me:s3cret@host/x",
        "http://me:s3cret@127.0.0.1:1/",
        "http://me:s3cret@[bad/",
        "http://me:s3/cret@host/x",
        "http://me:s3?cret@host/x",
        "http://me:s3#cret@host/x",
        "http:me:s3cret@host/x",
        "http://me:s3cret@host:port/@2x.jpg",
    ):
        message = refusal(open_image, address)
        assert "cret" not in message and "me:" not in message
    assert "/pin@2x.jpg" in refusal(open_image, server.url("/pin@2x.jpg"))
    assert "cret" not in refusal(decode, b"x", "http://me:s3cret@host/x")
    # not even in a traceback
    with pytest.raises(InputError) as caught:
        read_bytes("http://me:s3/cret@host/x")
    assert caught.value.__suppress_context__


def test_a_redirect_does_not_take_the_password_along(server):
    server.routes |= {"/to": redirect(f"http://localhost:{server.port}/x"), "/x": body(b"found")}
    assert read_bytes(server.url("/to", userinfo="me:s3cret")) == b"found"
    assert "authorization" not in server.requests[1].headers


def test_no_connection_and_no_such_host(server, monkeypatch):
    assert "no connection" in refusal(read_bytes, f"http://127.0.0.1:{free_port()}/x.jpg")
    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    assert "no connection" in refusal(read_bytes, "http://no-such-host.invalid/x.jpg")


def test_a_name_server_that_hangs_meets_the_deadline(server, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hang.wait(10) and no_such_host())
    assert "0.3 seconds" in refusal(read_bytes, "http://slow.invalid/x.jpg", deadline=0.3)
    hang.set()


@pytest.mark.parametrize("route", [silence(), stall(), stall(b"half")], ids=["silence", "headers", "half"])
def test_a_stalled_server_times_out(server, route):
    server.routes["/x"] = route
    began = time.monotonic()
    assert "0.3 seconds" in refusal(read_bytes, server.url("/x"), timeout=0.3)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("route", [drip(b"x" * 1000, 0.05), drip_headers(0.05)], ids=["slow-body", "slow-headers"])
def test_a_slow_drip_meets_the_deadline(server, route):
    server.routes["/x"] = route
    began = time.monotonic()
    assert "0.5 seconds" in refusal(read_bytes, server.url("/x"), timeout=0.4, deadline=0.5)
    assert time.monotonic() - began < 3


def test_redirects_count_towards_the_deadline(server):
    server.routes["/x"] = lambda handler: (time.sleep(0.3), redirect("/x")(handler))
    assert "0.5 seconds" in refusal(read_bytes, server.url("/x"), deadline=0.5)


def test_an_abandoned_download_stops(server):
    server.routes["/x"] = drip(b"x" * 1000, 0.02)
    refusal(read_bytes, server.url("/x"), deadline=0.2)
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    "route",
    [
        body(bytes(1001)),
        unsized(bytes(1001)),
        chunked(bytes(600), bytes(600)),
        endless(),
        stall(b"", claimed=10**15),
        body(gzip.compress(bytes(1001)), Content_Encoding="gzip"),
    ],
    ids=["length", "unsized", "chunked", "endless", "claimed", "gzip"],
)
def test_too_large_a_body(server, route):
    server.routes["/x"] = route
    assert "more than 1,000 bytes" in refusal(read_bytes, server.url("/x"), max_bytes=1000)


def test_a_gzip_bomb_is_not_unpacked(server):
    server.routes["/x"] = body(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")
    tracemalloc.start()
    refusal(read_bytes, server.url("/x"), max_bytes=100_000)  # the compressed body is smaller
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "route",
    [
        body(bytes(1000)),
        unsized(bytes(1000)),
        chunked(bytes(600), bytes(400)),
        body(gzip.compress(bytes(1000)), Content_Encoding="GZIP"),
    ],
    ids=["length", "unsized", "chunked", "gzip"],
)
def test_a_body_at_the_limit(server, route):
    server.routes["/x"] = route
    assert read_bytes(server.url("/x"), max_bytes=1000) == bytes(1000)


@pytest.mark.parametrize(
    "route",
    [
        short(b"half", 8),
        chunked(b"half", ended=False),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhalf"),
        body(gzip.compress(b"whole")[:-6], Content_Encoding="gzip"),
        body(b"not gzip at all", Content_Encoding="gzip"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
    ],
    ids=["short", "chunk", "bad-chunk", "gzip-short", "no-gzip", "no-http", "nothing", "many-headers"],
)
def test_a_broken_body(server, route):
    server.routes["/x"] = route
    message = refusal(read_bytes, server.url("/x"))
    assert "connection" in message


def test_a_body_in_an_encoding_not_asked_for(server):
    server.routes["/x"] = body(b"x", Content_Encoding="br")
    assert "compressed" in refusal(read_bytes, server.url("/x"))


def test_a_length_too_low_cuts_the_image(server):
    data = encoded(drawing(), "JPEG")
    server.routes["/x.jpg"] = short(data, len(data) // 2)
    assert "cut short" in refusal(open_image, server.url("/x.jpg"))


def test_a_page_instead_of_an_image(server):
    server.routes["/x.jpg"] = body(b"<!doctype html><title>x</title>", "image/jpeg")
    assert "web page" in refusal(open_image, server.url("/x.jpg"))


def test_the_server_helper_answers_in_turn(server):
    server.routes["/x"] = in_turn(status(503), body(b"found"))
    assert "status 503" in refusal(read_bytes, server.url("/x"))
    assert read_bytes(server.url("/x")) == read_bytes(server.url("/x")) == b"found"
    assert server.count("/x") == 3
