"""Ray Train: a group of workers that run `loop.train` together, and what keeps one going.

    driver                                            worker 0 .. N-1
      run_training                                      train_worker
        _Group: TorchTrainer.fit (a thread)  -------->    RayRuntime + PromptShards + Policy + RewardClient
        main thread: polls Progress  <----------------    log, save (rank 0)
          figures -> on_event, checkpoints -> CheckpointWriter -> storage
        a worker, a node is lost; a node is to go; room for one more worker:
          the next _Group, of as many workers as fit, from the newest checkpoint

A checkpoint is a few MB, so rank 0 hands it to the driver and the driver keeps it: no node but
the driver's needs the storage, and a step waits for nothing but the copy. `ray.train.report`
would have every worker wait for a controller that looks up every so often. For the same reason
figures go through `Progress`, an actor without a CPU.
"""

import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
import ray.train
import ray.util
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from ray_detox.config import RunConfig
from ray_detox.recipes.loading import config_from_dict
from ray_detox.records import UpdateStats
from ray_detox.resources import Needs
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointWriter, pack_folder, unpack_folder
from ray_detox.stages.cluster.elastic import UpscaleTrigger, wait_for_workers
from ray_detox.stages.cluster.nodes import draining_nodes, staying_nodes
from ray_detox.stages.errors import TrainingError, describe
from ray_detox.stages.ingest import unpack_rows
from ray_detox.stages.progress import ACTOR_TIMEOUT_S, EVENT_POLL_S, start_progress

T = TypeVar("T")


class RayRuntime:
    """`loop.Runtime` in a Ray Train worker."""

    def __init__(self, progress: Any, group: str, start: dict[str, bytes] | None) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self._progress = progress
        self._group = group
        self._start = start

    def tell(self, event: dict[str, Any]) -> Any:
        """Send an event to the driver, without waiting."""
        return self._progress.put.remote(event | {"group": self._group})

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
        self.tell({"kind": "step", "stats": dataclasses.asdict(stats)})

    def save(
        self, step: int, write: Callable[[Path], None], objective: float | None, last: bool
    ) -> None:
        """Send a checkpoint to the driver, waiting only for that of the last step."""
        files = pack_folder(write)
        event = {"kind": "checkpoint", "checkpoint": Checkpoint(step, files, objective)}
        sent = self.tell(event)
        if last:
            ray.get(sent, timeout=ACTOR_TIMEOUT_S)

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Read the checkpoint that this group began with, if there was one."""
        return unpack_folder(self._start, read) if self._start else None

    def should_stop(self) -> bool:
        """Ask the driver's side."""
        return bool(ray.get(self._progress.should_stop.remote(), timeout=ACTOR_TIMEOUT_S))


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs; returns how it ended, with rank 0's measurements."""
    import resource

    import torch
    from transformers import AutoTokenizer

    from ray_detox.data.shards import PromptShards, shards_of_worker
    from ray_detox.models.loading import load_policy
    from ray_detox.models.sources import local_folder
    from ray_detox.rl.learner import NonFiniteError
    from ray_detox.rl.loop import StartError, train
    from ray_detox.stages.rewards.client import RewardClient

    config = config_from_dict(job["config"])
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    start = ray.get(job["start"]) if job["start"] else None
    runtime = RayRuntime(job["progress"], job["group"], start)
    policy = load_policy(config.policy, config.sampling, config.seed, device)
    folder = local_folder(config.policy.model, config.policy.revision, "policy.model")
    mine = shards_of_worker(config.data.shards, runtime.rank, runtime.world_size)
    rows = {shard: unpack_rows(ray.get(job["shards"][shard]).to_pylist()) for shard in mine}
    shards = PromptShards(config, rows, policy.pad_id)
    runtime.tell(
        {
            "kind": "worker",
            "rank": runtime.rank,
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "device": str(device),
            "prompts": sum(map(len, rows.values())),
        }
    )
    scorer = RewardClient(job["directory"], config)
    began = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        outcome = train(config, runtime, policy, tokenizer, scorer, shards)
    except (NonFiniteError, StartError) as error:
        # Trying again from the checkpoint would fail again: this is an answer, not a fault.
        return {"error": str(error)}
    finally:
        scorer.close()
    return {
        "step": outcome.step,
        "stopped": outcome.stopped,
        "loop_seconds": time.perf_counter() - began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run_training(
    config: RunConfig,
    shards: Sequence[Any],
    pool: Any,
    need: Needs,
    writer: CheckpointWriter,
    on_event: Callable[[dict[str, Any]], None],
    stop_requested: threading.Event,
) -> dict[str, Any]:
    """Train on the cluster until done, stopped or failed, whatever workers and nodes are lost.

    Args:
        config: of the run.
        shards: from `ingest`.
        pool: the `RewardPool`, loaded.
        need: resolved for this cluster.
        writer: keeps checkpoints; training goes on from its `newest`.
        on_event: called in this thread for each step, worker, loss and change of workers.
        stop_requested: once set, the workers checkpoint and end after the step they are in.

    Returns:
        What rank 0 returned, and how often the group was `lost`, moved and resized.

    Raises:
        TrainingError: in one sentence, with the newest checkpoint kept.
        ConfigError: there is no room for `train.workers`, and has not been for `cluster.capacity_timeout_s`.
        StorageError: the last checkpoint could not be kept.
    """
    progress = start_progress()
    scratch = tempfile.mkdtemp(prefix="ray-detox-train-")
    job = {
        "config": config.to_dict(),
        "progress": progress,
        "directory": pool.directory,
        "shards": list(shards),
    }
    ends = {"lost": 0, "moved": 0, "resized": 0}
    failures, failed_at = 0, -1
    hoped = config.train.min_workers
    try:
        while True:
            workers = wait_for_workers(config, need, pool, hoped, stop_requested)
            step = writer.newest.step if writer.newest else 0
            if not workers:
                writer.flush(ACTOR_TIMEOUT_S)
                return {"step": step, "stopped": True} | ends
            on_event(
                {"kind": "group", "workers": workers, "step": step, "number": sum(ends.values())}
            )
            group = _Group(config, need, pool, job, workers, writer, scratch, on_event)
            outcome = group.run(stop_requested)
            hoped = group.workers_that_stay()
            if group.error is not None:
                ends["lost"] += 1
                step = writer.newest.step if writer.newest else 0
                failures, failed_at = (failures + 1 if step == failed_at else 1), step
                if failures > config.cluster.max_failures:
                    raise TrainingError(
                        f"Training failed {failures} times at step {step + 1}: "
                        f"{describe(group.error)}. The newest checkpoint is that of step {step}."
                    ) from group.error
                on_event({"kind": "lost", "cause": describe(group.error), "step": step})
            elif "error" in outcome:
                raise TrainingError(outcome["error"])
            elif group.why_stopped in ("moved", "resized") and outcome["stopped"]:
                ends[group.why_stopped] += 1
            else:
                writer.flush(ACTOR_TIMEOUT_S)
                return outcome | ends
    finally:
        ray.kill(progress)
        shutil.rmtree(scratch, ignore_errors=True)


class _Group:
    """One life of the worker group, from its start to its end."""

    def __init__(
        self,
        config: RunConfig,
        need: Needs,
        pool: Any,
        job: dict[str, Any],
        workers: int,
        writer: CheckpointWriter,
        scratch: str,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self.name = f"group-{time.time_ns()}"
        self.error: BaseException | None = None
        self.why_stopped: str | None = None
        """`asked` by a person, `moved` off a node that is to go, or `resized` to more workers."""
        self._config = config
        self._workers = workers
        self._writer = writer
        self._on_event = on_event
        self._progress = job["progress"]
        self._nodes: dict[int, str] = {}
        """Of each worker, by rank."""
        self._look_for_room = lambda: UpscaleTrigger(config, need, pool, workers)
        self._room: UpscaleTrigger | None = None
        """Looked for once all workers have the room that they were promised."""
        self._outcome: dict[str, Any] = {}
        self._before = _placement_groups()
        start = ray.put(dict(writer.newest.files)) if writer.newest else None
        job = job | {"start": start, "group": self.name}
        self._trainer = self._make_trainer(job, need, scratch)

    def run(self, stop_requested: threading.Event) -> dict[str, Any]:
        """What rank 0 returned; empty where the group failed, with `error`."""
        # fit() in a thread of its own: this one prints, and hears Ctrl-C.
        fit = threading.Thread(target=self._fit, daemon=True)
        fit.start()
        while fit.is_alive():
            fit.join(EVENT_POLL_S)
            if self.why_stopped is None:
                self.why_stopped = self._why_stop(stop_requested)
            self._take_events()
        self._take_events()
        for left_behind in _placement_groups() - self._before:
            # By a controller that was killed: nobody else would ever give its room back.
            group_id = ray.PlacementGroupID(bytes.fromhex(left_behind))
            remove_placement_group(PlacementGroup(group_id))
        return self._outcome

    def workers_that_stay(self) -> int:
        """How many workers there will be room for, once this group has let go of what it holds."""
        staying = staying_nodes()
        here = sum(node in staying for node in self._nodes.values())
        missing = self._workers - len(self._nodes)  # they had not come up yet
        return here + missing + (self.why_stopped == "resized")

    def _why_stop(self, stop_requested: threading.Event) -> str | None:
        if stop_requested.is_set():
            return "asked"
        if draining_nodes() & set(self._nodes.values()):
            return "moved"
        return "resized" if self._room and self._room.is_there() else None

    def _take_events(self) -> None:
        stop = self.why_stopped is not None
        for event in ray.get(self._progress.take.remote(stop), timeout=ACTOR_TIMEOUT_S):
            if event["group"] != self.name:
                # Of an earlier group, from a node that was cut off for a while: Ray delivers what
                # its workers said meanwhile, and then ends them. Their steps were done again.
                continue
            if event["kind"] == "checkpoint":
                self._writer.put(event["checkpoint"])
                continue
            if event["kind"] == "worker":
                self._nodes[event["rank"]] = event["node"]
                if len(self._nodes) == self._workers:
                    self._room = self._look_for_room()
            elif event["kind"] == "step" and self._room:
                self._room.step_took(event["stats"])
            self._on_event(event)

    def _fit(self) -> None:
        try:
            self._outcome = self._trainer.fit().return_value
        except BaseException as error:  # handed to the thread that waits, which judges it
            self.error = error

    def _make_trainer(self, job: dict[str, Any], need: Needs, scratch: str) -> TorchTrainer:
        gpus = need.gpus_per_worker
        return TorchTrainer(
            train_worker,
            train_loop_config=job,
            # NCCL refuses two workers on one GPU.
            torch_config=_TorchConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=300),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self._workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": self._config.cluster.cpus_per_worker}
                | ({"GPU": gpus} if gpus else {}),
            ),
            run_config=ray.train.RunConfig(
                name=self.name,
                storage_path=scratch,
                # A group that fails comes back to `run_training`, which knows how many workers
                # fit by now; Ray would wait for as many as before.
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's way to connect workers, but that gloo is told where."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def choose_interface() -> None:
    """Have gloo listen where Ray reaches this node, unless GLOO_SOCKET_IFNAME says where.

    By itself it looks the machine's name up, and on many (Debian's 127.0.1.1) that is an address
    at which no other machine finds it.
    """
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == here for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _placement_groups() -> set[str]:
    """Ids of the placement groups of this job that hold room, or wait for it."""
    job = ray.get_runtime_context().get_job_id()
    table = placement_group_table()
    return {i for i, about in table.items() if i.endswith(job) and about["state"] != "REMOVED"}
