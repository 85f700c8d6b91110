"""Training on Ray Train: run worker groups until the run is done, and restart them after failures.

    driver                                              worker 0 .. N-1  (`worker.py`)
      run_training                                        train_worker
        WorkerGroup: TorchTrainer.fit (a thread)  ---->     RayRuntime + PromptShards + Policy + RewardClient
        main thread: polls Progress  <------------------    log, save (rank 0)
          metrics -> on_event, checkpoints -> CheckpointWriter -> storage

States of the training. One `WorkerGroup` lives from STARTING to the next WAITING:

    WAITING --- min_workers fit ---> STARTING --- every worker reported ---> RUNNING --- last step ---> DONE
       ^                                |                                       |
       |                                |                                       |
       +---- LOST: a worker or node failed; resumes from the newest checkpoint -+
       +---- MOVED: a node will be drained; resumes elsewhere ------------------+
       +---- RESIZED: another worker fits; resumes with one more ---------------'

    A stop by the user ends any state with STOPPED: after a checkpoint if a group is running.
    More than cluster.max_failures LOST groups at the same step end the run with an error.

A step's result does not depend on the number of workers, so a group may resume with fewer or more.
"""

import importlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import ray.train
import ray.util
from ray import ObjectRef
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from ray_detox.config import RunConfig
from ray_detox.records import RewardError
from ray_detox.resources import Needs
from ray_detox.runs.checkpoint_store import CheckpointWriter
from ray_detox.runs.storage import StorageError, write_atomic
from ray_detox.stages.cluster.admission import THREAD_END_TIMEOUT_S
from ray_detox.stages.cluster.elastic import UpscaleTrigger, wait_for_workers
from ray_detox.stages.cluster.nodes import draining_nodes, staying_nodes
from ray_detox.stages.cluster.private import LOOPBACK
from ray_detox.stages.errors import TrainingDiverged, TrainingError, describe, permanent_failure
from ray_detox.stages.events import (
    CheckpointTaken,
    GroupLost,
    GroupStarted,
    StepDone,
    TrainingEvent,
    WorkerStarted,
)
from ray_detox.stages.progress import ACTOR_TIMEOUT_S, EVENT_POLL_S, start_progress
from ray_detox.stages.rewards.pool import RewardPool
from ray_detox.stages.worker import TrainJob, WorkerResult, train_worker

ERROR_FILE = "error.txt"
"""File of a run with the traceback of a user's function that failed."""

StopReason = Literal["requested", "moved", "resized"]
"""`requested` by the user, `moved` off a node that will be drained, or `resized` to more workers."""


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """Result of a run's training, over all worker groups that this process started."""

    step: int
    """Steps done in all."""
    stopped: bool = False
    """True if the user stopped the run early."""
    loop_seconds: float | None = None
    """Wall time of the last group's training loop; None if no group had to run."""
    peak_mb: int | None = None
    """Peak memory of rank 0's process in the last group."""
    lost: int = 0
    """Groups that failed."""
    moved: int = 0
    """Groups that ended because a node was going to be drained."""
    resized: int = 0
    """Groups that ended so that one with more workers could start."""

    @property
    def groups(self) -> int:
        """Groups that ended before the last one."""
        return self.lost + self.moved + self.resized


def run_training(
    config: RunConfig,
    shards: Sequence[ObjectRef[Any]],
    pool: RewardPool,
    need: Needs,
    writer: CheckpointWriter,
    scratch: Path,
    on_event: Callable[[TrainingEvent], None],
    stop_requested: threading.Event,
) -> TrainingOutcome:
    """Train on the cluster until done, stopped or failed; lost workers and nodes are replaced.

    Args:
        config: of the run.
        shards: from `ingest`.
        pool: the `RewardPool`, loaded.
        need: resolved for this cluster.
        writer: stores checkpoints; training resumes from its `newest`.
        scratch: folder for files of Ray Train on the driver's node; removed at the end.
        on_event: called in this thread for each step, worker, loss and change of workers.
        stop_requested: once set, the workers save a checkpoint and end after the current step.

    Raises:
        TrainingError: training failed; the newest checkpoint is kept.
        TrainingDiverged: the policy has diverged; earlier checkpoints are kept.
        RewardError: the reward actors die again and again on the same texts; the newest checkpoint
            is kept.
        ConfigError: fewer than the smallest number of `train.workers` fit, for longer than
            `cluster.capacity_timeout_s`.
        StorageError: the last checkpoint could not be stored, or `on_event` raised it.
    """
    progress = start_progress()
    outcome = TrainingOutcome(step=0)
    failures = FailureCounter(config.cluster.max_failures)
    expected = config.train.min_workers
    try:
        while True:
            workers = wait_for_workers(config, need, pool, expected, stop_requested)
            step = newest_step(writer)
            if not workers:
                writer.flush(ACTOR_TIMEOUT_S)
                return replace(outcome, step=step, stopped=True)
            on_event(GroupStarted(number=outcome.groups, workers=workers, step=step))
            start = ray.put(dict(writer.newest.files)) if writer.newest else None
            name = f"group-{outcome.groups}-{secrets.token_hex(8)}"
            job = TrainJob(config, name, progress, pool.directory, list(shards), start)
            group = WorkerGroup(job, need, pool, workers, writer, scratch, on_event)
            result = group.run(stop_requested)
            expected = group.expected_workers()
            if group.error is not None:
                outcome = replace(outcome, lost=outcome.lost + 1)
                step = newest_step(writer)
                end_if_permanent(group.error, step, scratch.parent)
                failures.count(step, group.error)
                on_event(GroupLost(describe(group.error), step))
            elif result.error is not None:
                raise (TrainingDiverged if result.diverged else TrainingError)(result.error)
            elif result.stopped and group.stop_reason == "moved":
                outcome = replace(outcome, moved=outcome.moved + 1)
            elif result.stopped and group.stop_reason == "resized":
                outcome = replace(outcome, resized=outcome.resized + 1)
            else:
                writer.flush(ACTOR_TIMEOUT_S)
                return replace(
                    outcome,
                    step=result.step,
                    stopped=result.stopped,
                    loop_seconds=result.loop_seconds,
                    peak_mb=result.peak_mb,
                )
    except (TrainingError, RewardError):
        # The storage may be slower than the steps, and the user is told to go on from here.
        with suppress(StorageError):
            writer.flush(ACTOR_TIMEOUT_S)
        raise
    finally:
        ray.kill(progress)
        shutil.rmtree(scratch, ignore_errors=True)


def end_if_permanent(error: BaseException, step: int, folder: Path) -> None:
    """Raise TrainingError if another worker group would fail in the same way.

    Args:
        error: of the group.
        step: of the newest checkpoint.
        folder: of the run, which keeps the traceback of a function of the user.
    """
    permanent = permanent_failure(error)
    if permanent is None:
        return
    reason, traceback = permanent
    kept = ""
    if traceback:
        with suppress(OSError):
            write_atomic(folder / ERROR_FILE, traceback)
            kept = f" Its traceback is in {folder / ERROR_FILE}."
    raise TrainingError(
        f"Training failed at step {step + 1}: {reason.rstrip('.')}.{kept} The newest checkpoint is that "
        f"of step {step}."
    ) from error


class FailureCounter:
    """Counts failures of worker groups that happen without a new checkpoint between them.

    A cluster may lose a node every hour: as long as the run makes progress, it must not end.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures, self._step = 0, -1

    def count(self, step: int, error: BaseException) -> None:
        """Count a failure.

        Args:
            step: of the newest checkpoint.
            error: of the group that failed.

        Raises:
            TrainingError: there were more than `max_failures` at this step.
        """
        self._failures = self._failures + 1 if step == self._step else 1
        self._step = step
        if self._failures > self._max_failures:
            raise TrainingError(
                f"Training failed {self._failures} times at step {step + 1}: {describe(error)}. "
                f"The newest checkpoint is that of step {step}."
            ) from error


def newest_step(writer: CheckpointWriter) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return writer.newest.step if writer.newest else 0


class WorkerGroup:
    """One group of training workers, from its start to its end."""

    def __init__(
        self,
        job: TrainJob,
        need: Needs,
        pool: RewardPool,
        workers: int,
        writer: CheckpointWriter,
        scratch: Path,
        on_event: Callable[[TrainingEvent], None],
    ) -> None:
        self.job = job
        self.error: BaseException | None = None
        self.stop_reason: StopReason | None = None
        self._workers = workers
        self._pool = pool
        self._writer = writer
        self._on_event = on_event
        self._nodes: dict[int, str] = {}
        """Node of each worker that has started, by rank."""
        self._make_trigger = lambda: UpscaleTrigger(job.config, need, pool, workers)
        self._upscale: UpscaleTrigger | None = None
        """Set once all workers run: until then, resources that look free are theirs."""
        self._result = WorkerResult()
        self._placement_groups_before = _placement_groups()
        self._trainer = self._make_trainer(need, scratch)

    def run(self, stop_requested: threading.Event) -> WorkerResult:
        """Train, and return the result of rank 0; if the group failed, `error` is set.

        Raises:
            RewardError: see `RewardPool.check_scoring`.
        """
        # fit() blocks, so it gets a thread of its own: this thread prints and handles Ctrl-C.
        fit = threading.Thread(target=self._fit, daemon=True)
        fit.start()
        while fit.is_alive():
            fit.join(EVENT_POLL_S)
            if self.stop_reason is None:
                self.stop_reason = self._find_stop_reason(stop_requested)
            self._take_events()
            try:
                self._pool.check_scoring()
            except RewardError:
                # Else the workers would wait for their scores until serving.timeout_s. A thread that
                # calls Ray after the end of the connection would end this process.
                self._remove_placement_groups()
                fit.join(THREAD_END_TIMEOUT_S)
                raise
        self._take_events()
        # A Train controller that was killed leaves its placement group, and with it the resources
        # that the next group needs.
        self._remove_placement_groups()
        return self._result

    def expected_workers(self) -> int:
        """Return how many workers should fit once this group has released its resources."""
        staying = staying_nodes()
        here = sum(node in staying for node in self._nodes.values())
        not_started = self._workers - len(self._nodes)
        more = self._upscale.more if self._upscale and self.stop_reason == "resized" else 0
        return here + not_started + more

    def _find_stop_reason(self, stop_requested: threading.Event) -> StopReason | None:
        if stop_requested.is_set():
            return "requested"
        if draining_nodes() & set(self._nodes.values()):
            return "moved"
        return "resized" if self._upscale and self._upscale.is_due() else None

    def _remove_placement_groups(self) -> None:
        """Release the resources of the group, which ends workers that still run."""
        for name in _placement_groups() - self._placement_groups_before:
            group_id = ray.PlacementGroupID(bytes.fromhex(name))
            remove_placement_group(PlacementGroup(group_id))

    def _take_events(self) -> None:
        stop = self.stop_reason is not None
        for event in ray.get(self.job.progress.take.remote(stop), timeout=ACTOR_TIMEOUT_S):
            if event.group != self.job.group:
                # From a worker of an earlier group, on a node that was cut off for a while: Ray
                # delivers its calls once the node is back, and then ends it. This group has done
                # the same steps again.
                continue
            match event:
                case CheckpointTaken():
                    self._writer.put(event.checkpoint)
                    continue
                case WorkerStarted():
                    self._nodes[event.rank] = event.node
                    if len(self._nodes) == self._workers:
                        self._upscale = self._make_trigger()
                case StepDone():
                    if self._upscale:
                        self._upscale.on_step(event.stats)
            self._on_event(event)

    def _fit(self) -> None:
        try:
            self._result = self._trainer.fit().return_value
        except BaseException as error:  # the waiting thread decides what to do about it
            self.error = error

    def _make_trainer(self, need: Needs, scratch: Path) -> TorchTrainer:
        gpus = need.gpus_per_worker
        cpus = self.job.config.cluster.cpus_per_worker
        return _Trainer(
            train_worker,
            train_loop_config={"job": self.job},
            # NCCL refuses two workers on one GPU.
            torch_config=_TorchConfig(backend="nccl" if gpus >= 1 else "gloo", timeout_s=300),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self._workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            ),
            run_config=ray.train.RunConfig(
                name=self.job.group,
                storage_path=str(scratch.resolve()),
                # Ray would wait for as many workers as before. `run_training` counts how many
                # fit now, and starts a group of that size.
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )


class _Trainer(TorchTrainer):
    """Ray's trainer without two actors, which take seconds to start for each group.

    One hands out data sets, of which we pass none; the other frees the resources of a controller that
    was killed, as `WorkerGroup.run` does. Should Ray rename the method or the classes, it starts them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = ("DatasetsCallback", "PlacementGroupCleanerCallback")
        made = super()._create_default_callbacks()
        return [callback for callback in made if type(callback).__name__ not in unused]


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's torch backend, with gloo bound to the node's Ray network interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def choose_interface() -> None:
    """Bind gloo to the interface of the node's Ray address, unless GLOO_SOCKET_IFNAME is set.

    By default gloo resolves the host name, which on many systems (127.0.1.1 on Debian) gives an
    address that other machines cannot reach. In a local run NCCL and torch's store use the loopback
    interface as well; by themselves they listen where the network can reach them.
    """
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == here for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if here == LOOPBACK:
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    if here == LOOPBACK:
        # torch has no setting for this address. By name, because the package has a function of the
        # same name as this module, in which torch makes its stores.
        rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
        rendezvous.TCPStore = _loopback_store


def _loopback_store(host_name: str, port: int, *, is_master: bool, **options: Any) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if is_master:
        options["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
    return TCPStore(host_name, port, is_master=is_master, **options)


def _placement_groups() -> set[str]:
    """Return the ids of this job's placement groups that hold or wait for resources."""
    job = ray.get_runtime_context().get_job_id()
    table = placement_group_table()
    return {i for i, group in table.items() if i.endswith(job) and group["state"] != "REMOVED"}
