"""Checkpoints of a run in its storage: complete or ignored; the newest and the best are kept.

    ADDRESS/checkpoints/step-00000012/adapter/...        the files of `rl/checkpoint.py`
                                      value_head.safetensors  optimiser.safetensors  ...
                                      manifest.json         written last: size and SHA-256 of each
                        step-00000013.2/...                 of the second process that took the run

No two takings of a run (`lease.py`) write the same file. What a process wrote after another one had
taken the run does not count.

    training --put--> CheckpointWriter (a thread) --save--> CheckpointStore --> folder, s3://, ...

States of a checkpoint in the storage:

    writing --manifest.json written--> complete --newer ones exist, not the best--> pruned
       |                                  |
       '--process or storage fails:       |--a file changes: its size or SHA-256 differs
          incomplete, ignored             |  from the manifest, so it is damaged and ignored
                                          '--its process had lost the run: ignored

The writer never delays training: if the storage is slower than the steps, only the newest checkpoint
and the last measured one before it wait, in memory.
"""

import hashlib
import json
import logging
import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ray_detox.bounded import DamagedError, parse
from ray_detox.errors import first_line
from ray_detox.records import Objective
from ray_detox.runs.lease import LeaseLost
from ray_detox.runs.record import Taking
from ray_detox.runs.storage import Storage, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 16 << 30
"""Maximum size of a checkpoint's file; a LoRA's optimiser has a thousandth of it."""
FILE_NAMES = frozenset(
    {
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "value_head.safetensors",
        "optimiser.safetensors",
        "metrics.jsonl",
        "state.json",
    }
)
"""Files that `rl/checkpoint.py` writes. A manifest may come from elsewhere, and names in it are paths:
one with any other name is not valid."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of training after some steps, in memory."""

    step: int
    files: Mapping[str, bytes]
    """Contents by name, such as `adapter/adapter_model.safetensors`."""
    objective: Objective | None = None
    """On the run's probe prompts; None if not measured."""


class DamagedCheckpoint(StorageError):
    """A checkpoint is not what was written; reading it again would not help."""


class _Name(NamedTuple):
    """The name of a checkpoint's folder."""

    step: int
    token: int
    """Of the taking that wrote it."""

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.token}" if self.token > 1 else "")


class CheckpointStore:
    """Writes, reads and prunes the checkpoints of one run.

    Args:
        storage: of the run.
        keep: number of newest checkpoints to keep, beside the one with the best objective.
        takings: of the run, the last one by this process if it writes; none if only one process can
            know the storage.
    """

    def __init__(self, storage: Storage, keep: int = 2, takings: Sequence[Taking] = ()) -> None:
        self.storage = storage
        self.keep = keep
        self.takings = tuple(takings)
        self.token = max((taking.token for taking in takings), default=1)
        self._objectives: dict[int, Objective | None] = {}
        """Of the complete checkpoints, by step."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then delete those that need not be kept.

        Raises:
            StorageError: the checkpoint was not written; earlier checkpoints are still there.
        """
        unknown = checkpoint.files.keys() - FILE_NAMES
        assert not unknown, f"no reader accepts a checkpoint with {sorted(unknown)}"
        folder = f"{FOLDER}/{_Name(checkpoint.step, self.token)}"
        # An earlier process may have left a checkpoint of this step. Without its manifest it is
        # incomplete, so no reader takes a mixture of old and new files for a checkpoint.
        self.storage.delete(f"{folder}/{MANIFEST}")
        for name, content in checkpoint.files.items():
            self.storage.write(f"{folder}/{name}", content)
        about = {
            "step": checkpoint.step,
            "objective": None if checkpoint.objective is None else asdict(checkpoint.objective),
            "files": {name: _digest(content) for name, content in checkpoint.files.items()},
        }
        # Last: the manifest is what makes a checkpoint complete.
        self.storage.write(f"{folder}/{MANIFEST}", json.dumps(about, indent=2).encode())
        self._objectives[checkpoint.step] = checkpoint.objective
        # After the write, so that at every moment at least `keep` checkpoints are complete.
        self._prune()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, complete or not, oldest first."""
        return sorted({name.step for name in self._names()})

    def _names(self, counting: bool = True) -> list[_Name]:
        """Return the names of the checkpoints, oldest first.

        Args:
            counting: False returns those that do not count, see `Taking`.
        """
        parsed = map(_parse_name, self.storage.folders(FOLDER))
        names = sorted(name for name in parsed if name is not None)
        return [name for name in names if self._counts(name) == counting]

    def _counts(self, name: _Name) -> bool:
        return all(t.token <= name.token or t.step >= name.step for t in self.takings)

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step, and compare its files with the manifest.

        Raises:
            DamagedCheckpoint: it is incomplete or damaged.
            StorageError: it cannot be read.
        """
        found = [name for name in self._names() if name.step == step]
        problem = f"The checkpoint of step {step} is incomplete: it has no valid manifest."
        for name in reversed(found):  # the latest taking first
            try:
                return self._load(name)
            except DamagedCheckpoint as error:
                problem = str(error)
        raise DamagedCheckpoint(problem)

    def _load(self, name: _Name) -> Checkpoint:
        step, folder = name.step, f"{FOLDER}/{name}"
        about = self._read_manifest(name)
        if about is None:
            raise DamagedCheckpoint(
                f"The checkpoint of step {step} is incomplete: it has no valid manifest."
            )
        unknown = sorted(about["files"].keys() - FILE_NAMES)
        if unknown:
            raise DamagedCheckpoint(
                f"The checkpoint of step {step} is damaged or not one of ray-detox: its manifest names "
                f"the file {unknown[0][:80]!r}."
            )
        files = {}
        for file, expected in about["files"].items():
            # One byte more than expected is enough to see that a file is too large.
            content = self.storage.read_start(f"{folder}/{file}", expected["bytes"] + 1)
            if content is None or _digest(content) != expected:
                size = "missing" if content is None else f"{len(content):,} bytes"
                if content is not None and len(content) > expected["bytes"]:
                    size = "larger"
                raise DamagedCheckpoint(
                    f"The checkpoint of step {step} is damaged: {file} is {size}, not the "
                    f"{expected['bytes']:,} bytes that were written."
                )
            files[file] = content
        return Checkpoint(step, files, _objective(about))

    def newest(self, on_damage: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None.

        Args:
            on_damage: called with a message for each checkpoint that is ignored.

        Raises:
            StorageError: the storage cannot be read: which checkpoint is the newest is not known.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except DamagedCheckpoint as error:
                on_damage(f"{error} The run ignores it.")
        return None

    def complete(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        self._read_objectives()
        return sorted(self._objectives)

    def best(self) -> int | None:
        """Return the step of the kept checkpoint with the best objective; the later if equal.

        Only checkpoints with the objective key of the newest measured one compete: a run that was
        resumed with another KL coefficient or reward measures on another scale.
        """
        self._read_objectives()
        known = {
            step: objective
            for step, objective in self._objectives.items()
            if objective is not None and math.isfinite(objective.value)
        }
        if not known:
            return None
        current = known[max(known)].key
        return max((one.value, step) for step, one in known.items() if one.key == current)[1]

    def is_measured(self) -> bool:
        """Whether an objective was measured for any complete checkpoint, finite or not."""
        self._read_objectives()
        return any(objective is not None for objective in self._objectives.values())

    def _prune(self) -> None:
        best = self.best()
        complete = sorted(self._objectives)
        for name in self._names():
            # Only complete checkpoints count as newer: an incomplete one replaces none.
            newer = sum(other > name.step for other in complete)
            if newer >= self.keep and name.step != best:
                self._delete(name)
                self._objectives.pop(name.step, None)
        for name in self._names(counting=False):
            self._delete(name)

    def _delete(self, name: _Name) -> None:
        if name.token > self.token:  # this process has lost the run
            return
        # The manifest first: a deletion that is cut off leaves an incomplete checkpoint, not one that
        # looks damaged.
        self.storage.delete(f"{FOLDER}/{name}/{MANIFEST}")
        self.storage.delete(f"{FOLDER}/{name}")

    def _read_objectives(self) -> None:
        """Read the objectives of checkpoints that an earlier process wrote."""
        for name in self._names():
            if name.step not in self._objectives:
                about = self._read_manifest(name)
                if about is not None:
                    self._objectives[name.step] = _objective(about)

    def _read_manifest(self, name: _Name) -> dict[str, Any] | None:
        """Return the manifest of a checkpoint; None if it is missing or not valid."""
        text = self.storage.read_start(f"{FOLDER}/{name}/{MANIFEST}", MAX_MANIFEST_BYTES)
        try:
            about = parse(text or b"null")  # one that was cut short is not valid
        except DamagedError:
            return None
        return about if _is_manifest(about, name.step) else None


def _objective(manifest: Mapping[str, Any]) -> Objective | None:
    """Return the objective in a valid manifest."""
    stored = manifest["objective"]
    return None if stored is None else Objective(**stored)


class CheckpointWriter:
    """Writes checkpoints on a background thread; keeps the newest one in memory.

    A failed write is repeated until it succeeds or a newer checkpoint takes its place, see `put`.
    No error of the store ends the thread: later checkpoints would be lost without a word.

    Args:
        store: writes them.
        newest: newest checkpoint of an earlier process, if there is one.
        on_event: called on the thread with a message when writing fails and when it works again.
        on_saved: called on the thread with the step of a checkpoint that is in the storage.
    """

    RETRY_S = 1.0
    """Pause after a failed write."""

    def __init__(
        self,
        store: CheckpointStore,
        newest: Checkpoint | None,
        on_event: Callable[[str], None] = log.warning,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.store = store
        self.newest = newest
        self.seconds: list[float] = []
        """Duration of each write."""
        self._on_event = on_event
        self._on_saved = on_saved
        self._lost: LeaseLost | None = None
        self._waiting: list[Checkpoint] = []
        """Oldest first; the first one is being written."""
        self._unwritten: dict[int, float] = {}
        """When each step came that is newer than all written ones, in seconds of the monotonic clock,
        oldest first: also of those that a newer one has replaced."""
        self._problem: str | None = None
        """Why the last write failed."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="checkpoints", daemon=True)
        self._thread.start()

    def put(self, checkpoint: Checkpoint) -> None:
        """Hand over a checkpoint, and return at once.

        It replaces those that still wait, except the last measured one, which may be the best.

        Raises:
            LeaseLost: another process has taken the run.
        """
        with self._changed:
            self._check()
            # An older one may arrive late, from a worker group that was cut off. Its steps have been
            # repeated, and it must not replace a newer one.
            if self.newest is None or checkpoint.step >= self.newest.step:
                measured = [c for c in self._waiting if c.objective is not None]
                if checkpoint.objective is None:
                    self._waiting = [*measured[-1:], checkpoint]
                else:
                    self._waiting = [checkpoint]
                self.newest = checkpoint
                self._unwritten.setdefault(checkpoint.step, time.monotonic())
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until the newest checkpoint is in the storage.

        Raises:
            StorageError: it is not after `timeout_s`.
            LeaseLost: another process has taken the run.
        """
        with self._changed:
            done = lambda: not self._waiting or self._lost is not None
            if self._changed.wait_for(done, timeout_s):
                self._check()
                return
            step = self._waiting[-1].step
        raise StorageError(
            f"The checkpoint of step {step} could not be kept within {timeout_s:g} s. {self._reason}"
        )

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def check_unwritten(self, warning_s: float, max_s: float | None) -> str | None:
        """Return a warning if checkpoints have not been written for long, or else None.

        Args:
            warning_s: seconds since the oldest unwritten one came after which to warn.
            max_s: seconds after which to give up; None never does.

        Raises:
            StorageError: checkpoints have not been written for more than `max_s`.
            LeaseLost: another process has taken the run.
        """
        with self._changed:
            self._check()
            if not self._unwritten:
                return None
            step, since = next(iter(self._unwritten.items()))
        waited_s = time.monotonic() - since
        if max_s is not None and waited_s > max_s:
            raise StorageError(
                f"For {waited_s:,.0f} s, longer than train.max_unsaved_s={max_s:g}, the checkpoints "
                f"from step {step} on could not be kept. {self._reason} Resume the run once the "
                "storage works."
            )
        if waited_s > warning_s:
            return (
                f"The checkpoints from step {step} on are not kept yet, after {waited_s:,.0f} s. "
                f"{self._reason}"
            )
        return None

    @property
    def _reason(self) -> str:
        return self._problem or f"{self.store.storage.address} did not answer."

    def close(self) -> None:
        """End the thread after the current write, without waiting for it.

        A write to storage that does not answer may never return, and must not keep the run alive.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                checkpoint = self._waiting[0]
            began = time.perf_counter()
            try:
                self.store.save(checkpoint)
                self._on_saved(checkpoint.step)
            except LeaseLost as error:
                with self._changed:
                    self._lost = error
                    self._changed.notify_all()
                return
            except Exception as error:
                reason = str(error)
                if not isinstance(error, StorageError):
                    reason = f"{type(error).__name__}: {first_line(error)}."
                began, self._problem = self._problem is None, reason
                if began:  # not at every retry
                    self._on_event(
                        f"The checkpoint of step {checkpoint.step} is not written yet. {reason}"
                    )
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, self.RETRY_S)
                continue
            self.seconds.append(time.perf_counter() - began)
            if self._problem is not None:
                self._problem = None
                self._on_event(f"Checkpoints are written again, from step {checkpoint.step} on.")
            with self._changed:
                # A newer checkpoint may have arrived during the write; then it still waits.
                self._waiting = [c for c in self._waiting if c is not checkpoint]
                self._unwritten = {s: t for s, t in self._unwritten.items() if s > checkpoint.step}
                self._changed.notify_all()


def _parse_name(text: str) -> _Name | None:
    """Return the parts of a checkpoint's name; None if no checkpoint has this name."""
    found = re.fullmatch(r"step-([0-9]{8,})(?:\.([0-9]+))?", text)
    if found is None:
        return None
    name = _Name(int(found[1]), int(found[2] or 1))
    return name if str(name) == text else None


def _is_manifest(about: Any, step: int) -> bool:
    """Return whether parsed JSON has the values and types that `CheckpointStore.save` writes."""
    # `type(x) is int`, because True is an int as well.
    return (
        isinstance(about, dict)
        and type(about.get("step")) is int
        and about["step"] == step
        and _is_objective(about.get("objective", ""))
        and isinstance(about.get("files"), dict)
        and all(
            isinstance(digest, dict)
            and digest.keys() == {"bytes", "sha256"}
            and type(digest["bytes"]) is int
            and 0 <= digest["bytes"] <= MAX_FILE_BYTES
            and isinstance(digest["sha256"], str)
            for digest in about["files"].values()
        )
    )


def _is_objective(stored: Any) -> bool:
    return stored is None or (
        isinstance(stored, dict)
        and stored.keys() == {"value", "key"}
        and isinstance(stored["value"], float)
        and isinstance(stored["key"], str)
    )


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ---- folders in memory --------------------------------------------------------------------------


def pack_folder(write: Callable[[Path], None]) -> dict[str, bytes]:
    """Call `write` with an empty temporary folder, and return its files by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the files of an adapter's folder, by name."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file() and f"adapter/{file.name}" in FILE_NAMES
    }


def unpack_folder(files: Mapping[str, bytes], read: Callable[[Path], T]) -> T:
    """Write files to a temporary folder, and return the result of `read` on it."""
    with tempfile.TemporaryDirectory() as name:
        write_files(files, Path(name))
        return read(Path(name))


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write packed files to a folder.

    Raises:
        DamagedError: a name leads out of the folder, also by a link in it; nothing is written then.
    """
    for name in files:
        if not all(re.fullmatch(r"[\w-][\w.-]*", part, re.ASCII) for part in name.split("/")):
            raise DamagedError(f"{name[:80]!r} is not the name of a file in a checkpoint")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise DamagedError(f"{name[:80]!r} leads out of {folder}")
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def adapter_files(checkpoint: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the adapter's files of a packed checkpoint, by their names in the adapter's folder.

    Without peft's model card, in which nothing is filled in; `runs/card.py` writes another one.
    """
    prefix = "adapter/"
    names = [
        name for name in checkpoint if name.startswith(prefix) and not name.endswith("/README.md")
    ]
    return {name.removeprefix(prefix): checkpoint[name] for name in names}
