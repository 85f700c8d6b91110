"""Read JSON that a crash, a full disk, an editor or another program may have damaged.

Whatever the bytes are, a reader gets either the JSON or a `DamagedError` that says what is wrong
and in which line. The caller adds the name of the file and how to go on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_detox.errors import first_line

_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


class DamagedError(ValueError):
    """Some bytes are not the JSON that was expected; the message says why, without a full stop."""


def read_file(file: Path) -> bytes | None:
    """Return the content of a file; None if there is none.

    Raises:
        DamagedError: it cannot be read, such as a folder of this name.
    """
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from None


def parse_object(content: bytes, line: int | None = None) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: UTF-8.
        line: number of the only line in `content`, for messages; None if `content` is a file.

    Raises:
        DamagedError: it is not one.
    """
    found = parse(content, line)
    if not isinstance(found, dict):
        raise DamagedError(f"{_name(line)} is {_kind_of(found)}, expected an object")
    return found


def parse_list(content: bytes) -> list[Any]:
    """Parse a JSON list that is a whole file; see `parse_object`."""
    found = parse(content)
    if not isinstance(found, list):
        raise DamagedError(f"it is {_kind_of(found)}, expected a list")
    return found


def parse(content: bytes, line: int | None = None) -> Any:
    """Parse JSON; see `parse_object`."""
    if not content.strip(b"\0 \t\r\n"):
        nothing_but = " but for NUL bytes" if b"\0" in content else ""
        raise DamagedError(f"{_name(line)} is empty{nothing_but}")
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        where = line or 1 + content.count(b"\n", 0, error.start)
        raise DamagedError(f"line {where} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DamagedError(f"line {line or error.lineno} is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DamagedError(f"{_name(line)} is JSON that is nested too deeply") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise DamagedError(f"{_name(line)} cannot be used: {first_line(error)}") from None


def numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1; a last one without its end as well."""
    # Not str.splitlines, which also ends a line at characters that JSON texts may contain.
    lines = content.split(b"\n")
    yield from enumerate(lines if lines[-1] else lines[:-1], start=1)


def _name(line: int | None) -> str:
    return "it" if line is None else f"line {line}"


def _kind_of(value: Any) -> str:
    """Name the kind of a JSON value, such as `a list`."""
    return _KINDS.get(type(value), "a number")
