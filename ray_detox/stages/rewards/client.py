r"""A worker's way to the reward actors.

    worker 0  RewardClient --chunk--> actor 0  ModelThread (classifier + terms)
    worker 1  RewardClient --chunk--> actor 1  ModelThread
                       \--list of actors, waiting texts--> RewardDirectory

The driver owns the actors (`pool.py`) and the directory that lists them. A worker submits a chunk
of responses as soon as it has sampled them and goes on sampling, while a thread of its client
follows the rules of `rewards/router.py`. If an actor dies or hangs, another one scores its chunks:
scoring has no side effects, so that scoring a chunk again is always safe.

    caller's thread ---- submit ----.
    Ray's threads ------ answers ---+--> queue of events --> client's thread --> Router
    clock -------------- tick ------'                              '--- calls, pings --> actors
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from ray_detox.config import RunConfig
from ray_detox.records import Pending, RewardError, ScoreRequest, Scores
from ray_detox.rewards.messages import ActorHandle, ActorList, ActorReport
from ray_detox.rewards.router import ActorState, Batch, Call, Router
from ray_detox.stages.errors import last_line
from ray_detox.stages.rewards.actor import RewardActor

__all__ = ["RewardActor", "RewardClient", "RewardError"]

REFRESH_S = 1.0
"""Time between two reports to the directory, each of which returns the list of actors."""
TICK_S = 0.1
"""Time between two checks of the clock while a caller waits for scores."""

T = TypeVar("T")


class RewardClient:
    """A worker's way to the reward actors; itself a `Scorer`. `close` ends its thread.

    Args:
        directory: handle of the pool's `RewardDirectory`.
        config: of the run.
    """

    def __init__(self, directory: ActorHandle, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._router = Router(config.serving, self._send, self._ping)
        # For the directory, which keeps one report per client; a process may have several clients.
        self._name = uuid.uuid4().hex
        self._version = -1
        self._synced_s = 0.0
        self._syncing = False
        self._reported_resent = 0
        # The router has no locks: every event goes through this queue, and only the client's
        # thread touches the router.
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reward-client", daemon=True)
        self._thread.start()

    def submit(self, request: ScoreRequest) -> Pending:
        """Send a batch to the actors, in chunks, without waiting for its scores."""
        if not self._thread.is_alive():
            raise RewardError("This client of the reward actors is closed. Create another one.")
        # Cut into chunks in the caller's thread: the client's thread stays free for events.
        batch = Batch(self._config.reward, self._config.serving, request)
        self._events.put(lambda: self._router.submit(batch))
        return batch

    def close(self) -> None:
        """End the thread; callers that still wait for scores get an error."""
        self._closing = True
        self._events.put(lambda: None)  # wakes the thread at once
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._sync()
                try:
                    # Without open batches no deadline can pass and no actor is due to answer.
                    event = self._events.get(timeout=TICK_S if self._router.busy else REFRESH_S)
                except queue.Empty:
                    pass
                else:
                    event()
                self._router.tick()
            self._router.abandon(RewardError("The client of the reward actors was closed."))
        except Exception as error:  # such as a Ray that has ended: a caller must not wait for it
            self._router.abandon(error)

    # ---- calls to the directory and to actors: each end comes back as an event -------------------

    def _sync(self) -> None:
        """Report to the directory every second, or within a tick if an actor has failed."""
        now = time.monotonic()
        pause_s = TICK_S if self._router.membership_stale else REFRESH_S
        # One open report at a time: those to a directory that restarts would only pile up.
        if self._syncing or now - self._synced_s < pause_s:
            return
        self._syncing, self._synced_s = True, now
        resent = self._router.resent - self._reported_resent
        self._reported_resent = self._router.resent
        ref: ObjectRef[ActorList] = self._directory.sync.remote(
            self._name, self._version, self._router.waiting, resent, self._router.deaths
        )
        self._when_done(ref, self._on_synced)

    def _on_synced(self, answer: Future[ActorList]) -> None:
        self._syncing = False
        if answer.exception() is None:  # else the directory restarts, and the old list must do
            listed = answer.result()
            self._version = listed.version
            self._router.update_actors(listed.actors)

    def _send(self, call: Call) -> None:
        try:
            ref: ObjectRef[tuple[Scores, int]] = call.actor.handle.score.remote(call.chunk.request)
        except Exception as error:  # such as a column that pickle refuses: the caller's to fix
            reason = error  # Python deletes `error` at the end of this block
            # As an event, because the router calls this in the middle of a dispatch.
            self._events.put(lambda: self._router.on_call_failed(call, reason))
        else:
            self._when_done(ref, partial(self._on_answer, call))

    def _on_answer(self, call: Call, answer: Future[tuple[Scores, int]]) -> None:
        error = answer.exception()
        if error is None:
            scores, held = answer.result()
            self._router.on_scores(call, scores, held)
        elif is_lost(error):
            self._router.on_call_lost(call, last_line(error))
        else:
            self._router.on_call_failed(call, error)

    def _ping(self, actor: ActorState) -> None:
        ref: ObjectRef[ActorReport] = actor.handle.ping.remote()
        self._when_done(ref, partial(self._on_heartbeat, actor))

    def _on_heartbeat(self, actor: ActorState, answer: Future[ActorReport]) -> None:
        error = answer.exception()
        if error is None:
            state = answer.result().state
            self._router.on_heartbeat(actor, state.held, state.stalled_s)
        else:
            self._router.on_ping_failed(actor, last_line(error))

    def _when_done(self, ref: ObjectRef[T], then: Callable[[Future[T]], None]) -> None:
        """Queue an event for the end of a call; no thread waits for it."""
        ref.future().add_done_callback(lambda answer: self._events.put(lambda: then(answer)))


def is_lost(error: BaseException) -> bool:
    """Return whether a call failed because of its actor or node, not because of the code it ran."""
    # A RayTaskError wraps what the remote code raised: another actor would raise it as well.
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
