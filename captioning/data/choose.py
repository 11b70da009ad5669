"""Which images each split takes, and how one is prepared to be stored.

    draws = plan(pools, limit=2000, val_share=0.1, test_share=0.1)
    chosen = choose(Pools(pools, seed=0), draws, prepare, num_proc=8, keep=writer.keep)

A pool is a list of records that a split may take from: a part of COCO 2014, or a split of a Karpathy file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing
import random
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from PIL import Image

from captioning import InputError, cli
from captioning.data import images
from captioning.data.annotations import Record

SPLITS = ("train", "validation", "test")
JPEG_QUALITY = 85  # 25 kB for a photograph of 256 x 341
EXAMPLES = 5  # dropped records that are kept for each reason
BATCH = 1024  # records prepared at a time, which bounds the memory


@dataclass
class Draw:
    """A split, how many images it still wants, and the pools that it takes them from, in order."""

    split: str
    wanted: int
    pools: list[str]


def plan(pools: dict[str, list[Record]], limit: int, val_share: float, test_share: float) -> list[Draw]:
    """How many images each split takes from which pool. Later draws take what earlier ones left.

    Args:
        pools: `train2014` and `val2014`, or the splits of a Karpathy file.
        limit: images in all; 0: every image.
        val_share, test_share: of the images in all, between 0 and 1.

    Raises:
        InputError: there are too few images for three splits.
    """
    total = sum(map(len, pools.values()))
    limit = min(limit or total, total)
    validation, test = (max(1, round(limit * share)) for share in (val_share, test_share))
    if "val2014" in pools:
        available = len(pools["val2014"])
        if available < 2:
            raise InputError(
                f"captions_val2014.json lists {available} images and validation and test need one each; "
                "give COCO 2014 with both of its parts"
            )
        if validation + test > available:
            validation = max(1, available * validation // (validation + test))
            test = available - validation
            cli.note(f"val2014 holds {available:,} images only: validation gets {validation:,}, test {test:,}")
        return [
            Draw("validation", validation, ["val2014"]),
            Draw("test", test, ["val2014"]),
            Draw("train", limit - validation - test, ["train2014", "val2014"]),
        ]
    if limit == total:  # the file's own splits, whole, as papers use them
        return [Draw(split, len(pools[split]), [split]) for split in SPLITS]
    validation, test = min(validation, len(pools["validation"])), min(test, len(pools["test"]))
    train = min(limit - validation - test, len(pools["train"]))
    test = min(limit - validation - train, len(pools["test"]))
    return [
        Draw("validation", limit - train - test, ["validation"]),
        Draw("test", test, ["test"]),
        Draw("train", train, ["train"]),
    ]


class Pools:
    """The records of each pool in an order that `seed` decides, each taken once."""

    def __init__(self, pools: dict[str, list[Record]], seed: int):
        self.queues = {}
        for name, records in pools.items():
            shuffled = list(records)
            random.Random(f"{seed} {name}").shuffle(shuffled)
            self.queues[name] = deque(shuffled)

    def take(self, pool: str, count: int) -> list[Record]:
        """The next `count` records of a pool, or as many as are left."""
        queue = self.queues[pool]
        return [queue.popleft() for _ in range(min(count, len(queue)))]

    def first_choice(self, draws: list[Draw]) -> list[Record]:
        """What `draws` would take if every image could be used; nothing is taken."""
        found: list[Record] = []
        used: Counter[str] = Counter()
        for draw in draws:
            wanted = draw.wanted
            for pool in draw.pools:
                part = list(itertools.islice(self.queues[pool], used[pool], used[pool] + wanted))
                used[pool] += len(part)
                wanted -= len(part)
                found += part
        return [record for record in found if record.has_caption()]


@dataclass
class Prepared:
    """A chosen image as it will be stored: encoded bytes, or the reason why it was dropped."""

    data: bytes = b""
    dropped: str = ""


def prepare_image(record: Record, short_side: int) -> Prepared:
    """Read, check, resize and encode one image; runs in a worker process.

    The shorter side becomes `short_side` pixels where it is longer.
    """
    if not record.has_caption():
        return Prepared(dropped="no caption")
    if not record.is_there():
        return Prepared(dropped="not fetched" if record.url else "missing")
    try:
        data = images.read_bytes(record.path)
        picture = images.decode(data, str(record.path), min_side=short_side)
    except InputError:
        return Prepared(dropped="unreadable")
    if picture.mode != "RGB":
        return Prepared(dropped=f"mode {picture.mode}")
    shorter = min(picture.size)
    # Metadata is left behind, for it may turn the image when it is opened.
    as_it_is = shorter <= short_side and data.startswith(b"\xff\xd8\xff") and b"Exif\0\0" not in data
    if shorter > short_side:
        width, height = (max(short_side, round(side * short_side / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return Prepared(min(data, encoded.getvalue(), key=len) if as_it_is else encoded.getvalue())


@dataclass
class Chosen:
    """What became of the records: those of each split, and those that were dropped."""

    splits: dict[str, list[Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> images
    examples: dict[str, list[Record]] = field(default_factory=dict)  # reason -> the first EXAMPLES of them

    def drop(self, record: Record, reason: str) -> None:
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(record)


def choose(
    pools: Pools,
    draws: list[Draw],
    prepare: Callable[[Record], Prepared],
    num_proc: int,
    keep: Callable[[str, Record, bytes], None],
    fetch: Callable[[list[Record]], None] = lambda records: None,
) -> Chosen:
    """Go through the pools until every draw has its images.

    Results are taken in the pools' order, whatever the number of processes, and so the data set is the same.

    Args:
        prepare: `prepare_image` for one record; runs in worker processes.
        num_proc: how many of those; 1: none.
        keep: receives the split, the record and the encoded image of each one that is kept.
        fetch: fetches the images of records that are not at their `path` yet.

    Raises:
        InputError: a process was killed, or a split has no image at the end.
    """
    from tqdm import tqdm

    chosen = Chosen()
    fetch(pools.first_choice(draws))

    def take(draw: Draw, pool: str) -> None:
        # No more records than are still wanted, so that nothing is read or fetched needlessly.
        while batch := pools.take(pool, min(draw.wanted, BATCH)):
            fetch([record for record in batch if record.has_caption()])
            for record, image in zip(batch, prepare_all(batch), strict=True):
                if image.dropped == "unreadable" and record.url:  # damaged since it was fetched
                    record.path.unlink()
                    fetch([record])
                    image = prepare(record)
                if image.dropped:
                    chosen.drop(record, image.dropped)
                    continue
                keep(draw.split, record, image.data)
                chosen.splits[draw.split].append(record)
                draw.wanted -= 1
                bar.update()

    total = sum(draw.wanted for draw in draws)
    with _workers(prepare, num_proc) as prepare_all, tqdm(total=total, unit="image", desc="images") as bar:
        for draw in draws:
            for pool in draw.pools:
                take(draw, pool)
        # Images dropped from a pool that has run dry are replaced from whatever another still holds.
        short = sum(draw.wanted for draw in draws)
        for draw in sorted(draws, key=lambda draw: draw.split != "train"):
            draw.wanted = short
            for pool in draw.pools:
                take(draw, pool)
            short = draw.wanted
    _refuse_empty(chosen)
    return chosen


@contextlib.contextmanager
def _workers(
    prepare: Callable[[Record], Prepared], num_proc: int
) -> Iterator[Callable[[Iterable[Record]], Iterable[Prepared]]]:
    """`prepare` for many records, in their order, in `num_proc` processes."""
    if num_proc == 1:
        yield functools.partial(map, prepare)
        return
    # spawn: a fork of a process whose libraries run threads can hang.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_proc, context, _leave_interrupts_to_the_parent) as executor:
            yield functools.partial(executor.map, prepare, chunksize=8)
    except BrokenProcessPool:
        raise InputError(
            f"one of --num_proc {num_proc} processes was killed, for want of memory perhaps; give fewer"
        ) from None


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _refuse_empty(chosen: Chosen) -> None:
    for split, records in chosen.splits.items():
        if not records:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(chosen.dropped.items()))
            raise InputError(
                f"no usable image for {split} (dropped: {reasons or 'nothing'}); "
                "check that the images lie where the annotations say, or give more of them"
            )
