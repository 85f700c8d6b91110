"""Ctrl-C and SIGTERM: end a run in order, with a checkpoint when there is something to keep."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray_detox.runs.console import Console


@dataclass(slots=True)
class _Stop:
    event: threading.Event
    signal_number: int = signal.SIGINT


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the run as Ctrl-C does, in its order and with its sentence.

    Set once Ray is connected, for Ray sets a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked: list[int] = []

    def end(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        # Ray's calls raise one of their own in its place, so the signal is told here.
        raise KeyboardInterrupt(*asked) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signal(console: Console) -> Iterator[_Stop]:
    """Inside, Ctrl-C and SIGTERM ask for a checkpoint first; a second Ctrl-C does not wait."""
    stop = _Stop(threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal_number = number
        stop.event.set()
        console.line(f"{'':<9} stopping after this step, with a checkpoint (again to stop at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
