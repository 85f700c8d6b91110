"""The reward model in Ray actors, shared by every training worker.

    worker 0  RewardClient --chunk--> actor 0  Reward (classifier + terms)
    worker 1  RewardClient --chunk--> actor 1  Reward

The driver owns the actors and creates them before training: they outlive a restart of the worker
group and go with the run. A worker holds handles, sends a chunk as soon as it is sampled, and
goes on sampling. How a batch is cut into chunks depends on the batch alone, so the number of
actors never changes a score. A chunk on an actor that died is scored again by another: scoring
has no side effects.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from ray_detox.config import RewardConfig
from ray_detox.records import Columns, Scores
from ray_detox.reward import Pending, Reward


class RewardError(RuntimeError):
    """No actor gave scores in time."""


@ray.remote
class RewardActor:
    """One copy of the reward, in a process of its own."""

    def __init__(self, config: RewardConfig, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.reward = Reward(config, "cuda" if ray.get_gpu_ids() else "cpu")
        self.texts = 0

    def score(self, *batch: Any) -> Scores:
        """Score one chunk; arguments as in `Scorer.submit`."""
        self.texts += len(batch[0])
        return self.reward(*batch)

    def describe(self) -> dict[str, Any]:
        """Where this actor lives and what it has done; answers once the model is loaded."""
        import resource

        context = ray.get_runtime_context()
        return {
            "node": context.get_node_id()[:8],
            "device": str(self.reward.classifier.device),
            "max_tokens": self.reward.classifier.max_tokens,
            "texts": self.texts,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def start_actors(config: RewardConfig, gpus: float) -> list[Any]:
    """Ask Ray for the reward actors; they come up while the caller goes on."""
    actor = RewardActor.options(  # type: ignore[attr-defined]
        num_cpus=config.cpus_per_actor, num_gpus=gpus, max_restarts=-1, max_task_retries=0
    )
    return [actor.remote(config, max(1, int(config.cpus_per_actor))) for _ in range(config.actors)]


def wait_for_actors(actors: Sequence[Any], timeout_s: float) -> list[dict[str, Any]]:
    """Wait until every actor has loaded its model.

    Raises:
        RewardError: some had not after `timeout_s`, or could not.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        asked = [actor.describe.remote() for actor in actors]
        left_s = max(0.0, deadline - time.monotonic())
        _, waiting = ray.wait(asked, num_returns=len(asked), timeout=left_s)
        if waiting:
            raise RewardError(
                f"{len(waiting)} of {len(asked)} reward actors did not come up within "
                f"{timeout_s:g} s. The cluster may lack the CPUs or GPUs they ask for "
                "(reward.cpus_per_actor, reward.gpus_per_actor); free now: "
                f"{ray.available_resources()}."
            )
        try:
            return ray.get(asked)
        except ActorUnavailableError:
            time.sleep(0.2)  # one of them restarts, and refuses meanwhile
        except RayActorError as error:
            # The last line is the cause; those before say where in Ray it came up.
            cause = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise RewardError(f"A reward actor could not start: {cause}") from error


@dataclass(slots=True)
class _Chunk:
    batch: tuple[Any, ...]
    actor: int = -1
    ref: Any = None


class RewardClient:
    """A worker's way to the actors; itself a `Scorer`. Cheap to pickle: it holds handles."""

    def __init__(self, actors: Sequence[Any], config: RewardConfig) -> None:
        self._actors = list(actors)
        self._chunk_size = config.batch_size
        self._deadline_s = config.deadline_s
        self._in_flight = [0] * len(self._actors)
        # Workers begin at different actors, so that the first chunks do not all meet at one.
        self._next = hash(ray.get_runtime_context().get_worker_id()) % len(self._actors)

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]],
        columns: Columns,
    ) -> Pending:
        """Send a batch to the actors, in chunks; arguments as in `Scorer.submit`."""
        chunks = []
        for start in range(0, len(responses), self._chunk_size):
            part = slice(start, start + self._chunk_size)
            own_columns = {name: list(column[part]) for name, column in columns.items()}
            chunk = _Chunk((prompts[part], responses[part], response_ids[part], own_columns))
            self._send(chunk)
            chunks.append(chunk)
        return _PendingScores(self, chunks)

    def _send(self, chunk: _Chunk) -> None:
        """Give a chunk to the actor with least to do, another one than before if there is one."""
        count = len(self._actors)
        candidates = [(self._next + i) % count for i in range(count)]
        others = [i for i in candidates if i != chunk.actor] or candidates
        chunk.actor = min(others, key=lambda i: self._in_flight[i])
        self._next = (chunk.actor + 1) % count
        self._in_flight[chunk.actor] += 1
        chunk.ref = self._actors[chunk.actor].score.remote(*chunk.batch)

    def _receive(self, chunk: _Chunk, deadline: float) -> Scores:
        """Wait for a chunk's scores, sending it elsewhere when its actor dies."""
        while True:
            try:
                return ray.get(chunk.ref, timeout=max(0.0, deadline - time.monotonic()))
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise self._too_late(chunk, error) from error
                time.sleep(0.2)  # an actor that restarts refuses at once
                self._in_flight[chunk.actor] -= 1
                self._send(chunk)
            except GetTimeoutError as error:
                raise self._too_late(chunk, error) from error

    def _too_late(self, chunk: _Chunk, error: Exception) -> RewardError:
        return RewardError(
            f"Reward actor {chunk.actor} of {len(self._actors)} gave no scores for "
            f"{len(chunk.batch[0])} texts within {self._deadline_s:g} s (reward.deadline_s): "
            f"{type(error).__name__}. Add actors, or raise the deadline."
        )

    def _forget(self, chunk: _Chunk) -> None:
        self._in_flight[chunk.actor] -= 1
        chunk.ref = None


class _PendingScores:
    """Scores of the chunks of one batch, in order."""

    def __init__(self, client: RewardClient, chunks: list[_Chunk]) -> None:
        self._client = client
        self._chunks = chunks

    def result(self) -> Scores:
        """Wait for all of them, at most `reward.deadline_s`."""
        deadline = time.monotonic() + self._client._deadline_s
        parts = []
        for chunk in self._chunks:
            parts.append(self._client._receive(chunk, deadline))
            self._client._forget(chunk)
        return Scores.concatenate(parts)
