"""Results in one SQLite file: the store that needs no account and no server.

Every call opens its own connection, so that one store may be shared by threads and sent to
other processes. Writers queue up (one transaction per run), readers never wait.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ray_detox.store import SCHEMA, StoreError, check_run_id, prepare, to_text

# How long a writer waits for other writers.
_PATIENCE_S = 30.0

_TABLES = (
    "CREATE TABLE runs ("
    "run_id TEXT PRIMARY KEY, created TEXT NOT NULL, summary TEXT NOT NULL, report TEXT NOT NULL)",
    "CREATE INDEX by_time ON runs (created, run_id, summary)",
    "CREATE TABLE samples ("
    "run_id TEXT NOT NULL, position INTEGER NOT NULL, sample TEXT NOT NULL, "
    "PRIMARY KEY (run_id, position))",
)


class SQLiteStore:
    """A `ResultStore` in one file, created with its folder by the first write."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __repr__(self) -> str:
        return f"SQLiteStore({str(self.path)!r})"

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        *,
        overwrite: bool = False,
    ) -> None:
        """Store a run in one transaction; see `ResultStore.put_run`."""
        run = prepare(report, samples)
        row = (run.run_id, run.created, to_text(run.summary), to_text(run.report))
        rows = [(run.run_id, index, to_text(sample)) for index, sample in run.samples.items()]
        with self._writing() as db:
            exists = db.execute("SELECT 1 FROM runs WHERE run_id = ?", row[:1]).fetchone()
            if exists and not overwrite:
                raise StoreError(
                    f"Run {run.run_id!r} is already in {self.path}. "
                    "Choose another id, or overwrite it on purpose."
                )
            db.execute("DELETE FROM samples WHERE run_id = ?", row[:1])
            db.execute("DELETE FROM runs WHERE run_id = ?", row[:1])
            db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", row)
            db.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows)

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """The report of a run, or None."""
        query = "SELECT report FROM runs WHERE run_id = ?"
        rows = list(self._select(query, check_run_id(run_id)))
        return dict(json.loads(rows[0][0])) if rows else None

    def list_runs(self) -> list[dict[str, Any]]:
        """Summaries of all runs, newest first."""
        query = "SELECT summary FROM runs ORDER BY created DESC, run_id DESC"
        return [json.loads(text) for (text,) in self._select(query)]

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The samples of a run by index, as they were when the reading began."""
        query = "SELECT sample FROM samples WHERE run_id = ? ORDER BY position"
        rows = self._select(query, check_run_id(run_id))
        return (json.loads(text) for (text,) in rows)

    def check(self) -> None:
        """Open the file for writing, creating it with its folder if need be."""
        with self._writing():
            pass

    def close(self) -> None:
        """Nothing to let go of: connections live for one call."""

    def _select(self, query: str, *values: str) -> Iterator[tuple[str]]:
        # A reader of a file that is not there finds nothing, and leaves nothing behind.
        if not self.path.exists():
            return
        with self._failing_in_words(), closing(self._connect("rw")) as db:
            if self._version(db):
                # One statement reads one snapshot, whatever is written meanwhile.
                yield from db.execute(query, values)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._failing_in_words():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect("rwc")) as db:
                if self._version(db) == 0:
                    # Kept in the file; readers then see the last whole state while one writes.
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN IMMEDIATE")
                try:
                    if self._version(db) == 0:
                        for statement in _TABLES:
                            db.execute(statement)
                        db.execute(f"PRAGMA user_version = {SCHEMA}")
                    yield db
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        # isolation_level None: transactions begin and end where the code says so.
        # A generator of samples may be finished on another thread than it was begun on.
        return sqlite3.connect(
            uri, uri=True, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
        )

    def _version(self, db: sqlite3.Connection) -> int:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer version (schema {version}, this one knows "
                f"{SCHEMA}). Upgrade ray-detox, or name another file."
            )
        return version

    @contextmanager
    def _failing_in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(
                f"The results file {self.path} cannot be used: {error}. "
                "See that it is a results file, that its folder can be written to, that the disk "
                "has room and that no other program holds it."
            ) from error
        except OSError as error:
            raise StoreError(
                f"The folder of {self.path} cannot be created: {error.strerror}. "
                "Choose another output folder."
            ) from error
