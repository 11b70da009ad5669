"""How sure each caption is, and which of its words are doubtful, as people are told it.

judged(bundle, caption)                   # what a calibration takes
words(bundle, caption, calibration)       # [{"text", "log_probability", "confidence", "doubtful"}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captioning.model.caption import Caption, chosen_words
from captioning.scores.confidence import Calibration, Judged

if TYPE_CHECKING:
    from captioning.model.captioner import Bundle
    from captioning.model.explain import Word
    from captioning.model.onnx_captioner import OnnxBundle


def judged(bundle: Bundle | OnnxBundle, caption: Caption) -> Judged:
    """A caption as a calibration takes it."""
    tokens = len(caption.tokens) - caption.given
    return Judged(caption.text, caption.mean, tokens, chosen_words(bundle, caption))


def confidence(caption: Caption, calibration: Calibration) -> float:
    """The confidence of a caption, 0 to 1."""
    return calibration.caption(Judged(caption.text, caption.mean, len(caption.tokens) - caption.given))


def words(bundle: Bundle | OnnxBundle, caption: Caption, calibration: Calibration) -> list[dict[str, Any]]:
    """The words that the model chose, each with its confidence; those of a prefix are not judged."""
    return [
        {
            "text": text,
            "log_probability": round(value, 6),
            "confidence": round(calibration.of_word(value), 4),
            "doubtful": calibration.doubtful(value),
        }
        for text, value in chosen_words(bundle, caption)
    ]


def of_entry(
    entry: Mapping[str, Any], found: Sequence[Caption], calibration: Calibration, least: float | None
) -> dict[str, Any]:
    """What is told of how sure the captions of an image are.

    Args:
        entry: of `entries.entry`.
        found: the captions, the best one first.
        least: below that confidence the image is left to a person: it has a draft, and no caption.
    """
    told: dict[str, Any] = {"confidence": round(confidence(found[0], calibration), 4)}
    if "alternatives" in entry:
        told["alternatives"] = [
            {**one, "confidence": round(confidence(caption, calibration), 4)}
            for one, caption in zip(entry["alternatives"], found, strict=True)
        ]
    if least is not None and told["confidence"] < least:
        told |= {"caption": "", "needs_review": True, "draft": entry["caption"]}
    return told


def explained(found: Sequence[Word], calibration: Calibration | None) -> list[dict[str, Any]]:
    """The words of an explanation as `pages.explanation_page` takes them, doubtful ones marked."""
    return [
        vars(word)
        | {
            "doubtful": bool(
                calibration and not word.given and calibration.doubtful(math.log(max(word.probability, 1e-300)))
            )
        }
        for word in found
    ]
