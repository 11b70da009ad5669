"""CLIPScore and RefCLIPScore (Hessel et al., 2021, https://arxiv.org/abs/2104.08718), from the vectors of a CLIP.

    CLIPScore(caption, image)    = 2.5 * max(cos(caption, image), 0)
    RefCLIPScore(caption, image) = harmonic mean of CLIPScore and max(largest cos(caption, reference), 0)

Each text is preceded by `PROMPT`. CLIPScore needs no references: it asks how well a caption fits its image, and nothing
about its grammar. Scores of different CLIPs must not be compared; the paper's are those of ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WEIGHT = 2.5
PROMPT = "A photo depicts "


def clip_scores(captions: np.ndarray, images: np.ndarray) -> list[float]:
    """CLIPScore of each caption, 0 to 2.5.

    Args:
        captions: vectors (images, dimensions), of any length.
        images: the same of the images.
    """
    import numpy as np

    return [float(value) for value in WEIGHT * np.maximum((_unit(captions) * _unit(images)).sum(1), 0)]


def ref_clip_scores(
    captions: np.ndarray, images: np.ndarray, references: np.ndarray, counts: Sequence[int]
) -> list[float]:
    """RefCLIPScore of each caption, 0 to about 1.4.

    Args:
        captions, images: vectors (images, dimensions), of any length.
        references: vectors (references of all images one after the other, dimensions).
        counts: how many references each image has, one at least.
    """
    import numpy as np

    owner = np.repeat(np.arange(len(captions)), counts)
    similar = (_unit(captions)[owner] * _unit(references)).sum(1)
    nearest = np.full(len(captions), -np.inf)
    np.maximum.at(nearest, owner, similar)
    nearest = np.maximum(nearest, 0)
    fitting = np.array(clip_scores(captions, images))
    both = fitting + nearest
    return [float(value) for value in np.divide(2 * fitting * nearest, both, out=np.zeros_like(both), where=both > 0)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, in double precision; one of zeros stays."""
    import numpy as np

    vectors = np.asarray(vectors, np.float64)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)
