"""Errors of the Ray stages, and one readable line for each."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_detox.config import ConfigError


class Stopped(Exception):
    """A person asked the run to end early; it left a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        """Steps done."""
        self.signal_number = signal_number
        """Signal with which the person asked."""


class NotStored(RuntimeError):
    """The run is complete, but the result store did not take its result."""


class StageError(RuntimeError):
    """A Ray task failed; the message is its cause, in one line."""


@contextmanager
def flatten_ray_errors() -> Iterator[None]:
    """Turn what failed in Ray, or on the disk, into its cause; Ray's own is a page of traceback."""
    try:
        yield
    except Exception as error:
        ray = sys.modules.get("ray")
        # Some errors of Ray are OSErrors, too: its silence is a TimeoutError.
        if ray is not None and isinstance(error, ray.exceptions.RayError):
            cause = root_cause(error)
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from error
            raise StageError(f"{type(cause).__name__}: {last_line(cause)}") from error
        if isinstance(error, OSError):
            raise StageError(f"{type(error).__name__}: {error}") from error
        raise


def last_line(error: BaseException) -> str:
    """The cause of an error of Ray: its last line; those before say where in Ray it came up."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


class TrainingError(RuntimeError):
    """Training ended with an error; the newest checkpoint is kept."""


def describe(error: BaseException) -> str:
    """What ended a worker group, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        # Those that went on without it fail as well, and say less.
        died = getattr(failure, "health_check_failure", None)
        if died is not None:
            return f"worker {rank} died ({type(died).__name__})"
    for rank, failure in sorted(failures.items()):
        cause = root_cause(failure)
        if "onnection" in str(cause) and "peer" in str(cause):  # in gloo's words, or NCCL's
            return f"worker {rank} lost its connection to another worker"
        return f"worker {rank} failed with {type(cause).__name__}: {last_line(cause)}"
    cause = root_cause(error)
    return f"{type(cause).__name__}: {last_line(cause)}"


def root_cause(error: BaseException) -> BaseException:
    """What an error comes from in the end: Ray wraps it, in the worker and on the way."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return error
