"""A page open to others: it fetches from the internet only, and answers to its own address only."""

import asyncio
import socket

import pytest
from httpserver import Server, body, redirect

from captioning import InputError
from captioning.data import fetch, images
from captioning.show import guard, serve

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
LOCAL = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("192.0.2.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "198.18.0.1"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "2002:7f00:1::1"),
    *("64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2001:0:7f00:1::1", "2001:0:808:808:0:0:80ff:fffe"),
]


def test_what_is_public():
    assert [address for address in PUBLIC if not fetch.is_public(address)] == []
    assert [address for address in LOCAL if fetch.is_public(address)] == []


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST.", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "0"),
        *(
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "user:word@127.0.0.1",
            "127.0.0.1.",
            "\uff11\uff12\uff17.0.0.1",
        ),
    ],
)
def test_this_machine_is_not_fetched_from_by_any_name(host):
    with Server({"/photo.jpg": body(b"secret")}) as server:
        port = server.url("").rstrip("/").rpartition(":")[2]
        with pytest.raises(fetch.FetchError) as refused:
            fetch.fetch(f"http://{host}:{port}/photo.jpg", public=True, timeout=2, deadline=4)
        assert not server.requests
    assert refused.value.reason in ("of a local network", "no connection", "not a valid address", "too slow")
    if host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "0", "127.1"):
        assert "leads to this machine or to a local network" in str(refused.value)


def test_a_redirect_to_this_machine_is_not_followed(monkeypatch):
    """The first server plays one of the internet."""
    with Server({"/secret": body(b"secret")}) as inner, Server({"/photo": body(b"photo")}) as outer:
        outer.routes["/away"] = redirect(inner.url("/secret"))
        for path, verdicts in (("/photo", [True]), ("/away", [True, False])):
            rest = iter(verdicts)
            monkeypatch.setattr(fetch, "is_public", lambda address, rest=rest: next(rest))
            if path == "/photo":
                assert fetch.fetch(outer.url(path), public=True).data == b"photo"
                continue
            with pytest.raises(fetch.FetchError, match="local network"):
                fetch.fetch(outer.url(path), public=True)
        assert outer.count("/away") == 1 and not inner.requests


def test_a_name_that_leads_elsewhere_the_second_time_is_looked_up_once(monkeypatch):
    asked = []
    real = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        if host != "rebinding.example":
            return real(host, *arguments, **options)
        asked.append(host)
        return real("203.0.113.9" if len(asked) == 1 else "127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "203.0.113.9")
    connected = []
    monkeypatch.setattr(
        "urllib3.util.connection.create_connection",
        lambda address, *_, **__: connected.append(address[0]) or (_ for _ in ()).throw(OSError("not here")),
    )
    with pytest.raises(fetch.FetchError):
        fetch.fetch("http://rebinding.example:8000/photo.jpg", public=True)
    assert (asked, connected) == (["rebinding.example"], ["203.0.113.9"])


def test_one_local_address_among_several_is_enough_to_refuse(monkeypatch):
    def getaddrinfo(host, port, *_, **__):
        return [(2, 1, 6, "", (address, port)) for address in ("93.184.216.34", "10.0.0.7")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(fetch.FetchError, match="local network"):
        fetch.fetch("http://both.example/photo.jpg", public=True)


def test_a_proxy_and_passwords_of_this_machine_are_not_used_for_visitors(monkeypatch, tmp_path):
    with Server() as proxy:
        proxy.default = body(b"through the proxy")
        monkeypatch.setenv("http_proxy", proxy.url(""))
        with pytest.raises(fetch.FetchError):
            fetch.fetch("http://127.0.0.1:9/photo.jpg", public=True)
        assert not proxy.requests


def test_on_the_command_line_the_user_may():
    with Server({"/photo.jpg": body(b"photo")}) as server:
        assert images.read_bytes(server.url("/photo.jpg")) == b"photo"
        with pytest.raises(InputError, match="local network"):
            images.read_bytes(server.url("/photo.jpg"), public=True)


def test_a_captioner_for_others_hands_that_on(monkeypatch):
    asked = []

    def read_bytes(source, public=False):
        asked.append(public)
        raise InputError("enough")

    monkeypatch.setattr(images, "read_bytes", read_bytes)
    model = type("Model", (), {"generation_config": type("Config", (), {"num_beams": 1})})
    bundle = type("Bundle", (), {"model": model, "image_processor": None})
    for public in (False, True):
        serve.Captioner(bundle, public=public).address("http://127.0.0.1/photo.jpg")
    assert asked == [False, True]


# ---- requests to the page


def answered(host: str, headers: dict[str, str], kind: str = "http") -> bool:
    """Whether a page that listens on `host` answers a request with these headers."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(guard.Guard(app, host)(scope, None, send))
    assert bool(reached) != bool(sent)
    if sent and kind == "http":
        assert sent[0]["status"] == 403 and b"own address" in sent[1]["body"]
    return bool(reached)


OWN = [
    {"host": "127.0.0.1:7860"},
    {"host": "localhost:7860"},
    {"host": "[::1]:7860"},
    {"host": "LOCALHOST"},
    {"host": "localhost:7860", "origin": "http://localhost:7860", "sec-fetch-site": "same-origin"},
    {"host": "localhost:7860", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
    {"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a link to the page
]
OTHERS = [
    {},
    {"host": "evil.example:7860"},
    {"host": "localhost.evil.example:7860"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "127.0.0.1@evil.example"},
    {"host": "[::1"},
    {"host": "localhost:7860", "origin": "http://evil.example"},
    {"host": "localhost:7860", "origin": "http://localhost:8000"},
    {"host": "localhost:7860", "origin": "null"},
    {"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    {"host": "localhost:7860", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    {"host": "evil.example:7860", "origin": "http://evil.example:7860", "sec-fetch-site": "same-origin"},
]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_page_answers_to_its_own_address_and_origin_only(kind):
    assert [headers for headers in OWN if not answered("127.0.0.1", headers, kind)] == []
    assert [headers for headers in OTHERS if answered("127.0.0.1", headers, kind)] == []
    assert not answered("127.0.0.1", {"host": "192.168.1.5:7860"}, kind)


def test_a_page_for_others_answers_to_numbers_and_to_the_machines_name():
    for host in ("192.168.1.5:7860", "[fe80::1]:7860", f"{socket.gethostname()}:7860", "localhost:7860"):
        assert answered("0.0.0.0", {"host": host, "origin": f"http://{host}".lower()})
    assert answered("captions.example", {"host": "captions.example:7860"})
    assert [headers for headers in OTHERS if answered("0.0.0.0", headers)] == []


def test_what_is_no_request_passes():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    asyncio.run(guard.Guard(app, "127.0.0.1")({"type": "lifespan"}, None, None))
    assert reached == ["lifespan"]
