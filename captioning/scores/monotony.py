"""A warning where a model says the same of every image, or the same word over and over.

warning(["a dog", "a dog", ...])    ->  "12 of 12 images (100 %) have the caption 'a dog': ..."
warning(["a cat cat cat cat cat cat cat cat"])  ->  "the caption repeats itself, ..."
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from captioning.scores.words import unicode_words

IMAGES = 10  # of fewer, many may well have the same caption
SAME = 0.5  # share of the images with one and the same caption
REPEATING = 0.1  # share of the captions that repeat themselves
LONG = 8  # words; a shorter caption does not repeat itself
PERIOD = 4  # words; the longest phrase whose repetitions are looked for
SHOWN = 60  # characters of a caption that is quoted

REMEDY = "train longer, on more images, or from pretrained weights"


def warning(captions: Sequence[str], references: Sequence[Sequence[str]] = ()) -> str | None:
    """One sentence if something is wrong with the captions as a whole, None if not.

    Args:
        captions: one of each image.
        references: of each image, where there are some. What people say of an image too is no reason to warn.
    """
    images = len(captions)
    if not images:
        return None
    words = [unicode_words(caption) for caption in captions]
    common, times = Counter(map(tuple, words)).most_common(1)[0]
    if images >= IMAGES and times >= SAME * images:
        rows = [row for row, own in enumerate(words) if tuple(own) == common]
        said = [row for row in rows if references and list(common) in map(unicode_words, references[row])]
        if 2 * len(said) < times:
            share = f"{times:,} of {images:,} images ({times / images:.0%})"
            return f"{share} have the caption {_quoted(captions[rows[0]])}: the model hardly looks at them; {REMEDY}"
    found = [row for row, own in enumerate(words) if repeats_itself(own)]
    if len(found) < max(1, REPEATING * images):
        return None
    example = _quoted(captions[found[0]])
    if images == 1:
        return f"the caption repeats itself, {example}; {REMEDY}"
    return f"{len(found):,} of {images:,} captions repeat themselves, such as {example}; {REMEDY}"


def repeats_itself(words: Sequence[str]) -> bool:
    """Whether one word, or a phrase said three times in a row or more, makes up most of eight or more words."""
    if len(words) < LONG:
        return False
    if max(Counter(words).values()) > len(words) / 2:
        return True
    for period in range(2, PERIOD + 1):
        # How many words in a row equal the word one period before.
        run = longest = 0
        for before, word in zip(words, words[period:], strict=False):
            run = run + 1 if before == word else 0
            longest = max(longest, run)
        if longest >= 2 * period and longest + period > len(words) / 2:
            return True
    return False


def _quoted(caption: str) -> str:
    caption = " ".join(caption.split())
    return f"'{caption}'" if len(caption) <= SHOWN else f"'{caption[:SHOWN].rstrip()}…'"
