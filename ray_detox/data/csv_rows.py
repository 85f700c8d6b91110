r"""Rows of CSV text, with quotes inside fields doubled (RFC 4180) or after a backslash (Spark, MySQL).

A quote after a backslash looks like the end of its field. The first one that cannot be an end, because
other text follows it, shows that a file has quotes of the second kind: the row is read again, and
from there on `\"` and `\\` are replaced. Rows before it are the same in both ways.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ray_detox.config import DataConfig
from ray_detox.data.columns import check_names
from ray_detox.data.prompts import unreadable_row

MAX_FIELD_CHARACTERS = 1 << 30
DELIMITERS = ",\t;|"
_END = "\0end of the file\0"
"""A last line after those of a file; it is part of a field if a quote is open."""
_SEVERAL_LINES = "over several lines (is a quote missing or not doubled?)"
_ESCAPED_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*\\"')
_UNESCAPED_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')
_ESCAPE = re.compile(r'\\([\\"])')


def csv_rows(lines: Iterable[str], config: DataConfig, path: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a CSV text, one after another.

    Args:
        lines: the text, with the ends of its lines.
        config: names the columns.
        path: of the file, for messages; a `.tsv` has tabs.

    Raises:
        ConfigError: two columns have the same name.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)  # the default is 131,072 characters
    lines = iter(lines)
    first, before = next(lines, ""), 0
    delimiter = "\t" if ".tsv" in path.lower() else ","
    named = first.strip().lower()
    if named.startswith("sep=") and len(named) == 5:  # written by Excel
        delimiter, first, before = named[4], next(lines, ""), 1
    else:
        delimiter = _delimiter(first, delimiter, config)
    names: list[str] | None = None
    for fields, begin, end, is_whole in _Records(
        itertools.chain([first], lines), delimiter, before
    ):
        if not fields or fields == [_END]:
            continue
        if fields[-1].endswith(_END):
            yield _never_closed(fields[-1], end - 1)
        elif names is None:
            names = [name.strip() for name in fields]
            check_names(names, path)
        elif not is_whole:
            yield unreadable_row(
                f"text after a closing quote, {_SEVERAL_LINES}", f"lines {begin} to {end}"
            )
        elif len(fields) == len(names):
            yield dict(zip(names, fields, strict=True))
        else:
            reason = f"{'more' if len(fields) > len(names) else 'fewer'} fields than the first line"
            if end > begin:
                yield unreadable_row(f"{reason}, {_SEVERAL_LINES}", f"lines {begin} to {end}")
            else:
                yield unreadable_row(reason, f"line {begin}")


class _Records:
    """Fields of each record, its first and last line, and whether its quotes fit, if it has several lines.

    Two quotes that are never closed join all rows between them, which no other sign may show.
    """

    def __init__(self, lines: Iterable[str], delimiter: str, before: int) -> None:
        self._lines = itertools.chain(lines, [_END])
        self._delimiter = delimiter
        self._end = before
        self._held: list[str] = []
        """Lines of the record that is being read."""
        self._quotes = 0
        """Quotes in them that no backslash escapes."""
        self._has_backslashes = False

    def __iter__(self) -> Iterator[tuple[list[str], int, int, bool]]:
        reader = csv.reader(self._feed(), delimiter=self._delimiter)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except _BackslashError:
                self._has_backslashes = True
                self._lines = itertools.chain(self._held, self._lines)
                self._held, self._quotes = [], 0
                reader = csv.reader(self._feed(), delimiter=self._delimiter)
                continue
            is_whole = len(self._held) < 2 or self._is_strict()
            begin, self._end = self._end + 1, self._end + len(self._held)
            self._held, self._quotes = [], 0
            yield fields, begin, self._end, is_whole

    def _is_strict(self) -> bool:
        """Return whether a delimiter or an end follows each closing quote of the record."""
        try:
            next(csv.reader(self._held, delimiter=self._delimiter, strict=True))
        except csv.Error:
            return False
        return True

    def _feed(self) -> Iterator[str]:
        for line in self._lines:
            if self._has_backslashes:
                line = _ESCAPE.sub(lambda found: '""' if found[1] == '"' else "\\", line)
                self._held.append(line)
                yield line
                continue
            self._held.append(line)
            if '\\"' in line:
                if self._is_escaped(line):
                    raise _BackslashError
                self._quotes += len(_UNESCAPED_QUOTE.findall(line))
            else:
                self._quotes += line.count('"')
            yield line

    def _is_escaped(self, line: str) -> bool:
        """Return whether a backslash in a quoted field escapes a quote of this line."""
        for found in _ESCAPED_QUOTE.finditer(line):
            follows = line[found.end() : found.end() + 1]
            if follows and follows not in f'"{self._delimiter}\r\n':
                before = len(_UNESCAPED_QUOTE.findall(line[: found.start()]))
                if (self._quotes + before) % 2:
                    return True
        return False


class _BackslashError(Exception):
    """The record that is being read has quotes after backslashes."""


def _never_closed(field: str, last_line: int) -> dict[str, Any]:
    text = field.removesuffix(_END)
    breaks = max(text.count("\n"), text.count("\r"))
    lines = breaks + (not text.endswith(("\n", "\r")))
    first = last_line - lines + 1
    return unreadable_row(
        f"from the quote in line {first} that is never closed, with all {lines:,} lines to the end",
        f"line {first}",
    )


def _delimiter(first: str, usual: str, config: DataConfig) -> str:
    """Return the character that separates the names in the first line."""
    for one in (usual, *DELIMITERS):
        names = next(csv.reader([first], delimiter=one), [])
        if len(names) > 1 and config.dialogue_column in (name.strip() for name in names):
            return one
    return usual
