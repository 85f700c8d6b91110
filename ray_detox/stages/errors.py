"""Errors of the Ray stages, and their conversion to one-line messages.

Ray's error (a page of traceback, wrapped in the worker and on the way) --root_cause-->
the original error --last_line--> one line --> ConfigError or StageError
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_detox.config import ConfigError
from ray_detox.rewards.functions import failure_of
from ray_detox.runs.lease import LeaseLost


class Stopped(Exception):
    """The user stopped the run early; its newest checkpoint is kept."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        """Steps done."""
        self.signal_number = signal_number
        """Signal that stopped the run."""


class NotStored(RuntimeError):
    """The run is complete, but its result could not be stored."""


class StageError(RuntimeError):
    """A Ray task or the disk failed; the message is the cause in one line."""


@contextmanager
def flatten_ray_errors() -> Iterator[None]:
    """Convert errors of Ray and the disk to errors with a one-line message.

    Raises:
        ConfigError, LeaseLost: the cause is one, such as one that a task raised on its node.
        StageError: any other error of Ray, or an OSError.
    """
    try:
        yield
    except Exception as error:
        # Not imported here: if Ray was never imported, the error cannot come from Ray.
        ray = sys.modules.get("ray")
        # Ray's errors first, because some are OSErrors as well, such as its TimeoutError.
        if ray is not None and isinstance(error, ray.exceptions.RayError):
            cause = root_cause(error)
            if isinstance(cause, ConfigError | LeaseLost):
                raise type(cause)(str(cause)) from error
            raise StageError(f"{type(cause).__name__}: {last_line(cause)}") from error
        if isinstance(error, OSError):
            raise StageError(f"{type(error).__name__}: {error}") from error
        raise


def last_line(error: BaseException) -> str:
    """Return the last line of an error of Ray; the lines before it are the traceback inside Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


class TrainingError(RuntimeError):
    """Training failed; the newest checkpoint is kept."""


class TrainingDiverged(TrainingError):
    """The policy has diverged; checkpoints of earlier steps are kept, the best one among them."""


def describe(error: BaseException) -> str:
    """Describe in one line why a worker group ended."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        # The worker that died first: the others only report that they lost their connection.
        died = getattr(failure, "health_check_failure", None)
        if died is not None:
            return f"worker {rank} died ({type(died).__name__})"
    for rank, failure in sorted(failures.items()):
        cause = root_cause(failure)
        if "onnection" in str(cause) and "peer" in str(cause):  # the wording of gloo and of NCCL
            return f"worker {rank} lost its connection to another worker"
        return f"worker {rank} failed with {type(cause).__name__}: {last_line(cause)}"
    cause = root_cause(error)
    return f"{type(cause).__name__}: {last_line(cause)}"


def permanent_failure(error: BaseException) -> tuple[str, str] | None:
    """Return why another worker group would fail in the same way, and a traceback for the user, if it would.

    The same step sees the same texts again, so a reward function fails again, unless it could not reach
    something (an OSError, such as one of the network). So does what a setting is the reason for.
    """
    failures = list((getattr(error, "worker_failures", None) or {}).values()) or [error]
    for cause in map(root_cause, failures):
        if isinstance(cause, ConfigError):
            return last_line(cause), ""
        failure = failure_of(cause)
        if failure is not None and not isinstance(cause, OSError):
            where = f" ({failure.where})" if failure.where else ""
            reason = f"{type(cause).__name__}: {last_line(cause)}"
            return f"the reward term {failure.term} failed with {reason}{where}", failure.traceback
    return None


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost cause of an error: Ray wraps it in the worker and again on the way."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return error
