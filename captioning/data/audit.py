"""What is odd about a data set, found before anything is learnt from it: each with a count, an example, what was done.

for finding in audit(splits, groups, broken): print(finding.line())
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from captioning.cli import printable
from captioning.data.records import Record

EXAMPLES = 5
SHARED = 3  # images that one caption is said to be of many from

# ruff: noqa: RUF001 (Cyrillic letters that look like Latin ones)

# The commonest words that few other languages of the list have.
STOP_WORDS = {
    "English": "the is are of with and an his her while at into through their has up",
    "German": "der die das ein eine einem einer einen und mit auf ist im den dem von steht sitzt",
    "French": "le la les un une des et avec sur est dans du au devant qui sont",
    "Spanish": "el la los las un una y con en es del por está sobre que",
    "Italian": "il la lo gli un una e con su di che nel della sul è",
    "Portuguese": "um uma com em está são dos das pelo pela nos nas",
    "Dutch": "de het een en met op van zijn naar staat zit voor",
    "Polish": "na w i z się jest obok przez pod nad dwa która który",
    "Russian": "и в на с у по из под за рядом который это две два",
    "Ukrainian": "і в на з у по із під за поруч який це дві два та",
}
_WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}
SCRIPTS = {name: "CYRILLIC" if name in ("Russian", "Ukrainian") else "LATIN" for name in STOP_WORDS}
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


@dataclass
class Finding:
    """Something odd: how often, of what kind, the first images, and what was done about it."""

    count: int
    what: str
    done: str
    examples: list[str] = field(default_factory=list)
    pairs: list[tuple[tuple[str, int], tuple[str, int]]] = field(default_factory=list)  # (split, row), for a picture

    def line(self) -> str:
        examples = f" (such as {'; '.join(map(printable, self.examples[:2]))})" if self.examples else ""
        return f"{self.count:,} {self.what}{examples}: {self.done}"


def audit(
    splits: Mapping[str, Sequence[Record]],
    groups: Mapping[str, Sequence[int]],
    drawn: bool,
    broken: Finding | None = None,
) -> list[Finding]:
    """
    Args:
        splits: the records of each split.
        groups: the numbers that `captioning.data.near` gave to their images.
        drawn: whether the splits were drawn here.
        broken: images that could not be read.
    """
    records = [record for own in splits.values() for record in own]
    found = [*_captions(records), *_languages(records), *_near(splits, groups, drawn)]
    return [finding for finding in (*found, broken) if finding and finding.count]


def _captions(records: Iterable[Record]) -> Iterable[Finding]:
    empty = Finding(0, "empty captions", "left out")
    repeated = Finding(0, "captions that their image has twice", "kept")
    images: Counter[int] = Counter()  # hash of a caption -> images that have it
    for record in records:
        own = [_plain(caption) for caption in record.captions]
        blank, several = own.count(""), len(own) - len(set(own)) - max(0, own.count("") - 1)
        for finding, count in ((empty, blank), (repeated, several)):
            finding.count += count
            if count and len(finding.examples) < EXAMPLES:
                finding.examples.append(record.file_name)
        images.update(hash(caption) for caption in set(own) if caption)
    yield from (empty, repeated)
    many = {caption for caption, count in images.items() if count >= SHARED}
    if many:
        (most, count), *_ = images.most_common(1)
        text = next(text for record in records for text in record.captions if hash(_plain(text)) == most)
        example = f"{count:,} images have '{text.strip()[:80]}'"
        yield Finding(len(many), f"captions that {SHARED} images or more have", "kept", [example])


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _near(
    splits: Mapping[str, Sequence[Record]], groups: Mapping[str, Sequence[int]], drawn: bool
) -> Iterable[Finding]:
    members: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for split, own in groups.items():
        for row, group in enumerate(own):
            members[group].append((split, row))
    inside = Finding(0, "images that are nearly the same as another of their split", "kept together")
    across = Finding(
        0, "images that are nearly the same as one of another split", "kept, since the data name the splits"
    )
    if drawn:
        across.done = "kept, for one of the splits was there"
    for places in members.values():
        if len(places) < 2:
            continue
        other = next((place for place in places if place[0] != places[0][0]), None)
        finding = across if other else inside
        finding.count += len(places)
        pair = places[0], other or places[1]
        if len(finding.pairs) < EXAMPLES:
            finding.pairs.append(pair)
            finding.examples.append(" and ".join(f"{split} {splits[split][row].file_name}" for split, row in pair))
    yield from (across, inside)


# ---- languages


def _languages(records: Sequence[Record]) -> Iterable[Finding]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)  # script -> language, or "" -> captions
    first: dict[str, list[str]] = defaultdict(list)
    for record in records:
        for caption in record.captions:
            script, language = language_of(caption)
            if script:
                counts[script][language] += 1
                for name in (script, language):
                    if len(first[name]) < EXAMPLES:
                        first[name].append(f"{record.file_name}: {caption.strip()[:60]}")
    if not counts:
        return
    main = max(counts, key=lambda script: counts[script].total())
    for script, own in counts.items():
        if script != main:
            what = f"captions in {script.title()} letters, where most are in {main.title()} ones"
            yield Finding(own.total(), what, "kept", first[script])
    # A caption without a word that tells is of the main language.
    named = [(language, count) for language, count in counts[main].most_common() if language]
    for language, count in named[1:]:
        yield Finding(
            count, f"captions in {language}, it seems, where most are in {named[0][0]}", "kept", first[language]
        )


def language_of(caption: str) -> tuple[str, str]:
    """The script of a caption, such as "LATIN", and its language by its commonest words; "" where nothing tells."""
    script = _script_of(caption)
    if script not in ("LATIN", "CYRILLIC"):
        return script, ""
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    own = {name: sum(word in known for word in words) for name, known in _WORDS.items() if SCRIPTS[name] == script}
    (language, most), (_, second) = Counter(own).most_common(2)
    return script, language if most >= 2 and most > second else ""


def _script_of(caption: str) -> str:
    letters = [letter for letter in caption[:200] if letter.isalpha()]
    if caption.isascii():
        return "LATIN" if letters else ""
    names = Counter("LATIN" if letter.isascii() else unicodedata.name(letter, "").split(" ")[0] for letter in letters)
    name = names.most_common(1)[0][0] if names else ""
    return _ONE_SCRIPT.get(name, name)
