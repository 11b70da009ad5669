"""How the gallery, the report and the model card speak of a run: the same words in each."""

from __future__ import annotations

from collections.abc import Sequence

from captioning.cli import encoders
from captioning.data import scenes


def author(source: str) -> str:
    """Who wrote the references of data from `source`."""
    return "a program" if source == scenes.SOURCE else "a person"


def title(encoder: str | Sequence[str], decoder: str) -> str:
    """The heading of a run's report and of its model card."""
    return f"Image captioner: {name_of(encoder)} → {name_of(decoder)}"


def name_of(part: str | Sequence[str]) -> str:
    """The name of an encoder or decoder: of a folder its last part, because where it lies is private; hub ids stay.

    Two encoders are "A + B".
    """
    return " + ".join(
        name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".", "~")) or name.count("/") > 1 else name
        for name in map(str, encoders(part))
    )
