"""Rows of one data file: compression, encoding, and the ways in which JSON, CSV and tables hold rows.

    bytes -> decompressed -> text in the file's encoding -> rows as dicts (values as in JSON)

Every fault of a file is a `ConfigError` of one sentence that says how to convert the file; faults of
single rows become rows that the filter leaves out and counts.
"""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.columns import check_names, partition_columns
from ray_detox.data.contents import BYTES_TO_LOOK_AT, COMPRESSIONS, check_content, compression_of
from ray_detox.data.csv_rows import csv_rows
from ray_detox.data.json_rows import json_rows
from ray_detox.data.prompts import PROBLEM
from ray_detox.errors import first_line
from ray_detox.models.s3 import open_s3, split_address

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
COMPRESSED = tuple(COMPRESSIONS.values())


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
        more = partition_columns(split_address(path)[0] if path.startswith("s3://") else path)
        for row in _rows_of_kind(filesystem, name, kind, config, path):
            yield row if not more or PROBLEM in row else {**more, **row}
    except ConfigError:
        raise
    except Exception as error:  # each library of compression has an error of its own
        raise ConfigError(
            f"data.path: {path} cannot be read as {kind}: {first_line(error)}. Copy or make the file "
            "again."
        ) from error


def _rows_of_kind(
    filesystem: Any, name: str, kind: str, config: DataConfig, path: str
) -> Iterator[dict[str, Any]]:
    with filesystem.open_input_file(name) as file:
        start = file.read(BYTES_TO_LOOK_AT)
    if kind in ("parquet", "arrow"):
        check_content(start, kind, path)
        with filesystem.open_input_file(name) as file:
            yield from _table_rows(file, kind, path)
    else:
        with filesystem.open_input_stream(name, compression=None) as file:
            # By the content: servers and browsers add or remove a compression, and not the suffix.
            packed = compression_of(start)
            yield from read_rows(_decompressed(file, packed, path), kind, config, path)


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
    an `unreadable_row`. Bytes that are not valid UTF-8 become lone surrogates, and the row filter leaves
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
    start = content.peek(4096)[:4096]
    check_content(start[:BYTES_TO_LOOK_AT], kind, path)
    encoding = encoding_of(start)
    lines = io.TextIOWrapper(content, encoding, errors="surrogateescape", newline=newline)
    return csv_rows(lines, config, path) if kind == "csv" else json_rows(lines, config, path)
