"""Progress of a run, as lines and bars for people.

    stream                     long stage                      lines
    a terminal                 a bar with rate and time left   printed above the bar
    a file, a pipe, a job log  a line now and then             printed and flushed at once

A line is printed when a stage begins and when it ends, and one per PPO step. The bars are in
`terminal.py`, which imports rich; it is loaded when the first bar is drawn. Nothing that a model
or a data set wrote can steer the terminal, and a character that the stream cannot encode is
replaced.
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from ray_detox.runs.printable import encodable, escape_control

if TYPE_CHECKING:
    from ray_detox.records import UpdateStats
    from ray_detox.runs.terminal import TerminalBar


def step_line(stats: "UpdateStats", steps: int, width: int | None = None) -> str:
    """Describe one PPO step in one line, in fixed order and with units.

    Args:
        stats: of the step.
        steps: number of steps of the run.
        width: columns of the terminal; a part that does not fit is left out, the least telling
            one first. None keeps all of them.
    """
    digits = len(str(steps))
    parts = {
        "step": f"step {stats.step:>{digits}}/{steps}",
        "score": f"score {stats.score:+.2f}",
        "toxicity": f"toxicity {stats.toxicity:.2f}",
        "kl": f"kl {round(stats.kl, 2) or 0.0:5.2f} nat",  # not -0.00
        "clip": f"clip {stats.clip_fraction:4.0%}",
        "explained variance": f"explained variance {stats.explained_variance:+.2f}",
        "length": f"length {stats.length:3.0f}",
        "finished": f"finished {stats.finished:4.0%}",
        "seconds": f"{stats.seconds:.1f} s",
    }
    if stats.explained_variance == 0:  # there is no critic
        del parts["explained variance"]
    for name in ("finished", "explained variance", "clip", "length", "score", "kl"):
        if width is None or len(" | ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return " | ".join(parts.values())


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the columns of the terminal behind a stream, or None if there is no terminal.

    `COLUMNS` in the environment goes before the terminal's own size, as in other programs.

    Args:
        stream: None is the standard output.
    """
    stream = stream or sys.stdout
    # A process that was started with its standard output closed has none.
    if stream is None or not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Console:
    """Prints the progress of a run.

    Args:
        stream: where to print; None is the standard output.
        seconds_between: if there is no terminal, shortest time between two lines of a long stage.
        quiet: print nothing.
    """

    def __init__(
        self, stream: TextIO | None = None, seconds_between: float = 10.0, quiet: bool = False
    ) -> None:
        # A process that was started with its standard output closed has none.
        self.stream = stream or sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        # A dumb terminal cannot move its cursor, so it gets lines.
        is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self.is_terminal = self.stream.isatty() and not is_dumb
        self.seconds_between = seconds_between
        self.quiet = quiet
        self.seconds: dict[str, float] = {}
        self._running: dict[str, float] = {}
        """When each stage began that has not ended, on the performance counter."""
        self._drawn: TerminalBar | None = None

    @property
    def width(self) -> int | None:
        """Columns of the terminal, or None if the stream is not one."""
        return terminal_width(self.stream)

    def line(self, text: str = "") -> None:
        """Print one line, or a text of several, now."""
        if self.quiet:
            return
        text = encodable(escape_control(text), self.stream)
        # Read once: another thread, such as the one that keeps checkpoints, may print while this
        # one ends the bar.
        drawn = self._drawn
        try:
            if drawn is not None:
                drawn.print(text)
            else:
                print(text, file=self.stream, flush=True)
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Print nothing more: the terminal was closed, or the program that read the output has ended.

        A run goes on, because everything about it is also in its folder.

        Raises:
            OSError: the stream failed for another reason, such as a full disk.
        """
        if error.errno not in (errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.EBADF):
            raise error
        self.quiet = True
        # What the stream holds back would fail again when it is closed.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        with suppress(OSError, ValueError):
            print(
                "ray-detox: nobody reads the output any more; the command goes on without it.",
                file=sys.stderr,
                flush=True,
            )

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[list[str]]:
        """Announce a stage, and print what is appended to the list when it ends, with its time."""
        self.line(f"{name:<9} {what}")
        self._running[name] = time.perf_counter()
        made: list[str] = []
        try:
            yield made
        finally:
            self.seconds = self.elapsed()
            del self._running[name]
        for text in made:
            self.line(f"{'':<9} {text}")
        self.line(f"{'':<9} done in {self.seconds[name]:.1f} s")

    def elapsed(self) -> dict[str, float]:
        """Return the seconds of each stage so far, also of one that has not ended."""
        now, total = time.perf_counter(), dict(self.seconds)
        for name, began in list(self._running.items()):
            total[name] = total.get(name, 0.0) + now - began
        return total

    @contextmanager
    def bar(
        self, total: int | None, unit: str, done: int = 0, lines: bool = True
    ) -> Iterator["Bar"]:
        """Show how far a long stage is: a bar on a terminal, a line now and then elsewhere.

        Args:
            total: units of the whole stage; None if nobody knows, and then only the time passes.
            unit: name of the units, in the plural.
            done: units that an earlier process has done.
            lines: False if the caller prints lines of its own.
        """
        bar = Bar(self, total, unit, done, lines)
        try:
            yield bar
        finally:
            bar.close()

    def _draw(self, total: int | None, unit: str, done: int) -> "TerminalBar | None":
        if self.quiet or not self.is_terminal or self._drawn is not None:
            return None
        from ray_detox.runs.terminal import TerminalBar

        self._drawn = TerminalBar(self.stream, total, unit, done)
        return self._drawn

    def _erase(self) -> None:
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            try:
                drawn.close()
            except OSError as error:
                self.lose(error)


class Bar:
    """Progress of a long stage; made by `Console.bar`."""

    def __init__(
        self, console: Console, total: int | None, unit: str, done: int = 0, lines: bool = True
    ) -> None:
        self.console, self.total, self.unit, self.done = console, total, unit, done
        self._lines = lines and total is not None
        self._last_line = time.monotonic()
        self._drawn = console._draw(total, unit, done)

    def add(self, count: int) -> None:
        """Count `count` more units as done."""
        self.move_to(self.done + count)

    def move_to(self, done: int) -> None:
        """Set the units that are done; fewer than before if some must be done again."""
        self.done = done
        if self._drawn is not None:
            try:
                self._drawn.move_to(done)
            except OSError as error:
                self.console.lose(error)
        elif self._lines and time.monotonic() - self._last_line > self.console.seconds_between:
            self._last_line = time.monotonic()
            self.console.line(f"{'':<9} {self.done:,}/{self.total:,} {self.unit}")

    def close(self) -> None:
        """Remove the bar."""
        if self._drawn is not None:
            self.console._erase()
            self._drawn = None
