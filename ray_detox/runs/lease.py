"""The lease on a run: one process at a time may write it.

    take --> Lease (a thread renews it) --> guard --> every write of the run
                                        --> release

States of a lease, as another process that wants the run sees it:

    free ---------------- take -----------------> held: refused with a sentence
      ^                                            |
      '---- release -------------------------------|
                                                   | its process has ended, or `beat` has not grown
                                                   v for STALE_S by this process's own clock
                                                 stale ---- take, with the next token ----> held

A writer that was only paused finds the next token in the record before its next write: `LeaseLost`.
In a folder, check and write happen while `run.lock` is locked. Elsewhere a write may begin after the
check and end after the next taking: a checkpoint's name therefore has the token in it, and one that an
earlier taking wrote for a later step does not count (`record.Taking`).
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ray_detox.errors import ConfigError
from ray_detox.runs.conditional import NAME, Conflict, LocalFile, locked, versioned_file
from ray_detox.runs.record import RunRecord, Taking, is_gone, record_from_json, this_process
from ray_detox.runs.storage import Storage, StorageError

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Time between two signs of life."""
STALE_S = 30.0
"""A writer that gave no sign of life for this long has lost its lease to whoever wants it."""
WATCH_S = 0.5
"""Time between two looks at somebody else's lease."""
ATTEMPTS = 20
"""Attempts to change a record that others change at the same time."""


class LeaseLost(RuntimeError):
    """Another process has taken the run; this one writes nothing more."""


@dataclass(frozen=True, slots=True)
class Guard:
    """The right to write a run's files under one address; other processes may be given it."""

    address: str
    run_id: str
    run: str
    """See `RunRecord.run`."""
    token: int
    writer: str
    """See `Writer.id`: in storage that cannot compare, two processes may have been given one token."""

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            LeaseLost: another process has taken the run.
            StorageError: the record cannot be read, or is not there.
        """
        found = read_record(Storage(self.address))
        if found is None:
            raise StorageError(
                f"{self.address} no longer has the run's {NAME}: the storage is away, or was emptied."
            )
        self.compare(found)

    def compare(self, found: RunRecord) -> None:
        """Raise LeaseLost if the record is not the one of this taking."""
        writer = found.writer.id if found.writer else None
        if (found.run, found.token, writer) == (self.run, self.token, self.writer):
            return
        whom = found.writer.describe() if found.writer else "a process that has finished"
        raise LeaseLost(
            f"Run {self.run_id!r} was taken over by {whom} (taking {found.token}, this was taking "
            f"{self.token}). This process has written nothing since, and stops."
        )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Inside, files of the run may be written: no other process can take the run meanwhile.

        Raises:
            LeaseLost, StorageError: see `check`.
        """
        file = versioned_file(Storage(self.address))
        if isinstance(file, LocalFile):
            if not file.file.exists():  # or the lock would create a folder where a disk is away
                self.check()
            with locked(file.file):
                self.check()
                yield
        else:
            self.check()
            yield


class GuardedStorage(Storage):
    """A storage in which only the holder of the lease writes."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard.address)
        self.guard = guard

    def write(self, name: str, content: bytes) -> None:
        """See `Storage.write`.

        Raises:
            LeaseLost: another process has taken the run.
        """
        with self.guard.hold():
            super().write(name, content)

    def delete(self, name: str) -> None:
        """See `Storage.delete`.

        Raises:
            LeaseLost: another process has taken the run.
        """
        with self.guard.hold():
            super().delete(name)


def read_record(storage: Storage) -> RunRecord | None:
    """Return the record of a run; None if there is none.

    Raises:
        ConfigError: it is damaged.
        StorageError: the storage cannot be read.
    """
    _, content = versioned_file(storage).read()
    return None if content is None else record_from_json(content, f"{storage.address}/{NAME}")


class Lease:
    """A lease that this process holds; a thread renews it until `release`.

    Get one from `take` or `create`.
    """

    def __init__(self, storage: Storage, run_id: str, record: RunRecord, version: str) -> None:
        assert record.writer is not None
        self.record = record
        self.guard = Guard(storage.address, run_id, record.run, record.token, record.writer.id)
        self._file = versioned_file(storage)
        self._version = version
        self._lock = threading.Lock()
        self._lost: LeaseLost | None = None
        self._seconds_before = dict(record.seconds)
        self._clock: Callable[[], Mapping[str, float]] = dict
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLost if the thread has found that the lease is lost; reads nothing."""
        if self._lost is not None:
            raise self._lost

    def update(self, **changes: Any) -> None:
        """Change fields of the record.

        Raises:
            LeaseLost: another process has taken the run.
            StorageError: the record cannot be written.
        """
        with self._lock:
            self._write(replace(self.record, **changes))

    def note_step(self, step: int) -> None:
        """Have the next beat write that the checkpoint of a step is in the storage."""
        with self._lock:
            self.record = replace(self.record, step=step)

    def measure(self, clock: Callable[[], Mapping[str, float]]) -> None:
        """Have each beat write the run's wall time.

        Args:
            clock: returns the seconds of this process by phase.
        """
        with self._lock:
            self._clock = clock

    def seconds(self) -> dict[str, float]:
        """Return the wall time of the run by phase: of this process and those before it."""
        total = dict(self._seconds_before)
        for phase, seconds in self._clock().items():
            total[phase] = total.get(phase, 0.0) + seconds
        return total

    def release(self) -> None:
        """End the thread and free the run; does nothing if the lease is lost or the storage is away."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(BEAT_S)
        if self._thread.is_alive():  # in a write that does not return; the lease becomes stale
            return
        try:
            self.update(writer=None)
        except (LeaseLost, StorageError, ConfigError) as error:
            log.debug("The lease was not released: %s", error)

    def _renew(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                with self._lock:
                    self._write(replace(self.record, beat=self.record.beat + 1))
            except LeaseLost as error:
                self._lost = error
                return
            except Exception as error:  # the storage is away; the next attempt follows
                log.debug("The lease was not renewed: %s", error)

    def _write(self, record: RunRecord) -> None:
        record = replace(record, seconds=self.seconds())
        for _ in range(ATTEMPTS):
            try:
                self._version = self._file.replace(record.to_json(), self._version)
            except Conflict:
                version, content = self._file.read()
                if content is None or version is None:
                    raise StorageError(
                        f"{self.guard.address} no longer has the run's {NAME}: the storage is away, or "
                        "was emptied."
                    ) from None
                found = record_from_json(content, NAME)
                self.guard.compare(found)
                self._version = version
            else:
                self.record = record
                return
        raise StorageError(f"{self.guard.address}: {NAME} changes all the time.")


def create(storage: Storage, run_id: str, run: str | None = None) -> Lease:
    """Create the record of a new run, and take the run.

    Args:
        storage: of the run.
        run_id: for messages.
        run: see `RunRecord.run`; None makes a new one.

    Raises:
        Conflict: a run is there already.
        StorageError: the storage cannot be written to.
    """
    writer = this_process(secrets.token_hex(8), _now())
    record = RunRecord(
        format=1,
        run=run or secrets.token_hex(16),
        token=1,
        beat=0,
        writer=writer,
        takings=(Taking(token=1, step=0),),
        identity={},
        accepted=(),
        settings=(),
        step=None,
    )
    version = versioned_file(storage).replace(record.to_json(), None)
    return Lease(storage, run_id, record, version)


def take(
    storage: Storage, run_id: str, say: Callable[[str], None], stale_s: float = STALE_S
) -> Lease:
    """Take a run that exists; waits for as long as its last writer may still live.

    Args:
        storage: of the run.
        run_id: for messages.
        say: shows a line.
        stale_s: see `STALE_S`.

    Raises:
        ConfigError: another process writes the run, or there is no record, or it is damaged.
        StorageError: the storage cannot be read or written.
    """
    file = versioned_file(storage)
    seen: tuple[int, int] | None = None
    began = time.monotonic()
    while True:
        version, content = file.read()
        if content is None or version is None:
            raise ConfigError(f"{storage.address} has no {NAME}, so no run can be resumed there.")
        record = record_from_json(content, f"{storage.address}/{NAME}")
        now = (record.token, record.beat)
        last = record.writer
        if last is not None and not is_gone(last):
            if seen is None:
                seen = now
                say(
                    f"run {run_id} is held by {last.describe()}; waiting up to {stale_s:g} s for a sign "
                    "of life"
                )
            elif now != seen:
                raise ConfigError(
                    f"Run {run_id!r} is being written by {last.describe()}. Stop that process first, or "
                    "let it finish."
                )
            if time.monotonic() - began < stale_s:
                time.sleep(WATCH_S)
                continue
        taken = replace(
            record,
            token=record.token + 1,
            beat=0,
            writer=this_process(secrets.token_hex(8), _now()),
        )
        try:
            version = file.replace(taken.to_json(), version)
        except Conflict:
            time.sleep(WATCH_S)
            continue
        if last is not None:
            reason = "has ended" if is_gone(last) else f"gave no sign of life for {stale_s:g} s"
            say(f"run {run_id} taken over from {last.describe()} and {reason}")
        return Lease(storage, run_id, taken, version)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
