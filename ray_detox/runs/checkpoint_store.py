"""Checkpoints of a run in its storage: each whole or passed over, the newest and the best kept.

    ADDRESS/checkpoints/step-00000012/adapter/...        the files that `checkpoint.py` makes
                                      value_head.safetensors  optimiser.safetensors  ...
                                      manifest.json         written last: size and SHA-256 of each

    training --put--> CheckpointWriter (a thread) --save--> CheckpointStore --> folder, s3://, ...

A checkpoint that was cut off has no `manifest.json`, and one that was damaged later does not agree
with it: `newest` passes over both. Writing goes on beside training and never holds it up: where
storage is slower than steps are, only the newest checkpoint waits, in memory.
"""

import hashlib
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_detox.runs.storage import Storage, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "checkpoints"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after some steps, in memory."""

    step: int
    files: Mapping[str, bytes]
    """By name, such as `adapter/adapter_model.safetensors`."""
    objective: float | None = None
    """Score less the price of KL, in units of score, of the step before; None before the first."""


class CheckpointStore:
    """Checkpoints under one address.

    Args:
        storage: of the run.
        keep: newest checkpoints kept; the one with the best objective is kept as well.
    """

    def __init__(self, storage: Storage, keep: int = 2) -> None:
        self.storage = storage
        self.keep = keep
        self._objectives: dict[int, float | None] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and delete those that are no longer kept.

        Raises:
            StorageError: it is not kept; what was there before is.
        """
        folder = _folder(checkpoint.step)
        # What an earlier process left under this step stops being whole before it changes.
        self.storage.delete(f"{folder}/{MANIFEST}")
        for name, content in checkpoint.files.items():
            self.storage.write(f"{folder}/{name}", content)
        about = {
            "step": checkpoint.step,
            "objective": checkpoint.objective,
            "files": {name: _digest(content) for name, content in checkpoint.files.items()},
        }
        self.storage.write(f"{folder}/{MANIFEST}", json.dumps(about, indent=2).encode())
        self._objectives[checkpoint.step] = checkpoint.objective
        self._prune()

    def steps(self) -> list[int]:
        """Steps that a checkpoint was begun for, oldest first; not each need be whole."""
        names = self.storage.names(FOLDER)
        return sorted(int(name[5:]) for name in names if name.startswith("step-"))

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            StorageError: it is not whole.
        """
        folder = _folder(step)
        about = self._about(step)
        if about is None:
            raise StorageError(f"The checkpoint of step {step} was cut off while it was written.")
        files = {}
        for name, expected in about["files"].items():
            content = self.storage.read(f"{folder}/{name}")
            if content is None or _digest(content) != expected:
                size = "missing" if content is None else f"{len(content):,} bytes"
                raise StorageError(
                    f"The checkpoint of step {step} is damaged: {name} is {size}, and not the "
                    f"{expected['bytes']:,} bytes that were written."
                )
            files[name] = content
        return Checkpoint(step, files, about["objective"])

    def newest(self, on_damage: Callable[[str], None] = log.warning) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none.

        Args:
            on_damage: told in a sentence about each that is passed over.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except StorageError as error:
                on_damage(f"{error} It is passed over.")
        return None

    def best(self) -> int | None:
        """The step of the checkpoint with the best objective, of those kept."""
        self._read_objectives()
        known = {step: value for step, value in self._objectives.items() if value is not None}
        return max(known, key=lambda step: (known[step], step)) if known else None

    def _prune(self) -> None:
        best = self.best()
        whole = sorted(self._objectives)
        for step in self.steps():
            newer = sum(other > step for other in whole)
            if newer >= self.keep and step != best:
                self.storage.delete(f"{_folder(step)}/{MANIFEST}")
                self.storage.delete(_folder(step))
                self._objectives.pop(step, None)

    def _read_objectives(self) -> None:
        """Those of checkpoints that an earlier process wrote."""
        for step in self.steps():
            if step not in self._objectives:
                about = self._about(step)
                if about is not None:
                    self._objectives[step] = about["objective"]

    def _about(self, step: int) -> dict[str, Any] | None:
        text = self.storage.read(f"{_folder(step)}/{MANIFEST}")
        try:
            about = json.loads(text or b"null")
            return about if about and about["step"] == step and "files" in about else None
        except (ValueError, KeyError, TypeError):
            return None


class CheckpointWriter:
    """Keeps checkpoints on a thread of its own; the newest one is always at hand in memory.

    Args:
        store: where they go.
        newest: what an earlier process kept, if anything.
        on_event: called on the thread, with a sentence, when writing fails and when it works again.
    """

    RETRY_S = 1.0

    def __init__(
        self,
        store: CheckpointStore,
        newest: Checkpoint | None,
        on_event: Callable[[str], None] = log.warning,
    ) -> None:
        self.store = store
        self.newest = newest
        self.seconds: list[float] = []
        """How long each write took."""
        self._on_event = on_event
        self._waiting: Checkpoint | None = None
        self._problem: str | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write_all, name="checkpoints", daemon=True)
        self._thread.start()

    def put(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint soon; one that still waits to be written gives way to it."""
        with self._changed:
            if self.newest is None or checkpoint.step >= self.newest.step:
                self.newest = self._waiting = checkpoint
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until the newest checkpoint is kept.

        Raises:
            StorageError: it could not be, within `timeout_s`.
        """
        with self._changed:
            if self._changed.wait_for(lambda: self._waiting is None, timeout_s):
                return
            step = self._waiting.step if self._waiting else None
            problem = self._problem or f"{self.store.storage.address} did not answer."
        raise StorageError(
            f"The checkpoint of step {step} could not be kept within {timeout_s:g} s. {problem}"
        )

    def close(self) -> None:
        """End the thread, once it has written what it is writing; without waiting for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed:
                    return
                checkpoint = self._waiting
                assert checkpoint is not None
            began = time.perf_counter()
            try:
                self.store.save(checkpoint)
            except StorageError as error:
                self._say(f"The checkpoint of step {checkpoint.step} is not kept yet. {error}")
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, self.RETRY_S)
                continue
            self.seconds.append(time.perf_counter() - began)
            if self._problem is not None:
                self._say(None)
                self._on_event(f"Checkpoints are kept again, from step {checkpoint.step} on.")
            with self._changed:
                if self._waiting is checkpoint:
                    self._waiting = None
                self._changed.notify_all()

    def _say(self, problem: str | None) -> None:
        """Tell of a problem when it begins, and not with every step that it lasts."""
        began = problem is not None and self._problem is None
        self._problem = problem
        if began and problem is not None:
            self._on_event(problem)


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ---- a folder in memory -------------------------------------------------------------------------


def pack_folder(write: Callable[[Path], None]) -> dict[str, bytes]:
    """The files that `write` puts into an empty folder, by name; the folder is gone again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }


def unpack_folder(files: Mapping[str, bytes], read: Callable[[Path], T]) -> T:
    """What `read` makes of a folder with these files."""
    with tempfile.TemporaryDirectory() as name:
        write_files(files, Path(name))
        return read(Path(name))


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write packed files into a folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
