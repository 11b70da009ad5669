"""Two captioners made equally good: for each image, chance decides whose caption is whose."""

import statistics
from dataclasses import replace

from captioning.scores import bleu, bootstrap
from captioning.scores.metrics import Evaluation


def exchanged(pair: tuple[Evaluation, Evaluation], swapped: list[bool], turn: bool) -> Evaluation:
    """The first of two evaluations, or with `turn` the second, where the images in `swapped` change places."""
    sources = [pair[turn != swap] for swap in swapped]
    each = {name: [source.each[name][k] for k, source in enumerate(sources)] for name in pair[0].each}
    counts = [source.bleu_statistics[k] for k, source in enumerate(sources)]
    scores = {name: statistics.fmean(values) for name, values in each.items()}
    scores |= {f"bleu_{n + 1}": value for n, value in enumerate(bleu.bleu_of(bleu.total(counts)))}
    return replace(pair[0], scores=scores, each=each, bleu_statistics=counts)


def covered(pair: tuple[Evaluation, Evaluation], rng, repeats: int = 100, resamples: int = 400) -> dict[str, int]:
    """In how many repeats the interval of the difference holds 0, by score."""
    counts = dict.fromkeys(pair[0].scores, 0)
    for repeat in range(repeats):
        swapped = [rng.random() < 0.5 for _ in pair[0].ids]
        ours, theirs = (exchanged(pair, swapped, turn) for turn in (False, True))
        for name, found in bootstrap.differences(ours, theirs, resamples, repeat).items():
            counts[name] += found.low <= 0 <= found.high
    return counts
