"""CIDEr-D as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from captioning.scores.cider import InverseDocumentFrequencies, cider_d, document_frequencies
from captioning.scores.ngrams import Ngrams, count
from captioning.scores.words import words_and_marks

END = " </s>"  # no word of any caption: it would be four


class CiderReward:
    """CIDEr-D of sampled captions, with the document frequencies of the training captions.

    Every caption, sampled or written by a person, gets an end mark as its last word. One that stops in mid-sentence
    ("a man with a") then earns less than one that ends as people end. Without it, training on CIDEr-D favours such
    bad endings.

    Each punctuation mark is a word here, where the evaluation drops them: what costs nothing is not held back, and
    captions grow into "two children are playing . . . . .".

    Args:
        references: {image id: its captions}, of the images of the training split.
    """

    def __init__(self, references: Mapping[int, Sequence[str]]):
        every = [caption for captions in references.values() for caption in captions]
        tokenized = iter(words_and_marks(every))
        self._references = {i: [next(tokenized) + END for _ in captions] for i, captions in references.items()}
        self._idf = InverseDocumentFrequencies(*document_frequencies(map(_counted, self._references.values())))

    def __call__(self, image_ids: Sequence[int], captions: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """
        Args:
            image_ids: which image each caption describes.
            captions: what is to be rewarded, one or several for an image.
            ended: whether the caption came to an end by itself.

        Returns:
            CIDEr-D of each caption, 0 to 10.
        """
        texts = [text + END * end for text, end in zip(words_and_marks(captions), ended, strict=True)]
        references = {i: _counted(self._references[i]) for i in set(image_ids)}
        return cider_d(_counted(texts), [references[i] for i in image_ids], self._idf)


def _counted(captions: Sequence[str]) -> list[Ngrams]:
    return list(map(count, captions))
