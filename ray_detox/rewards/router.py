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

from ray_detox.config import RewardConfig
from ray_detox.records import Columns, RewardError, Scores, read_by

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
class Member:
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
    heard_s: float = -math.inf
    """Its last sign of life, or when it was given something to do."""
    pinged_s: float | None = None
    """When it was asked for a sign of life, until there is an answer."""
    news: str = "has not been asked for anything yet"
    news_s: float | None = None

    @property
    def texts(self) -> int:
        """Texts of this worker that it holds."""
        return sum(call.chunk.texts for call in self.calls)

    def tell(self, news: str, now: float) -> None:
        """Keep the last thing that happened here, for a sentence to people."""
        self.news, self.news_s = news, now

    def describe(self, now: float) -> str:
        """Name, place and the last thing known, such as `actor 1 on node 3f29a1c0 died`."""
        ago = "" if self.news_s is None else f" ({now - self.news_s:.1f} s ago)"
        return f"{self.name} on {self.node} {self.down or self.news + ago}"


@dataclass(eq=False, slots=True)
class Call:
    """A chunk at an actor."""

    chunk: Chunk
    member: Member
    sent_s: float


@dataclass(eq=False, slots=True)
class Chunk:
    """Some rows of a batch: the unit of work."""

    batch: Batch
    place: int
    arguments: tuple[Any, ...]
    calls: list[Call] = field(default_factory=list)

    @property
    def texts(self) -> int:
        """Number of its texts."""
        return len(self.arguments[1])

    @property
    def done(self) -> bool:
        """Nobody needs its scores any more."""
        return self.batch.scores.done() or self.place in self.batch.parts


class Batch:
    """What a caller submitted, in chunks; a `reward.Pending`."""

    def __init__(
        self,
        config: RewardConfig,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> None:
        assert len(responses), "a batch to be scored has at least one response"
        self._deadline_s = config.deadline_s
        lengths = [len(text) for text in read_by(config, prompts, responses)]
        # Of like length in a chunk, so that little of it is padding.
        self._order = np.argsort(lengths, kind="stable")
        self.chunks: list[Chunk] = []
        for start in range(0, len(lengths), config.batch_size):
            rows = self._order[start : start + config.batch_size].tolist()
            pick = lambda values, rows=rows: [values[i] for i in rows]
            arguments = (
                pick(prompts),
                pick(responses),
                pick(response_ids),
                {name: pick(column) for name, column in columns.items()},
            )
            self.chunks.append(Chunk(self, len(self.chunks), arguments))
        self.parts: dict[int, Scores] = {}
        self.scores: Future[Scores] = Future()
        self.due_s = math.inf
        """When the caller gives up; unknown until it waits."""

    def result(self) -> Scores:
        """Wait for the scores, at most `reward.deadline_s`.

        Raises:
            RewardError: they did not come in time.
        """
        self.due_s = time.monotonic() + self._deadline_s
        try:
            return self.scores.result(timeout=self._deadline_s + GRACE_S)
        except TimeoutError as error:
            if self.scores.done():  # then that is what the scoring raised
                return self.scores.result()
            raise RewardError(
                f"No scores within {self._deadline_s:g} s (reward.deadline_s), and no word of why: "
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
        config: how large chunks are, and how long a silence may be.
        send: makes a call; its end is told by `scored`, `lost` or `failed`.
        ping: asks an actor for a sign of life, told by `ponged`; a failure needs no word here.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        config: RewardConfig,
        send: Callable[[Call], None],
        ping: Callable[[Member], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._send = send
        self._ping = ping
        self._now = clock
        self._members: dict[str, Member] = {}
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

    def refresh(self, listings: Sequence[Listing] | None) -> None:
        """The pool says which actors there are; None for those that there were."""
        self.doubts = False
        for member in self._members.values():
            member.load = 0  # old by now; or one bad moment would count for ever
        if listings is None:
            return
        listed = {listing.name for listing in listings}
        for member in self._members.values():
            member.gone = member.name not in listed
        for one in listings:
            known = self._members.get(one.name)
            if known is None:
                # Workers begin at different actors, or their first chunks would all meet at one.
                used_s = random.uniform(-2, -1)
                known = Member(one.name, one.node, one.handle, one.down, used_s)
                self._members[one.name] = known
            known.node, known.handle, known.down = one.node, one.handle, one.down
            if one.down is not None and known.calls:
                self._give_up(known, one.down)
        self._dispatch()

    def scored(self, call: Call, scores: Scores, load: int) -> None:
        """An actor gave scores, and said how many texts it still holds."""
        self._end(call)
        call.member.load = max(0, load - call.member.texts)
        self._hear(call.member, "gave scores")
        # Of two that score the same chunk, the first one counts.
        if not call.chunk.done:
            call.chunk.batch.put(call.chunk, scores)
        self._dispatch()

    def lost(self, call: Call, cause: str) -> None:
        """An actor died, or could not be reached, with a chunk in its hands."""
        self._end(call)
        member = call.member
        member.cool_until_s = self._now() + COOL_S
        member.tell(f"failed: {cause}", self._now())
        self.doubts = True
        self._send_again(call.chunk)
        self._dispatch()

    def failed(self, call: Call, error: BaseException) -> None:
        """The scoring itself raised: another actor would raise the same."""
        self._end(call)
        self._hear(call.member, "raised an error")
        call.chunk.batch.fail(error)
        self._dispatch()

    def ponged(self, member: Member, held: int, standstill_s: float) -> None:
        """An actor gave a sign of life: what it holds, and since when its model stands still."""
        if standstill_s > self._config.silence_s:
            member.pinged_s = None
            self._give_up(member, f"lives, but its model stands still since {standstill_s:.0f} s")
        else:
            self._hear(member, f"said that it works on {held} texts")
        self._dispatch()

    def ping_failed(self, member: Member, cause: str) -> None:
        """An actor died, or could not be reached, when it was asked for a sign of life."""
        member.pinged_s = None
        self.doubts = True
        self._give_up(member, f"failed: {cause}")
        self._dispatch()

    def tick(self) -> None:
        """Time has passed."""
        now = self._now()
        for batch in self._batches:
            if now > batch.due_s and not batch.scores.done():
                batch.fail(RewardError(self._too_late(batch, now)))
        self._batches = [batch for batch in self._batches if not batch.scores.done()]
        for member in list(self._members.values()):
            self._watch(member, now)
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
            free = [member for member in self._members.values() if self._has_room(member, now)]
            if not free:
                break
            chunk = self._queue.popleft()
            if chunk.done:
                continue
            # An actor that fell silent over a chunk does not get it twice.
            others = [member for member in free if member not in {c.member for c in chunk.calls}]
            if not others:
                kept.append(chunk)
                continue
            member = min(others, key=lambda m: (m.texts + m.load, m.used_s))
            call = Call(chunk, member, now)
            if not member.calls:
                member.heard_s = now  # it had nothing to answer until now
            member.used_s = now
            member.calls.append(call)
            chunk.calls.append(call)
            self._send(call)
        self._queue.extendleft(reversed(kept))

    def _has_room(self, member: Member, now: float) -> bool:
        return (
            member.down is None
            and not member.gone
            and len(member.calls) < IN_FLIGHT
            and now >= member.cool_until_s
        )

    def _watch(self, member: Member, now: float) -> None:
        """Ask an actor that has long been silent; give up on it if it does not answer that."""
        if not member.calls:
            if member.gone:
                del self._members[member.name]
        elif member.pinged_s is None:
            if now - member.heard_s > self._config.silence_s:
                member.pinged_s = now
                self._ping(member)
        elif now - member.pinged_s > PONG_S and member.cool_until_s < math.inf:
            self._give_up(member, "does not answer")

    def _hear(self, member: Member, news: str) -> None:
        member.pinged_s = None
        member.heard_s = self._now()
        member.cool_until_s = -math.inf
        member.tell(news, self._now())

    def _give_up(self, member: Member, news: str) -> None:
        """Let others have what a silent actor holds; it may still come first."""
        now = self._now()
        member.heard_s = now  # the next question has time
        # The end of a call is a sign of life. Where there is none to come, a pause must do.
        member.cool_until_s = math.inf if member.calls else now + COOL_S
        member.tell(news, now)
        for call in member.calls:
            self._send_again(call.chunk)

    def _send_again(self, chunk: Chunk) -> None:
        elsewhere = any(call.member.cool_until_s < math.inf for call in chunk.calls)
        if not chunk.done and not elsewhere and chunk not in self._queue:
            self.resent += 1
            self._queue.appendleft(chunk)

    def _end(self, call: Call) -> None:
        call.member.calls.remove(call)
        call.chunk.calls.remove(call)

    def _too_late(self, batch: Batch, now: float) -> str:
        """The sentence for somebody who has waited for too long."""
        open_chunks = [chunk for chunk in batch.chunks if not chunk.done]
        holders = {call.member: None for chunk in open_chunks for call in chunk.calls}
        asked = list(holders) or list(self._members.values())
        causes = [member.describe(now) for member in asked[:3]]
        if len(asked) > len(causes):
            causes.append(f"{len(asked) - len(causes)} more")
        texts = sum(chunk.texts for chunk in batch.chunks)
        return (
            f"No scores for {sum(chunk.texts for chunk in open_chunks)} of {texts} texts within "
            f"{self._config.deadline_s:g} s (reward.deadline_s): "
            f"{'; '.join(causes) or 'the list of reward actors could not be read'}. "
            "Add actors (reward.actors), or raise the deadline."
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """One actor, as the pool tells the workers."""

    name: str
    node: str
    handle: Any
    down: str | None = None
    """Why it takes no chunks now, for people; None where it does."""
