"""Stage 1: COCO 2014 or your own pictures -> RGB images only -> subsample -> a tokenised Hugging Face dataset on disk.

    python dataloader.py --limit_data 2000                         # fetches what it needs of COCO 2014
    python dataloader.py --data my_pictures --limit_data 0         # your own, in any of the usual forms
    python dataloader.py --coco_dir /data/coco2014                 # a COCO 2014 you have
    python dataloader.py --karpathy_json dataset_coco.json --image_dir /data/coco2014 --limit_data 0
    python dataloader.py --sample --encoder mit --decoder tiny     # drawn scenes, no network

Writes one row per image (`image_id`, `file_name`, `image`, `captions`, `labels`) in the splits train, validation and
test, with the tokenizer, the image processor and `dataset.json`, which says how the folder was made.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.cli import debug_flag, flag
from captioning.data import audit, choose, download, fetch, folder, images, scenes
from captioning.data.annotations import COCO_URL, read_coco, read_karpathy
from captioning.data.recognise import join, recognise
from captioning.data.records import Record
from captioning.data.tables import Wanted
from captioning.files import check_target

# For the check of free space, bytes: an image of COCO 2014, the captions of both parts, and a prepared image, which
# is there twice before the folder is finished.
FETCHED_SIZE, CAPTIONS_SIZE, PREPARED_SIZE = 165_000, 120_000_000, 2 * 30_000

SPOOL = ".source"  # in the folder that is written: what a data set is kept in that does not lie on disk

SOURCE = "where the images come from (default: COCO 2014 is fetched)"
CHOICE = "which images"
FORM = "how they are stored"


@dataclass(frozen=True)
class Arguments:
    data: list[str] | None = flag(
        None,
        SOURCE,
        "your own pictures with captions: a folder, a table, a tar, a saved dataset, or a data set's id on the hub; "
        "what lies there is recognised; several are joined",
        metavar="PATH",
        action="extend",
    )
    coco_dir: Path | None = flag(None, SOURCE, "a COCO 2014 root: annotations/, train2014/, val2014/")
    karpathy_json: Path | None = flag(None, SOURCE, "a Karpathy file (dataset_coco.json, dataset_flickr8k.json)")
    image_dir: Path | None = flag(None, SOURCE, "the images of --karpathy_json, or of --data where they lie elsewhere")
    image_column: str | None = flag(None, SOURCE, "the column of --data that names the images (default: is found)")
    caption_column: str | None = flag(None, SOURCE, "the column of captions (default: is found)")
    split_column: str | None = flag(
        None, SOURCE, "the column of train, val or test; none: there is none (default: is found)"
    )
    sample: bool = flag(False, SOURCE, "draw a small data set instead; needs no network")
    coco_url: str = flag(COCO_URL, SOURCE, "the server that COCO 2014 is fetched from")
    cache_dir: Path = flag(
        Path("~/.cache/captioning/coco2014"), SOURCE, "keeps what was fetched; laid out as a --coco_dir"
    )
    skip_missing: bool = flag(
        False, SOURCE, "take other images in the place of those that the server does not have, instead of stopping"
    )

    limit_data: int = flag(2000, CHOICE, "images in all; 0: every image", metavar="N")
    val_share: float = flag(0.1, CHOICE, "share of the images for validation")
    test_share: float = flag(0.1, CHOICE, "share of the images for test")
    shard: str | None = flag(
        None,
        CHOICE,
        "prepare one of N equal parts, as many machines may do at a time: 1/4 is the first of four; train.py "
        "--data_path takes all parts together",
        metavar="I/N",
    )
    seed: int = flag(0, CHOICE, "decides which images are chosen")

    convert_rgb: bool = flag(
        False, FORM, "convert images that are grey, transparent, of a palette or for print (default: they are dropped)"
    )
    save_path: Path = flag(Path("processed_data"), FORM, "the folder to write")
    encoder: list[str] = flag(
        ["google/vit-base-patch16-224-in21k"],
        FORM,
        "decides the image size: a hub id, a folder, or a preset (mit, tiny, small, base); two see side by side, in "
        "images for the first",
        metavar="NAME",
    )
    decoder: str = flag(
        "gpt2",
        FORM,
        "decides the tokenizer: a hub id, a folder, or a preset, which learns one from the training captions",
    )
    max_length: int = flag(64, FORM, "longest caption, its end included", metavar="TOKENS")
    center_crop: bool = flag(
        False,
        FORM,
        "crop images as the encoder's own preprocessing does (default: where it crops, squeeze them, so that "
        "the model sees all of what people described)",
    )
    preview: Path | None = flag(
        None, FORM, "also draw images that were kept, and dropped ones with the reason", metavar="PNG"
    )
    num_proc: int = flag(os.cpu_count() or 1, FORM, "processes that prepare images")
    debug: bool = debug_flag()

    def __post_init__(self):
        if self.limit_data < 0:
            raise InputError(
                f"--limit_data {self.limit_data} is negative; give a number of images, or 0 for every image"
            )
        if self.limit_data in (1, 2):
            raise InputError(f"--limit_data {self.limit_data} is too few: each of three splits needs an image")
        for name, share in (("val_share", self.val_share), ("test_share", self.test_share)):
            if not 0 < share < 1:
                raise InputError(f"--{name} {share} is not between 0 and 1")
        if self.val_share + self.test_share >= 1:
            raise InputError(
                f"--val_share {self.val_share} and --test_share {self.test_share} leave no images to train on"
            )
        if self.part and 0 < self.limit_data < 3 * self.part[1]:
            raise InputError(f"--limit_data {self.limit_data} is too few for {self.part[1]} parts; each needs 3 images")
        if self.max_length < 2:
            raise InputError(
                f"--max_length {self.max_length} leaves no room for a word and the end token; give 2 or more"
            )
        if self.num_proc < 1:
            raise InputError(f"--num_proc {self.num_proc} is no number of processes; give 1 or more")
        if self.preview and (self.preview.is_dir() or not self.preview.parent.is_dir()):
            raise InputError(
                f"--preview '{self.preview}' is a folder, or lies in none; name a PNG file in a folder that exists"
            )
        if self.preview:
            check_target(self.preview, "--preview")
        self._check_save_path()
        if (self.karpathy_json is None) != (self.image_dir is None) and not self.data:
            raise InputError("--karpathy_json and --image_dir belong together; give both")
        if sum((bool(self.data), self.coco_dir is not None, self.karpathy_json is not None, self.sample)) > 1:
            raise InputError("--data, --coco_dir, --karpathy_json and --sample exclude each other; give one")
        for name in ("image_column", "caption_column", "split_column"):
            if getattr(self, name) and not self.data:
                raise InputError(f"--{name} belongs to --data; give that too")
        cli.check_encoders(self.encoder)
        scheme, _, host = self.coco_url.partition("://")
        if scheme.lower() not in ("http", "https") or not host:
            raise InputError(f"--coco_url {fetch.shown(self.coco_url)} is not an http or https address")

    def _check_save_path(self) -> None:
        """Refuse a folder that will be replaced with something in it that is read, or written besides."""
        target = Path(os.path.realpath(self.save_path))
        # What is not there is a data set's id on the hub.
        named = {"--data": [Path(path) for path in self.data or () if os.path.lexists(path)]}
        for name in ("coco_dir", "karpathy_json", "image_dir", "cache_dir", "preview"):
            named[f"--{name}"] = [path.expanduser()] if (path := getattr(self, name)) else []
        for name, paths in named.items():
            for path in paths:
                if Path(os.path.realpath(path)).is_relative_to(target):
                    raise InputError(
                        f"--save_path '{self.save_path}' is replaced as a whole, and {name} '{path}' lies in it; name "
                        "another folder"
                    )

    @property
    def part(self) -> tuple[int, int] | None:
        """`--shard` as two numbers."""
        return None if self.shard is None else cli.parse_shard(self.shard)


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "Prepare COCO 2014 for captioning: RGB images only, subsampled, tokenised.")
    with folder.replaced(args.save_path) as work:
        summary = prepare(args, work)
    print(summary)
    cli.note(f"written to {args.save_path}; next: python train.py --data_path {shlex.quote(str(args.save_path))}")
    return 0


def prepare(args: Arguments, work: Path) -> str:
    """Fill the folder `work` with the data set; returns its summary."""
    # Source
    client = download.Client()
    pools, source = read_source(args, work, client)
    if "val2014" not in pools:
        pools = choose.fill_splits(pools)
        for pool in pools:
            if "+" in pool:
                cli.note(f"{len(pools[pool]):,} images are divided among {pool.replace('+', ', ')}")
    limit = args.limit_data
    captions: Iterable[str] | None = None
    if args.part:
        number, count = args.part
        # Every part learns the same tokenizer, from the captions of all of them.
        captions = [c for name in pools if "train" in name for record in pools[name] for c in record.captions]
        pools = {name: records[number - 1 :: count] for name, records in pools.items()}
        limit = len(range(number - 1, limit, count))
    draws = choose.plan(pools, limit, args.val_share, args.test_share)
    cli.note(f"{source}: {sum(map(len, pools.values())):,} images to choose from")

    # Model: its image size, its tokenizer
    with cli.importing():
        from datasets.utils.logging import disable_progress_bar

        from captioning.model import captioner, parts

    disable_progress_bar()
    parts.quiet_transformers()
    image_processor = parts.load_image_processor(args.encoder[0], whole=not args.center_crop)
    captioner.check_parts(args.encoder, args.decoder, image_processor)
    tokenizer = None if args.decoder in parts.DECODER_PRESETS else parts.load_tokenizer(args.decoder)
    # Room for a random crop: 256 pixels for a model that sees 224.
    short_side = parts.stored_side(image_processor)
    cli.note(f"images are stored with a shorter side of {short_side} px at most, for {' + '.join(args.encoder)}")

    # Choose
    order = choose.Pools(pools, args.seed)
    check_space(download.missing(order.first_choice(draws)), sum(draw.wanted for draw in draws), args)
    writer = folder.SplitWriter(work)
    convert: dict[str, Any] = {"convert_rgb": True} if args.convert_rgb else {}
    prepare_image = functools.partial(choose.prepare_image, short_side=short_side, **convert)
    fetch_images = download.fetcher(client, args.cache_dir, args.skip_missing)
    chosen = choose.choose(order, draws, prepare_image, args.num_proc, writer.keep, fetch_images)
    groups = chosen.groups()
    divided = {
        pool: choose.divide(records, pool.split("+"), args.val_share, args.test_share, groups[pool])
        for pool, records in chosen.splits.items()
        if "+" in pool
    }
    groups = chosen.divide(divided, groups)
    choose.refuse_empty(chosen)
    if tokenizer is None:
        captions = captions or (caption for record in chosen.splits["train"] for caption in record.captions)
        tokenizer = parts.train_tokenizer(captions, parts.VOCABULARY[args.decoder])
    cli.note(f"tokenizer: {len(tokenizer):,} tokens, {args.decoder}")

    # Write
    truncated = writer.finish(tokenizer, args.max_length, divided)
    shutil.rmtree(work / SPOOL, ignore_errors=True)
    parts.save_tokenizer(tokenizer, work)
    image_processor.save_pretrained(work)
    shares = ("val_share", "test_share") if choose.uses_shares(pools, limit) else ()
    names = ("limit_data", *shares, "seed", "encoder", "decoder", "center_crop", "max_length")
    settings = {name: getattr(args, name) for name in names} | {"encoder": cli.one_or_two(args.encoder)}
    settings |= {name: getattr(args, name) for name in ("shard", "convert_rgb") if getattr(args, name)}
    counts = {split: len(records) for split, records in chosen.splits.items()}
    description = folder.describe(source, counts, settings, truncated, chosen.dropped)
    (work / folder.DESCRIPTION).write_text(description, encoding="utf-8")

    # Summary
    splits, _ = folder.load_prepared(work)
    findings = audit.audit(chosen.splits, groups, bool(divided), chosen.broken())
    if args.preview:
        draw_preview(args.preview, splits, chosen, findings)
    lines = [finding.line() for finding in findings] or ["nothing odd was found"]
    return "\n".join([summarise(args, work, splits, chosen, truncated), *(f"audit: {line}" for line in lines)])


def read_source(args: Arguments, work: Path, client: download.Client) -> tuple[dict[str, list[Record]], str]:
    """The records to choose from, by pool, and a name for where they come from."""
    if args.sample:
        karpathy = scenes.draw(work / "sample")
        return read_karpathy(karpathy, karpathy.parent), scenes.SOURCE
    cache = args.cache_dir.expanduser()
    if args.data:
        wanted = Wanted(args.image_column or "", args.caption_column or "", args.split_column or "", args.image_dir)
        found = [recognise(path, wanted, cache, work / SPOOL / str(at)) for at, path in enumerate(args.data)]
        for one in found:
            cli.note(cli.printable(one.line))
        return join(found), " and ".join(one.form for one in found)
    # The original's flags take every form too; where none fits, the reader of theirs says what is wrong.
    if args.karpathy_json and args.image_dir:
        with contextlib.suppress(InputError):
            one = recognise(str(args.karpathy_json), Wanted(image_dir=args.image_dir), cache, work / SPOOL)
            return one.pools, one.form
        return read_karpathy(args.karpathy_json, args.image_dir), f"Karpathy file {args.karpathy_json.name}"
    if args.coco_dir:
        if args.coco_dir.is_dir() and not any((args.coco_dir / name).exists() for name in download.ANNOTATIONS):
            with contextlib.suppress(InputError):
                one = recognise(str(args.coco_dir), Wanted(), cache, work / SPOOL)
                return one.pools, one.form
        return read_coco(args.coco_dir), "COCO 2014 from a folder"
    url = args.coco_url.rstrip("/")
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--cache_dir '{cache}' is a file, or lies below one; name another folder")
    if shutil.disk_usage(existing).free < CAPTIONS_SIZE:
        raise InputError(
            f"--cache_dir '{cache}' has no room for the captions ({CAPTIONS_SIZE / 1e6:.0f} MB); make some"
        )
    download.fetch_annotations(cache, url, client)
    return read_coco(cache, url), "COCO 2014"


def check_space(records: list[Record], wanted: int, args: Arguments) -> None:
    """Refuse to begin what the disks cannot hold: `records` to fetch, `wanted` images to store."""
    needs = [(args.save_path.resolve().parent, wanted * PREPARED_SIZE, "--save_path")]
    if records:
        cache = args.cache_dir.expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        fetched = len(records) * FETCHED_SIZE
        if cache.stat().st_dev == needs[0][0].stat().st_dev:
            fetched += needs.pop()[1]
        needs.append((cache, fetched, "--cache_dir"))
    for place, needed, name in needs:
        free = shutil.disk_usage(place).free
        if free < needed:
            raise InputError(
                f"'{place}' has {free / 1e9:,.2f} GB free and about {needed / 1e9:,.2f} GB are needed for {wanted:,} "
                f"images; make room, lower --limit_data, or name another disk with {name}"
            )


def summarise(
    args: Arguments, work: Path, splits: dict[str, folder.Split], chosen: choose.Chosen, truncated: int
) -> str:
    """What a user wants to know of a data set before training on it."""
    lines = []
    lengths: list[int] = []  # tokens of each caption
    counts: Counter[int] = Counter()  # images with so many captions
    for name, split in splits.items():
        of_captions, of_images = split.caption_lengths()
        lines.append(f"{name:>12}  {len(split):>7,} images  {len(of_captions):>8,} captions")
        lengths += of_captions.tolist()
        counts.update(of_images.tolist())
    total = counts.total()
    wanted = f": all there are ({args.limit_data:,} were asked for)" if args.limit_data > total else ""
    lines.append(f"{'in all':>12}  {total:>7,} images{wanted}")
    spread = ", ".join(f"{number}: {count:,}" for number, count in sorted(counts.items()))
    lines.append(f"captions per image (captions: images): {spread}")
    lengths.sort()
    lines.append(
        f"tokens per caption, end included: median {statistics.median(lengths):.0f}, "
        f"99 % have {lengths[int(0.99 * (len(lengths) - 1))]} or fewer, longest {lengths[-1]}; "
        f"{truncated:,} captions truncated to {args.max_length}"
    )
    reasons = ", ".join(
        f"{count:,} {reason} (such as {cli.printable(str(chosen.example(reason)))})"
        for reason, count in sorted(chosen.dropped.items())
    )
    advice = "; --convert_rgb keeps images of other modes" if "mode " in reasons else ""
    lines.append(f"dropped: {reasons or 'nothing'}{advice}")
    files = [file for file in work.rglob("*") if file.is_file() and work / "sample" not in file.parents]
    size = sum(file.stat().st_size for file in files)
    lines.append(f"size: {size / 1e6:,.1f} MB, {size / 1e3 / total:,.1f} kB per image")
    first = splits["train"].select([0])
    lines.append(f"example: {cli.printable(first.file_name[0])}")
    lines += [f"    {cli.printable(caption)}" for caption in first.captions[0]]
    lines.append(f"    labels of the first: {first.labels(0)[0]}")
    return "\n".join(lines)


def draw_preview(
    path: Path, splits: dict[str, folder.Split], chosen: choose.Chosen, findings: list[audit.Finding]
) -> None:
    """Write `--preview`: the first images of each split, the first dropped for each reason, and the audit."""
    from captioning.show import pages

    kept, dropped, odd = [], [], []
    for name, split in splits.items():
        first = split.select(range(min(choose.EXAMPLES, len(split))))
        for index, file_name in enumerate(first.file_name):
            title = f"{name}, {cli.printable(file_name)}"
            kept.append({"image": first.image(index), "title": title, "caption": first.captions[index][0]})
    for reason, records in sorted(chosen.examples.items()):
        for record in records:
            try:
                picture = images.to_rgb(images.decode(record.read(), record.file_name, min_side=256))
            except InputError:
                picture = None
            dropped.append({"image": picture, "title": cli.printable(record.file_name), "reason": reason})
    for finding in findings:
        for pair in finding.pairs[:2]:
            for (name, row), (other, other_row) in (pair, pair[::-1]):
                title = f"{name}, {cli.printable(splits[name].file_name[row])}"
                reason = f"nearly the same as {other}, {cli.printable(splits[other].file_name[other_row])}"
                odd.append({"image": splits[name].image(row), "title": title, "reason": reason})
    counts = sum(map(len, splits.values())), sum(chosen.dropped.values())
    pages.draw_contact_sheet(kept, dropped, path, counts, odd, [finding.line() for finding in findings])
    cli.note(f"preview written to {path}")


if __name__ == "__main__":
    cli.run(main)
