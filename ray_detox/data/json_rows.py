"""Rows of JSON text: an object in each line, or a whole file in one of the shapes that programs write."""

import io
import json
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from ray_detox.config import ConfigError, DataConfig
from ray_detox.data.prompts import PROBLEM, unreadable_row

MAX_DOCUMENT_CHARACTERS = 256 << 20
"""Maximum length of a JSON text that is not one row per line, because it is parsed as a whole."""
MAX_DIGITS = 4300
"""Longest whole number that Python converts; longer ones stay text."""
NOT_AN_OBJECT = "not a JSON object"


def json_rows(lines: io.TextIOWrapper, config: DataConfig, path: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSON text, one after another.

    Args:
        lines: the text; only a line feed ends a line.
        config: names the columns and the split.
        path: of the file, for messages.

    Raises:
        ConfigError: the text is neither lines of JSON nor one JSON value.
    """
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(filled, None)
    if first is None:
        return
    try:
        only = loads(first[1])
    except (ValueError, RecursionError):
        if first[1].lstrip()[0] in "[{":
            yield from _whole_text(
                "\n" * (first[0] - 1) + first[1] + _rest(lines, path), config, path
            )
            return
        only = None
    second = next(filled, None)
    if second is None and isinstance(only, dict | list):
        yield from _rows_of([only], config, path)
        return
    yield parse_json_row(first[1], first[0])
    if second is not None:
        yield parse_json_row(second[1], second[0])
    for number, line in filled:
        yield parse_json_row(line, number)


def parse_json_row(line: str, number: int) -> dict[str, Any]:
    """Parse one line of a .jsonl file; return an unreadable row if it is not a JSON object."""
    try:
        row = loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        return row
    return unreadable_row(NOT_AN_OBJECT, f"line {number}: {reprlib.repr(line.strip())}")


def loads(text: str) -> Any:
    """Parse JSON; whole numbers of more than `MAX_DIGITS` digits stay text.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=_number)


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_DIGITS else digits


# ---- whole files -------------------------------------------------------------------------------


def _rest(lines: io.TextIOWrapper, path: str) -> str:
    text = lines.read(MAX_DOCUMENT_CHARACTERS + 1)
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        raise ConfigError(
            f"data.path: {path} is longer than {MAX_DOCUMENT_CHARACTERS:,} characters and not one JSON "
            "object in each line. Convert it with: jq -c '.[]' FILE > FILE.jsonl"
        )
    return text


def _whole_text(text: str, config: DataConfig, path: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a text whose first line is not a JSON value."""
    fault: json.JSONDecodeError | None = None
    try:
        return _rows_of(_documents(text), config, path)
    except json.JSONDecodeError as error:
        fault = error
    except RecursionError:
        pass
    if text.lstrip()[0] == "{":
        rows = [
            parse_json_row(line, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        if any(PROBLEM not in row for row in rows):
            return rows
    if fault is None:
        raise ConfigError(
            f"data.path: {path} is JSON that is nested too deeply. Convert it to one flat JSON object in "
            "each line."
        )
    raise ConfigError(
        f"data.path: {path} is not valid JSON: line {fault.lineno}, column {fault.colno}: "
        f"{_cause(text, fault)}. Correct it there, or write the file again, such as with json.dump or "
        "jq."
    )


def _cause(text: str, error: json.JSONDecodeError) -> str:
    """Describe a fault of a JSON text, without a full stop."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not after or error.msg.startswith("Unterminated"):
        return "the file ends within a value, so a part of it is missing"
    if after.startswith(("//", "/*", "#")):
        return "a comment, which JSON does not have"
    if before.endswith(",") and after[0] in "]}":
        return f"a comma before {after[0]}"
    if after[0] == ",":
        return "a comma between lines; write one list in [ ], or one object in each line without commas"
    if after[0] == "'":
        return "a text in single quotes, as Python prints it; JSON needs double quotes"
    return f"{error.msg} at {reprlib.repr(after)}"


def _documents(text: str) -> list[Any]:
    """Return the JSON values that follow one another in a text.

    Raises:
        json.JSONDecodeError: anything else is in it.
    """
    found, position, decoder = [], 0, json.JSONDecoder()
    length = len(text.rstrip())
    while position < length:
        while text[position].isspace():
            position += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except ValueError:
            decoder = json.JSONDecoder(parse_int=_number)
            continue
        found.append(value)
    return found


def _rows_of(found: list[Any], config: DataConfig, path: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a whole file of JSON: a list of rows, lists by split, columns, or one row."""
    value = found[0] if len(found) == 1 else found
    if isinstance(value, list):
        if value and all(isinstance(row, dict) and "row_idx" in row for row in value):
            value = [row.get("row") for row in value]  # as the hub's server of rows answers
        return [
            row if isinstance(row, dict) else unreadable_row(NOT_AN_OBJECT, f"entry {number}")
            for number, row in enumerate(value, 1)
        ]
    if not isinstance(value, dict):
        return [unreadable_row(NOT_AN_OBJECT, reprlib.repr(value))]
    columns = _columns(value)
    if config.dialogue_column in value:
        return [value] if columns is None else columns
    split = _split_columns(value)
    if split is not None:
        return split
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


def _split_columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of names and lists of values, as pandas writes with orient="split"."""
    names, rows = value.get("columns"), value.get("data")
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return None
    if not (isinstance(rows, list) and rows):
        return None
    if not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    return [dict(zip(names, row, strict=True)) for row in rows]
