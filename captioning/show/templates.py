"""Lays out pages: HTML in one file, with every value escaped and every picture embedded."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from captioning import cli

PICTURE_SIDE = 360  # pixels; about 20 kB each


def render(template: str, **values: Any) -> str:
    """An HTML document of a template beside this file. Every value is escaped, control characters become spaces."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    def printable(value: Any) -> str:
        """`value` without the characters that control a terminal or turn the writing round."""
        return "".join(char if char.isprintable() or char in cli.JOINERS else " " for char in str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Every value passes here and is escaped afterwards, but for the HTML of a macro, whose own values have passed.
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value),
    )
    environment.filters |= {"printable": printable, "thousands": "{:,}".format}
    return environment


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as an address that holds its bytes; `kind` and `options` are those of `Image.save`."""
    data = io.BytesIO()
    image.save(data, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def thumbnail(image: Image.Image) -> str:
    """A data URI of an RGB image, PICTURE_SIDE pixels at most."""
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return data_uri(image, "JPEG", quality=75)
