"""What TIFF, AVIF, HEIF and JPEG 2000 files say of themselves, checked before a decoder believes it.

Each of these formats lets a file of a few bytes ask for gigabytes. What is here raises ValueError, KeyError, IndexError
or struct.error for a file that does, or that is damaged.
"""

from __future__ import annotations

import struct

MAX_PIECES = 100_000  # strips, tiles, boxes
MAX_TILE = 4_194_304  # pixels of one tile of a TIFF
MAX_META = 1_000_000  # bytes of what an AVIF says of itself

# The tags of a TIFF that decide its pixels: size, bits, compression, colours, strips, tiles, orientation.
_TAGS = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339}
_TAGS |= {347, 530, 531}  # tables of JPEG, and how YCbCr is sampled
_KINDS = {1: "B", 3: "H", 4: "I", 7: "B"}
# None, LZW, JPEG, two names of deflate, PackBits. Not fax, which is of black and white pages.
_COMPRESSIONS = {1, 5, 7, 8, 32946, 32773}


def bare_tiff(data: bytes) -> bytes:
    """The TIFF's first image without metadata; PIL reads every tag, and a thousand may name the same megabytes."""
    order = "<" if data[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    kept: list[bytes] = []
    values: dict[int, tuple[int, ...]] = {}
    for at in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, at)
        if tag not in _TAGS or tag in values:
            continue
        if number > MAX_PIECES:
            raise ValueError("too many pieces")
        letter = _KINDS[kind]
        size = number * struct.calcsize(letter)
        start = at + 8 if size <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
        values[tag] = struct.unpack_from(f"{order}{number}{letter}", data, start)
        kept.append(data[at : at + 12])
    if values.get(259, (1,))[0] not in _COMPRESSIONS or values.get(277, (1,))[0] > 4 or max(values.get(258, (1,))) > 32:
        raise ValueError("an unusual TIFF")
    tile = values.get(322, (0,))[0] * values.get(323, (0,))[0]
    # Strips that all name the same bytes would be read again and again.
    if tile > MAX_TILE or sum(values.get(279, ())) + sum(values.get(325, ())) > 2 * len(data):
        raise ValueError("too large a tile, or strips that overlap")
    padding = b"\0" * (len(data) % 2)
    head = data[:4] + struct.pack(order + "I", len(data) + len(padding))
    own = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # no next image
    return b"".join([head, memoryview(data)[8:], padding, own])


def bare_avif(data: bytes) -> bytes:
    """The AVIF or HEIF without its EXIF block, of which PIL may make gigabytes; how it is turned is said elsewhere."""
    at = 0
    for _ in range(MAX_PIECES):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"meta":
            if not 8 <= size <= MAX_META:
                raise ValueError("too large a head")
            head = data[at : at + size].replace(b"Exif", b"none")
            return b"".join([memoryview(data)[:at], head, memoryview(data)[at + size :]])
        if size < 8:
            break
        at += size
    raise ValueError("no head")


def check_jpeg2000(data: bytes, max_pixels: int) -> None:
    """Refuse a JPEG 2000 whose decoder would take long or much: many tiles, precincts, layers or blocks."""
    start = b"\xff\x4f\xff\x51"
    at = data.index(start) + 2
    if data.find(start, at) >= 0:
        raise ValueError("two images")
    in_tile, end, width, height, components, tiles = False, 0, 0, 0, 0, 0
    for _ in range(MAX_PIECES):
        (marker,) = struct.unpack_from(">H", data, at)
        if marker == 0xFFD9:  # the end
            return
        if marker == 0xFF93:  # a tile's data follows, which the length before it skips
            at, in_tile = end or data.rindex(b"\xff\xd9", at), False
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if marker == 0xFF51:
            right, bottom, left, top, wide, high = struct.unpack_from(">6I", body, 2)
            (components,) = struct.unpack_from(">H", body, 34)
            width, height = right - left, bottom - top
            if width <= 0 or height <= 0 or width * height > max_pixels or components > 4:
                raise ValueError("too many pixels")
            tiles = (width // wide + 2) * (height // high + 2)
            if tiles > 4096:
                raise ValueError("too many tiles")
        elif marker == 0xFF90:
            (size,) = struct.unpack_from(">I", body, 2)
            in_tile, end = True, at + size if size else 0
            if 0 < size < 14:
                raise ValueError("a tile without a length")
        elif marker in (0xFF52, 0xFF53):
            if in_tile or not width:
                raise ValueError("a tile with settings of its own")
            has_precincts, coding = body[0] & 1, body[5:]
            if marker == 0xFF53:
                has_precincts, coding = body[1] & 1, body[2:]
            elif struct.unpack_from(">H", body, 2)[0] > 100:
                raise ValueError("too many layers")
            if min(coding[1], coding[2]) < 2:  # blocks of 16 x 16 at least
                raise ValueError("too small blocks")
            sizes = coding[5 : 6 + coding[0]] if has_precincts else b""
            precincts = 0
            for level, size in enumerate(reversed(sizes)):
                across, down = width >> level >> (size & 15), height >> level >> (size >> 4)
                precincts += (across + 1) * (down + 1) + tiles
            if precincts * components > MAX_PIECES:
                raise ValueError("too many precincts")
        at += 2 + length
    raise ValueError("too many pieces")
