"""Whether two prepared data sets are the same, in a few digits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captioning.data.folder import Split

DIGITS = 16


def fingerprint(split: Split) -> str | None:
    """The first digits of a SHA-256 of the files that hold a split, images and captions; None: it lies in no files."""
    files = [Path(file["filename"]) for file in split.rows.cache_files]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:DIGITS]
