"""A training worker: `rl.loop.train` inside a Ray Train worker process.

A checkpoint is a few MB, so rank 0 sends it to the driver, which stores it: only the driver's
node needs access to the storage, and a step waits only for the copy. With `ray.train.report`,
every worker would wait for a controller that polls. Metrics go the same way, through the actor
`Progress`, which reserves no CPU.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from ray import ObjectRef

from ray_detox.config import RunConfig
from ray_detox.data.prompts import unpack_rows
from ray_detox.errors import NonFiniteError
from ray_detox.records import Objective, UpdateStats
from ray_detox.rewards.messages import ActorHandle
from ray_detox.runs.checkpoint_store import Checkpoint, pack_folder, unpack_folder
from ray_detox.stages.events import CheckpointTaken, StepDone, WorkerEvent, WorkerStarted
from ray_detox.stages.progress import ACTOR_TIMEOUT_S

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Input of a group of training workers."""

    config: RunConfig
    group: str
    """Name of the group, which all its events carry."""
    progress: ActorHandle
    """A `Progress`."""
    directory: ActorHandle
    """The `RewardDirectory` of the pool."""
    shards: Sequence[ObjectRef[Any]]
    """References to the Arrow table of each of the `data.shards` shards."""
    start: ObjectRef[Any] | None
    """Reference to the files of the checkpoint to resume from; None starts at step 0."""


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """Return value of a training worker; the driver uses that of rank 0."""

    step: int = 0
    """Steps done in all."""
    stopped: bool = False
    """True if the driver stopped the worker early."""
    loop_seconds: float = 0.0
    peak_mb: int = 0
    error: str | None = None
    """An error that another attempt would repeat, such as a loss that is not finite."""
    diverged: bool = False
    """True if the error is that the policy has diverged."""


class RayRuntime:
    """`rl.loop.Runtime` in a Ray Train worker."""

    def __init__(self, progress: ActorHandle, group: str, start: dict[str, bytes] | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.group = group
        self._progress = progress
        self._start = start

    def send(self, event: WorkerEvent) -> ObjectRef[None]:
        """Send an event to the driver, without waiting."""
        return self._progress.put.remote(event)

    def sum_over_workers(self, x: Any) -> Any:
        """All-reduce a copy of `x`; the argument does not change."""
        import torch.distributed as dist

        if self.world_size == 1:
            return x
        # gloo, the backend when workers share a GPU, reduces on the CPU.
        total = x.detach().cpu() if dist.get_backend() == "gloo" else x.detach().clone()
        total = total.clone() if total.data_ptr() == x.data_ptr() else total
        dist.all_reduce(total)
        return total.to(x.device)

    def log(self, stats: UpdateStats) -> None:
        """Send the metrics of a step to the driver, without waiting."""
        self.send(StepDone(self.group, stats))

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        objective: Objective | None,
        last: bool,
    ) -> None:
        """Send a checkpoint to the driver; wait for it only after the last step."""
        checkpoint = Checkpoint(step, pack_folder(write), objective)
        sent = self.send(CheckpointTaken(self.group, checkpoint))
        if last:
            ray.get(sent, timeout=ACTOR_TIMEOUT_S)

    def flush(self) -> None:
        """Wait until the driver can see all events sent so far: calls of an actor keep their order."""
        self.should_stop()

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Read the checkpoint that this group resumes from, if there is one."""
        return unpack_folder(self._start, read) if self._start else None

    def should_stop(self) -> bool:
        """Return whether the driver has asked the workers to stop, according to `Progress`."""
        return bool(ray.get(self._progress.should_stop.remote(), timeout=ACTOR_TIMEOUT_S))


def train_worker(settings: dict[str, TrainJob]) -> WorkerResult:
    """Run PPO in this worker, from the job's checkpoint to the end.

    Args:
        settings: Ray Train passes a dictionary; its only entry, `job`, is the `TrainJob`.
    """
    import resource

    import torch
    from transformers import AutoTokenizer

    from ray_detox.data.shards import PromptShards, shards_of_worker
    from ray_detox.models.loading import load_policy
    from ray_detox.models.sources import local_folder
    from ray_detox.rl.divergence import DivergedError
    from ray_detox.rl.loop import StartError, train
    from ray_detox.stages.rewards.client import RewardClient

    job = settings["job"]
    config = job.config
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    runtime = RayRuntime(job.progress, job.group, ray.get(job.start) if job.start else None)
    policy = load_policy(config.policy, config.sampling, config.seed, device, config.ppo.critic)
    folder = local_folder(config.policy.model, config.policy.revision, "policy.model")
    mine = shards_of_worker(config.data.shards, runtime.rank, runtime.world_size)
    rows = {shard: unpack_rows(ray.get(job.shards[shard]).to_pylist()) for shard in mine}
    shards = PromptShards(config, rows, policy.pad_id)
    runtime.send(
        WorkerStarted(
            group=job.group,
            rank=runtime.rank,
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device=str(device),
            prompts=sum(map(len, rows.values())),
        )
    )
    scorer = RewardClient(job.directory, config)
    began = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        outcome = train(config, runtime, policy, tokenizer, scorer, shards)
    except (NonFiniteError, StartError, DivergedError) as error:
        # Another attempt from the checkpoint would fail again. Returning the error, instead of
        # raising it, keeps the driver from starting a new group.
        runtime.flush()
        return WorkerResult(error=str(error), diverged=isinstance(error, DivergedError))
    finally:
        scorer.close()
    return WorkerResult(
        step=outcome.step,
        stopped=outcome.stopped,
        loop_seconds=time.perf_counter() - began,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )
