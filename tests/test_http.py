"""`POST /caption`: its answers, who gets none, and what it does when many ask at once."""

import asyncio
import contextlib
import importlib.util
import io
import json
import socket
import threading
import time

import load
import pytest
from conftest import free_port
from httpserver import Server, body, status
from PIL import Image

from captioning import InputError
from captioning.data import images
from captioning.model.captioner import load as load_bundle
from captioning.scores import confidence
from captioning.show import http, serve

MISSING = [name for name in ("fastapi", "uvicorn", "python_multipart") if not importlib.util.find_spec(name)]
needs_fastapi = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install gradio")


def jpeg(side=64):
    data = io.BytesIO()
    Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 30).convert("RGB").save(data, "JPEG")
    return data.getvalue()


class Pretended:
    """A captioner that takes its time and notes what it was asked."""

    public = False

    def __init__(self, seconds=0.0):
        self.seconds, self.asked, self.running, self.most = seconds, [], 0, 0

    def entry(self, data, name, options):
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        self.running -= 1
        self.asked.append((len(data), name, options))
        return {"caption": f"{len(data)} bytes"}


@contextlib.contextmanager
def running(captioner, access=None, limits=None, public=False):
    """The service on a port of its own, without the page."""
    app = http.guarded(http.make_app(captioner, limits, public), access or http.Access("127.0.0.1"), limits)
    port = free_port()
    server = http.make_server(app, limits, port=port, timeout_graceful_shutdown=1)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)


def post(port, path="/caption", timeout=20, **options):
    import requests

    answer = requests.post(f"http://127.0.0.1:{port}{path}", timeout=timeout, **options)
    return answer.status_code, answer.json()


@needs_fastapi
def test_an_upload_and_an_address_get_the_captions_of_the_command_line(trained, prepared, capsys):
    import requests

    import inference

    photo = next((prepared / "sample" / "test2014").glob("*.jpg"))
    inference.main([f"--model_path={trained}", str(photo), "--json", "--alternatives=3", "--device=cpu"])
    expected = json.loads(capsys.readouterr().out)
    captioner = serve.Captioner(load_bundle(trained), calibration=confidence.read(trained))
    with running(captioner) as port, Server({"/p.jpg": body(photo.read_bytes()), "/gone": status(404)}) as server:
        files = {"image": ("p.jpg", photo.read_bytes())}
        code, found = post(port, files=files, data={"alternatives": "3"})
        assert code == 200 and found["seconds"]["generate"] > 0
        for one, other in zip([found, *found["alternatives"]], [expected, *expected["alternatives"]], strict=True):
            assert one["caption"] == other["caption"]
            for name in ("score", "confidence"):  # the command line may take other products, which round otherwise
                assert one[name] == pytest.approx(other[name], abs=1e-4)
        assert (
            post(port, json={"url": server.url("/p.jpg"), "alternatives": 3})[1]["alternatives"]
            == found["alternatives"]
        )
        greedy = post(port, files=files, data={"num_beams": "1", "max_new_tokens": "4"})[1]["caption"]
        inference.main([f"--model_path={trained}", str(photo), "--num_beams=1", "--max_new_tokens=4", "--device=cpu"])
        assert greedy == capsys.readouterr().out.strip()
        assert post(port, files=files)[1]["caption"] == expected["caption"], "options of one request stay with it"
        for refused, code, message in (
            ({"json": {"url": server.url("/gone")}}, 502, "404"),
            ({"json": {"url": "file:///etc/passwd"}}, 400, "begins with http"),
            ({"json": {"url": "/etc/passwd"}}, 400, "begins with http"),
            ({"json": {"path": "/etc/passwd"}}, 400, "begins with http"),
            ({"json": {"url": "http://[x/p.jpg"}}, 400, "'url' is no address (Invalid IPv6 URL)"),
            ({"files": files, "data": {"max_new_tokens": "200"}}, 400, "too long: the decoder has 128 positions"),
            ({"json": [1]}, 400, "not a JSON object"),
            ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
            ({"data": b"hello"}, 415, "multipart/form-data"),
            ({"data": b"hello", "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
            ({"files": {"image": ("n.jpg", b"hello")}}, 400, "'n.jpg': not a JPEG"),
            ({"files": files, "data": {"num_beams": "99"}}, 400, "num_beams is 99"),
            ({"files": files, "data": {"alternatives": "many"}}, 400, "alternatives is 'many'"),
            ({"files": files, "data": {"model_path": "x"}}, 400, "'model_path' is not known"),
            ({"json": {"url": server.url("/p.jpg"), "num_beams": True}}, 400, "num_beams is True"),
        ):
            answered, content = post(port, **refused)
            assert (answered, set(content)) == (code, {"error"}) and message in content["error"], content
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=5).json()["status"] == "ok"
        docs = requests.get(f"http://127.0.0.1:{port}/docs", timeout=5).text
        assert (
            "/caption" in docs
            and "num_beams" in docs
            and "1 to 10; as the model was saved" in docs
            and "http"
            not in docs.replace("https://example.com", "")
            .replace("http(s)", "")
            .replace("over HTTP", "")
            .replace("HTTP</title>", "")
        ), "nothing from elsewhere"
        schema = requests.get(f"http://127.0.0.1:{port}/openapi.json", timeout=5).json()
        assert set(schema["paths"]["/caption"]["post"]["requestBody"]["content"]) == {
            "multipart/form-data",
            "application/json",
        }


# ---- who gets no answer


def status_of(access, headers=(), path="/caption", method="POST", query=b"", kind="http"):
    """What the guard says; 200 where it lets the request through."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "query_string": query,
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }

    async def receive():
        return {"type": "http.request"}

    asyncio.run(http.guarded(app, access)(scope, receive, send))
    return sent[0].get("status", sent[0]["type"]), dict(sent[0].get("headers", []))


LOCAL = http.Access("127.0.0.1")
HOST = ("host", "127.0.0.1:7860")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([HOST], 200),
        ([("host", "localhost:9000")], 200),
        ([("host", "[::1]:7860")], 200),
        ([HOST, ("origin", "http://127.0.0.1:7860")], 200),
        ([("host", "rebound.example.com:7860")], 403),
        ([("host", "127.0.0.1.example.com")], 403),
        ([("host", "evil@127.0.0.1@example.com")], 403),
        ([("host", "[")], 403),
        ([], 403),
        ([HOST, ("origin", "http://example.com")], 403),
        ([HOST, ("origin", "http://127.0.0.1:7861")], 403),
        ([HOST, ("origin", "null")], 403),
        ([HOST, ("sec-fetch-site", "cross-site")], 403),
        ([HOST, ("content-length", "20000001")], 413),
        ([HOST, ("content-length", "-1")], 413),
    ],
)
def test_other_origins_and_rebound_names_get_no_answer(headers, code):
    found, answer = status_of(LOCAL, headers)
    assert found == code and not any(name.startswith(b"access-control") for name in answer)


def test_websockets_of_other_origins_are_closed():
    assert status_of(LOCAL, [HOST, ("origin", "http://example.com")], kind="websocket")[0] == "websocket.close"


def test_others_need_the_token():
    with pytest.raises(InputError, match="--token"):
        http.Access("0.0.0.0")
    with pytest.raises(InputError, match="choose such a one"):
        http.Access("0.0.0.0", "a;b")
    access, host = http.Access("0.0.0.0", "secret"), ("host", "10.0.0.7:7860")
    assert status_of(access, [host])[0] == 401
    assert status_of(access, [host, ("authorization", "Bearer wrong")])[0] == 401
    assert status_of(access, [host, ("authorization", "Bearer secret")])[0] == 200
    assert status_of(access, [host, ("cookie", "a=b; token=secret")])[0] == 200
    assert status_of(access, [host, ("cookie", "token=secret"), ("origin", "http://example.com")])[0] == 403
    assert status_of(access, [host], path="/health", method="GET")[0] == 200
    code, answer = status_of(access, [host], path="/", method="GET", query=b"token=secret")
    assert code == 303 and answer[b"location"] == b"/" and b"HttpOnly; SameSite=Strict" in answer[b"set-cookie"]
    assert status_of(access, [host], path="/", method="GET", query=b"token=wrong")[0] == 401
    access = http.Access("0.0.0.0", "a+b")
    code, answer = status_of(access, [host], path="/", method="GET", query=b"token=wrong&token=a+b")
    assert code == 303 and answer[b"set-cookie"].startswith(b"token=a+b;"), "the right one of several, as it is typed"


def test_a_page_open_to_others_refuses_before_it_loads_a_model(tmp_path, monkeypatch):
    import inference

    monkeypatch.delenv("CAPTIONING_TOKEN", raising=False)
    monkeypatch.setattr(serve, "check_gradio", lambda: None)
    monkeypatch.setattr(inference, "load_model", lambda args: pytest.fail("loaded"))
    with pytest.raises(InputError, match="choose a password with --token"):
        inference.main([f"--model_path={tmp_path}", "--serve", "--host=0.0.0.0"])


@needs_fastapi
def test_for_others_this_machine_is_not_fetched_from():
    with running(Pretended(), public=True) as port, Server({"/p.jpg": body(jpeg())}) as server:
        code, found = post(port, json={"url": server.url("/p.jpg")})
        assert code == 502 and "local network" in found["error"]
        assert not server.requests


# ---- many at once


@needs_fastapi
def test_of_two_hundred_at_once_each_gets_a_caption_or_is_told_to_wait():
    captioner, limits = Pretended(0.005), http.Limits(waiting=10, bodies=20, body_bytes=6_000_000)
    bodies = [load.multipart(data) for data in (jpeg(), bytes(1_000_000), jpeg(), jpeg(), bytes(5_900_000))]
    with running(captioner, limits=limits) as port:
        found = asyncio.run(load.load(port, bodies, 200, 3.0))
    assert set(found["statuses"]) == {200, 503} and found["statuses"][200] >= 3
    assert captioner.most == 1, "one image at a time"


@needs_fastapi
@pytest.mark.parametrize(
    ("limits", "token", "kind", "status"),
    [
        (http.Limits(waiting=0), None, "multipart/form-data; boundary=x", 503),
        (http.Limits(bodies=0), None, "multipart/form-data; boundary=x", 503),
        (http.Limits(body_bytes=10_000_000), None, "multipart/form-data; boundary=x", 413),
        (http.Limits(), None, "image/jpeg", 415),
        (http.Limits(), "secret", "multipart/form-data; boundary=x", 401),
    ],
)
def test_who_is_refused_while_it_sends_sees_the_answer(limits, token, kind, status):
    captioner = Pretended()

    async def twice(port):
        client = load.Client(port)
        return [(await client.ask(kind, bytes(15_000_000), keep=True))[0] for _ in range(2)]

    with running(captioner, http.Access("127.0.0.1", token), limits) as port:
        assert asyncio.run(twice(port)) == [status, status]
    assert not captioner.asked


@needs_fastapi
def test_who_asks_before_it_sends_sends_nothing_in_vain():
    async def asked(port, length):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /caption HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        writer.write(f"{head}Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        return int(answer.split()[1])

    with running(Pretended(), limits=http.Limits(body_bytes=1000)) as port:
        assert asyncio.run(asked(port, 2000)) == 413
        assert asyncio.run(asked(port, 900)) == 100


@needs_fastapi
def test_a_slow_client_blocks_nobody_and_is_cut_off():
    async def both(port):
        slow = [asyncio.create_task(load.ask(port, *load.multipart(bytes(2500)), pause=0.2)) for _ in range(5)]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        quick = await load.ask(port, *load.multipart(jpeg()))
        return quick, time.monotonic() - began, [code for code, _ in await asyncio.gather(*slow)]

    with running(Pretended(), limits=http.Limits(body_seconds=3.0)) as port:
        (code, _), seconds, slow = asyncio.run(both(port))
    assert code == 200 and seconds < 2.5
    assert set(slow) == {408}


@needs_fastapi
def test_who_sends_slowly_but_steadily_gets_a_caption():
    with running(Pretended(), limits=http.Limits(body_seconds=0.5, body_rate=200)) as port:
        assert asyncio.run(load.ask(port, *load.multipart(bytes(1000)), pause=0.1))[0] == 200


@needs_fastapi
def test_slow_addresses_block_nobody(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(images, "read_bytes", lambda *_, **__: release.wait(20) and jpeg())

    async def both(port):
        address = ("application/json", b'{"url": "http://example.com/p.jpg"}')
        slow = [asyncio.create_task(load.ask(port, *address)) for _ in range(20)]
        await asyncio.sleep(0.5)
        quick = await asyncio.wait_for(load.ask(port, *load.multipart(jpeg())), 10)
        release.set()
        return quick[0], sorted(code for code, _ in await asyncio.gather(*slow))

    with running(Pretended(), limits=http.Limits(fetches=16)) as port:
        quick, slow = asyncio.run(both(port))
    assert quick == 200 and slow == [200] * 16 + [503] * 4


@needs_fastapi
def test_a_connection_without_a_request_is_closed(capfd):
    with running(Pretended(), limits=http.Limits(head_seconds=0.3)) as port:
        one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for whole, half in ((b"", b""), (b"", one[:20]), (one, one[:20])):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(whole)
                assert not whole or connection.recv(10_000).startswith(b"HTTP/1.1 200 OK")
                connection.sendall(half)
                while connection.recv(10_000):
                    pass  # what is left of the answer, until the service closes
        # One that leaves in the middle of its upload is nobody's error.
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            kind = b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000"
            connection.sendall(b"POST /caption HTTP/1.1\r\nHost: localhost\r\n" + kind + b"\r\n\r\n--x")
        assert post(port, files={"image": ("p.jpg", jpeg())})[0] == 200
    assert capfd.readouterr().err == ""


@needs_fastapi
def test_a_body_larger_than_it_may_be_is_cut_off():
    import requests

    captioner = Pretended()
    with running(captioner, limits=http.Limits(body_bytes=10_000)) as port:
        assert post(port, files={"image": ("p.jpg", bytes(20_000))})[0] == 413
        kind, whole = load.multipart(bytes(40_000))
        endless = (whole[first : first + 1000] for first in range(0, len(whole), 1000))
        headers = {"Content-Type": kind}  # without a length, it is noticed while it arrives
        answer = requests.post(f"http://127.0.0.1:{port}/caption", data=endless, headers=headers, timeout=10)
        assert answer.status_code == 413 and "10,000 bytes" in answer.json()["error"]
        assert post(port, files={"image": ("p.jpg", bytes(5000))})[0] == 200
    assert len(captioner.asked) == 1
