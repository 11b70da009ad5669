"""The curves and the gallery: whole files, the right lines, text inside its cell, no crash at the edges."""

import math
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from captioning.files import replacing
from captioning.show import report

WORDS = "a small brown dog with a red ball runs across the wet grass of a park while two children watch it"


def history(evaluations: int, train: bool = True, **changed: float) -> list[dict]:
    """A log_history of ten training entries an epoch, and one evaluation at the end of each epoch."""
    log = []
    for step in range(1, 10 * max(1, evaluations) + 1):
        stamp = {"epoch": step / 10, "step": step}
        if train:
            log.append({"loss": 2 + 2 / step, "learning_rate": 5e-5, "grad_norm": 1.0} | stamp)
        if evaluations and step % 10 == 0:
            scores = {f"eval_bleu_{n}": 0.8 / n for n in (1, 2, 3, 4)}
            scores |= {"eval_rouge_1": 0.5, "eval_rouge_2": 0.3, "eval_rouge_l": 0.49, "eval_cider_d": 0.9}
            log.append({"eval_loss": 2.5, "eval_runtime": 3.0} | scores | changed | stamp)
    if train:
        log.append({"train_loss": 2.2, "train_runtime": 60.0, **stamp})
    return log


def lines(figure) -> dict:
    """name -> line, of every panel of the figure."""
    found = [line for axes in figure.axes for line in axes.get_lines()]
    return {line.get_label(): line for line in found if not line.get_label().startswith("_")}


def photograph(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    """A picture with no plain part."""
    return Image.effect_noise((width, height), 60).convert(mode)


def item(**changed) -> dict:
    gradient = Image.linear_gradient("L").resize((64, 48))
    return {"image": gradient, "caption": "a dog runs", "reference": WORDS, "title": None} | changed


# Curves


def test_curves_hold_the_logged_series():
    figure = report.curves_figure(history(3), best_step=20)
    loss, scores, cider = figure.axes
    assert loss.get_ylabel() == "cross-entropy (nats per token)"
    assert {line.get_label() for line in loss.get_lines()} >= {"train", "validation"}
    assert set(lines(figure)) == {
        *(
            "train",
            "validation",
            "BLEU-1",
            "BLEU-2",
            "BLEU-3",
            "BLEU-4",
            "ROUGE-1",
            "ROUGE-2",
            "ROUGE-L",
            "CIDEr-D",
        )
    }
    assert list(lines(figure)["BLEU-4"].get_xdata()) == [1, 2, 3]
    assert list(lines(figure)["BLEU-4"].get_ydata()) == pytest.approx([0.2] * 3)
    assert [line.get_label() for line in cider.get_lines()][:1] == ["CIDEr-D"]
    for axes in figure.axes:  # the kept checkpoint, step 20, is of epoch 2
        assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_label().startswith("_")] == [2.0]
    assert [text.get_text() for text in scores.texts].count("kept") == 1


def test_curves_without_a_kept_step_have_no_mark():
    for best_step in (None, 999):
        figure = report.curves_figure(history(2), best_step)
        assert len(lines(figure)) == sum(len(axes.get_lines()) for axes in figure.axes)


def test_rewards_of_sampled_captions_stand_beside_the_validation_score():
    log = [*history(2), *({"reward": 0.5, "epoch": 2 + step / 10, "step": 20 + step} for step in (5, 10))]
    loss, _, cider = report.curves_figure(log).axes
    assert {line.get_label() for line in cider.get_lines()} == {"sampled", "CIDEr-D"}
    assert list(lines(report.curves_figure(log))["sampled"].get_xdata()) == [2.5, 3.0]
    assert max(loss.get_lines()[0].get_xdata()) == 2.0


def test_a_second_evaluation_of_an_epoch_is_not_drawn():
    log = [*history(2), {"eval_bleu_4": 0.9, "epoch": 2.0, "step": 20}]
    assert list(lines(report.curves_figure(log))["BLEU-4"].get_ydata()) == pytest.approx([0.2, 0.2])


def test_a_long_train_loss_is_averaged():
    log = [{"loss": float(step % 2), "epoch": step / 1000, "step": step} for step in range(1, 3001)]
    line = lines(report.curves_figure(log))["train"]
    assert len(line.get_xdata()) == 150
    assert list(line.get_ydata()) == pytest.approx([0.5] * 150)
    assert line.get_xdata()[-1] == 3.0


def test_non_finite_values_are_gaps():
    log = history(3)
    log[4]["loss"] = math.nan
    next(entry for entry in log if "eval_loss" in entry)["eval_loss"] = math.inf
    drawn = lines(report.curves_figure(log))
    assert [math.isnan(y) for y in drawn["train"].get_ydata()].index(True) == 4
    assert math.isnan(drawn["validation"].get_ydata()[0])
    assert "BLEU-4" not in lines(report.curves_figure(history(2, eval_bleu_4=math.nan)))


@pytest.mark.parametrize("evaluations", [1, 30])
def test_names_of_lines_do_not_overlap_and_are_inside_the_picture(evaluations):
    close = {f"eval_{key}": 0.3 for key in ("bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_2", "meteor")}
    log = history(evaluations, eval_bleu_1=0.0, **close)
    with matplotlib.rc_context(report.CURVES_STYLE):
        figure = report.curves_figure(log, best_step=10)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    # Text's own extent: an annotation's would hold its arrow too.
    boxes = [Text.get_window_extent(text, renderer) for axes in figure.axes for text in axes.texts]
    assert len(boxes) == 11 + 2  # the lines, and "kept" over two panels
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize(
    "log",
    [
        history(1),
        history(30),
        history(0),
        history(4, train=False),
        history(2, eval_cider_d=math.nan, eval_loss=math.nan),
        [{"eval_loss": 4.0, "eval_bleu_1": 0.0, "eval_cider_d": 0.0, "epoch": 0, "step": 0}],
        [{"loss": math.nan, "epoch": 1.0, "step": 1}],
        [{"loss": 2.0}],
        [],
    ],
    ids=["one", "thirty", "no-eval", "only-eval", "nan", "epoch-0", "all-nan", "no-epoch", "empty"],
)
def test_draw_curves_writes_a_small_png(tmp_path, log):
    path = tmp_path / "curves.png"
    report.draw_curves(log, path, best_step=10)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (1500, 720)
    assert path.stat().st_size < 300_000
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


# Gallery


@pytest.mark.parametrize(("count", "size"), [(0, (520, 60)), (1, (520, 490)), (3, (1040, 400)), (8, (1040, 630))])
def test_draw_gallery_grows_with_its_items(tmp_path, count, size):
    path = tmp_path / "gallery.png"
    report.draw_gallery([item() for _ in range(count)], str(path))
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == pytest.approx(size, abs=25)
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.png"]


def test_a_gallery_of_twenty_pictures_is_a_small_file(tmp_path):
    def noise():  # the worst there is: photographs come to 1 to 1.4 MB
        return Image.merge("RGB", [Image.effect_noise((235, 176), 100) for _ in range(3)])

    report.draw_gallery([item(image=noise()) for _ in range(20)], tmp_path / "gallery.png")
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
    report.draw_gallery([item(**changed), item()], tmp_path / "gallery.png")
    Image.open(tmp_path / "gallery.png").verify()


def test_an_item_needs_no_title():
    untitled = {key: value for key, value in item().items() if key != "title"}
    assert report.gallery_page([untitled]).size == report.gallery_page([item()]).size
    assert report.gallery_page([item(title="42")]).height > report.gallery_page([item()]).height


@pytest.mark.parametrize("text", [WORDS * 3, "x" * 400, "猫が木の上で" * 40, "a https://" + "W" * 90 + " b"])
@pytest.mark.parametrize("name", ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf"])
@pytest.mark.parametrize("width", [160, 480])
def test_wrapped_lines_fit_their_width(text, name, width):
    font = report._font(name, 15)
    whole = report.wrap(text, font, width, max_lines=1000)
    assert max(font.getlength(line) for line in whole) <= width
    assert "".join(whole).replace(" ", "") == text.replace(" ", "")
    cut = report.wrap(text, font, width, max_lines=3)
    assert len(cut) <= 3 and max(font.getlength(line) for line in cut) <= width
    assert cut == whole or cut[-1].endswith("…")


def test_wrap_at_its_edges():
    font = report._font("DejaVuSans.ttf", 15)
    assert report.wrap("", font, 200, 5) == [] == report.wrap("\x00 \n", font, 200, 5)
    assert report.wrap("a  dog\nruns", font, 200, 5) == ["a dog runs"]
    assert report.wrap("WW", font, 1, 5) == ["W", "W"]  # narrower than a letter: no endless loop


def test_long_text_stays_in_its_cell():
    long = item(image=Image.new("RGB", (64, 48), report.GROUND), caption=WORDS * 3, reference="W" * 999)
    page = report.gallery_page([long | {"title": WORDS}] * 8).convert("L")
    cell = (page.width - report.MARGIN) // 4
    head = 2 * report.MARGIN + 10  # the legend runs over the gutters, the cells do not
    for column in range(5):
        gutter = (column * cell + 2, head, column * cell + report.MARGIN - 2, page.height)
        assert page.crop(gutter).getextrema() == (255, 255)
    # Nor do they run off the bottom or into the pictures of the next row.
    assert page.crop((0, page.height - report.MARGIN + 2, page.width, page.height)).getextrema() == (255, 255)


def test_pictures_keep_their_aspect_and_small_ones_grow():
    assert report.fit(photograph(64, 64), 240, 180).size == (180, 180)
    assert report.fit(photograph(640, 320), 240, 180).size == (240, 120)
    assert report.fit(photograph(100, 300, "L"), 240, 180).mode == "RGB"


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
    page = report.explanation_page(photograph(*size), caption, words(count), region=(0.1, 0, 0.9, 1))
    assert page.width == pytest.approx(report.PAGE_WIDTH, abs=6) and page.height < 3000
    # Nothing runs over the margins.
    grey = page.convert("L")
    for box in ((0, 0, 18, page.height), (page.width - 12, 0, page.width, page.height)):
        assert grey.crop(box).getextrema() == (255, 255)


def test_a_large_image_takes_no_longer_for_every_word():
    began = time.perf_counter()
    report.explanation_page(Image.new("RGB", (6000, 4000)), "a", words(40), region=(0.25, 0.25, 0.75, 0.75))
    assert time.perf_counter() - began < 10  # drawn at the size of a cell, not of the image
    report.explanation_page(photograph(3, 1000), "a", words(2), region=(0, 0.4999, 1, 0.5001))  # less than a pixel


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (16, 16), (8, 12), (1, 3)])
def test_orange_lies_where_the_attention_is(grid):
    attention = np.zeros(grid)
    attention[0, grid[1] - 1] = 0.5
    lit = np.asarray(report._lit(photograph(140, 140), attention), dtype=int)
    orange = lit[:, :, 0] - lit[:, :, 2] > 120
    rows, columns = np.nonzero(orange)
    assert len(rows)
    assert rows.mean() == pytest.approx(70 / grid[0], abs=140 / grid[0] / 3)
    assert columns.mean() == pytest.approx(140 - 70 / grid[1], abs=140 / grid[1] / 3)


@pytest.mark.parametrize("attention", [np.zeros((7, 7)), np.full((7, 7), 1 / 49)])
def test_even_attention_lights_nothing(attention):
    lit = np.asarray(report._lit(photograph(), attention), dtype=int)
    assert (lit[:, :, 0] == lit[:, :, 2]).all()
    report.explanation_page(photograph(), "a", [{"text": "a", "probability": 1.0, "attention": attention}])


# Contact sheet


def test_a_contact_sheet_shows_what_was_kept_and_what_was_dropped(tmp_path):
    kept = [{"image": photograph(80, 60), "title": "train: a.jpg", "caption": WORDS} for _ in range(7)]
    dropped = [{"image": None, "title": "b.jpg", "reason": "unreadable"}]
    dropped += [{"image": photograph(60, 80, "L"), "title": "c" * 90, "reason": "mode L"}]
    few = report.contact_sheet_page(kept, dropped, (7, 2))
    assert few.width == pytest.approx(report.PAGE_WIDTH, abs=6)
    assert report.contact_sheet_page(kept[:5], dropped, (7, 2)).height < few.height
    assert report.contact_sheet_page(kept, [], (7, 0)).height < few.height
    assert report.contact_sheet_page(kept, dropped, (1500, 2)).tobytes() != few.tobytes()  # "7 of 1,500 images"
    report.draw_contact_sheet(kept, dropped, tmp_path / "sheet.png", (7, 2))
    Image.open(tmp_path / "sheet.png").verify()


def test_odd_words_are_drawn(tmp_path):
    odd = ["\x1b[31m", "", "W" * 300, "猫が木の上で寝ている", "\ud800", "\u202eabc", "<b>&"]
    items = [words(1)[0] | {"text": text} for text in odd]
    report.draw_explanation(photograph(mode="CMYK"), " ".join(odd), items, tmp_path / "explanation.png")
    Image.open(tmp_path / "explanation.png").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.png"]


# Both


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        report.draw_curves(history(3), tmp_path / f"curves_{name}.png", best_step=20)
        report.draw_gallery([item(), item(title="2")], tmp_path / f"gallery_{name}.png")
    for kind in ("curves", "gallery"):
        assert (tmp_path / f"{kind}_a.png").read_bytes() == (tmp_path / f"{kind}_b.png").read_bytes()


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    with pytest.raises(OSError, match="disk full"), replacing(path) as part:
        part.write_bytes(b"half")
        raise OSError("disk full")
    with pytest.raises(KeyError):
        report.draw_gallery([{"caption": "no picture"}], path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_importing_loads_neither_matplotlib_nor_torch():
    code = "import sys, captioning.report; print({'matplotlib', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
