"""Scores with their intervals, as the terminal, the report and the model card show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from captioning.scores.names import SCORE_NAMES


def scores(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for the terminal: one row for each score, one column for each split, with 95 % intervals.

    Args:
        splits: {heading: what `results.json` holds of a split}. A single column needs no heading.
    """
    rows = [["", *splits]] if len(splits) > 1 else []
    for key in SCORE_NAMES:
        if any(key in split for split in splits.values()):
            rows.append([key, *(with_interval(split, key, 4) for split in splits.values())])
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def with_interval(split: Mapping[str, Any], key: str, digits: int = 3) -> str:
    """`0.725 [0.675, 0.776]`: a score of a split and its interval, where there is one; "" without the score."""
    if key not in split:
        return ""
    interval = split.get("intervals", {}).get(key)
    return f"{split[key]:.{digits}f}" + (f" [{between(interval, digits)}]" if interval else "")


def between(interval: Sequence[float] | None, digits: int = 3) -> str:
    """`0.675, 0.776`"""
    return ", ".join(f"{end:.{digits}f}" for end in interval or ())
