"""Where results of runs are kept: one protocol, two stores.

    report, samples, curves --prepare--> plain JSON values --> SQLiteStore    one file
                                                           '-> DynamoDBStore  one table

A run is stored whole or not at all: everything is checked and converted before the first
write, and no reader sees a run that is still being written. What a report looks like on a
screen is `report.py` and `viewer/`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol

from ray_detox.store.errors import BadCursor, StoreError
from ray_detox.store.pages import Page, SampleQuery

__all__ = [
    "SCHEMA",
    "SUMMARY_KEYS",
    "BadCursor",
    "Page",
    "PreparedRun",
    "ResultStore",
    "SampleQuery",
    "StoreError",
    "check_run_id",
    "open_store",
    "prepare",
    "to_text",
]

SCHEMA = 2
"""Version of what is stored; a reader refuses versions that it does not know."""

SUMMARY_KEYS = ("run_id", "recipe", "status", "created", "n", "verdict", "toxicity")
"""What every report must have, and what a list of runs shows."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SURROGATES = re.compile("[\ud800-\udfff]")


class ResultStore(Protocol):
    """Keeps the report of each run, its samples and its training curves.

    Example: what a run stores, much shortened.

        report   {"run_id": "first", "recipe": "lab", "created": "2026-01-31T12:00:00+00:00",
                  "n": 512, "toxicity": {"before": {"mean": 0.41, ...}, ...}, ...}
        samples  [{"index": 0, "query": "...", "response_before": "...", "kl": 1.2, ...}, ...]
        curves   [{"step": 1, "score": 0.48, "kl": 0.0, ...}, ...]
    """

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        *,
        overwrite: bool = False,
        attempt: str | None = None,
    ) -> bool:
        """Store a run, whole or not at all.

        Args:
            report: JSON values under string keys, with at least `SUMMARY_KEYS`; no NaN.
            samples: JSON values under string keys, each with its own `index`. A number that is
                not finite is stored as None, and its name is added to the sample's `invalid`.
            curves: the figures of each training step. A number that is not finite becomes None.
            overwrite: replace a run of the same id, samples included.
            attempt: a name of this writer. An attempt of the same name, such as a task that is
                run again after a crash, may write again what it had written.

        Returns:
            True, or False where the very same run was stored already: then nothing is written.

        Raises:
            StoreError: something cannot be stored, the run exists, or the store failed.
        """
        ...

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """The report as it was put; None where there is no such finished run."""
        ...

    def list_runs(self) -> list[dict[str, Any]]:
        """Of each finished run the `SUMMARY_KEYS` of its report, less the histogram; newest first."""
        ...

    def list_page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """The same in pages.

        Raises:
            BadCursor: the cursor is not from an earlier page.
        """
        ...

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The samples of a finished run by index; nothing where there is no such run."""
        ...

    def get_sample(self, run_id: str, index: int) -> dict[str, Any] | None:
        """One sample in full; None where there is none."""
        ...

    def sample_page(
        self,
        run_id: str,
        query: SampleQuery = SampleQuery(),  # noqa: B008 - frozen
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page | None:
        """Samples that answer a query, with `toxicity_diff` and `reward_diff`.

        A page may be short, even empty, and still not be the last: the work for one is bounded.
        Where a store cuts a very long text here, `overflow` has its name; `get_sample` has it whole.

        Returns:
            None where there is no such finished run.

        Raises:
            BadCursor: the cursor is not from an earlier page of the same run and query.
        """
        ...

    def get_history(self, run_id: str) -> list[dict[str, Any]]:
        """The figures of each training step; none where there is no such run."""
        ...

    def check(self) -> None:
        """Find out now, and not after hours of training, whether a run could be stored.

        Raises:
            StoreError: what is missing, and what to do.
        """
        ...

    def close(self) -> None:
        """Let go of connections; the store opens new ones when it is used again."""
        ...


def open_store(
    kind: str,
    path: str | os.PathLike[str],
    table: str,
    region: str | None = None,
    endpoint_url: str | None = None,
    *,
    hurried: bool = False,
) -> ResultStore:
    """The store that a run's settings name; nothing is opened or created yet.

    Args:
        kind: `sqlite` or `dynamodb`.
        path: file of the SQLite store.
        table: DynamoDB table.
        region: AWS region; None takes AWS_REGION, AWS_DEFAULT_REGION or the AWS profile's.
        endpoint_url: another DynamoDB endpoint, for emulators.
        hurried: give up on DynamoDB after two seconds, for readers who would rather be told.
    """
    # Imported here: a laptop's run needs no boto3, and its import takes a second.
    if kind == "sqlite":
        from ray_detox.store.sqlite import SQLiteStore

        return SQLiteStore(path)
    if kind == "dynamodb":
        from ray_detox.store.dynamodb import DynamoDBStore

        return DynamoDBStore(table, region=region, endpoint_url=endpoint_url, hurried=hurried)
    raise StoreError(f"Unknown store {kind!r}; expected sqlite or dynamodb.")


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it can name a run in every store, a file and a URL.

    Raises:
        StoreError: it has other characters than letters, digits, `.`, `_` and `-`, does not
            start with a letter or digit, or has more than 64 characters.
    """
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise StoreError(
            f"Run id {str(run_id)[:80]!r} cannot be used. Take 1 to 64 letters, digits, '.', '_' "
            "and '-', starting with a letter or digit."
        )
    return run_id


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that has been checked, in plain JSON values."""

    run_id: str
    created: str
    """UTC in one fixed format, so that text order is time order; the report keeps its own."""
    report: dict[str, Any]
    samples: dict[int, dict[str, Any]]
    """By index, ascending."""
    curves: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """SHA-256 of everything: two runs of one digest are the same run."""
        text = to_text([self.report, list(self.samples.values()), self.curves])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def summary(self) -> dict[str, Any]:
        """What a list of runs shows of this one."""
        summary = {key: self.report[key] for key in SUMMARY_KEYS}
        if isinstance(summary["toxicity"], dict):
            # Half of it by size, and no list draws it.
            summary["toxicity"] = {
                key: value for key, value in summary["toxicity"].items() if key != "histogram"
            }
        return summary


def prepare(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]] = (),
) -> PreparedRun:
    """Check and convert a run, so that writing it can no longer fail on a value.

    Numbers of numpy and torch become Python's, tuples become lists, and lone surrogates, which
    no UTF-8 can hold, become U+FFFD.

    Raises:
        StoreError: names the first thing that cannot be stored.
    """
    not_finite: list[str] = []
    plain = _plain(report, "", not_finite)
    if not isinstance(plain, dict):
        raise StoreError(f"The report is a {type(report).__name__}; expected names with values.")
    missing = [key for key in SUMMARY_KEYS if key not in plain]
    if missing:
        raise StoreError(f"The report lacks {', '.join(missing)}.")
    run_id = check_run_id(plain["run_id"])
    if not_finite:
        raise StoreError(
            f"The report of run {run_id!r} has numbers that are not finite: "
            f"{', '.join(not_finite)}. Give null where there is no number."
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
    )


def to_text(value: Any) -> str:
    """JSON text; `json.loads` gives back an equal value, floats to the last bit."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


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
    """Convert to JSON values; a number that is not finite becomes None and leaves its name."""
    if value is None or isinstance(value, bool):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which need not be installed
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


def _sortable_time(created: Any) -> str:
    try:
        moment = datetime.fromisoformat(created)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise StoreError(
            f"The report's created is {created!r}; expected a time with its zone, "
            "such as 2026-01-31T12:00:00+00:00."
        )
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
