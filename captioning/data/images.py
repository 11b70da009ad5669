"""Open one image from a file or a URL, safely: bytes -> image in its own mode -> RGB.

    image = open_image("photo.jpg")                  # a PIL image, always RGB, upright
    image = open_image("https://host/photo.jpg")     # the same, fetched
    image = open_image("photo.jpg", min_side=224)    # cheaper: a large JPEG is decoded small

Nothing that a file or a server does may crash, hang or fill the memory of a job that reads thousands of
images. Bad input raises InputError, whose message names the source and the remedy. The limits below hold
a decode under 500 MB of memory and a few seconds, whatever the bytes are.
"""

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# These plugins are not among those that PIL preloads.
from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from captioning import InputError
from captioning.data import headers
from captioning.data.fetch import DEADLINE, MAX_BYTES, SCHEME, TIMEOUT, fetch, shown

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
    "TIFF": 20_000_000,
    "AVIF": 16_000_000,
    "HEIF": 16_000_000,
    "JPEG2000": 5_000_000,
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
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
FORMATS = "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or JPEG 2000 image"
# The endings of files that are looked for in folders; what a file is, its first bytes say.
SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")) | {
    ".jp2",
    ".j2k",
    ".heic",
    ".heif",
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
_OPEN_LOCK = threading.Lock()


class ImageError(InputError):
    """Bytes that are not an image which is opened here.

    Args:
        name: where the bytes are from.
        reason: what is wrong with them; kept as an attribute, for a caller that words its own message.
        remedy: what to do about it.
    """

    def __init__(self, name: str, reason: str, remedy: str, verb: str = "use") -> None:
        super().__init__(f"cannot {verb} {shown(name)}: {reason}; {remedy}")
        self.reason = reason


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


# Reading: a file or an address -> bytes


def read_bytes(
    source: str | os.PathLike,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    deadline: float = DEADLINE,
    public: bool = False,
) -> bytes:
    """Return the bytes of a local file or of an http(s) address; with `public` only of one on the internet.

    `timeout` is the seconds to connect and between two packets, `deadline` the seconds for the whole fetch.
    A `Path` is always local. Raises InputError if there is nothing to read, or more than `max_bytes`.
    """
    if isinstance(source, str) and (scheme := SCHEME.match(source)):
        if scheme[0].lower() not in ("http", "https"):
            raise InputError(
                f"cannot use {shown(source)}: only http and https addresses are fetched; "
                "give a plain path for a local file"
            )
        return fetch(source, max_bytes=max_bytes, timeout=timeout, deadline=deadline, public=public).data
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
        raise ImageError(path, f"more than {max_bytes:,} bytes", "make the image smaller")
    return data


# Decoding: bytes -> an image in its own mode


def decode(data: bytes, name: str, *, min_side: int | None = None) -> Image.Image:
    """Return the first frame of an encoded image in its own mode, upright, decoded to its end.

    With `min_side` (pixels) a JPEG may come out at 1/2, 1/4 or 1/8 of its size, its shorter side still
    `min_side` or more: the decoder then skips most of the work. `name` is for messages. Metadata, colour
    profile included, is left out. Raises InputError for anything else than a whole image of FORMATS within
    MAX_PIXELS.
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
        turn = _UPRIGHT.get(_orientation(exif or image.info.get("exif") or b""))
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


def kind_of(data: bytes, name: str) -> str:
    """Which of FORMATS an image is, a key of MAX_PIXELS, by its first bytes; 1024 are enough.

    Raises:
        ImageError: none of them, or HEIC without its plugin.
    """
    if not data:
        raise ImageError(name, "it is empty", "get it again or leave it out")
    kind = next((kind for magic, kind in _SIGNATURES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
    if data[4:8] == b"ftyp":
        kind = _kind_by_brand(data, name)
    if kind is None:
        page = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        what = "it looks like a web page, not" if page else "not"
        raise ImageError(
            name,
            f"{what} a {FORMATS}",
            "use the address of the image itself" if page else "convert it or leave it out",
        )
    return kind


def _open(data: bytes, name: str) -> tuple[ImageFile.ImageFile, str, bytes]:
    """Return (PIL image not yet decoded, key of MAX_PIXELS, EXIF block where it is known by now)."""
    kind = kind_of(data, name)
    exif, buffered, scans = b"", False, 1
    if kind == "JPEG":
        data, exif, buffered, scans = _bare_jpeg(data)
    elif kind == "PNG":
        data, exif = _bare_png(data)
    elif kind == "TIFF":
        data = headers.bare_tiff(data)
    elif kind in ("AVIF", "HEIF"):
        data = headers.bare_avif(data)
    elif kind == "JPEG2000":
        headers.check_jpeg2000(data, MAX_PIXELS[kind])
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


def _kind_by_brand(data: bytes, name: str) -> str | None:
    """AVIF, or HEIF where its plugin is installed, of a file that begins as MPEG-4's do."""
    brands = {data[at : at + 4] for at in range(8, min(int.from_bytes(data[:4], "big"), 256), 4)}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if not brands & {b"heic", b"heix", b"heim", b"heis", b"mif1"}:
        return None
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        raise ImageError(name, "it is a HEIC image", "run pip install pillow-heif, or convert it") from None
    pillow_heif.register_heif_opener()
    return "HEIF"


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes, bool, int]:
    """Return (the JPEG without metadata, its EXIF block, whether libjpeg buffers all of it, its scans).

    PIL's readers of EXIF and of multi-picture files can be made to take gigabytes. Only what decides the
    pixels is left for it. Raises ValueError, IndexError or struct.error for a file that is no JPEG.
    """
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    exif, frame = b"", b""
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
    kept: list[bytes | memoryview] = [data[:8]]
    exif = b""
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
    extrema: Any = image.getextrema()  # of one band
    low, high = extrema
    if image.mode.startswith("I;16"):
        return 0, 4095 if 255 < high <= 4095 else 65_535  # X-rays have 12 bits
    # I and F do not say what white is, so the values have to.
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
