"""What is drawn with Pillow: a gallery of captions, a contact sheet of a data set, where a model looked.

    draw_gallery([{"image": picture, "caption": "a cat", "reference": "a cat on a mat"}], "gallery.png")
    draw_contact_sheet(kept, dropped, "preview.png", counts=(1500, 12))
    draw_explanation(picture, "a cat", [{"text": "a", "probability": 0.9, "attention": grid}, ...], "explanation.png")

Each is written whole or not at all, and the same input gives the same bytes, but for letters that only fonts of the
system have. `..._page` returns the picture itself.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageDraw

from captioning.cli import JOINERS
from captioning.files import replacing
from captioning.show.fonts import Font

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

PAGE_WIDTH = 1040  # pixels, about what a README shows: larger would only be shrunk, text and all
MARGIN = 20  # pixels around the page and between cells
GROUND, BOX, INK, QUIET = "#ffffff", "#ebebeb", "#16181b", "#6a7078"  # page, letterbox, caption, reference
DOUBT = "#8a3f02"  # a doubtful word
CAPTION_SIZE, REFERENCE_SIZE = 15, 13  # pixels
CAPTION_LINES, REFERENCE_LINES = 5, 4  # what is longer ends in an ellipsis
REASON, LIT, BAR = "#8a3f02", "#e8590c", "#2f83bf"  # why an image was dropped, where a model looked, a probability


class Text(NamedTuple):
    """Lines of text in one font and colour."""

    lines: list[str]
    font: Font
    colour: str


class Cell(NamedTuple):
    """A picture (None: an empty box) with a line above it, where there is one, and texts below it."""

    picture: Image.Image | None
    title: str
    texts: list[Text]


class Section(NamedTuple):
    """A grid of cells under a heading, whose texts stand side by side."""

    heading: list[Text]
    cells: list[Cell]


# ---- gallery


def draw_gallery(
    items: Sequence[Mapping[str, Any]], path: str | Path, author: str = "a person", columns: int = 4
) -> None:
    """Draw a grid of pictures, each above the model's caption and one reference, into one PNG.

    Args:
        items: {"image": PIL.Image, "caption": str, "reference": str} each, and "title": str where there is one.
        author: who wrote the references, as in `wording.author`.
    """
    _save_page(gallery_page(items, author, columns), path)


def gallery_page(items: Sequence[Mapping[str, Any]], author: str = "a person", columns: int = 4) -> Image.Image:
    """The picture of `draw_gallery`, RGB; fewer items than columns make wider cells."""
    columns = max(1, min(columns, len(items)))
    width = _cell_width(columns)
    bold, plain = Font(CAPTION_SIZE, bold=True), Font(REFERENCE_SIZE)
    cells = []
    for item in items:
        caption = wrap(item["caption"], bold, width, CAPTION_LINES) or ["(empty)"]
        reference = wrap(f"reference: {item['reference'].strip() or '(empty)'}", plain, width, REFERENCE_LINES)
        texts = [Text(caption, bold, INK), Text(reference, plain, QUIET)]
        cells.append(Cell(item["image"], item.get("title") or "", texts))
    legend = Text([f"reference: a caption written by {author}"], plain, QUIET)
    return _sheet([Section([Text(["model's caption"], bold, INK), legend], cells)], columns)


# ---- contact sheet


def draw_contact_sheet(
    kept: Sequence[Mapping[str, Any]],
    dropped: Sequence[Mapping[str, Any]],
    path: str | Path,
    counts: tuple[int, int],
    odd: Sequence[Mapping[str, Any]] = (),
    findings: Sequence[str] = (),
) -> None:
    """Draw images that were kept, with a caption, and images that were dropped, with the reason, into one PNG.

    Args:
        kept: {"image": PIL.Image, "title": str, "caption": str} each.
        dropped: {"image": PIL.Image | None, "title": str, "reason": str} each; None: it cannot be shown.
        counts: how many were kept and dropped in all.
        odd: images that an audit found, as `dropped`.
        findings: what it found, a line each.
    """
    _save_page(contact_sheet_page(kept, dropped, counts, odd=odd, findings=findings), path)


def contact_sheet_page(
    kept: Sequence[Mapping[str, Any]],
    dropped: Sequence[Mapping[str, Any]],
    counts: tuple[int, int],
    columns: int = 5,
    odd: Sequence[Mapping[str, Any]] = (),
    findings: Sequence[str] = (),
) -> Image.Image:
    """The picture of `draw_contact_sheet`, RGB, PAGE_WIDTH wide."""
    width = _cell_width(columns)
    bold, plain = Font(CAPTION_SIZE, bold=True), Font(REFERENCE_SIZE)

    def section(name: str, items: Sequence[Mapping[str, Any]], count: int, texts: list[Text]) -> Section:
        shown = f"{len(items):,} of {count:,} images" if len(items) < count else f"{count:,} images"
        cells = [Cell(item["image"], item["title"], [text]) for item, text in zip(items, texts, strict=True)]
        return Section([Text([name], bold, INK), Text([shown], plain, QUIET)], cells)

    captions = [wrap(item["caption"], plain, width, CAPTION_LINES) or ["(empty)"] for item in kept]
    reasons = [wrap(item["reason"], bold, width, CAPTION_LINES) for item in dropped]
    sections = [
        section("Kept", kept, counts[0], [Text(lines, plain, INK) for lines in captions]),
        section("Dropped", dropped, counts[1], [Text(lines, bold, REASON) for lines in reasons]),
    ]
    if odd or findings:
        lines = [line for finding in findings for line in wrap(finding, plain, PAGE_WIDTH - 2 * MARGIN, 2)]
        own = [Text(wrap(item["reason"], bold, width, CAPTION_LINES), bold, REASON) for item in odd]
        cells = [Cell(item["image"], item["title"], [text]) for item, text in zip(odd, own, strict=True)]
        sections.append(Section([Text(["Audit"], bold, INK), Text(lines, plain, QUIET)], cells))
    return _sheet(sections, columns)


# ---- a page of sections


def _cell_width(columns: int) -> int:
    # 480: a lone picture is not blown up. 160: below that no caption can be read, so the page grows instead.
    return min(480, max(160, (PAGE_WIDTH - MARGIN) // columns - MARGIN))


def _sheet(sections: list[Section], columns: int) -> Image.Image:
    width = _cell_width(columns)
    height = width * 3 // 4  # of the box that a picture is fitted into; most photographs are 4:3
    plain = Font(REFERENCE_SIZE)
    titled = any(cell.title for section in sections for cell in section.cells)
    box_top = _line_height(plain) + 4 if titled else 0

    # Lay out, then draw: how high the page is shows at the end. y counts from the top of the page; that of a text is
    # its baseline.
    texts: list[tuple[float, float, str, Text]] = []  # x, y, a line, and the text that it is of
    pictures: list[tuple[int, int, Image.Image | None]] = []
    top = 0
    for section in sections:
        top += MARGIN
        first = section.heading[0].font
        x: float = MARGIN
        for text in section.heading:
            texts.append((x, top + first.getmetrics()[0], text.lines[0], text))
            x += text.font.getlength(text.lines[0]) + MARGIN
        top += _line_height(first) + MARGIN
        for start in range(0, len(section.cells), columns):
            bottom = top
            for column, cell in enumerate(section.cells[start : start + columns]):
                left = MARGIN + column * (width + MARGIN)
                pictures.append((left, top + box_top, cell.picture))
                title = Text(wrap(cell.title, plain, width, 1), plain, QUIET)
                texts += [(left, top + plain.getmetrics()[0], line, title) for line in title.lines]
                y = top + box_top + height
                for text in cell.texts:
                    y += 6
                    for line in text.lines:
                        texts.append((left, y + text.font.getmetrics()[0], line, text))
                        y += _line_height(text.font)
                bottom = max(bottom, y)
            top = bottom + MARGIN

    page = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top), GROUND)
    draw = ImageDraw.Draw(page)
    for left, y, picture in pictures:
        draw.rectangle((left, y, left + width - 1, y + height - 1), BOX)
        if picture is None:
            plain.draw(draw, (left + width // 2, y + height // 2), "no picture", QUIET, "mm")
        else:
            _paste_centred(page, fit(picture, width, height), (left, y), (width, height))
    for x, baseline, line, text in texts:
        text.font.draw(draw, (x, baseline), line, text.colour)
    return page


def _paste_centred(page: Image.Image, picture: Image.Image, corner: tuple[int, int], box: tuple[int, int]) -> None:
    """Paste `picture` in the middle of a box of that size and upper left corner."""
    page.paste(picture, (corner[0] + (box[0] - picture.width) // 2, corner[1] + (box[1] - picture.height) // 2))


# ---- explanation

BAR_HEIGHT = 6  # pixels
HEAD_SIZE, WORD_SIZE = 20, 15  # pixels


def draw_explanation(
    image: Image.Image,
    caption: str,
    words: Sequence[Mapping[str, Any]],
    path: str | Path,
    region: tuple[float, float, float, float] = (0, 0, 1, 1),
) -> None:
    """Draw the image and, for each word of its caption, where the model looked, into one PNG.

    The arguments are those of `explanation_page`.
    """
    _save_page(explanation_page(image, caption, words, region), path)


def explanation_page(
    image: Image.Image,
    caption: str,
    words: Sequence[Mapping[str, Any]],
    region: tuple[float, float, float, float] = (0, 0, 1, 1),
) -> Image.Image:
    """The picture of `draw_explanation`, RGB, PAGE_WIDTH wide.

    Args:
        words: {"text": str, "probability": 0 to 1, "attention": floats (rows, columns)} each, in order; of a doubtful
            one "doubtful" is true.
        region: (left, top, right, bottom) of what the model saw, as fractions of the image.
    """
    bold, plain, head = Font(WORD_SIZE, bold=True), Font(REFERENCE_SIZE), Font(HEAD_SIZE, bold=True)
    cells = len(words) + 1
    # About as wide as high, and the last row as full as can be.
    columns = min(range(3, 7), key=lambda n: -cells % n / cells + 0.5 * abs(math.log(n / math.sqrt(1.4 * cells))))
    width = (PAGE_WIDTH - MARGIN) // columns - MARGIN
    image = image.convert("RGB")
    seen = image.crop(_box(region, image.size))
    # Cells as tall as the image needs, within reason.
    height = round(min(1.25 * width, max(0.6 * width, width * seen.height / seen.width)))
    partly = seen.size != image.size
    # From here on at the size of a cell: an image may have 50 million pixels, and is drawn for every word.
    seen, whole = fit(seen, width, height), _only_region_in_colour(fit(image, width, height), region)

    note = (
        "Orange: where the model looked more than elsewhere when it chose the word (cross-attention). "
        "Bar: how probable it found the word, given the words before it."
    )
    if any(word.get("doubtful") for word in words):
        note += " With a question mark: doubtful words, which a person would rather not have used."
    if partly:
        note += " Grey in the first picture: outside of what the model saw."
    lines = wrap(caption, head, PAGE_WIDTH - 2 * MARGIN, CAPTION_LINES) or ["(empty)"]
    legend = wrap(note, plain, PAGE_WIDTH - 2 * MARGIN, 4)
    first = MARGIN + len(lines) * _line_height(head) + 8 + len(legend) * _line_height(plain) + MARGIN
    text_height = 6 + _line_height(bold) + 4 + max(_line_height(plain), BAR_HEIGHT)
    rows = math.ceil(cells / columns)
    size = (MARGIN + columns * (width + MARGIN), first + rows * (height + text_height + MARGIN))
    page = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line in lines:
        head.draw(draw, (MARGIN, y), line, INK, "la")
        y += _line_height(head)
    y += 8
    for line in legend:
        plain.draw(draw, (MARGIN, y), line, QUIET, "la")
        y += _line_height(plain)

    for number, word in enumerate([None, *words]):
        x = MARGIN + number % columns * (width + MARGIN)
        y = first + number // columns * (height + text_height + MARGIN)
        draw.rectangle((x, y, x + width - 1, y + height - 1), BOX)
        _paste_centred(page, highlight(seen, word["attention"]) if word else whole, (x, y), (width, height))
        y += height + 6
        if word is None:
            plain.draw(draw, (x, y), "the image", QUIET, "la")
            continue
        doubt, colour = (" ?", DOUBT) if word.get("doubtful") else ("", INK)
        room = width - round(bold.getlength(doubt))
        bold.draw(draw, (x, y), (wrap(word["text"], bold, room, 1) or ["(blank)"])[0] + doubt, colour, "la")
        y += _line_height(bold) + 4
        reserved = round(plain.getlength("100 %")) + 8
        middle = y + _line_height(plain) // 2
        bar = (x, middle - BAR_HEIGHT // 2, x + width - 1 - reserved, middle + BAR_HEIGHT // 2)
        draw.rectangle(bar, BOX)
        filled = round((bar[2] - bar[0]) * min(1.0, max(0.0, word["probability"])))
        if filled:
            draw.rectangle((bar[0], bar[1], bar[0] + filled, bar[3]), BAR)
        plain.draw(draw, (x + width, y), f"{100 * word['probability']:.0f} %", QUIET, "ra")
    return page


def _only_region_in_colour(image: Image.Image, region: tuple[float, float, float, float]) -> Image.Image:
    """`image` in pale grey, and its colours inside `region`."""
    box = _box(region, image.size)
    pale = image.convert("L").point([120 + round(value * 0.4) for value in range(256)]).convert("RGB")
    pale.paste(image.crop(box), box[:2])
    return pale


def _box(region: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fractions of an image as pixels, a pixel wide and high at least."""
    left, top, right, bottom = (round(part * side) for part, side in zip(region, (*size, *size), strict=True))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def highlight(image: Image.Image, attention: ArrayLike) -> Image.Image:
    """`image` in grey, and over it orange where `attention` is above its average.

    Args:
        attention: floats (rows, columns) of a grid over the image, such as cross-attention by patch.
    """
    import numpy as np

    weights = np.asarray(attention, dtype=np.float32)
    # Even attention stays grey, because only what is above the average counts. Full orange is the peak, or four times
    # the average if the peak is lower than that. The square root makes a quarter of the peak visible.
    average = float(weights.mean())
    strength = np.sqrt(np.clip((weights - average) / max(float(weights.max()) - average, 3 * average, 1e-12), 0, 1))
    grid = Image.fromarray(strength).resize(image.size, Image.Resampling.BICUBIC)
    mask = Image.fromarray((np.clip(np.asarray(grid), 0, 1) * 0.85 * 255).astype(np.uint8))
    grey = image.convert("L").point([70 + round(value * 0.68) for value in range(256)]).convert("RGB")
    return Image.composite(Image.new("RGB", image.size, LIT), grey, mask)


# ---- pictures and text


def _save_page(page: Image.Image, path: str | Path) -> None:
    # 6 bits a channel: a third fewer bytes, and no eye sees it. A palette would be smaller still, but one of
    # 256 colours for twenty photographs shows bands and specks.
    page = page.point([round(round(value * 63 / 255) * 255 / 63) for value in range(256)] * 3)
    with replacing(Path(path)) as part:
        page.save(part, format="PNG", optimize=True)


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`picture` as RGB, as large as fits into width x height pixels, aspect kept; a small one is enlarged."""
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Lines of `text`, each at most `width` pixels wide in `font`; what is cut off ends in an ellipsis."""
    # Control characters, line breaks and lone surrogates, which a font cannot draw, count as spaces.
    text = "".join(c if c.isprintable() or c in JOINERS else " " for c in text[:2000])
    lines: list[str] = []
    line = ""
    for word in text.split():
        if len(lines) > max_lines:
            break  # enough to know that it is cut off
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        line = word
        # A word wider than the cell, such as a web address or a script without spaces, is broken anywhere.
        while len(line) > 1 and font.getlength(line) > width and len(lines) <= max_lines:
            cut = 1
            while font.getlength(line[: cut + 1]) <= width:
                cut += 1
            while cut > 1 and unicodedata.category(line[cut])[0] == "M":  # a mark stays with its letter
                cut -= 1
            lines.append(line[:cut])
            line = line[cut:]
    if line:
        lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last.rpartition(" ")[0] or last[:-1]
        lines[max_lines - 1 :] = [last.rstrip(" ,.;") + "…"]
    return lines


def _line_height(font: Font) -> int:
    return sum(font.getmetrics())  # ascent + descent, pixels
