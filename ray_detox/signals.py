"""Handlers for Ctrl-C, SIGTERM and SIGHUP that stop a run cleanly, with a checkpoint if it is training.

SIGHUP is what a terminal sends that is closed, and a connection that is lost. It is handled as SIGTERM,
unless it was ignored when the process started, as `nohup` does.
"""

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


def _ending_signals() -> set[signal.Signals]:
    """Return the signals that end a run as SIGTERM does."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is None or signal.getsignal(hang_up) == signal.SIG_IGN:
        return {signal.SIGTERM}
    return {signal.SIGTERM, hang_up}


@contextmanager
def end_on_signal() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, with the signal's number."""
    if not _can_install_handlers():
        yield
        return

    received: list[int] = []

    def end(number: int, frame: Any) -> None:
        received.append(number)
        # `timeout` sends it twice, a shell adds SIGHUP, and the second one must not interrupt the
        # regular end.
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    for number in _ending_signals():
        before[number] = signal.signal(number, end)
    try:
        yield
    except KeyboardInterrupt:
        # Ray replaces the exception with a new one, so the number is added here.
        raise KeyboardInterrupt(*received) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Around `ray.init`: SIGTERM and SIGHUP wait for the end, and processes that start inside ignore them.

    `ray.init` replaces the handler of SIGTERM. At the end, the one from before is in place again.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # A process inherits the signals that the thread which starts it has blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ending_signals())
    try:
        yield
    except SystemExit as error:
        # From Ray's handler: another thread, which has not blocked the signal, received it.
        if error.code != signal.SIGTERM:
            raise
        signal.raise_signal(signal.SIGTERM)
    finally:
        if _can_install_handlers():
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def stop_on_signal(console: Console) -> Iterator[StopRequest]:
    """Make Ctrl-C, SIGTERM and SIGHUP stop after the current step, and a second Ctrl-C at once."""
    stop = StopRequest(threading.Event())
    if not _can_install_handlers():
        yield stop
        return

    def request_stop(number: int, frame: Any) -> None:
        # A user repeats Ctrl-C because the step takes too long; a second SIGTERM may come
        # from a supervisor that waits for the checkpoint as well.
        if stop.event.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop.signal_number = number
        stop.event.set()
        console.line(f"{'':<9} stopping after this step, with a checkpoint (again to stop at once)")

    before = {
        number: signal.signal(number, request_stop)
        for number in (signal.SIGINT, *_ending_signals())
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _can_install_handlers() -> bool:
    """Return whether this is the main thread: Python allows only that one to install handlers."""
    return threading.current_thread() is threading.main_thread()
