"""A run that this process may write: its leases, its settings and its identity.

    open_run --> HeldRun --> storage   checkpoints, measured shards               lease in the storage
                         --> guard     metrics, adapter, report on this machine   lease in the folder

The record in the storage is the run's: `run.json` in the folder says which run the folder belongs to.
Without `train.storage` the two are one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_detox.config import RunConfig
from ray_detox.errors import ConfigError
from ray_detox.recipes.names import portable_names
from ray_detox.runs.checkpoint_store import CheckpointStore
from ray_detox.runs.conditional import NAME, Conflict
from ray_detox.runs.folder import RunFolder, run_exists, settings_from_json
from ray_detox.runs.lease import (
    Guard,
    GuardedStorage,
    Lease,
    LeaseLost,
    create,
    read_record,
    take,
)
from ray_detox.runs.record import Change, RunRecord, Taking, is_gone
from ray_detox.runs.resume import changed_settings, require_same_run, run_storage
from ray_detox.runs.storage import Storage, StorageError, write_atomic
from ray_detox.store.private import make_folder

SETTINGS = "config.json"
CREATED_FILES = {SETTINGS, NAME, "run.lock"}
"""Files of a run that has done nothing yet."""


class OtherIdentity(ConfigError):
    """The data, a model or the package is not the one that the run was started with."""


@dataclass(frozen=True, slots=True)
class HeldRun:
    """A run whose leases this process holds; `release` or `discard` ends it."""

    folder: RunFolder
    leases: tuple[Lease, ...]
    """Of the storage and of the folder on this machine; one if they are the same place."""

    @property
    def record(self) -> RunRecord:
        """The run's record, as this process last wrote it."""
        return self.leases[0].record

    @property
    def storage(self) -> GuardedStorage:
        """The run's storage, for writing."""
        return GuardedStorage(self.leases[0].guard)

    @property
    def guards(self) -> tuple[Guard, ...]:
        """The rights to write in the storage and in the folder."""
        return tuple(lease.guard for lease in self.leases)

    @property
    def guard(self) -> Guard:
        """The right to write files in the run's folder."""
        return self.leases[-1].guard

    def note_step(self, step: int) -> None:
        """Note that the checkpoint of a step is in the storage; the record has it with the next beat."""
        self.leases[0].note_step(step)

    def measure(self, clock: Callable[[], Mapping[str, float]]) -> None:
        """Have the record count the seconds by phase that `clock` returns, as those of this process."""
        self.leases[0].measure(clock)

    def seconds(self) -> dict[str, float]:
        """Return the wall time of the run by phase, of all its processes together."""
        return self.leases[0].seconds()

    def check(self) -> None:
        """Raise LeaseLost if another process has taken the run, as far as this one knows."""
        for lease in self.leases:
            lease.check()

    def checkpoints(self, keep: int) -> CheckpointStore:
        """Return the run's checkpoints, for writing."""
        return CheckpointStore(self.storage, keep, self.record.takings)

    def begin(self, step: int) -> None:
        """Note from which checkpoint this process goes on; call it before it writes any.

        Raises:
            LeaseLost, StorageError: the record cannot be written.
        """
        taking = Taking(token=self.record.token, step=step)
        earlier = [t for t in self.record.takings if t.token < taking.token]
        self.leases[0].update(takings=(*earlier, taking))

    def identify(self, found: Mapping[str, str], *, accept: bool) -> None:
        """Compare fingerprints with those that the run was started with, and keep new ones.

        Args:
            found: fingerprints by name, of things that the record may have or not.
            accept: keep a difference in the record, which the report then shows, and go on.

        Raises:
            OtherIdentity: something differs, and `accept` is False.
        """
        changes = accepted_differences(self.record, found, self.folder.run_id, accept=accept)
        if changes or found.keys() - self.record.identity.keys():
            self.leases[0].update(
                identity={**self.record.identity, **found},
                accepted=(*self.record.accepted, *changes),
            )

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the record, as JSON values."""
        return record_facts(self.record)

    def release(self) -> None:
        """Let other processes take the run."""
        for lease in reversed(self.leases):
            lease.release()

    def discard(self) -> None:
        """Remove a run that has done nothing, so that its id is free again.

        Nothing is removed if another process has taken the run meanwhile.
        """
        with suppress(LeaseLost, StorageError):
            if len(self.leases) > 1 and self.record.token == 1:
                with self.leases[0].guard.hold():
                    storage = Storage(self.leases[0].guard.address)
                    for name in (SETTINGS, NAME):
                        storage.delete(name)
            with self.guard.hold():
                shutil.rmtree(self.folder.path, ignore_errors=True)
        self.release()


class Origin:
    """What a run was started with, for a measurement that writes nothing.

    Args:
        record: of the run.
        run_id: for messages.
        ignored: beginning of names that are not compared; empty compares all.
    """

    def __init__(self, record: RunRecord, run_id: str, ignored: str = "") -> None:
        self._record = record
        self._run_id = run_id
        self._ignored = ignored

    @classmethod
    def of_run(cls, config: RunConfig, folder: RunFolder) -> "Origin":
        """Read the record of a run.

        Args:
            config: of the measurement.
            folder: of the run.

        Raises:
            ConfigError: there is no record, or it cannot be read.
        """
        before = folder.read_config()
        storage = run_storage(before, folder)
        try:
            record = read_record(storage)
        except StorageError as error:
            raise ConfigError(f"train.storage: {error}") from error
        if record is None:
            raise ConfigError(
                f"{storage.address} has no {NAME}, which says what run {folder.run_id!r} was started "
                "with. Is the storage mounted, and is the address right?"
            )
        # Another reward is measured on purpose; the settings in the report show it.
        same = config.reward.scoring_settings() == before.reward.scoring_settings()
        return cls(record, folder.run_id, ignored="" if same else "reward")

    def compare(self, found: Mapping[str, str], *, accept: bool) -> None:
        """Compare fingerprints with those that the run was started with.

        Args:
            found: fingerprints by name.
            accept: go on in spite of a difference, which `facts` then shows.

        Raises:
            OtherIdentity: something differs, and `accept` is False.
        """
        if self._ignored:
            found = {n: value for n, value in found.items() if not n.startswith(self._ignored)}
        changes = accepted_differences(self._record, found, self._run_id, accept=accept)
        self._record = replace(self._record, accepted=(*self._record.accepted, *changes))

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the record, as JSON values."""
        return record_facts(self._record)


def record_facts(record: RunRecord) -> dict[str, Any]:
    """Return what a report says of a run's record, as JSON values."""
    return {
        "writer": {"run": record.run, "token": record.token},
        "changes": {
            "settings": [asdict(change) for change in record.settings],
            "accepted": [asdict(change) for change in record.accepted],
        },
    }


def accepted_differences(
    record: RunRecord, found: Mapping[str, str], run_id: str, *, accept: bool
) -> list[Change]:
    """Return how fingerprints differ from those of a record; names it lacks do not count.

    Raises:
        OtherIdentity: something differs, and `accept` is False.
    """
    known = record.identity
    changes = [
        Change(record.step or 0, name, known[name], value)
        for name, value in found.items()
        if name in known and known[name] != value
    ]
    if changes and not accept:
        listed = ", ".join(f"{c.name} ({c.before[:24]} then, {c.after[:24]} now)" for c in changes)
        raise OtherIdentity(
            f"Run {run_id!r} was started with other content of {listed}. Put back what it was started "
            "with, start a new run, or go on with --accept-changes, which the report will show."
        )
    return changes


def open_run(
    config: RunConfig,
    folder: RunFolder,
    say: Callable[[str], None],
    *,
    resume: bool,
    found: Mapping[str, str],
    accept: bool,
) -> HeldRun:
    """Create a run, or take one that exists, compare its identity, and write its settings.

    Args:
        config: settings of the run.
        folder: of the run.
        say: shows a line.
        resume: the run exists.
        found: see `HeldRun.identify`.
        accept: see `HeldRun.identify`.

    Raises:
        OtherIdentity: something is not what the run was started with, and `accept` is False.
        ConfigError: the run exists, or does not, or is another one, or its checkpoints are away, or
            another process writes it.
        StorageError: `train.storage` cannot be read or written.
    """
    leases: list[Lease] = []
    if not resume:
        make_folder(folder.path)
        if folder.has_settings():
            raise ConfigError(run_exists(folder))
    try:
        take_or_create = _resume if resume else _start
        before = take_or_create(config, folder, say, leases)
        held = HeldRun(folder, tuple(leases))
        held.identify(found, accept=accept)
        _write_settings(held, config, before)
    except BaseException:
        for lease in leases:
            lease.release()
        if not resume and _local(folder).address in (lease.guard.address for lease in leases):
            shutil.rmtree(folder.path, ignore_errors=True)
        elif not resume:
            with suppress(OSError):  # files of another process are in it
                folder.path.rmdir()
        raise
    return held


def _start(
    config: RunConfig, folder: RunFolder, say: Callable[[str], None], leases: list[Lease]
) -> RunConfig | None:
    """Create a run; return the settings that `train.storage` keeps of an earlier attempt, or None."""
    storage = run_storage(config, folder)
    if not _is_apart(storage, folder):
        leases.append(_create_here(folder))
        return None
    # A job that is retried on another machine goes on with what an earlier attempt stored.
    before = _stored_settings(config, folder, storage)
    try:
        leases.append(
            create(storage, folder.run_id) if before is None else take(storage, folder.run_id, say)
        )
    except Conflict:
        raise ConfigError(
            f"Another process has just started a run {folder.run_id!r} in "
            f"train.storage={config.train.storage}. Choose another --run-id."
        ) from None
    leases.append(_create_here(folder, leases[0].record.run))
    _require_checkpoint(leases[0].record, storage, folder)
    return before


def _create_here(folder: RunFolder, run: str | None = None) -> Lease:
    """Create the record in the run's folder, also if a start that was cut off has left one."""
    try:
        return create(_local(folder), folder.run_id, run)
    except Conflict:
        record = read_record(_local(folder))
        gone = record is not None and (record.writer is None or is_gone(record.writer))
        if not gone or folder.has_settings():
            raise ConfigError(run_exists(folder)) from None
    (folder.path / NAME).unlink(missing_ok=True)
    return create(_local(folder), folder.run_id, run)


def _is_apart(storage: Storage, folder: RunFolder) -> bool:
    """Return False if the storage is the run's folder itself."""
    place = storage.local_folder
    return place is None or place.resolve() != folder.path.resolve()


def _stored_settings(config: RunConfig, folder: RunFolder, storage: Storage) -> RunConfig | None:
    """Return the settings of the run that the storage keeps; None if it keeps none.

    Raises:
        ConfigError: it keeps another run of the same id.
    """
    stored = storage.read(SETTINGS)
    if read_record(storage) is None:
        if stored is None and not storage.names("checkpoints"):
            return None
        raise ConfigError(
            f"{storage.address} has files of a run {folder.run_id!r} and no {NAME}, so nothing says what "
            "they belong to. Choose another --run-id, or empty that folder."
        )
    if stored is None and not storage.names("checkpoints"):
        return config  # a process ended between the two files of a new run
    if stored is None:
        raise ConfigError(
            f"{storage.address} has checkpoints of run {folder.run_id!r} and no {SETTINGS}, so its "
            "settings are not known. Restore the file, or choose another --run-id."
        )
    found = settings_from_json(stored, f"{storage.address}/{SETTINGS}")
    require_same_run(config, found, folder.run_id)
    return found


def _resume(
    config: RunConfig, folder: RunFolder, say: Callable[[str], None], leases: list[Lease]
) -> RunConfig:
    """Take a run; return its settings so far."""
    storage = run_storage(config, folder)
    before = folder.read_config()
    require_same_run(config, before, folder.run_id)
    if config.train.storage is None and before.train.storage is not None:
        raise ConfigError(
            f"Run {folder.run_id!r} is kept in train.storage={before.train.storage}; expected that "
            "address, or one that keeps the same run. Leave train.storage out to use it."
        )
    if _is_apart(storage, folder):
        if read_record(storage) is None:
            raise ConfigError(
                f"train.storage={config.train.storage} holds nothing of run {folder.run_id!r}, which is "
                "kept there. Is it mounted, and is the address right? Nothing was changed."
            )
        leases.append(take(storage, folder.run_id, say))
    leases.append(take(_local(folder), folder.run_id, say))
    if leases[0].record.run != leases[-1].record.run:
        raise ConfigError(
            f"{storage.address} keeps another run of the id {folder.run_id!r} than {folder.path}. Give "
            "the train.storage that the run was started with, or another --output."
        )
    _require_checkpoint(leases[0].record, storage, folder)
    return before


def _require_checkpoint(record: RunRecord, storage: Storage, folder: RunFolder) -> None:
    """Check that checkpoints are where some should be.

    Raises:
        ConfigError: there is none.
    """
    if record.step is None or CheckpointStore(storage, takings=record.takings).complete():
        return
    raise ConfigError(
        f"{storage.address} has no checkpoint of run {folder.run_id!r}, and had that of step "
        f"{record.step}. Is it mounted, and is the address right? If the checkpoints are gone for "
        "good, start a new run."
    )


def _write_settings(held: HeldRun, config: RunConfig, before: RunConfig | None) -> None:
    """Write the settings to the folder and the storage, and those that changed to the record."""
    if before is not None:
        step = held.record.step or 0
        changes = [Change(step, *change) for change in changed_settings(before, config)]
        if changes:
            held.leases[0].update(settings=(*held.record.settings, *changes))
    text = json.dumps(portable_names(config).to_dict(), indent=2) + "\n"
    if len(held.leases) > 1:
        held.storage.write(SETTINGS, text.encode())
    with held.guard.hold():
        write_atomic(held.folder.path / SETTINGS, text)


def _local(folder: RunFolder) -> Storage:
    return Storage(str(folder.path.resolve()))
