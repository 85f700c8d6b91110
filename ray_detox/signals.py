"""Handlers of Ctrl-C and SIGTERM that end a run in order, with a checkpoint if training has begun."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray_detox.runs.console import Console


@dataclass(slots=True)
class StopRequest:
    """Whether a person asked the run to stop, and with which signal."""

    event: threading.Event
    """Set once the run should stop."""
    signal_number: int = signal.SIGINT


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, as Ctrl-C does, with the signal's number.

    Enter it after Ray has connected, because `ray.init` installs a handler of its own.
    """
    # Python lets only the main thread install handlers.
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
        # Ray's calls replace our exception by one of their own, so the number is added here.
        raise KeyboardInterrupt(*received) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_on_signal(console: Console) -> Iterator[StopRequest]:
    """Inside, Ctrl-C and SIGTERM let the step finish; a second Ctrl-C stops at once."""
    stop = StopRequest(threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(number: int, frame: Any) -> None:
        # Only a person repeats Ctrl-C because the step takes too long; a second SIGTERM may come
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
