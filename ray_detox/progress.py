"""What a person sees while a run goes on, and the same figures on disk.

One line per PPO step, in fixed order, with units; a line when a stage begins and one when it
ends; a bar for a long stage where the terminal can draw one. `metrics.jsonl` and TensorBoard get
every figure under its name in `UpdateStats`.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ray_detox.storage import write_whole


def step_line(stats: Mapping[str, Any], steps: int) -> str:
    """One PPO step for a terminal."""
    width = len(str(steps))
    return (
        f"step {stats['step']:>{width}}/{steps}"
        f" | score {stats['score']:+.2f}"
        f" | toxicity {stats['toxicity']:.2f}"
        f" | kl {stats['kl']:5.2f} nat"
        f" | clip {stats['clip_fraction']:4.0%}"
        f" | value explained {stats['value_explained']:+.2f}"
        f" | length {stats['length']:3.0f}"
        f" | {stats['seconds']:.1f} s"
    )


class Console:
    """Prints a run's progress; quiet about everything else.

    Args:
        stream: where to print; None is the standard output.
        seconds_between: without a terminal, a long stage says at most this often how far it is.
    """

    def __init__(self, stream: TextIO | None = None, seconds_between: float = 10.0) -> None:
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self.seconds_between = seconds_between
        self.seconds: dict[str, float] = {}

    def line(self, text: str = "") -> None:
        """Print one line now."""
        print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[list[str]]:
        """Announce a stage, and print what is appended to the list when it ends, with its time."""
        self.line(f"{name:<9} {what}")
        began = time.perf_counter()
        made: list[str] = []
        yield made
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        for text in made:
            self.line(f"{'':<9} {text}")
        self.line(f"{'':<9} done in {self.seconds[name]:.1f} s")

    @contextmanager
    def bar(self, total: int, unit: str) -> Iterator["Bar"]:
        """A bar over `total` units, or a line now and then."""
        bar = Bar(self, total, unit)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """How far a long stage is."""

    def __init__(self, console: Console, total: int, unit: str) -> None:
        self.console, self.total, self.unit, self.done = console, total, unit, 0
        self._said = time.monotonic()
        self._drawn = None
        if console.is_terminal:
            self._drawn = tqdm(total=total, unit=unit, leave=False, file=console.stream)

    def add(self, count: int) -> None:
        """`count` more units are done."""
        self.done += count
        if self._drawn is not None:
            self._drawn.update(count)
        elif time.monotonic() - self._said > self.console.seconds_between:
            self._said = time.monotonic()
            self.console.line(f"{'':<9} {self.done:,}/{self.total:,} {self.unit}")

    def close(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            self._drawn.close()


class MetricsLog:
    """`metrics.jsonl` and TensorBoard files of a run.

    A run that goes on from a checkpoint may do some steps again; their earlier rows are replaced.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter  # the writer alone, without torch or TensorFlow

        self.file = folder / "metrics.jsonl"
        rows = read_metrics(self.file)
        self.last_step = max((row["step"] for row in rows), default=0)
        if rows:
            self._rewrite(rows)  # without what a process that was killed left of a line
        self.board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def add(self, stats: Mapping[str, Any]) -> None:
        """Store the figures of a step."""
        if stats["step"] <= self.last_step:
            self._rewrite([r for r in read_metrics(self.file) if r["step"] < stats["step"]])
        with self.file.open("a") as file:
            file.write(json.dumps(dict(stats)) + "\n")
        self.last_step = stats["step"]
        flat = {k: v for k, v in stats.items() if isinstance(v, int | float) and k != "step"}
        for group in ("terms", "pool"):
            flat |= {f"{group}/{name}": value for name, value in stats.get(group, {}).items()}
        for name, value in flat.items():
            self.board.add_scalar(name, value, stats["step"])

    def complete(self, text: str) -> None:
        """See that every step of `text`, the lines that a checkpoint has, is there once."""
        rows = [json.loads(line) for line in text.splitlines()]
        here = {row["step"]: row for row in read_metrics(self.file)}
        if list(here) != [row["step"] for row in rows]:
            self._rewrite([here.get(row["step"], row) for row in rows])

    def close(self) -> None:
        """Flush to disk."""
        self.board.close()

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_whole(self.file, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; none where there is no file.

    A last line that was cut off, by a process that was killed while it wrote, is no row yet.
    """
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]
