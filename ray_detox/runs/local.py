"""The runtime of training in a single process, without Ray."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ray_detox.records import Objective, UpdateStats
from ray_detox.rl.loop import T
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, pack_folder, unpack_folder
from ray_detox.runs.storage import Storage


class LocalRuntime:
    """A single process: checkpoints go to a folder, metrics to the list `logged`."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.store = CheckpointStore(Storage(str(folder)), keep)
        self.logged: list[UpdateStats] = []

    def sum_over_workers(self, x: Tensor) -> Tensor:
        """Return `x`: there is only one worker."""
        return x

    def log(self, stats: UpdateStats) -> None:
        """Append the metrics of a step to `logged`."""
        self.logged.append(stats)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        objective: Objective | None,
        last: bool,
    ) -> None:
        """Write a checkpoint, and return once it is on disk."""
        self.store.save(Checkpoint(step, pack_folder(write), objective))

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Read the newest complete checkpoint, if there is one."""
        found = self.store.newest()
        return unpack_folder(found.files, read) if found else None

    def should_stop(self) -> bool:
        """Return False: no other process can ask this one to stop."""
        return False
