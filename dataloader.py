"""Stage 1: COCO 2014 -> RGB images only -> subsample -> a tokenised Hugging Face dataset on disk.

    python dataloader.py --limit_data 2000                         # fetches what it needs of COCO 2014
    python dataloader.py --coco_dir /data/coco2014                 # a COCO 2014 you have
    python dataloader.py --karpathy_json dataset_coco.json --image_dir /data/coco2014 --limit_data 0
    python dataloader.py --sample --encoder tiny --decoder tiny    # drawn scenes, no network

Writes one row per image (`image_id`, `file_name`, `image`, `captions`, `labels`) in the splits train, validation and
test, with the tokenizer, the image processor and `dataset.json`, which says how the folder was made.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from captioning import InputError, cli
from captioning.data import annotations, download, images, scenes
from captioning.files import locked_folder

SPLITS = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
PREVIEWED = 5  # images of each split, and of each reason to drop one
JPEG_QUALITY = 85  # 25 kB for a photograph of 256 x 341
# For the check of free space, bytes: an image of COCO 2014, the captions of both parts, and a prepared image, which
# is there twice before the folder is finished.
FETCHED_SIZE, CAPTIONS_SIZE, PREPARED_SIZE = 165_000, 120_000_000, 2 * 30_000


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prepare COCO 2014 for captioning: RGB images only, subsampled, tokenised.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_argument_group("where the images come from (default: COCO 2014 is fetched)")
    source.add_argument("--coco_dir", type=Path, help="a COCO 2014 root: annotations/, train2014/, val2014/")
    source.add_argument("--karpathy_json", type=Path, help="a Karpathy file (dataset_coco.json, dataset_flickr8k.json)")
    source.add_argument("--image_dir", type=Path, help="the images of --karpathy_json")
    source.add_argument("--sample", action="store_true", help="draw a small data set instead; needs no network")
    source.add_argument("--coco_url", default=annotations.COCO_URL, help="the server that COCO 2014 is fetched from")
    source.add_argument(
        "--cache_dir",
        type=Path,
        default=Path("~/.cache/captioning/coco2014"),
        help="keeps what was fetched; laid out as a --coco_dir",
    )
    source.add_argument(
        "--skip_missing",
        action="store_true",
        help="take other images in the place of those that the server does not have, instead of stopping",
    )

    choice = parser.add_argument_group("which images")
    choice.add_argument("--limit_data", type=int, default=2000, metavar="N", help="images in all; 0: every image")
    choice.add_argument("--val_share", type=float, default=0.1, help="share of the images for validation")
    choice.add_argument("--test_share", type=float, default=0.1, help="share of the images for test")
    choice.add_argument("--seed", type=int, default=0, help="decides which images are chosen")

    form = parser.add_argument_group("how they are stored")
    form.add_argument("--save_path", type=Path, default=Path("processed_data"), help="the folder to write")
    form.add_argument(
        "--encoder",
        default="google/vit-base-patch16-224-in21k",
        help="decides the image size: a hub id, a folder, or a preset (tiny, small, base)",
    )
    form.add_argument(
        "--decoder",
        default="gpt2",
        help="decides the tokenizer: a hub id, a folder, or a preset, which learns one from the training captions",
    )
    form.add_argument("--max_length", type=int, default=64, metavar="TOKENS", help="longest caption, its end included")
    form.add_argument(
        "--center_crop",
        action="store_true",
        help="crop images as the encoder's own preprocessing does (default: where it crops, squeeze them, so that "
        "the model sees all of what people described)",
    )
    form.add_argument(
        "--preview", type=Path, metavar="PNG", help="also draw images that were kept, and dropped ones with the reason"
    )
    form.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes that prepare images")
    form.add_argument("--debug", action="store_true", help="show the traceback of every error")
    args = parser.parse_args(argv)

    if args.limit_data < 0:
        parser.error(f"--limit_data {args.limit_data} is negative; give a number of images, or 0 for every image")
    if args.limit_data in (1, 2):
        parser.error(f"--limit_data {args.limit_data} is too few: each of three splits needs an image")
    for name in ("val_share", "test_share"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not between 0 and 1")
    if args.val_share + args.test_share >= 1:
        parser.error(f"--val_share {args.val_share} and --test_share {args.test_share} leave no images to train on")
    if args.max_length < 2:
        parser.error(f"--max_length {args.max_length} leaves no room for a word and the end token; give 2 or more")
    if args.num_proc < 1:
        parser.error(f"--num_proc {args.num_proc} is no number of processes; give 1 or more")
    if args.preview and (args.preview.is_dir() or not args.preview.parent.is_dir()):
        parser.error(
            f"--preview '{args.preview}' is a folder, or lies in none; name a PNG file in a folder that exists"
        )
    if (args.karpathy_json is None) != (args.image_dir is None):
        parser.error("--karpathy_json and --image_dir belong together; give both")
    if sum((args.coco_dir is not None, args.karpathy_json is not None, args.sample)) > 1:
        parser.error("--coco_dir, --karpathy_json and --sample exclude each other; give one")
    scheme, _, host = args.coco_url.partition("://")
    if scheme.lower() not in ("http", "https") or not host:
        parser.error(f"--coco_url {images.shown(args.coco_url)} is not an http or https address")
    return args


# ---- which images


@dataclass
class Draw:
    """A split, how many images it still wants, and the pools that it takes them from, in order."""

    split: str
    wanted: int
    pools: list[str]


def plan(pools: dict[str, list[annotations.Record]], args: argparse.Namespace) -> list[Draw]:
    """How many images each split takes from which pool. Later draws take what earlier ones left."""
    total = sum(map(len, pools.values()))
    limit = min(args.limit_data or total, total)
    validation, test = (max(1, round(limit * share)) for share in (args.val_share, args.test_share))
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


@dataclass
class Prepared:
    """A chosen image as it will be stored: encoded bytes, or the reason why it was dropped."""

    data: bytes = b""
    dropped: str = ""


def prepare_image(record: annotations.Record, short_side: int) -> Prepared:
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
        size = tuple(max(short_side, round(side * short_side / shorter)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return Prepared(min(data, encoded.getvalue(), key=len) if as_it_is else encoded.getvalue())


@dataclass
class Chosen:
    """What the selection found out, for the summary and `dataset.json`."""

    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> first file
    shown: list[tuple[annotations.Record, str]] = field(default_factory=list)  # dropped records and why, for --preview
    splits: dict[str, list[annotations.Record]] = field(default_factory=lambda: {split: [] for split in SPLITS})


class Pools:
    """The records of each pool in seeded order, each taken once."""

    def __init__(self, pools: dict[str, list[annotations.Record]], seed: int):
        self.queues = {}
        for name, records in pools.items():
            shuffled = list(records)
            random.Random(f"{seed} {name}").shuffle(shuffled)
            self.queues[name] = deque(shuffled)

    def take(self, pool: str, count: int) -> list[annotations.Record]:
        queue = self.queues[pool]
        return [queue.popleft() for _ in range(min(count, len(queue)))]

    def first_choice(self, draws: list[Draw]) -> list[annotations.Record]:
        """What `draws` would take if every image could be used; nothing is taken."""
        found, used = [], Counter()
        for draw in draws:
            wanted = draw.wanted
            for pool in draw.pools:
                part = list(itertools.islice(self.queues[pool], used[pool], used[pool] + wanted))
                used[pool] += len(part)
                wanted -= len(part)
                found += part
        return [record for record in found if record.has_caption()]


def choose(
    pools: Pools,
    draws: list[Draw],
    work: Callable[[annotations.Record], Prepared],
    args: argparse.Namespace,
    keep: Callable[[str, annotations.Record, bytes], None],
    fetch: Callable[[list[annotations.Record]], None],
) -> Chosen:
    """Go through the pools until every draw has its images; `keep` receives each one.

    Results are taken in the pools' order, whatever the number of processes, and so the data set is the same.
    """
    from tqdm import tqdm

    chosen = Chosen()
    fetch(pools.first_choice(draws))

    def take(draw: Draw) -> None:
        for pool in draw.pools:
            # No more records than are still wanted, so that nothing is read (or fetched) for naught; and no more
            # than a thousand, which bounds the memory.
            while batch := pools.take(pool, min(draw.wanted, 1024)):
                fetch([record for record in batch if record.has_caption()])
                for record, image in zip(batch, prepare(batch), strict=True):
                    if image.dropped == "unreadable" and record.url:  # damaged since it was fetched
                        record.path.unlink()
                        fetch([record])
                        image = work(record)
                    if image.dropped:
                        chosen.dropped[image.dropped] += 1
                        chosen.examples.setdefault(image.dropped, record.file_name)
                        if chosen.dropped[image.dropped] <= PREVIEWED:
                            chosen.shown.append((record, image.dropped))
                        continue
                    keep(draw.split, record, image.data)
                    chosen.splits[draw.split].append(record)
                    draw.wanted -= 1
                    bar.update()

    with contextlib.ExitStack() as stack:
        if args.num_proc > 1:
            # spawn: a fork of a process whose libraries run threads can hang.
            context = multiprocessing.get_context("spawn")
            executor = stack.enter_context(
                ProcessPoolExecutor(args.num_proc, mp_context=context, initializer=_leave_interrupts_to_the_parent)
            )
            prepare = functools.partial(executor.map, work, chunksize=8)
        else:
            prepare = functools.partial(map, work)
        total = sum(draw.wanted for draw in draws)
        bar = stack.enter_context(tqdm(total=total, unit="image", desc="images", file=sys.stderr))
        try:
            for draw in draws:
                take(draw)
            # Images dropped from a pool that has run dry are replaced from whatever another still holds.
            short = sum(draw.wanted for draw in draws)
            for draw in sorted(draws, key=lambda draw: draw.split != "train"):
                draw.wanted = short
                take(draw)
                short = draw.wanted
        except BrokenProcessPool:
            raise InputError(
                f"one of --num_proc {args.num_proc} processes was killed, for want of memory perhaps; give fewer"
            ) from None
    return chosen


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def fetcher(client: download.Client, args: argparse.Namespace) -> Callable[[list[annotations.Record]], None]:
    """What fetches the images of records, and ends the run when some cannot be had, unless --skip_missing is given."""
    given_up: set[int] = set()

    def fetch(records: list[annotations.Record]) -> None:
        failed = download.fetch_images([record for record in records if record.image_id not in given_up], client)
        if not failed:
            return
        cli.note(f"{len(failed):,} images could not be fetched, by reason and id:")
        for line in download.list_failures(failed):
            cli.note(f"  {line}")
        if not args.skip_missing:
            raise download.Unfinished(
                f"{len(failed):,} images could not be fetched (listed above); what was fetched is kept in "
                f"'{args.cache_dir}': run the same command again to try them again, or add --skip_missing to take "
                "other images in their place"
            )
        given_up.update(failed)

    return fetch


def check_space(records: list[annotations.Record], wanted: int, args: argparse.Namespace) -> None:
    """Refuse to begin what the disks cannot hold: `records` to fetch, `wanted` images to store."""
    needs = [(args.save_path.resolve().parent, wanted * PREPARED_SIZE, "--save_path")]
    if records:
        cache = args.cache_dir.expanduser()
        fetched = len(records) * FETCHED_SIZE
        if cache.stat().st_dev == needs[0][0].stat().st_dev:
            fetched += needs.pop()[1]
        needs.append((cache, fetched, "--cache_dir"))
    for folder, needed, flag in needs:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"'{folder}' has {free / 1e9:,.2f} GB free and about {needed / 1e9:,.2f} GB are needed for {wanted:,} "
                f"images; make room, lower --limit_data, or name another disk with {flag}"
            )


# ---- writing the folder

SHARD_SIZE = 500_000_000  # bytes of one Arrow file, about


class SplitWriter:
    """Spools the rows of each split to an Arrow file: memory does not grow with the number of images."""

    def __init__(self, folder: Path):
        from datasets import Features, List, Value
        from datasets import Image as ImageFeature
        from datasets.arrow_writer import ArrowWriter

        self.folder = folder
        features = Features(
            {
                "image_id": Value("int64"),
                "file_name": Value("string"),
                "image": ImageFeature(),
                "captions": List(Value("string")),
            }
        )
        self.writers = {
            split: ArrowWriter(features=features, path=str(folder / f"{split}.arrow"), writer_batch_size=256)
            for split in SPLITS
        }

    def keep(self, split: str, record: annotations.Record, data: bytes) -> None:
        self.writers[split].write(
            {
                "image_id": record.image_id,
                "file_name": record.file_name,
                "image": {"bytes": data, "path": None},
                "captions": [caption for caption in record.captions if caption.strip()],
            }
        )

    def finish(self) -> dict[str, Path]:
        """The file of each split, an Arrow stream."""
        for writer in self.writers.values():
            writer.finalize()
        return {split: self.folder / f"{split}.arrow" for split in SPLITS}


def write_splits(spools: dict[str, Path], folder: Path, tokenizer, max_length: int) -> int:
    """Copy the splits to `folder` with the column `labels`, as `datasets.load_from_disk` reads them.

    A few hundred rows at a time, and read, not mapped: memory does not grow with the number of images, as it does in
    `save_to_disk`.

    Returns:
        How many captions were truncated.
    """
    truncated = sum(write_split(spool, folder / split, tokenizer, max_length) for split, spool in spools.items())
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(spools)}), encoding="utf-8")
    return truncated


def write_split(spool: Path, folder: Path, tokenizer, max_length: int) -> int:
    import pyarrow
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    shards, truncated, writer = [], 0, None
    with pyarrow.OSFile(str(spool)) as file, pyarrow.ipc.open_stream(file) as batches:
        features = Features({**Features.from_arrow_schema(batches.schema), "labels": List(List(Value("int32")))})
        for batch in batches:
            labels, cut = tokenise(batch["captions"], tokenizer, max_length)
            truncated += cut
            if writer is None:
                shards.append(folder / f"{len(shards)}.arrow")
                writer, size = ArrowWriter(features=features, path=str(shards[-1])), 0
            table = pyarrow.Table.from_batches([batch]).append_column("labels", labels)
            writer.write_table(table)
            size += table.nbytes
            if size > SHARD_SIZE:
                writer.finalize()
                writer = None
    if writer is not None:
        writer.finalize()

    # What lies beside the rows is written by the library itself, for one row, and then names the files above.
    rows = Dataset.from_file(str(shards[0])).select(range(1))
    # The same arguments give the same bytes; a fingerprint drawn from object ids would not.
    rows._fingerprint = folder.name
    rows.save_to_disk(folder / "one")
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    state = json.loads((folder / "one" / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "one" / "dataset_info.json").rename(folder / "dataset_info.json")
    shutil.rmtree(folder / "one")
    return truncated


def tokenise(captions, tokenizer, max_length: int) -> tuple[Any, int]:
    """Captions, a list of each image's in Arrow -> their token ids likewise, and how many were truncated."""
    import pyarrow

    from captioning.data.folder import encode_captions

    of_images = captions.to_pylist()
    # All of them at once: a call of the tokenizer costs more than a caption.
    ids, truncated = encode_captions(tokenizer, list(itertools.chain(*of_images)), max_length)
    rest = iter(ids)
    labels = [list(itertools.islice(rest, len(own))) for own in of_images]
    return pyarrow.array(labels, pyarrow.list_(pyarrow.list_(pyarrow.int32()))), truncated


def columns(rows, name: str) -> Iterator[Any]:
    """A column of a split, a `pyarrow.ChunkedArray` of up to 1024 rows at a time; other columns are not read."""
    for table in rows.select_columns(name).with_format("arrow").iter(1024):
        yield table[name]


def summarise(splits, chosen: Chosen, truncated: int, args: argparse.Namespace, folder: Path) -> str:
    """What a user wants to know of a data set before training on it."""
    from pyarrow import compute

    lines = []
    counts, lengths = [], []
    for split, rows in splits.items():
        per_image = []
        for column in columns(rows, "labels"):
            per_image += compute.list_value_length(column).to_pylist()
            lengths += compute.list_value_length(compute.list_flatten(column)).to_pylist()
        lines.append(f"{split:>12}  {len(rows):>7,} images  {sum(per_image):>8,} captions")
        counts += per_image
    total = len(counts)
    wanted = f"{args.limit_data:,} were asked for" if args.limit_data > total else ""
    lines.append(f"{'in all':>12}  {total:>7,} images" + (f": all there are ({wanted})" if wanted else ""))
    spread = ", ".join(f"{number}: {images:,}" for number, images in sorted(Counter(counts).items()))
    lines.append(f"captions per image (captions: images): {spread}")
    lengths.sort()
    lines.append(
        f"tokens per caption, end included: median {statistics.median(lengths):.0f}, "
        f"99 % have {lengths[int(0.99 * (len(lengths) - 1))]} or fewer, longest {lengths[-1]}; "
        f"{truncated:,} captions truncated to {args.max_length}"
    )
    if chosen.dropped:
        reasons = ", ".join(
            f"{count:,} {reason} (such as {cli.printable(chosen.examples[reason])})"
            for reason, count in sorted(chosen.dropped.items())
        )
        lines.append(f"dropped: {reasons}")
    else:
        lines.append("dropped: nothing")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    lines.append(f"size: {size / 1e6:,.1f} MB, {size / 1e3 / total:,.1f} kB per image")
    first = splits["train"].select_columns(["file_name", "captions", "labels"])[0]
    lines.append(f"example: {cli.printable(first['file_name'])}")
    lines += [f"    {cli.printable(caption)}" for caption in first["captions"]]
    lines.append(f"    labels of the first: {first['labels'][0]}")
    return "\n".join(lines)


def describe(splits, chosen: Chosen, truncated: int, args: argparse.Namespace, source: str) -> dict[str, Any]:
    """The content of `dataset.json`. No dates and no paths of this machine: the same arguments, the same bytes."""
    return {
        "source": source,
        "images": {split: len(rows) for split, rows in splits.items()},
        "limit_data": args.limit_data,
        "val_share": args.val_share,
        "test_share": args.test_share,
        "seed": args.seed,
        "encoder": args.encoder,
        "decoder": args.decoder,
        "center_crop": args.center_crop,
        "max_length": args.max_length,
        "captions_truncated": truncated,
        "dropped": dict(sorted(chosen.dropped.items())),
        "versions": {name: version(name) for name in ("datasets", "pillow", "tokenizers", "transformers")},
    }


def draw_preview(path: Path, splits, chosen: Chosen) -> None:
    """Write `--preview`: the first images of each split, and the first that were dropped for each reason."""
    from captioning.show import pages

    kept, dropped = [], []
    for split, rows in splits.items():
        for row in rows.select(range(min(PREVIEWED, len(rows)))):
            title = f"{split}, image {row['image_id']}"
            kept.append({"image": row["image"], "title": title, "caption": row["captions"][0]})
    for record, reason in sorted(chosen.shown, key=lambda pair: pair[1]):
        try:
            picture = images.open_image(record.path, min_side=256)
        except InputError:
            picture = None
        dropped.append({"image": picture, "title": f"image {record.image_id}", "reason": reason})
    counts = sum(map(len, splits.values())), sum(chosen.dropped.values())
    pages.draw_contact_sheet(kept, dropped, path, counts)
    cli.note(f"preview written to {path}")


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that no other run uses.

    What a run that was killed left there is cleared away, and a folder that it had just set aside is put back.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--save_path '{target}' lies below a file; name another folder") from None
    work = target.with_name(f".{target.name}.partial")
    with locked_folder(work) as ours:
        if not ours:
            raise InputError(
                f"another run is writing to --save_path '{target}'; wait until it has ended, or name another folder"
            )
        aside = _aside(work)
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield work


def _aside(work: Path) -> Path:
    return work.with_name(work.name + ".old")


def move_into_place(work: Path, target: Path) -> None:
    """Swap a finished folder for the one at `target`, which is ours or empty; hidden files there are kept."""
    old = _aside(work)
    try:
        if target.exists():
            for hidden in target.glob(".*"):
                if hidden.is_file():
                    shutil.copy2(hidden, work / hidden.name)
            target.rename(old)
        work.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise InputError(
            f"the data set is finished in '{work}' but cannot be moved to '{target}' ({error.strerror}); "
            "move it yourself, or use it where it is"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path) -> None:
    """Refuse to replace a folder that this script did not write."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--save_path '{target}' is a file; name a folder")
    if target.is_dir() and not (target / DESCRIPTION).is_file():
        others = [entry.name for entry in target.iterdir() if not entry.name.startswith(".")]
        if others:
            raise InputError(
                f"--save_path '{target}' holds other files ({others[0]}); name a new folder, or one made by this script"
            )


def read_source(
    args: argparse.Namespace, work: Path, client: download.Client
) -> tuple[dict[str, list[annotations.Record]], str]:
    """The records to choose from, by pool, and a name for where they come from."""
    if args.sample:
        karpathy = scenes.draw(work / "sample")
        return annotations.read_karpathy(karpathy, karpathy.parent), "drawn scenes"
    if args.karpathy_json:
        return annotations.read_karpathy(args.karpathy_json, args.image_dir), f"Karpathy file {args.karpathy_json.name}"
    if args.coco_dir:
        return annotations.read_coco(args.coco_dir), "COCO 2014 from a folder"
    url, cache = args.coco_url.rstrip("/"), args.cache_dir.expanduser()
    if not _existing(cache).is_dir():
        raise InputError(f"--cache_dir '{cache}' is a file, or lies below one; name another folder")
    if shutil.disk_usage(_existing(cache)).free < CAPTIONS_SIZE:
        raise InputError(
            f"--cache_dir '{cache}' has no room for the captions ({CAPTIONS_SIZE / 1e6:.0f} MB); make some"
        )
    download.fetch_annotations(cache, url, client)
    return annotations.read_coco(cache, url), "COCO 2014"


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    check_target(args.save_path)
    target = args.save_path.resolve()
    with work_folder(target) as work:
        try:
            summary = prepare_folder(work, args)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        move_into_place(work, target)
    print(summary)
    cli.note(f"written to {args.save_path}; next: python train.py --data_path {args.save_path}")
    return 0


def prepare_folder(work: Path, args: argparse.Namespace) -> str:
    """Fill `work` with the data set; returns its summary."""
    client = download.Client()
    pools, source = read_source(args, work, client)
    draws = plan(pools, args)
    cli.note(f"{source}: {sum(map(len, pools.values())):,} images to choose from")

    from datasets import load_from_disk
    from datasets.utils.logging import disable_progress_bar

    from captioning.model import parts

    disable_progress_bar()
    parts.quiet_transformers()
    image_processor = parts.load_image_processor(args.encoder, whole=not args.center_crop)
    tokenizer = None if args.decoder in parts.DECODER_PRESETS else parts.load_tokenizer(args.decoder)
    # Room for a random crop: 256 pixels for a model that sees 224.
    short_side = max(parts.resized_side(image_processor), round(parts.input_side(image_processor) * 8 / 7))
    cli.note(f"images are stored with a shorter side of {short_side} px at most, for {args.encoder}")

    order = Pools(pools, args.seed)
    check_space(download.missing(order.first_choice(draws)), sum(draw.wanted for draw in draws), args)
    spool = work / ".spool"
    spool.mkdir()
    writer = SplitWriter(spool)
    prepare = functools.partial(prepare_image, short_side=short_side)
    chosen = choose(order, draws, prepare, args, writer.keep, fetcher(client, args))
    refuse_empty(chosen)
    if tokenizer is None:
        captions = (caption for record in chosen.splits["train"] for caption in record.captions)
        tokenizer = parts.train_tokenizer(captions, parts.VOCABULARY[args.decoder])
    cli.note(f"tokenizer: {len(tokenizer):,} tokens, {args.decoder}")

    truncated = write_splits(writer.finish(), work, tokenizer, args.max_length)
    shutil.rmtree(spool)
    tokenizer.save_pretrained(work)
    image_processor.save_pretrained(work)
    splits = load_from_disk(str(work))
    description = describe(splits, chosen, truncated, args, source)
    (work / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if args.preview:
        draw_preview(args.preview, splits, chosen)
    return summarise(splits, chosen, truncated, args, work)


def refuse_empty(chosen: Chosen) -> None:
    for split, records in chosen.splits.items():
        if not records:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(chosen.dropped.items()))
            raise InputError(
                f"no usable image for {split} (dropped: {reasons or 'nothing'}); "
                "check that the images lie where the annotations say, or give more of them"
            )


if __name__ == "__main__":
    cli.run(main)
