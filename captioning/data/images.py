"""Open one image from a file or a URL, safely: bytes -> image in its own mode -> RGB.

    image = open_image("photo.jpg")                  # a PIL image, always RGB, upright
    image = open_image("https://host/photo.jpg")     # the same, fetched
    image = open_image("photo.jpg", min_side=224)    # cheaper: a large JPEG is decoded small

Nothing that a file or a server does may crash, hang or fill the memory of a job that reads thousands of
images. Bad input raises InputError, whose message names the source and the remedy. The limits below hold
a decode under 500 MB of memory and a few seconds, whatever the bytes are.
"""

import contextlib
import errno
import io
import os
import re
import stat
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

from PIL import Image, ImageFile, WebPImagePlugin  # noqa: F401  (the WebP plugin is not among those PIL preloads)

from captioning import InputError

MAX_BYTES = 50_000_000  # of one file or one response body
TIMEOUT = 10.0  # seconds to connect, and between two packets
DEADLINE = 30.0  # seconds for a whole fetch, redirects included
MAX_REDIRECTS = 5
MAX_SIDE = 32_768  # pixels

# Pixels that may be decoded. PIL holds 4 bytes for a pixel and turning the image upright takes a second
# copy; libjpeg also buffers every coefficient of a progressive JPEG, and libwebp several canvases.
MAX_PIXELS = {
    "JPEG": 50_000_000,
    "progressive JPEG": 25_000_000,
    "PNG": 50_000_000,
    "GIF": 50_000_000,
    "BMP": 50_000_000,
    "WEBP": 16_000_000,
}
# Every scan of a progressive JPEG visits the whole image and may cost a few bytes of file only.
MAX_SCANNED_PIXELS = 500_000_000
MAX_PIECES = 100_000  # segments, chunks or reads: a file of 50 MB can hold millions of empty ones
MAX_JPEG_HEADER = 1_000_000  # bytes before the first scan, metadata aside

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Anything with a scheme is an address, so that 'ftp://...' is not looked up as a file name. Two letters at
# least: 'C:' is a drive.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+(?=://)|(?:data|file|ftps?|https?)(?=:)", re.IGNORECASE)
_OPEN_LOCK = threading.Lock()
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


class ImageError(InputError):
    """Bytes that are not an image which is opened here.

    Args:
        name: where the bytes are from.
        reason: what is wrong with them; kept as an attribute, for who words a message of their own.
        remedy: what to do about it.
    """

    def __init__(self, name: str, reason: str, remedy: str, verb: str = "use") -> None:
        super().__init__(f"cannot {verb} {shown(name)}: {reason}; {remedy}")
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """What a server sent: `data` (empty if it went to a sink), and of what."""

    data: bytes
    total: int | None = None  # bytes of the whole file, where a span of it was asked for
    version: str = ""  # changes when the file does


def open_image(
    source: str | os.PathLike,
    *,
    min_side: int | None = None,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    deadline: float = DEADLINE,
) -> Image.Image:
    """Return the image at `source`, a path or an http(s) address, as an upright RGB image.

    `min_side` (pixels) allows a cheaper decode of large JPEGs, see `decode`; the other limits are those of
    `read_bytes`. Raises InputError.
    """
    name = os.fsdecode(source)
    # Held in no variable, the file's bytes are freed as soon as PIL has its own.
    image = decode(read_bytes(source, max_bytes=max_bytes, timeout=timeout, deadline=deadline), name, min_side=min_side)
    return to_rgb(image, name)


def image_mode(data: bytes, name: str) -> str:
    """Return PIL's mode of the encoded image ("RGB", "L", ...) from its header alone. Raises InputError."""
    with _refusing(name):
        return _open(data, name)[0].mode


# Reading: a file or an address -> bytes


def read_bytes(
    source: str | os.PathLike,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    deadline: float = DEADLINE,
) -> bytes:
    """Return the bytes of a local file or of an http(s) address.

    `timeout` is the seconds to connect and between two packets, `deadline` the seconds for the whole fetch.
    A `Path` is always local. Raises InputError if there is nothing to read, or more than `max_bytes`.
    """
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[0].lower() not in ("http", "https"):
            raise InputError(
                f"cannot use {shown(source)}: only http and https addresses are fetched; "
                "give a plain path for a local file"
            )
        return fetch(source, max_bytes=max_bytes, timeout=timeout, deadline=deadline).data
    return _read_file(os.fsdecode(source), max_bytes)


def _read_file(path: str, max_bytes: int) -> bytes:
    try:
        kind = Path(path).stat().st_mode
        # Looked at before opening: opening a FIFO waits for a writer, perhaps for ever.
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "not a regular file"
            raise InputError(f"cannot read {shown(path)}: it is {what}; give the path of an image file")
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"cannot read {shown(path)}: no such file; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "not a usable file name"
        raise InputError(f"cannot read {shown(path)}: {reason}; check the path") from error
    if len(data) > max_bytes:
        raise _too_large(path, max_bytes)
    return data


def fetch(
    url: str,
    *,
    session=None,
    span: tuple[int, int] | None = None,
    sink: BinaryIO | None = None,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    deadline: float = DEADLINE,
) -> Answer:
    """Fetch an http(s) address, or the bytes of `span` (first, last) of it.

    Args:
        session: a `requests.Session` whose connections are used again; after an error it must not be.
        sink: where the body is written as it comes, instead of being returned.
        max_bytes, timeout, deadline: as in `read_bytes`.

    Raises:
        FetchError: it failed. `status` is 200 where a server ignores `span`.
    """
    # In a thread of its own, which is left behind at the deadline. A socket timeout starts again with every
    # packet, and nothing times a name look-up: only a second thread bounds a server that sends its headers
    # one byte at a time.
    result: Future[Answer] = Future()

    def work() -> None:
        try:
            result.set_result(_download(url, session, span, sink or io.BytesIO(), max_bytes, timeout, deadline))
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
        with contextlib.nullcontext(session) if session else requests.Session() as session:
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
                    hop = _next_hop(hop, location, url)
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
    except requests.ConnectionError:
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # of the sink, not of the connection
            raise
        raise _cut_short(url) from None


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


def _next_hop(hop: str, location: str, url: str) -> str:
    """Return the address that a redirect from `hop` leads to, never one less private than `hop`."""
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


# Decoding: bytes -> an image in its own mode


def decode(data: bytes, name: str, *, min_side: int | None = None) -> Image.Image:
    """Return the first frame of an encoded image in its own mode, upright, decoded to its end.

    With `min_side` (pixels) a JPEG may come out at 1/2, 1/4 or 1/8 of its size, its shorter side still
    `min_side` or more: the decoder then skips most of the work. `name` is for messages. Metadata, colour
    profile included, is left out. Raises InputError for anything else than a whole JPEG, PNG, WEBP, GIF or
    BMP image within MAX_PIXELS.
    """
    with _refusing(name):
        image, kind, exif = _open(data, name)
        del data
        size = image.size
        if min_side and kind.endswith("JPEG"):
            image.draft(None, (min_side, min_side))  # None: the mode stays
        # A draft is what a sequential JPEG takes; a progressive one is buffered whole in any case.
        width, height = image.size if kind == "JPEG" else size
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS[kind]:
            raise ImageError(
                name,
                f"{size[0]}x{size[1]} pixels is too large for a {kind} image "
                f"(limit {MAX_PIXELS[kind] // 1_000_000} million, {MAX_SIDE} a side)",
                "make it smaller",
            )
        image.load()
        # `copy` too gives a plain image, free of the file's buffers and its decoder.
        turn = _UPRIGHT.get(_orientation(exif or image.info.get("exif", b"")))
        upright = image.copy() if turn is None else image.transpose(turn)
        upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
        return upright


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn whatever PIL raises into an InputError about `name`."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(name, "it has too many pixels", "make it smaller") from error
    except Exception as error:
        # Its decoders raise OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error and more
        # for damaged bytes, and a list of them would be out of date with its next release.
        raise ImageError(
            name, "the image is damaged or cut short", "get it again or leave it out", verb="decode"
        ) from error


class _Metered(io.BytesIO):
    """Bytes that may be read in MAX_PIECES pieces: some of PIL's loops take one byte at a time."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_PIECES:
            raise ValueError("too many pieces")
        return super().read(size)


def _open(data: bytes, name: str) -> tuple[ImageFile.ImageFile, str, bytes]:
    """Return (PIL image not yet decoded, key of MAX_PIXELS, EXIF block where it is known by now)."""
    if not data:
        raise ImageError(name, "it is empty", "get it again or leave it out")
    kind = next((kind for magic, kind in _SIGNATURES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
    if kind is None:
        page = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        what = "it looks like a web page, not" if page else "not"
        raise ImageError(
            name,
            f"{what} a JPEG, PNG, WEBP, GIF or BMP image",
            "use the address of the image itself" if page else "convert it or leave it out",
        )
    exif, buffered, scans = b"", False, 1
    if kind == "JPEG":
        data, exif, buffered, scans = _bare_jpeg(data)
    elif kind == "PNG":
        data, exif = _bare_png(data)
    # PIL's warnings are about sizes that are refused here. The filters belong to the whole process, so
    # only one thread at a time may put others in place.
    with _OPEN_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(_Metered(data), formats=[kind])
    if any(tile[0] == "bmp_rle" for tile in image.tile):
        raise ImageError(name, "it is a run-length encoded BMP", "convert it to PNG or JPEG")
    if buffered and scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise ImageError(
            name, f"{image.width}x{image.height} pixels in {scans} scans take too long to decode", "save it again"
        )
    return image, "progressive JPEG" if buffered else kind, exif


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes, bool, int]:
    """Return (the JPEG without metadata, its EXIF block, whether libjpeg buffers all of it, its scans).

    PIL's readers of EXIF and of multi-picture files can be made to take gigabytes. Only what decides the
    pixels is left for it. Raises ValueError, IndexError or struct.error for a file that is no JPEG.
    """
    kept, exif, frame = [b"\xff\xd8"], b"", b""
    view, at, size = memoryview(data), 2, 0
    for _ in range(MAX_PIECES):
        at = data.index(b"\xff", at)
        marker = data[at + 1]
        if marker in (0x00, 0xFF):  # padding
            at += 1
            continue
        if 0xD0 <= marker <= 0xD8:  # markers without a payload
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if marker == 0xDA:  # the first scan: pixels from here on
            if not frame:
                break
            components = frame[9]
            buffered = frame[1] == 0xC2 or data[at + 4] < components
            kept.append(view[at:])
            return b"".join(kept), exif, buffered, data.count(b"\xff\xda", at)
        if marker in (0xC0, 0xC1, 0xC2) and not frame:  # baseline, extended, progressive
            frame = data[at:end]
            kept.append(view[at:end])
        elif marker == 0xE1 and not exif and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = data[at + 4 : end]
        elif marker in (0xC4, 0xDB, 0xDD, 0xE0, 0xEE):  # tables, restart interval, JFIF, Adobe
            kept.append(view[at:end])
        elif not (0xE1 <= marker <= 0xEF or marker == 0xFE):
            break  # arithmetic coding, lossless, hierarchical: browsers do not read them either
        at, size = end, size + len(kept[-1])
        if length < 2 or size > MAX_JPEG_HEADER:
            break
    raise ValueError("not an ordinary JPEG")


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    """Return (the PNG without metadata and animation, its EXIF block).

    PIL would keep up to 64 MB of text. Raises ValueError or struct.error for a file cut short.
    """
    kept, exif = [data[:8]], b""
    view, at = memoryview(data), 8
    for _ in range(MAX_PIECES):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length  # length, kind, payload, checksum
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(view[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        if kind == b"IEND":
            return b"".join(kept), exif
        at = end
    raise ValueError("too many chunks")


def _orientation(exif: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1, which is upright, where it is absent or unreadable."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order:
        with contextlib.suppress(struct.error):  # an entry past the end
            (directory,) = struct.unpack_from(order + "I", tiff, 4)
            (entries,) = struct.unpack_from(order + "H", tiff, directory)
            for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
                tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
                if (tag, kind) == (0x0112, 3):  # Orientation, a short
                    return value
    return 1


# Converting: any mode -> RGB


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Return `image` in mode RGB: transparency over white, 16-bit and float greys scaled to 8 bits.

    An RGB image is returned as it is. Raises InputError where PIL cannot convert it.
    """
    with _refusing(name):
        wide = image.mode[0] in "IF"  # I, I;16, I;16B, F; PIL's own conversion clips: 16 bits come out white
        transparent = image.has_transparency_data and not wide
        if image.mode == "RGB" and not transparent:
            return image
        black, white = _grey_range(image) if wide else (0, 255)
        rgb = Image.new("RGB", image.size, "white")
        rows = max(1, 1_000_000 // image.width)  # in strips: every whole copy may be 200 MB
        for top in range(0, image.height, rows):
            box = (0, top, image.width, min(top + rows, image.height))
            strip = image.crop(box)
            if wide:
                strip = _eight_bit(strip, black, white)
            strip = strip.convert("RGBA" if transparent else "RGB")
            rgb.paste(strip, box, strip if transparent else None)
        return rgb


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Return the values of black and white in a grey image of mode I;16, I or F."""
    if image.mode.startswith("I;16"):
        return 0, 65_535
    low, high = image.getextrema()  # I and F do not say what white is, so the values have to
    if low < 0 or high > 65_535:
        return low, high
    if image.mode == "F" and high <= 1:
        return 0, 1
    return 0, 255 if high <= 255 else 65_535


def _eight_bit(image: Image.Image, black: float, white: float) -> Image.Image:
    scale = 255 / ((white - black) or 1)
    offset = 0.5 - black * scale  # 0.5: the conversion to L cuts the fraction off
    # By way of I, since I;16 does not convert to F.
    image = image if image.mode == "F" else image.convert("I").convert("F")
    return image.point(lambda value: value * scale + offset).convert("L")


# Messages


def shown(source: str) -> str:
    """Return `source` quoted for a message: no user name or password, no control characters."""
    if scheme := _SCHEME.match(source):
        start = scheme.end() + len(re.match(r":/*", source[scheme.end() :])[0])
        host = re.match(r"[^/?#\\]*", source[start:])[0]
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
