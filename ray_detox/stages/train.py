"""Ray Train: a group of workers that run `loop.train` together.

    driver                                     worker 0 .. N-1
      run_training                               train_worker
        TorchTrainer.fit  (its own thread) ---->   RayRuntime + Lanes + Policy + RewardClient
        main thread: poll Progress  <------------  log (rank 0), should_stop
        checkpoints in train.storage  <----------  save (rank 0), on all ranks a barrier

`ray.train.report` waits for a controller that looks up every so often, so it is called only with
a checkpoint. Figures go through `Progress`, an actor without a CPU, and the driver prints them.
"""

import contextlib
import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from ray_detox.config import RunConfig, config_from_dict
from ray_detox.prompts import unpack
from ray_detox.records import UpdateStats
from ray_detox.stages.ingest import lane_name

T = TypeVar("T")

POLL_S = 0.2


class TrainingError(RuntimeError):
    """Training ended with an error; the newest checkpoint is kept."""


@ray.remote(num_cpus=0)
class Progress:
    """What workers tell the driver, and what the driver tells them."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def put(self, event: dict[str, Any]) -> None:
        """Add an event for the driver."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Hand over all events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """Ask the workers to end after the step they are in."""
        self._stop = True

    def should_stop(self) -> bool:
        """True once `stop` was called."""
        return self._stop


class RayRuntime:
    """`loop.Runtime` in a Ray Train worker."""

    def __init__(self, progress: Any, device: Any) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self._progress = progress
        self._device = device

    def sum_over_workers(self, x: Any) -> Any:
        """All-reduce; a copy, so that the argument stays as it was."""
        import torch.distributed as dist

        if self.world_size == 1:
            return x
        # gloo (chosen where workers share a GPU) reduces on the CPU.
        total = x.detach().cpu() if dist.get_backend() == "gloo" else x.detach().clone()
        total = total.clone() if total.data_ptr() == x.data_ptr() else total
        dist.all_reduce(total)
        return total.to(x.device)

    def log(self, stats: UpdateStats) -> None:
        """Send a step's figures to the driver, without waiting."""
        self._progress.put.remote({"kind": "step", "stats": dataclasses.asdict(stats)})

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Report a checkpoint; Ray Train moves it to storage whole, or not at all."""
        if self.rank != 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._progress.put.remote({"kind": "checkpoint", "step": step})

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Read the newest checkpoint in storage, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return read(Path(folder))

    def should_stop(self) -> bool:
        """Ask the driver's side."""
        return bool(ray.get(self._progress.should_stop.remote()))


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; returns how it ended, with rank 0's measurements."""
    import resource

    import torch
    from transformers import AutoTokenizer

    from ray_detox.lanes import Lanes, lanes_of_worker
    from ray_detox.learner import NonFiniteError
    from ray_detox.loop import train
    from ray_detox.policy import load_policy
    from ray_detox.sources import local_folder
    from ray_detox.stages.score import RewardClient

    config = config_from_dict(job["config"])
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    runtime = RayRuntime(job["progress"], device)
    policy = load_policy(config.policy, config.sampling, config.seed, device)
    folder = local_folder(config.policy.model, config.policy.revision, "policy.model")
    mine = lanes_of_worker(config.data.lanes, runtime.rank, runtime.world_size)
    lanes = Lanes(config, {lane: _read_lane(lane) for lane in mine}, policy.pad_id)
    runtime._progress.put.remote(
        {
            "kind": "worker",
            "rank": runtime.rank,
            "node": ray.get_runtime_context().get_node_id()[:8],
            "device": str(device),
            "prompts": sum(len(rows) for rows in lanes.rows.values()),
        }
    )
    began = time.perf_counter()
    try:
        with contextlib.closing(RewardClient(job["reward"], config.reward)) as scorer:
            outcome = train(
                config, runtime, policy, AutoTokenizer.from_pretrained(folder), scorer, lanes
            )
    except NonFiniteError as error:
        # Trying again from the checkpoint would fail again: this is an answer, not a fault.
        return {"error": str(error)}
    return {
        "step": outcome.step,
        "stopped": outcome.stopped,
        "loop_seconds": time.perf_counter() - began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _read_lane(lane: int) -> list[dict[str, Any]]:
    shard = ray.train.get_dataset_shard(lane_name(lane))
    blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow")
    return unpack([row for block in blocks for row in block.to_pylist()])


def run_training(
    config: RunConfig,
    lanes: Sequence[ray.data.Dataset],
    directory: Any,
    gpus_per_worker: float,
    storage: str,
    on_event: Callable[[dict[str, Any]], None],
    stop_requested: threading.Event,
) -> dict[str, Any]:
    """Train on the cluster until done, stopped or failed.

    Args:
        config: of the run.
        lanes: from `ingest`.
        directory: of the reward actors, which are up.
        gpus_per_worker: resolved for this cluster.
        storage: folder or `s3://...` for checkpoints; an earlier run's newest one is taken up.
        on_event: called in this thread for each step, worker and checkpoint.
        stop_requested: once set, the workers checkpoint and end after the step they are in.

    Returns:
        What rank 0 returned, and `checkpoint`: path and filesystem of the newest checkpoint.

    Raises:
        TrainingError: in one sentence, with the newest checkpoint kept.
    """
    progress = Progress.remote()  # type: ignore[attr-defined]
    job = {"config": config.to_dict(), "progress": progress, "reward": directory}
    trainer = _make_trainer(config, job, lanes, gpus_per_worker, storage)

    # fit() in a thread of its own: this one prints, and hears Ctrl-C.
    ended: dict[str, Any] = {}
    fit = threading.Thread(target=_fit, args=(trainer, ended), daemon=True)
    fit.start()
    told = False
    while fit.is_alive():
        fit.join(POLL_S)
        if stop_requested.is_set() and not told:
            ray.get(progress.stop.remote())
            told = True
        for event in ray.get(progress.take.remote()):
            on_event(event)
    for event in ray.get(progress.take.remote()):
        on_event(event)
    ray.kill(progress)
    if "error" in ended:
        raise TrainingError(explain(ended["error"])) from ended["error"]
    outcome = ended["result"].return_value
    if "error" in outcome:
        raise TrainingError(outcome["error"])
    checkpoint = ended["result"].checkpoint
    return outcome | {"checkpoint": checkpoint.path, "filesystem": checkpoint.filesystem}


def _make_trainer(
    config: RunConfig,
    job: dict[str, Any],
    lanes: Sequence[ray.data.Dataset],
    gpus_per_worker: float,
    storage: str,
) -> TorchTrainer:
    whole_gpus = gpus_per_worker >= 1
    return TorchTrainer(
        train_worker,
        train_loop_config=job,
        # NCCL refuses two workers on one GPU.
        torch_config=TorchConfig(backend="nccl" if whole_gpus else "gloo", timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": config.train.cpus_per_worker}
            | ({"GPU": gpus_per_worker} if gpus_per_worker else {}),
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=storage,
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.checkpoints_kept),
        ),
        datasets={lane_name(i): lane for i, lane in enumerate(lanes)},
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )


def _fit(trainer: TorchTrainer, ended: dict[str, Any]) -> None:
    try:
        ended["result"] = trainer.fit()
    except BaseException as error:  # handed to the thread that waits, which raises it
        ended["error"] = error


def explain(error: BaseException) -> str:
    """The innermost cause of a failed worker group, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = innermost(next(iter(failures.values()), error))
    return f"Training failed: {type(cause).__name__}: {last_line(cause)}"


def innermost(error: BaseException) -> BaseException:
    """What an error comes from in the end: Ray wraps it, in the worker and on the way."""
    while inner := getattr(error, "cause", None) or error.__cause__:
        error = inner
    return error


def last_line(error: BaseException) -> str:
    """The end of an error's message, where Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
