"""Which file on disk an image's name means: the folder may be another, the letter case, or the form of Unicode.

images = Finder([folder])
images.find("photos\\Café.JPG")        # "folder/images/photos/café.jpg", where that is the file
"""

# ruff: noqa: PTH118, PTH119, PTH122 (names are strings here: a million Paths take half a gigabyte)

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from captioning.data.images import SUFFIXES


class Finder:
    """Finds images below some folders.

    A name is first joined to the likely folders. Where that fails, every file below the folders is listed once, and the
    one whose path agrees best with the name is taken. Two that agree equally well are none: a wrong image is worse than
    a missing one.
    """

    def __init__(self, roots: Iterable[Path]):
        self.roots = [os.fspath(root) for root in dict.fromkeys(roots)]
        self._worked: dict[str, str] = {}  # hint -> the folder that had the last image
        self._by_name: dict[str, list[str]] | None = None
        self._by_number: dict[int, list[str]] | None = None

    def find(self, name: str, hint: str = "") -> str | None:
        """The path of an image; None: there is none.

        Args:
            name: a file name, with or without folders, absolute or not, with `/` or `\\`.
            hint: the folder that images of this part are expected in, such as "train2014".
        """
        name = name.replace("\\", "/")
        for folder in self._likely(hint):
            path = os.path.join(folder, name)  # an absolute name stays as it is
            if os.path.isfile(path):
                self._worked[hint] = folder
                return path
        return self._listed(name, hint)

    def first_guess(self, name: str, hint: str = "") -> str:
        """Where an image that is not there was looked for first."""
        folder = next((folder for folder in self._likely(hint) if os.path.isdir(folder)), self.roots[0])
        return os.path.join(folder, name.replace("\\", "/"))

    def find_number(self, number: int) -> str | None:
        """The image whose file name ends in a number, as COCO's do."""
        if self._by_number is None:
            self._by_number = {}
            for path in _images_below(self.roots):
                if digits := re.search(r"(\d{1,18})\.\w+$", path):
                    self._by_number.setdefault(int(digits[1]), []).append(path)
        found = self._by_number.get(number, [])
        return found[0] if len(found) == 1 else None

    def _likely(self, hint: str) -> Iterator[str]:
        if hint in self._worked:
            yield self._worked[hint]
        for root in self.roots:
            if hint:
                yield os.path.join(root, hint)
                yield os.path.join(root, "images", hint)
        yield from self.roots

    def _listed(self, name: str, hint: str) -> str | None:
        if self._by_name is None:
            self._by_name = {}
            for path in _images_below(self.roots):
                self._by_name.setdefault(plain(os.path.basename(path)), []).append(path)
                # Annotations may leave the ending out.
                stem = os.path.splitext(os.path.basename(path))[0]
                self._by_name.setdefault(plain(stem), []).append(path)
        found = self._by_name.get(plain(os.path.basename(name)), [])
        if len(found) < 2:
            return found[0] if found else None
        scores = [(_agreement(path, name, hint), path) for path in found]
        best = max(scores)[0]
        winners = [path for score, path in scores if score == best]
        return winners[0] if len(winners) == 1 else None


def plain(name: str) -> str:
    """A name as one of its many spellings."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _agreement(path: str, name: str, hint: str) -> tuple[int, bool, bool]:
    """How many folders at the end are the same, whether the part's folder is on the way, and the same spelling."""
    ours, theirs = (plain(each).split("/")[::-1] for each in (path.replace(os.sep, "/"), name))
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return same, bool(hint) and hint.lower() in ours, os.path.basename(path) == os.path.basename(name)


def _images_below(roots: Sequence[str]) -> Iterator[str]:
    seen = set()
    for root in roots:
        for folder, folders, files in os.walk(root, followlinks=False):
            folders[:] = [name for name in sorted(folders) if not name.startswith((".", "__MACOSX"))]
            for name in sorted(files):
                path = os.path.join(folder, name)
                if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".") and path not in seen:
                    if len(roots) > 1:
                        seen.add(path)
                    yield path
