"""Captions over HTTP: `POST /caption`, `GET /health`, and a guard in front of every route, the page's too.

    app = guarded(make_app(captioner), Access("127.0.0.1"))

    curl -F image=@photo.jpg http://127.0.0.1:7860/caption
    curl -H 'Content-Type: application/json' -d '{"url": "https://example.com/photo.jpg"}' http://127.0.0.1:7860/caption

Needs FastAPI, which Gradio brings. The model does one thing at a time. Whoever comes waits in a short queue. Where it
is full, the answer is 503 at once, so that memory stays flat. A body has a size and a time within which it has to
arrive, and while it arrives nobody else waits for it. A client that still sends when it is refused gets its answer all
the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import html
import json
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

from captioning import InputError, cli
from captioning.data import images
from captioning.data.fetch import FetchError
from captioning.show.guard import LOOPBACK, Guard

Receive: TypeAlias = Callable[[], Awaitable[Any]]  # of ASGI
Send: TypeAlias = Callable[[Any], Awaitable[None]]
KEEP_ALIVE = 75  # seconds; longer than proxies and clients keep a connection that is idle, so that they close it
MOST_DROPPED = 5  # times the most bytes of a body: what is read of a request that is refused already
MOST_BEAMS, MOST_TOKENS, MOST_ALTERNATIVES = 10, 200, 10  # that a request may ask for


@dataclass(frozen=True)
class Limits:
    """What a service takes on at once."""

    head_seconds: float = 30.0  # for the head of a request to arrive
    body_bytes: int = 20_000_000  # of one request
    body_seconds: float = 30.0  # for its last byte to arrive, and a second more for each `body_rate` bytes
    body_rate: int = 100_000
    bodies: int = 64  # that arrive at once; they lie on disk
    waiting: int = 32  # images that wait for the model
    wait_seconds: float = 30.0  # for the model to be free
    fetches: int = 8  # addresses that are fetched at once


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Args:
        host: what the service listens on.
        token: what has to come as `Authorization: Bearer ...`, or once as `/?token=...` in a browser.

    Raises:
        InputError: others than this machine can reach the service, and there is no token.
    """

    host: str
    token: str | None = None

    def __post_init__(self):
        if self.token is not None and not re.fullmatch(r"[\w.~+/=-]+", self.token, re.ASCII):
            raise InputError("--token may have letters, digits and . ~ + / = - _; choose such a one")
        if not self.local and not self.token:
            raise InputError(
                f"--host {self.host} opens the page to everybody who reaches this machine: choose a password with "
                "--token, or in the environment variable CAPTIONING_TOKEN"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Options:
    """What a request may ask for beside its image; None: as the model was saved.

    Raises:
        InputError: a value is out of range.
    """

    num_beams: int | None = None
    max_new_tokens: int | None = None
    alternatives: int = 1

    def __post_init__(self):
        for name, most in (
            ("num_beams", MOST_BEAMS),
            ("max_new_tokens", MOST_TOKENS),
            ("alternatives", MOST_ALTERNATIVES),
        ):
            value = getattr(self, name)
            if value is None and name != "alternatives":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"the option {name} is {value!r}, not a whole number between 1 and {most}")

    @classmethod
    def read(cls, given: dict[str, Any]) -> Options:
        """From JSON values, or from the texts of a form."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise InputError(f"'{unknown[0]}' is not known; a request may have {', '.join(sorted(known))}")
        return cls(**{name: int(v) if isinstance(v, str) and v.isdecimal() else v for name, v in given.items()})


class Refused(Exception):
    """A request that gets a status and a sentence instead of a caption."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Queue:
    """One thing at a time, a bounded number of others waiting, nobody for ever."""

    def __init__(self, limits: Limits):
        self.limits, self.waiting = limits, 0
        self.turn = asyncio.Semaphore(1)
        self.thread = ThreadPoolExecutor(1, "model")  # of its own: slow fetches hold those that all share

    def refuse_if_full(self) -> None:
        """Raise Refused where no more may wait."""
        if self.waiting >= self.limits.waiting:
            raise Refused(503, "too many images wait already; try again in a few seconds")

    async def run(self, work: Callable[[], Any], gone: Callable[[], Awaitable[bool]]) -> Any:
        """The result of `work`, done in a thread.

        Args:
            gone: whether the client has left; its work is not begun then.

        Raises:
            Refused: too many wait, or the wait was too long.
        """
        self.refuse_if_full()
        self.waiting += 1
        try:
            await asyncio.wait_for(self.turn.acquire(), self.limits.wait_seconds)
        except TimeoutError:
            raise Refused(503, "the model was busy for too long; try again in a few seconds") from None
        finally:
            self.waiting -= 1
        try:
            if await gone():
                raise Refused(499, "the client has left")
            return await asyncio.get_running_loop().run_in_executor(self.thread, work)
        finally:
            self.turn.release()


def make_app(captioner: Any, limits: Limits | None = None, public: bool = False) -> Any:
    """The FastAPI application, without its guard.

    Args:
        captioner: `serve.Captioner`.
        public: fetch from the internet only, not from this machine or local networks: others may ask.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    limits = limits or Limits()
    app = FastAPI(title="Image captioner", version="1", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    queue, began = Queue(limits), time.time()
    bodies, fetches = asyncio.Semaphore(limits.bodies), asyncio.Semaphore(limits.fetches)
    fetchers = ThreadPoolExecutor(limits.fetches, "fetch")

    async def given(request: Request) -> tuple[Any, Options]:
        """What is to be captioned, an upload or an address, and how."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind == "multipart/form-data":
            form = await request.form(max_files=1, max_fields=8, max_part_size=1000)
            upload = form.get("image")
            told = {name: value for name, value in form.items() if name not in ("image", "url")}
            if hasattr(upload, "read"):
                return upload, Options.read(told)
            return _address(form.get("url")), Options.read(told)
        if kind == "application/json":
            try:
                content = json.loads(await request.body())
            except (ValueError, RecursionError):
                raise Refused(400, "the body is not JSON") from None
            if not isinstance(content, dict):
                raise Refused(400, 'the body is not a JSON object such as {"url": "https://..."}')
            return _address(content.pop("url", None)), Options.read(content)
        raise Refused(415, "send an image as multipart/form-data, or its address as JSON")

    async def caption(request: Request) -> Any:
        """The caption of an image that is uploaded, or that lies at an http(s) address."""
        upload: Any = None
        try:
            queue.refuse_if_full()  # at once, before the upload
            if bodies.locked():
                raise Refused(503, "too many uploads at once; try again in a few seconds")
            async with bodies:
                source, options = await given(request)
                if isinstance(source, str):
                    if fetches.locked():
                        raise Refused(503, "too many addresses are fetched at once; try again in a few seconds")
                    async with fetches:
                        fetch = functools.partial(images.read_bytes, source, public=public)
                        data = await asyncio.get_running_loop().run_in_executor(fetchers, fetch)
                    name = source
                else:
                    upload, name, data = source, source.filename or "the image", None
                file: Any = upload and upload.file

                def work() -> dict[str, Any]:
                    # Read here, one at a time: only one image is in memory.
                    return captioner.entry(file.read() if data is None else data, name, options)

                return JSONResponse(await queue.run(work, request.is_disconnected))
        except Refused as error:
            return _refusal(error.status, error.message)
        except ClientDisconnect:
            return _refusal(499, "the client has left")
        except HTTPException as error:  # the form is none
            return _refusal(error.status_code, str(error.detail).rstrip("."))
        except FetchError as error:
            return _refusal(502, str(error))
        except InputError as error:
            return _refusal(400, str(error))
        finally:
            if upload is not None:
                with contextlib.suppress(Exception):
                    await upload.close()

    async def health() -> dict[str, Any]:
        """That the service is up, and how busy it is."""
        return {"status": "ok", "waiting": queue.waiting, "seconds_up": round(time.time() - began)}

    caption.__annotations__ = {"request": Request}  # FastAPI looks names up in the module, and Request is imported here
    app.add_api_route("/caption", caption, methods=["POST"], openapi_extra=_BODY, responses=_ANSWERS)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/docs", lambda: HTMLResponse(docs(app.openapi())), methods=["GET"], include_in_schema=False)
    return app


def _address(url: Any) -> str:
    if not isinstance(url, str) or not re.match(r"https?://", url.strip(), re.IGNORECASE):
        raise Refused(400, "send an image as 'image', or as 'url' its address, which begins with http:// or https://")
    try:
        urlsplit(url.strip())
    except ValueError as error:
        raise Refused(400, f"'url' is no address ({error})") from None
    return url.strip()


def _refusal(status: int, message: str) -> Any:
    from fastapi.responses import JSONResponse

    message = cli.printable(message)
    headers = {"Retry-After": "2"} if status == 503 else {}
    return JSONResponse({"error": f"{message[:1].upper()}{message[1:]}."}, status, headers)


# ---- the guard


def guarded(app: Any, access: Access, limits: Limits | None = None) -> Callable[..., Awaitable[None]]:
    """An ASGI application that lets through to `app` only what may ask.

    * Other origins and rebound names get no answer, see `guard.Guard`. There are no CORS headers.
    * Where a token was chosen, it has to come along.
    * A body that is too large or comes too slowly is cut off, see `Exchange`.
    """
    limits = limits or Limits()

    async def guard(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = _who(scope, headers, access)
        if scope["type"] == "websocket":
            if refusal is None:
                await app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        exchange = Exchange(headers, receive, send, limits)
        if refusal is None and exchange.refusal is None:
            try:
                await app(scope, exchange.receive, exchange.send)
            except Exception:
                if exchange.refusal is None:
                    raise
        if refusal := refusal or exchange.refusal:
            await exchange.refuse(*refusal, access.token or "")

    return Guard(guard, access.host)


class Exchange:
    """One request and its answer: how much may arrive, and how fast, and that the answer arrives too.

    An answer may come before its request has ended. Closed at once, the connection breaks while the client still sends,
    and the client does not see the answer. So the rest is read first, and dropped, with the times of a body and up to
    `MOST_DROPPED` bodies (RFC 9112, 9.6).

    Args:
        headers: the request's, with names in lower case.

    Attributes:
        refusal: (status, message) if the body is refused. The answer of the application is dropped then.
    """

    def __init__(self, headers: dict[str, str], receive: Receive, send: Send, limits: Limits):
        self._receive, self._send, self.limits = receive, send, limits
        self.began, self.arrived, self.answering = time.monotonic(), 0, False  # arrived: bytes since it began
        length = headers.get("content-length", "0")
        self.more = "transfer-encoding" in headers or length != "0"
        self.asked = headers.get("expect", "").lower() != "100-continue"  # or the client waits until it is
        self.refusal: tuple[int, str] | None = None
        if not length.isdecimal() or int(length[:18]) > limits.body_bytes:
            self.refusal = self._too_large()

    def _too_large(self) -> tuple[int, str]:
        return 413, f"the request is larger than {self.limits.body_bytes:,} bytes; make the image smaller"

    async def receive(self) -> Any:
        """What ASGI gives; a body that is cut off looks like a client that has left."""
        self.asked = True
        if not self.more:
            return await self._receive()  # that the client has left
        try:
            message = await self._next()
        except TimeoutError:
            self.refusal = (408, "the request came too slowly; make the image smaller, or try again")
            return {"type": "http.disconnect"}
        if self.arrived > self.limits.body_bytes:  # a body without a length
            self.refusal = self._too_large()
            return {"type": "http.disconnect"}
        return message

    async def _next(self) -> Any:
        """The next piece of the body; TimeoutError where it is late."""
        seconds = self.limits.body_seconds + self.arrived / self.limits.body_rate
        async with asyncio.timeout(self.began + seconds - time.monotonic()):
            message = await self._receive()
        self.more = message.get("more_body", False)
        self.arrived += len(message.get("body", b""))
        return message

    async def send(self, message: Any) -> None:
        """Answer, and read what is left of the request before the answer ends."""
        if self.refusal and not self.answering:
            return
        self.answering = True
        if message["type"] == "http.response.body" and not message.get("more_body") and self.more and self.asked:
            await self._send({**message, "more_body": True})
            self.began, self.arrived = time.monotonic(), 0
            with contextlib.suppress(TimeoutError):
                while self.more and self.arrived < MOST_DROPPED * self.limits.body_bytes:
                    await self._next()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, status: int, message: str, token: str) -> None:
        """Answer in the place of the application, or (303) keep the token of the address in a cookie and go there."""
        if self.answering:
            return
        body = b"" if status == 303 else json.dumps({"error": f"{message[:1].upper()}{message[1:]}."}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"connection", b"close"))
        if status == 303:
            cookie = f"token={token}; Path=/; HttpOnly; SameSite=Strict"
            headers += [(b"location", message.encode()), (b"set-cookie", cookie.encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        self.answering = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _who(scope: Any, headers: dict[str, str], access: Access) -> tuple[int, str] | None:
    """Why a request is refused, if it is."""
    if access.token is None or scope["path"] == "/health":
        return None
    given = [headers.get("authorization", "").removeprefix("Bearer ").strip()]
    given += [part.strip().removeprefix("token=") for part in headers.get("cookie", "").split(";")]
    asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
    wanted = access.token.encode()
    if any(hmac.compare_digest(one.encode(), wanted) for one in given):
        return None
    # A plus sign that was typed as it is reads as a space, which no token has.
    if scope["path"] == "/" and any(hmac.compare_digest(one.replace(" ", "+").encode(), wanted) for one in asked):
        return 303, "/"
    return 401, "send the token of this service: Authorization: Bearer ..., or open /?token=... in a browser"


def make_server(app: Any, limits: Limits | None = None, **settings: Any) -> Any:
    """A `uvicorn.Server` for a guarded application; it also closes connections on which no request comes.

    Args:
        settings: others of `uvicorn.Config`.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    seconds = (limits or Limits()).head_seconds

    class Protocol(H11Protocol):
        head: asyncio.TimerHandle | None = None  # until when the head of the next request has to be there

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.head = self.loop.call_later(seconds, self.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                if self.head:
                    self.head.cancel()
                self.head = None
            elif self.head is None:
                self.head = self.loop.call_later(seconds, self.close)

        def close(self) -> None:
            upgraded = self.transport.get_protocol() is not self  # to a websocket
            if not upgraded and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    config = uvicorn.Config(
        app, http=Protocol, log_level="error", access_log=False, timeout_keep_alive=KEEP_ALIVE, **settings
    )
    return uvicorn.Server(config)


# ---- what /docs says

_FORM = {
    "image": {"type": "string", "format": "binary", "description": "the image; JPEG, PNG, WEBP, GIF, BMP, TIFF, ..."},
    "url": {"type": "string", "description": "or its http(s) address"},
    "num_beams": {"type": "integer", "minimum": 1, "maximum": MOST_BEAMS, "description": "as the model was saved"},
    "max_new_tokens": {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS, "description": "likewise"},
    "alternatives": {"type": "integer", "minimum": 1, "maximum": MOST_ALTERNATIVES, "default": 1},
}
_JSON = {name: value for name, value in _FORM.items() if name != "image"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": _FORM}},
            "application/json": {"schema": {"type": "object", "properties": _JSON, "required": ["url"]}},
        },
    }
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "caption, score, confidence (where the run folder has it), alternatives, seconds"},
    **{
        status: {"description": reason, "content": {"application/json": {"schema": _ERROR}}}
        for status, reason in {
            400: "no image that can be captioned, or an option out of range",
            408: "the request arrived too slowly",
            413: "the request is too large",
            415: "neither multipart/form-data nor JSON",
            502: "the address could not be fetched",
            503: "busy; try again after Retry-After seconds",
        }.items()
    },
}


def docs(schema: dict[str, Any]) -> str:
    """A page that shows the routes of an OpenAPI schema; it loads nothing from elsewhere."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(route.get('description', ''))}</p>"
            )
            for kind, body in route.get("requestBody", {}).get("content", {}).items():
                rows = "".join(
                    f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(value['type'])}</td>"
                    f"<td>{html.escape(_range(value))}</td></tr>"
                    for name, value in body["schema"]["properties"].items()
                )
                parts.append(f"<h3>{html.escape(kind)}</h3><table>{rows}</table>")
            answers = "".join(
                f"<tr><td>{status}</td><td>{html.escape(answer['description'])}</td></tr>"
                for status, answer in route["responses"].items()
            )
            parts.append(f"<h3>answers</h3><table>{answers}</table>")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Image captioner: HTTP</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem;
margin: 2rem auto; padding: 0 1rem; }} td {{ padding: .15rem 1rem .15rem 0; vertical-align: top; }}
pre {{ overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }}</style>
<h1>Captions over HTTP</h1>
<pre>curl -F image=@photo.jpg -F alternatives=3 ADDRESS/caption
curl -H 'Content-Type: application/json' -d '{{"url": "https://example.com/photo.jpg"}}' ADDRESS/caption</pre>
<p>The schema is <a href="/openapi.json">/openapi.json</a> (OpenAPI). The page for people is <a href="/">here</a>.</p>
{"".join(parts)}</html>"""


def _range(value: dict[str, Any]) -> str:
    text = value.get("description", "")
    if "minimum" in value:
        text = f"{value['minimum']:g} to {value['maximum']:g}; " + (text or f"{value['default']} if not given")
    return text
