"""The files, or the hub dataset, that `data.path` names, and a check that a row is usable.

No Ray here: a missing file, a missing column or a filter that leaves nothing is found in this
process before any node starts. `stages/ingest.py` reads the same `Source` at full scale.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.prompts import PROBLEM, name_of, reason_to_leave_out
from ray_detox.data.reading import kind_of, read_file
from ray_detox.errors import first_line
from ray_detox.lab import corpus
from ray_detox.models.s3 import advice, open_s3, same_options
from ray_detox.models.sources import address_hint, looks_like_path

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
HIDDEN = (".", "_", "~")
"""First characters of names that are marks, drafts and copies of Spark, Hadoop, macOS and Excel."""
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
    hint = address_hint(path)
    if hint is not None:
        raise ConfigError(f"data.path is {path!r}, which is no address of data. {hint}.")
    local = Path(path).expanduser().absolute()
    try:
        if local.is_dir():
            from pyarrow import fs  # here: it loads slowly

            files, note = _choose(fs.LocalFileSystem(), str(local), config)
            return _source_of_files(files, path, note)
        if local.is_file():
            _check_name(str(local))
            return _source_of_files([str(local)], path)
        if local.exists():
            raise _not_a_file(str(local))
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
    files = _list(filesystem, root)
    names_in = {file: PurePosixPath(file).relative_to(root) for file in files}
    above = [file for file, path in names_in.items() if len(path.parts) == 1]
    files, note = _of_split(above or files, root, config)
    below = sorted({path.parts[0] for path in names_in.values() if above and len(path.parts) > 1})
    notes = [f"files in folders of data.path are not read: {', '.join(below)}"] if below else []
    return files, "; ".join([note, *notes] if note else notes)


def _list(filesystem: Any, root: str) -> list[str]:
    """Return the data files in a folder and in those below it, sorted."""
    from pyarrow import fs

    if isinstance(filesystem, fs.LocalFileSystem):
        paths = _walk(root)
    else:
        infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        paths = (info.path for info in infos if info.type == fs.FileType.File)
    found = []
    for path in paths:
        inner = PurePosixPath(path).relative_to(root)
        hidden = any(part.startswith(HIDDEN) for part in inner.parts)
        if not hidden and inner.name not in METADATA and kind_of(inner.name) is not None:
            found.append(path)
    return sorted(found)


def _walk(root: str) -> Iterator[str]:
    """Yield the files below a local folder; a folder that links lead to several times, only once."""

    def fail(error: OSError) -> None:
        raise error

    seen = set[str]()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(folder, name)
            if kind_of(name) is not None and not name.startswith(HIDDEN):
                _check_name(path)
                if not os.path.exists(path):
                    raise ConfigError(
                        f"data.path: {path} is a link to a file that does not exist. Copy the file to its "
                        "place, or remove the link."
                    )
                if not os.path.isfile(path):
                    raise _not_a_file(path)
                yield path


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"data.path: the name {path!a} is not UTF-8. Rename the file or folder."
        ) from None


def _not_a_file(path: str) -> ConfigError:
    return ConfigError(
        f"data.path: {path} is a pipe or a device and not a file, and a run reads its data more than once. "
        "Write the data to a file first."
    )


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
            ".arrow, and text compressed as .gz, .bz2, .xz or .zst). Rename files that are of these kinds "
            "and have no such suffix, unpack archives, and convert others, such as with pandas and "
            "to_parquet."
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
    if config.configuration is not None and source.kind != "hub":
        raise ConfigError(
            f"data.configuration is {config.configuration!r}, and data.path={config.path} is no hub dataset, "
            "so it has no configurations. Leave data.configuration out, or set data.path to a hub id."
        )
    seen, reasons, columns = 0, dict[str, list[str]](), dict[str, Any]()
    for row in peek(source, config):
        if config.limit is not None and seen >= config.limit:
            break
        seen += 1
        if PROBLEM not in row:
            columns |= row
        reason = reason_to_leave_out(row, config)
        if reason is None:
            _check_summary_column(row, config)
            _check_files(source, config)
            return
        reasons.setdefault(reason, []).append(name_of(row, config) if len(reasons) < 9 else "")
    if not seen:
        raise ConfigError(f"data.path={config.path} holds no rows.")
    if columns and config.dialogue_column not in columns:
        raise ConfigError(_no_column(source, columns, config))
    why = ", ".join(f"{len(names):,} {reason}" for reason, names in reasons.items())
    if not columns:
        first = next(iter(reasons.values()))[0]
        raise ConfigError(
            f"None of the {seen:,} rows of data.path={config.path} can be read as {source.kind} ({why}, "
            f"first {first}); expected {EXPECTED.get(source.kind, 'columns')}."
        )
    raise ConfigError(
        f"None of the {seen:,} rows of data.path={config.path} is left after filtering: {why}. "
        f"{_advice(reasons, config)}"
    )


def _no_column(source: Source, columns: Mapping[str, Any], config: DataConfig) -> str:
    """Describe that no row has the dialogue column, with what may be meant."""
    wanted = config.dialogue_column
    said = (
        f"data.path={config.path} has no column {wanted!r}; its columns are {_names(columns)}. Set "
        "data.dialogue_column to the one with the dialogues"
    )
    outer = next((n for n, v in columns.items() if isinstance(v, Mapping) and wanted in v), None)
    if outer is not None:
        return (
            f"{said}, or move the names inside {outer!r}, which has it, to the top, such as with "
            "pandas.json_normalize."
        )
    if source.kind == "csv":
        return (
            f"{said}; the first line has to name them, separated by a comma, tab, semicolon or |."
        )
    return f"{said}."


def _advice(reasons: Iterable[str], config: DataConfig) -> str:
    """Say what helps if every row is left out for these reasons."""
    if all(reason.endswith(" is not text") for reason in reasons):
        return (
            f"Write the dialogue of a row as one text into the column {config.dialogue_column!r}, such as "
            "its messages joined by line breaks, or set data.dialogue_column to another column."
        )
    if all("valid Unicode" in reason for reason in reasons):
        return "Write the file again in UTF-8."
    return "Widen data.min_chars and data.max_chars, or check data.dialogue_column."


def _check_summary_column(row: Mapping[str, Any], config: DataConfig) -> None:
    if config.summary_column is not None and config.summary_column not in row:
        raise ConfigError(
            f"data.path={config.path} has no column {config.summary_column!r}; its columns are "
            f"{_names(row)}. Set data.summary_column to the one with the reference summaries, "
            "or to null."
        )


def _names(columns: Iterable[str]) -> str:
    """List column names; without a header the first row's texts are taken for names, so each is cut."""
    names = (" ".join(name.split("\n")) for name in columns)  # a field may have several lines
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names)


def _check_files(source: Source, config: DataConfig) -> None:
    """Open each file and read its first row, so that a damaged one is found before a run starts.

    Raises:
        ConfigError: one is damaged, or is a table without the column of the dialogues.
    """
    for path in source.paths[:MOST_FILES_TO_OPEN]:
        row = next(read_file(path, source.kind, config), None)
        if row is None or PROBLEM in row or source.kind == "jsonl":
            continue
        if config.dialogue_column not in row:
            raise ConfigError(
                f"data.path: {path} has no column {config.dialogue_column!r}, which other files of the "
                f"folder have; its columns are {_names(row)}. Rename its column, or take the file out of "
                "the folder."
            )


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
        return datasets.load_dataset(
            config.path, name=config.configuration, revision=config.revision, split=config.split
        )
    except Exception as error:  # loaders of many formats, each with errors of its own
        raise ConfigError(_hub_failure(error, config)) from error


def _hub_failure(error: Exception, config: DataConfig) -> str:
    """Describe why a hub dataset cannot be loaded, with the way to load it."""
    said, name = f"{type(error).__name__}: {first_line(error)}", config.path
    text = str(error)
    if "Config name is missing" in text or "BuilderConfig" in text:
        found = re.search(r"\[(.*?)\]", text, re.DOTALL)
        known = re.findall(r"'([^']*)'", found[1]) if found else []
        wrong = f"no configuration {config.configuration!r}"
        return (
            f"data.path is the hub dataset {name!r}, which has "
            f"{'several configurations' if config.configuration is None else wrong}. Choose one with "
            f"data.configuration={known[0] if known else 'NAME'}; there are {_names(known) or 'others'}."
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
