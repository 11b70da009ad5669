"""Galleries, contact sheets and explanations: whole files, text inside its cell, no crash at the edges."""

import time

import numpy as np
import pytest
from PIL import Image

from captioning.files import replacing
from captioning.show import pages
from captioning.show.fonts import Font

WORDS = "a small brown dog with a red ball runs across the wet grass of a park while two children watch it"


def photograph(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    """A picture with no plain part."""
    return Image.effect_noise((width, height), 60).convert(mode)


def item(**changed) -> dict:
    gradient = Image.linear_gradient("L").resize((64, 48))
    return {"image": gradient, "caption": "a dog runs", "reference": WORDS, "title": None} | changed


# Gallery


@pytest.mark.parametrize(("count", "size"), [(0, (520, 60)), (1, (520, 490)), (3, (1040, 400)), (8, (1040, 630))])
def test_draw_gallery_grows_with_its_items(tmp_path, count, size):
    path = tmp_path / "gallery.png"
    pages.draw_gallery([item() for _ in range(count)], str(path))
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == pytest.approx(size, abs=25)
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.png"]


def test_a_gallery_of_twenty_pictures_is_a_small_file(tmp_path):
    def noise():  # the worst there is: photographs come to 1 to 1.4 MB
        return Image.merge("RGB", [Image.effect_noise((235, 176), 100) for _ in range(3)])

    pages.draw_gallery([item(image=noise()) for _ in range(20)], tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size < 2_000_000  # in true colour 2,300,000


@pytest.mark.parametrize(
    "changed",
    [
        {"caption": ""},
        {"caption": " \n\t", "reference": ""},
        {"caption": "a\x00b\x1b[31m\r\nc\ud800\u202e", "reference": "\x07"},
        {"caption": "猫が木の上で寝ている" * 20, "reference": "кошка ñ é 😀 \U0010ffff"},
        {"caption": "x" * 5000, "reference": "word " * 3000, "title": "title " * 50},
        {"image": photograph(1, 3000)},
        {"image": photograph(3000, 1)},
        {"image": photograph(mode="RGBA")},
        {"image": photograph(mode="P")},
        {"image": photograph(mode="CMYK")},
        {"image": photograph(mode="1")},
    ],
)
def test_odd_items_are_drawn(tmp_path, changed):
    pages.draw_gallery([item(**changed), item()], tmp_path / "gallery.png")
    Image.open(tmp_path / "gallery.png").verify()


def test_an_item_needs_no_title():
    untitled = {key: value for key, value in item().items() if key != "title"}
    assert pages.gallery_page([untitled]).size == pages.gallery_page([item()]).size
    assert pages.gallery_page([item(title="42")]).height > pages.gallery_page([item()]).height


def test_the_legend_says_who_wrote_the_references():
    by_person, by_program = pages.gallery_page([item()]), pages.gallery_page([item()], author="a program")
    assert by_person.size == by_program.size and by_person.tobytes() != by_program.tobytes()


@pytest.mark.parametrize("text", [WORDS * 3, "x" * 400, "猫が木の上で" * 40, "a https://" + "W" * 90 + " b"])
@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize("width", [160, 480])
def test_wrapped_lines_fit_their_width(text, bold, width):
    font = Font(15, bold)
    whole = pages.wrap(text, font, width, max_lines=1000)
    assert max(font.getlength(line) for line in whole) <= width
    assert "".join(whole).replace(" ", "") == text.replace(" ", "")
    cut = pages.wrap(text, font, width, max_lines=3)
    assert len(cut) <= 3 and max(font.getlength(line) for line in cut) <= width
    assert cut == whole or cut[-1].endswith("…")


def test_wrap_at_its_edges():
    font = Font(15)
    assert pages.wrap("", font, 200, 5) == [] == pages.wrap("\x00 \n", font, 200, 5)
    assert pages.wrap("a  dog\nruns", font, 200, 5) == ["a dog runs"]
    assert pages.wrap("WW", font, 1, 5) == ["W", "W"]  # narrower than a letter: no endless loop


def test_long_text_stays_in_its_cell():
    long = item(image=Image.new("RGB", (64, 48), pages.GROUND), caption=WORDS * 3, reference="W" * 999)
    page = pages.gallery_page([long | {"title": WORDS}] * 8).convert("L")
    cell = (page.width - pages.MARGIN) // 4
    head = 2 * pages.MARGIN + 10  # the legend runs over the gutters, the cells do not
    for column in range(5):
        gutter = (column * cell + 2, head, column * cell + pages.MARGIN - 2, page.height)
        assert page.crop(gutter).getextrema() == (255, 255)
    # Nor do they run off the bottom or into the pictures of the next row.
    assert page.crop((0, page.height - pages.MARGIN + 2, page.width, page.height)).getextrema() == (255, 255)


def test_pictures_keep_their_aspect_and_small_ones_grow():
    assert pages.fit(photograph(64, 64), 240, 180).size == (180, 180)
    assert pages.fit(photograph(640, 320), 240, 180).size == (240, 120)
    assert pages.fit(photograph(100, 300, "L"), 240, 180).mode == "RGB"


# Explanation


def words(count: int, grid: tuple[int, int] = (14, 14)) -> list[dict]:
    """`count` words, the model looking at another patch for each."""
    made = []
    for number in range(count):
        attention = np.full(grid, 0.01)
        attention[number % grid[0], 3] = 1
        made.append(
            {"text": ("dog", "constitutional")[number % 2], "probability": number / count, "attention": attention}
        )
    return made


@pytest.mark.parametrize("count", [0, 1, 5, 8, 12, 20, 40])
@pytest.mark.parametrize("size", [(640, 480), (100, 700), (1, 3000), (64, 64)])
def test_explanations_of_any_length_fill_the_page(count, size):
    caption = " ".join(word["text"] for word in words(count))
    page = pages.explanation_page(photograph(*size), caption, words(count), region=(0.1, 0, 0.9, 1))
    assert page.width == pytest.approx(pages.PAGE_WIDTH, abs=6) and page.height < 3000
    # Nothing runs over the margins.
    grey = page.convert("L")
    for box in ((0, 0, 18, page.height), (page.width - 12, 0, page.width, page.height)):
        assert grey.crop(box).getextrema() == (255, 255)


def test_a_large_image_takes_no_longer_for_every_word():
    began = time.perf_counter()
    pages.explanation_page(Image.new("RGB", (6000, 4000)), "a", words(40), region=(0.25, 0.25, 0.75, 0.75))
    assert time.perf_counter() - began < 10  # drawn at the size of a cell, not of the image
    pages.explanation_page(photograph(3, 1000), "a", words(2), region=(0, 0.4999, 1, 0.5001))  # less than a pixel


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 16), (8, 12), (1, 3)])
def test_orange_lies_where_the_attention_is(grid):
    attention = np.zeros(grid)
    attention[0, grid[1] - 1] = 0.5
    lit = np.asarray(pages.highlight(photograph(140, 140), attention), dtype=int)
    orange = lit[:, :, 0] - lit[:, :, 2] > 120
    rows, columns = np.nonzero(orange)
    assert len(rows)
    assert rows.mean() == pytest.approx(70 / grid[0], abs=140 / grid[0] / 3)
    assert columns.mean() == pytest.approx(140 - 70 / grid[1], abs=140 / grid[1] / 3)


@pytest.mark.parametrize("attention", [np.zeros((7, 7)), np.full((7, 7), 1 / 49)])
def test_even_attention_lights_nothing(attention):
    lit = np.asarray(pages.highlight(photograph(), attention), dtype=int)
    assert (lit[:, :, 0] == lit[:, :, 2]).all()
    pages.explanation_page(photograph(), "a", [{"text": "a", "probability": 1.0, "attention": attention}])


# Contact sheet


def test_a_contact_sheet_shows_what_was_kept_and_what_was_dropped(tmp_path):
    kept = [{"image": photograph(80, 60), "title": "train: a.jpg", "caption": WORDS} for _ in range(7)]
    dropped = [{"image": None, "title": "b.jpg", "reason": "unreadable"}]
    dropped += [{"image": photograph(60, 80, "L"), "title": "c" * 90, "reason": "mode L"}]
    few = pages.contact_sheet_page(kept, dropped, (7, 2))
    assert few.width == pytest.approx(pages.PAGE_WIDTH, abs=6)
    assert pages.contact_sheet_page(kept[:5], dropped, (7, 2)).height < few.height
    assert pages.contact_sheet_page(kept, [], (7, 0)).height < few.height
    assert pages.contact_sheet_page(kept, dropped, (1500, 2)).tobytes() != few.tobytes()  # "7 of 1,500 images"
    pages.draw_contact_sheet(kept, dropped, tmp_path / "sheet.png", (7, 2))
    Image.open(tmp_path / "sheet.png").verify()


def test_odd_words_are_drawn(tmp_path):
    odd = ["\x1b[31m", "", "W" * 300, "猫が木の上で寝ている", "\ud800", "\u202eabc", "<b>&"]
    items = [words(1)[0] | {"text": text} for text in odd]
    pages.draw_explanation(photograph(mode="CMYK"), " ".join(odd), items, tmp_path / "explanation.png")
    Image.open(tmp_path / "explanation.png").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.png"]


# All


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        pages.draw_gallery([item(), item(title="2")], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    with pytest.raises(OSError, match="disk full"), replacing(path) as part:
        part.write_bytes(b"half")
        raise OSError("disk full")
    with pytest.raises(KeyError):
        pages.draw_gallery([{"caption": "no picture"}], path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
