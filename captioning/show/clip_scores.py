"""CLIPScore and RefCLIPScore of captions of a prepared split, beside the other scores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.scores.clipscore import PROMPT, clip_scores, ref_clip_scores
from captioning.scores.metrics import Evaluation

if TYPE_CHECKING:
    import torch

    from captioning.data.folder import Split


class ClipScores:
    """Adds the two scores to evaluations of a split. What CLIP makes of images and references is computed once.

    Args:
        name: a folder or a hub id of a CLIP.
        split: the images, as they are stored: larger ones were made smaller when they were prepared.
        cache: the folder where vectors are kept.

    Raises:
        InputError: it is no CLIP, or not whole.
    """

    def __init__(self, name: str, device: torch.device, split: Split, cache: Path):
        from captioning.model.clip import Clip

        self.clip = Clip(name, device, cache)
        self.split = split
        pictures = ((split.encoded(row), functools.partial(split.image, row)) for row in range(len(split)))
        self.images = dict(zip(split.image_id, self.clip.images(pictures), strict=True))

    def __call__(self, found: Evaluation, captions: Mapping[int, str]) -> Evaluation:
        """The evaluation of these captions with `clip_score` and `ref_clip_score`."""
        import numpy as np

        if not found.ids:
            return found
        references = self.split.references
        own = self.clip.texts([PROMPT + captions[i] for i in found.ids])
        others = self.clip.texts([PROMPT + text for i in found.ids for text in references[i]])
        images = np.array([self.images[i] for i in found.ids])
        counts = [len(references[i]) for i in found.ids]
        return found.with_means(
            clip_score=clip_scores(own, images), ref_clip_score=ref_clip_scores(own, images, others, counts)
        )
