"""Which reward actor scores which chunk of a batch, and who else does if that actor fails.

    batch --> chunks, by length --> queue --- two per actor, least loaded ---> calls --> scores
                                      ^                                          |
                                      '-- re-dispatched: actor lost or silent ---'

Rules alone, without Ray and without threads: `stages/rewards/client.py` reports events to a
`Router` and makes the calls that it asks for. Each worker has a router of its own.

An actor, as one worker sees it:

    up          takes chunks
    suspected   silent or stalled while it holds chunks: gets no new ones; copies of those that it
                holds go to other actors, and the first scores count
    cooling     a call was lost, or a ping failed while it held nothing: no new chunks for a moment
    down        the pool gives a reason: no new chunks, and what it holds is treated as if it were silent
    gone        the pool no longer lists it: no new chunks; forgotten once it holds none

                      .------ scores, an error, or a heartbeat ------.
                      v                                              |
                     up -- ping unanswered or failed, stalled --> suspected
                    |  ^                                             |
          call lost |  | COOL_DOWN_S later                           | call lost
                    v  |                                             |
                   cooling <-----------------------------------------'

    `down` and `gone` come and go with the pool's list, whatever the state above.

A chunk:

    queued -- an actor has room --> in flight -- first scores --> done
      ^                                |
      '--------- re-dispatched --------'
        its call was lost, or every actor that holds it is suspected

    Done, too, without scores: the batch failed, or its caller's deadline has passed.

Texts that kill each actor, such as those on which a reward function crashes, would be sent again for
ever. The router therefore counts the deaths that a chunk has met since this worker last got scores,
and the pool ends the run at `serving.max_actor_deaths`. A death counts only if the process came up
after the one counted before it: a node that is lost takes several actors, and the chunk may be sent
to each of them before that is known.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ray_detox.config import RewardConfig, ServingConfig
from ray_detox.records import RewardError, ScoreRequest, Scores
from ray_detox.rewards.messages import ActorHandle, ActorInfo

# Two: the next chunk is at the actor before the last one is done, so that the model never waits
# for the network. More would bind texts to an actor before it is known which one will be free
# first, and each actor that dies would leave more to score again.
IN_FLIGHT = 2
"""Chunks that one worker has at one actor at most."""
# Longer than the pool and the directory take to list a dead actor as down. Until then it looks
# idle, and would be chosen first for each chunk that it has just lost.
COOL_DOWN_S = 1.0
"""Time without new chunks for an actor that failed."""
PING_TIMEOUT_S = 2.0
"""Longest wait for the answer to a ping. An actor answers pings in threads of their own, so that
neither a long forward pass nor a queue delays the answer."""
# The router's thread fails a late batch with a message that names actors; a caller that stopped
# waiting at the same moment would raise its own message, which cannot say why.
TIMEOUT_GRACE_S = 10.0
"""Time that a caller waits beyond `serving.timeout_s` for the router to explain the delay."""
CRASHES = (
    "Test the functions of reward.terms on this machine: ray-detox check calls them with sample texts. "
    "Look for os._exit, for crashes of native code, and for more memory than a node has."
)
"""What to do about actors that die while they score."""


@dataclass(eq=False, slots=True)
class ActorState:
    """One actor, as this worker sees it."""

    name: str
    node: str
    handle: ActorHandle
    down_reason: str | None
    """Why the pool says that it takes no chunks; None while it takes them."""
    last_dispatch_s: float
    """Time of the last chunk sent to it: among equally loaded actors, the one that has waited
    longest is next."""
    calls: list[Call] = field(default_factory=list)
    """Open calls of this worker."""
    start: int = -1
    """See `ActorInfo`."""
    load_of_others: int = 0
    """Texts that it held for other workers when it last returned scores; 0 once that is old."""
    gone: bool = False
    """The pool no longer lists it."""
    no_dispatch_until_s: float = -math.inf
    """No new chunks before this time; infinite while the actor is suspected."""
    last_heartbeat_s: float = -math.inf
    """Start of its present silence: its last sign of life, or the first chunk after an idle time."""
    ping_sent_s: float | None = None
    """Time of the ping that it has not answered yet; None without one."""
    last_event: str = "has not received a chunk yet"
    last_event_s: float | None = None

    @property
    def texts(self) -> int:
        """Texts of this worker that it holds."""
        return sum(call.chunk.texts for call in self.calls)

    @property
    def suspected(self) -> bool:
        """Others may score what it holds."""
        return self.no_dispatch_until_s == math.inf

    def record_event(self, event: str, now: float) -> None:
        """Keep the last event for the message of a timeout."""
        self.last_event, self.last_event_s = event, now

    def describe(self, now: float) -> str:
        """Name, node and last event, such as `actor 1 on node 3f29a1c0 died`."""
        ago = "" if self.last_event_s is None else f" ({now - self.last_event_s:.1f} s ago)"
        return f"{self.name} on {self.node} {self.down_reason or self.last_event + ago}"


@dataclass(eq=False, slots=True)
class Call:
    """One chunk at one actor."""

    chunk: Chunk
    actor: ActorState
    start: int
    """Start of the actor to which the chunk was sent; see `ActorInfo`."""


@dataclass(eq=False, slots=True)
class Chunk:
    """Some rows of a batch: the unit of dispatch."""

    batch: Batch
    index: int
    request: ScoreRequest
    calls: list[Call] = field(default_factory=list)
    """Open calls; several if an actor that holds it is suspected."""

    @property
    def texts(self) -> int:
        """Number of its texts."""
        return len(self.request)

    @property
    def done(self) -> bool:
        """True if no caller waits for its scores any more."""
        return self.batch.scores.done() or self.index in self.batch.scores_by_chunk


class Batch:
    """One request of a caller, cut into chunks; a `Pending`."""

    def __init__(
        self,
        reward: RewardConfig,
        serving: ServingConfig,
        request: ScoreRequest,
    ) -> None:
        assert len(request), "a batch to be scored has at least one response"
        self._timeout_s = serving.timeout_s
        lengths = [len(text) for text in request.classifier_inputs(reward.input)]
        # Similar lengths share a chunk, so that little of it is padding.
        self._order = np.argsort(lengths, kind="stable")
        self.chunks: list[Chunk] = []
        # The batch alone decides where it is cut. A score depends, by rounding, on the texts that
        # share its forward pass: with cuts that followed the number of actors or their failures,
        # the same run would give other scores on another cluster.
        for start in range(0, len(lengths), reward.batch_size):
            rows = self._order[start : start + reward.batch_size].tolist()
            self.chunks.append(Chunk(self, len(self.chunks), request.select(rows)))
        self.scores_by_chunk: dict[int, Scores] = {}
        self.scores: Future[Scores] = Future()
        self.deadline_s = math.inf
        """When the caller stops waiting. Infinite until it begins to: a worker submits a chunk of
        responses and goes on sampling, which may take longer than any timeout."""

    def result(self) -> Scores:
        """Wait for the scores, at most `serving.timeout_s`.

        Raises:
            RewardError: they did not arrive in time.
        """
        self.deadline_s = time.monotonic() + self._timeout_s
        try:
            return self.scores.result(timeout=self._timeout_s + TIMEOUT_GRACE_S)
        except TimeoutError as error:
            if self.scores.done():  # a reward term raised this TimeoutError, or scores just came
                return self.scores.result()
            raise RewardError(
                f"No scores within {self._timeout_s:g} s (serving.timeout_s), and no reason known: "
                "the reward client's thread did not respond. Check the memory and load of this node."
            ) from error

    def add_scores(self, chunk: Chunk, scores: Scores) -> None:
        """Take the scores of one chunk; the last one completes the batch."""
        self.scores_by_chunk[chunk.index] = scores
        if len(self.scores_by_chunk) == len(self.chunks):
            parts = [self.scores_by_chunk[i] for i in range(len(self.chunks))]
            # The inverse permutation: from the order by length back to the caller's order.
            self.scores.set_result(Scores.concatenate(parts).select(np.argsort(self._order)))

    def fail(self, error: BaseException) -> None:
        """Raise an error in the caller, unless the batch has a result."""
        if not self.scores.done():
            self.scores.set_exception(error)


class Router:
    """Sends every chunk to an actor, and again to another one until one has returned scores.

    Args:
        serving: the timeouts.
        send: starts a call; `on_scores`, `on_call_lost` or `on_call_failed` reports its end.
        ping: asks an actor for a heartbeat; `on_heartbeat` or `on_ping_failed` reports its end.
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
        self._deaths: dict[Chunk, tuple[int, int]] = {}
        """By chunk: deaths in a row since the last scores, and the newest start before the last one."""
        self.resent = 0
        """Chunks sent again so far."""
        self.membership_stale = False
        """An actor failed since the last list: the client should read the list of actors soon."""

    @property
    def busy(self) -> bool:
        """A caller waits for scores."""
        return bool(self._batches)

    @property
    def waiting(self) -> int:
        """Texts that no actor had room for."""
        return sum(chunk.texts for chunk in self._queue if not chunk.done)

    @property
    def deaths(self) -> int:
        """Most deaths in a row that one chunk has met without scores for any other in between."""
        return max((n for chunk, (n, _) in self._deaths.items() if not chunk.done), default=0)

    # ---- events --------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """Score a batch."""
        self._batches.append(batch)
        self._queue.extend(batch.chunks)
        self._dispatch()

    def update_actors(self, actors: Sequence[ActorInfo] | None) -> None:
        """Follow the pool's list of actors; None if it has not changed."""
        self.membership_stale = False
        for state in self._actors.values():
            # An actor that others kept busy once gets no chunks from here, so that no scores from
            # it would ever correct the number: without this reset it would count for ever.
            state.load_of_others = 0
        if actors is None:
            return
        listed = {info.name for info in actors}
        for state in self._actors.values():
            state.gone = state.name not in listed
        for info in actors:
            known = self._actors.get(info.name)
            if known is None:
                # Random, and before any real time: each worker begins at another actor. With one
                # order for all, the first chunks of all workers would queue at the same actor.
                never_s = random.uniform(-2, -1)
                known = ActorState(info.name, info.node, info.handle, info.down_reason, never_s)
                self._actors[info.name] = known
            # A restarted actor may be on another node; its name and its handle stay.
            known.node, known.handle, known.down_reason = info.node, info.handle, info.down_reason
            known.start = info.start
            if info.down_reason is not None and known.calls:
                # Its calls may still fail only much later: a node that crashed closes no
                # connection.
                self._suspect(known, info.down_reason)
        self._dispatch()

    def on_scores(self, call: Call, scores: Scores, held: int) -> None:
        """An actor returned scores.

        Args:
            call: that returned.
            scores: of its chunk.
            held: texts that the actor still holds, for all workers.
        """
        self._close(call)
        self._deaths.clear()
        call.actor.load_of_others = max(0, held - call.actor.texts)
        self._mark_alive(call.actor, "returned scores")
        # A chunk may be at two actors. The first scores count, so that each text has one score.
        if not call.chunk.done:
            call.chunk.batch.add_scores(call.chunk, scores)
        self._dispatch()

    def on_call_lost(self, call: Call, cause: str) -> None:
        """An actor died, or could not be reached, while it held a chunk."""
        self._close(call)
        actor = call.actor
        # Finite even if other calls are open: an actor that died loses those as well, and one
        # that was only out of reach for a moment is tried again.
        actor.no_dispatch_until_s = self._now() + COOL_DOWN_S
        actor.record_event(f"failed: {cause}", self._now())
        self.membership_stale = True
        deaths, newest = self._deaths.get(call.chunk, (0, -1))
        # Calls to an actor that is out of reach are lost as well, again and again.
        if call.start > newest:
            newest = max(actor.start for actor in self._actors.values())
            self._deaths[call.chunk] = (deaths + 1, newest)
        self._redispatch(call.chunk)
        self._dispatch()

    def on_call_failed(self, call: Call, error: BaseException) -> None:
        """The reward raised an error."""
        self._close(call)
        self._mark_alive(call.actor, "raised an error")
        # No second try: every actor runs the same code on the same texts.
        call.chunk.batch.fail(error)
        self._dispatch()

    def on_heartbeat(self, actor: ActorState, held: int, stalled_s: float) -> None:
        """An actor answered a ping.

        Args:
            actor: that answered.
            held: texts that it holds, for all workers.
            stalled_s: seconds since its model last made progress.
        """
        # The process answers from another thread than the model's, so that an answer alone does
        # not say that the model runs.
        if stalled_s > self._serving.heartbeat_timeout_s:
            actor.ping_sent_s = None
            self._suspect(actor, f"is alive, but its model made no progress for {stalled_s:.0f} s")
        else:
            self._mark_alive(actor, f"reported that it holds {held} texts")
        self._dispatch()

    def on_ping_failed(self, actor: ActorState, cause: str) -> None:
        """An actor died, or could not be reached, while a ping was open."""
        actor.ping_sent_s = None
        self.membership_stale = True
        self._suspect(actor, f"failed: {cause}")
        self._dispatch()

    def tick(self) -> None:
        """Time has passed."""
        now = self._now()
        for batch in self._batches:
            if now > batch.deadline_s and not batch.scores.done():
                batch.fail(RewardError(self._timeout_message(batch, now)))
        self._batches = [batch for batch in self._batches if not batch.scores.done()]
        for actor in list(self._actors.values()):
            self._check_heartbeat(actor, now)
        self._dispatch()

    def abandon(self, error: BaseException) -> None:
        """Fail all open batches: the client stops, and nothing more will be sent."""
        for batch in self._batches:
            batch.fail(error)

    # ---- rules ---------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send chunks to actors with free slots; the rest stays in the queue.

        The pool receives the queue's length as `waiting`, one of its reasons to add an actor.
        """
        now = self._now()
        kept: list[Chunk] = []
        while self._queue:
            free = [actor for actor in self._actors.values() if self._has_room(actor, now)]
            if not free:
                break
            chunk = self._queue.popleft()
            if chunk.done:
                continue
            # An actor that was suspected, and is up again, may still hold the chunk: a second
            # copy in the same process would come no sooner.
            others = [actor for actor in free if actor not in {c.actor for c in chunk.calls}]
            if not others:
                kept.append(chunk)
                continue
            actor = min(others, key=lambda a: (a.texts + a.load_of_others, a.last_dispatch_s))
            call = Call(chunk, actor, actor.start)
            if not actor.calls:
                actor.last_heartbeat_s = now  # an idle actor owes no sign of life
            actor.last_dispatch_s = now
            actor.calls.append(call)
            chunk.calls.append(call)
            self._send(call)
        self._queue.extendleft(reversed(kept))  # to the front again, in their old order

    def _has_room(self, actor: ActorState, now: float) -> bool:
        return (
            actor.down_reason is None
            and not actor.gone
            and len(actor.calls) < IN_FLIGHT
            and now >= actor.no_dispatch_until_s
        )

    def _check_heartbeat(self, actor: ActorState, now: float) -> None:
        """Ping an actor that has been silent for long; suspect it if it does not answer.

        A ping comes before the suspicion because silence alone proves nothing: a chunk of long
        texts on a slow CPU, or one behind the chunks of other workers, takes longer.
        """
        if not actor.calls:  # nothing is due from it
            if actor.gone:
                del self._actors[actor.name]
        elif actor.ping_sent_s is None:
            if now - actor.last_heartbeat_s > self._serving.heartbeat_timeout_s:
                actor.ping_sent_s = now
                self._ping(actor)
        elif now - actor.ping_sent_s > PING_TIMEOUT_S and not actor.suspected:
            self._suspect(actor, "does not answer")

    def _mark_alive(self, actor: ActorState, event: str) -> None:
        """End a suspicion or a cool-down: the actor works."""
        actor.ping_sent_s = None
        actor.last_heartbeat_s = self._now()
        actor.no_dispatch_until_s = -math.inf
        actor.record_event(event, self._now())

    def _suspect(self, actor: ActorState, event: str) -> None:
        """Let other actors score what this one holds.

        Its calls stay open, and a chunk may then be scored twice. Scoring has no side effects, so
        that costs time on one actor; to wait for an actor that hangs would cost the whole step.
        """
        now = self._now()
        actor.last_heartbeat_s = now  # the next ping follows after another full timeout
        # A process may hang for any length of time, so that no number of seconds would be right.
        # While a call is open, its end or a heartbeat ends the suspicion. Without an open call no
        # such event may ever come (only actors that hold chunks are pinged): a pause must do.
        actor.no_dispatch_until_s = math.inf if actor.calls else now + COOL_DOWN_S
        actor.record_event(event, now)
        for call in actor.calls:
            self._redispatch(call.chunk)

    def _redispatch(self, chunk: Chunk) -> None:
        """Queue a chunk again, unless an actor that is not suspected works on it."""
        in_progress = any(not call.actor.suspected for call in chunk.calls)
        if not chunk.done and not in_progress and chunk not in self._queue:
            self.resent += 1
            self._queue.appendleft(chunk)  # first: its batch has waited longest

    def _close(self, call: Call) -> None:
        call.actor.calls.remove(call)
        call.chunk.calls.remove(call)

    def _timeout_message(self, batch: Batch, now: float) -> str:
        open_chunks = [chunk for chunk in batch.chunks if not chunk.done]
        # A dict keeps the order and drops repetitions.
        holders = {call.actor: None for chunk in open_chunks for call in chunk.calls}
        # If no actor holds a chunk, the reason is in why none of them has room.
        to_name = list(holders) or list(self._actors.values())
        causes = [actor.describe(now) for actor in to_name[:3]]
        if len(to_name) > len(causes):
            causes.append(f"{len(to_name) - len(causes)} more")
        texts = sum(chunk.texts for chunk in batch.chunks)
        deaths = max(self._deaths.get(chunk, (0, 0))[0] for chunk in open_chunks)
        return (
            f"No scores for {sum(chunk.texts for chunk in open_chunks)} of {texts} texts within "
            f"{self._serving.timeout_s:g} s (serving.timeout_s): "
            f"{'; '.join(causes) or 'the worker could not read the list of reward actors'}. "
            + (
                f"Actors died {deaths} times in a row while they scored the same texts. {CRASHES}"
                if deaths > 1
                else "Add actors (reward.actors) or raise serving.timeout_s."
            )
        )
