"""Scores with their intervals, as the terminal, the report, the model card and JSON files tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captioning.scores import bootstrap
from captioning.scores import diversity as variety
from captioning.scores.diversity import NAMES
from captioning.scores.names import SCORE_NAMES

if TYPE_CHECKING:
    from captioning.scores.metrics import Evaluation


def scores(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for the terminal: one row for each score, one column for each split, with 95 % intervals.

    Args:
        splits: {heading: what `results.json` holds of a split}. A single column needs no heading.
    """
    rows = [["", *splits]] if len(splits) > 1 else []
    for key in SCORE_NAMES:
        if any(split.get(key) is not None for split in splits.values()):
            rows.append([key, *(with_interval(split, key, 4) for split in splits.values())])
    return columns(rows)


def diversity(model: Mapping[str, float], people: Mapping[str, float]) -> str:
    """A table for the terminal: what `scores.diversity` says of the model, and of people beside it."""
    rows = []
    for key in NAMES:
        if key in model:
            rows.append([key, f"{model[key]:.4g}", f"people {people[key]:.4g}" if key in people else ""])
    return columns(rows)


def diversity_rows(model: Mapping[str, float], people: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(name, the model's, people's) of what the report does not show otherwise."""
    shown = ("self_bleu_4", "unseen_nouns", "unseen_captions")
    return [
        (name, f"{model[key]:.3f}", f"{people[key]:.3f}" if key in people else "")
        for key, name in NAMES.items()
        if key in shown and key in model
    ]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def with_interval(split: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """`0.725 [0.675, 0.776]`: a score of a split and its interval, where there is one; "" without the score.

    In `results.json` a number that is not finite is None.
    """
    if split.get(key) is None:
        return ""
    interval = between(split.get("intervals", {}).get(key), digits)
    return f"{split[key]:.{digits}f}" + (f" [{interval}]" if interval else "")


def between(interval: Sequence[float] | None, digits: int = 3) -> str:
    """`0.675, 0.776`; "" where there is no interval."""
    if not interval or None in interval:
        return ""
    return ", ".join(f"{end:.{digits}f}" for end in interval)


def scores_of(evaluation: Evaluation) -> dict[str, Any]:
    """What JSON files hold of an evaluation: its signature, images, scores, and the interval of each."""
    intervals = {name: list(interval) for name, interval in bootstrap.intervals(evaluation).items()}
    return {
        "signature": evaluation.signature,
        "images": len(evaluation.ids),
        **evaluation.scores,
        "intervals": intervals,
    }


def diversity_of(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, dict[str, float]]:
    """What JSON files hold beside the scores: `scores.diversity` of the captions, and of people's."""
    return {"model": variety.diversity(captions, references), "people": variety.of_people(references)}
