"""Pictures to open, and what is said of those that cannot be opened."""

import io

import pytest
from PIL import Image, ImageChops, ImageDraw, ImageStat

from captioning import InputError


def drawing(mode: str = "RGB", size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture with no symmetry: every orientation of it differs from the others."""
    image = Image.new("RGB", size, (250, 240, 220))
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.rectangle((0, 0, width // 3, height // 4), fill=(200, 30, 30))
    draw.ellipse((width // 2, height // 3, width - 1, height - 1), fill=(30, 60, 200))
    draw.line((0, height, width // 2, height // 2), fill=(20, 140, 40), width=max(1, height // 10))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_near(one: Image.Image, other: Image.Image, tolerance: float) -> None:
    """Same size and mode, and the mean difference of every channel at most `tolerance` of 255."""
    assert (one.size, one.mode) == (other.size, other.mode)
    assert max(ImageStat.Stat(ImageChops.difference(one, other)).mean) <= tolerance


def refusal(call, *args, **options) -> str:
    """The message of the InputError that the call must raise, and nothing but one line of it."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert "; " in message, f"names no remedy: {message}"
    return message
