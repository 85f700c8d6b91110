"""A session: a connected cluster and a pool of reward actors, on which the stages of a run work.

    open_session --> Session.ingest --> Session.train --> Session.measure --> Session.finish
                        |                  |                  |
                     console            checkpoints,       shards kept
                                        metrics, adapter   in storage

Each method is one stage of the console output: it prints a heading, progress and a summary.
Import this module only after the connection, because Ray reads its environment when imported.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import ObjectRef

from ray_detox.config import RunConfig
from ray_detox.data.files import Source
from ray_detox.evaluation.examples import PairedExample
from ray_detox.evaluation.summarise import RunFacts
from ray_detox.records import PreparedRow
from ray_detox.resources import Needs
from ray_detox.runs.checkpoint_store import CheckpointWriter
from ray_detox.runs.console import Bar, Console, step_line
from ray_detox.runs.held import HeldRun
from ray_detox.runs.metrics_log import MetricsLog
from ray_detox.runs.printable import counted
from ray_detox.signals import stop_on_signal
from ray_detox.stages.cluster.admission import (
    CapacityWatchdog,
    requesting_workers,
    run_with_watchdog,
)
from ray_detox.stages.cluster.nodes import place_actors
from ray_detox.stages.errors import Stopped
from ray_detox.stages.evaluate import AdapterFiles, run_evaluation
from ray_detox.stages.events import GroupLost, GroupStarted, StepDone, TrainingEvent, WorkerStarted
from ray_detox.stages.finish import finish
from ray_detox.stages.ingest import Ingested, RowCounts, ingest
from ray_detox.stages.rewards.pool import RewardPool
from ray_detox.stages.train import TrainingOutcome, run_training

MODEL_LOAD_TIMEOUT_S = 300.0
"""Minimum timeout for loading the reward model, which may have to be downloaded first."""

NO_CHECKPOINT = "the run has no checkpoint yet, and begins with step 1"


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """Facts about a run's training that the report contains besides the metrics."""

    outcome: TrainingOutcome
    best_step: int | None
    """Step of the checkpoint with the best objective on the probe prompts; None if none was measured."""
    checkpoint_seconds: float | None
    """Median time to store a checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values, without those that this process did not measure."""
        facts = asdict(self.outcome) | {
            "best_step": self.best_step,
            "checkpoint_seconds": self.checkpoint_seconds,
        }
        # The report has its own `steps`, and only a complete run has a report.
        left_out = ["step", "stopped"]
        if self.outcome.loop_seconds is None:  # an earlier process did all the training
            left_out += ["loop_seconds", "peak_mb", "lost", "moved", "resized"]
        return {name: value for name, value in facts.items() if name not in left_out}


@dataclass(frozen=True, slots=True)
class Session:
    """A connected cluster with the reward actors of one run."""

    config: RunConfig
    console: Console
    need: Needs
    """Resources of the run, resolved for this cluster."""
    pool: RewardPool

    def ingest(self, source: Source) -> Ingested:
        """Prepare the prompts while the reward actors load their model; wait for both."""
        config = self.config
        origin = "the embedded corpus" if config.data.path == "lab" else config.data.path
        with self.console.stage("ingest", f"prompts from {origin}") as lines:
            watchdog = CapacityWatchdog(config, self.need.preparation)
            with self.console.bar(None, "rows"):
                data = run_with_watchdog(lambda: ingest(config, source), watchdog)
            lines += describe_rows(data.counts)
            lines += [source.note] if source.note else []
        models = " and ".join(each.model for _, each in config.reward.classifiers)
        with self.console.stage(
            "reward", f"{counted(config.reward.actors, 'actor')} of {models}"
        ) as lines:
            actors = self.pool.wait(
                timeout_s=max(MODEL_LOAD_TIMEOUT_S, config.cluster.capacity_timeout_s)
            )
            if config.reward.check_sentences:
                self.pool.check(data.held_out[0])
            lines += [
                f"actor {i} on node {actor.node}, {actor.device}" for i, actor in enumerate(actors)
            ]
        return data

    def train(self, held: HeldRun, shards: Sequence[ObjectRef[Any]]) -> TrainingFacts:
        """Train, and leave the trained adapter and all metrics in the run's folder.

        Args:
            held: the run.
            shards: from `ingest`.

        Raises:
            Stopped: the user stopped the run; the newest checkpoint is kept.
            TrainingError, RewardError: training failed; the newest checkpoint is kept.
            LeaseLost: another process has taken the run.
            StorageError: newer checkpoints could not be kept, see `train.max_unsaved_s`.
        """
        config, folder = self.config, held.folder
        newest = held.checkpoints(config.train.checkpoints_kept).newest(on_damage=self._say)
        done = newest.step if newest else 0
        if held.record.token > 1:
            self._say(f"resuming from the checkpoint of step {done}" if done else NO_CHECKPOINT)
        held.begin(done)
        store = held.checkpoints(config.train.checkpoints_kept)
        writer = CheckpointWriter(store, newest, on_event=self._say, on_saved=held.note_step)
        kept = newest.files.get("metrics.jsonl", b"") if newest else b""
        metrics = MetricsLog(folder.path, kept, self._say, held.guard.hold)
        with (
            self.console.stage("train", self._describe_training()) as lines,
            self.console.bar(config.train.steps, "steps", done=done, lines=False) as bar,
            closing(writer),
            closing(metrics),
            stop_on_signal(self.console) as stop,
        ):
            if done >= config.train.steps:
                outcome = TrainingOutcome(step=done)
            else:
                if newest is not None and held.record.token > 1:
                    # An earlier process may still be about to delete its own copy.
                    writer.put(newest)
                with requesting_workers(config, self.need):
                    outcome = run_training(
                        config,
                        shards,
                        self.pool,
                        self.need,
                        writer,
                        folder.path / "ray-train",
                        on_event=lambda event: self._show(event, held, metrics, bar, writer),
                        stop_requested=stop.event,
                    )
            if outcome.stopped and writer.newest is None:
                raise Stopped(0, stop.signal_number)
            assert writer.newest is not None, "training ended without a checkpoint"
            # The driver may have been killed between a checkpoint and its metrics.
            metrics.complete(writer.newest.files.get("metrics.jsonl", b""))
            if outcome.stopped:
                raise Stopped(outcome.step, stop.signal_number)
            with held.guard.hold():
                folder.write_adapter(writer.newest.files)
            lines.append(f"adapter saved to {folder.adapter}, {_megabytes(folder.adapter)}")
        seconds = statistics.median(writer.seconds) if writer.seconds else None
        return TrainingFacts(outcome, store.best(), seconds)

    def measure(
        self,
        adapter: AdapterFiles,
        rows: Sequence[PreparedRow],
        held: HeldRun | None = None,
    ) -> list[PairedExample]:
        """Generate and score a response to each held-out prompt, before and after training.

        Args:
            adapter: the trained adapter to measure, its files by name.
            rows: held-out rows from `ingest`.
            held: the run, whose storage keeps each measured shard for a resume; None keeps none.
        """
        with (
            self.console.stage("evaluate", f"{len(rows)} held-out prompts, before and after"),
            self.console.bar(len(rows), "prompts") as bar,
        ):
            return run_evaluation(
                self.config,
                adapter,
                rows,
                self.pool,
                self.need,
                on_event=lambda event: bar.add(event.prompts),
                storage=None if held is None else held.storage,
                identity=None if held is None else held.record.identity,
            )

    def finish(
        self,
        held: HeldRun,
        examples: list[PairedExample],
        facts: RunFacts,
        *,
        overwrite: bool,
    ) -> dict[str, Any]:
        """Summarise and store the run on the driver's node; see `stages.finish.finish`."""
        return finish(self.config, held, examples, facts, overwrite=overwrite)

    def _say(self, text: str) -> None:
        self.console.line(f"{'':<9} {text}")

    def _show(
        self,
        event: TrainingEvent,
        held: HeldRun,
        metrics: MetricsLog,
        bar: Bar,
        writer: CheckpointWriter,
    ) -> None:
        """Print a training event; after a step, also store its metrics and look at the checkpoints.

        Raises:
            LeaseLost: another process has taken the run.
            StorageError: checkpoints could not be kept for `train.max_unsaved_s`.
        """
        match event:
            case StepDone(stats=stats):
                held.check()
                metrics.add(stats, self.pool.metrics())
                train = self.config.train
                self.console.line(step_line(stats, train.steps, self.console.width))
                bar.move_to(stats.step)
                warning = writer.check_unwritten(train.unsaved_warning_s, train.max_unsaved_s)
                if warning is not None:
                    self._say(warning)
            case WorkerStarted():
                self._say(
                    f"worker {event.rank} on node {event.node[:8]}, {event.device}, "
                    f"{event.prompts:,} prompts"
                )
            case GroupStarted(number=0):
                pass  # the heading of the stage describes the first group
            case GroupStarted():
                workers = counted(event.workers, "worker")
                self._say(f"resuming from step {event.step} with {workers}")
            case GroupLost():
                self._say(f"{event.cause}; the newest checkpoint is that of step {event.step}")

    def _describe_training(self) -> str:
        config, gpus = self.config, self.need.gpus_per_worker
        each = counted(gpus, "GPU") if gpus else counted(config.cluster.cpus_per_worker, "CPU")
        return (
            f"{config.train.steps} PPO steps of {config.ppo.prompts_per_step} prompts on "
            f"{counted(config.train.workers, 'worker')} with {each} each"
        )


@contextmanager
def open_session(config: RunConfig, console: Console, need: Needs) -> Iterator[Session]:
    """Start the reward actors, which load their model while the caller continues."""
    with closing(RewardPool(config, need.gpus_per_actor, place_actors(need))) as pool:
        yield Session(config, console, need, pool)


def describe_rows(counts: RowCounts) -> list[str]:
    """Format the number of rows read, used and left out, with the reasons."""
    lines = [
        f"{counts.read:,} rows read, {counts.train:,} to train on, {counts.held_out:,} held out"
    ]
    if counts.repeated:
        lines.append(
            f"{counts.repeated:,} rows repeat the prompt of another one: the evaluation takes each prompt "
            "once, with all its references"
        )
    for reason, count in counts.left_out.items():
        names = ", ".join(counts.examples.get(reason, []))
        lines.append(f"left out {count:,}: {reason} ({names}{', ...' if count > 3 else ''})")
    return lines


def _megabytes(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB"
