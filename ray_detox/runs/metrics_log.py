"""The metrics of every PPO step on disk: `metrics.jsonl` and TensorBoard files."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.runs.storage import write_atomic

if TYPE_CHECKING:
    from ray_detox.records import UpdateStats
    from ray_detox.rewards.messages import PoolMetrics


class MetricsLog:
    """Writes `metrics.jsonl` and the TensorBoard files of a run.

    A run that resumes from a checkpoint may repeat some steps; their earlier rows are replaced.

    Args:
        folder: the run's own folder.
        hold: returns a context in which the folder may be written to.
    """

    def __init__(
        self, folder: Path, hold: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        from tensorboardX import SummaryWriter  # the writer alone, without torch or TensorFlow

        self.file = folder / "metrics.jsonl"
        self._hold = hold
        rows = read_metrics(self.file)
        self.last_step = max((row["step"] for row in rows), default=0)
        if rows:
            self._rewrite(rows)  # drops the partial line that a killed process left
        self.board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def add(self, stats: "UpdateStats", pool: "PoolMetrics | None" = None) -> None:
        """Store the metrics of a step.

        Args:
            stats: of the step.
            pool: of the reward actors at the end of the step; None if there is no pool.
        """
        step = stats.step
        row = asdict(stats) | ({} if pool is None else {"pool": asdict(pool)})
        if step <= self.last_step:
            self._rewrite([r for r in read_metrics(self.file) if r["step"] < step])
        with self._hold(), self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.last_step = step
        flat = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        for group in ("terms", "pool"):
            flat |= {f"{group}/{name}": value for name, value in row.get(group, {}).items()}
        for name, value in flat.items():
            self.board.add_scalar(name, value, step)

    def complete(self, text: str) -> None:
        """Make the file hold every step once, adding those that it lacks.

        Args:
            text: the lines of `metrics.jsonl` in a checkpoint.
        """
        rows = [json.loads(line) for line in text.splitlines()]
        here = {row["step"]: row for row in read_metrics(self.file)}
        if list(here) != [row["step"] for row in rows]:
            self._rewrite([here.get(row["step"], row) for row in rows])

    def close(self) -> None:
        """Flush to disk."""
        self.board.close()

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._hold():
            write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl; none if there is no file.

    A last line without its end is left out: a process was killed while it wrote it.
    """
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]
