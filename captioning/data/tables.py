"""Tables of images and captions as people write them -> rows: CSV, TSV, JSON, JSON Lines, Parquet, `datasets`' Arrow.

    table = read_table(Path("captions.csv"))
    table.names                       # the columns
    for row in table.rows(): ...      # {column: value}; streamed, but for JSON

`choose_columns` finds by name, and then by content, which column is what.
"""

from __future__ import annotations

import ast
import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import InputError
from captioning.data.images import SUFFIXES
from captioning.foreign import refuse_special

Row = dict[str, Any]
SAMPLE = 200  # rows that are looked at
ENDINGS = "|".join(sorted(suffix[1:] for suffix in SUFFIXES))
IMAGE_NAME = re.compile(rf"[^\t;|\n]*\.(?:{ENDINGS})(?:#\d+)?|https?://\S+", re.IGNORECASE)

IMAGE_NAMES = """
    file_name filename image_path img_path image_name img_name image_file image_filename file path image img images
    photo picture url image_url img_url coco_url link src id image_id img_id imgid cocoid key uid
""".split()  # noqa: SIM905
CAPTION_NAMES = """
    caption captions sentences sentence text texts raw comment comments description descriptions caption_str
    captions_str image_caption caption_text references reference_strs alt_text alt label_text report findings title
    tokens
""".split()  # noqa: SIM905
SPLIT_NAMES = ["split", "splits", "set", "set_name", "subset", "partition", "fold", "phase"]
ID_NAMES = ["image_id", "imageid", "cocoid", "img_id", "imgid", "id"]
NUMBERED_CAPTION = re.compile(r"(?:caption|sentence|text|comment|description)s?[ _-]?\d+", re.IGNORECASE)
SPLITS = {
    **dict.fromkeys(("train", "training", "restval", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass
class Table:
    """Rows with named columns.

    Attributes:
        embedded: the column that holds the images themselves, or "".
    """

    path: Path
    names: list[str]
    rows: Callable[[], Iterable[Row]]
    embedded: str = ""


@dataclass(frozen=True)
class Columns:
    """Which column is what; "" where there is none."""

    image: str = ""
    captions: tuple[str, ...] = ()
    split: str = ""
    image_id: str = ""
    folder: str = ""  # Karpathy's `filepath`


@dataclass(frozen=True)
class Wanted:
    """What the command line says about the columns, and where images lie."""

    image_column: str = ""
    caption_column: str = ""
    split_column: str = ""
    image_dir: Path | None = None


def read_table(path: Path) -> Table | None:
    """The table in a file, by its ending; None: it is no table.

    Raises:
        InputError: it is damaged, or not UTF-8.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix == ".arrow":
        return read_arrow(path)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return read_json_table(path)
    return read_csv(path)


# ---- text


def open_text(path: Path) -> io.TextIOWrapper:
    """A file of text, in UTF-8 or in UTF-16 with its mark.

    Raises:
        InputError: it is a folder, a pipe or a device.
    """
    refuse_special(path)
    with path.open("rb") as file:
        start = file.read(2)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return path.open(encoding=encoding, newline="")


def _not_utf8(path: Path) -> InputError:
    return InputError(f"'{path}' is not text in UTF-8; save it again in that encoding")


def read_csv(path: Path) -> Table | None:
    """Comma, semicolon, tab or bar between the cells; with a header or without."""
    try:
        with open_text(path) as file:
            sample = file.read(1 << 16)
            whole = not file.read(1)
    except UnicodeError:
        raise _not_utf8(path) from None
    if sample[:4].lower() == "sep=":  # Excel's own line
        sample = sample.partition("\n")[2]
    if not sample.strip() or "\0" in sample:
        return None
    for delimiter in "\t|;,":
        quoted = delimiter in ",;" or _is_quoted(sample, delimiter)
        spaced = bool(re.search(rf'{re.escape(delimiter)} +"', sample))
        options: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": quoted and spaced}
        options |= {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
        try:
            lines = [line for line in csv.reader(io.StringIO(sample, newline=""), **options) if any(line)]
        except csv.Error:
            continue
        lines = lines if whole or len(lines) < 3 else lines[:-1]
        if found := _header(lines):
            return Table(path, found[0], functools.partial(_csv_rows, path, options, *found))
    return None


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether quotes surround cells. Between tabs and bars they may be letters as any others."""
    start = rf"(?:^|{re.escape(delimiter)}) *\""
    whole = rf"{start}(?:[^\"\n]|\"\")*\"(?={re.escape(delimiter)}|\r?$)"
    count = len(re.findall(whole, text, re.MULTILINE))
    return 0 < count == len(re.findall(start, text, re.MULTILINE))


def _header(lines: list[list[str]]) -> tuple[list[str], bool] | None:
    """The names of the columns, and whether the first line holds them; None: these lines are no table of images."""
    if not lines:
        return None
    first = [cell.strip() for cell in lines[0]]
    lowered = [name.lower() for name in first]
    has_header = not any(map(_is_image_name, first)) and len(set(lowered)) == len(lowered)
    width = len(first) if has_header else min(map(len, lines))
    if width < 2:
        return None
    rows = lines[has_header:][:SAMPLE]
    if not rows or sum(len(row) >= width for row in rows) < 0.9 * len(rows):
        return None
    images = max(range(width), key=lambda at: sum(at < len(row) and _is_image_name(row[at].strip()) for row in rows))
    share = sum(images < len(row) and _is_image_name(row[images].strip()) for row in rows) / len(rows)
    by_name = has_header and bool(set(lowered) & set(IMAGE_NAMES)) and bool(set(lowered) & set(CAPTION_NAMES))
    if share < 0.8 and not by_name:
        return None
    return (first if has_header else [str(number) for number in range(width)]), has_header


def _csv_rows(path: Path, options: dict[str, Any], names: list[str], has_header: bool) -> Iterator[Row]:
    """The rows. Cells that a delimiter inside a caption made too many are joined again."""
    csv.field_size_limit(1 << 20)
    caption = 0
    sample: list[list[str]] = []
    with open_text(path) as file:
        reader = csv.reader(file, **options)
        try:
            start = next(reader, [])
            if start and start[0].lower().startswith("sep="):
                start = next(reader, [])
            lines: Iterator[list[str]] = reader if has_header else itertools.chain([start], reader)
            sample = list(itertools.islice(lines, SAMPLE))
            known = [at for at, name in enumerate(names) if name.lower() in CAPTION_NAMES]
            caption = known[0] if known else _longest(sample, len(names))
            for cells in itertools.chain(sample, lines):
                if not any(cells):
                    continue
                surplus = len(cells) - len(names)
                if surplus > 0:
                    joined = options["delimiter"].join(cells[caption : caption + surplus + 1])
                    cells = [*cells[:caption], joined, *cells[caption + surplus + 1 :]]
                elif surplus == -1 and (number := re.match(r"\s*\d+\s+(?=\D)", cells[-1])):
                    # A line of Flickr30k's results.csv lacks the bar after the number.
                    cells = [*cells[:-1], number[0], cells[-1][number.end() :]]
                for cell in cells:
                    if "\n" in cell and any(
                        _is_image_name(line.split(options["delimiter"])[0]) for line in cell.splitlines()[1:]
                    ):
                        raise InputError(
                            f"a quote that is opened before line {reader.line_num} of '{path}' is never closed; "
                            "close it, or write it twice"
                        )
                yield dict(zip(names, map(str.strip, cells), strict=False))
        except UnicodeError:
            raise _not_utf8(path) from None
        except csv.Error as error:
            raise InputError(f"line {reader.line_num} of '{path}' cannot be read ({error}); correct the line") from None


def _longest(lines: list[list[str]], width: int) -> int:
    """The column with the longest cells that are not names of images: the captions."""
    lines = [line for line in lines if len(line) == width] or lines
    lengths = [
        sum(len(line[at]) for line in lines if at < len(line) and not _is_image_name(line[at])) for at in range(width)
    ]
    return lengths.index(max(lengths)) if lengths else 0


def _is_image_name(text: str) -> bool:
    return bool(IMAGE_NAME.fullmatch(text))


# ---- JSON


def read_json_table(path: Path, content: Any = None) -> Table | None:
    """A list of objects, at the top or below a key; lists by split; captions by file name; a line for each object."""
    if content is None:
        content = load_json(path)
    if content is None:
        return None if not _looks_like_lines(path) else _json_lines(path)
    if isinstance(content, dict):
        of_split = {key: rows for key, rows in content.items() if split_of_value(key) and isinstance(rows, list | dict)}
        for key in ("images", "annotations", "data", "samples", "items", "rows", "dataset", "results"):
            if isinstance(content.get(key), list):
                content = content[key]
                break
        else:
            if of_split:
                tables = [(key, read_json_table(path, rows)) for key, rows in of_split.items()]
                content = [{**row, "split": key} for key, table in tables if table for row in table.rows()]
            elif _is_by_name(content):
                content = [{"file_name": name, "captions": own} for name, own in content.items()]
            else:
                return None
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        return None
    names = dict.fromkeys(name for row in content[:SAMPLE] for name in row)
    return Table(path, list(names), lambda: content)


def _is_by_name(content: dict[str, Any]) -> bool:
    """Whether the keys are names of images, or their stems, and the values captions."""
    some = list(itertools.islice(content.items(), SAMPLE))
    if some and all(_is_image_name(name) for name, _ in some):
        return True
    # Settings too are words by name: captions have several words, names of images none but one.
    captions = [captions_of(own) for _, own in some]
    return (
        len(some) > 2
        and all(isinstance(own, str | list) for _, own in some)
        and all(own and all(map(_has_words, own)) for own in captions)
        and not any(re.search(r"\s", name) for name, _ in some)
    )


def load_json(path: Path) -> Any:
    """What a JSON file holds; None: it is no JSON, or several values one after the other."""
    try:
        with open_text(path) as file:
            return json.load(file)
    except UnicodeError:
        raise _not_utf8(path) from None
    except (ValueError, RecursionError):
        return None


def _looks_like_lines(path: Path) -> bool:
    with open_text(path) as file:
        try:
            first = next((line for line in file if line.strip()), "")
            return isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False


def _json_lines(path: Path) -> Table:
    def rows() -> Iterator[Row]:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeError:
                    raise _not_utf8(path) from None
                except (ValueError, RecursionError) as error:
                    raise InputError(f"line {number} of '{path}' is not JSON ({error}); correct the line") from None
                if isinstance(row, dict):
                    yield row

    names = dict.fromkeys(name for row in itertools.islice(rows(), SAMPLE) for name in row)
    return Table(path, list(names), rows)


# ---- Parquet and Arrow


def read_parquet(path: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a Parquet file, or damaged ({error}); get it again") from None
    embedded, names = _kinds(file.schema_arrow)
    read = [f"{name}.path" if name == embedded and _is_struct(file.schema_arrow, name) else name for name in names]

    def rows() -> Iterator[Row]:
        with parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(1000, columns=[name for name in read if name != embedded]):
                yield from batch.to_pylist()

    return Table(path, names, rows, embedded)


def read_arrow(path: Path) -> Table:
    import pyarrow

    from captioning.data.check import check_arrow
    from captioning.data.records import open_arrow

    check_arrow([path], f"'{path}'")
    try:
        table = open_arrow(str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not an Arrow file, or damaged ({error}); get it again") from None
    embedded, names = _kinds(table.schema)

    def rows() -> Iterator[Row]:
        for batch in table.select([name for name in names if name != embedded]).to_batches(1000):
            own = batch.to_pylist()
            yield from own

    def with_paths() -> Iterator[Row]:
        paths = itertools.chain.from_iterable(
            chunk.field("path").to_pylist() for chunk in table.column(embedded).chunks
        )
        for row, name in zip(rows(), paths, strict=True):
            yield {**row, embedded: {"path": name}}

    return Table(path, names, with_paths if embedded and _is_struct(table.schema, embedded) else rows, embedded)


def _is_struct(schema, name: str) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(schema.field(name).type)


def _kinds(schema) -> tuple[str, list[str]]:
    """The column that holds images, and the columns to read; other binary ones are left out."""
    import pyarrow.types as kinds

    def holds_bytes(kind) -> bool:
        if kinds.is_struct(kind):
            return {"bytes", "path"} <= {kind.field(number).name for number in range(kind.num_fields)}
        return kinds.is_binary(kind) or kinds.is_large_binary(kind)

    holders = [field.name for field in schema if holds_bytes(field.type)]
    likely = [
        name for name in holders if name.lower() in (*IMAGE_NAMES, "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
    ]
    embedded = (likely or holders or [""])[0]
    return embedded, [field.name for field in schema if field.name == embedded or not holds_bytes(field.type)]


# ---- columns


def choose_columns(table: Table, wanted: Wanted) -> Columns | None:
    """Which column is what, by name and then by content; None: there are no images or no captions.

    Raises:
        InputError: a column that was asked for is not there.
    """
    sample = list(itertools.islice(table.rows(), SAMPLE))
    by_lower = {name.lower().strip(): name for name in reversed(table.names)}
    for flag in ("image_column", "caption_column", "split_column"):
        name = getattr(wanted, flag)
        if name and name not in table.names and (flag, name) != ("split_column", "none"):
            raise InputError(
                f"--{flag} '{name}' is not a column of '{table.path}'; it has {', '.join(table.names)[:300]}"
            )

    def share(name: str, holds: Callable[[Any], bool]) -> float:
        values = [row[name] for row in sample if row.get(name) not in (None, "")]
        return sum(map(holds, values)) / len(values) if values else 0

    image = wanted.image_column or _image_column(table, by_lower, share)
    captions = (wanted.caption_column,) if wanted.caption_column else _caption_columns(table, by_lower, share, image)
    split = "" if wanted.split_column == "none" else wanted.split_column
    if not wanted.split_column:
        known = [by_lower[name] for name in SPLIT_NAMES if name in by_lower]
        # A column of another meaning may have such a name: "set" of stamps.
        sure = (name for name in known if share(name, lambda value: split_of_value(value) is not None) == 1)
        split = by_lower.get("split") or next(sure, "")
    ids = [by_lower[name] for name in ID_NAMES if name in by_lower and by_lower[name] != image]
    image_id = next((name for name in ids if share(name, lambda value: as_id(value) is not None) == 1), "")
    folder = by_lower.get("filepath", "") if image == by_lower.get("filename") else ""
    return Columns(image, captions, split, image_id, folder) if (image or table.embedded) and captions else None


def _image_column(table: Table, by_lower: dict[str, str], share) -> str:
    names = [by_lower[name] for name in IMAGE_NAMES if name in by_lower and by_lower[name] != table.embedded]
    holds = lambda value: isinstance(value, str) and _is_image_name(value.strip())  # noqa: E731
    looks = [name for name in [*names, *table.names] if name != table.embedded and share(name, holds) > 0.5]
    local = [name for name in looks if share(name, lambda value: isinstance(value, str) and "://" in value) < 0.5]
    if local or looks:
        return (local or looks)[0]
    if table.embedded:
        return ""
    return next((name for name in names if share(name, lambda value: isinstance(value, str | int)) > 0.9), "")


def _caption_columns(table: Table, by_lower: dict[str, str], share, image: str) -> tuple[str, ...]:
    numbered = [name for name in table.names if NUMBERED_CAPTION.fullmatch(name.strip())]
    for name in CAPTION_NAMES:
        if name in by_lower and by_lower[name] != image and share(by_lower[name], _is_text) > 0.5:
            return (by_lower[name],)
    if numbered:
        return tuple(name for name in numbered if share(name, _is_text) > 0.5)
    rest = [name for name in table.names if name not in (image, table.embedded)]
    texts = [
        name for name in rest if share(name, lambda value: _is_text(value) and not _is_image_name(str(value))) > 0.5
    ]
    texts = [name for name in texts if share(name, _has_words) > 0.3]
    headerless = all(name.isdecimal() for name in table.names)
    return tuple(texts) if headerless else tuple(texts[:1])


def _is_text(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, list | dict) or (isinstance(value, str) and not re.fullmatch(r"[\d\s.,:/-]*", value))
    )


def _has_words(value: Any) -> bool:
    """Several words, or a sentence of a language without spaces."""
    text = value if isinstance(value, str) else str(value)
    return len(text.split()) > 1 or (not text.isascii() and len(text) > 3)


# ---- values


def captions_of(value: Any, tokens: bool = False) -> list[str]:
    """Every caption in a cell: a text, a list, an object with `raw` or `tokens`, or one of those written as text.

    Of a conversation (`from` and `value`, or `role` and `content`, in turn) it is what the model answers.

    Args:
        tokens: a list of words is one caption.
    """
    if value is None:
        return []
    if isinstance(value, dict):
        for speaker, said in (("from", "value"), ("role", "content")):
            if speaker in value and said in value:
                return captions_of(value[said]) if value[speaker] in ("gpt", "assistant") else []
        for key in ("raw", "caption", "text", "sentence", "comment", "captions"):
            if key in value:
                return captions_of(value[key])
        return captions_of(value["tokens"], tokens=True) if "tokens" in value else []
    if isinstance(value, list | tuple):
        if tokens and all(isinstance(word, str) for word in value):
            return [" ".join(value)]
        return [text for own in value for text in captions_of(own, tokens=isinstance(own, list))]
    if not isinstance(value, str):
        return []
    if value[:1] == "[" and value.rstrip()[-1:] == "]":
        for parse in (json.loads, ast.literal_eval):
            try:
                return captions_of(parse(value), tokens)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                pass
    # Half of a surrogate pair cannot be stored.
    return [value if value.isascii() else value.encode("utf-8", "replace").decode()]


def split_of_value(value: Any) -> str | None:
    """`train`, `validation` or `test` for what a cell says; None for other words."""
    return SPLITS.get(re.sub(r"[\W\d_]+", "", str(value)).lower())


def split_of_name(name: str) -> str | None:
    """The split that a file or folder is named after, such as `captions_val2017` or `Flickr_8k.trainImages`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    found = {SPLITS[word.lower()] for word in words if word.lower() in SPLITS}
    return found.pop() if len(found) == 1 else None


def as_id(value: Any) -> int | None:
    """An image id, where a value is one."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None
