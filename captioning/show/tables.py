"""Scores with their intervals, as the terminal, the report and the model card show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from captioning.scores.diversity import NAMES
from captioning.scores.names import SCORE_NAMES


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
