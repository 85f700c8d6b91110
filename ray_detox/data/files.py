"""The files, or the hub dataset, that `data.path` names, and a check that a row is usable.

No Ray here: a missing file, a missing column or a filter that leaves nothing is found in this
process before any node starts. `stages/ingest.py` reads the same `Source` at full scale.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.prompts import reason_to_leave_out
from ray_detox.models.sources import looks_like_path, s3_filesystem

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
EXPECTED = {
    "jsonl": "a JSON object in each line",
    "csv": "as many fields in each row as in the first line, in quotes if they contain commas",
}
LAB_ROWS = 3200
"""Rows of the embedded corpus that `data.path=lab` offers."""


@dataclass(frozen=True, slots=True)
class Source:
    """The kind of the data and its files."""

    kind: str
    """`lab`, `hub`, `jsonl`, `csv` or `parquet`."""
    paths: tuple[str, ...] = ()
    """Files as absolute paths or s3:// addresses; empty for `lab` and `hub`."""


def locate(config: DataConfig) -> Source:
    """Find the data that `data.path` names; of the network, only S3 is used, to list files.

    Raises:
        ConfigError: the path does not exist, or its files are of no supported kind.
    """
    path = config.path
    if path == "lab":
        return Source("lab")
    if path.startswith("s3://"):
        return _source_of_files(_list_s3(path), path)
    local = Path(path).expanduser()
    if local.is_dir():
        return _source_of_files(
            sorted(str(f.resolve()) for f in local.iterdir() if f.suffix in KINDS), path
        )
    if local.is_file():
        return _source_of_files([str(local.resolve())], path)
    if looks_like_path(path) or local.suffix in KINDS:
        raise ConfigError(
            f"data.path is {path!r}, and no such file is here. Give a .jsonl, .csv or .parquet "
            "file, a folder of them, an s3:// address, a hub id, or lab."
        )
    return Source("hub")


def _list_s3(address: str) -> list[str]:
    from pyarrow import fs

    filesystem, root = s3_filesystem(address, "data.path")
    try:
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.File:
            return [address]
        infos = filesystem.get_file_info(fs.FileSelector(root))
    except OSError as error:
        raise ConfigError(
            f"data.path is {address!r}, and it cannot be listed: {str(error).splitlines()[0]} "
            "Check the address, the region and the credentials."
        ) from error
    return sorted(f"s3://{i.path}" for i in infos if Path(i.path).suffix in KINDS)


def _source_of_files(files: list[str], path: str) -> Source:
    kinds = {KINDS.get(Path(f).suffix, "") for f in files}
    if not files or "" in kinds:
        raise ConfigError(f"data.path is {path!r}; expected .jsonl, .csv or .parquet files there.")
    if len(kinds) > 1:
        raise ConfigError(
            f"data.path is {path!r}, which holds {' and '.join(sorted(kinds))} files. "
            "Name one file, or keep one kind of file in the folder."
        )
    return Source(kinds.pop(), tuple(files))


def check_rows(source: Source, config: DataConfig) -> None:
    """Read rows until one is usable, which is normally one of the first few.

    Raises:
        ConfigError: a column is missing, or no row is left after filtering.
    """
    if source.kind == "lab":
        return
    seen, reasons, columns = 0, dict[str, int](), dict[str, None]()
    for row in peek(source, config):
        if config.limit is not None and seen >= config.limit:
            break
        seen += 1
        columns |= dict.fromkeys(row)
        reason = reason_to_leave_out(row, config)
        if reason is None:
            _check_summary_column(row, config)
            return
        reasons[reason] = reasons.get(reason, 0) + 1
    if not seen:
        raise ConfigError(f"data.path={config.path} holds no rows.")
    if not columns:
        raise ConfigError(
            f"None of the {seen:,} rows of data.path={config.path} can be read as {source.kind}; "
            f"expected {EXPECTED.get(source.kind, 'columns')}."
        )
    if config.dialogue_column not in columns:
        raise ConfigError(
            f"data.path={config.path} has no column {config.dialogue_column!r}; its columns are "
            f"{', '.join(columns)}. Set data.dialogue_column to the one with the dialogues."
        )
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    raise ConfigError(
        f"None of the {seen:,} rows of data.path={config.path} is left after filtering: {why}. "
        "Widen data.min_chars and data.max_chars, or check data.dialogue_column."
    )


def _check_summary_column(row: Mapping[str, Any], config: DataConfig) -> None:
    if config.summary_column is not None and config.summary_column not in row:
        raise ConfigError(
            f"data.path={config.path} has no column {config.summary_column!r}; its columns are "
            f"{', '.join(row)}. Set data.summary_column to the one with the reference summaries, "
            "or to null."
        )


def peek(source: Source, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    """Read rows lazily, one after another, in this process."""
    if source.kind == "hub":
        yield from load_hub(config)
        return
    from pyarrow import fs, parquet

    for path in source.paths:
        filesystem, name = (
            s3_filesystem(path, "data.path") if "://" in path else (fs.LocalFileSystem(), path)
        )
        try:
            if source.kind == "parquet":
                with filesystem.open_input_file(name) as file:
                    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
                        yield from batch.to_pylist()
            else:
                with filesystem.open_input_stream(name) as file:
                    yield from read_rows(file, source.kind)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"data.path: {path} cannot be read as {source.kind}: {str(error).splitlines()[0]}"
            ) from error


def read_rows(file: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Read the rows of an open .jsonl or .csv file, one after another.

    A row that is not a JSON object, or has another number of fields than the first line, yields
    an empty dict. Bytes that are not valid UTF-8 become lone surrogates, and the row filter leaves
    such dialogues out.
    """
    # In .jsonl only "\n" ends a line: a dialogue may contain other line separators. The csv module
    # finds the ends of rows itself.
    newline = "" if kind == "csv" else "\n"
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
    if kind == "csv":
        csv.field_size_limit(1 << 30)  # the default is 131,072 characters
        for row in csv.DictReader(lines):
            # DictReader puts surplus fields under the key None and gives missing fields None.
            yield {} if None in row or None in row.values() else dict(row)
    else:
        yield from map(parse_json_row, filter(str.strip, lines))


def parse_json_row(line: str) -> dict[str, Any]:
    """Parse one line of a .jsonl file; return an empty row if it is not a JSON object."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def load_hub(config: DataConfig) -> Any:
    """Load the hub dataset that `data.path` names.

    Raises:
        ConfigError: the dataset does not exist, or the hub cannot be reached.
    """
    # Imported here: only hub datasets need these libraries, and they load slowly.
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()  # otherwise each failed request prints a warning
    try:
        return datasets.load_dataset(config.path, revision=config.revision, split=config.split)
    except ValueError as error:
        raise ConfigError(
            f"data.path is the hub dataset {config.path!r} with data.split={config.split!r}: {error}"
        ) from error
    except (DatasetNotFoundError, OSError) as error:
        raise ConfigError(
            f"data.path is the hub id {config.path!r}, and it cannot be loaded from here "
            f"({type(error).__name__}). Download it elsewhere and set data.path=/path/to/file.parquet "
            "(or .jsonl, .csv, s3://...)."
        ) from error
