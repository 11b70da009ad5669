"""The training curves: the right lines, names that can be read, a whole file at the edges too."""

import io
import math

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from captioning.show import curves


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


def test_curves_hold_the_logged_series():
    figure = curves.curves_figure(history(3), best_step=20)
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
    assert [text.get_text() for text in scores.texts].count("kept: epoch 2") == 1


def test_the_ends_of_the_lines_say_the_values_of_the_kept_epoch():
    log = [{"step": 10 * epoch, "epoch": float(epoch), "eval_bleu_4": 0.1 * epoch} for epoch in (1, 2, 3)]
    log += [{"step": 5 * half, "epoch": half / 2, "loss": 1 / half} for half in (1, 2, 3, 4, 5, 6)]
    for kept, expected in ((20, ["train  0.250", "BLEU-4  0.200"]), (None, ["train  0.167", "BLEU-4  0.300"])):
        figures = [figure for _, figure in curves.panel_figures(log, kept)]
        said = [text.get_text() for figure in figures for axes in figure.axes for text in axes.texts]
        assert [text for text in said if "  " in text] == expected


def test_panels_for_a_phone_are_pictures_of_their_own():
    panels = curves.draw_panels(history(3), 20)
    assert [title.split(" (")[0] for title, _ in panels] == ["Loss", "Validation scores", "CIDEr-D"]
    for _, png in panels:
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.size == (880, 660)
    assert curves.draw_panels([]) == []


def test_curves_without_a_kept_step_have_no_mark():
    for best_step in (None, 999):
        figure = curves.curves_figure(history(2), best_step)
        assert len(lines(figure)) == sum(len(axes.get_lines()) for axes in figure.axes)


def test_rewards_of_sampled_captions_stand_beside_the_validation_score():
    log = [*history(2), *({"reward": 0.5, "epoch": 2 + step / 10, "step": 20 + step} for step in (5, 10))]
    loss, _, cider = curves.curves_figure(log).axes
    assert {line.get_label() for line in cider.get_lines()} == {"sampled", "CIDEr-D"}
    assert list(lines(curves.curves_figure(log))["sampled"].get_xdata()) == [2.5, 3.0]
    assert max(loss.get_lines()[0].get_xdata()) == 2.0


def test_a_second_evaluation_of_an_epoch_is_not_drawn():
    log = [*history(2), {"eval_bleu_4": 0.9, "epoch": 2.0, "step": 20}]
    assert list(lines(curves.curves_figure(log))["BLEU-4"].get_ydata()) == pytest.approx([0.2, 0.2])


def test_a_long_train_loss_is_averaged():
    log = [{"loss": float(step % 2), "epoch": step / 1000, "step": step} for step in range(1, 3001)]
    line = lines(curves.curves_figure(log))["train"]
    assert len(line.get_xdata()) == 150
    assert list(line.get_ydata()) == pytest.approx([0.5] * 150)
    assert line.get_xdata()[-1] == 3.0


def test_non_finite_values_are_gaps():
    log = history(3)
    log[4]["loss"] = math.nan
    next(entry for entry in log if "eval_loss" in entry)["eval_loss"] = math.inf
    drawn = lines(curves.curves_figure(log))
    assert [math.isnan(y) for y in drawn["train"].get_ydata()].index(True) == 4
    assert math.isnan(drawn["validation"].get_ydata()[0])
    assert "BLEU-4" not in lines(curves.curves_figure(history(2, eval_bleu_4=math.nan)))


@pytest.mark.parametrize("evaluations", [1, 30])
def test_names_of_lines_do_not_overlap_and_are_inside_the_picture(evaluations):
    close = {f"eval_{key}": 0.3 for key in ("bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_2", "facts_right")}
    log = history(evaluations, eval_bleu_1=0.0, **close)
    with matplotlib.rc_context(curves.STYLE):
        figure = curves.curves_figure(log, best_step=10)
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
    curves.draw_curves(log, path, best_step=10)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.size == (1500, 720)
    assert path.stat().st_size < 300_000
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_the_share_of_right_facts_is_drawn_where_it_is_logged():
    assert "facts right" not in lines(curves.curves_figure(history(2)))
    assert list(lines(curves.curves_figure(history(2, eval_facts_right=0.9)))["facts right"].get_ydata()) == [0.9, 0.9]


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        curves.draw_curves(history(3), tmp_path / name, best_step=20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
