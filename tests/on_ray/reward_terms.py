"""Reward functions for tests of the reward actors, which import them: some fail or hang on demand."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def echo(completions: Sequence[str], facts: Sequence[str], **_: Any) -> list[float]:
    """Return the length of each completion plus a thousandth of the length of its column `facts`."""
    return [len(c) + len(f) / 1000 for c, f in zip(completions, facts, strict=True)]


def die_once(completions: Sequence[str], marker: Sequence[str], **_: Any) -> list[float]:
    """Exit the process if a file named in the column `marker` does not exist; create that file first."""
    for name in set(marker) - {""}:
        if not Path(name).exists():
            Path(name).touch()
            os._exit(1)
    return [float(len(c)) for c in completions]


class Mortal:
    """Exits the process from call number `calls` on; the calls of all processes count together."""

    def __init__(self, file: str, calls: int) -> None:
        self.file, self.calls = Path(file), calls

    def __call__(self, completions: Sequence[str], **_: Any) -> list[float]:
        with self.file.open("ab") as file:
            file.write(b".")
        if self.file.stat().st_size > self.calls:
            os._exit(1)
        return [float(len(c)) for c in completions]


def pause(completions: Sequence[str], seconds: Sequence[float], **_: Any) -> list[float]:
    """Sleep for the longest time in the column `seconds`."""
    time.sleep(max(seconds))
    return [float(len(c)) for c in completions]


def hang_once(completions: Sequence[str], hang: Sequence[str], **_: Any) -> list[float]:
    """Stop the process with SIGSTOP if a file named in the column `hang` does not exist.

    The new file then holds the process's id, so that the test can send SIGCONT.
    """
    for name in set(hang) - {""}:
        if not Path(name).exists():
            Path(name).write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGSTOP)
    return [float(len(c)) for c in completions]
