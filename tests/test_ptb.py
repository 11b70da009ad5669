"""captioning.scores.ptb against the tokens that the official tokenizer gave."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import shared_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.scores import ptb

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))

import make_golden

SHARED = shared_folder()
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
    captions = make_golden.read_datasets(SHARED).get(name) if SHARED else None
    if captions is None:
        pytest.skip(f"{name} is not there: set CAPTIONING_SHARED to a folder that has it")
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
        ("dog \u00a0.com 1 1/2", "dog com 1\u00a01/2"),  # no site: its first character belongs to the white space
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
def test_the_short_cut_for_plain_words_changes_nothing(caption):
    """Words before a space take it, words before a tab do not; no rule tells the two apart after a letter."""
    assert ptb.tokenize([caption]) == ptb.tokenize([re.sub("(?<=[A-Za-z]) ", "\t", caption)])


LONG_RUNS = [
    "a",
    ".",
    "'",
    "-",
    "<",
    "<a ",
    "<a b='c' ",
    "a.",
    "a@",
    "a@b.",
    "a-",
    "-Canada-U.S.",
    "1,",
    "1-",
    "n't",
    "&amp;",
]


@pytest.mark.parametrize("unit", LONG_RUNS)
def test_long_runs_take_no_exponential_time(unit):
    begin = time.process_time()
    ptb.tokenize([unit * (2000 // len(unit))])
    assert time.process_time() - begin < 5  # 0.1 at most on a slow core
