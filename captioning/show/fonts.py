"""Text in pictures: DejaVu Sans, and fonts of the system for the letters that it lacks.

    font = Font(15, bold=True)
    font.draw(draw, (20, 40), "一只狗 and a dog", "#16181b")

DejaVu Sans ships with matplotlib and has Latin, Greek, Cyrillic, Arabic and Hebrew letters, so that these look the same
everywhere. A letter that no font has is drawn as a box.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ImageDraw, ImageFont, features

from captioning.cli import JOINERS

# What no sentence is set in: symbols in place of letters, pictures, nothing at all.
_USELESS = re.compile("lastresort|blank|emoji|icon|symbol")
_UNUSUAL = re.compile("italic|oblique|mono|condensed|light|thin|black|semi|extra|medium|serif|display|looped")


class Font:
    """A font of one size, with the letters of every font that is there.

    Args:
        size: pixels.
    """

    def __init__(self, size: int, bold: bool = False):
        self.size = size
        self.bold = bold
        self.path = _dejavu(bold)

    def getlength(self, text: str) -> float:
        """How wide `text` is, in pixels."""
        return sum(face.getlength(part) for part, face in self._runs(text))

    def getmetrics(self) -> tuple[int, int]:
        """Pixels above and below the baseline."""
        return _face(self.path, self.size, shaped=False).getmetrics()

    def draw(
        self, draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: str, anchor: str = "ls"
    ) -> None:
        """Draw a line of text.

        Args:
            corner: (x, y) of its left end on the baseline, or what else `anchor` says, as in Pillow.
            anchor: of a text that needs several fonts it is "ls" or "la".
        """
        runs = self._runs(text)
        x, y = corner
        if len(runs) > 1 and anchor == "la":
            y, anchor = y + self.getmetrics()[0], "ls"
        for part, face in runs:
            draw.text((x, y), part, colour, face, anchor=anchor)
            x += face.getlength(part)

    def _runs(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """`text` in parts that one font has all letters of."""
        runs: list[tuple[str, Path]] = []
        for char in text:
            before = runs[-1] if runs else ("", self.path)
            joins = char in JOINERS or unicodedata.category(char).startswith("M")
            # A mark needs the font of its letter. Otherwise DejaVu comes first.
            wanted = (before[1], self.path) if joins else (self.path, before[1])
            path = next((one for one in wanted if ord(char) in _letters(one)), None)
            path = path or system_font(char, self.bold) or before[1]
            if runs and before[1] == path:
                runs[-1] = (before[0] + char, path)
            else:
                runs.append((char, path))
        return [(part, _face(path, self.size, path != self.path or _right_to_left(part))) for part, path in runs]


def _right_to_left(text: str) -> bool:
    return not text.isascii() and any(unicodedata.bidirectional(char) in ("R", "AL") for char in text)


def _dejavu(bold: bool) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")


@functools.cache
def _face(path: Path, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    """The font as Pillow has it. Shaped text joins Arabic letters and runs from right to left where it should."""
    raqm = shaped and features.check("raqm")
    engine = ImageFont.Layout.RAQM if raqm else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=engine)


@functools.cache
def _letters(path: Path) -> frozenset[int]:
    """The characters of a font, none if it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, 15)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def system_font(char: str, bold: bool) -> Path | None:
    """The font of the system that a character is drawn in, if there is one."""
    return next((path for path in system_fonts(bold) if ord(char) in _letters(path)), None)


@functools.cache
def system_fonts(bold: bool) -> Sequence[Path]:
    """The fonts of the system, the best for a caption first."""
    from matplotlib import font_manager

    def rank(path: Path) -> tuple[Any, ...]:
        name = path.stem.lower()
        noto = name.startswith("notosans")
        return bool(_UNUSUAL.search(name)), not noto, ("bold" in name) != bold, name, str(path)

    paths = map(Path, font_manager.findSystemFonts())
    return sorted((path for path in paths if not _USELESS.search(path.stem.lower())), key=rank)
