"""Fetch one http(s) address, safely.

    answer = fetch("https://host/photo.jpg")         # its bytes, at most MAX_BYTES of them

Whatever a server does, a fetch ends within its deadline, and takes no more memory than it may. It raises FetchError,
whose message names the address (without a password) and the remedy.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import re
import socket
import threading
import time
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

from captioning import InputError
from captioning.files import is_full_disk

MAX_BYTES = 50_000_000  # of one response body, or file
TIMEOUT = 10.0  # seconds to connect, and between two packets
DEADLINE = 30.0  # seconds for a whole fetch, redirects included
MAX_REDIRECTS = 5

# Anything with a scheme is an address, so that 'ftp://...' is not looked up as a file name. Two letters at
# least: 'C:' is a drive.
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+(?=://)|(?:data|file|ftps?|https?)(?=:)", re.IGNORECASE)
# Networks of version 6 whose addresses end in one of version 4: compatible ones, and NAT64's.
LAST_32_BITS = [ipaddress.ip_network(each) for each in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")]
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}  # statuses after which the same request may succeed


class FetchError(InputError):
    """An address that could not be fetched, and what whoever fetches many needs to know of it."""

    def __init__(
        self,
        message: str,
        reason: str,
        *,
        transient: bool = False,
        reachable: bool = True,
        status: int | None = None,
        retry_after: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason  # a few words, without the address
        self.transient = transient  # trying again may help
        self.reachable = reachable  # the server was there
        self.status = status  # of the answer, if there was one
        self.retry_after = retry_after  # the header, seconds or a date


@dataclass(frozen=True)
class Answer:
    """What a server sent: `data` (empty if it went to a sink), and of what."""

    data: bytes
    total: int | None = None  # bytes of the whole file, where a span of it was asked for
    version: str = ""  # changes when the file does


def fetch(
    url: str,
    *,
    session=None,
    span: tuple[int, int] | None = None,
    sink: BinaryIO | None = None,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    deadline: float = DEADLINE,
    public: bool = False,
) -> Answer:
    """Fetch an http(s) address, or the bytes of `span` (first, last) of it.

    Args:
        session: a `requests.Session` whose connections are used again; after an error it must not be.
        sink: where the body is written as it comes, instead of being returned.
        max_bytes: of the body, once decompressed.
        timeout: seconds to connect, and between two packets.
        deadline: seconds for the whole fetch, redirects included.
        public: refuse hosts of this machine and of local networks, at every redirect. What a name leads to is looked
            up once, checked, and connected to; proxies and passwords that this machine knows are not used.

    Raises:
        FetchError: it failed. `status` is 200 where a server ignores `span`.
    """
    # In a thread of its own, which is left behind at the deadline. A socket timeout starts again with every
    # packet, and nothing times a name look-up: only a second thread bounds a server that sends its headers
    # one byte at a time.
    result: Future[Answer] = Future()

    def work() -> None:
        try:
            result.set_result(
                _download(
                    url,
                    session or _session(public),
                    span,
                    sink or io.BytesIO(),
                    max_bytes,
                    timeout,
                    deadline,
                    session is None,
                )
            )
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        return result.result(timeout=deadline)
    except TimeoutError:
        raise _too_slow(url, deadline) from None


def _download(
    url: str,
    session,
    span: tuple[int, int] | None,
    sink: BinaryIO,
    max_bytes: int,
    timeout: float,
    deadline: float,
    close: bool,
) -> Answer:
    import requests  # here, since it takes longer to import than the rest of this module
    import urllib3

    began = time.monotonic()
    # identity: images do not shrink, and a compressed body may expand a thousandfold.
    headers = {"Accept-Encoding": "identity"}
    if span:
        headers["Range"] = f"bytes={span[0]}-{span[1]}"
    # `from None` below: the text of these errors can hold the whole address, password included.
    try:
        with session if close else contextlib.nullcontext(session):
            hop = url
            for _ in range(MAX_REDIRECTS + 1):
                _check_address(hop, url)
                with session.get(hop, stream=True, allow_redirects=False, timeout=timeout, headers=headers) as response:
                    location = session.get_redirect_target(response)
                    if location is None:
                        total = _check_answer(response, url, span)
                        _body(response, url, sink, max_bytes, began, deadline)
                        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
                        return Answer(sink.getvalue() if isinstance(sink, io.BytesIO) else b"", total, version)
                    hop = redirect_target(hop, location, url)
            raise FetchError(
                f"cannot fetch {shown(url)}: more than {MAX_REDIRECTS} redirects; use the final address",
                "too many redirects",
            )
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _too_slow(url, timeout) from None
    except requests.exceptions.SSLError:
        raise FetchError(
            f"cannot fetch {shown(url)}: the secure connection failed; check the server's certificate",
            "no secure connection",
        ) from None
    except requests.ConnectionError as error:
        if "of a local network" in str(error):
            raise FetchError(
                f"cannot use {shown(url)}: it leads to this machine or to a local network, from which nothing is "
                "fetched for others; use the address of an image on the web",
                "of a local network",
            ) from None
        raise FetchError(
            f"cannot fetch {shown(url)}: no connection to the server; check the address and the network",
            "no connection",
            transient=True,
            reachable=False,
        ) from None
    except ValueError:  # requests.exceptions.InvalidURL and UnicodeError are among them
        raise _bad_address(url) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError):
        raise _cut_short(url) from None
    except OSError as error:
        if is_full_disk(error):  # of the sink's
            raise
        raise _cut_short(url) from None


def _session(public: bool):
    """A session; with `public` it connects to hosts of the internet only."""
    import requests

    session = requests.Session()
    if not public:
        return session
    from requests.adapters import HTTPAdapter
    from urllib3 import PoolManager, connection, connectionpool
    from urllib3.exceptions import NewConnectionError

    class Checked:
        """A connection to what a name leads to now, if all of that is public."""

        # The classes below join this one with urllib3's connections, which have what the type check misses here.
        def _new_conn(self):
            host = self._dns_host.strip("[]")  # type: ignore[attr-defined]
            found = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)  # type: ignore[attr-defined]
            addresses = [entry[4][0] for entry in found]
            if not addresses or not all(map(is_public, addresses)):
                raise NewConnectionError(self, "of a local network")  # type: ignore[arg-type]
            self._dns_host = addresses[0]
            try:
                return super()._new_conn()  # type: ignore[misc]
            finally:
                self._dns_host = host

    class Http(Checked, connection.HTTPConnection):
        pass

    class Https(Checked, connection.HTTPSConnection):
        pass

    class HttpPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(connectionpool.HTTPSConnectionPool):
        ConnectionCls = Https

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args, **kwargs):
            self.poolmanager = PoolManager()
            self.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}

    session.trust_env = False  # no proxy, which would look names up by itself; no .netrc
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and neither of this machine nor of a local network.

    An address of version 6 that stands for one of version 4 (mapped, compatible, 6to4, Teredo, NAT64) is what that is.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    stands_for = [each for each in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if each is not None]
    if any(ip in network for network in LAST_32_BITS):
        stands_for.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
    if stands_for:
        return all(is_public(str(each)) for each in stands_for)
    return ip.is_global and not ip.is_multicast and not ip.is_site_local


def _check_address(hop: str, url: str) -> None:
    parts = urlsplit(hop)  # ValueError for a malformed host
    if parts.scheme.lower() not in ("http", "https"):
        raise FetchError(
            f"cannot use {shown(url)}: it redirects to {shown(hop)}, and only http and https addresses "
            "are fetched; use the address of the image itself",
            "redirected to another scheme",
        )
    if not parts.hostname or parts.port == 0:  # ValueError for a port that is no number
        raise _bad_address(url)


def redirect_target(hop: str, location: str, url: str) -> str:
    """The address that a redirect from `hop` to `location` leads to, `url` being what was asked for.

    Raises:
        FetchError: it would leave https for http.
    """
    target = urljoin(hop, location)
    if urlsplit(hop).scheme.lower() == "https" and urlsplit(target).scheme.lower() == "http":
        raise FetchError(
            f"cannot use {shown(url)}: it redirects from https to the unprotected {shown(target)}; "
            "use that address if you trust it",
            "redirected to another scheme",
        )
    return target


def _check_answer(response, url: str, span: tuple[int, int] | None) -> int | None:
    """Refuse any status but the expected one; return the size of the whole file where a span of it came."""
    if response.status_code != (206 if span else 200):
        raise FetchError(
            f"cannot fetch {shown(url)}: the server answered status {response.status_code}; "
            "check that the address opens in a browser",
            f"status {response.status_code}",
            transient=response.status_code in _TRANSIENT,
            status=response.status_code,
            retry_after=response.headers.get("Retry-After", ""),
        )
    if not span:
        return None
    sent = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", ""))
    if not sent or int(sent[1]) != span[0] or int(sent[2]) != min(span[1], int(sent[3]) - 1):
        raise FetchError(f"cannot use {shown(url)}: the server sent another part than was asked for", "another part")
    return int(sent[3])


def _body(response, url: str, sink: BinaryIO, max_bytes: int, began: float, deadline: float) -> None:
    """Write the body of a streamed requests.Response to `sink`, `max_bytes` at most once decompressed."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise FetchError(
            f"cannot use {shown(url)}: the server sent it compressed in a way that was not asked for; "
            "download it by hand",
            "compressed",
        )
    inflate = zlib.decompressobj(wbits=31) if "gzip" in encoding else None
    length = response.headers.get("Content-Length", "")
    if re.fullmatch(r"[0-9]{1,18}", length) and int(length) > max_bytes:
        raise _too_large(url, max_bytes)

    size = 0
    # read1 returns what one packet brought, where read would wait for a full block past the deadline.
    while chunk := response.raw.read1(65_536, decode_content=False):
        if inflate:
            try:
                chunk = inflate.decompress(chunk, max_bytes + 1 - size)
            except zlib.error:
                raise _cut_short(url) from None
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(url, max_bytes)
        sink.write(chunk)
        if time.monotonic() - began > deadline:  # nobody waits for this thread any more
            raise _too_slow(url, deadline)
    if inflate and not inflate.eof:  # urllib3 raises by itself for a body shorter than its Content-Length
        raise _cut_short(url)


# Messages


def shown(source: str) -> str:
    """Return `source` quoted for a message: no user name or password, no control characters."""
    if scheme := SCHEME.match(source):
        start = len(source) - len(source[scheme.end() + 1 :].lstrip("/"))
        host = re.split(r"[/?#\\]", source[start:], maxsplit=1)[0]
        rest = source[start + len(host) :]
        host = host.rpartition("@")[2]
        # user:pa/ss@host is malformed, and must not be shown either.
        if "@" in rest and not re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:\d*)?", host):
            host, rest = "", rest.rpartition("@")[2]
        source = source[:start] + host + rest
    if len(source) > 300:
        source = source[:300] + "..."
    return repr(source)


def _too_large(source: str, max_bytes: int) -> FetchError:
    return FetchError(f"cannot use {shown(source)}: more than {max_bytes:,} bytes; make the image smaller", "too large")


def _too_slow(url: str, seconds: float) -> FetchError:
    return FetchError(
        f"cannot fetch {shown(url)}: it took more than {seconds:g} seconds; try again",
        "too slow",
        transient=True,
        reachable=False,
    )


def _cut_short(url: str) -> FetchError:
    message = f"cannot fetch {shown(url)}: the connection broke before the end; try again"
    return FetchError(message, "cut short", transient=True)


def _bad_address(url: str) -> FetchError:
    return FetchError(f"cannot use {shown(url)}: not a valid address; check it", "not a valid address")
