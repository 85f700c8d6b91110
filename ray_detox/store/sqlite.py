"""A store of results in one SQLite file; it needs no account and no server.

Every call opens its own connection, so threads may share a store and Ray may send it to other
processes. Writers wait for each other (one transaction per run); readers never wait.
"""

import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from ray_detox.bounded import MAX_JSON_BYTES, DamagedError, parse_stored
from ray_detox.store.errors import StoreError
from ray_detox.store.pages import (
    MAX_ROWS_SEARCHED,
    Condition,
    Page,
    SampleQuery,
    as_row,
    contains,
    decode_cursor,
    decode_place,
    encode_cursor,
    future_from,
    limits_of,
)
from ray_detox.store.prepare import prepare, to_text
from ray_detox.store.private import make_file, make_folder
from ray_detox.store.protocol import SCHEMA, check_run_id

log = logging.getLogger(__name__)

OLDEST = (3, 31)
"""Oldest version of SQLite that has generated columns."""

# How long SQLite waits for a lock that another connection holds.
_BUSY_TIMEOUT_S = 30.0

_MAX_STEPS = 2_000_000_000
"""Instructions of SQLite's virtual machine that one query may take. A run of a million samples takes a
hundredth of it; a file from elsewhere could make a query endless."""
_STEPS_PER_CALL = 1_000_000

_NEWEST_FIRST = "created < :future DESC, created DESC, run_id DESC"

_SCHEMA_1 = (
    "CREATE TABLE runs ("
    "run_id TEXT PRIMARY KEY, created TEXT NOT NULL, summary TEXT NOT NULL, report TEXT NOT NULL)",
    "CREATE INDEX by_time ON runs (created, run_id, summary)",
    "CREATE TABLE samples ("
    "run_id TEXT NOT NULL, position INTEGER NOT NULL, sample TEXT NOT NULL, "
    "PRIMARY KEY (run_id, position))",
)

# Virtual columns are computed from the JSON and stored only in the indexes. A value that is not a
# number becomes NULL.
_NUMBERS = ("toxicity_before", "toxicity_after", "reward_before", "reward_after")
_SIDES = {"toxicity_diff": "toxicity", "reward_diff": "reward"}

# Each index covers every column that `pages.FILTERS` compares, so that SQLite finds the samples of
# a page without reading their texts.
_SCHEMA_2 = (
    "ALTER TABLE runs ADD COLUMN digest TEXT",
    "ALTER TABLE runs ADD COLUMN attempt TEXT",
    "ALTER TABLE runs ADD COLUMN curves TEXT NOT NULL DEFAULT '[]'",
    *(
        f"ALTER TABLE samples ADD COLUMN {name} REAL AS ("
        f"CASE WHEN json_type(sample, '$.{name}') IN ('integer', 'real') "
        f"THEN json_extract(sample, '$.{name}') END) VIRTUAL"
        for name in _NUMBERS
    ),
    *(
        f"ALTER TABLE samples ADD COLUMN {name} REAL AS ({side}_after - {side}_before) VIRTUAL"
        for name, side in _SIDES.items()
    ),
    "CREATE INDEX by_index ON samples "
    "(run_id, position, toxicity_diff, toxicity_before, toxicity_after)",
    "CREATE INDEX by_toxicity_diff ON samples "
    "(run_id, toxicity_diff, position, toxicity_before, toxicity_after)",
    "CREATE INDEX by_reward_diff ON samples "
    "(run_id, reward_diff, position, toxicity_diff, toxicity_before, toxicity_after)",
)


@cache
def _known_schema() -> frozenset[str]:
    """Return the statements that SQLite keeps of our tables and indexes, of every schema."""
    known: set[str] = set()
    with closing(sqlite3.connect(":memory:")) as db:
        for statements in (_SCHEMA_1, _SCHEMA_2, ("ANALYZE",)):
            for statement in statements:
                db.execute(statement)
            known |= {sql for _, _, sql in db.execute(_OBJECTS) if sql}
    return frozenset(known)


_OBJECTS = "SELECT type, name, sql FROM sqlite_master"


class SQLiteStore:
    """A `ResultStore` in one file; the first write creates the file and its folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __repr__(self) -> str:
        return f"SQLiteStore({str(self.path)!r})"

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        *,
        overwrite: bool = False,
        attempt: str | None = None,
    ) -> bool:
        """Store a run in one transaction; see `ResultStore.put_run`."""
        run = prepare(report, samples, curves)
        texts = {
            "run_id": run.run_id,
            "created": run.created,
            "summary": to_text(run.summary),
            "report": to_text(run.report),
            "digest": run.digest,
            "attempt": attempt,
            "curves": to_text(run.curves),
        }
        rows = [(run.run_id, index, to_text(sample)) for index, sample in run.samples.items()]
        with self._writing() as db:
            found = db.execute(
                "SELECT digest, attempt, report FROM runs WHERE run_id = :run_id", texts
            ).fetchone()
            if found and found[0] == run.digest:
                return False
            if found:
                run.refuse_if_lost(self._object(found[2]).get("writer"))
            if found and not overwrite and (attempt is None or found[1] != attempt):
                raise StoreError(
                    f"Another run {run.run_id!r} is already in {self.path}. "
                    "Choose another run id, or pass `--overwrite`."
                )
            db.execute("DELETE FROM samples WHERE run_id = :run_id", texts)
            db.execute("DELETE FROM runs WHERE run_id = :run_id", texts)
            names = ", ".join(texts)
            values = ", ".join(f":{name}" for name in texts)
            db.execute(f"INSERT INTO runs ({names}) VALUES ({values})", texts)
            db.executemany("INSERT INTO samples (run_id, position, sample) VALUES (?, ?, ?)", rows)
        return True

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """The report of a run, or None."""
        query = "SELECT report FROM runs WHERE run_id = :run_id"
        rows = list(self._select(query, run_id=check_run_id(run_id)))
        return self._object(rows[0][0]) if rows else None

    def list_runs(self) -> list[dict[str, Any]]:
        """Summaries of all runs, newest first; those from the future are last."""
        query = f"SELECT summary, run_id FROM runs ORDER BY {_NEWEST_FIRST}"
        return [_summary(*row) for row in self._select(query, future=future_from())]

    def list_page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """Summaries of some runs, newest first; those from the future are last."""
        future, created, run_id = (
            (future_from(), "~", "") if cursor is None else decode_place(cursor)
        )
        query = (
            "SELECT summary, created, run_id FROM runs "
            "WHERE (created < :future, created, run_id) < (:is_past, :created, :run_id) "
            f"ORDER BY {_NEWEST_FIRST} LIMIT :limit"
        )
        # "~" comes after every moment, so the place before the first page is among those of the past.
        is_past = cursor is None or created < future
        values = {"future": future, "created": created, "run_id": run_id, "is_past": is_past}
        rows = list(self._select(query, limit=limit + 1, **values))
        more = (
            encode_cursor([future, *map(str, rows[limit - 1][1:])], "runs")
            if len(rows) > limit
            else None
        )
        return Page([_summary(row[0], row[2]) for row in rows[:limit]], more)

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The samples of a run by index, from one snapshot of the file."""
        query = "SELECT sample FROM samples WHERE run_id = :run_id ORDER BY position"
        rows = self._select(query, run_id=check_run_id(run_id))
        return (self._object(text) for (text,) in rows)

    def get_sample(self, run_id: str, index: int) -> dict[str, Any] | None:
        """One sample, or None."""
        query = "SELECT sample FROM samples WHERE run_id = :run_id AND position = :position"
        rows = list(self._select(query, run_id=check_run_id(run_id), position=index))
        return self._object(rows[0][0]) if rows else None

    def sample_page(
        self,
        run_id: str,
        query: SampleQuery = SampleQuery(),  # noqa: B008 - frozen
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page | None:
        """Samples that match a query; see `ResultStore.sample_page`."""
        after = None
        if cursor is not None:
            after = decode_cursor(cursor, [(int, float), int], check_run_id(run_id), query)
        summary = "SELECT summary FROM runs WHERE run_id = :run_id"
        found = list(self._select(summary, run_id=check_run_id(run_id)))
        if not found:
            return None
        by_index = query.key == "index"
        key = "position" if by_index else query.key
        order, beyond = ("DESC", "<") if query.descending else ("ASC", ">")
        where = ["run_id = :run_id", *map(_as_sql, query.conditions)]
        if after is not None:
            where.append(f"({key}, position) {beyond} (:after, :position)")
        # Select positions from the index alone, then join the texts of those rows only.
        selected = (
            f"SELECT position, {key} AS sort_key FROM samples INDEXED BY by_{query.key} "
            f"WHERE {' AND '.join(where)} ORDER BY {key} {order}, position {order} LIMIT :max_rows"
        )
        texts = (
            f"SELECT p.sort_key, p.position, s.sample FROM ({selected}) p "
            "CROSS JOIN samples s ON s.run_id = :run_id AND s.position = p.position"
        )
        limits = limits_of(_summary(found[0][0], run_id))
        max_rows = MAX_ROWS_SEARCHED if query.search else limit
        rows: list[dict[str, Any]] = []
        searched, last = 0, None
        for sort_key, position, text in self._select(
            texts,
            run_id=run_id,
            after=after and after[0],
            position=after and after[1],
            max_rows=max_rows + 1,
            **asdict(limits),
        ):
            if searched == max_rows or len(rows) == limit:
                return Page(rows, encode_cursor(last or (), run_id, query))
            if type(position) is not int:
                raise self._damaged("the index of a sample is not a whole number")
            searched, last = searched + 1, (sort_key, position)
            row = as_row(self._object(text))
            if contains(row, query.search):
                rows.append(row)
        return Page(rows, None)

    def get_history(self, run_id: str) -> list[dict[str, Any]]:
        """Metrics of each training step; empty if there is no such run."""
        query = "SELECT curves FROM runs WHERE run_id = :run_id"
        rows = list(self._select(query, run_id=check_run_id(run_id)))
        if not rows:
            return []
        return [row for row in self._parse(rows[0][0], list) if isinstance(row, dict)]

    def _object(self, text: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._parse(text, dict)
        return found

    def _parse(self, text: Any, kind: type) -> Any:
        """Parse a stored value.

        Raises:
            StoreError: it is not JSON of this kind.
        """
        try:
            found = parse_stored(text)
        except DamagedError as error:
            reason = str(error)
        else:
            if isinstance(found, kind):
                return found
            reason = f"it is not {'an object' if kind is dict else 'a list'}"
        raise self._damaged(f"a stored value cannot be used, because {reason}")

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(
            f"The results file {self.path} is damaged: {reason}. Move the file away, and store its "
            "runs again with ray-detox publish."
        )

    def check(self) -> None:
        """Open the file for writing; create it and its folder if they do not exist."""
        with self._writing():
            pass

    def close(self) -> None:
        """Do nothing: every call closes its own connection."""

    def _select(self, query: str, **values: Any) -> Iterator[tuple[Any, ...]]:
        # Reading a file that does not exist finds nothing and must not create it.
        if not self.path.exists():
            return
        with self._to_store_errors(), closing(self._open_to_read()) as db:
            version = self._version(db)
            if 0 < version < SCHEMA:
                with self._writing():
                    pass
            if version:
                left = iter(range(_MAX_STEPS // _STEPS_PER_CALL))
                db.set_progress_handler(lambda: next(left, None) is None, _STEPS_PER_CALL)
                # One statement reads one snapshot, even if another connection writes meanwhile.
                yield from db.execute(query, values)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._to_store_errors():
            make_folder(self.path.parent)
            make_file(self.path)
            with closing(self._connect("rwc")) as db:
                if self._version(db) == 0:
                    self._enable_wal(db)
                db.execute("BEGIN IMMEDIATE")
                try:
                    self._upgrade_schema(db)
                    yield db
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")

    def _enable_wal(self, db: sqlite3.Connection) -> None:
        """Switch the file to write-ahead logging, so that readers do not wait for a writer.

        SQLite's busy timeout does not cover this statement, so retry while another process creates
        the same file.
        """
        deadline = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    # "locking protocol" or "disk I/O error": NFS and the like have no shared memory, which
                    # this mode needs. The file keeps its rollback journal: readers wait for a writer.
                    log.warning(
                        "%s is on a file system without write-ahead logging (%s); it gets a rollback "
                        "journal.",
                        self.path,
                        error,
                    )
                    db.execute("PRAGMA journal_mode = DELETE")
                    return
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _upgrade_schema(self, db: sqlite3.Connection) -> None:
        """Create the tables, or add what an earlier schema lacks; runs inside a transaction."""
        version = self._version(db)
        for statements in (_SCHEMA_1, _SCHEMA_2)[version:]:
            for statement in statements:
                db.execute(statement)
        if version < SCHEMA:
            db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _open_to_read(self) -> sqlite3.Connection:
        """Open the file to read it, also if this user may not write it or its folder.

        With write-ahead logging SQLite makes two files beside it even to read. Without leave for that, or
        without shared memory, the file is read as if nobody wrote it, unless it has a log that is not empty.
        """
        try:
            return self._connect("rw")
        except sqlite3.OperationalError:
            with suppress(FileNotFoundError):
                if Path(f"{self.path}-wal").stat().st_size:
                    raise
            return self._connect("ro&immutable=1")

    def _connect(self, mode: str) -> sqlite3.Connection:
        if sqlite3.sqlite_version_info < OLDEST:
            raise StoreError(
                f"This Python has SQLite {sqlite3.sqlite_version}, and {'.'.join(map(str, OLDEST))} or "
                "newer is needed. Use another Python, or results.store=dynamodb."
            )
        for suffix in ("", "-journal", "-wal", "-shm"):
            file = Path(f"{self.path}{suffix}")
            try:
                is_file = stat.S_ISREG(file.stat().st_mode)
            except OSError:  # absent, or SQLite says what keeps it from the file
                continue
            if not is_file:  # SQLite would wait for the other end of a pipe
                raise StoreError(
                    f"{file} is not a file. Move it away, or choose another output folder."
                )
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        # isolation_level None: the code begins and ends transactions explicitly.
        # check_same_thread False: a generator of samples may end on another thread.
        db = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_JSON_BYTES)
            self._version(db)  # first: a newer version may have other tables
            self._check_schema(db)
        except BaseException:
            db.close()
            raise
        return db

    def _check_schema(self, db: sqlite3.Connection) -> None:
        """Check that the file has our tables and indexes and nothing else, such as a view or a trigger.

        A view in place of a table could make every query endless. PRAGMA trusted_schema = OFF would not
        help, and would disable our own virtual columns.
        """
        for _, name, sql in db.execute(_OBJECTS):
            if sql and sql not in _known_schema():  # indexes of SQLite's own have no statement
                raise StoreError(
                    f"{self.path} is not a results file: it has the table, index, view or trigger "
                    f"{str(name)[:80]!r}, which ray-detox does not make. Choose another file."
                )

    def _version(self, db: sqlite3.Connection) -> int:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer version (schema {version}, this one knows "
                f"{SCHEMA}). Upgrade ray-detox, or choose another file."
            )
        return version

    @contextmanager
    def _to_store_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            effective = os.access in os.supports_effective_ids
            if self.path.exists() and not os.access(self.path, os.R_OK, effective_ids=effective):
                raise StoreError(
                    f"The results file {self.path} cannot be read by this user. Ask its owner for the right "
                    "to read it, or choose another output folder."
                ) from error
            raise StoreError(
                f"The results file {self.path} cannot be used: {error}. "
                "Check that it is a results file, that its folder is writable, that the disk has free "
                "space and that no other program locks it."
            ) from error
        except OSError as error:
            raise StoreError(
                f"The folder of {self.path} cannot be created: {error.strerror}. "
                "Choose another output folder."
            ) from error


def _summary(text: Any, run_id: Any) -> dict[str, Any]:
    """Return a stored summary; of a damaged one what is known, so that lists show the other runs."""
    try:
        found = parse_stored(text)
    except DamagedError:
        found = None
    known = found if isinstance(found, dict) else {"status": "damaged"}
    return {**known, "run_id": str(run_id)}


def _as_sql(condition: Condition) -> str:
    """The condition over columns of `samples`; its limit is a named parameter."""
    if not condition.limit:
        return f"{condition.field} {condition.operator}"
    sign = "-" if condition.sign < 0 else ""
    return f"{condition.field} {condition.operator} {sign}:{condition.limit}"
