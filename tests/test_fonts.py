"""Letters that DejaVu Sans lacks come from the system's fonts, and all others look the same everywhere."""

from pathlib import Path

import matplotlib
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from captioning.show import fonts, pages
from captioning.show.fonts import Font

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
ONLY_IN_STIX = "\ue130"  # a letter of STIXNonUni.ttf, which ships with matplotlib too; DejaVu Sans lacks it


@pytest.fixture
def system(monkeypatch):
    """Sets the fonts that the system has."""

    def install(*paths: Path) -> None:
        monkeypatch.setattr(fonts, "system_fonts", lambda bold: paths)
        fonts.system_font.cache_clear()

    yield install
    fonts.system_font.cache_clear()


def drawn(font: Font, text: str, anchor: str = "ls") -> bytes:
    page = Image.new("L", (400, 60), 255)
    font.draw(ImageDraw.Draw(page), (10, 30), text, 0, anchor)
    return page.tobytes()


def plainly_drawn(path: Path, text: str, x: float = 10, anchor: str = "ls", engine=ImageFont.Layout.BASIC) -> bytes:
    page = Image.new("L", (400, 60), 255)
    ImageDraw.Draw(page).text((x, 30), text, 0, ImageFont.truetype(path, 15, layout_engine=engine), anchor=anchor)
    return page.tobytes()


@pytest.mark.parametrize("text", ["a dog, 5 €", "Un café à côté", "Чёрная собака", "Μαύρη γάτα", "chạy trên tuyết", ""])
@pytest.mark.parametrize("anchor", ["ls", "la", "ra", "mm"])
def test_letters_of_dejavu_are_drawn_as_by_pillow_alone(system, text, anchor):
    system(FONTS / "STIXNonUni.ttf", FONTS / "cmr10.ttf")
    assert drawn(Font(15), text, anchor) == plainly_drawn(FONTS / "DejaVuSans.ttf", text, anchor=anchor)
    assert drawn(Font(15, True), text, anchor) == plainly_drawn(FONTS / "DejaVuSans-Bold.ttf", text, anchor=anchor)


def test_a_letter_that_dejavu_lacks_comes_from_the_first_font_that_has_it(system, tmp_path):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    system(broken, tmp_path / "gone.ttf", FONTS / "cmr10.ttf", FONTS / "STIXNonUni.ttf", FONTS / "STIXNonUniBol.ttf")
    assert drawn(Font(15), ONLY_IN_STIX) == plainly_drawn(FONTS / "STIXNonUni.ttf", ONLY_IN_STIX)
    font = Font(15)
    whole, left, right = f"dog {ONLY_IN_STIX} cat", "dog ", " cat"
    assert font.getlength(whole) == sum(map(font.getlength, (left, ONLY_IN_STIX, right)))
    assert drawn(font, whole, "la") != drawn(font, left + right, "la")
    # All on one baseline.
    ascent = font.getmetrics()[0]
    page = Image.new("L", (400, 60), 255)
    font.draw(ImageDraw.Draw(page), (10, 30 + ascent), whole, 0)
    assert page.tobytes() == drawn(font, whole, "la")


def test_without_a_font_there_is_a_box(system):
    system()
    for text in ("一只黑狗", "एक कुत्ता", ONLY_IN_STIX):
        assert drawn(Font(15), text) == plainly_drawn(FONTS / "DejaVuSans.ttf", text)
    item = {"image": Image.new("RGB", (8, 8)), "caption": "一只黑狗 बाएँ", "reference": "สุนัข"}
    assert pages.gallery_page([item]).width == 520


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow cannot shape text")
def test_arabic_letters_are_joined_from_right_to_left():
    text = "قطة سوداء"
    joined = plainly_drawn(FONTS / "DejaVuSans.ttf", text, engine=ImageFont.Layout.RAQM)
    assert drawn(Font(15), text) == joined != plainly_drawn(FONTS / "DejaVuSans.ttf", text)


def test_system_fonts_are_ordered_by_how_well_they_suit_a_caption(monkeypatch):
    names = "NotoSansCJK-Bold.ttc Apple.ttf NotoSerifThai-Bold.ttf NotoSansThai-Bold.ttf NotoSansThai-Regular.ttf"
    names += " NotoColorEmoji.ttf LastResort.otf NotoSansMono-Bold.ttf"
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [f"/fonts/{name}" for name in names.split()])
    fonts.system_fonts.cache_clear()
    bold, plain = ([path.stem for path in fonts.system_fonts(bold)] for bold in (True, False))
    fonts.system_fonts.cache_clear()
    unusual = ["NotoSansMono-Bold", "NotoSerifThai-Bold"]
    assert bold == ["NotoSansCJK-Bold", "NotoSansThai-Bold", "NotoSansThai-Regular", "Apple", *unusual]
    assert plain == ["NotoSansThai-Regular", "NotoSansCJK-Bold", "NotoSansThai-Bold", "Apple", *unusual]


def test_a_mark_is_not_parted_from_its_letter():
    text = "สุนัขสีดำวิ่งบนหิมะที่สวนสาธารณะใกล้บ้านของผู้หญิง" * 3
    lines = pages.wrap(text, Font(15), 160, 100)
    assert len(lines) > 3 and "".join(lines) == text
    assert not any("\u0e31" <= line[0] <= "\u0e3a" and line[0] not in "\u0e32\u0e33" for line in lines)
    persian = "می\u200cروم"
    assert pages.wrap(persian, Font(15), 160, 1) == [persian]
