"""Words for left and right: an image whose caption has one must not be mirrored.

    names_a_side("A man on the left.")  ->  True

Captions may be in any language, or in several, so that all are looked for in every caption. A word with another meaning
as well (French "droit", law) costs its image the mirroring, no more. A side that is overlooked makes a caption wrong.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import re
import unicodedata

_TURKISH_NOUNS = "alt|arka|ayak|bacak|eli|göz|kenar|kol|köşe|kulak|ön|orta|taraf|üst|yan"
_RUSSIAN_ENDINGS = "а|о|ый|ая|ое|ые|ого|ому|ой|ую|ым|ых|ыми|ом|ее"

# At the beginning of a word; \b: of the whole word.
WORDS: dict[str, str] = {
    "English": "left|right",
    "Spanish": "izquierd|derech",
    "Portuguese": "esquerd|direit",
    "Russian": rf"(?:с|на|в)?(?:лев|прав)(?:{_RUSSIAN_ENDINGS})\b|(?:лево|право)(?:сторон|рук|руль)|(?:лев|прав)ш",
    # Not "Rechteck".
    "German and Dutch": r"(?:halb)?(?:links|rechts)|(?:linke|rechte)[rnsm]?\b|(?:linker|rechter)(?:hand|kant)",
    "French": r"gauch|droite?s?\b|droit(?:ier|ière)s?\b",
    "Italian": r"(?:sinistr|destr)[aoei]\b",
    # "sol" is the sun in Spanish: it has to be Turkish by its ending or by what follows, or see below.
    "Turkish": r"sağ(?:a|da|daki|dan|ı|ın|ında|ındaki|lak)?\b|sol(?:da|daki|dan|unda|undaki|undan|ak)\b"
    rf"|sol\s+(?:{_TURKISH_NOUNS})",
    "Indonesian": r"(?:di|ke)?(?:kiri|kanan)(?:nya)?\b",
    "Vietnamese": r"(?:trái|phải)\b",
}
# Anywhere: these are written without spaces, or with other words joined on.
PARTS: dict[str, str] = {
    "Chinese and Japanese": "左|右|ひだり|みぎ",
    "Arabic": "يسار|يمين|[أا]يسر|[أا]يمن|يسرى|يمنى",
    # The nasal sound at the end has two spellings.
    "Hindi": r"(?<![\u0900-\u097f])(?:[बद]ा(?:[एये][ँंे]|य[ाेी][ँं]?|ई[ँं])|दाहिन)",
    "Korean": "왼|오른|좌측|우측|좌회전|우회전|좌우",
    "Turkish by its letters": r"\A(?=.*[ğış]).*\bsola?\b",
}
_WORD = re.compile(rf"\b(?:{'|'.join(WORDS.values())})")
_PART = re.compile("|".join(PARTS.values()), re.DOTALL)
_NOT_SPELT_OUT = re.compile("[\u0640\u064b-\u0652\u0670]")  # Arabic vowel signs, and what only stretches a word


def names_a_side(caption: str) -> bool:
    """Whether a caption says left or right, in one of the languages of `WORDS` and `PARTS`."""
    caption = caption.lower()
    if caption.isascii():
        return _WORD.search(caption) is not None
    caption = _NOT_SPELT_OUT.sub("", unicodedata.normalize("NFKC", caption))
    return (_WORD.search(caption) or _PART.search(caption)) is not None
