"""Handlers for Ctrl-C and SIGTERM that stop a run cleanly, with a checkpoint if it is training."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray_detox.runs.console import Console


@dataclass(slots=True)
class StopRequest:
    """Whether the user stopped the run, and with which signal."""

    event: threading.Event
    """Set once the run should stop."""
    signal_number: int = signal.SIGINT


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does, with the signal's number.

    Enter it after Ray has connected, because `ray.init` installs its own handler.
    """
    # Python allows only the main thread to install handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[int] = []

    def end(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        # Ray replaces the exception with a new one, so the number is added here.
        raise KeyboardInterrupt(*received) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signal(console: Console) -> Iterator[StopRequest]:
    """Make Ctrl-C and SIGTERM stop after the current step, and a second Ctrl-C at once."""
    stop = StopRequest(threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(number: int, frame: Any) -> None:
        # A user repeats Ctrl-C because the step takes too long; a second SIGTERM may come
        # from a supervisor that waits for the checkpoint as well.
        if stop.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal_number = number
        stop.event.set()
        console.line(f"{'':<9} stopping after this step, with a checkpoint (again to stop at once)")

    before = {
        number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
