"""The runtime of a process by itself: checkpoints in a folder, metrics in a list."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ray_detox.records import UpdateStats
from ray_detox.rl.loop import T
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, pack_folder, unpack_folder
from ray_detox.runs.storage import Storage


class LocalRuntime:
    """One process by itself: checkpoints in a folder, figures in a list."""

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.store = CheckpointStore(Storage(str(folder)), keep)
        self.logged: list[UpdateStats] = []

    def sum_over_workers(self, x: Tensor) -> Tensor:
        """The sum over one worker."""
        return x

    def log(self, stats: UpdateStats) -> None:
        """Remember the figures."""
        self.logged.append(stats)

    def save(
        self, step: int, write: Callable[[Path], None], objective: float | None, last: bool
    ) -> None:
        """Keep a checkpoint at once."""
        self.store.save(Checkpoint(step, pack_folder(write), objective))

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Read the newest checkpoint that is whole, if there is one."""
        found = self.store.newest()
        return unpack_folder(found.files, read) if found else None

    def should_stop(self) -> bool:
        """Nobody asks a process by itself to stop."""
        return False
