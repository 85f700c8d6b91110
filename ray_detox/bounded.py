"""Read files that a crash, an editor or another person may have written: bounded JSON and YAML.

Whatever the bytes are, a reader gets either the values or a `DamagedError` that says what is wrong
and in which line. The caller adds the name of the file and how to go on. Size, depth and the length of
numbers are bounded, so no file takes more time or memory than a large real one.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ray_detox.errors import ConfigError, first_line

MAX_FILE_BYTES = 1 << 30
"""Maximum size of a file of lines, such as the samples of a run."""
MAX_JSON_BYTES = 64 << 20
"""Maximum size of a JSON text: a tokenizer of 250,000 words has 35 MB."""
MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 50_000
"""Maximum number of values in a YAML text after its aliases are expanded."""
MAX_DEPTH = 64
"""Maximum depth of lists and objects in each other."""
MAX_NUMBER_CHARACTERS = 400
"""Maximum length of a number in YAML: Python neither prints longer integers nor reads them fast."""

_CHUNK_BYTES = 16 << 20

_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


class DamagedError(ValueError):
    """Some bytes are not what was expected; the message says why, without a full stop."""


def read_file(file: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file.

    Raises:
        DamagedError: it is missing, cannot be read, is too large, or is no file, such as a folder.
    """
    content = read_if_there(file, max_bytes)
    if content is None:
        raise DamagedError("it is missing")
    return content


def read_if_there(file: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
    """Return the content of a file; None if there is none.

    Raises:
        DamagedError: see `read_file`.
        ConfigError: this user may not read it.
    """
    try:
        return read_regular(file, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}. It may belong to another user: ask for the right to "
            "read it and its folder."
        ) from None
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from None


def read_regular(file: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file; as `read_file`, but errors of the system stay what they are.

    Raises:
        OSError: it cannot be opened or read.
        DamagedError: it is too large, or is no file.
    """
    with open_regular(file) as source:
        return read_stream(source, max_bytes)


def open_regular(file: Path) -> BinaryIO:
    """Open a file to read it.

    Raises:
        OSError: it cannot be opened.
        DamagedError: it is a device or a pipe, whose content may never end or never come.
    """
    # Non-blocking: opening a named pipe would otherwise wait for a writer.
    number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    raise DamagedError("it is a device or a pipe and not a file")


def read_stream(source: Any, max_bytes: int) -> bytes:
    """Return the rest of an open binary file.

    Raises:
        DamagedError: it has more than `max_bytes`.
    """
    content = read_start(source, max_bytes + 1)
    if len(content) > max_bytes:
        raise DamagedError(f"it has more than {max_bytes:,} bytes")
    return content


def read_start(source: Any, max_bytes: int) -> bytes:
    """Return the next `max_bytes` of an open binary file, or its rest."""
    parts, left = [], max_bytes
    while left and (part := source.read(min(_CHUNK_BYTES, left))):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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


def parse(
    content: bytes,
    line: int | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """Parse JSON; see `parse_object`.

    Args:
        content: UTF-8.
        line: as there.
        parse_constant: called for NaN, Infinity and -Infinity instead of `float`.

    Raises:
        DamagedError: it is not JSON.
    """
    if len(content) > MAX_JSON_BYTES:
        raise DamagedError(f"{_name(line)} has more than {MAX_JSON_BYTES:,} bytes")
    if not content.strip(b"\0 \t\r\n"):
        nothing_but = " but for NUL bytes" if b"\0" in content else ""
        raise DamagedError(f"{_name(line)} is empty{nothing_but}")
    try:
        found = json.loads(content.decode(), parse_constant=parse_constant)
    except UnicodeDecodeError as error:
        where = line or 1 + content.count(b"\n", 0, error.start)
        raise DamagedError(f"line {where} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DamagedError(f"line {line or error.lineno} is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DamagedError(f"{_name(line)} is JSON that is nested too deeply") from None
    except ValueError as error:  # such as a number of thousands of digits
        raise DamagedError(f"{_name(line)} cannot be used: {first_line(error)}") from None
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH and _depth_exceeds(found, MAX_DEPTH):
        raise DamagedError(f"{_name(line)} is JSON that is nested too deeply")
    return found


def parse_stored(text: Any) -> Any:
    """Parse JSON as a store keeps it: numbers that are not finite become None.

    Raises:
        DamagedError: it is not a text with JSON.
    """
    if not isinstance(text, str):
        raise DamagedError("it is not a text")
    return parse(text.encode(errors="surrogatepass"), parse_constant=lambda name: None)


def numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1; a last one without its end as well."""
    # Not str.splitlines, which also ends a line at characters that JSON texts may contain.
    lines = content.split(b"\n")
    yield from enumerate(lines if lines[-1] else lines[:-1], start=1)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Raises:
        DamagedError: it is not valid, nested too deeply, or too large with its aliases expanded.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise DamagedError(f"it has more than {MAX_YAML_BYTES:,} characters")

    class Loader(yaml.SafeLoader):
        depth = 0

        def fetch_flow_collection_start(self, token: Any) -> None:
            # Here as well, because the scanner takes time quadratic in the brackets that are open.
            if self.flow_level > MAX_DEPTH:
                raise DamagedError("it is nested too deeply")
            super().fetch_flow_collection_start(token)

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise DamagedError("it is nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            if (
                isinstance(node, yaml.ScalarNode)
                and node.tag != "tag:yaml.org,2002:str"
                and len(node.value) > MAX_NUMBER_CHARACTERS
            ):
                raise DamagedError(
                    f"line {node.start_mark.line + 1} has a number of {len(node.value):,} characters"
                )
            return node

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_nodes(node, {}) > MAX_YAML_NODES:
            raise DamagedError(
                f"it has more than {MAX_YAML_NODES:,} values once its aliases are expanded"
            )
        found = loader.construct_document(node)
    except DamagedError:
        raise
    except RecursionError:
        raise DamagedError("it is nested too deeply") from None
    # yaml raises all of these, such as ValueError for a date 2020-13-45 and KeyError for `!!bool x`.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DamagedError(" ".join(str(error).split()).rstrip(".")) from None
    if _depth_exceeds(found, MAX_DEPTH):  # with its aliases expanded
        raise DamagedError("it is nested too deeply")
    return found


def _expanded_nodes(node: Any, known: dict[int, int | None]) -> int:
    """Return the number of YAML nodes under a node; one with several aliases counts each time.

    Args:
        node: of `yaml`, no deeper than `MAX_DEPTH` but for aliases.
        known: result by `id` of each node so far; None while it is being counted.
    """
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise DamagedError("it has an alias that contains itself")
        return count
    known[id(node)] = None
    children = node.value if isinstance(node.value, list) else []
    if children and isinstance(children[0], tuple):  # a mapping has pairs
        children = [part for pair in children for part in pair]
    count = known[id(node)] = 1 + sum(_expanded_nodes(child, known) for child in children)
    return count


def _depth_exceeds(value: Any, depth: int) -> bool:
    """Return whether lists and objects are nested more than `depth` deep."""
    level = [value]
    for _ in range(depth + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for each in inner for one in each]
    return True


def _name(line: int | None) -> str:
    return "it" if line is None else f"line {line}"


def _kind_of(value: Any) -> str:
    """Name the kind of a JSON value, such as `a list`."""
    return _KINDS.get(type(value), "a number")
