"""Records that reward actors, the pool, the directory and the workers send one another.

    actor ----- ActorReport ----> pool, worker         pool ------ list of ActorInfo --> directory
    directory - ActorList ------> worker               directory - WorkerLoad ---------> pool
    pool ------ PoolMetrics ----> driver

Most of them cross process borders, and the process of the directory loads neither torch nor
transformers. This module therefore imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ActorHandle = Any
"""Ray's handle of an actor: Ray makes its methods at run time, so no static type fits. In tests of
the router, any object."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """The work of one `ModelThread`, at one moment."""

    texts: int
    """Texts requested and answered so far."""
    passes: int
    """Forward passes so far."""
    held: int
    """Texts requested and not answered yet."""
    queued: int
    """Texts among `held` that the model has not begun."""
    stalled_s: float
    """Seconds since the model last made progress; 0 if it holds no texts."""


@dataclass(frozen=True, slots=True)
class ActorReport:
    """An actor's answer to a ping. The first one also says that the model is loaded."""

    state: ModelState
    """The work of its model."""
    node: str
    """The first 8 digits of its node's id."""
    device: str
    """The classifier's torch device, such as `cpu` or `cuda`."""
    max_tokens: int
    """Longest text that the classifier reads, in tokens."""
    peak_mb: int
    """Highest resident memory of its process so far, in MiB."""


@dataclass(frozen=True, slots=True)
class ActorInfo:
    """One actor, as the pool announces it to the workers."""

    name: str
    """Its name in messages, such as `reward actor 1`; unique within a run."""
    node: str
    """Its node in messages, such as `node 3f29a1c0`."""
    handle: ActorHandle
    """For calls."""
    start: int
    """Number of its process among all that have come up in the pool; -1 before that. A process that
    the pool itself restarted keeps the number."""
    down_reason: str | None = None
    """Why it takes no chunks now, for messages; None while it takes them."""


@dataclass(frozen=True, slots=True)
class ActorList:
    """The directory's answer to a worker."""

    version: int
    """Grows with each change of the list."""
    actors: list[ActorInfo] | None
    """All actors of the pool; None if the worker has this version already."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The directory's answer to the pool: what the workers have reported."""

    waiting: int = 0
    """Texts that wait at the workers now, because no actor has room for them."""
    resent: int = 0
    """Chunks that workers have sent again since the last answer."""
    deaths: int = 0
    """Most deaths of actors in a row that texts of a worker have met; see `Router.deaths`."""


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """The pool in numbers. The last three count from the start of the run."""

    actors: int
    """Actors that are up."""
    wanted: int
    """Actors that there should be."""
    waiting: int
    """Texts that wait at the workers."""
    in_flight: int
    """Texts that actors hold."""
    resent: int
    """Chunks that workers have sent again."""
    restarts: int
    """Actors that died or hung, and that Ray restarted."""
    lost: int
    """Actors that died for good, and that the pool replaced."""
