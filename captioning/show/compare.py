"""Two captioners or more on the same images: scores, differences that may or may not be chance, captions side by side.

    found = compare({"run-a": captions, "run-b": others}, references)
    print(table(found))
    page(found, title, author, names, picture)   # HTML, one file
    per_image_csv(found, names)

Each captioner is compared with the first one.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.files import read_json
from captioning.scores import bootstrap
from captioning.scores.bootstrap import Difference
from captioning.scores.metrics import Evaluation, evaluate
from captioning.scores.names import SCORE_NAMES
from captioning.scores.signature import differences
from captioning.show import tables, templates

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 20  # images, those whose scores differ most
DECIDES = "cider_d"  # by which score that is
EQUAL = 1e-9  # scores of an image that differ by less are equal

RECIPE = ("model", "recipe", "learning_rates", "decoding", "training", "data")
# What may differ between two runs of one recipe.
NOT_THE_RECIPE = {"seed", "data_seed", "output_dir", "run_name", "hub_model_id"}


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        captions: {name of a captioner: {image id: caption}}.
        references: {image id: captions by people}, in the order of the evaluations.
        evaluations: {name: its scores}.
        intervals: {name: {score: 95 % interval}}.
        differences: {name: {score: it minus the first captioner}}, of all but the first.
        seeds: whether the captioners are trainings of one recipe that differ in their seeds alone.
    """

    captions: Mapping[str, Mapping[int, str]]
    references: Mapping[int, Sequence[str]]
    evaluations: Mapping[str, Evaluation]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    differences: Mapping[str, Mapping[str, Difference]]
    seeds: bool = False

    @property
    def first(self) -> str:
        """The name of the captioner that the others are compared with."""
        return next(iter(self.evaluations))

    @property
    def scores(self) -> list[str]:
        """The keys of the scores that all have, in the order of every table."""
        shared = set.intersection(*(set(found.scores) for found in self.evaluations.values()))
        return [key for key in SCORE_NAMES if key in shared]

    def wins(self, name: str, key: str) -> tuple[int, int, int]:
        """On how many images `name` has the better score, the first captioner has, and neither."""
        pairs = list(zip(self.evaluations[name].each[key], self.evaluations[self.first].each[key], strict=True))
        sign = -1 if key == "loss" else 1
        better = sum(sign * (ours - theirs) > EQUAL for ours, theirs in pairs)
        worse = sum(sign * (theirs - ours) > EQUAL for ours, theirs in pairs)
        return better, worse, len(pairs) - better - worse

    def spread(self, key: str) -> tuple[float, float]:
        """Mean and standard deviation of a score over the captioners."""
        values = [found.scores[key] for found in self.evaluations.values()]
        return statistics.fmean(values), statistics.stdev(values)

    def most_different(self) -> list[int]:
        """The ids of the images whose scores differ most, the most different first."""
        columns = [found.each[DECIDES] for found in self.evaluations.values()]
        ranges = [max(row) - min(row) for row in zip(*columns, strict=True)]
        ranked = sorted(range(len(ranges)), key=lambda row: -ranges[row])
        ids = self.evaluations[self.first].ids
        return [ids[row] for row in ranked[:SHOWN] if ranges[row] > EQUAL]


def compare(
    captions: Mapping[str, Mapping[int, str]],
    references: Mapping[int, Sequence[str]],
    more: Mapping[str, Callable[[str, Sequence[str]], float]] | None = None,
    seeds: bool = False,
    extend: Callable[[Evaluation, Mapping[int, str]], Evaluation] | None = None,
) -> Comparison:
    """Score several captioners on the same images and compare each with the first.

    Args:
        captions: {name: {image id: caption}}, two or more.
        references: {image id: captions by people}, of the same images.
        more: other scores, see `metrics.evaluate`.
        seeds: whether they are trainings of one recipe that differ in their seeds alone.
        extend: adds scores to the evaluation of some captions, such as `ClipScores`.

    Raises:
        InputError: the images differ.
    """
    evaluations = {name: evaluate(said, references, more=more) for name, said in captions.items()}
    if extend is not None:
        evaluations = {name: extend(found, captions[name]) for name, found in evaluations.items()}
    first, *others = evaluations
    drawn = {name: bootstrap.replicates(found) if found.ids else {} for name, found in evaluations.items()}
    return Comparison(
        captions,
        references,
        evaluations,
        {name: bootstrap.intervals_of(draws) for name, draws in drawn.items()},
        {
            name: bootstrap.differences_of(evaluations[name], evaluations[first], drawn[name], drawn[first])
            for name in others
        },
        seeds,
    )


def differ_in_seeds_alone(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs are trainings of one recipe with different seeds.

    Args:
        results: what the `results.json` of each holds.
    """
    recipes = [
        {part: {key: value for key, value in one.get(part, {}).items() if key not in NOT_THE_RECIPE} for part in RECIPE}
        for one in results
    ]
    seeds = [one.get("training", {}).get("seed") for one in results]
    return len(set(seeds)) == len(seeds) and all(one == recipes[0] and any(one.values()) for one in recipes)


def results_of(path: str, split: str) -> dict[str, Any]:
    """What the `results.json` of a run folder holds; {} where there is none, or where it scored another split."""
    file = Path(path) / "results.json"
    return read_json(file) if file.is_file() and split in ("validation", "test") else {}


def warnings(found: Comparison, results: Sequence[Mapping[str, Any]], split: str) -> list[str]:
    """A sentence on each run whose own `results.json` must not be compared with these scores.

    Args:
        results: of each captioner, {} where it has none.
    """
    signature = found.evaluations[found.first].signature
    lines = []
    for name, one in zip(found.evaluations, results, strict=True):
        own = one.get(split, {}).get("signature")
        if own and (fields := differences(own, signature)):
            lines.append(
                f"{name} was scored under another signature when it was trained ({'; '.join(fields)}): compare the "
                "scores below, not those of its results.json"
            )
    return lines


def file_name(names: Sequence[str], split: str) -> str:
    """The name of a comparison's page: comparisons of other runs have other names."""
    runs = "_".join("".join(c if c.isalnum() or c in ".-" else "_" for c in name) for name in names)
    runs = runs.encode()[:200].decode(errors="ignore")  # disks take names of 255 bytes
    return f"comparison_{runs}_{split}.html"


def short_names(paths: Sequence[str]) -> list[str]:
    """A name for each run folder or file: as much of the end of its path as tells them apart, all different."""
    split = [
        Path(path.rstrip("/")).with_suffix("").parts if Path(path).is_file() else Path(path).parts for path in paths
    ]
    depth = 1
    while depth < max(map(len, split)) and len({parts[-depth:] for parts in split}) < len(split):
        depth += 1
    names = ["/".join(parts[-depth:]) for parts in split]
    return [name if names.count(name) == 1 else f"{name} ({number + 1})" for number, name in enumerate(names)]


# ---- on the terminal


def table(found: Comparison) -> str:
    """Scores, and below them the differences from the first captioner."""
    heads = [*found.evaluations, *(("mean", "std") if _has_spread(found) else ())]
    rows = [["", *heads]]
    for key in found.scores:
        cells = [tables.with_interval(_scores(found, name), key, 4) for name in found.evaluations]
        rows.append([key, *cells, *(f"{value:.4f}" for value in found.spread(key) if _has_spread(found))])
    parts = [tables.columns(rows)]
    for name in found.differences:
        rows = [[f"{name} minus {found.first}", "difference", "p", "better on", "worse on", "equal on"]]
        rows += [[key, *map(str, row)] for key, row in _difference_rows(found, name, 4)]
        parts.append(tables.columns(rows))
    return "\n\n".join(parts)


def _scores(found: Comparison, name: str) -> dict[str, Any]:
    return {**found.evaluations[name].scores, "intervals": found.intervals[name]}


def _has_spread(found: Comparison) -> bool:
    return found.seeds or len(found.evaluations) > 2


def _difference_rows(found: Comparison, name: str, digits: int) -> list[tuple[str, tuple[str, ...]]]:
    rows = []
    for key in found.scores:
        one = found.differences[name][key]
        difference = f"{one.value:+.{digits}f} [{one.low:+.{digits}f}, {one.high:+.{digits}f}]"
        p = "<0.001" if one.p < 0.001 else f"{one.p:.3f}"
        rows.append((key, (difference, p, *(f"{images:,}" for images in found.wins(name, key)))))
    return rows


# ---- files


def page(
    found: Comparison,
    source: str,
    author: str,
    names: Mapping[int, str],
    picture: Callable[[int], Image] | None = None,
) -> str:
    """The page of a comparison: one HTML file that fetches and runs nothing.

    Args:
        source: where the references are from.
        author: who wrote them, such as "a person".
        names: of the images, by id.
        picture: gives the image with an id; None: there are no pictures.
    """
    spread = _has_spread(found)
    any_evaluation = found.evaluations[found.first]
    return templates.render(
        "compare.html.jinja",
        title=" and ".join(found.evaluations) if len(found.evaluations) < 4 else f"{len(found.evaluations)} captioners",
        source=source,
        author=author,
        images=len(found.references),
        first=found.first,
        others=list(found.differences),
        seeds=found.seeds,
        spread=spread,
        protocol=any_evaluation.protocol,
        signature=any_evaluation.signature,
        interval=bootstrap.PROTOCOL,
        head=["score", *found.evaluations, *(("mean", "standard deviation") if spread else ())],
        rows=[
            [
                SCORE_NAMES[key],
                *(tables.with_interval(_scores(found, name), key) for name in found.evaluations),
                *(f"{value:.3f}" for value in found.spread(key) if spread),
            ]
            for key in found.scores
        ],
        differences=[
            (name, [(SCORE_NAMES[key], *row) for key, row in _difference_rows(found, name, 3)], _verdict(found, name))
            for name in found.differences
        ],
        decides=SCORE_NAMES[DECIDES],
        cards=[_card(found, image_id, names, picture) for image_id in found.most_different()],
    )


def _verdict(found: Comparison, name: str) -> str:
    """One sentence on the score that decides."""
    one = found.differences[name][DECIDES]
    if one.low <= 0 <= one.high:
        return (
            f"By {SCORE_NAMES[DECIDES]}, {name} and {found.first} cannot be told apart on these images: the interval "
            "of their difference holds 0."
        )
    better, worse = (name, found.first) if one.value > 0 else (found.first, name)
    return (
        f"By {SCORE_NAMES[DECIDES]}, {better} is better than {worse} on images of this kind: the interval of their "
        "difference does not hold 0."
    )


def _card(
    found: Comparison, image_id: int, names: Mapping[int, str], picture: Callable[[int], Image] | None
) -> dict[str, Any]:
    row = found.evaluations[found.first].ids.index(image_id)
    values = {name: one.each[DECIDES][row] for name, one in found.evaluations.items()}
    best = max(values.values())
    return {
        "name": names.get(image_id) or f"image {image_id}",
        "picture": picture and templates.thumbnail(picture(image_id)),
        "captions": [
            (name, found.captions[name][image_id], value, best - value <= EQUAL) for name, value in values.items()
        ],
        "references": list(found.references[image_id]),
    }


def per_image_csv(found: Comparison, names: Mapping[int, str]) -> str:
    """Captions and scores of each image, as CSV; the images in the order of the split."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    runs = list(found.evaluations)
    columns = [(key, name) for key in found.scores for name in runs]
    writer.writerow(["image_id", "file_name", *(f"caption {n}" for n in runs), *(f"{key} {n}" for key, n in columns)])
    for row, image_id in enumerate(found.evaluations[found.first].ids):
        said = [found.captions[name][image_id] for name in runs]
        scores = [f"{found.evaluations[name].each[key][row]:.6f}" for key, name in columns]
        writer.writerow([image_id, names.get(image_id, ""), *said, *scores])
    return text.getvalue()
