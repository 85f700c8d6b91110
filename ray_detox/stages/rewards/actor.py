"""A reward actor: one copy of the reward in a Ray actor process."""

import threading

import ray

from ray_detox.config import ConfigError, RunConfig
from ray_detox.records import PreparedRow, ScoreRequest, Scores
from ray_detox.rewards.messages import ActorReport


# Pings run on separate threads, so that neither a batch nor waiting callers delay the reply.
@ray.remote(concurrency_groups={"health": 2, "life": 1})
class RewardActor:
    """One copy of the reward in its own process.

    Args:
        config: of the run.
        threads: for torch.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        # Imported here, so that the driver can name this class without loading torch.
        import torch

        from ray_detox.rewards.batching import ModelThread
        from ray_detox.rewards.reward import Reward

        torch.set_num_threads(threads)
        reward = Reward(config.reward, "cuda" if ray.get_gpu_ids() else "cpu")
        self._reward = reward
        self._device = str(reward.classifier.device)
        self._max_tokens = reward.classifier.max_tokens
        self._model = ModelThread(reward, config.serving)

    def score(self, request: ScoreRequest) -> tuple[Scores, int]:
        """Return the scores of one chunk, and the number of texts that the actor still holds."""
        scores = self._model.score(request)
        return scores, self._model.state().held

    def check(self, row: PreparedRow) -> str | None:
        """Return why the reward fails its trial on sentences (`rewards/sentences.py`), or None.

        It runs beside the model's thread, so no worker may send texts meanwhile.
        """
        from ray_detox.rewards.sentences import SampleRow, check_sentences

        try:
            check_sentences(self._reward, SampleRow(row.prompt, row.columns))
        except ConfigError as error:
            return str(error)
        return None

    @ray.method(concurrency_group="health")
    def ping(self) -> ActorReport:
        """Report the state of this actor. Ray runs this only once the model is loaded."""
        import resource

        return ActorReport(
            state=self._model.state(),
            node=ray.get_runtime_context().get_node_id()[:8],
            device=self._device,
            max_tokens=self._max_tokens,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        )

    @ray.method(concurrency_group="life")
    def live(self) -> None:
        """Never return: the call fails at the moment at which this process dies.

        A ping cannot replace it: one to a process that hangs stays open, and so does one to a
        process that is still loading its model.
        """
        threading.Event().wait()
