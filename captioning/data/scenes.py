"""Draws a small data set in COCO 2014's layout, so that everything runs with no network.

Each scene is one shape, a few alike, or two shapes and where they stand to each other, with five differently worded
captions. Some combinations appear in the test split only ("three blue squares", while train shows two of them, and
three red ones): a model that captions them right has learnt colours, shapes and numbers, not pictures.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SOURCE = "drawn scenes"  # in dataset.json
SIDE = 128  # pixels
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
    "purple": (130, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {"white": (250, 250, 250), "grey": (200, 200, 204)}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SIZES = ("small", "large")
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SPLITS = {"train": 1_800, "val": 80, "test": 120}
GRAYSCALE = {"train": 9, "val": 3}  # files of mode L, so that the RGB filter has work
UNLABELLED = 8  # images in test2014, without captions as in COCO itself

# image, captions, and what is combined in it, such as "three blue square"
Scene = tuple[Image.Image, list[str], str]


def draw(root: Path, seed: int = 0) -> Path:
    """Draw the data set into `root` (created) and return the Karpathy file that names its splits.

    Writes `train2014/`, `val2014/`, `test2014/`, `annotations/captions_{train,val}2014.json` and
    `dataset_coco.json`. The same seed gives the same bytes.
    """
    rng = random.Random(seed)
    images: list[dict[str, Any]] = []
    for split, count in SPLITS.items():
        folder = "train2014" if split == "train" else "val2014"
        for number in range(count + GRAYSCALE.get(split, 0)):
            unseen = split == "test" and number % 2 == 0
            scene, captions, combination = draw_scene(rng, unseen)
            if number >= count:
                scene = scene.convert("L")
            image_id = len(images) + 1
            name = f"COCO_{folder}_{image_id:012d}.jpg"
            _save(scene, root / folder / name)
            sentences = [{"raw": caption, "tokens": caption.lower().rstrip(".").split()} for caption in captions]
            images.append(
                {
                    "cocoid": image_id,
                    "filepath": folder,
                    "filename": name,
                    "split": split,
                    "sentences": sentences,
                    "combination": combination,
                }
            )
    for number in range(UNLABELLED):
        scene, _, _ = draw_scene(rng, unseen=True)
        _save(scene, root / "test2014" / f"COCO_test2014_{len(images) + 1 + number:012d}.jpg")
    for folder in ("train2014", "val2014"):
        _write_json(root / "annotations" / f"captions_{folder}.json", _coco_annotations(images, folder))
    karpathy = root / "dataset_coco.json"
    _write_json(karpathy, {"dataset": "drawn scenes", "images": images})
    return karpathy


def draw_scene(rng: random.Random, unseen: bool = False) -> Scene:
    """One scene and its five captions; `unseen` makes it one of the combinations that train never shows."""
    kind = rng.choice((_draw_one, _draw_several, _draw_two))
    return kind(rng, rng.choice(sorted(BACKGROUNDS)), unseen)


def _choose(rng: random.Random, others: int, step: int, unseen: bool) -> tuple[int, int]:
    """A thing and one of `others` attributes, by number; a sixth of all combinations is held out for the test split.

    Every thing and every attribute is seen in other combinations.
    """
    combinations = [
        (thing, other)
        for thing in range(len(THINGS))
        for other in range(others)
        if ((thing + step * other) % 6 == 0) == unseen
    ]
    return rng.choice(combinations)


def _draw_one(rng: random.Random, background: str, unseen: bool) -> Scene:
    thing, number = _choose(rng, len(SIZES), 3, unseen)
    (colour, shape), size = THINGS[thing], SIZES[number]
    radius = rng.uniform(21, 24) if size == "small" else rng.uniform(40, 45)
    centre = (rng.uniform(radius + 4, SIDE - radius - 4), rng.uniform(radius + 4, SIDE - radius - 4))
    captions = [
        f"A {size} {colour} {shape} on a {background} background.",
        f"There is a {size} {colour} {shape} in the picture.",
        f"The picture shows one {size} {colour} {shape}.",
        f"One {colour} {shape}, and it is {size}.",
        f"A single {size} {shape} drawn in {colour} on {background}.",
    ]
    return _paint(rng, background, [(colour, shape, centre, radius)]), captions, f"{size} {colour} {shape}"


def _draw_several(rng: random.Random, background: str, unseen: bool) -> Scene:
    thing, count = _choose(rng, len(NUMBERS), 2, unseen)
    (colour, shape), count = THINGS[thing], sorted(NUMBERS)[count]
    corners = rng.sample([(33, 33), (95, 33), (33, 95), (95, 95)], count)
    items = [(colour, shape, (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)), rng.uniform(22, 26)) for x, y in corners]
    number = NUMBERS[count]
    captions = [
        f"{number.capitalize()} {colour} {shape}s on a {background} background.",
        f"There are {number} {colour} {shape}s in the picture.",
        f"The picture shows {number} {colour} {shape}s.",
        f"A group of {number} {colour} {shape}s.",
        f"{number.capitalize()} {shape}s, all of them {colour}.",
    ]
    return _paint(rng, background, items), captions, f"{number} {colour} {shape}"


def _draw_two(rng: random.Random, background: str, unseen: bool) -> Scene:
    first, second = 0, 0
    while first == second:
        first, second = _choose(rng, len(THINGS), 1, unseen)
    relation = rng.choice(sorted(RELATIONS))
    near, far, across = rng.uniform(30, 34), rng.uniform(94, 98), rng.uniform(50, 78)
    along = (near, far) if relation in ("left of", "above") else (far, near)
    drift = rng.uniform(-6, 6)
    if relation in ("left of", "right of"):
        centres = [(along[0], across), (along[1], across + drift)]
    else:
        centres = [(across, along[0]), (across + drift, along[1])]
    things = (THINGS[first], THINGS[second])
    items = [(*thing, centre, rng.uniform(22, 27)) for thing, centre in zip(things, centres, strict=True)]
    a, b = (f"{colour} {shape}" for colour, shape in things)
    inverse = RELATIONS[relation]
    captions = [
        f"A {a} {relation} a {b}.",
        f"There is a {a} {relation} a {b}.",
        f"The picture shows a {a} {relation} a {b}.",
        f"A {b} {inverse} a {a}.",
        f"There is a {b} {inverse} a {a} on a {background} background.",
    ]
    return _paint(rng, background, items), captions, " and ".join(sorted((a, b)))


def _paint(
    rng: random.Random, background: str, items: list[tuple[str, str, tuple[float, float], float]]
) -> Image.Image:
    scale = 3  # drawn larger and reduced, for smooth edges
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), _vary(rng, BACKGROUNDS[background], 5))
    pen = ImageDraw.Draw(image)
    for colour, shape, (x, y), radius in items:
        outline = [(px * scale, py * scale) for px, py in _outline(shape, x, y, radius)]
        pen.polygon(outline, fill=_vary(rng, COLOURS[colour], 14))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _outline(shape: str, x: float, y: float, radius: float) -> Iterator[tuple[float, float]]:
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    turn = math.pi / 4 if shape == "square" else 0
    for corner in range(corners):
        reach = radius * (0.42 if shape == "star" and corner % 2 else 1)
        angle = turn + 2 * math.pi * corner / corners - math.pi / 2
        yield x + reach * math.cos(angle), y + reach * math.sin(angle)


def _vary(rng: random.Random, colour: tuple[int, int, int], by: int) -> tuple[int, ...]:
    return tuple(max(0, min(255, channel + rng.randint(-by, by))) for channel in colour)


def _coco_annotations(images: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    chosen = [image for image in images if image["filepath"] == folder]
    return {
        "info": {"description": "drawn scenes in COCO 2014's layout"},
        "licenses": [],
        "type": "captions",
        "images": [
            {"id": image["cocoid"], "file_name": image["filename"], "height": SIDE, "width": SIDE} for image in chosen
        ],
        "annotations": [
            {"id": image["cocoid"] * 10 + number, "image_id": image["cocoid"], "caption": sentence["raw"]}
            for image in chosen
            for number, sentence in enumerate(image["sentences"])
        ],
    }


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
