"""How many planted near-duplicates are found, how many images are taken for one wrongly, and how long it takes.

    python tests/benchmarks/near.py --images DIR              # such as Flickr8k's

Plants 200 copies: encoded anew at quality 30 to 80, resized to 40 to 160 %, cut by up to 5 % at each side, or all of
it. An image that is grouped with one that is not its copy counts as a false alarm, also where it is rightly so.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning.data import images, near


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--limit", type=int, default=8000, help="images at most")
    parser.add_argument("--planted", type=int, default=200, help="copies")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    files = sorted(args.images.glob("*.*"))[: args.limit]
    began = time.monotonic()
    sketches = [near.sketch_of(images.open_image(file)) for file in files]
    read = time.monotonic() - began
    chosen = rng.sample(range(len(files)), args.planted)
    kinds = [PLANTS[number % len(PLANTS)] for number in range(args.planted)]
    copies = [plant(images.open_image(files[at]), kind, rng) for at, kind in zip(chosen, kinds, strict=True)]
    began = time.monotonic()
    groups = near.find_groups(sketches + [near.sketch_of(copy) for copy in copies])
    seconds = time.monotonic() - began
    found = sum(groups[at] == groups[len(files) + number] for number, at in enumerate(chosen))
    members: dict[int, int] = {}
    for group in groups[: len(files)]:
        members[group] = members.get(group, 0) + 1
    false = sum(count for group, count in members.items() if count > 1)
    print(f"{len(files):,} images: {found} of {args.planted} copies found, {false} images ({false / len(files):.2%}) ")
    print(f"grouped with another; {read:.0f} s to read and sketch, {seconds:.0f} s to compare")
    missed = [kinds[n] for n, at in enumerate(chosen) if groups[at] != groups[len(files) + n]]
    print(f"missed: {', '.join(missed) or 'none'}")
    return {"found": found / args.planted, "false": false / len(files), "seconds": read + seconds}


PLANTS = ("encoded anew", "resized", "cut alike", "cut in a corner", "cut anyhow", "all of it")


def plant(image: Image.Image, kind: str, rng: random.Random) -> Image.Image:
    if kind in ("resized", "all of it"):
        scale = rng.uniform(0.4, 1.6)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
    if kind in ("cut alike", "cut in a corner", "cut anyhow", "all of it"):
        cuts = [rng.uniform(0, 0.05) for _ in range(4)]
        if kind == "cut alike":
            cuts = [0.025] * 4
        elif kind == "cut in a corner":
            cuts = [0.05, 0.05, 0, 0]
        left, top, right, bottom = cuts
        width, height = image.size
        image = image.crop(
            (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
        )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.randint(30, 80))
    return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
