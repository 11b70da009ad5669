"""A real HTTP server on 127.0.0.1 whose routes misbehave as told, for tests of whatever downloads.

    with Server({"/a.jpg": body(jpeg), "/b.jpg": in_turn(status(503), body(jpeg))}) as server:
        read_bytes(server.url("/a.jpg"))
    assert [request.path for request in server.requests] == ["/a.jpg"]

A route is any callable that takes the `http.server` handler and answers through it; the functions below
make the usual ones. A path with no route is answered 404.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Route = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case


class Server:
    """A context manager. `routes` (path -> Route) may be changed while it runs; `requests` are those seen."""

    def __init__(self, routes: dict[str, Route] | None = None, port: int = 0) -> None:
        self.routes = dict(routes or {})
        self.default = status(404)  # of the paths that have no route
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._httpd = _HTTPServer(("127.0.0.1", port), _Handler)
        self._httpd.owner = self
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._httpd.closing.set()  # releases the routes that stall
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._httpd.server_address[1]

    def url(self, path: str, *, userinfo: str = "") -> str:
        return f"http://{userinfo + '@' if userinfo else ''}127.0.0.1:{self.port}{path}"

    def count(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: Server

    def __init__(self, *args) -> None:
        self.closing = threading.Event()
        super().__init__(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.close_connection = True  # one request a connection: a faulty body ends with its connection
        owner = self.server.owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        with owner._lock:
            owner.requests.append(Request(self.command, self.path, headers))
        route = owner.routes.get(self.path) or owner.routes.get(self.path.partition("?")[0]) or owner.default
        with contextlib.suppress(OSError):  # the client may leave at any time
            route(self)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, *_) -> None:
        pass


def reply(
    handler: BaseHTTPRequestHandler,
    content: bytes = b"",
    *,
    code: int = 200,
    headers: dict[str, object] | None = None,
) -> None:
    """Send status, headers, an empty line, and `content` unless the method is HEAD. Nothing is added."""
    handler.send_response_only(code)
    for name, value in (headers or {}).items():
        handler.send_header(name, str(value))
    handler.send_header("Connection", "close")
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


# Ready-made routes


def body(content: bytes, content_type: str = "application/octet-stream", **headers: object) -> Route:
    """An honest answer. Further headers by keyword, `_` for `-`: `body(data, Content_Encoding="gzip")`."""
    extra = {name.replace("_", "-"): value for name, value in headers.items()}

    def route(handler):
        lines = {"Content-Type": content_type, "Content-Length": len(content), **extra}
        reply(handler, content, headers=lines)

    return route


def ranged(content: bytes) -> Route:
    """An honest answer to `Range: bytes=FIRST-` and `bytes=FIRST-LAST` too."""

    def route(handler):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start >= len(content) > 0:
            return reply(handler, code=416, headers={"Content-Range": f"bytes */{len(content)}"})
        part = content[start : int(asked[2]) + 1 if asked and asked[2] else None]
        headers = {"Content-Length": len(part), "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return reply(handler, part, code=206 if asked else 200, headers=headers)

    return route


def status(code: int, content: bytes = b"no") -> Route:
    return lambda handler: reply(handler, content, code=code, headers={"Content-Length": len(content)})


def redirect(location: str, code: int = 302) -> Route:
    return lambda handler: reply(handler, code=code, headers={"Location": location, "Content-Length": 0})


def short(content: bytes, claimed: int) -> Route:
    """Say `claimed` bytes, send `content`, hang up. With `claimed` too low the client stops early."""
    return lambda handler: reply(handler, content, headers={"Content-Length": claimed})


def unsized(content: bytes) -> Route:
    """No Content-Length: the body ends where the connection does."""
    return lambda handler: reply(handler, content)


def chunked(*pieces: bytes, ended: bool = True) -> Route:
    """Transfer-Encoding: chunked; without the closing chunk unless `ended`."""
    content = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    content += b"0\r\n\r\n" if ended else b""
    return lambda handler: reply(handler, content, headers={"Transfer-Encoding": "chunked"})


def endless(block: bytes = bytes(65_536)) -> Route:
    """A body that never ends, with no Content-Length."""

    def route(handler):
        reply(handler)
        while not handler.server.closing.is_set():
            handler.wfile.write(block)

    return route


def stall(content: bytes = b"", claimed: int = 1000) -> Route:
    """Send headers and `content`, then nothing more, the connection open until the server closes."""

    def route(handler):
        reply(handler, content, headers={"Content-Length": claimed})
        handler.server.closing.wait()

    return route


def silence() -> Route:
    """Accept the request and never answer."""
    return lambda handler: handler.server.closing.wait()


def drip(content: bytes, pause: float) -> Route:
    """An honest answer, one byte every `pause` seconds."""

    def route(handler):
        reply(handler, headers={"Content-Length": len(content)})
        _drip(handler, content, pause)

    return route


def drip_headers(pause: float) -> Route:
    """Headers without end, one byte every `pause` seconds."""

    def route(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        _drip(handler, b"x" * 60_000, pause)

    return route


def in_turn(*routes: Route) -> Route:
    """The first request gets the first route, and so on; the last route serves all that follow."""
    left = list(routes)
    lock = threading.Lock()

    def route(handler):
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(handler)

    return route


def raw(content: bytes) -> Route:
    """Exactly these bytes on the wire, status line and all."""
    return lambda handler: handler.wfile.write(content)


def _drip(handler: BaseHTTPRequestHandler, content: bytes, pause: float) -> None:
    for byte in content:
        if handler.server.closing.is_set():
            return
        handler.wfile.write(bytes([byte]))
        time.sleep(pause)
