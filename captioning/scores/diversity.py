"""Whether a captioner says different things of different images, and names things that nobody else saw.

    diversity(captions, references)     ->  {"distinct": 0.57, "vocabulary": 312, ..., "unseen_nouns": 0.31}

Accuracy rewards safe phrases; these numbers show what it cost. They have no good value of their own: read them beside
those of people, which `of_people` gives.

| key | meaning |
|---|---|
| `distinct` | share of the captions that no other caption of the set equals before it: 1 if all differ |
| `commonest` | share of the images with the most frequent caption |
| `vocabulary` | different words in all captions |
| `self_bleu_4` | mBLEU: the mean BLEU-4 of each caption against all other captions of the set |
| `unseen_nouns` | share of the nouns in captions that no reference of the image has |
| `unseen_captions` | share of the captions with at least one such noun |

mBLEU is 1 if each phrase is said of other images too. It grows with the number of images, so compare equal sets only.
Shetty et al. (2017, https://arxiv.org/abs/1703.10476) compute it among several captions of one image; Zhu et al. (2018,
https://arxiv.org/abs/1802.01886) among all captions, as here, and call it self-BLEU.

The last two are made after CHAIR_i and CHAIR_s (Rohrbach et al., 2018, https://arxiv.org/abs/1809.02156), but **they
are not CHAIR**: that knows the objects in the pictures of COCO and their synonyms. Here the references alone say what
is in a picture. A noun that is right and that no annotator wrote counts as unseen, and so does a synonym (`guy` for
`man`). So people have unseen nouns too, and many.

What a noun is, is learnt from all references of the set, by one rule. A word is a noun if it directly follows a
determiner or a number at least `TIMES` times and is the last word of its phrase in half of these cases or more: at the
end of the caption, or before a preposition, conjunction, pronoun, auxiliary, or a word in -ing ("a dog on", "two dogs
running"). Plurals count as their singulars. Words of place, amount and time ("the side", "a pair", "the day") are left
out. The rule is for English; other languages have no value for these two keys. It misses rare nouns and those that
always stand before another noun.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from captioning.scores.bleu import bleu_of
from captioning.scores.ngrams import ORDERS, Ngrams, count
from captioning.scores.words import ENGLISH, choose

NAMES = {
    "distinct": "distinct captions",
    "commonest": "images with the commonest caption",
    "vocabulary": "different words",
    "self_bleu_4": "mBLEU-4, against the other captions",
    "unseen_nouns": "nouns that no reference has",
    "unseen_captions": "captions with such a noun",
}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


TIMES = 3  # a noun is seen so often directly after a determiner
SHARE = 0.5  # of these times it ends its phrase

DETERMINERS = _set(
    "a an the this that these those his her its their my your our some another each every no any several many few "
    "one two three four five six seven eight nine ten both "
)
# What ends the phrase of a noun, beside the end of the caption.
ENDS = DETERMINERS | _set(
    "in on at of with by for from to into onto over under above below behind beside between near next through "
    "across along around against up down off out inside outside while as and or but that which who whose is are was "
    "were be being been has have had it he she they them him there where when about toward towards during past "
    "wearing holding atop upon among alongside amongst underneath beneath within without "
)
# Neither things nor living beings.
NO_THINGS = _set(
    "other others one side front back top bottom middle center centre edge end corner background foreground left "
    "right way group pair couple bunch lot number kind type piece part set variety row line day time night "
    "afternoon morning evening air distance direction picture photo photograph image view scene area place spot "
    "trick position first second third "
)
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "shelves": "shelf",
    "wolves": "wolf",
    "firemen": "fireman",
    "policemen": "policeman",
    "snowmen": "snowman",
}


def diversity(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """The numbers of a set of captions, see above; {} if there are none.

    Args:
        captions: one of each image.
        references: of each image, which say what is in it.
    """
    if not captions:
        return {}
    words = choose(caption for own in references.values() for caption in own)
    said = words.tokenize([captions[i] for i in references])
    found = {
        "distinct": len(set(said)) / len(said),
        "commonest": Counter(said).most_common(1)[0][1] / len(said),
        "vocabulary": len({word for caption in said for word in caption.split()}),
        "self_bleu_4": self_bleu(said),
    }
    if words is not ENGLISH:
        return found
    flat = iter(words.tokenize([caption for own in references.values() for caption in own]))
    written = [[next(flat) for _ in own] for own in references.values()]
    known = nouns(caption for own in written for caption in own)
    if not known:
        return found
    mentioned = unseen = with_unseen = 0
    for caption, own in zip(said, written, strict=True):
        seen = {singular(word, known) for text in own for word in text.split()}
        named = {singular(word, known) for word in caption.split()} & known
        mentioned += len(named)
        unseen += len(named - seen)
        with_unseen += bool(named - seen)
    found["unseen_nouns"] = unseen / mentioned if mentioned else 0.0
    found["unseen_captions"] = with_unseen / len(said)
    return found


def of_people(references: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """The same numbers of each image's first reference against its others; images with one reference are left out."""
    several = {i: captions for i, captions in references.items() if len(captions) > 1}
    return diversity({i: own[0] for i, own in several.items()}, {i: own[1:] for i, own in several.items()})


def nouns(captions: Iterable[str]) -> set[str]:
    """The nouns of tokenised English captions, in the singular, by the rule above."""
    after, ending = Counter[str](), Counter[str]()
    for caption in captions:
        words = [*caption.split(), ""]
        for before, word, following in zip(words, words[1:], words[2:], strict=False):
            if before in DETERMINERS and word not in ENDS:
                after[word] += 1
                ending[word] += following in ENDS or not following or following.endswith("ing")
    found = {word for word, times in after.items() if times >= TIMES and ending[word] >= SHARE * times}
    found -= NO_THINGS
    return {singular(word, found) for word in found if word.isalpha()}


def singular(word: str, known: set[str]) -> str:
    """The singular of a noun, where it is irregular or itself known."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > 3 and word.removesuffix(ending) + instead in known:
            return word.removesuffix(ending) + instead
    return word


def self_bleu(captions: Sequence[str]) -> float:
    """The mean BLEU-4 of each tokenised caption against all the others; 0 where there is one only.

    As if each were scored against the others one by one. Of each n-gram it suffices to know the two highest counts that
    a caption has, because a caption's references are all captions but itself.
    """
    if len(captions) < 2:
        return 0.0
    counted = list(map(count, captions))
    highest: list[dict[int, tuple[int, int]]] = [{} for _ in range(ORDERS)]
    for ngrams in counted:
        for table, counts in zip(highest, ngrams.counts, strict=True):
            for gram, times in counts.items():
                most, second = table.get(gram, (0, 0))
                table[gram] = (times, most) if times > most else (most, max(second, times))
    lengths = Counter(ngrams.length for ngrams in counted)
    return statistics.fmean(_against_others(ngrams, highest, lengths) for ngrams in counted)


def _against_others(own: Ngrams, highest: list[dict[int, tuple[int, int]]], lengths: Counter[int]) -> float:
    matches = []
    for counts, table in zip(own.counts, highest, strict=True):
        correct = 0
        for gram, times in counts.items():
            most, second = table[gram]
            correct += min(times, second if most == times else most)
        matches.append(correct)
    others = (length for length, times in lengths.items() if times > (length == own.length))
    closest = min((abs(length - own.length), length) for length in others)[1]
    return bleu_of([*matches, *(max(0, own.length - n) for n in range(ORDERS)), own.length, closest])[-1]
