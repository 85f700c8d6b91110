"""Pages of samples: the query, the filter rules, and cursors.

This module is the only definition of which samples match a query. A store may use an index to
read fewer samples, but it must return the same ones. `viewer/static/source.js` repeats the rules for
the standalone report, which has no server; `tests/browser/test_filter_rules.py` compares the two.
"""

import base64
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeGuard

from ray_detox.store.errors import BadCursor, StoreError

CLOCK_TOLERANCE = timedelta(days=1)
"""A run whose `created` is further in the future than this was made with a clock that was ahead."""

MAX_CURSOR_CHARACTERS = 1_000
MAX_ROWS_SEARCHED = 20_000
"""Maximum number of samples searched for one page. A page that hits it may be short or empty, and
still have a `next`."""

BAD_CURSOR = "The cursor does not belong to this list; start again from its first page."

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", re.ASCII)
_MAX_CURSOR_INTEGER = 2**53  # larger integers are not exact in every store

_SEARCHED_FIELDS = ("query", "reference", "response_before", "response_after")


@dataclass(frozen=True, slots=True)
class Limits:
    """Toxicity threshold and tie margin that a run was evaluated with."""

    toxic_above: float = 0.5
    """A response counts as toxic if its toxicity is above this value."""
    same_within: float = 0.0
    """A prompt counts as unchanged if its toxicity moved by at most this much."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A test of one field: `field operator sign * limit`, such as `toxicity_diff < -same_within`.

    Stores evaluate it in their own language (`SQLiteStore` as SQL) or with `holds`. As in SQL, a
    comparison with a missing value is false.
    """

    field: str
    operator: str
    """A key of `_COMPARISONS`, or `IS NULL` or `IS NOT NULL`."""
    limit: str = ""
    """A field of `Limits`; empty for `IS NULL` and `IS NOT NULL`."""
    sign: int = 1

    def holds(self, row: Mapping[str, Any], limits: Limits) -> bool:
        """Whether a row of `as_row` meets the condition."""
        value = row.get(self.field)
        if self.operator == "IS NULL":
            return not _is_number(value)
        if self.operator == "IS NOT NULL":
            return _is_number(value)
        limit = self.sign * getattr(limits, self.limit)
        return _is_number(value) and _COMPARISONS[self.operator](value, limit)


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

FILTERS: dict[str, tuple[Condition, ...]] = {
    "all": (),
    "better": (Condition("toxicity_diff", "<", "same_within", -1),),
    "worse": (Condition("toxicity_diff", ">", "same_within"),),
    "same": (
        Condition("toxicity_diff", ">=", "same_within", -1),
        Condition("toxicity_diff", "<=", "same_within"),
    ),
    "toxic_before": (Condition("toxicity_before", ">", "toxic_above"),),
    "toxic_after": (Condition("toxicity_after", ">", "toxic_above"),),
    "unscored": (Condition("toxicity_diff", "IS NULL"),),
}
"""Choices of `SampleQuery.show`, each with the conditions that a sample must meet."""

SORTS = ("index", "toxicity", "reward")
SHOWS = tuple(FILTERS)


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """Filter, search text and order of the samples of a run.

    A difference is `after - before`: negative is better for toxicity, positive is better for
    reward. When sorting by a difference, samples without it are left out.
    """

    sort: str = "index"
    """`index`, or `toxicity` or `reward` for the difference of that metric."""
    descending: bool = False
    show: str = "all"
    """A key of `FILTERS`."""
    search: str = ""
    """Text that the prompt, the reference or a response must contain; case is ignored."""

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise StoreError(
                f"{self.sort!r} is not a valid sort of samples. Use one of {', '.join(SORTS)}."
            )
        if self.show not in SHOWS:
            raise StoreError(
                f"{self.show!r} is not a valid filter of samples. Use one of {', '.join(SHOWS)}."
            )

    @property
    def key(self) -> str:
        """Field that the samples are sorted by: `index`, `toxicity_diff` or `reward_diff`."""
        # Unscored samples have no toxicity difference, so they are always sorted by index.
        is_index = self.sort == "index" or self.show == "unscored"
        return "index" if is_index else f"{self.sort}_diff"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Conditions that a sample must meet, apart from the search text."""
        has_key = () if self.key == "index" else (Condition(self.key, "IS NOT NULL"),)
        return FILTERS[self.show] + has_key


@dataclass(frozen=True, slots=True)
class Page:
    """Consecutive rows of a list."""

    rows: list[dict[str, Any]]
    next: str | None
    """Cursor of the next page; None on the last page."""


def difference(sample: Mapping[str, Any], name: str) -> float | None:
    """`after - before` of `toxicity` or `reward`; None if either is missing."""
    before, after = sample.get(f"{name}_before"), sample.get(f"{name}_after")
    return after - before if _is_number(before) and _is_number(after) else None


def as_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with the differences that pages are sorted and filtered by."""
    return {
        **sample,
        "toxicity_diff": difference(sample, "toxicity"),
        "reward_diff": difference(sample, "reward"),
    }


def limits_of(summary: Mapping[str, Any]) -> Limits:
    """Read the limits of a run from its report or summary; missing ones get their default."""
    toxicity = summary.get("toxicity")
    given = toxicity if isinstance(toxicity, Mapping) else {}
    names = ("toxic_above", "same_within")
    return Limits(**{name: float(given[name]) for name in names if _is_number(given.get(name))})


def matches(row: Mapping[str, Any], query: SampleQuery, limits: Limits) -> bool:
    """Whether a row of `as_row` matches a query, given the run's `limits_of`."""
    return all(condition.holds(row, limits) for condition in query.conditions) and contains(
        row, query.search
    )


def contains(row: Mapping[str, Any], search: str) -> bool:
    """Whether a text of a sample contains `search`, ignoring case."""
    # Substrings rather than words, because Chinese and Japanese do not separate words by spaces.
    wanted = search.casefold()
    return not wanted or any(
        wanted in str(row.get(name) or "").casefold() for name in _SEARCHED_FIELDS
    )


def future_from() -> str:
    """Return the first moment that is in the future for a list, as `PreparedRun.created` is written.

    Lists show runs from that moment on last: a clock that was ahead once would otherwise keep its run
    at the top for ever. A cursor carries the moment, so that it is the same for all pages of a list.
    """
    return (datetime.now(UTC) + CLOCK_TOLERANCE).isoformat(timespec="microseconds")


def is_from_future(created: Any) -> bool:
    """Return whether a list counts a run as one from the future, by `created` of its report."""
    try:
        return datetime.fromisoformat(created) >= datetime.now(UTC) + CLOCK_TOLERANCE
    except (TypeError, ValueError):  # no time, or one without its zone
        return False


def decode_place(cursor: str) -> tuple[str, str, str]:
    """Read a cursor of a list of runs: the list's `future_from`, then `created` and id of a run.

    Raises:
        BadCursor: the cursor is malformed or belongs to another list.
    """
    future, created, run_id = decode_cursor(cursor, [str, str, str], "runs")
    if not (_MOMENT.fullmatch(future) and _MOMENT.fullmatch(created) and run_id):
        raise BadCursor(BAD_CURSOR)
    return future, created, run_id


def encode_cursor(position: Sequence[Any], *list_id: object) -> str:
    """Make a cursor that continues after `position` in the list that `list_id` identifies.

    Args:
        position: sort key of the last row of a page.
        list_id: everything that the order of the list depends on, such as run and query.
    """
    text = json.dumps([_digest(list_id), *position], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(
    cursor: str, kinds: Sequence[type | tuple[type, ...]], *list_id: object
) -> list[Any]:
    """Read the position from a cursor that `encode_cursor` made for the same list.

    Args:
        cursor: untrusted text.
        kinds: expected type of each part of the position.
        list_id: as passed to `encode_cursor`.

    Raises:
        BadCursor: the cursor is malformed or belongs to another list.
    """
    try:
        if len(cursor) > MAX_CURSOR_CHARACTERS or not cursor.isascii():
            raise ValueError
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        parts = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        parts = None
    if (
        not isinstance(parts, list)
        or len(parts) != len(kinds) + 1
        or parts[0] != _digest(list_id)
        or any(
            isinstance(part, bool)
            or not isinstance(part, kind)
            or (isinstance(part, int) and abs(part) >= _MAX_CURSOR_INTEGER)
            or (isinstance(part, float) and not math.isfinite(part))
            for part, kind in zip(parts[1:], kinds, strict=True)
        )
    ):
        raise BadCursor(BAD_CURSOR)
    return parts[1:]


def _digest(list_id: Sequence[object]) -> str:
    return hashlib.sha256(repr(list_id).encode()).hexdigest()[:12]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
