"""One thread that owns a reward, and the calls of many threads that queue before it.

    thread 1 --call--.
    thread 2 --call--+--> queue --> the model's thread: tokens -> forward pass -> terms
    thread 3 --call--'

Each call is scored by itself, to the same bits at any time; or, with `serving.batch_across_workers`, the
texts of several calls share their forward passes, and scores then differ by rounding with the
company that a text happens to have. The extra terms need a call's own columns and are always
evaluated call by call. Knows nothing of Ray.
"""

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from ray_detox.config import ServingConfig
from ray_detox.records import ScoreRequest, Scores
from ray_detox.rewards.reward import Reward


class _Call:
    """A batch that some thread waits for."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self.scores: Future[Scores] = Future()
        self.rows: list[list[int]] = []
        self.truncated = np.empty(0, dtype=bool)

    @property
    def texts(self) -> int:
        return len(self.request)


class ModelThread:
    """Scores for any number of threads, computed by a single one.

    Only one thread, because tokenizers and reward functions may not bear two at a time, and
    because every thread that calls torch brings a team of its own.
    """

    def __init__(self, reward: Reward, serving: ServingConfig) -> None:
        self._reward = reward
        self._serving = serving
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._callers = 0
        self._company = 0
        self._held = 0
        self._in_model = 0
        self._progress_s = time.monotonic()
        self._scored = 0
        self._passes = 0
        # A sign of life from every layer: on a slow CPU one forward pass may well take longer
        # than serving.heartbeat_timeout_s.
        for module in reward.classifier.model.modules():
            module.register_forward_hook(self._mark_progress)
        reward.classifier.model.register_forward_hook(self._count_pass)
        threading.Thread(target=self._run, name="reward-model", daemon=True).start()

    def score(self, request: ScoreRequest) -> Scores:
        """Wait for the scores of a batch."""
        call = _Call(request)
        with self._lock:
            if not self._held:
                self._mark_progress()  # the time without work was no standstill
            self._held += call.texts
            self._callers += 1
            self._company = max(self._company, self._callers)
        self._calls.put(call)
        try:
            return call.scores.result()
        finally:
            with self._lock:
                self._held -= call.texts
                self._callers -= 1
                self._scored += call.texts

    def state(self) -> dict[str, Any]:
        """What there is to do and how it goes, without waiting.

        Returns:
            texts: asked for and answered so far; passes: forward passes so far; held: texts
            asked for and not yet answered; queued: those of them that the model has not begun;
            standstill_s: since it last got on, 0 where it holds nothing.
        """
        with self._lock:
            standstill_s = time.monotonic() - self._progress_s if self._held else 0.0
            return {
                "texts": self._scored,
                "passes": self._passes,
                "held": self._held,
                "queued": max(0, self._held - self._in_model),
                "standstill_s": standstill_s,
            }

    def _mark_progress(self, *_: Any) -> None:
        self._progress_s = time.monotonic()

    def _count_pass(self, *_: Any) -> None:
        self._passes += 1

    def _run(self) -> None:
        while True:
            calls = self._take()
            self._in_model = sum(call.texts for call in calls)
            self._score(calls)
            self._in_model = 0
            self._mark_progress()

    def _take(self) -> list[_Call]:
        """The next call; across workers, all that come in time and fill one batch."""
        calls = [self._calls.get()]
        self._tokenize(calls[0])
        if not self._serving.batch_across_workers:
            return calls
        until = time.monotonic() + self._serving.batch_wait_ms / 1000
        tokens = sum(map(len, calls[0].rows))
        # Nobody is waited for but those who were here since the last batch: a single caller would
        # wait in vain each time.
        while tokens < self._serving.max_batch_tokens and len(calls) < self._company:
            try:
                call = self._calls.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            self._tokenize(call)
            calls.append(call)
            tokens += sum(map(len, call.rows))
        with self._lock:
            self._company = self._callers
        return calls

    def _tokenize(self, call: _Call) -> None:
        kind = self._reward.config.input
        try:
            call.rows, call.truncated = self._reward.classifier.tokenize(
                call.request.classifier_inputs(kind)
            )
        except Exception as error:  # the caller's to see, as if it had scored for itself
            call.scores.set_exception(error)

    def _score(self, calls: list[_Call]) -> None:
        calls = [call for call in calls if not call.scores.done()]
        rows = [row for call in calls for row in call.rows]
        batch_tokens = (
            self._serving.max_batch_tokens if self._serving.batch_across_workers else None
        )
        try:
            logits, toxicity = self._reward.classifier.forward(rows, batch_tokens)
        except Exception as error:
            for call in calls:
                call.scores.set_exception(error)
            return
        start = 0
        for call in calls:
            own = slice(start, start + call.texts)
            start += call.texts
            try:
                scores = self._reward.add_terms(
                    logits[own], toxicity[own], call.truncated, call.request
                )
                call.scores.set_result(scores)
            except Exception as error:
                call.scores.set_exception(error)
            self._mark_progress()
