"""One thread that owns a reward, and the calls of many threads that queue for it.

    thread 1 --call--.
    thread 2 --call--+--> queue --> the model's thread: tokens -> forward pass -> terms
    thread 3 --call--'

By default each call is scored by itself, so that its scores are the same bits at any load. With
`serving.batch_across_workers` the texts of several calls share forward passes; a score then
depends, by rounding, on the texts that happen to share its pass. The extra terms need the columns
of their own call and always run call by call. This module knows nothing of Ray.
"""

import queue
import threading
import time
from concurrent.futures import Future

import numpy as np

from ray_detox.config import ServingConfig
from ray_detox.records import ScoreRequest, Scores
from ray_detox.rewards.messages import ModelState
from ray_detox.rewards.reward import Reward, Tokenized


class _Call:
    """A request that one thread waits for."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self.scores: Future[Scores] = Future()
        self.tokenized = Tokenized([], np.empty(0, dtype=bool))

    @property
    def texts(self) -> int:
        return len(self.request)


class ModelThread:
    """Scores for any number of threads, computed by a single thread.

    One thread, because tokenizers and reward functions need not be thread-safe, and because each
    thread that calls torch starts a set of compute threads of its own.
    """

    def __init__(self, reward: Reward, serving: ServingConfig) -> None:
        self._reward = reward
        self._serving = serving
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._callers = 0
        """Threads that wait now."""
        self._most_callers = 0
        """Most threads that have waited at once since the last batch."""
        self._held = 0
        self._in_model = 0
        """Texts of the batch that the model works on."""
        self._last_progress_s = time.monotonic()
        self._scored = 0
        self._passes = 0
        # Progress is recorded at every layer, because one forward pass on a slow CPU may take
        # longer than serving.heartbeat_timeout_s.
        for classifier in reward.classifiers:
            for module in classifier.model.modules():
                module.register_forward_hook(self._record_progress)
            classifier.model.register_forward_hook(self._count_pass)
        threading.Thread(target=self._run, name="reward-model", daemon=True).start()

    def score(self, request: ScoreRequest) -> Scores:
        """Queue a request and wait for its scores."""
        call = _Call(request)
        with self._lock:
            if not self._held:
                self._record_progress()  # time without work must not count as a stall
            self._held += call.texts
            self._callers += 1
            self._most_callers = max(self._most_callers, self._callers)
        self._calls.put(call)
        try:
            return call.scores.result()
        finally:
            with self._lock:
                self._held -= call.texts
                self._callers -= 1
                self._scored += call.texts

    def state(self) -> ModelState:
        """Return the work done and the work to do, without waiting for the model."""
        with self._lock:
            stalled_s = time.monotonic() - self._last_progress_s if self._held else 0.0
            return ModelState(
                texts=self._scored,
                passes=self._passes,
                held=self._held,
                # Never below 0: a caller counts its texts as answered shortly before the model's
                # thread counts its batch as done.
                queued=max(0, self._held - self._in_model),
                stalled_s=stalled_s,
            )

    def _record_progress(self, *_: object) -> None:
        self._last_progress_s = time.monotonic()

    def _count_pass(self, *_: object) -> None:
        self._passes += 1

    def _run(self) -> None:
        while True:
            calls = self._next_batch()
            self._in_model = sum(call.texts for call in calls)
            self._score(calls)
            self._in_model = 0
            self._record_progress()

    def _next_batch(self) -> list[_Call]:
        """Wait for the next call; across workers, also for those that fill a batch in time."""
        calls = [self._calls.get()]
        self._tokenize(calls[0])
        if not self._serving.batch_across_workers:
            return calls
        deadline = time.monotonic() + self._serving.batch_wait_ms / 1000
        tokens = len(calls[0].tokenized)
        # Not for more calls than have waited at once since the last batch: a single caller would
        # wait in vain for others each time.
        while tokens < self._serving.max_batch_tokens and len(calls) < self._most_callers:
            try:
                call = self._calls.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            self._tokenize(call)
            calls.append(call)
            tokens += len(call.tokenized)
        with self._lock:
            self._most_callers = self._callers
        return calls

    def _tokenize(self, call: _Call) -> None:
        try:
            call.tokenized = self._reward.tokenize(call.request)
        except Exception as error:  # re-raised in the caller's thread; this thread continues
            call.scores.set_exception(error)

    def _score(self, calls: list[_Call]) -> None:
        calls = [call for call in calls if not call.scores.done()]
        rows = [
            [row for call in calls for row in call.tokenized.rows[i]]
            for i in range(len(self._reward.classifiers))
        ]
        batch_tokens = (
            self._serving.max_batch_tokens if self._serving.batch_across_workers else None
        )
        try:
            outputs = self._reward.forward(rows, batch_tokens)
        except Exception as error:
            for call in calls:
                call.scores.set_exception(error)
            return
        start = 0
        for call in calls:
            own = slice(start, start + call.texts)
            start += call.texts
            try:
                scores = self._reward.combine(
                    [(score[own], toxicity[own]) for score, toxicity in outputs],
                    call.tokenized.truncated,
                    call.request,
                )
                call.scores.set_result(scores)
            except Exception as error:  # a reward function failed for this call only
                call.scores.set_exception(error)
            self._record_progress()
