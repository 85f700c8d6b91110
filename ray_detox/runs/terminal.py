"""The progress bar of a terminal, drawn by rich.

Apart from `console.py`, so that rich is imported only when a bar is drawn. rich honours NO_COLOR,
the width of the terminal and an encoding without line-drawing characters.
"""

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

RATE_PERIOD_S = 1800.0
"""Time over which the rate is measured: one PPO step of a large model takes minutes."""


class TerminalBar:
    """One bar at the bottom of the terminal, below the lines that are printed meanwhile.

    Args:
        stream: the terminal.
        total: units of the whole; None draws a bar that only shows the time.
        unit: name of the units, in the plural.
        done: units that an earlier process has done.
    """

    def __init__(self, stream: TextIO, total: int | None, unit: str, done: int) -> None:
        # What is printed may be a model's: no markup, no emoji codes, no highlighting.
        self._console = Console(
            file=stream,
            force_terminal=True,
            force_interactive=True,
            force_jupyter=False,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self._progress = Progress(
            _Margin(),
            BarColumn(bar_width=None),
            _Count(unit),
            _Rate(unit),
            _TimeLeft(),
            console=self._console,
            refresh_per_second=2,
            speed_estimate_period=RATE_PERIOD_S,
            transient=True,
            expand=True,
            # Warnings of libraries would tear the bar; but what goes to a file must get there.
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.start()

    def print(self, text: str) -> None:
        """Print lines above the bar; the terminal breaks those that are too long."""
        self._console.print(Text(text), soft_wrap=True)

    def move_to(self, done: int) -> None:
        """Set the units that are done."""
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self._progress.stop()


class _OneLine(ProgressColumn):
    """A column that is never broken into two lines."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))


class _Margin(_OneLine):
    """The place of the stage's name, which stands in the line above."""

    def render(self, task: Task) -> Text:
        return Text(" " * 8)


class _Count(_OneLine):
    """`12/200 steps`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.completed:,.0f} {self.unit}" if task.completed else "")
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} {self.unit}")


class _Rate(_OneLine):
    """`3.1 prompts/s`, or `6.8 s/step` for slow ones."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        if task.speed >= 1:
            return Text(f"{task.speed:,.1f} {self.unit}/s")
        return Text(f"{1 / task.speed:,.1f} s/{self.unit.removesuffix('s')}")


class _TimeLeft(_OneLine):
    """`1:02:03 left`, or the time so far while nobody can tell."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if left is None:
            return Text(_clock(task.elapsed or 0.0))
        return Text(f"{_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
