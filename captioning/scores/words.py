r"""What a word is, decided by the language of the references.

    choose(["A dog runs."]).tokenize(["Two dogs run."])   ->  ["two dogs run"]
    choose(["一只黑狗。"]).tokenize(["两只狗 T恤"])          ->  ["两 只 狗 t 恤"]

English is cut up as the official evaluation and `rouge_score` do it. The words of `rouge_score` are runs of a-z and
0-9: of Russian nothing is left, of "Straße" there are "stra" and "e". Other languages have the words of Unicode in
their place. Where words are written without spaces neither works, and each character counts as a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import regex

from captioning.scores import ptb

# Share of the words with a letter that is not a-z, above which the references are not English. A rare "café" must not
# change how English is scored.
FOREIGN = 0.01

# The scripts of languages that put no spaces between words. A character is a letter and the marks above and below it.
_CHARACTER = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー&&[\p{L}\p{N}ー]]\p{M}*+"
)
# The joiners are part of words in Persian and in the languages of India.
_PATTERN = regex.compile(rf"(?V1)({_CHARACTER})|(?:(?!{_CHARACTER})[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d])++")
_WORD_OR_MARK = regex.compile(rf"{_PATTERN.pattern}|\S")


@dataclass(frozen=True)
class Words:
    """How captions are cut up.

    Attributes:
        tokenize: captions -> each with its words separated by one space; for BLEU, ROUGE-L and CIDEr-D.
        split: a caption -> its words; for ROUGE-1, ROUGE-2 and ROUGE-Lsum.
        protocol: says so, in a part of a sentence.
        signature: says so in the fewest characters: the first field of a signature, and its `rouge`.
    """

    tokenize: Callable[[Iterable[str]], list[str]]
    split: Callable[[str], list[str]]
    protocol: str
    signature: tuple[str, str]


def ascii_words(text: str) -> list[str]:
    """The words of `rouge_score`: lower case, runs of a-z and 0-9."""
    return re.findall(r"[a-z0-9]+", text.lower())


def unicode_words(text: str) -> list[str]:
    """Lower case, runs of letters, marks and digits of any script; characters where words have no spaces."""
    return [match[0] for match in _matches(text)]


def _matches(text: str, pattern: regex.Pattern[str] = _PATTERN) -> Iterable[regex.Match[str]]:
    return pattern.finditer(unicodedata.normalize("NFKC", text.casefold()))


def _tokenize(captions: Iterable[str]) -> list[str]:
    return [" ".join(unicode_words(caption)) for caption in captions]


def words_and_marks(captions: Iterable[str]) -> list[str]:
    """Captions -> each with its words, and each mark as a word of its own, separated by one space; of any language."""
    return [" ".join([match[0] for match in _matches(caption, _WORD_OR_MARK)]) for caption in captions]


_COCO = "BLEU-1..4, ROUGE-L and CIDEr-D as in the official COCO caption evaluation"

ENGLISH = Words(
    ptb.tokenize,
    ascii_words,
    f"{_COCO} (PTB tokenisation, punctuation removed); ROUGE-1, ROUGE-2 and ROUGE-Lsum as in rouge_score",
    ("coco-ptb3.4.1", "rouge_score"),
)
SPACED = Words(
    ptb.tokenize,
    unicode_words,
    f"{_COCO} (PTB tokenisation, punctuation removed); ROUGE-1, ROUGE-2 and ROUGE-Lsum with Unicode words",
    ("coco-ptb3.4.1", "unicode"),
)
UNSPACED = Words(
    _tokenize,
    unicode_words,
    f"{_COCO}, but with characters as words, for a language without spaces; ROUGE-1, ROUGE-2 and ROUGE-Lsum likewise",
    ("coco-characters", "characters"),
)


def choose(captions: Iterable[str]) -> Words:
    """How to cut up captions whose references are `captions`."""
    every = foreign = characters = 0
    for caption in captions:
        if caption.isascii():
            every += len(caption.split())
            continue
        for match in _matches(caption):
            every += 1
            foreign += not match[0].isascii()
            characters += match[1] is not None
    if characters > every / 2:
        return UNSPACED
    return SPACED if foreign > FOREIGN * every else ENGLISH
