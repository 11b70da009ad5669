"""The pictures that a person looks at: training curves, a gallery of captions, where a model looked.

draw_curves(trainer.state.log_history, "training_curves.png", best_step=1200)
draw_gallery([{"image": picture, "caption": "a cat", "reference": "a cat on a mat"}], "gallery.png")
draw_explanation(picture, "a cat", [{"text": "a", "probability": 0.9, "attention": grid}, ...], "explanation.png")

Each is written whole or not at all, and the same input gives the same bytes.
"""

import math
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw, ImageFont

from captioning.files import replacing

# ---------------------------------------------------------------------------------------------------------
# Curves

# key in log_history -> name, colour, marker (none where it is logged often, and the line is jagged). One hue for each
# family of scores, told apart by lightness and by marker: blue against orange, and light against dark, survive every
# common kind of colour blindness.
LOSSES = {
    "loss": ("train", "#808080", ""),
    "eval_loss": ("validation", "#111111", "o"),
}
SCORES = {
    "eval_bleu_1": ("BLEU-1", "#56a8de", "o"),
    "eval_bleu_2": ("BLEU-2", "#2f83bf", "o"),
    "eval_bleu_3": ("BLEU-3", "#195f96", "o"),
    "eval_bleu_4": ("BLEU-4", "#0a3a61", "o"),
    "eval_rouge_1": ("ROUGE-1", "#ea9434", "s"),
    "eval_rouge_2": ("ROUGE-2", "#cc6612", "s"),
    "eval_rouge_l": ("ROUGE-L", "#8a3f02", "s"),
    "eval_meteor": ("METEOR", "#2a7d5f", "^"),
}
CIDER = {  # 0 to 10, about 1 for a good model: its own panel
    "reward": ("sampled", "#808080", ""),  # of training images, in self-critical epochs
    "eval_cider_d": ("CIDEr-D", "#7b3f8c", "D"),
}
LINES = LOSSES | SCORES | CIDER

# What people call the scores that metrics.py computes, in the order of a table.
SCORE_NAMES = {
    "loss": "loss",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_lsum": "ROUGE-Lsum",
}

CURVES_STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so the picture is the same everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.markersize": 4,
}
LABEL_SIZE = 9.5  # points; the names at the ends of the lines


def draw_curves(log_history: list[dict], path: str | Path | BinaryIO, best_step: int | None = None) -> None:
    """Draw the losses and the scores by epoch into one PNG (1500 pixels wide), a file or a stream.

    `log_history` is `trainer.state.log_history`; `best_step` is the step of the checkpoint that was kept.
    """
    import matplotlib

    with matplotlib.rc_context(CURVES_STYLE):
        figure = curves_figure(log_history, best_step)
        # Without "Software", which names matplotlib's version, in the file.
        if hasattr(path, "write"):
            figure.savefig(path, format="png", metadata={"Software": None})
            return
        with replacing(Path(path)) as part:
            figure.savefig(part, format="png", metadata={"Software": None})


def curves_figure(log_history: list[dict], best_step: int | None = None):
    """The figure of `draw_curves`: a panel each of losses, scores and CIDEr-D, if logged."""
    from matplotlib.figure import Figure

    losses, scores, cider = (
        {key: points for key in keys if (points := _series(log_history, key))} for keys in (LOSSES, SCORES, CIDER)
    )
    epochs = [epoch for group in (losses, scores, cider) for xs, _ in group.values() for epoch in xs]
    epoch_of = {entry["step"]: entry["epoch"] for entry in log_history if {"step", "epoch"} <= entry.keys()}

    figure = Figure(figsize=(10, 4.8), dpi=150)  # inches, dots an inch
    left = [("Loss (lower is better)", losses)] if losses else []
    right = [("Validation scores (higher is better)", scores)] if scores else []
    right += [("CIDEr-D (higher is better)", cider)] if cider else []
    columns = [column for column in (left, right) if column]
    if not columns:
        figure.text(0.5, 0.5, "no loss and no score was logged", ha="center", color="#777777")
        return figure

    # The margins right of the panels hold the names of the lines.
    grid = figure.add_gridspec(1, len(columns), left=0.085, right=0.87, top=0.88, bottom=0.11, wspace=0.62)
    for place, column in zip(grid, columns, strict=True):
        rows = place.subgridspec(len(column), 1, height_ratios=[2.1, 1][: len(column)], hspace=0.32)
        for row, (title, group) in enumerate(column):
            axes = figure.add_subplot(rows[row])
            axes.set_title(title, loc="left", pad=18 if row == 0 else 6)  # points; 18 leaves room for "kept"
            for key, (xs, ys) in group.items():
                _draw_line(axes, key, xs, ys)
            axes.set_xlim(0, 1.02 * max(epochs) or 1)
            if group is losses:
                axes.set_ylabel("cross-entropy (nats per token)")
            else:
                highest = max(y for _, ys in group.values() for y in ys if math.isfinite(y))
                axes.set_ylim(0, 1.1 * highest or 1)
            if row == len(column) - 1:
                axes.set_xlabel("epoch")
            else:
                axes.tick_params(labelbottom=False)
            if best_step in epoch_of:
                _mark_kept(axes, epoch_of[best_step], name=row == 0)
            _name_ends(axes)
    return figure


def _series(log_history: list[dict], key: str) -> tuple[list[float], list[float]] | None:
    """(epochs, values) logged under `key`, None if no value is finite; a non-finite value becomes NaN, a gap.

    The first entry of an epoch wins: after training, the kept checkpoint is often evaluated once more, and
    the Trainer logs that at the last step, where it would pass for the score of the last weights.
    """
    points = {}
    for entry in log_history:
        if key in entry and "epoch" in entry:
            value = float(entry[key])
            points.setdefault(entry["epoch"], value if math.isfinite(value) else math.nan)
    epochs = sorted(points)
    if not LINES[key][2]:
        # What is logged thousands of times is a black band: draw means over equal numbers of entries instead.
        size = max(1, math.ceil(len(epochs) / 150))
        groups = [epochs[i : i + size] for i in range(0, len(epochs), size)]
        points = {group[-1]: sum(points[epoch] for epoch in group) / len(group) for group in groups}
        epochs = list(points)
    return (epochs, [points[epoch] for epoch in epochs]) if any(map(math.isfinite, points.values())) else None


def _draw_line(axes, key: str, epochs: list[float], values: list[float]) -> None:
    name, colour, marker = LINES[key]
    if sum(map(math.isfinite, values)) == 1:
        marker = "o"  # a line of one point would not be seen
    every = max(1, len(epochs) // 15)  # a marker at each evaluation of a long run would hide its line
    axes.plot(
        epochs,
        values,
        color=colour,
        linewidth=1.6 if marker else 1.2,  # a jagged line is thinner
        marker=marker,
        markevery=((len(epochs) - 1) % every, every),  # so that the last one is marked
        label=name,
        clip_on=False,  # a marker on the edge, such as a score of 0, is shown whole
    )


def _mark_kept(axes, epoch: float, name: bool) -> None:
    """A thin vertical line where the kept checkpoint was saved; `name` says so above the panel."""
    behind = 1.6  # the lines of the scores, but before the grid
    axes.axvline(epoch, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=behind)
    if name:
        where = axes.get_xaxis_transform()  # x in epochs, y as a fraction of the panel
        look = {"ha": "center", "color": "#444444", "size": LABEL_SIZE}
        axes.annotate("kept", (epoch, 1), (0, 4), xycoords=where, textcoords="offset points", **look)


def _name_ends(axes) -> None:
    """Write each line's name beside its end, right of the panel, pushed apart so that no two overlap."""
    ends = []  # (height as a fraction of the panel, epoch, value, line)
    for line in axes.get_lines():
        if line.get_label().startswith("_"):  # the mark of the kept checkpoint
            continue
        x, y = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)][-1]
        ends.append((axes.transLimits.transform((0, y))[1], x, y, line))
    ends.sort(key=lambda end: end[0])

    panel = axes.get_position().height * axes.figure.get_figheight() * 72  # points
    gap = LABEL_SIZE * 1.25 / panel
    up, down = [end[0] for end in ends], [end[0] for end in ends]
    for i in range(1, len(ends)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in reversed(range(len(ends) - 1)):
        down[i] = min(down[i], down[i + 1] - gap)
    # Both keep the gap, so their mean does too, and it leaves a crowd centred on where its lines end.
    heights = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    for i, height in enumerate(heights):
        heights[i] = max(height, i * gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - (len(heights) - 1 - i) * gap)

    for height, (_, x, y, line) in zip(heights, ends, strict=True):
        colour = line.get_color()
        value = f"{y:.3f}" if abs(y) < 10 else f"{y:.3g}"
        axes.annotate(
            f"{line.get_label()}  {value}",
            xy=(x, y),
            xytext=(1.035, height),
            textcoords="axes fraction",
            color=colour,
            size=LABEL_SIZE,
            va="center",
            annotation_clip=False,
            # A thin line from the line's end to the middle of the name's left side.
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


# ---------------------------------------------------------------------------------------------------------
# Gallery

PAGE_WIDTH = 1040  # pixels, about what a README shows: larger would only be shrunk, text and all
MARGIN = 20  # pixels around the page and between cells
GROUND, BOX, INK, QUIET = "#ffffff", "#ebebeb", "#16181b", "#6a7078"  # page, letterbox, caption, reference
CAPTION_SIZE, REFERENCE_SIZE = 15, 13  # pixels
CAPTION_LINES, REFERENCE_LINES = 5, 4  # what is longer ends in an ellipsis
REFERENCE = "reference: "


def draw_gallery(items: list[dict], path: str | Path, columns: int = 4) -> None:
    """Draw a grid of pictures, each above the model's caption and one reference, into one PNG.

    An item is {"image": PIL.Image, "caption": str, "reference": str, "title": str | None}.
    """
    _save_page(gallery_page(items, columns), path)


def _save_page(page: Image.Image, path: str | Path) -> None:
    # 6 bits a channel: a third fewer bytes, and no eye sees it. A palette would be smaller still, but one of
    # 256 colours for twenty photographs shows bands and specks.
    page = page.point([round(round(value * 63 / 255) * 255 / 63) for value in range(256)] * 3)
    with replacing(Path(path)) as part:
        page.save(part, format="PNG", optimize=True)


def gallery_page(items: list[dict], columns: int = 4) -> Image.Image:
    """The picture of `draw_gallery`, RGB; fewer items than columns make wider cells."""
    columns = max(1, min(columns, len(items)))
    width = _cell_width(columns)
    bold, plain = _font("DejaVuSans-Bold.ttf", CAPTION_SIZE), _font("DejaVuSans.ttf", REFERENCE_SIZE)
    cells = []
    for item in items:
        caption = wrap(item["caption"], bold, width, CAPTION_LINES) or ["(empty)"]
        reference = wrap(REFERENCE + (item["reference"].strip() or "(empty)"), plain, width, REFERENCE_LINES)
        cells.append((item["image"], item.get("title"), [(caption, bold, INK), (reference, plain, QUIET)]))
    heading = [("model's caption", bold, INK), (REFERENCE + "a caption written by a person", plain, QUIET)]
    return _sheet([(heading, cells)], columns)


def draw_contact_sheet(kept: list[dict], dropped: list[dict], path: str | Path, counts: tuple[int, int]) -> None:
    """Draw images that were kept, with a caption, and images that were dropped, with the reason, into one PNG.

    Args:
        kept: {"image": PIL.Image, "title": str, "caption": str} each.
        dropped: {"image": PIL.Image | None, "title": str, "reason": str} each; None: it cannot be shown.
        counts: how many were kept and dropped in all.
    """
    _save_page(contact_sheet_page(kept, dropped, counts), path)


def contact_sheet_page(kept: list[dict], dropped: list[dict], counts: tuple[int, int], columns: int = 5) -> Image.Image:
    """The picture of `draw_contact_sheet`, RGB, PAGE_WIDTH wide."""
    width = _cell_width(columns)
    bold, plain = _font("DejaVuSans-Bold.ttf", CAPTION_SIZE), _font("DejaVuSans.ttf", REFERENCE_SIZE)
    sections = []
    for name, items, count in (("kept", kept, counts[0]), ("dropped", dropped, counts[1])):
        cells = []
        for item in items:
            if name == "kept":
                text = (wrap(item["caption"], plain, width, CAPTION_LINES) or ["(empty)"], plain, INK)
            else:
                text = (wrap(item["reason"], bold, width, CAPTION_LINES), bold, "#8a3f02")
            cells.append((item["image"], item["title"], [text]))
        shown = f"{len(items):,} of {count:,} images" if len(items) < count else f"{count:,} images"
        sections.append(([(name.capitalize(), bold, INK), (shown, plain, QUIET)], cells))
    return _sheet(sections, columns)


def _cell_width(columns: int) -> int:
    # 480: a lone picture is not blown up. 160: below that no caption can be read, so the page grows instead.
    return min(480, max(160, (PAGE_WIDTH - MARGIN) // columns - MARGIN))


def _sheet(sections: list[tuple[list, list]], columns: int) -> Image.Image:
    """A page of sections, each a heading and a grid of pictures above texts.

    Args:
        sections: (heading, cells) each. A heading is [(text, font, colour)], side by side; a cell is a picture (None:
            an empty box), a line above it or None, and [(lines, font, colour)] below it.
    """
    width = _cell_width(columns)
    height = width * 3 // 4  # of the box that a picture is fitted into; most photographs are 4:3
    plain = _font("DejaVuSans.ttf", REFERENCE_SIZE)
    titled = any(title for _, cells in sections for _, title, _ in cells)
    box_top = _line_height(plain) + 4 if titled else 0

    # Lay out: texts to draw as (x, y, text, font, colour), pictures as (x, y, picture), y from the top of the page.
    texts, pictures, top = [], [], 0
    for heading, cells in sections:
        top += MARGIN
        x = MARGIN
        for text, font, colour in heading:
            texts.append((x, top + heading[0][1].getmetrics()[0], text, font, colour))
            x += font.getlength(text) + MARGIN
        top += _line_height(heading[0][1]) + MARGIN
        for start in range(0, len(cells), columns):
            bottom = top
            for column, (picture, title, blocks) in enumerate(cells[start : start + columns]):
                x = MARGIN + column * (width + MARGIN)
                pictures.append((x, top + box_top, picture))
                for line in wrap(title or "", plain, width, 1):
                    texts.append((x, top + plain.getmetrics()[0], line, plain, QUIET))
                y = top + box_top + height
                for lines, font, colour in blocks:
                    y += 6
                    for line in lines:
                        texts.append((x, y + font.getmetrics()[0], line, font, colour))
                        y += _line_height(font)
                bottom = max(bottom, y)
            top = bottom + MARGIN

    page = Image.new("RGB", (MARGIN + columns * (width + MARGIN), top), GROUND)
    draw = ImageDraw.Draw(page)
    for x, y, picture in pictures:
        draw.rectangle((x, y, x + width - 1, y + height - 1), BOX)
        if picture is None:
            draw.text((x + width // 2, y + height // 2), "no picture", QUIET, plain, anchor="mm")
            continue
        picture = fit(picture, width, height)
        page.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
    for x, y, text, font, colour in texts:
        draw.text((x, y), text, colour, font, anchor="ls")
    return page


# ---------------------------------------------------------------------------------------------------------
# Explanation

LIT = (232, 89, 12)  # where the model looked: the orange of the curves, on a photograph without colour of its own
PANEL_BAR = 6  # pixels; the height of the bar that shows a word's probability
CAPTION_HEAD, WORD_SIZE = 20, 15  # pixels


def draw_explanation(image: Image.Image, caption: str, words: list[dict], path: str | Path, **layout) -> None:
    """Draw the image and, for each word of its caption, where the model looked, into one PNG.

    The arguments are those of `explanation_page`.
    """
    _save_page(explanation_page(image, caption, words, **layout), path)


def explanation_page(
    image: Image.Image,
    caption: str,
    words: list[dict],
    region: tuple[float, float, float, float] = (0, 0, 1, 1),
) -> Image.Image:
    """The picture of `draw_explanation`, RGB, PAGE_WIDTH wide.

    Args:
        words: {"text": str, "probability": 0 to 1, "attention": floats (rows, columns)} each, in order.
        region: (left, top, right, bottom) of what the model saw, as fractions of the image.
    """
    bold, plain = _font("DejaVuSans-Bold.ttf", WORD_SIZE), _font("DejaVuSans.ttf", REFERENCE_SIZE)
    head = _font("DejaVuSans-Bold.ttf", CAPTION_HEAD)
    cells = len(words) + 1
    # About as wide as high, and the last row as full as can be.
    columns = min(range(3, 7), key=lambda n: -cells % n / cells + 0.5 * abs(math.log(n / math.sqrt(1.4 * cells))))
    width = (PAGE_WIDTH - MARGIN) // columns - MARGIN
    image = image.convert("RGB")
    seen = image.crop(_box(region, image.size))
    # Cells as tall as the image needs, within reason.
    height = round(min(1.25 * width, max(0.6 * width, width * seen.height / seen.width)))
    partly = seen.size != image.size
    # At the size of a cell from here on: an image may have 50 million pixels, and be drawn for every word.
    seen, whole = fit(seen, width, height), fit(image, width, height)
    colours = whole.crop(_box(region, whole.size))
    whole = whole.convert("L").point([120 + round(value * 0.4) for value in range(256)]).convert("RGB")
    whole.paste(colours, _box(region, whole.size)[:2])

    lines = wrap(caption, head, PAGE_WIDTH - 2 * MARGIN, CAPTION_LINES) or ["(empty)"]
    notes = [
        "Orange: where the model looked more than elsewhere when it chose the word (cross-attention). "
        "Bar: how probable it found the word, given the words before it."
    ]
    if partly:
        notes.append("Grey in the first picture: outside of what the model saw.")
    legend = wrap(" ".join(notes), plain, PAGE_WIDTH - 2 * MARGIN, 4)
    first = MARGIN + len(lines) * _line_height(head) + 8 + len(legend) * _line_height(plain) + MARGIN
    text_height = 6 + _line_height(bold) + 4 + max(_line_height(plain), PANEL_BAR)
    rows = math.ceil(cells / columns)
    size = (MARGIN + columns * (width + MARGIN), first + rows * (height + text_height + MARGIN))
    page = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for line in lines:
        draw.text((MARGIN, y), line, INK, head)
        y += _line_height(head)
    y += 8
    for line in legend:
        draw.text((MARGIN, y), line, QUIET, plain)
        y += _line_height(plain)

    pictures = [(whole, None)] + [(_lit(seen, word["attention"]), word) for word in words]
    for number, (picture, word) in enumerate(pictures):
        x = MARGIN + number % columns * (width + MARGIN)
        y = first + number // columns * (height + text_height + MARGIN)
        draw.rectangle((x, y, x + width - 1, y + height - 1), BOX)
        page.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        y += height + 6
        if word is None:
            draw.text((x, y), "the image", QUIET, plain)
            continue
        text = (wrap(word["text"], bold, width, 1) or ["(blank)"])[0]
        draw.text((x, y), text, INK, bold)
        y += _line_height(bold) + 4
        share = f"{100 * word['probability']:.0f} %"
        reserved = round(plain.getlength("100 %")) + 8
        middle = y + _line_height(plain) // 2
        bar = (x, middle - PANEL_BAR // 2, x + width - 1 - reserved, middle + PANEL_BAR // 2)
        draw.rectangle(bar, BOX)
        filled = round((bar[2] - bar[0]) * min(1.0, max(0.0, word["probability"])))
        if filled:
            draw.rectangle((bar[0], bar[1], bar[0] + filled, bar[3]), SCORES["eval_bleu_2"][1])
        draw.text((x + width, y), share, QUIET, plain, anchor="ra")
    return page


def _box(region: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Fractions of an image as pixels, a pixel wide and high at least."""
    left, top, right, bottom = (round(part * side) for part, side in zip(region, (*size, *size), strict=True))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _lit(seen: Image.Image, attention) -> Image.Image:
    """The image without its colours, and over it orange where `attention` (rows, columns) is high."""
    import numpy as np

    weights = np.asarray(attention, dtype=np.float32)
    # What is above the average, so that even attention lights nothing; against the peak, or four times the average
    # where there is no such peak; and by the square root, so that what has a quarter of the peak still shows.
    average = float(weights.mean())
    strength = np.sqrt(np.clip((weights - average) / max(float(weights.max()) - average, 3 * average, 1e-12), 0, 1))
    grid = Image.fromarray(strength).resize(seen.size, Image.Resampling.BICUBIC)
    mask = Image.fromarray((np.clip(np.asarray(grid), 0, 1) * 0.85 * 255).astype(np.uint8))
    grey = seen.convert("L").point([70 + round(value * 0.68) for value in range(256)]).convert("RGB")
    return Image.composite(Image.new("RGB", seen.size, LIT), grey, mask)


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`picture` as RGB, as large as fits into width x height pixels, aspect kept; a small one is enlarged."""
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of `text`, each at most `width` pixels wide in `font`; what is cut off ends in an ellipsis."""
    # Control characters, line breaks and lone surrogates, which a font cannot draw, count as spaces.
    text = "".join(c if c.isprintable() else " " for c in text[:2000])
    lines, line = [], ""
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


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib, `size` in pixels."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())  # ascent + descent, pixels


# ---------------------------------------------------------------------------------------------------------
