"""Prepare a run for a store: check it, and convert it to plain JSON values.

    report, samples, curves --prepare--> PreparedRun --> SQLiteStore    one file
                                                    '--> DynamoDBStore  one table

A store writes a run completely or not at all, so everything is checked before the first write.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from ray_detox.addresses import redact_tree
from ray_detox.store.errors import StoreError
from ray_detox.store.protocol import SUMMARY_KEYS, check_run_id

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RunWriter:
    """The process that wrote a run, as `writer` of its report says."""

    run: str
    """Random id of the run, which another run of the same name does not have."""
    token: int
    """How often the run had been taken by a process; a later process has a larger one."""


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run in plain JSON values, checked."""

    run_id: str
    created: str
    """UTC in one fixed format, so that stores can sort it as text; the report keeps its own format."""
    report: dict[str, Any]
    samples: dict[int, dict[str, Any]]
    """By index, ascending."""
    curves: list[dict[str, Any]]
    writer: RunWriter | None
    """None if the report does not say, as those of earlier versions."""

    def refuse_if_lost(self, stored: Any) -> None:
        """Refuse to replace what a later process of the same run has stored.

        Args:
            stored: `writer` of the stored report; None if it has none.

        Raises:
            StoreError: a process that took the run after this one has stored it.
        """
        other = _as_writer(stored)
        if self.writer is None or other is None or other.run != self.writer.run:
            return
        if other.token > self.writer.token:
            raise StoreError(
                f"Run {self.run_id!r} was stored by a later process of this run (taking "
                f"{other.token}); this one (taking {self.writer.token}) has lost the run and writes "
                "nothing."
            )

    @property
    def digest(self) -> str:
        """SHA-256 of everything: two runs with the same digest are the same run."""
        text = to_text([self.report, list(self.samples.values()), self.curves])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def summary(self) -> dict[str, Any]:
        """The part of the report that a list of runs shows."""
        summary = {key: self.report[key] for key in SUMMARY_KEYS}
        if isinstance(summary["toxicity"], dict):
            # The histogram is half of the summary's size, and no list draws it.
            summary["toxicity"] = {
                key: value for key, value in summary["toxicity"].items() if key != "histogram"
            }
        return summary


def prepare(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]] = (),
) -> PreparedRun:
    """Check and convert a run, so that writing it cannot fail because of a value.

    Numbers of numpy and torch become Python's, tuples become lists, and lone surrogates, which
    UTF-8 cannot encode, become U+FFFD.

    Args:
        report: names with JSON values, at least `SUMMARY_KEYS`.
        samples: names with JSON values, each sample with its own `index`.
        curves: the metrics of each training step.

    Raises:
        StoreError: names the first value that cannot be stored.
    """
    try:
        return _prepare(report, samples, curves)
    except RecursionError:
        raise StoreError(
            "The report, a sample or a training curve is nested too deeply; expected at most a few "
            "levels of lists and names with values."
        ) from None


def _prepare(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> PreparedRun:
    not_finite: list[str] = []
    # A report of an earlier version may hold an address with credentials.
    plain = redact_tree(_plain(report, "", not_finite))
    if not isinstance(plain, dict):
        raise StoreError(f"The report is a {type(report).__name__}; expected names with values.")
    missing = [key for key in SUMMARY_KEYS if key not in plain]
    if missing:
        raise StoreError(f"The report lacks {', '.join(missing)}.")
    run_id = check_run_id(plain["run_id"])
    if not_finite:
        raise StoreError(
            f"The report of run {run_id!r} has numbers that are not finite: "
            f"{', '.join(not_finite)}. Use null if there is no number."
        )
    rows: dict[int, dict[str, Any]] = {}
    for position, sample in enumerate(samples):
        row = _plain_sample(sample, position)
        if row["index"] in rows:
            raise StoreError(f"Two samples of run {run_id!r} have the index {row['index']}.")
        rows[row["index"]] = row
    return PreparedRun(
        run_id=run_id,
        created=_sortable_time(plain["created"]),
        report=plain,
        samples=dict(sorted(rows.items())),
        curves=[_plain(dict(row), "a training curve", []) for row in curves],
        writer=_writer_of(plain),
    )


def to_text(value: Any) -> str:
    """Encode as JSON text; `json.loads` returns an equal value, floats to the last bit."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_safe_text(value: Any) -> str:
    """Encode stored values as JSON text even if they are none that `prepare` lets through."""
    try:
        text = to_text(value)
        text.encode()  # fails for lone surrogates
        return text
    except ValueError:
        return to_text(_plain(value, "", []))


def _plain_sample(sample: Mapping[str, Any], position: int) -> dict[str, Any]:
    not_finite: list[str] = []
    try:
        row = _plain(sample, "", not_finite)
    except StoreError as error:
        raise StoreError(f"Sample {position}: {error}") from None
    index = row.get("index") if isinstance(row, dict) else None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 10**8:
        raise StoreError(
            f"Sample {position} has the index {index!r}; "
            "expected a whole number from 0 to 99999999."
        )
    if not_finite:
        earlier = row.get("invalid") or []
        row["invalid"] = [*earlier, *(name for name in not_finite if name not in earlier)]
    return dict(row)


def _plain(value: Any, name: str, not_finite: list[str]) -> Any:
    """Convert to JSON values; a number that is not finite becomes None, its name is appended."""
    if value is None or isinstance(value, bool):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas may not be installed
        not_finite.append(name)
        return None
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float | Decimal):
        number = float(value)
        if math.isfinite(number):
            return number
        not_finite.append(name)
        return None
    if isinstance(value, Mapping):
        row = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise StoreError(f"{name or 'The top level'} has the key {key!r}; expected text.")
            row[_plain(key, name, not_finite)] = _plain(
                item, f"{name}.{key}" if name else key, not_finite
            )
        return row
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]", not_finite) for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item(), name, not_finite)  # a scalar of numpy or torch
    raise StoreError(
        f"{name or 'The value'} is a {type(value).__name__}; expected text, a number, "
        "true or false, null, a list, or names with values."
    )


def _writer_of(report: Mapping[str, Any]) -> RunWriter | None:
    """Return the writer of a report; None if it has none.

    Raises:
        StoreError: it does not have the form that a run writes.
    """
    stored = report.get("writer")
    found = _as_writer(stored)
    if stored is not None and found is None:
        raise StoreError(
            f"The report's writer is {reprlib.repr(stored)}; expected the id of the run and a "
            'number, such as {"run": "5f2c", "token": 1}.'
        )
    return found


def _as_writer(stored: Any) -> RunWriter | None:
    """Return the writer that `writer` of a report names; None if it names none."""
    if not isinstance(stored, Mapping):
        return None
    run, token = stored.get("run"), stored.get("token")
    if not isinstance(run, str) or not run or type(token) is not int or not 0 <= token < 2**53:
        return None
    return RunWriter(run, token)


def _sortable_time(created: Any) -> str:
    try:
        moment = datetime.fromisoformat(created)
        if moment.tzinfo is None:
            raise ValueError("a time without its zone")
        return moment.astimezone(UTC).isoformat(timespec="microseconds")
    except (TypeError, ValueError, OverflowError):  # beyond the years 1 to 9999 in UTC
        raise StoreError(
            f"The report's created is {reprlib.repr(created)}; expected a time with its zone, "
            "such as 2026-01-31T12:00:00+00:00."
        ) from None
