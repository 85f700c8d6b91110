r"""The reward in Ray actors, and a worker's way to them.

    worker 0  RewardClient --chunk--> actor 0  ModelThread (classifier + terms)
    worker 1  RewardClient --chunk--> actor 1  ModelThread
                       \--which actors are there, and so much waits here--> RewardDirectory

The driver owns the actors (`stages/pool.py`) and the directory that lists them. A worker hands
over a chunk as soon as it is sampled and goes on sampling, while a thread of its client follows
the rules of `router.py`: where an actor dies or hangs, another scores its chunks, for scoring has
no side effects.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayError, RayTaskError

from ray_detox.config import RunConfig
from ray_detox.records import Pending, RewardError, ScoreRequest
from ray_detox.rewards.router import ActorState, Batch, Call, Router
from ray_detox.stages.errors import last_line
from ray_detox.stages.rewards.actor import RewardActor

__all__ = ["RewardActor", "RewardClient", "RewardError"]

REFRESH_S = 1.0
"""Between two readings of the list of actors."""
TICK_S = 0.1
"""Between two looks at the clock while scores are awaited."""


class RewardClient:
    """A worker's way to the actors; itself a `Scorer`. Its thread ends with `close`."""

    def __init__(self, directory: Any, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._router = Router(config.serving, self._send, self._ping)
        self._name = uuid.uuid4().hex
        self._version = -1
        self._synced_s = 0.0
        self._syncing = False
        self._told_resent = 0
        # Everything that happens goes through here, and only the thread touches the router.
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reward-client", daemon=True)
        self._thread.start()

    def submit(self, request: ScoreRequest) -> Pending:
        """Send a batch to the actors, in chunks."""
        if not self._thread.is_alive():
            raise RewardError("This way to the reward actors was closed. Make another client.")
        batch = Batch(self._config.reward, self._config.serving, request)
        self._events.put(lambda: self._router.submit(batch))
        return batch

    def close(self) -> None:
        """End the thread; whoever still waits for scores gets an error."""
        self._closing = True
        self._events.put(lambda: None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._sync()
                try:
                    event = self._events.get(timeout=TICK_S if self._router.busy else REFRESH_S)
                except queue.Empty:
                    pass
                else:
                    event()
                self._router.tick()
            self._router.abandon(RewardError("The way to the reward actors was closed."))
        except Exception as error:  # such as a Ray that has ended: nobody is to wait for that
            self._router.abandon(error)

    # ---- calls, whose ends come back as events -------------------------------------------------

    def _sync(self) -> None:
        """Read the list of actors every so often, or at once where one failed."""
        now = time.monotonic()
        pause_s = TICK_S if self._router.doubts else REFRESH_S
        if self._syncing or now - self._synced_s < pause_s:
            return
        self._syncing, self._synced_s = True, now
        resent, self._told_resent = self._router.resent - self._told_resent, self._router.resent
        ref = self._directory.sync.remote(self._name, self._version, self._router.waiting, resent)
        self._when_done(ref, self._take_list)

    def _take_list(self, answer: Future[Any]) -> None:
        self._syncing = False
        if answer.exception() is None:  # else the directory restarts, and this list must do
            self._version, listings = answer.result()
            self._router.refresh(listings)

    def _send(self, call: Call) -> None:
        try:
            ref = call.actor.handle.score.remote(call.chunk.request)
        except Exception as error:  # such as a column that cannot be pickled: the caller's to see
            reason = error
            self._events.put(lambda: self._router.failed(call, reason))
        else:
            self._when_done(ref, lambda answer: self._take_answer(call, answer))

    def _take_answer(self, call: Call, answer: Future[Any]) -> None:
        error = answer.exception()
        if error is None:
            self._router.scored(call, *answer.result())
        elif is_lost(error):
            self._router.lost(call, last_line(error))
        else:
            self._router.failed(call, error)

    def _ping(self, actor: ActorState) -> None:
        self._when_done(actor.handle.ping.remote(), lambda answer: self._take_pong(actor, answer))

    def _take_pong(self, actor: ActorState, answer: Future[Any]) -> None:
        error = answer.exception()
        if error is None:
            pong = answer.result()
            self._router.ponged(actor, pong["held"], pong["standstill_s"])
        else:
            self._router.ping_failed(actor, last_line(error))

    def _when_done(self, ref: Any, then: Callable[[Future[Any]], None]) -> None:
        """Have the thread hear of the end of a call; nothing waits for it."""
        ref.future().add_done_callback(lambda answer: self._events.put(lambda: then(answer)))


def is_lost(error: BaseException) -> bool:
    """Whether a call failed with its actor or its node, and not in what it called."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
