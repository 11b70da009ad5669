"""What a caption of a drawn scene says, and whether it is right: no score is as plain as that.

facts("One red circle, and it is small.")       # Facts(things=(("red", "circle"),), number="one", size="small", ...)
right("A blue square right of a red circle.", ["A red circle left of a blue square."])     # True
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from captioning.data.scenes import BACKGROUNDS, COLOURS, NUMBERS, RELATIONS, SHAPES, SIZES, SOURCE


class Facts(NamedTuple):
    """What a caption says of a scene; None: nothing.

    Attributes:
        things: (colour, shape) of one shape, of several alike, or of two and then in the order of `relation`.
        relation: "left of" or "above"; the other two are turned round.
    """

    things: tuple[tuple[str, str], ...]
    number: str
    size: str | None = None
    relation: str | None = None
    background: str | None = None


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_COLOUR, _SHAPE, _SIZE, _GROUND = map(_one_of, (COLOURS, SHAPES, SIZES, BACKGROUNDS))
_END = f"(?: on a {_GROUND} background| in the picture)?"
_ONE = re.compile(
    f"(?:there is |the picture shows )?(?:a single|a|one)(?: {_SIZE})?(?: {_COLOUR})? {_SHAPE}"
    f"(?: drawn in {_COLOUR} on {_GROUND})?(?: and it is {_SIZE})?{_END}"
)
_SEVERAL = re.compile(
    f"(?:there are |the picture shows )?(?:a group of )?{_one_of(NUMBERS.values())}(?: {_COLOUR})? {_SHAPE}s"
    f"(?: all of them {_COLOUR})?{_END}"
)
_TWO = re.compile(
    f"(?:there is |the picture shows )?a {_COLOUR} {_SHAPE} {_one_of(RELATIONS)} a {_COLOUR} {_SHAPE}{_END}"
)


def facts(caption: str) -> Facts | None:
    """The facts that a caption states, whichever of the wordings of `scenes` it has; None if it is no such sentence.

    A caption that leaves out or repeats a colour, a size, a number or a relation is none.
    """
    words = _plain(caption)
    if match := _ONE.fullmatch(words):
        size, colour, shape, drawn_in, drawn_on, size_after, ground = match.groups()
        if _both_or_none(size, size_after) or _both_or_none(colour, drawn_in) or (drawn_on and ground):
            return None
        thing = (colour or drawn_in, shape)
        return Facts((thing,), "one", size=size or size_after, background=drawn_on or ground)
    if match := _SEVERAL.fullmatch(words):
        number, colour, shape, colour_after, ground = match.groups()
        if _both_or_none(colour, colour_after):
            return None
        return Facts(((colour or colour_after, shape),), number, background=ground)
    if match := _TWO.fullmatch(words):
        *first, relation, colour, shape, ground = match.groups()
        things: tuple[tuple[str, str], ...] = ((first[0], first[1]), (colour, shape))
        if relation in ("right of", "below"):
            things, relation = things[::-1], RELATIONS[relation]
        return Facts(things, "two", relation=relation, background=ground)
    return None


def right(caption: str, references: Sequence[str]) -> bool:
    """Whether a caption says of a scene what is to be said of it, and nothing that is wrong.

    It equals a reference, case and punctuation aside, or states the same facts in other words; only the background
    may be left out.
    """
    if _plain(caption) in map(_plain, references):
        return True
    said = facts(caption)
    known = [stated for stated in map(facts, references) if stated]
    if said is None or not known:
        return False
    grounds = {None, *(stated.background for stated in known)}
    return said.background in grounds and any(
        said._replace(background=None) == stated._replace(background=None) for stated in known
    )


def more_scores(source: str) -> dict[str, Callable[[str, Sequence[str]], float]]:
    """What is scored besides the official scores where data come from `source`, as `dataset.json` names it.

    Each takes a caption and the references of its image; the score of a split is the mean over its images.
    """
    return {"facts_right": right} if source == SOURCE else {}


def _plain(caption: str) -> str:
    """Lower-cased words, one space apart, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", " ", caption.lower()).split())


def _both_or_none(first: str | None, second: str | None) -> bool:
    return (first is None) == (second is None)
