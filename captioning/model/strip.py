"""The middle of an image that is a long strip, before its shorter side is enlarged."""

from __future__ import annotations

from PIL import Image

MOST_RESIZED = 16_384  # pixels, of the longer side: more than four times what any encoder sees


def middle(image: Image.Image, edge: int | None) -> Image.Image:
    """An image whose longer side stays below MOST_RESIZED when the shorter one becomes `edge`.

    Otherwise 300 bytes of a picture could ask for gigabytes. Where only the shorter side has a size, a crop follows: it
    takes the middle, and what is left out here is never seen. Other images stay as they are.

    Args:
        edge: pixels; None: the resized image has a size of its own, whatever the shape is.
    """
    shorter, longer = sorted(image.size)
    if not edge or edge * longer <= MOST_RESIZED * shorter:
        return image
    left_out = (longer - MOST_RESIZED * shorter // edge + 1) // 2  # on both sides, so that the middle stays in place
    if image.width > image.height:
        return image.crop((left_out, 0, longer - left_out, shorter))
    return image.crop((0, left_out, shorter, longer - left_out))
