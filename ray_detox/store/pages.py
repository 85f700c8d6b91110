"""Pages of samples: what may be asked for, which samples answer it, and how to go on.

The rules are here, once: a store may use an index to look at fewer samples, never other ones.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ray_detox.store.errors import BadCursor, StoreError

SORTS = ("index", "toxicity", "reward")
SHOWS = ("all", "better", "worse", "same", "toxic_before", "toxic_after", "unscored")

MAX_CURSOR_CHARACTERS = 1_000
MOST_LOOKED_AT = 20_000
"""Samples that one page of a search looks at; a page may therefore be short, and still have a next."""

_LARGEST = 2**53  # of a whole number in a cursor: beyond it stores disagree on what one is

_SEARCHED = ("query", "reference", "response_before", "response_after")


@dataclass(frozen=True, slots=True)
class SampleQuery:
    """Which samples of a run, and in which order.

    A difference is after - before: of toxicity, below zero is better; of reward, above zero is.
    Samples without the difference that is sorted by are left out.
    """

    sort: str = "index"
    """`index`, or `toxicity` or `reward` by difference."""
    descending: bool = False
    show: str = "all"
    """`all`, `better`, `worse` or `same` by toxicity, `toxic_before` or `toxic_after`, or `unscored`."""
    search: str = ""
    """Text that the prompt, the reference or one of the responses must contain, in any case."""

    def __post_init__(self) -> None:
        if self.sort not in SORTS or self.show not in SHOWS:
            raise StoreError(
                f"Samples cannot be sorted by {self.sort!r} and shown as {self.show!r}; expected "
                f"one of {', '.join(SORTS)} and one of {', '.join(SHOWS)}."
            )

    @property
    def key(self) -> str:
        """What the samples are sorted by: `index`, `toxicity_diff` or `reward_diff`."""
        # What has no score has no difference to be sorted by.
        is_index = self.sort == "index" or self.show == "unscored"
        return "index" if is_index else f"{self.sort}_diff"


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a list."""

    rows: list[dict[str, Any]]
    next: str | None
    """Where the list goes on; None at its end."""


def difference(sample: Mapping[str, Any], name: str) -> float | None:
    """`after - before` of `toxicity` or `reward`; None where one of them is missing."""
    before, after = sample.get(f"{name}_before"), sample.get(f"{name}_after")
    return after - before if _is_number(before) and _is_number(after) else None


def as_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as a page has it: with its differences."""
    return {
        **sample,
        "toxicity_diff": difference(sample, "toxicity"),
        "reward_diff": difference(sample, "reward"),
    }


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run calls toxic, and what a change."""

    toxic_above: float = 0.5
    same_within: float = 0.0


def limits_of(summary: Mapping[str, Any]) -> Limits:
    """The limits by which a run counted, from its report or summary."""
    toxicity = summary.get("toxicity")
    given = toxicity if isinstance(toxicity, Mapping) else {}
    names = ("toxic_above", "same_within")
    return Limits(**{name: float(given[name]) for name in names if _is_number(given.get(name))})


def matches(row: Mapping[str, Any], query: SampleQuery, limits: Limits) -> bool:
    """Whether a row of `as_row` answers a query; `limits` are from `limits_of`."""
    if query.key != "index" and row.get(query.key) is None:
        return False
    diff = row.get("toxicity_diff")
    if query.show == "unscored":
        shown = diff is None
    elif query.show in ("toxic_before", "toxic_after"):
        toxicity = row.get(query.show.replace("toxic_", "toxicity_"))
        shown = _is_number(toxicity) and toxicity > limits.toxic_above
    else:
        within = limits.same_within
        shown = query.show == "all" or (
            diff is not None
            and {"better": diff < -within, "worse": diff > within, "same": abs(diff) <= within}[
                query.show
            ]
        )
    return bool(shown) and contains(row, query.search)


def contains(row: Mapping[str, Any], search: str) -> bool:
    """Whether one of the texts of a sample has `search` in it, in any case."""
    # Casefolded substrings, not words: they find two characters of Chinese, too.
    wanted = search.casefold()
    return not wanted or any(wanted in str(row.get(name) or "").casefold() for name in _SEARCHED)


def encode_cursor(place: Sequence[Any], *of: object) -> str:
    """A cursor for what comes after `place` in the list that `of` (run, query) names."""
    text = json.dumps([_mark(of), *place], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(cursor: str, kinds: Sequence[type | tuple[type, ...]], *of: object) -> list[Any]:
    """The place of a cursor, if it is one that `encode_cursor` made for this list.

    Args:
        cursor: from anybody.
        kinds: the type of each part of the place.
        of: as it was encoded with.

    Raises:
        BadCursor: it is not.
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
        or parts[0] != _mark(of)
        or any(
            isinstance(part, bool)
            or not isinstance(part, kind)
            or (isinstance(part, int) and abs(part) >= _LARGEST)
            or (isinstance(part, float) and not math.isfinite(part))
            for part, kind in zip(parts[1:], kinds, strict=True)
        )
    ):
        raise BadCursor("The cursor is none of this list; start again from its first page.")
    return parts[1:]


def _mark(of: Sequence[object]) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
