"""The files, or the hub dataset, that `data.path` names, and a check that a row is usable.

No Ray here: a missing file, a missing column or a filter that leaves nothing is found in this
process before any node starts. `stages/ingest.py` reads the same `Source` at full scale.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.prompts import PROBLEM, reason_to_leave_out
from ray_detox.data.reading import kind_of, read_file
from ray_detox.errors import first_line
from ray_detox.lab import corpus
from ray_detox.models.s3 import advice, open_s3, same_options
from ray_detox.models.sources import looks_like_path

EXPECTED = {
    "jsonl": "a JSON object in each line, or one list of objects",
    "csv": "as many fields in each row as in the first line, in quotes if they contain commas",
}
SUPPORTED = ".jsonl, .json, .csv, .tsv, .parquet or .arrow"
LAB_ROWS = 3200
"""Rows of the embedded corpus that `data.path=lab` offers."""
METADATA = frozenset(
    "dataset_info.json dataset_infos.json dataset_dict.json state.json croissant.json".split()
)
"""Files of `datasets` that describe data and hold none."""
SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev", "eval"),
    ("test", "testing"),
)
"""Names of splits in the names of files and folders; those in one line mean the same."""
MOST_FILES_TO_OPEN = 200
"""Files of a source that a check opens."""


@dataclass(frozen=True, slots=True)
class Source:
    """The kind of the data and its files."""

    kind: str
    """`lab`, `hub`, `jsonl`, `csv`, `parquet` or `arrow`."""
    paths: tuple[str, ...] = ()
    """Files as absolute paths or s3:// addresses; empty for `lab` and `hub`."""
    note: str = ""
    """What is not read of a folder, as a sentence."""


def locate(config: DataConfig) -> Source:
    """Find the data that `data.path` names; of the network, only S3 is used, to list files.

    Raises:
        ConfigError: the path does not exist, or its files are of no supported kind.
    """
    path = config.path
    if path == "lab":
        return Source("lab")
    if path.startswith("s3://"):
        return _locate_s3(config)
    local = Path(path).expanduser().absolute()
    try:
        if local.is_dir():
            from pyarrow import fs  # here: it loads slowly

            for file in local.iterdir():
                if kind_of(file.name) and file.is_symlink() and not file.exists():
                    raise ConfigError(
                        f"data.path: {file} is a link to a file that does not exist. Copy the file to "
                        "its place, or remove the link."
                    )
            files, note = _choose(fs.LocalFileSystem(), str(local), config)
            return _source_of_files(files, path, note)
        if local.is_file():
            return _source_of_files([str(local)], path)
    except OSError as error:
        raise ConfigError(
            f"data.path is {path!r}, and it cannot be listed: {first_line(error)}. Check its "
            "permissions."
        ) from error
    if looks_like_path(path) or kind_of(path):
        raise ConfigError(
            f"data.path is {path!r}, and no such file is here. Give a {SUPPORTED} "
            "file, a folder of them, an s3:// address, a hub id, or lab."
        )
    return Source("hub")


def _locate_s3(config: DataConfig) -> Source:
    from pyarrow import fs

    address = config.path
    filesystem, root = open_s3(address)
    try:
        if filesystem.get_file_info(root).type == fs.FileType.File:
            return _source_of_files([address], address, names=[root])
        files, note = _choose(filesystem, root, config)
    except OSError as error:
        raise ConfigError(
            f"data.path is {address!r}, and it cannot be listed: {first_line(error)}. "
            f"{advice(error)}."
        ) from error
    return _source_of_files([same_options(address, f) for f in files], address, note, names=files)


def _choose(filesystem: Any, root: str, config: DataConfig) -> tuple[list[str], str]:
    """Return the data files in a folder that belong to `data.split`, and what is not read."""
    from pyarrow import fs

    marks = [f"{root}/{name}" for name in ("dataset_dict.json", "state.json")]
    is_dict, is_saved = (info.type == fs.FileType.File for info in filesystem.get_file_info(marks))
    if is_dict:
        splits = _read_json(filesystem, marks[0]).get("splits")
        names = [name for name in splits if isinstance(name, str)] if splits else []
        if config.split not in names:
            raise ConfigError(
                f"data.path={config.path} has the splits {', '.join(names) or 'none'}, and data.split is "
                f"{config.split!r}. Set data.split to one of them."
            )
        others = [name for name in names if name != config.split]
        inner = f"{root}/{PurePosixPath(config.split).name}"
        return _saved(filesystem, inner, config), _split_note(config.split, others)
    if is_saved:
        return _saved(filesystem, root, config), ""
    found = _list(filesystem, root, recursive=False)
    return _of_split(found or _list(filesystem, root, recursive=True), root, config)


def _list(filesystem: Any, root: str, *, recursive: bool) -> list[str]:
    from pyarrow import fs

    found = []
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=recursive)):
        inner = PurePosixPath(info.path).relative_to(root)
        # Names with these first characters are marks and drafts of Spark, Hadoop and others.
        hidden = any(part.startswith((".", "_")) for part in inner.parts)
        if hidden or inner.name in METADATA or kind_of(inner.name) is None:
            continue
        if info.type == fs.FileType.File:
            found.append(info.path)
    return sorted(found)


def _read_json(filesystem: Any, path: str) -> dict[str, Any]:
    with filesystem.open_input_stream(path, compression=None) as file:
        try:
            content = json.loads(file.read(1 << 20))
        except ValueError:
            content = None
    if not isinstance(content, dict):
        raise ConfigError(
            f"data.path: {path} is damaged. Save the data set again with save_to_disk."
        )
    return content


def _saved(filesystem: Any, folder: str, config: DataConfig) -> list[str]:
    """Return the files of a data set that `datasets` saved with `save_to_disk`."""
    from pyarrow import fs

    state = f"{folder}/state.json"
    if filesystem.get_file_info(state).type != fs.FileType.File:
        raise ConfigError(
            f"data.path={config.path} lacks {state}. Save the data set again with save_to_disk, or as "
            ".parquet with to_parquet."
        )
    listed = _read_json(filesystem, state).get("_data_files")
    entries = listed if isinstance(listed, list) else []
    names = [e.get("filename") for e in entries if isinstance(e, dict)]
    files = [f"{folder}/{PurePosixPath(name).name}" for name in names if isinstance(name, str)]
    for info in filesystem.get_file_info(files):
        if info.type != fs.FileType.File:
            raise ConfigError(
                f"data.path={config.path} lacks {info.path}, which its state.json names. Copy the data "
                "again."
            )
    return files


def split_of(path: str) -> str | None:
    """Return the split that the name of a file, or of a folder above it, says; None if none does."""
    for part in reversed(PurePosixPath(path).parts):
        words = re.split(r"[^a-z]+", part.lower())
        for names in SPLITS:
            if any(word in names for word in words):
                return names[0]
    return None


def _of_split(files: list[str], root: str, config: DataConfig) -> tuple[list[str], str]:
    groups = defaultdict[str | None, list[str]](list)
    for file in files:
        groups[split_of(str(PurePosixPath(file).relative_to(root)))].append(file)
    named = [name for name in groups if name is not None]
    if len(named) < 2:
        return files, ""
    wanted = split_of(config.split)
    if wanted not in groups:
        raise ConfigError(
            f"data.path={config.path} has files of the splits {', '.join(named)}, and data.split is "
            f"{config.split!r}. Set data.split to one of them, or data.path to one file."
        )
    assert wanted is not None
    others = [name or "files of no split" for name in groups if name != wanted]
    others.sort()
    return groups[wanted], _split_note(wanted, others)


def _split_note(split: str, others: Sequence[str]) -> str:
    if not others:
        return ""
    return f"data.split={split} of data.path is read; not read: {', '.join(others)}"


def _source_of_files(
    files: list[str], path: str, note: str = "", names: list[str] | None = None
) -> Source:
    kinds = {kind_of(f) or "" for f in names or files}
    if not files or "" in kinds:
        raise ConfigError(
            f"data.path is {path!r}; expected .jsonl, .csv or .parquet files there (also .json, .tsv, "
            ".arrow, and text compressed as .gz, .bz2, .xz or .zst). Unpack or convert the data, such as "
            "with pandas and to_parquet."
        )
    if len(kinds) > 1:
        raise ConfigError(
            f"data.path is {path!r}, which holds {' and '.join(sorted(kinds))} files. "
            "Name one file, or keep one kind of file in the folder."
        )
    return Source(kinds.pop(), tuple(files), note)


def check_rows(source: Source, config: DataConfig) -> None:
    """Read rows until one is usable, which is normally one of the first few.

    Raises:
        ConfigError: a column is missing, or no row is left after filtering.
    """
    seen, reasons, columns = 0, dict[str, int](), dict[str, None]()
    for row in peek(source, config):
        if config.limit is not None and seen >= config.limit:
            break
        seen += 1
        columns |= dict.fromkeys(name for name in row if name != PROBLEM)
        reason = reason_to_leave_out(row, config)
        if reason is None:
            _check_summary_column(row, config)
            _check_files(source, config)
            return
        reasons[reason] = reasons.get(reason, 0) + 1
    if not seen:
        raise ConfigError(f"data.path={config.path} holds no rows.")
    if not columns and not any(" quote " in reason for reason in reasons):
        raise ConfigError(
            f"None of the {seen:,} rows of data.path={config.path} can be read as {source.kind}; "
            f"expected {EXPECTED.get(source.kind, 'columns')}."
        )
    if columns and config.dialogue_column not in columns:
        raise ConfigError(
            f"data.path={config.path} has no column {config.dialogue_column!r}; its columns are "
            f"{_names(columns)}. Set data.dialogue_column to the one with the dialogues."
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
            f"{_names(row)}. Set data.summary_column to the one with the reference summaries, "
            "or to null."
        )


def _names(columns: Iterable[str]) -> str:
    """List column names; without a header the first row's texts are taken for names, so each is cut."""
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in columns)


def _check_files(source: Source, config: DataConfig) -> None:
    """Open each file and read its first row, so that a damaged one is found before a run starts."""
    for path in source.paths[:MOST_FILES_TO_OPEN]:
        next(read_file(path, source.kind, config), None)


def peek(source: Source, config: DataConfig) -> Iterator[Mapping[str, Any]]:
    """Read rows lazily, one after another, in this process."""
    if source.kind == "hub":
        yield from load_hub(config)
    elif source.kind == "lab":
        first = corpus.rows("ppo", 20)  # almost always enough, and all take half a second
        yield from first
        yield from corpus.rows("ppo", LAB_ROWS)[len(first) :]
    for path in source.paths:
        yield from read_file(path, source.kind, config)


def load_hub(config: DataConfig) -> Any:
    """Load the hub dataset that `data.path` names.

    Raises:
        ConfigError: the dataset does not exist, or the hub cannot be reached.
    """
    # Imported here: only hub datasets need these libraries, and they load slowly.
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    hub_logging.set_verbosity_error()  # otherwise each failed request prints a warning
    try:
        return datasets.load_dataset(config.path, revision=config.revision, split=config.split)
    except Exception as error:  # loaders of many formats, each with errors of its own
        raise ConfigError(_hub_failure(error, config)) from error


def _hub_failure(error: Exception, config: DataConfig) -> str:
    """Describe why a hub dataset cannot be loaded, with the way to load it."""
    said, name = f"{type(error).__name__}: {first_line(error)}", config.path
    text = str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        found = re.search(r"\[.*?\]", text)
        known = f" {found.group()}" if found else ""
        return (
            f"data.path is the hub dataset {name!r}, which has several configurations{known}. Download "
            f"one (hf download {name} --repo-type dataset --revision refs/convert/parquet --include "
            "'CONFIGURATION/*' --local-dir FOLDER) and set data.path=FOLDER."
        )
    if "script" in text or type(error).__name__.startswith("DatasetGeneration"):
        return (
            f"data.path is the hub dataset {name!r}, and its files cannot be read ({said}). Set "
            "data.revision=refs/convert/parquet, where the hub keeps its own conversion of a data set; if "
            "it has none, convert the files to .parquet and set data.path to them."
        )
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return (
            f"data.path is the hub dataset {name!r} with data.split={config.split!r}: "
            f"{first_line(error)}."
        )
    return (
        f"data.path is the hub id {name!r}, and it cannot be loaded from here "
        f"({type(error).__name__}). Download it elsewhere and set data.path=/path/to/file.parquet "
        "(or .jsonl, .csv, s3://...)."
    )
