"""Which images each split takes, and how one is prepared to be stored.

    draws = plan(pools, limit=2000, val_share=0.1, test_share=0.1)
    chosen = choose(Pools(pools, seed=0), draws, prepare, num_proc=8, keep=writer.keep)

A pool is a list of records that a split may take from: a part of COCO 2014, or a split that the data name. A pool
with a name such as "train+validation" is divided among those splits once its images are known: see `divide`.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

from PIL import Image

from captioning import InputError, cli
from captioning.data import images, near
from captioning.data.audit import Finding
from captioning.data.records import Record

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


def fill_splits(pools: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """Pools of which every split can be filled. Splits that are there are kept; missing ones are drawn.

    Images without a split (their pool is "") are divided among all three. Otherwise missing splits are drawn from
    `train`, and where that is missing too, from all images together.
    """
    pools = {name: records for name, records in pools.items() if records}
    missing = [split for split in SPLITS if split not in pools]
    if "" in pools:
        return {"+".join(SPLITS) if name == "" else name: records for name, records in pools.items()}
    if "train" in missing:
        every = sorted(itertools.chain(*pools.values()), key=lambda record: record.image_id)
        return {"+".join(SPLITS): every}
    return {"+".join((name, *missing)) if name == "train" else name: records for name, records in pools.items()}


def plan(pools: dict[str, list[Record]], limit: int, val_share: float, test_share: float) -> list[Draw]:
    """How many images each split takes from which pool. Later draws take what earlier ones left.

    Args:
        pools: `train2014` and `val2014`, or what `fill_splits` gives.
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
        return [Draw(pool, len(records), [pool]) for pool, records in pools.items()]
    if any("+" in pool for pool in pools):  # of each pool its share
        draws = [Draw(pool, limit * len(records) // total, [pool]) for pool, records in pools.items()]
        for draw in itertools.islice(itertools.cycle(draws), limit - sum(draw.wanted for draw in draws)):
            draw.wanted += 1
        return draws
    validation, test = min(validation, len(pools["validation"])), min(test, len(pools["test"]))
    train = min(limit - validation - test, len(pools["train"]))
    test = min(limit - validation - train, len(pools["test"]))
    return [
        Draw("validation", limit - train - test, ["validation"]),
        Draw("test", test, ["test"]),
        Draw("train", train, ["train"]),
    ]


def uses_shares(pools: dict[str, list[Record]], limit: int) -> bool:
    """Whether `val_share` and `test_share` decide anything: not where a data set's own splits are taken whole."""
    total = sum(map(len, pools.values()))
    return "val2014" in pools or any("+" in pool for pool in pools) or 0 < limit < total


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


def divide(
    records: list[Record], targets: list[str], val_share: float, test_share: float, groups: list[int] | None = None
) -> list[str]:
    """The split of each image of a pool, all images of a group in one split.

    Args:
        records: in an order that chance decided.
        targets: the splits that share them.
        val_share, test_share: of these images, one at least.
        groups: the number of each image's group; None: each is alone.
    """
    if not records:
        return []
    groups = list(range(len(records))) if groups is None else groups
    sizes = Counter(groups)
    shares = {"validation": val_share, "test": test_share}
    wanted = {split: max(1, round(len(records) * share)) for split, share in shares.items() if split in targets}
    of_group: dict[int, str] = {}
    # Images that are alone come first, so that validation and test get the number that is wanted.
    in_order = sorted(dict.fromkeys(groups), key=lambda group: sizes[group])
    for group in in_order:
        split = next((split for split, count in wanted.items() if count >= sizes[group]), targets[0])
        of_group[group] = split
        if split in wanted:
            wanted[split] -= sizes[group]
    for split in wanted:
        if split not in of_group.values():  # every group is too large: the smallest has to do
            smallest = next((group for group in in_order if of_group[group] == targets[0]), in_order[0])
            of_group[smallest] = split
    if targets[0] not in of_group.values() and len(in_order) < len(records):  # too few groups for so many splits
        return divide(records, targets, val_share, test_share)
    return [of_group[group] for group in groups]


@dataclass
class Prepared:
    """A chosen image as it will be stored: encoded bytes, or the reason why it was dropped."""

    data: bytes = b""
    dropped: str = ""
    detail: str = ""  # why it is unreadable
    sketch: bytes = b""  # what finds images that are nearly the same


def prepare_image(record: Record, short_side: int, convert_rgb: bool = False) -> Prepared:
    """Read, check, resize and encode one image; runs in a worker process.

    Args:
        short_side: the shorter side becomes as many pixels, where it is longer.
        convert_rgb: images of other modes are converted, not dropped.
    """
    if not record.has_caption():
        return Prepared(dropped="no caption")
    if not record.is_there():
        return Prepared(dropped="not fetched" if record.url else "missing")
    try:
        data = record.read()
        picture = images.decode(data, record.file_name, min_side=short_side)
        mode = picture.mode
        if mode != "RGB" and not convert_rgb:
            return Prepared(dropped=f"mode {mode}")
        picture = images.to_rgb(picture, record.file_name)
    except InputError as error:
        return Prepared(dropped="unreadable", detail=getattr(error, "reason", str(error)))
    shorter = min(picture.size)
    # Metadata is left behind, for it may turn the image when it is opened.
    as_it_is = mode == "RGB" and shorter <= short_side and data.startswith(b"\xff\xd8\xff") and b"Exif\0\0" not in data
    if shorter > short_side:
        width, height = (max(short_side, round(side * short_side / shorter)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    smallest = min(data, encoded.getvalue(), key=len) if as_it_is else encoded.getvalue()
    return Prepared(smallest, sketch=near.sketch_of(picture))


@dataclass
class Chosen:
    """What became of the records: those of each draw, and those that were dropped."""

    splits: dict[str, list[Record]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> images
    examples: dict[str, list[Record]] = field(default_factory=dict)  # reason -> the first EXAMPLES of them
    sketches: dict[str, list[bytes]] = field(default_factory=dict)  # of the images of `splits`
    details: dict[str, str] = field(default_factory=dict)  # reason -> what exactly is wrong with the first of them

    def groups(self) -> dict[str, list[int]]:
        """The number of each image's group in `splits`: images that are nearly the same have one number."""
        numbers = iter(near.find_groups(list(itertools.chain(*self.sketches.values()))))
        return {split: list(itertools.islice(numbers, len(own))) for split, own in self.sketches.items()}

    def divide(self, divided: Mapping[str, Sequence[str]], groups: dict[str, list[int]]) -> dict[str, list[int]]:
        """Give the records of pools to their splits; returns `groups` likewise."""
        new: dict[str, list[int]] = {split: [] for split in SPLITS}
        records: dict[str, list[Record]] = {split: [] for split in SPLITS}
        for pool, own in self.splits.items():
            splits = divided.get(pool) or itertools.repeat(pool, len(own))
            for record, split, group in zip(own, splits, groups[pool], strict=True):
                records[split].append(record)
                new[split].append(group)
        self.splits, self.sketches = records, {}
        return new

    def example(self, reason: str) -> str:
        """The first image that was dropped for a reason: its name, or where it was looked for."""
        first = self.examples[reason][0]
        return f"{first.file_name}, looked for at '{first.path}'" if reason == "missing" else first.file_name

    def broken(self) -> Finding:
        """The images that could not be read."""
        first = self.examples.get("unreadable", [])
        detail = f"{first[0].file_name}: {self.details['unreadable']}" if first else ""
        return Finding(self.dropped["unreadable"], "broken images", "left out", [detail])

    def drop(self, record: Record, reason: str, detail: str = "") -> None:
        self.details.setdefault(reason, detail)
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
        InputError: a process was killed.
    """
    from tqdm import tqdm

    chosen = Chosen({draw.split: [] for draw in draws}, sketches={draw.split: [] for draw in draws})
    fetch(pools.first_choice(draws))

    def take(draw: Draw, pool: str) -> None:
        # No more records than are still wanted, so that nothing is read or fetched needlessly.
        while batch := pools.take(pool, min(draw.wanted, BATCH)):
            fetch([record for record in batch if record.has_caption()])
            for record, image in in_order_of_place(prepare_all, batch):
                if image.dropped == "unreadable" and record.url:  # damaged since it was fetched
                    record.path.unlink()
                    fetch([record])
                    image = prepare(record)
                if image.dropped:
                    chosen.drop(record, image.dropped, image.detail)
                    continue
                keep(draw.split, record, image.data)
                chosen.splits[draw.split].append(record)
                # Of very many images a hash is all that is compared.
                chosen.sketches[draw.split].append(image.sketch if total <= near.MOST else image.sketch[: near.HASH])
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
    return chosen


def in_order_of_place(
    prepare_all: Callable[[Iterable[Record]], Iterable[Prepared]], batch: list[Record]
) -> Iterable[tuple[Record, Prepared]]:
    """Records and their images. Those that lie in a file of many are read in the order in which they lie there."""
    if not any(record.member for record in batch):
        return zip(batch, prepare_all(batch), strict=True)

    def place(at: int) -> tuple[str, int]:
        member = batch[at].member
        return str(batch[at].location), member.at if member else 0

    order = sorted(range(len(batch)), key=place)
    results = dict(zip(order, prepare_all([batch[at] for at in order]), strict=True))
    return [(record, results[at]) for at, record in enumerate(batch)]


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


def refuse_empty(chosen: Chosen) -> None:
    """
    Raises:
        InputError: a split has no image; it says why, and what to do.
    """
    for split in SPLITS:
        if not chosen.splits.get(split):
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(chosen.dropped.items()))
            raise InputError(f"no usable image for {split} (dropped: {reasons or 'nothing'}); {_remedy(chosen)}")


def _remedy(chosen: Chosen) -> str:
    """What to do about the reason for which most images were dropped."""
    if not chosen.dropped:
        return "give more of them, three at least"
    (reason, _), *_ = chosen.dropped.most_common(1)
    first = chosen.examples[reason][0]
    if reason == "missing":
        return (
            f"the first was looked for at '{first.path}'; put the images there, or name their folder with --image_dir"
        )
    if reason.startswith("mode "):
        return "only RGB images are kept; add --convert_rgb to convert the others"
    if reason == "unreadable":
        return f"the first is '{first.path}', and {chosen.details[reason]}; get them again, or leave them out"
    if reason == "no caption":
        return "write a caption for each image that is to be used"
    return "check that the server has them"
