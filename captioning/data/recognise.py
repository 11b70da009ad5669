"""What lies at a path -> records: `--data PATH` knows the forms of `captioning.data.forms`, and says which it took.

    found = recognise("my_pictures", Wanted(), cache_dir, spool)
    found.line                        # "my_pictures: 37 images, each with a text beside it; ..."
    found.pools                       # {"train": [Record, ...], ...}; "" holds those without a split

An image without a number gets one: its position in the order of file names, from 0.
"""

# ruff: noqa: PTH118, PTH119, PTH122 (names are strings here: a million Paths take half a gigabyte)

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from captioning import InputError, cli
from captioning.data import forms, tables
from captioning.data.check import check_arrow
from captioning.data.choose import SPLITS
from captioning.data.fetch import shown
from captioning.data.find import Finder, plain
from captioning.data.forms import Item
from captioning.data.images import SUFFIXES
from captioning.data.records import Record
from captioning.data.tables import Columns, Table, Wanted
from captioning.files import read_json, utf8

TABLES = (".csv", ".tsv", ".txt", ".token", ".tab", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
NO_CAPTIONS = ("instances_", "person_keypoints_", "image_info_", "stuff_", "panoptic_", "read", "licen", "requirements")
# Where several tables tell of the same images, the first of these is taken.
PREFERRED = (
    r"captions\.txt$",
    r"(?<!lemma)\.token(\.txt)?$",
    r"results.*\.csv$",
    r"captions\b",
    r"dataset",
    r"predictions",
)
LOOKED_FOR = (
    "images with a .txt or .caption beside each, metadata.jsonl or .csv, tables (csv, tsv, json, jsonl, parquet), "
    "Flickr's captions.txt and .token, COCO's and Karpathy's JSON, a saved `datasets`, WebDataset tars"
)


@dataclass
class Found:
    """A data set that was recognised.

    Attributes:
        form: what it was taken for, in words.
        pools: records by split, in the order of their ids; "" holds those without one.
    """

    form: str
    pools: dict[str, list[Record]]
    line: str = ""


@dataclass
class Tree:
    """Every file below a folder."""

    root: Path
    files: list[str] = field(default_factory=list)

    def __post_init__(self):
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            self.files += [os.path.join(folder, name) for name in sorted(files) if not name.startswith(".")]

    def ending(self, *suffixes: str) -> list[Path]:
        return [Path(file) for file in self.files if file.lower().endswith(suffixes)]

    def counts(self) -> str:
        """What lies there, such as "37 .jpg, 1 .xlsx"."""
        endings = Counter(os.path.splitext(file)[1].lower() or "without an ending" for file in self.files)
        return ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(6)) or "nothing"


def recognise(source: str, wanted: Wanted, cache_dir: Path, spool: Path) -> Found:
    """The records of what lies at `source`: a file, a folder, a pattern, or a data set's id on the hub.

    Args:
        wanted: what the command line says of columns and of the folder of images.
        cache_dir: where images are fetched to that have an address only.
        spool: a folder for what does not lie on disk.

    Raises:
        InputError: nothing is there that is known, or it is damaged.
    """
    path = Path(source).expanduser()
    if wanted.image_dir and not wanted.image_dir.is_dir():
        raise InputError(f"--image_dir '{wanted.image_dir}' is not a folder; name the folder that holds the images")
    if path.is_dir():
        form, items, finder = _folder(path, wanted, spool)
    elif path.is_file():
        form, items, finder = _file(path, wanted, spool)
    elif glob.has_magic(source):
        form, items, finder = _pattern(source, wanted)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.parent.is_dir():
        form, items, finder = _hub(source, wanted, spool)
    else:
        raise InputError(f"--data '{source}' does not exist; check the path")
    pools = _collect(items, finder, cache_dir)
    total = sum(map(len, pools.values()))
    if not total:
        raise InputError(f"--data '{source}' was taken for {form}, and lists no images; check its columns")
    captions = sum(len(record.captions) for records in pools.values() for record in records)
    counts = [f"{split or 'without a split'} {len(pools[split]):,}" for split in (*SPLITS, "") if pools.get(split)]
    splits = ", ".join(counts) if list(pools) != [""] else "no splits"
    return Found(form, pools, f"{source}: {form}; {total:,} images, {captions:,} captions; {splits}")


Parts = tuple[str, Iterator[Item], Finder]


def _folder(root: Path, wanted: Wanted, spool: Path) -> Parts:
    """The first form that a folder has, in the order of how surely each is told."""
    finder = Finder([wanted.image_dir, root] if wanted.image_dir else [root])
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _saved(root, wanted, spool)
    tree = Tree(root)
    if tars := tree.ending(".tar", ".tar.gz", ".tgz"):
        return f"{len(tars):,} tars of WebDataset or img2dataset", forms.webdataset(tars, root), finder
    metadata = [path for path in tree.ending(".jsonl", ".csv", ".parquet") if path.stem == "metadata"]
    if metadata:
        described = [each for path in metadata if (each := _described(path, wanted))]
        if described:
            return f"an ImageFolder ({metadata[0].name})", _table_items(described, root, finder), finder
    images = [file for file in tree.files if os.path.splitext(file)[1].lower() in SUFFIXES]
    stems = {plain(os.path.splitext(image)[0]) for image in images} | set(map(plain, images))
    texts = [file for file in tree.files if file.lower().endswith(forms.TEXTS)]
    beside = [file for file in texts if plain(os.path.splitext(file)[0]) in stems]
    if beside and 2 * len(beside) >= len(images):
        return "images with a text beside each", forms.sidecars(root, tree.files), finder
    sidecars = set(beside)
    candidates = [
        path
        for path in tree.ending(*TABLES)
        if len(path.relative_to(root).parts) <= 4
        and str(path) not in sidecars
        and not path.name.lower().startswith(NO_CAPTIONS)
        and not path.name.endswith("_stats.json")
    ]
    coco = [
        (path, content)
        for path in candidates
        if path.suffix == ".json" and forms.is_coco(content := tables.load_json(path))
    ]
    if coco:
        names = ", ".join(path.name for path, _ in coco)
        return f"COCO's form ({names})", (item for each in coco for item in forms.coco(*each, finder)), finder
    groups: dict[tuple[str, str], list[tuple[Table, Columns]]] = defaultdict(list)
    for path in candidates:
        if each := _described(path, wanted):
            stem = re.sub(r"[\d_.-]+|\bof\b", " ", path.stem)
            stem = " ".join(word for word in stem.split() if word != "of" and not tables.split_of_name(word))
            groups[path.suffix.lower(), stem].append(each)
    if groups:
        chosen = _preferred(list(groups.values()))
        return _form(chosen), _table_items(chosen, root, finder, tree.ending(".txt")), finder
    if beside:
        return "images with a text beside some of them", forms.sidecars(root, tree.files), finder
    raise InputError(
        f"--data '{root}' holds nothing that is known (looked for {LOOKED_FOR}; found {tree.counts()}); "
        f"{_nearest(tree)}"
    )


def _nearest(tree: Tree) -> str:
    """What to do to come to the nearest form."""
    if sheets := tree.ending(".xlsx", ".xls", ".ods", ".numbers"):
        return f"save '{sheets[0].name}' as CSV with the columns file_name and caption"
    images = [Path(file).name for file in tree.files if os.path.splitext(file)[1].lower() in SUFFIXES]
    written = [path for path in tree.ending(*TABLES) if not path.name.lower().startswith(NO_CAPTIONS)]
    if written:
        return (
            f"give '{cli.printable(written[0].name)}' the columns file_name and caption, and a row for each image, or "
            "name the columns that it has with --image_column and --caption_column"
        )
    if images:
        name = cli.printable(images[0])
        return f"write the captions of '{name}' to '{os.path.splitext(name)[0]}.txt', and so on for the others"
    return "put images there, each with its captions in a text of the same name: photo.jpg and photo.txt"


def _file(path: Path, wanted: Wanted, spool: Path) -> Parts:
    roots = [wanted.image_dir] if wanted.image_dir else []
    # Annotations often lie in a folder of their own beside the images' one.
    above = [path.parent.parent] if path.parent.name.lower() in ("annotations", "captions", "labels", "text") else []
    finder = Finder([*roots, path.parent, *above])
    if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return "a tar of WebDataset", forms.webdataset([path], path.parent), finder
    if path.suffix.lower() == ".json":
        content = tables.load_json(path)
        if forms.is_coco(content):
            return f"COCO's form ({path.name})", forms.coco(path, content, finder), finder
    if path.suffix.lower() in TABLES and (each := _described(path, wanted)):
        lists = [file for file in path.parent.glob("*.txt") if file != path]
        return _form([each]), _table_items([each], path.parent, finder, lists), finder
    raise InputError(
        f"--data '{path}' is no table of images and captions (looked for a column of file names or addresses and one "
        "of texts, in csv, tsv, json, jsonl and parquet); write a header such as file_name,caption, or name them with "
        "--image_column and --caption_column"
    )


def _pattern(source: str, wanted: Wanted) -> Parts:
    paths = [Path(path) for path in sorted(glob.glob(source, recursive=True))]
    tars = [path for path in paths if path.name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    if tars:
        return (
            f"{len(tars):,} tars of WebDataset or img2dataset",
            forms.webdataset(tars, tars[0].parent),
            Finder([tars[0].parent]),
        )
    described = [each for path in paths if path.is_file() and (each := _described(path, wanted))]
    if not described:
        raise InputError(f"--data '{source}' matches nothing that is known; check the pattern")
    folder = paths[0].parent
    finder = Finder([wanted.image_dir, folder] if wanted.image_dir else [folder])
    return _form(described), _table_items(described, folder, finder), finder


def _saved(root: Path, wanted: Wanted, spool: Path) -> Parts:
    from datasets import load_from_disk

    for path in sorted(root.rglob("*.json")):
        if path.name in ("dataset_dict.json", "dataset_info.json", "state.json"):
            read_json(path, "save the dataset again")
    check_arrow(sorted(root.rglob("*.arrow")), f"--data '{root}'")
    try:
        dataset = load_from_disk(str(root))
    except Exception as error:  # of pyarrow, fsspec, json and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--data '{root}' is not a whole folder of `datasets` ({reason}); save it again") from None
    kind = f"a {type(dataset).__name__} of `datasets`"
    return kind, forms.hugging_face(dataset, wanted, f"--data '{root}'", spool), Finder([root])


def _hub(name: str, wanted: Wanted, spool: Path) -> Parts:
    import datasets

    try:
        dataset = datasets.load_dataset(name)
    except Exception as error:  # of huggingface_hub, httpx, fsspec and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--data '{name}' does not exist here, and cannot be loaded from the hub ({reason[:200]}); check the name"
        ) from None
    kind = f"a {type(dataset).__name__} of `datasets` from the hub"
    return kind, forms.hugging_face(dataset, wanted, f"--data '{name}'", spool), Finder([Path()])


# ---- tables


def _described(path: Path, wanted: Wanted) -> tuple[Table, Columns] | None:
    """A table, and which column is what; None: it is none of images and captions."""
    if ".lemma." in path.name:  # Flickr8k's, of words in their basic form
        return None
    table = tables.read_table(path)
    columns = tables.choose_columns(table, wanted) if table else None
    return (table, columns) if table and columns else None


def _preferred(groups: list[list[tuple[Table, Columns]]]) -> list[tuple[Table, Columns]]:
    """One of several groups of tables, each of which tells of the same images."""
    if len(groups) == 1:
        return groups[0]
    for pattern in PREFERRED:
        matching = [group for group in groups if re.search(pattern, group[0][0].path.name.lower())]
        if len(matching) == 1:
            others = [table.path.name for group in groups if group is not matching[0] for table, _ in group]
            cli.note(f"{matching[0][0][0].path.name} is read, and not {', '.join(others)[:200]}; --data FILE reads one")
            return matching[0]
        if matching:
            groups = matching
    names = ", ".join(f"'{group[0][0].path}'" for group in groups[:4])
    raise InputError(
        f"several tables of images and captions lie there ({names}); name one of them, or all, with --data"
    )


def _form(described: list[tuple[Table, Columns]]) -> str:
    table, columns = described[0]
    names = table.path.name if len(described) == 1 else f"{len(described):,} tables such as {table.path.name}"
    kind = "a Karpathy file" if "sentences" in columns.captions else "a table"
    of = [f"images: {columns.image or table.embedded}", f"captions: {', '.join(columns.captions)}"]
    of += [f"split: {columns.split}"] if columns.split else []
    return f"{kind}, {names} ({'; '.join(of)})"


def _table_items(
    described: list[tuple[Table, Columns]], root: Path, finder: Finder, lists: list[Path] | None = None
) -> Iterator[Item]:
    """The items of tables, with the splits that the files' own names or official lists say."""
    splits: dict[str, str] = {}
    if lists and not any(columns.split for _, columns in described):
        names = (item.name for table, columns in described for item in forms.table_items(table, columns, finder))
        splits = forms.split_lists(lists, names)
    left_out: dict[str, None] = {}
    for table, columns in described:
        relative = os.path.relpath(table.path, root).replace(os.sep, "/").split("/")
        named = [split for part in (table.path.stem, *relative[-2::-1]) if (split := tables.split_of_name(part))]
        for item in forms.table_items(table, columns, finder, named[0] if named else ""):
            if splits:
                name = os.path.basename(item.name)
                item.split = splits.get(name) or splits.get(os.path.splitext(name)[0]) or ""
                if not item.split:
                    left_out[item.name] = None
                    continue
            yield item
    if left_out:
        cli.note(
            f"{len(left_out):,} images that no list of a split names are left out (such as {next(iter(left_out))})"
        )


# ---- items -> records


def _collect(items: Iterator[Item], finder: Finder, cache_dir: Path) -> dict[str, list[Record]]:
    """One record per image by split, from items that may be one per caption."""
    found: dict[str, Item] = {}
    numbered, moved = True, 0
    for item in items:
        if not item.location and item.url is None:
            item.location = finder.find(item.name, item.hint) or ""
        key = item.key or item.location or item.name
        first = found.get(key)
        if first is None:
            found[key] = item
            numbered &= item.image_id is not None
            continue
        first.captions += item.captions
        numbered &= item.image_id == first.image_id
        moved += item.split != first.split
    if moved:
        cli.note(f"{moved:,} captions name another split than their image's first one, which is kept")
    numbered = numbered and len({item.image_id for item in found.values()}) == len(found)
    pools: dict[str, list[Record]] = {}
    in_order = sorted(
        found, key=lambda key: (os.path.basename(found[key].name.replace("\\", "/")), found[key].name, key)
    )
    for number, key in enumerate(in_order):
        item = found.pop(key)
        name, location = item.name.replace("\\", "/"), item.location
        if item.url:
            file = _file_in(item.url)
            name = name if name != item.url else file or shown(item.url)
            location = str(cache_dir / "fetched" / f"{hashlib.sha256(item.url.encode()).hexdigest()[:20]}-{file[-60:]}")
        record = Record(
            item.image_id if numbered and item.image_id is not None else number,
            _short(name),
            location or finder.first_guess(item.name, item.hint),
            tuple(item.captions),
            item.url,
            item.size,
            item.member,
        )
        pools.setdefault(item.split, []).append(record)
    for records in pools.values():
        records.sort(key=lambda record: record.image_id)
    return pools


def _file_in(url: str) -> str:
    """The file name at the end of an address, without what a disk may not take; a malformed address has none."""
    try:
        file = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    except ValueError:
        return ""
    return re.sub(r"[^\w. ()+,=@~%-]", "_", file)


def _short(name: str) -> str:
    """A file name without the folders of a whole disk before it, as text that is UTF-8, whatever the disk holds."""
    name = name.rsplit("/", 1)[-1] if name.startswith("/") or re.match(r"[A-Za-z]:/", name) else name
    return utf8(name)


def join(found: list[Found]) -> dict[str, list[Record]]:
    """The pools of several data sets together; ids are numbered anew, from 0 in the order of the data sets."""
    if len(found) == 1:
        return found[0].pools
    pools: dict[str, list[Record]] = {}
    number = 0
    for one in found:
        for record, split in sorted(
            ((record, split) for split, records in one.pools.items() for record in records),
            key=lambda pair: pair[0].image_id,
        ):
            pools.setdefault(split, []).append(dataclasses.replace(record, image_id=number))
            number += 1
    return pools
