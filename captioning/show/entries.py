"""What is said of an image: its caption for a terminal, and all that is known of it for `--json` and for files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from captioning import cli
from captioning.files import json_text

if TYPE_CHECKING:
    from captioning.model.caption import Caption
    from captioning.model.captioner import Bundle
    from captioning.model.onnx_captioner import OnnxBundle

Entry = dict[str, Any]


def entry(name: str, found: str | Sequence[Caption], scored: bool = True) -> Entry:
    """The path and the caption; of several captions also their scores, if they are `scored`."""
    if isinstance(found, str) or not scored:
        return {"path": name, "caption": found if isinstance(found, str) else found[0].text}
    best = [{"caption": one.text, "score": round(one.score, 6)} for one in found]
    return {"path": name, **best[0], "alternatives": best}


def columns(alternatives: int, sure: bool = False, drafts: bool = False) -> list[str]:
    """Of a table of entries; `error` says why there is no caption.

    Args:
        sure: each caption has a confidence.
        drafts: what is left to a person has a draft in the place of a caption.
    """
    more = ["score", *(f"alternative_{number}" for number in range(2, alternatives + 1))] if alternatives > 1 else []
    return ["path", "caption", *["confidence"] * sure, *["draft"] * drafts, *more, "error"]


def cells(entry: Entry) -> Entry:
    """An entry as a row of a table: each of the alternatives in a column of its own."""
    others = entry.get("alternatives", [])[1:]
    return {**entry, **{f"alternative_{number}": one["caption"] for number, one in enumerate(others, 2)}}


def token_list(bundle: Bundle | OnnxBundle, caption: Caption) -> list[dict[str, Any]]:
    """A caption's tokens as they are written to JSON; one that is half a letter reads as a replacement character."""
    texts = bundle.token_texts(caption.tokens)
    return [
        {"id": token, "text": text, "log_probability": round(value, 6)}
        for token, text, value in zip(caption.tokens, texts, caption.log_probabilities, strict=True)
    ]


def shown(entry: Entry, as_json: bool, alternatives: bool, named: bool) -> str:
    """What stdout says of an image: JSON, or its caption, after its path if it is `named`."""
    if as_json:
        return json_line(entry)
    rows = [[entry["caption"]]]
    if alternatives:
        rows = [[f"{one['score']:.4f}", one["caption"]] for one in entry["alternatives"]]
    first = [entry["path"]] if named else []
    return "\n".join("\t".join(map(cli.printable, [*first, *row])) for row in rows)


def json_line(entry: Entry) -> str:
    """One line of JSON that reads as it is meant in a terminal: letters as they are, control characters escaped."""
    text = json_text(entry)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
