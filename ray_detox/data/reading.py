"""Rows of one data file: compression, encoding, and the ways in which JSON, CSV and tables hold rows.

    bytes -> decompressed -> text in the file's encoding -> rows as dicts (values as in JSON)

Every fault of a file is a `ConfigError` of one sentence that says how to convert the file; faults of
single rows become rows that the filter leaves out and counts.
"""

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.prompts import PROBLEM
from ray_detox.errors import first_line
from ray_detox.models.s3 import open_s3

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAX_DOCUMENT_CHARACTERS = 256 << 20
"""Maximum length of a JSON text that is not one row per line, because it is parsed as a whole."""
MAX_FIELD_CHARACTERS = 1 << 30
DELIMITERS = ",\t;|"
_POINTER = b"version https://git-lfs"
_GZIP = b"\x1f\x8b"
"""First bytes of gzip, which some servers send without the suffix."""
_END = "\0end of the file\0"
"""A last line after those of a CSV file; it is part of a field if a quote is open."""


def kind_of(path: str) -> str | None:
    """Return the kind of a data file by the suffix of its name; None if it is no data file."""
    name = PurePosixPath(path.lower())
    kind = KINDS.get(PurePosixPath(name.stem if name.suffix in COMPRESSED else name).suffix)
    is_table = kind in ("parquet", "arrow")
    return None if is_table and name.suffix in COMPRESSED else kind


def read_file(path: str, kind: str, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Read the rows of a file lazily.

    Args:
        path: absolute path, or an s3:// address.
        kind: from `kind_of`.
        config: names the columns and the split.

    Raises:
        ConfigError: the file cannot be read.
    """
    from pyarrow import fs

    try:
        filesystem, name = (
            open_s3(path) if path.startswith("s3://") else (fs.LocalFileSystem(), path)
        )
        if filesystem.get_file_info(name).size == 0:
            return
        with filesystem.open_input_file(name) as file:
            start = file.read(len(_POINTER))
        if start == _POINTER:
            raise ConfigError(
                f"data.path: {path} is a pointer of Git LFS and not the data. Fetch the data with: git "
                "lfs pull"
            )
        if kind in ("parquet", "arrow"):
            with filesystem.open_input_file(name) as file:
                yield from _table_rows(file, kind, path)
        else:
            with filesystem.open_input_stream(name, compression=None) as file:
                packed = ".gz" if start.startswith(_GZIP) else PurePosixPath(path.lower()).suffix
                yield from read_rows(_decompressed(file, packed, path), kind, config, path)
    except ConfigError:
        raise
    except Exception as error:  # each library of compression has an error of its own
        raise ConfigError(
            f"data.path: {path} cannot be read as {kind}: {first_line(error)}. Copy or make the file "
            "again."
        ) from error


def _decompressed(file: Any, suffix: str, path: str) -> Any:
    try:
        if suffix == ".gz":
            import gzip

            return gzip.GzipFile(fileobj=file)
        if suffix == ".bz2":
            import bz2

            return bz2.BZ2File(file)
        if suffix == ".xz":
            import lzma

            return lzma.LZMAFile(file)
    except ImportError as error:
        raise ConfigError(
            f"data.path: {path} cannot be decompressed, because this Python was built without "
            f"{error.name}. Decompress the file first."
        ) from None
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(file, "zstd")
    return file


# ---- tables ------------------------------------------------------------------------------------


def _table_rows(file: Any, kind: str, path: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    if kind == "parquet":
        opened = parquet.ParquetFile(file)
        names, batches = opened.schema_arrow.names, opened.iter_batches(batch_size=256)
    else:
        try:
            reader = pa.ipc.open_stream(file)  # `save_to_disk` writes streams
        except pa.ArrowInvalid:
            file.seek(0)
            whole = pa.ipc.open_file(file)
            names = whole.schema.names
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            names, batches = reader.schema.names, iter(reader)
    check_names(names, path)
    for batch in batches:
        for row in batch.to_pylist():
            yield {name: _as_text(value) for name, value in row.items()}


def _as_text(value: Any) -> Any:
    # Some programs write texts as binary columns.
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def check_names(names: Sequence[str], path: str) -> None:
    """Check that no two columns of a file have the same name.

    Raises:
        ConfigError: two have.
    """
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ConfigError(
            f"data.path: {path} has more than one column {twice[0]!r}. Rename or remove one of them in "
            "the file."
        )


# ---- text --------------------------------------------------------------------------------------


class _Bytes(io.RawIOBase):
    """A binary file of any library, as Python's own classes expect one."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text, by its first bytes: UTF-8 unless they show UTF-16 or UTF-32."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    half = max(1, len(start) // 2)
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[first::2].count(0) > 0.6 * half and start[1 - first :: 2].count(0) < 0.1 * half:
            return name
    return "utf-8-sig"


def read_rows(file: Any, kind: str, config: DataConfig, path: str = "") -> Iterator[dict[str, Any]]:
    """Read the rows of an open JSON or CSV file, one after another.

    A row that is not a JSON object, or has another number of fields than the first line, yields
    an empty dict. Bytes that are not valid UTF-8 become lone surrogates, and the row filter leaves
    such dialogues out.

    Args:
        file: binary, decompressed.
        kind: `jsonl` or `csv`.
        config: names the columns and the split.
        path: of the file, for messages; a `.tsv` has tabs.

    Raises:
        ConfigError: the file cannot be read as this kind.
    """
    content = io.BufferedReader(_Bytes(file), 1 << 16)
    # In .jsonl only "\n" ends a line: a dialogue may contain other line separators. The csv module
    # finds the ends of rows itself.
    newline = "" if kind == "csv" else "\n"
    encoding = encoding_of(content.peek(4096)[:4096])
    lines = io.TextIOWrapper(content, encoding, errors="surrogateescape", newline=newline)
    return _csv_rows(lines, config, path) if kind == "csv" else _json_rows(lines, config, path)


# ---- JSON --------------------------------------------------------------------------------------


def _json_rows(lines: io.TextIOWrapper, config: DataConfig, path: str) -> Iterator[dict[str, Any]]:
    filled = filter(str.strip, lines)
    first, second = next(filled, None), None
    if first is None:
        return
    try:
        only = json.loads(first)
    except (ValueError, RecursionError):
        if first.lstrip()[0] in "[{":
            text = first + _rest(lines, path)
            found = _documents(text)
            if found:
                yield from _rows_of(found, config, path)
            else:
                yield from map(parse_json_row, filter(str.strip, text.split("\n")))
            return
        only = None
    second = next(filled, None)
    if second is None and isinstance(only, dict | list):
        yield from _rows_of([only], config, path)
        return
    some = [first] if second is None else [first, second]
    yield from map(parse_json_row, itertools.chain(some, filled))


def _rest(lines: io.TextIOWrapper, path: str) -> str:
    text = lines.read(MAX_DOCUMENT_CHARACTERS + 1)
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise ConfigError(
            f"data.path: {path} is longer than {MAX_DOCUMENT_CHARACTERS:,} characters and not one JSON "
            "object in each line. Convert it with: jq -c '.[]' FILE > FILE.jsonl"
        )
    return text


def _documents(text: str) -> list[Any]:
    """Return the JSON values that follow one another in a text; none if anything else is in it."""
    found, position, decoder = [], 0, json.JSONDecoder()
    text = text.strip()
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        found.append(value)
        while position < len(text) and text[position].isspace():
            position += 1
    return found


def _rows_of(found: list[Any], config: DataConfig, path: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a whole file of JSON: a list of rows, lists by split, columns, or one row."""
    value = found[0] if len(found) == 1 else found
    if isinstance(value, list):
        if value and all(isinstance(row, dict) and "row_idx" in row for row in value):
            value = [row.get("row") for row in value]  # as the hub's server of rows answers
        return [row if isinstance(row, dict) else {} for row in value]
    if not isinstance(value, dict):
        return [{}]
    columns = _columns(value)
    if config.dialogue_column in value:
        return [value] if columns is None else columns
    tables = {
        name: rows
        for name, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    if config.split in tables:
        return tables[config.split]
    if len(tables) > 1:
        raise ConfigError(
            f"data.path: {path} has the lists {', '.join(tables)}, and none is called "
            f"{config.split!r}. Set data.split to the one to read."
        )
    if tables:
        return _rows_of([next(iter(tables.values()))], config, path)
    if value and all(isinstance(row, dict) for row in value.values()):
        return list(value.values())  # rows by their names
    return [value]


def _columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of columns, each a list or (as pandas writes them) an object by row."""
    by_list = all(isinstance(column, list) for column in value.values())
    by_row = all(isinstance(column, dict) for column in value.values())
    if not value or not (by_list or by_row):
        return None
    shapes = [range(len(c)) if by_list else list(c) for c in value.values()]
    if any(shape != shapes[0] for shape in shapes):
        return None
    return [{name: column[i] for name, column in value.items()} for i in shapes[0]]


def parse_json_row(line: str) -> dict[str, Any]:
    """Parse one line of a .jsonl file; return an empty row if it is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


# ---- CSV ---------------------------------------------------------------------------------------


def _csv_rows(lines: Iterable[str], config: DataConfig, path: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the default is 131,072 characters
    lines = iter(lines)
    first, before = next(lines, ""), 0
    delimiter = "\t" if ".tsv" in path.lower() else ","
    named = first.strip().lower()
    if named.startswith("sep=") and len(named) == 5:  # written by Excel
        delimiter, first, before = named[4], next(lines, ""), 1
    else:
        delimiter = _delimiter(first, delimiter, config)
    reader = csv.reader(itertools.chain([first], lines, [_END]), delimiter=delimiter)
    names: list[str] | None = None
    start = 1
    for fields in reader:
        begin, start = start + before, reader.line_num + 1
        if not fields or fields == [_END]:
            continue
        if fields[-1].endswith(_END):
            yield {PROBLEM: _never_closed(fields[-1], reader.line_num - 1 + before)}
        elif names is None:
            names = [name.strip() for name in fields]
            check_names(names, path)
        elif len(fields) == len(names):
            yield dict(zip(names, fields, strict=True))
        elif (end := reader.line_num + before) > begin:
            yield {PROBLEM: f"in lines {begin} to {end}, joined by a quote that ends too late"}
        else:
            yield {}


def _never_closed(field: str, last_line: int) -> str:
    text = field.removesuffix(_END)
    breaks = max(text.count("\n"), text.count("\r"))
    lines = breaks + (not text.endswith(("\n", "\r")))
    first = last_line - lines + 1
    return (
        f"from the quote in line {first} that is never closed, with all {lines:,} lines to the end"
    )


def _delimiter(first: str, usual: str, config: DataConfig) -> str:
    """Return the character that separates the names in the first line."""
    for one in (usual, *DELIMITERS):
        names = next(csv.reader([first], delimiter=one), [])
        if len(names) > 1 and config.dialogue_column in (name.strip() for name in names):
            return one
    return usual
