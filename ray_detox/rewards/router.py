"""Which reward actor scores which chunk of a batch, and what happens when one falls silent.

    batch --> chunks, by length --> queue --- two per actor, least loaded ---> calls --> answers
                                      ^                                          |
                                      '------- sent again: lost, or silent ------'

The rules alone, without Ray and without threads: `stages/score.py` tells a `Router` what has
happened and makes the calls that it asks for. How a batch is cut depends on the batch alone, so
that no score depends on the number of actors or on what befalls them.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_detox.config import RewardConfig, ServingConfig
from ray_detox.records import RewardError, ScoreRequest, Scores

if TYPE_CHECKING:
    pass  # who has but numbers and names to pass on loads no torch


IN_FLIGHT = 2
"""Chunks that one worker has at one actor: one is scored while the other is on its way."""
COOL_S = 1.0
"""Time without new chunks for an actor that failed; longer than it takes to be listed as down."""
PONG_S = 2.0
"""Longest wait for a sign of life."""
GRACE_S = 10.0
"""Beyond the deadline, for the thread that explains what it waited for."""


@dataclass(eq=False, slots=True)
class ActorState:
    """One actor, as a worker sees it."""

    name: str
    node: str
    handle: Any
    down: str | None
    used_s: float
    calls: list[Call] = field(default_factory=list)
    load: int = 0
    """Texts that it held for other workers when it last answered; 0 once that is old."""
    gone: bool = False
    """The pool has let it go."""
    cool_until_s: float = -math.inf
    """No new chunks before; infinite for one that is silent, until it says something."""
    heartbeat_s: float = -math.inf
    """Its last sign of life, or when it was given something to do."""
    pinged_s: float | None = None
    """When it was asked for a sign of life, until there is an answer."""
    last_event: str = "has not been asked for anything yet"
    last_event_s: float | None = None

    @property
    def texts(self) -> int:
        """Texts of this worker that it holds."""
        return sum(call.chunk.texts for call in self.calls)

    def tell(self, last_event: str, now: float) -> None:
        """Keep the last thing that happened here, for a sentence to people."""
        self.last_event, self.last_event_s = last_event, now

    def describe(self, now: float) -> str:
        """Name, place and the last thing known, such as `actor 1 on node 3f29a1c0 died`."""
        ago = "" if self.last_event_s is None else f" ({now - self.last_event_s:.1f} s ago)"
        return f"{self.name} on {self.node} {self.down or self.last_event + ago}"


@dataclass(eq=False, slots=True)
class Call:
    """A chunk at an actor."""

    chunk: Chunk
    actor: ActorState
    sent_s: float


@dataclass(eq=False, slots=True)
class Chunk:
    """Some rows of a batch: the unit of work."""

    batch: Batch
    place: int
    request: ScoreRequest
    calls: list[Call] = field(default_factory=list)

    @property
    def texts(self) -> int:
        """Number of its texts."""
        return len(self.request)

    @property
    def done(self) -> bool:
        """Nobody needs its scores any more."""
        return self.batch.scores.done() or self.place in self.batch.parts


class Batch:
    """What a caller submitted, in chunks; a `reward.Pending`."""

    def __init__(
        self,
        reward: RewardConfig,
        serving: ServingConfig,
        request: ScoreRequest,
    ) -> None:
        assert len(request), "a batch to be scored has at least one response"
        self._timeout_s = serving.timeout_s
        lengths = [len(text) for text in request.classifier_inputs(reward.input)]
        # Of like length in a chunk, so that little of it is padding.
        self._order = np.argsort(lengths, kind="stable")
        self.chunks: list[Chunk] = []
        for start in range(0, len(lengths), reward.batch_size):
            rows = self._order[start : start + reward.batch_size].tolist()
            self.chunks.append(Chunk(self, len(self.chunks), request.select(rows)))
        self.parts: dict[int, Scores] = {}
        self.scores: Future[Scores] = Future()
        self.due_s = math.inf
        """When the caller gives up; unknown until it waits."""

    def result(self) -> Scores:
        """Wait for the scores, at most `serving.timeout_s`.

        Raises:
            RewardError: they did not come in time.
        """
        self.due_s = time.monotonic() + self._timeout_s
        try:
            return self.scores.result(timeout=self._timeout_s + GRACE_S)
        except TimeoutError as error:
            if self.scores.done():  # then that is what the scoring raised
                return self.scores.result()
            raise RewardError(
                f"No scores within {self._timeout_s:g} s (serving.timeout_s), and no word of why: "
                "this process is not getting on. Look at the memory and the load of its node."
            ) from error

    def put(self, chunk: Chunk, scores: Scores) -> None:
        """Take the scores of one chunk; the last one completes the batch."""
        self.parts[chunk.place] = scores
        if len(self.parts) == len(self.chunks):
            parts = [self.parts[i] for i in range(len(self.chunks))]
            self.scores.set_result(Scores.concatenate(parts).select(np.argsort(self._order)))

    def fail(self, error: BaseException) -> None:
        """Let the caller see an error, unless it has an answer."""
        if not self.scores.done():
            self.scores.set_exception(error)


class Router:
    """Sends every chunk to an actor, and again to another until one has answered.

    Args:
        serving: gives the timeouts.
        send: makes a call; its end is told by `scored`, `lost` or `failed`.
        ping: asks an actor for a sign of life, told by `ponged`; a failure needs no word here.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        serving: ServingConfig,
        send: Callable[[Call], None],
        ping: Callable[[ActorState], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = serving
        self._send = send
        self._ping = ping
        self._now = clock
        self._actors: dict[str, ActorState] = {}
        self._batches: list[Batch] = []
        self._queue: deque[Chunk] = deque()
        self.resent = 0
        """Chunks sent again so far."""
        self.doubts = False
        """An actor failed: the list of actors may be out of date."""

    @property
    def busy(self) -> bool:
        """Somebody's scores are not there yet."""
        return bool(self._batches)

    @property
    def waiting(self) -> int:
        """Texts that no actor had room for."""
        return sum(chunk.texts for chunk in self._queue if not chunk.done)

    # ---- what happens ------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """A caller wants scores."""
        self._batches.append(batch)
        self._queue.extend(batch.chunks)
        self._dispatch()

    def refresh(self, listings: Sequence[ActorInfo] | None) -> None:
        """The pool says which actors there are; None for those that there were."""
        self.doubts = False
        for actor in self._actors.values():
            actor.load = 0  # old by now; or one bad moment would count for ever
        if listings is None:
            return
        listed = {listing.name for listing in listings}
        for actor in self._actors.values():
            actor.gone = actor.name not in listed
        for one in listings:
            known = self._actors.get(one.name)
            if known is None:
                # Workers begin at different actors, or their first chunks would all meet at one.
                used_s = random.uniform(-2, -1)
                known = ActorState(one.name, one.node, one.handle, one.down, used_s)
                self._actors[one.name] = known
            known.node, known.handle, known.down = one.node, one.handle, one.down
            if one.down is not None and known.calls:
                self._suspect(known, one.down)
        self._dispatch()

    def scored(self, call: Call, scores: Scores, load: int) -> None:
        """An actor gave scores, and said how many texts it still holds."""
        self._end(call)
        call.actor.load = max(0, load - call.actor.texts)
        self._on_heartbeat(call.actor, "gave scores")
        # Of two that score the same chunk, the first one counts.
        if not call.chunk.done:
            call.chunk.batch.put(call.chunk, scores)
        self._dispatch()

    def lost(self, call: Call, cause: str) -> None:
        """An actor died, or could not be reached, with a chunk in its hands."""
        self._end(call)
        actor = call.actor
        actor.cool_until_s = self._now() + COOL_S
        actor.tell(f"failed: {cause}", self._now())
        self.doubts = True
        self._send_again(call.chunk)
        self._dispatch()

    def failed(self, call: Call, error: BaseException) -> None:
        """The scoring itself raised: another actor would raise the same."""
        self._end(call)
        self._on_heartbeat(call.actor, "raised an error")
        call.chunk.batch.fail(error)
        self._dispatch()

    def ponged(self, actor: ActorState, held: int, standstill_s: float) -> None:
        """An actor gave a sign of life: what it holds, and since when its model stands still."""
        if standstill_s > self._serving.heartbeat_timeout_s:
            actor.pinged_s = None
            self._suspect(actor, f"lives, but its model stands still since {standstill_s:.0f} s")
        else:
            self._on_heartbeat(actor, f"said that it works on {held} texts")
        self._dispatch()

    def ping_failed(self, actor: ActorState, cause: str) -> None:
        """An actor died, or could not be reached, when it was asked for a sign of life."""
        actor.pinged_s = None
        self.doubts = True
        self._suspect(actor, f"failed: {cause}")
        self._dispatch()

    def tick(self) -> None:
        """Time has passed."""
        now = self._now()
        for batch in self._batches:
            if now > batch.due_s and not batch.scores.done():
                batch.fail(RewardError(self._too_late(batch, now)))
        self._batches = [batch for batch in self._batches if not batch.scores.done()]
        for actor in list(self._actors.values()):
            self._watch(actor, now)
        self._dispatch()

    def abandon(self, error: BaseException) -> None:
        """Nothing will be sent any more: tell everybody who waits."""
        for batch in self._batches:
            batch.fail(error)

    # ---- what follows ------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send what there is room for; the rest waits here."""
        now = self._now()
        kept: list[Chunk] = []
        while self._queue:
            free = [actor for actor in self._actors.values() if self._has_room(actor, now)]
            if not free:
                break
            chunk = self._queue.popleft()
            if chunk.done:
                continue
            # An actor that fell silent over a chunk does not get it twice.
            others = [actor for actor in free if actor not in {c.actor for c in chunk.calls}]
            if not others:
                kept.append(chunk)
                continue
            actor = min(others, key=lambda m: (m.texts + m.load, m.used_s))
            call = Call(chunk, actor, now)
            if not actor.calls:
                actor.heartbeat_s = now  # it had nothing to answer until now
            actor.used_s = now
            actor.calls.append(call)
            chunk.calls.append(call)
            self._send(call)
        self._queue.extendleft(reversed(kept))

    def _has_room(self, actor: ActorState, now: float) -> bool:
        return (
            actor.down is None
            and not actor.gone
            and len(actor.calls) < IN_FLIGHT
            and now >= actor.cool_until_s
        )

    def _watch(self, actor: ActorState, now: float) -> None:
        """Ask an actor that has long been silent; give up on it if it does not answer that."""
        if not actor.calls:
            if actor.gone:
                del self._actors[actor.name]
        elif actor.pinged_s is None:
            if now - actor.heartbeat_s > self._serving.heartbeat_timeout_s:
                actor.pinged_s = now
                self._ping(actor)
        elif now - actor.pinged_s > PONG_S and actor.cool_until_s < math.inf:
            self._suspect(actor, "does not answer")

    def _on_heartbeat(self, actor: ActorState, last_event: str) -> None:
        actor.pinged_s = None
        actor.heartbeat_s = self._now()
        actor.cool_until_s = -math.inf
        actor.tell(last_event, self._now())

    def _suspect(self, actor: ActorState, last_event: str) -> None:
        """Let others have what a silent actor holds; it may still come first."""
        now = self._now()
        actor.heartbeat_s = now  # the next question has time
        # The end of a call is a sign of life. Where there is none to come, a pause must do.
        actor.cool_until_s = math.inf if actor.calls else now + COOL_S
        actor.tell(last_event, now)
        for call in actor.calls:
            self._send_again(call.chunk)

    def _send_again(self, chunk: Chunk) -> None:
        elsewhere = any(call.actor.cool_until_s < math.inf for call in chunk.calls)
        if not chunk.done and not elsewhere and chunk not in self._queue:
            self.resent += 1
            self._queue.appendleft(chunk)

    def _end(self, call: Call) -> None:
        call.actor.calls.remove(call)
        call.chunk.calls.remove(call)

    def _too_late(self, batch: Batch, now: float) -> str:
        """The sentence for somebody who has waited for too long."""
        open_chunks = [chunk for chunk in batch.chunks if not chunk.done]
        holders = {call.actor: None for chunk in open_chunks for call in chunk.calls}
        asked = list(holders) or list(self._actors.values())
        causes = [actor.describe(now) for actor in asked[:3]]
        if len(asked) > len(causes):
            causes.append(f"{len(asked) - len(causes)} more")
        texts = sum(chunk.texts for chunk in batch.chunks)
        return (
            f"No scores for {sum(chunk.texts for chunk in open_chunks)} of {texts} texts within "
            f"{self._serving.timeout_s:g} s (serving.timeout_s): "
            f"{'; '.join(causes) or 'the list of reward actors could not be read'}. "
            "Add actors (reward.actors), or raise the deadline."
        )


@dataclass(frozen=True, slots=True)
class ActorInfo:
    """One actor, as the pool tells the workers."""

    name: str
    node: str
    handle: Any
    down: str | None = None
    """Why it takes no chunks now, for people; None where it does."""
