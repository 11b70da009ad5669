"""What a caption is asked to be: how it begins, how long it is, which words it has and which it does not.

    wishes = Wishes(prefix="A photo of", max_words=12, must=("dog",), without=("man",), case="sentence")
    wishes.problems("A photo of a dog.")     # []
    wishes.problems("a man")                 # ["does not begin with 'A photo of'", "lacks 'dog'", "has 'man'"]

Here are the values, and what they mean of a text. `captioning.model.constrain` makes a model write such texts.

* A word is what white space separates, if there is a letter or a digit in it.
* `must` and `without` name whole words, or several words in a row, in any letter case. A plural is another word. Of
  languages that put no spaces between words, they name characters.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import regex

from captioning import InputError

CASES = ("as-is", "lower", "sentence")
MOST_LENGTH_PENALTY = 10  # with a higher power of 1,024 tokens, scores would leave the range of float32
# Writing without spaces between words. Next to it, no space is needed for a word to be a whole one.
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
_IN_WORD = r"[\p{L}\p{M}\p{N}]"
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:['\u2019\-][\p{L}\p{M}\p{N}]+)*")
_SPACED_WORD = re.compile(r"(?:[^\w\s]|_)*[^\W_]\S*")
_OPENING, _CLOSING = r"\"'\u201c\u2018«(\[¿¡", r".,;:!?…\"\u201d»)\]"
_STOP = r"[.!?…\u3002\uff01\uff1f][\"'\u201d\u2019»)\]]*"
_ENDED = regex.compile(_STOP + "$")
# A small letter, but not that of "iPhone".
_SENTENCE_START = regex.compile(rf"(?:^|{_STOP}\s+)[^\p{{L}}\p{{N}}]*\p{{Ll}}(?![\p{{L}}\p{{M}}]*\p{{Lu}})")
_SPACE_BEFORE = regex.compile(r"\s+(?=[.,;:!?…]+(?:\s|$))")
# A letter that no caption has. Written to the end of a text, it says that the last word goes on.
_GOES_ON = "\U00010300"


@dataclass(frozen=True)
class Wishes:
    """What is asked of each caption. The defaults ask nothing.

    Attributes:
        prefix: how it begins, in whole words. The model goes on from there; the text shows it as it is written here.
        min_words, max_words: of the whole caption.
        max_characters: of the text as it is shown, full stop included.
        must: words that it has. Where one has a capital letter, the text shows it as it is written here.
        without: words that it does not have.
        no_repeat_ngram_size: so many words in a row do not occur twice, and so many tokens neither; 0: they may.
        repetition_penalty: what `transformers` calls so: above 1, tokens that are there become less likely.
        length_penalty: the power of the length by which beam search divides: above 1 for longer captions; None: what
            the model was saved with.
        temperature, top_p: captions are drawn and not searched: from the distribution at this temperature, from the
            likeliest tokens that together have this probability; None: 1, if the other one is given.
        seed: of the drawing. A caption depends on it and on the image, not on the images beside it.
        case: "as-is": as the tokenizer writes it; "lower"; "sentence": each sentence begins with a capital letter.
        full_stop: whether the caption ends with a full stop (or with ! or ?); None: with `case` "sentence".

    Raises:
        InputError: a value cannot be, or two wishes contradict each other.
    """

    prefix: str = ""
    min_words: int = 0
    max_words: int | None = None
    max_characters: int | None = None
    must: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    length_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    case: str = "as-is"
    full_stop: bool | None = None

    def __post_init__(self):
        set_ = functools.partial(object.__setattr__, self)
        set_("prefix", _tidy(self.prefix))
        for name in ("must", "without"):
            words = [_tidy(word) for word in getattr(self, name) or ()]
            for word in words:
                if not _WORD.search(word):
                    raise InputError(f"--{name} '{word}' has no letter and no digit in it; name words")
            set_(name, tuple({_fold(word): word for word in words}.values()))
        self._check_values()
        self._check_contradictions()

    def _check_values(self) -> None:
        for name, least in (("min_words", 0), ("max_words", 1), ("max_characters", 1), ("no_repeat_ngram_size", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name} {value} is below {least}")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} {value} is not above 0")
        most = MOST_LENGTH_PENALTY
        if self.length_penalty is not None and not abs(self.length_penalty) <= most:
            raise InputError(f"--length_penalty {self.length_penalty} is not between -{most} and {most}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p} is not between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} is not between 0 and {2**32 - 1}")
        if self.case not in CASES:
            raise InputError(f"--case '{self.case}' is none of {', '.join(CASES)}")
        if self.prefix and not _WORD.search(self.prefix):
            raise InputError(f"--prefix '{self.prefix}' has no letter and no digit in it; begin with a word")

    def _check_contradictions(self) -> None:
        if self.max_words is not None and self.min_words > self.max_words:
            raise InputError(f"--min_words {self.min_words} is more than --max_words {self.max_words}")
        for pattern, word in zip(self._unwanted, self.without, strict=True):
            if pattern.search(_fold(self.prefix)):
                raise InputError(f"--prefix '{self.prefix}' has the word '{word}' of --without")
            for wanted in self.must:
                if pattern.search(_fold(wanted)):
                    raise InputError(f"--must '{wanted}' has the word '{word}' of --without")
        for wanted in (self.prefix, *self.must):
            if self.repeats(wanted):
                name = "prefix" if wanted == self.prefix else "must"
                raise InputError(
                    f"--{name} '{wanted}' repeats what --no_repeat_ngram_size {self.no_repeat_ngram_size} forbids"
                )
        shortest = " ".join([self.prefix, *self.missing(self.prefix)]).strip()
        words = len(words_of(shortest))
        ends_early = self.prefix and shortest == self.prefix  # then the model has something to add
        if self.max_words is not None and words + bool(ends_early) > self.max_words:
            what = "--prefix" if ends_early else "--prefix and --must" if self.prefix else "--must"
            raise InputError(f"--max_words {self.max_words} leaves no room: {what} alone has {words} words")
        if self.max_characters is not None:
            more = max(self.min_words - words, int(not self.must), 0)  # words of one letter and a space
            least = len(self.finished(shortest + " x" * more if shortest else "x" + " x" * (more - 1)))
            if least > self.max_characters:
                raise InputError(
                    f"--max_characters {self.max_characters} is too short for what else is asked: that takes {least} "
                    "at least"
                )

    # ---- which kinds of wishes there are

    @property
    def constrain(self) -> bool:
        """Whether a text can be wrong by these wishes."""
        return bool(
            self.prefix
            or self.min_words
            or self.max_words is not None
            or self.max_characters is not None
            or self.must
            or self.without
            or self.no_repeat_ngram_size
        )

    @property
    def drawn(self) -> bool:
        """Whether captions are drawn, not searched."""
        return self.temperature is not None or self.top_p is not None

    @property
    def stops(self) -> bool:
        """Whether the caption ends with a full stop."""
        return self.case == "sentence" if self.full_stop is None else self.full_stop

    def settings(self) -> dict[str, object]:
        """Those that differ from the defaults, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    # ---- what a text is

    def problems(self, text: str) -> list[str]:
        """What is wrong with a finished caption, in words; empty where it is as asked."""
        found = []
        if self.prefix and not _fold(text).startswith(_fold(self.prefix)):
            found.append(f"does not begin with '{self.prefix}'")
        number = len(words_of(text))
        if number < self.min_words:
            found.append(f"has {number} words, fewer than {self.min_words}")
        if self.max_words is not None and number > self.max_words:
            found.append(f"has {number} words, more than {self.max_words}")
        if self.max_characters is not None and len(text) > self.max_characters:
            found.append(f"has {len(text)} characters, more than {self.max_characters}")
        found += [f"lacks '{word}'" for word in self.missing(text)]
        folded = _fold(text)
        found += [f"has '{w}'" for p, w in zip(self._unwanted, self.without, strict=True) if p.search(folded)]
        if self.repeats(text):
            found.append(f"repeats {self.no_repeat_ngram_size} words")
        return found

    def missing(self, text: str) -> list[str]:
        """The words of `must` that a text lacks."""
        folded = _fold(text)
        return [word for pattern, word in zip(self._wanted, self.must, strict=True) if not pattern.search(folded)]

    def repeats(self, text: str) -> bool:
        """Whether words in a row occur twice."""
        size = self.no_repeat_ngram_size
        if not size:
            return False
        words = _WORD.findall(_fold(text))
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        return len(set(grams)) < len(grams)

    def spoilt(self, text: str, goes_on: bool) -> bool:
        """Whether nothing that is written after `text` can make it right.

        Args:
            text: the beginning of a caption, white space at its end included.
            goes_on: whether its last word may go on.
        """
        if self.max_words is not None and len(words_of(text)) > self.max_words:
            return True
        text = _tidy(text + _GOES_ON * goes_on)
        return any(pattern.search(_fold(text)) for pattern in self._unwanted) or self.repeats(text)

    def finished(self, text: str) -> str:
        """A caption as it is shown: white space tidied, letter case and full stop as asked."""
        text = _tidy(text)
        for pattern, word in zip(self._wanted, self.must, strict=True):
            if word != word.lower():
                text = _replaced(pattern, word, text)
        if self.case == "sentence" or self.stops:
            kept = len(self.prefix) if text.startswith(self.prefix) else 0
            text = text[:kept] + _SPACE_BEFORE.sub("", text[kept:])
        if self.case == "lower":
            text = text.lower()
        elif self.case == "sentence":
            text = _SENTENCE_START.sub(lambda match: match[0][:-1] + _capital(match[0][-1]), text)
        if self.stops and text and not _ENDED.search(text):
            text = text.rstrip(" ,;:-\u2013—") + "."
        return text

    # ---- patterns, over folded text

    @functools.cached_property
    def _wanted(self) -> list[regex.Pattern[str]]:
        before, after = rf"(?<![^\s{_OPENING}])", rf"(?=[{_CLOSING}]*(?:\s|$))"
        return [regex.compile(_whole(word, before, after)) for word in self.must]

    @functools.cached_property
    def _unwanted(self) -> list[regex.Pattern[str]]:
        return [regex.compile(_whole(word, f"(?<!{_IN_WORD})", f"(?!{_IN_WORD})")) for word in self.without]


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return _SPACED_WORD.findall(text)


def shown(words: Sequence[str], text: str) -> list[tuple[str, int]]:
    """The words of a finished caption, `text`, each with the number of the raw word that it begins with.

    Args:
        words: of the raw caption. Where they are not the words of `text`, letter case, full stops and the space before
            punctuation aside, they are returned themselves.
    """
    found, number = [], 0
    for final in text.split():
        first, raw = number, ""
        while len(raw) < len(final) and number < len(words) and not (raw and words[number][:1].isalnum()):
            raw += words[number]
            number += 1
        found.append((final, first))
    matched = number == len(words) and all(first < number for _, first in found)
    return found if matched else [(word, number) for number, word in enumerate(words)]


def _whole(word: str, before: str, after: str) -> str:
    """A pattern for a whole word; `before` and `after` say where one begins and ends."""
    folded = _fold(word)
    return "".join(
        (
            "" if _UNSPACED.match(folded[0]) else before,
            r"\s+".join(map(regex.escape, folded.split())),
            "" if _UNSPACED.match(folded[-1]) else after,
        )
    )


def _tidy(text: str) -> str:
    """White space as single spaces, and letters with their accents as one character each where there is one (NFC)."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _fold(text: str) -> str:
    """Letter case aside, and in whichever of two ways letters with accents are written."""
    return unicodedata.normalize("NFC", text).casefold()


def _capital(letter: str) -> str:
    return letter.upper() if len(letter.upper()) == 1 else letter


def _replaced(pattern: regex.Pattern[str], word: str, text: str) -> str:
    """`text`, tidied, with `word` as it is written wherever `pattern` finds it in the folded text."""
    letters = list(map(_fold, text))
    places = [place for place, folded in enumerate(letters) for _ in folded]  # a folded ß is two letters
    for start, end in reversed(list(_spans(pattern, "".join(letters)))):
        text = text[: places[start]] + word + text[places[end - 1] + 1 :]
    return text


def _spans(pattern: regex.Pattern[str], folded: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in pattern.finditer(folded))
