"""What Ctrl-C, SIGTERM and SIGHUP do in the driver, and that the processes of Ray ignore the last two."""

import io
import signal
import subprocess
import sys

import pytest

from ray_detox import signals
from ray_detox.runs.console import Console

ENDING = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])


@ENDING
def test_an_ending_signal_ends_a_run_as_ctrl_c_does(number):
    before = signal.getsignal(number)

    def wait_as_ray_does():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt) as ended, signals.end_on_signal():
        wait_as_ray_does()

    assert ended.value.args == (number,)
    with pytest.raises(KeyboardInterrupt) as ended, signals.end_on_signal():
        raise KeyboardInterrupt
    assert ended.value.args == ()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_ending_signal_interrupts_nothing(second):
    # As `timeout` sends it: to its child, and then to the group of both. A login shell sends SIGHUP, too.
    printed, ended = io.StringIO(), False
    with signals.stop_on_signal(Console(printed)) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)

    assert stop.event.is_set()
    assert stop.signal_number == signal.SIGTERM
    assert printed.getvalue().count("stopping after this step") == 1

    def work():
        nonlocal ended
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(second)
            ended = True

    with pytest.raises(KeyboardInterrupt), signals.end_on_signal():
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
        signals.end_on_signal(),
        signals.defer_signals(),
    ):
        start_ray()

    assert ended.value.args == (signal.SIGTERM,)
    assert started == (thread == "this")
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


def test_other_exits_while_ray_starts_are_passed_on():
    with pytest.raises(SystemExit, match="no memory"), signals.defer_signals():
        sys.exit("no memory")


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_processes_that_ray_starts_ignore_ending_signals(name):
    with signals.defer_signals():
        child = subprocess.run(["sh", "-c", f"kill -{name} $$"])

    assert child.returncode == 0


def test_nohup_is_respected():
    """`nohup` starts a program that ignores SIGHUP; Ctrl-C and SIGTERM still stop it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.end_on_signal(), signals.stop_on_signal(Console(io.StringIO())) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.event.is_set()
            signal.raise_signal(signal.SIGTERM)
            assert stop.event.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
