"""A reward actor: one copy of the reward in a process of its own."""

import threading
from typing import Any

import ray

from ray_detox.config import RunConfig
from ray_detox.records import ScoreRequest, Scores


@ray.remote(concurrency_groups={"health": 2, "life": 1})
class RewardActor:
    """One copy of the reward, in a process of its own.

    Signs of life have threads of their own: neither a batch nor a hundred callers that wait keep
    it from answering.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        import torch

        from ray_detox.rewards.batching import ModelThread
        from ray_detox.rewards.reward import Reward

        torch.set_num_threads(threads)
        reward = Reward(config.reward, "cuda" if ray.get_gpu_ids() else "cpu")
        self._device = str(reward.classifier.device)
        self._max_tokens = reward.classifier.max_tokens
        self._model = ModelThread(reward, config.serving)

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        """Return the scores of one chunk, and the number of texts that the actor still holds."""
        scores = self._model.score(request)
        return scores, self._model.state()["held"]

    @ray.method(concurrency_group="health")
    def ping(self) -> dict[str, Any]:
        """Where this actor lives and how it gets on; answers once the model is loaded."""
        import resource

        return self._model.state() | {
            "node": ray.get_runtime_context().get_node_id()[:8],
            "device": self._device,
            "max_tokens": self._max_tokens,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }

    @ray.method(concurrency_group="life")
    def live(self) -> None:
        """A call that never returns: it fails at the moment at which this process dies."""
        threading.Event().wait()
