"""Reward functions that misbehave, for actors to import."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def echo(completions: Sequence[str], facts: Sequence[str], **_: Any) -> list[float]:
    """The length of each completion, and a thousandth of the length of its column `facts`."""
    return [len(c) + len(f) / 1000 for c, f in zip(completions, facts, strict=True)]


def die_once(completions: Sequence[str], marker: Sequence[str], **_: Any) -> list[float]:
    """End the process, the first time that a file of the column `marker` is not there."""
    for name in set(marker) - {""}:
        if not Path(name).exists():
            Path(name).touch()
            os._exit(1)
    return [float(len(c)) for c in completions]


def pause(completions: Sequence[str], seconds: Sequence[float], **_: Any) -> list[float]:
    """Take a while."""
    time.sleep(max(seconds))
    return [float(len(c)) for c in completions]


def hang_once(completions: Sequence[str], hang: Sequence[str], **_: Any) -> list[float]:
    """Stop the process, the first time that a file of the column `hang` is not there.

    The file holds the process's id, for the one who wakes it.
    """
    for name in set(hang) - {""}:
        if not Path(name).exists():
            Path(name).write_text(str(os.getpid()), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGSTOP)
    return [float(len(c)) for c in completions]
