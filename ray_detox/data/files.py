"""What `data.path` names: which files of which kind, and whether any row of it can be used.

No Ray here: a missing file, a missing column or a filter that leaves nothing is found by looking,
before any node starts. `stages/ingest.py` reads the same `Source` at full scale.
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
    "csv": "as many fields in each row as in the first line, in quotes where they have commas",
}
LAB_ROWS = 3200
"""Rows of the embedded corpus that `data.path=lab` offers."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from."""

    kind: str
    """`lab`, `hub`, `jsonl`, `csv` or `parquet`."""
    paths: tuple[str, ...] = ()
    """Files, absolute or s3://, for the last three."""


def locate(config: DataConfig) -> Source:
    """Find what `data.path` names, touching no network but S3's listing.

    Raises:
        ConfigError: nothing is there, or of no kind that can be read.
    """
    path = config.path
    if path == "lab":
        return Source("lab")
    if path.startswith("s3://"):
        return _of_files(_list_s3(path), path)
    local = Path(path).expanduser()
    if local.is_dir():
        return _of_files(
            sorted(str(f.resolve()) for f in local.iterdir() if f.suffix in KINDS), path
        )
    if local.is_file():
        return _of_files([str(local.resolve())], path)
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


def _of_files(files: list[str], path: str) -> Source:
    kinds = {KINDS.get(Path(f).suffix, "") for f in files}
    if not files or "" in kinds:
        raise ConfigError(f"data.path is {path!r}; expected .jsonl, .csv or .parquet files there.")
    if len(kinds) > 1:
        raise ConfigError(
            f"data.path is {path!r}, which holds {' and '.join(sorted(kinds))} files. "
            "Name one of them, or keep one kind."
        )
    return Source(kinds.pop(), tuple(files))


def check_rows(source: Source, config: DataConfig) -> None:
    """Look until one row can be used; normally that is the first few.

    Raises:
        ConfigError: the dialogue column is missing, or no row is left after filtering.
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
    """Rows one after another, in this process, read only as far as they are asked for."""
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
                    yield from rows_of(file, source.kind)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"data.path: {path} cannot be read as {source.kind}: {str(error).splitlines()[0]}"
            ) from error


def rows_of(file: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of an open .jsonl or .csv file, one after another.

    A row that is no JSON object, or that has another number of fields than the first line, has no
    columns. Bytes that are no UTF-8 become lone surrogates, which no dialogue may have.
    """
    # Only "\n" ends a line of .jsonl, and not, say, a line separator between quotes; csv finds
    # the ends of its rows itself.
    newline = "" if kind == "csv" else "\n"
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
    if kind == "csv":
        csv.field_size_limit(1 << 30)  # 131,072 characters unless told
        for row in csv.DictReader(lines):
            # What is too much stands under None, what is missing is None.
            yield {} if None in row or None in row.values() else dict(row)
    else:
        yield from map(parse_json_row, filter(str.strip, lines))


def parse_json_row(line: str) -> dict[str, Any]:
    """One line of a .jsonl file as a row; a line that is no JSON object has no columns."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def load_hub(config: DataConfig) -> Any:
    """The hub dataset that `data.path` names.

    Raises:
        ConfigError: it is not there, or the hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()  # each attempt to reach the hub would be a line
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
