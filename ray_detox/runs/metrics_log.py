"""The metrics of every PPO step on disk: `metrics.jsonl` and TensorBoard files."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.bounded import DamagedError, numbered_lines, parse_object, read_if_there
from ray_detox.errors import ConfigError
from ray_detox.runs.commands import command
from ray_detox.runs.storage import write_atomic

if TYPE_CHECKING:
    from ray_detox.records import UpdateStats
    from ray_detox.rewards.messages import PoolMetrics

log = logging.getLogger(__name__)

Row = dict[str, Any]


class MetricsLog:
    """Writes `metrics.jsonl` and the TensorBoard files of a run.

    A run that resumes from a checkpoint may repeat some steps; their earlier rows are replaced.
    Lines that are damaged are replaced by those of the checkpoint, and a copy of the file is kept.

    Args:
        folder: the run's own folder.
        kept: `metrics.jsonl` of the checkpoint that the run resumes from; empty without one.
        say: called with a message about damaged lines.
        hold: returns a context in which the folder may be written to.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        kept: bytes = b"",
        say: Callable[[str], None] = log.warning,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        from tensorboardX import SummaryWriter  # the writer alone, without torch or TensorFlow

        self.file = folder / "metrics.jsonl"
        self._hold = hold
        self._say = say
        content = read_raw(self.file)
        rows, damaged = self._parse(content)
        if damaged:
            here, there = by_step(rows), by_step(parse_rows(kept)[0])
            rows = [row for _, row in sorted((there | here).items())]
            say(_describe_repair(here.keys(), there.keys(), len(damaged)))
        self.last_step = max((row["step"] for row in rows), default=0)
        # Drops the partial line that a killed process left, and replaces a link, through which rows
        # would be written elsewhere.
        if content or self.file.is_symlink():
            self._rewrite(rows)
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
            self._rewrite([r for r in self._rows() if r["step"] < step])
        with self._hold(), self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.last_step = step
        flat = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        for group in ("terms", "pool"):
            flat |= {f"{group}/{name}": value for name, value in row.get(group, {}).items()}
        for name, value in flat.items():
            self.board.add_scalar(name, value, step)

    def complete(self, kept: bytes) -> None:
        """Make the file hold every step of a checkpoint once, adding those that it lacks.

        Args:
            kept: `metrics.jsonl` of the checkpoint.
        """
        rows, here = parse_rows(kept)[0], by_step(self._rows())
        if list(here) != [row["step"] for row in rows]:
            self._rewrite([here.get(row["step"], row) for row in rows])

    def close(self) -> None:
        """Flush to disk."""
        self.board.close()

    def _rows(self) -> list[Row]:
        return self._parse(read_raw(self.file))[0]

    def _parse(self, content: bytes) -> tuple[list[Row], dict[int, str]]:
        """Parse the file's rows; if lines of it are damaged, say so and keep a copy of the file."""
        rows, damaged = parse_rows(content)
        if damaged:
            copy = self.file.with_name(f"{self.file.name}.damaged")
            with self._hold():
                write_atomic(copy, content)
            self._say(
                f"{self.file.name}: {_join('line', damaged)} cannot be read; {copy.name} keeps the "
                "file as it was"
            )
        return rows, damaged

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._hold():
            write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(file: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl; none if there is no file.

    A last line without its end is left out: a process was killed while it wrote it.

    Raises:
        ConfigError: the file or a line of it is damaged.
    """
    rows, damaged = parse_rows(read_raw(file))
    if damaged:
        reason = next(iter(damaged.values()))
        more = f" ({len(damaged)} lines are damaged)" if len(damaged) > 1 else ""
        raise ConfigError(
            f"{file}: {reason}{more}; expected the metrics of a step. The run takes them from its newest "
            f"checkpoint when it is resumed with `{_resume(file)}`."
        )
    return rows


def _resume(file: Path) -> str:
    return command("run --resume", file.parent.parent, file.parent.name)


def read_raw(file: Path) -> bytes:
    """Return the content of a metrics.jsonl; empty if there is no file.

    Raises:
        ConfigError: it cannot be read, such as a folder of this name.
    """
    try:
        return read_if_there(file) or b""
    except DamagedError as error:
        raise ConfigError(
            f"{file} is damaged: {error}. Move it away: the run takes its metrics from the newest "
            f"checkpoint when it is resumed with `{_resume(file)}`."
        ) from None


def parse_rows(content: bytes) -> tuple[list[Row], dict[int, str]]:
    """Parse the content of a metrics.jsonl.

    Returns:
        The rows that are whole, in the order of the file, and why other lines are not, by number.
    """
    rows, damaged = list[Row](), dict[int, str]()
    whole, _, rest = content.rpartition(b"\n")
    # A killed process leaves the beginning of a row without its end; a crash of the machine, zeros.
    is_partial = rest.startswith(b"{") and b"\0" not in rest
    for number, line in numbered_lines(whole if is_partial else content):
        if not line.strip(b" \t\r"):
            continue
        try:
            rows.append(_row(line, number))
        except DamagedError as error:
            damaged[number] = str(error)
    return rows, damaged


def by_step(rows: Sequence[Row]) -> dict[int, Row]:
    """Return rows by their step; of several rows of one step, the last."""
    return {row["step"]: row for row in rows}


def _row(line: bytes, number: int) -> Row:
    row = parse_object(line, number)
    step = row.get("step")
    if type(step) is not int or step < 1:
        raise DamagedError(f"line {number} has no step, which is a whole number from 1")
    return row


def _describe_repair(here: Set[int], there: Set[int], damaged: int) -> str:
    """Say what becomes of the steps whose lines are damaged.

    Args:
        here: steps in the file.
        there: steps in the checkpoint that the run resumes from.
        damaged: number of damaged lines.
    """
    last = max(there, default=0)
    restored = sorted(there - here)
    lost = [step for step in range(1, last + 1) if step not in here | there]
    parts = []
    if restored:
        parts.append(f"{_join('step', restored)} taken from the checkpoint of step {last}")
    if lost:
        parts.append(f"{_join('step', lost)} lost, which the checkpoint lacks as well")
    if damaged > len(restored) + len(lost):
        parts.append(f"steps after {last} are trained again")
    return f"metrics.jsonl: {'; '.join(parts)}"


def _join(noun: str, numbers: Iterable[int]) -> str:
    """Name some numbers, such as `lines 3, 7`; the first five of many."""
    named = [str(number) for number in numbers]
    shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
    return f"{noun}{'s' if len(named) > 1 else ''} {shown}"
