"""What two numbers must have in common to be compared, on one line, as sacrebleu (https://aclanthology.org/W18-6319)
prints it:

    coco-ptb3.4.1|refs:5|n:700|cider:df=split|eos:in reward|rouge:rouge_score|data:1c291ca3|version:1

| field | meaning |
|---|---|
| `coco-ptb3.4.1` | the official COCO caption evaluation, and its tokenizer; `coco-characters`: characters as words |
| `refs` | references of an image, the fewest and the most |
| `n` | images |
| `cider` | where the document frequencies of CIDEr-D come from: the references of the split that is scored |
| `eos` | where the end of a caption counts as a word: in the reward of self-critical training, and in no score |
| `rouge` | the words of ROUGE-1, ROUGE-2 and ROUGE-Lsum |
| `data` | the first 8 hexadecimal digits of a SHA-256 of the references, whatever their order |
| `version` | of this computation: raised when any score of the same captions changes |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from captioning.scores.words import Words, choose

VERSION = 1


def signature(references: Iterable[Sequence[str]]) -> str:
    """The signature of scores against these references.

    Args:
        references: the captions of each image, as they were written.
    """
    references = [list(captions) for captions in references]
    return signature_of(references, choose(caption for captions in references for caption in captions))


def signature_of(references: Iterable[Sequence[str]], words: Words) -> str:
    """The same where it is known what a word is."""
    images = sorted(sorted(captions) for captions in references)
    counts = {len(captions) for captions in images} or {0}
    refs = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}-{max(counts)}"
    digest = hashlib.sha256(json.dumps(images).encode()).hexdigest()[:8]
    name, rouge = words.signature
    return (
        f"{name}|refs:{refs}|n:{len(images)}|cider:df=split|eos:in reward|rouge:{rouge}|data:{digest}|version:{VERSION}"
    )


def differences(first: str, second: str) -> list[str]:
    """Where two signatures differ, as `n: 700 and 160`; [] if their numbers can be compared."""
    one, other = (dict(_field(field) for field in text.split("|")) for text in (first, second))
    return [
        f"{name}: {one.get(name, 'none')} and {other.get(name, 'none')}"
        for name in one | other
        if one.get(name) != other.get(name)
    ]


def _field(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    return (name, value) if colon else ("protocol", name)
