"""captioning.scores.ptb against the tokens that the official tokenizer gave, and its automaton against `re`."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.scores import ptb

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))

import make_golden

SHARED = Path(os.environ.get("CAPTIONING_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GOLDEN = json.loads(make_golden.GOLDEN.read_text())


def test_golden_tokens():
    captions, official = zip(*GOLDEN["tokens"], strict=True)
    for caption, ours, theirs in zip(captions, ptb.tokenize(captions), official, strict=True):
        assert ours == theirs, caption


@pytest.mark.parametrize(("caption", "tokens"), GOLDEN["alone"])
def test_golden_tokens_of_a_single_caption(caption, tokens):
    assert ptb.tokenize([caption]) == [tokens]


@pytest.mark.parametrize("name", GOLDEN["datasets"])
def test_data_set_tokens(name):
    """All captions of a data set, by hash: it must not be copied into this repository."""
    captions = make_golden.read_datasets(SHARED).get(name)
    if captions is None:
        pytest.skip(f"{name} is not in {SHARED}: set CAPTIONING_SHARED to a folder that has it")
    expected = GOLDEN["datasets"][name]
    assert len(captions) == expected["captions"]
    assert make_golden.token_hash(ptb.tokenize(captions)) == expected["sha256"]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog can't run.", "a man 's dog ca n't run"),
        ("The sign (red) says 'stop'.", "the sign -lrb- red -rrb- says stop"),
        ("Dr. Who at 5 p.m. on Main St.", "dr. who at 5 p.m. on main st."),
        ("a well-known T-shirt, and/or 3/4", "a well-known t-shirt and/or 3/4"),
        ("one\r\ntwo\rthree\u2028four\vfive", "one two three four five"),  # unlike the official code
        ("", ""),
    ],
)
def test_examples(caption, tokens):
    assert ptb.tokenize([caption]) == [tokens]


def test_what_follows_matters_as_in_the_official_code():
    assert ptb.tokenize(["Row A.", "The end."]) == ["row a", "the end"]
    assert ptb.tokenize(["Row A.", "the end."]) == ["row a.", "the end"]


def test_no_captions():
    assert ptb.tokenize([]) == []


@given(st.lists(st.text(), max_size=5))
@settings(deadline=None, max_examples=100)
def test_any_text(captions):
    lines = ptb.tokenize(captions)
    assert len(lines) == len(captions)
    for line in lines:
        assert "\n" not in line
        assert not ptb.PUNCTUATION.intersection(line.split(" "))


FRAGMENTS = [
    "a",
    "Dog",
    "cannot",
    "GONNA",
    "don't",
    "it's",
    "Mr.",
    "etc.",
    "U.S.",
    "no.",
    "3",
    "1/2",
    "x-ray",
]
FRAGMENTS += [
    " ",
    " ",
    ". ",
    ", ",
    "'",
    '"',
    "(",
    "&amp;",
    "<b>",
    "http://a.b/c",
    ":)",
    "...",
    "-",
    "\t",
    "é",
]


@given(st.lists(st.sampled_from(FRAGMENTS)).map("".join))
@settings(deadline=None)
def test_the_short_cut_changes_nothing(caption):
    quick = ptb.tokenize([caption])
    plain, ptb._PLAIN = ptb._PLAIN, re.compile("(?!)")
    try:
        assert ptb.tokenize([caption]) == quick
    finally:
        ptb._PLAIN = plain


PATTERNS = [
    r"a|ab",
    r"(a|ab)(c|bcd)?",
    r"a*b+",
    r"(ab?){2,3}",
    r"[^a]b{2}",
    r"(a(b|c))*d?",
    r"\(a\)|a\.b",
    "B(a|)c",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(alphabet="abcdAB.()", min_size=1, max_size=8))
def test_automaton_accepts_what_re_does(pattern, text):
    # Letters match in either case outside [ ] only; fold those inside by hand.
    expected = re.fullmatch(pattern.replace("[^a]", "[^a]" if "A" not in text else "(?-i:[^a])"), text, re.I)
    assert ptb._Automaton((pattern,)).accepts(text) == bool(expected)


@given(text=st.text(alphabet="abcd", min_size=1, max_size=8))
def test_automaton_finds_the_longest_match_of_the_first_pattern(text):
    patterns = ("(a|ab)(c|bcd)?", "abcd?", "[a-d]")
    ends = [
        max((end for end in range(1, len(text) + 1) if re.fullmatch(pattern, text[:end])), default=0)
        for pattern in patterns
    ]
    assert ptb._Automaton(patterns).longest(text, 0) == (max(ends), ends.index(max(ends)))
