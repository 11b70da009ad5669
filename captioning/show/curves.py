"""Training curves: losses and scores by epoch, in one picture.

    draw_curves(trainer.state.log_history, "training_curves.png", best_step=1200)

It is written whole or not at all, and the same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from captioning.files import replacing
from captioning.scores.names import SCORE_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType


class Line(NamedTuple):
    """How a series of `log_history` is drawn."""

    name: str
    colour: str
    marker: str  # "" for what is logged often: its line is jagged and is averaged


# Keys of log_history. One hue for each family of scores, told apart by lightness and by marker: blue against orange,
# and light against dark, survive every common kind of colour blindness.
LOSSES = {
    "loss": Line("train", "#808080", ""),
    "eval_loss": Line("validation", "#111111", "o"),
}
SCORES = {
    f"eval_{key}": Line(SCORE_NAMES[key], colour, marker)
    for key, colour, marker in (
        ("bleu_1", "#56a8de", "o"),
        ("bleu_2", "#2f83bf", "o"),
        ("bleu_3", "#195f96", "o"),
        ("bleu_4", "#0a3a61", "o"),
        ("rouge_1", "#ea9434", "s"),
        ("rouge_2", "#cc6612", "s"),
        ("rouge_l", "#8a3f02", "s"),
        ("facts_right", "#2a7d5f", "^"),
    )
}
CIDER = {  # 0 to 10, about 1 for a good model: its own panel
    "reward": Line("sampled", "#808080", ""),  # of training images, in self-critical epochs
    "eval_cider_d": Line(SCORE_NAMES["cider_d"], "#7b3f8c", "D"),
}
LINES = LOSSES | SCORES | CIDER

Series = tuple[list[float], list[float]]  # epochs, values

STYLE: dict[RcKeyType, Any] = {
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
WIDTH, HEIGHT = 10, 4.8  # inches, at 150 dots an inch
PANEL_WIDTH, PANEL_HEIGHT = 4.4, 3.3  # inches, at 200 dots an inch: letters can be read on a phone
METADATA: dict[str, Any] = {"Software": None}  # it would name matplotlib's version
LABEL_SIZE = 9.5  # points; the names at the ends of the lines


def draw_curves(log_history: Sequence[dict], path: str | Path | BinaryIO, best_step: int | None = None) -> None:
    """Draw the losses and the scores by epoch into one PNG of 1500 x 720 pixels.

    Args:
        log_history: `trainer.state.log_history`.
        path: a file, which is replaced, or an open stream of bytes.
        best_step: the step of the checkpoint that was kept.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = curves_figure(log_history, best_step)
        if isinstance(path, str | Path):
            with replacing(Path(path)) as part:
                figure.savefig(part, format="png", metadata=METADATA)
        else:
            figure.savefig(path, format="png", metadata=METADATA)


def draw_panels(log_history: Sequence[dict], best_step: int | None = None) -> list[tuple[str, bytes]]:
    """(title, PNG of 880 x 660 pixels) of each panel of `draw_curves`, to be read one below the other on a phone."""
    import matplotlib

    found = []
    with matplotlib.rc_context(STYLE):
        for title, figure in panel_figures(log_history, best_step):
            data = io.BytesIO()
            figure.savefig(data, format="png", metadata=METADATA)
            found.append((title, data.getvalue()))
    return found


def curves_figure(log_history: Sequence[dict], best_step: int | None = None) -> Figure:
    """The figure of `draw_curves`: a panel each of losses, scores and CIDEr-D, if logged.

    matplotlib reads its settings when it draws: build and draw the figure inside `matplotlib.rc_context(STYLE)`.
    """
    from matplotlib.figure import Figure

    panels = _panels(log_history)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=150)
    columns = [[panel for panel in panels if (panel[1].keys() <= LOSSES.keys()) == left] for left in (True, False)]
    columns = [column for column in columns if column]
    if not columns:
        figure.text(0.5, 0.5, "no loss and no score was logged", ha="center", color="#777777")
        return figure

    # The margins right of the panels hold the names of the lines.
    grid = figure.add_gridspec(1, len(columns), left=0.085, right=0.87, top=0.88, bottom=0.11, wspace=0.62)
    for number, column in enumerate(columns):
        rows = grid[number].subgridspec(len(column), 1, height_ratios=[2.1, 1][: len(column)], hspace=0.32)
        for row, (title, group) in enumerate(column):
            axes = figure.add_subplot(rows[row])
            _draw_panel(axes, title, group, _last_epoch(panels), _kept_epoch(log_history, best_step), top=row == 0)
            if row < len(column) - 1:
                axes.set_xlabel("")
                axes.tick_params(labelbottom=False)
    return figure


def panel_figures(log_history: Sequence[dict], best_step: int | None = None) -> list[tuple[str, Figure]]:
    """(title, figure) of each panel; as `curves_figure`, to be drawn inside `matplotlib.rc_context(STYLE)`."""
    from matplotlib.figure import Figure

    panels, found = _panels(log_history), []
    for title, group in panels:
        figure = Figure(figsize=(PANEL_WIDTH, PANEL_HEIGHT), dpi=200)
        axes = figure.add_axes((0.13, 0.14, 0.54, 0.7))
        _draw_panel(axes, title, group, _last_epoch(panels), _kept_epoch(log_history, best_step))
        found.append((title, figure))
    return found


Panel = tuple[str, dict[str, Series]]  # title, {key of LINES: series}


def _panels(log_history: Sequence[dict]) -> list[Panel]:
    """Those of losses, scores and CIDEr-D that were logged."""
    titles = ("Loss (lower is better)", "Validation scores (higher is better)", "CIDEr-D (higher is better)")
    groups = [
        {key: points for key in lines if (points := _series(log_history, key))} for lines in (LOSSES, SCORES, CIDER)
    ]
    return [(title, group) for title, group in zip(titles, groups, strict=True) if group]


def _last_epoch(panels: Sequence[Panel]) -> float:
    return max(epoch for _, group in panels for xs, _ in group.values() for epoch in xs)


def _kept_epoch(log_history: Sequence[dict], best_step: int | None) -> float | None:
    epoch_of = {entry["step"]: entry["epoch"] for entry in log_history if {"step", "epoch"} <= entry.keys()}
    return epoch_of.get(best_step)


def _draw_panel(
    axes: Axes, title: str, group: dict[str, Series], last: float, kept: float | None, top: bool = True
) -> None:
    """One panel; `top`: it is the first of its column, and says which epoch was kept."""
    axes.set_title(title, loc="left", pad=18 if top else 6)  # points; 18 leaves room for "kept"
    for key, (xs, ys) in group.items():
        _draw_line(axes, LINES[key], xs, ys)
    axes.set_xlim(0, 1.02 * last or 1)
    axes.set_xlabel("epoch")
    if group.keys() <= LOSSES.keys():
        axes.set_ylabel("cross-entropy (nats per token)")
    else:
        highest = max(y for _, ys in group.values() for y in ys if math.isfinite(y))
        axes.set_ylim(0, 1.1 * highest or 1)
    if kept is not None:
        _mark_kept(axes, kept, name=top)
    _name_ends(axes, group, kept)


def _series(log_history: Sequence[dict], key: str) -> Series | None:
    """(epochs, values) logged under `key`, None if no value is finite; a non-finite value becomes NaN, a gap.

    The first entry of an epoch wins: after training, the kept checkpoint is often evaluated once more, and
    the Trainer logs that at the last step, where it would pass for the score of the last weights.
    """
    points: dict[float, float] = {}
    for entry in log_history:
        if key in entry and "epoch" in entry:
            value = float(entry[key])
            points.setdefault(entry["epoch"], value if math.isfinite(value) else math.nan)
    epochs = sorted(points)
    if not LINES[key].marker:
        # Thousands of points would make a black band: draw at most 150, each the mean of as many entries.
        size = max(1, math.ceil(len(epochs) / 150))
        groups = [epochs[i : i + size] for i in range(0, len(epochs), size)]
        points = {group[-1]: sum(points[epoch] for epoch in group) / len(group) for group in groups}
        epochs = list(points)
    return (epochs, [points[epoch] for epoch in epochs]) if any(map(math.isfinite, points.values())) else None


def _draw_line(axes: Axes, line: Line, epochs: list[float], values: list[float]) -> None:
    # A line of one point is seen by its marker alone.
    marker = "o" if sum(map(math.isfinite, values)) == 1 else line.marker
    every = max(1, len(epochs) // 15)  # a marker at each evaluation of a long run would hide its line
    axes.plot(
        epochs,
        values,
        color=line.colour,
        linewidth=1.6 if marker else 1.2,  # a jagged line is thinner
        marker=marker,
        markevery=((len(epochs) - 1) % every, every),  # so that the last one is marked
        label=line.name,
        clip_on=False,  # a marker on the edge, such as a score of 0, is shown whole
    )


def _mark_kept(axes: Axes, epoch: float, name: bool) -> None:
    """A thin vertical line where the kept checkpoint was saved; `name` says so above the panel."""
    behind = 1.6  # the lines of the scores, but before the grid
    axes.axvline(epoch, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=behind)
    if name:
        axes.annotate(
            f"kept: epoch {epoch:.3g}",
            (epoch, 1),
            (0, 4),
            xycoords=axes.get_xaxis_transform(),  # x in epochs, y as a fraction of the panel
            textcoords="offset points",
            ha="center" if epoch < 0.75 * axes.get_xlim()[1] else "right",
            color="#444444",
            size=LABEL_SIZE,
        )


def _name_ends(axes: Axes, group: dict[str, Series], kept: float | None) -> None:
    """Write each line's name beside its end, right of the panel, pushed apart so that none overlap.

    With each name stands the value at the kept epoch, which is what the kept model has; or else the last value.
    """
    ends = []  # (height as a fraction of the panel, epoch, value there, value to write, line)
    for key, (xs, ys) in group.items():
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        x, y = points[-1]
        value = [y for x, y in points if kept is None or x <= kept + 1e-6] or [points[0][1]]
        ends.append((float(axes.transLimits.transform((0, y))[1]), x, y, value[-1], LINES[key]))
    ends.sort(key=lambda end: end[0])

    figure: Any = axes.figure
    panel = axes.get_position().height * figure.get_figheight() * 72  # points
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

    for height, (_, x, y, kept_value, line) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{line.name}  " + (f"{kept_value:.3f}" if abs(kept_value) < 10 else f"{kept_value:.3g}"),
            xy=(x, y),
            xytext=(1.035, height),
            textcoords="axes fraction",
            color=line.colour,
            size=LABEL_SIZE,
            va="center",
            annotation_clip=False,
            # A thin line from the line's end to the middle of the name's left side.
            arrowprops={
                "arrowstyle": "-",
                "color": line.colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )
