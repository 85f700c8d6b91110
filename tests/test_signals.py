"""What Ctrl-C and SIGTERM do in the driver, and that the processes of Ray ignore SIGTERM."""

import io
import signal
import subprocess
import sys

import pytest

from ray_detox import signals
from ray_detox.runs.console import Console


def test_sigterm_ends_a_run_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)

    def wait_as_ray_does():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as ended, signals.end_on_sigterm():
        wait_as_ray_does()

    assert ended.value.args == (signal.SIGTERM,)
    with pytest.raises(KeyboardInterrupt) as ended, signals.end_on_sigterm():
        raise KeyboardInterrupt
    assert ended.value.args == ()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_interrupts_nothing():
    # As `timeout` sends it: to its child, and then to the group of both.
    printed, ended = io.StringIO(), False
    with signals.stop_on_signal(Console(printed)) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    assert stop.event.is_set()
    assert stop.signal_number == signal.SIGTERM
    assert printed.getvalue().count("stopping after this step") == 1

    def work():
        nonlocal ended
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            ended = True

    with pytest.raises(KeyboardInterrupt), signals.end_on_sigterm():
        work()
    assert ended


@pytest.mark.parametrize("thread", ["this", "another"])
def test_sigterm_while_ray_starts_ends_a_run_as_it_does_afterwards(thread):
    before = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    started = False

    def start_ray():
        nonlocal started
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if thread == "another":  # then Python calls the handler here
            sys.exit(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        started = True

    with (
        pytest.raises(KeyboardInterrupt) as ended,
        signals.end_on_sigterm(),
        signals.defer_sigterm(),
    ):
        start_ray()

    assert ended.value.args == (signal.SIGTERM,)
    assert started == (thread == "this")
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


def test_other_exits_while_ray_starts_are_passed_on():
    with pytest.raises(SystemExit, match="no memory"), signals.defer_sigterm():
        sys.exit("no memory")


def test_processes_that_ray_starts_ignore_sigterm():
    with signals.defer_sigterm():
        child = subprocess.run(["sh", "-c", "kill -TERM $$"])

    assert child.returncode == 0
