"""COCO 2014 folders for tests: annotations, and images that are noise."""

import json
import random

from PIL import Image


def write(path, content):
    """A text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def coco_folder(root, train, val):
    """A COCO 2014 root from {image id: captions} of each part; the images themselves need not exist."""
    for part, images in (("train2014", train), ("val2014", val)):
        write(
            root / "annotations" / f"captions_{part}.json",
            {
                "images": [{"id": i, "file_name": f"COCO_{part}_{i:012d}.jpg"} for i in images],
                "annotations": [
                    {"id": 10 * i + n, "image_id": i, "caption": caption}
                    for i, captions in images.items()
                    for n, caption in enumerate(captions)
                ],
            },
        )
    return root


def photographs(folder, names, mode="RGB", size=(96, 80)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        noise = Image.frombytes("RGB", (12, 10), random.Random(str(name)).randbytes(360))
        noise.resize(size).convert(mode).save(folder / name, quality=90)
