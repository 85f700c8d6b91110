"""What a person sees while a run goes on, and the same figures on disk.

One line per PPO step, in fixed order, with units; a line when a stage begins and one when it
ends; a bar for a long stage where the terminal can draw one. `metrics.jsonl` and TensorBoard get
every figure under its name in `UpdateStats`.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm


def step_line(stats: Mapping[str, Any], steps: int) -> str:
    """One PPO step for a terminal."""
    width = len(str(steps))
    return (
        f"step {stats['step']:>{width}}/{steps}"
        f" | score {stats['score']:+.2f}"
        f" | toxicity {stats['toxicity']:.2f}"
        f" | kl {stats['kl']:5.2f} nat"
        f" | clip {stats['clip_fraction']:4.0%}"
        f" | value explained {stats['explained_variance']:+.2f}"
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
