"""The main job, from prompts to a stored result; the stages in order.

    preflight ---- nothing has started yet
    ray      ingest ------------ shards --> train --> adapter --> evaluate --> final task
               (Ray Data)                 (Ray Train)            (Ray tasks)   report, store
             reward actors ................ scores ............... scores

What a run writes, and where, is `run_folder.py`.
"""

import json
import secrets
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_detox import resources
from ray_detox.config import ConfigError, RunConfig
from ray_detox.data.files import Source
from ray_detox.models.sources import fingerprint, folder_fingerprint
from ray_detox.recipes.loading import config_from_dict
from ray_detox.runs.checkpoint_store import CheckpointStore, CheckpointWriter, write_files
from ray_detox.runs.console import Console, step_line
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.metrics_log import MetricsLog
from ray_detox.runs.publish import check_store
from ray_detox.runs.resume import require_same_run, run_storage
from ray_detox.runs.storage import StorageError, write_atomic
from ray_detox.signals import end_on_sigterm, stop_on_signal
from ray_detox.stages import preflight
from ray_detox.stages.cluster.connect import cluster, count_gpus, is_local
from ray_detox.stages.errors import StageError, flatten_ray_errors
from ray_detox.store.protocol import check_run_id


class Stopped(Exception):
    """The run was asked to end early and left a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.signal_number = signal_number


class NotStored(RuntimeError):
    """The run is complete, but the result store did not take its result."""


def prepare_run(config: RunConfig, folder: RunFolder, *, resume: bool) -> Source:
    """Find every mistake that can be found before anything starts, then make the run's folder.

    Raises:
        ConfigError, StoreError: in one sentence; nothing was started and nothing is left behind.
    """
    check_run_id(folder.run_id)
    preflight.check_output(folder.output)
    if folder.path.exists() and not resume:
        raise ConfigError(
            f"Run {folder.run_id!r} exists in {folder.output}. Choose another --run-id, or go on "
            f"with it: ray-detox run --resume {folder.run_id}."
        )
    if is_local(config):
        preflight.check_local_gpus(config, count_gpus)
    source = preflight.check(config)
    check_store(config.results, folder, new_run=not resume)
    settings = json.dumps(config.to_dict(), indent=2) + "\n"
    if config.train.storage is not None:
        kept = run_storage(config, folder)
        try:
            # A retry on another machine goes on from there, as it is meant to.
            begun = kept.read("config.json")
            if begun is not None:
                require_same_run(config, config_from_dict(json.loads(begun)), folder.run_id)
            kept.write("config.json", settings.encode())
        except StorageError as error:
            raise ConfigError(f"train.storage: {error}") from error
    folder.path.mkdir(parents=True, exist_ok=resume)
    write_atomic(folder.path / "config.json", settings)
    return source


def run(
    config: RunConfig, folder: RunFolder, console: Console, *, resume: bool = False
) -> dict[str, Any]:
    """Run the whole job and return its report.

    Raises:
        ConfigError, StoreError: a mistake, found before anything starts.
        Stopped: the run was asked to end; it can be resumed.
        TrainingError, RewardError: training failed; the newest checkpoint is kept.
        StageError: a task of another stage failed, or room for the run was lost on the way.
        NotStored: the result is in the run's folder, and nowhere else yet.
    """
    source = prepare_run(config, folder, resume=resume)
    console.line(f"run {folder.run_id} | recipe {config.recipe} | folder {folder.path}")
    try:
        with flatten_ray_errors():
            return _run_stages(config, folder, console, source, resume)
    except ConfigError as error:
        if [file.name for file in folder.path.iterdir()] != ["config.json"]:
            # Such as nodes that were lost on the way: no mistake, and something to go on with.
            raise StageError(str(error)) from error
        shutil.rmtree(folder.path)
        raise


def _run_stages(
    config: RunConfig, folder: RunFolder, console: Console, source: Source, resume: bool
) -> dict[str, Any]:
    with (
        cluster(config, console) as need,
        end_on_sigterm(),
        _reward_pool(config, need) as pool,
    ):
        data = _ingest(config, source, console, pool, need)
        outcome = _train(config, folder, console, data.shards, pool, need)
        samples = _measure(config, folder, console, data.held_out, pool, need)
        facts = {
            "run_id": folder.run_id,
            "steps": outcome["step"],
            "rows": asdict(data.counts),
            "seconds": dict(console.seconds),
            "fingerprints": _fingerprints(config, folder, data),
            "training": {name: value for name, value in outcome.items() if name not in _NO_FACTS}
            | {"actors": [_brief(actor) for actor in pool.describe()]},
        }
        return _finish(config, folder, samples, facts, resume)


_NO_FACTS = ("step", "stopped")


def _brief(actor: Mapping[str, Any]) -> dict[str, Any]:
    return {name: actor[name] for name in ("texts", "peak_mb", "device")}


def evaluate_run(config: RunConfig, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Measure a run's adapter again, with changed settings if wished; stores nothing.

    Raises:
        ConfigError: the run has no adapter yet, or a setting is wrong.
    """
    folder.require_adapter()
    source = preflight.check(config)
    from ray_detox.evaluation.summarise import summarise

    with (
        flatten_ray_errors(),
        cluster(config, console) as need,
        _reward_pool(config, need) as pool,
    ):
        data = _ingest(config, source, console, pool, need)
        samples = _measure(config, folder, console, data.held_out, pool, need, keep=False)
    return summarise(
        samples,
        config,
        run_id=folder.run_id,
        steps=config.train.steps,
        rows=asdict(data.counts),
        seconds=dict(console.seconds),
        training={},
        fingerprints=_fingerprints(config, folder, data),
    )


# ---- parts of a run --------------------------------------------------------------------------


@contextmanager
def _reward_pool(config: RunConfig, need: resources.Needs) -> Iterator[Any]:
    """The reward actors, loading their model while the caller goes on."""
    from ray_detox.stages.cluster import nodes as live
    from ray_detox.stages.rewards.pool import RewardPool

    pool = RewardPool(config, need.gpus_per_actor, live.place_actors(need))
    try:
        yield pool
    finally:
        pool.close()


def _ingest(
    config: RunConfig, source: Source, console: Console, pool: Any, need: resources.Needs
) -> Any:
    """Prepare the prompts, while the reward actors load their model; wait for both."""
    from ray_detox.stages import ingest
    from ray_detox.stages.cluster import admission

    with console.stage("ingest", _of(config.data.path, "prompts")) as made:
        patience = admission.CapacityWatchdog(config, need.preparation)
        with console.bar(None, "rows"):
            data = admission.run_with_watchdog(lambda: ingest.ingest(config, source), patience)
        made += _describe_rows(data.counts)
    with console.stage(
        "reward", f"{config.reward.actors} actor(s) of {config.reward.model}"
    ) as made:
        about = pool.wait(timeout_s=max(300.0, config.cluster.capacity_timeout_s))
        made += [f"actor {i} on node {a['node']}, {a['device']}" for i, a in enumerate(about)]
    return data


def _measure(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    rows: list[dict[str, Any]],
    pool: Any,
    need: resources.Needs,
    keep: bool = True,
) -> list[dict[str, Any]]:
    """Answer and score the held-out prompts before and after."""
    from ray_detox.stages import evaluate

    with (
        console.stage("evaluate", f"{len(rows)} held-out prompts, before and after"),
        console.bar(len(rows), "prompts") as bar,
    ):
        return evaluate.run_evaluation(
            config,
            evaluate.pack_adapter(folder.adapter),
            rows,
            pool.directory,
            need,
            on_event=lambda event: bar.add(event["prompts"]),
            storage=run_storage(config, folder) if keep else None,
        )


def _fingerprints(config: RunConfig, folder: RunFolder, data: Any) -> dict[str, str]:
    """What tells the models and the data of this run from others of the same names."""
    policy, reward = config.policy, config.reward
    return {
        "policy": fingerprint(policy.model, policy.revision, "policy.model"),
        "reward": fingerprint(reward.model, reward.revision, "reward.model"),
        "adapter": folder_fingerprint(folder.adapter),
        "prompts": data.fingerprint,
    }


def _train(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    shards: list[Any],
    pool: Any,
    need: resources.Needs,
) -> dict[str, Any]:
    """Train, showing every step; leave the trained adapter and all figures in the run's folder."""
    from ray_detox.stages.cluster.admission import requesting_workers
    from ray_detox.stages.train import run_training

    said = lambda text: console.line(f"{'':<9} {text}")
    store = CheckpointStore(run_storage(config, folder), config.train.checkpoints_kept)
    writer = CheckpointWriter(store, store.newest(on_damage=said), on_event=said)
    metrics = MetricsLog(folder.path)

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            metrics.add(dict(event["stats"]) | {"pool": pool.metrics()})
            console.line(step_line(event["stats"], config.train.steps, console.width))
            bar.move_to(event["stats"]["step"])
        elif event["kind"] == "worker":
            said(
                f"worker {event['rank']} on node {event['node'][:8]}, {event['device']}, "
                f"{event['prompts']:,} prompts"
            )
        elif event["kind"] == "group" and event["number"]:
            said(f"going on from step {event['step']} with {event['workers']} worker(s)")
        elif event["kind"] == "lost":
            said(f"{event['cause']}; the newest checkpoint is that of step {event['step']}")

    begun = 0 if writer.newest is None else writer.newest.step
    with (
        console.stage("train", _describe_training(config, need)) as made,
        console.bar(config.train.steps, "steps", done=begun, lines=False) as bar,
        closing(writer),
        closing(metrics),
        stop_on_signal(console) as stop,
    ):
        if writer.newest is not None and writer.newest.step >= config.train.steps:
            outcome = {"step": writer.newest.step, "stopped": False}
        else:
            with requesting_workers(config, need):
                outcome = run_training(config, shards, pool, need, writer, on_event, stop.event)
        if outcome["stopped"] and writer.newest is None:
            raise Stopped(0, stop.signal_number)
        assert writer.newest is not None
        metrics.complete(writer.newest.files["metrics.jsonl"].decode())
        if outcome["stopped"]:
            raise Stopped(outcome["step"], stop.signal_number)
        _write_adapter(writer.newest.files, folder.adapter)
        made.append(f"adapter saved to {folder.adapter}, {_megabytes(folder.adapter)}")
    return outcome | {"best_step": store.best(), "checkpoint_seconds": _median(writer.seconds)}


def _finish(
    config: RunConfig,
    folder: RunFolder,
    samples: list[dict[str, Any]],
    facts: dict[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Run the final task."""
    import ray

    from ray_detox.stages.cluster.nodes import on_this_node
    from ray_detox.stages.finish import store_result

    # The run's folder and the embedded store are on this machine.
    task = store_result.options(scheduling_strategy=on_this_node())
    report, _, problem = ray.get(
        task.remote(
            config,
            RunFolder(folder.output.resolve(), folder.run_id),
            samples,
            facts,
            attempt=secrets.token_hex(8),
            overwrite=resume,
        )
    )
    if problem:
        raise NotStored(
            f"The run is complete and its report is in {folder.path}, but it could not be stored: "
            f"{problem} Repeat that step alone with: ray-detox publish {folder.run_id}"
        )
    return report


def _write_adapter(files: Mapping[str, bytes], target: Path) -> None:
    """Write the adapter of a checkpoint, whole or not at all."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    of_adapter = {name: content for name, content in files.items() if name.startswith("adapter/")}
    write_files({name.partition("/")[2]: content for name, content in of_adapter.items()}, part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None


# ---- words -----------------------------------------------------------------------------------


def _of(name: str, what: str) -> str:
    return f"{what} from {'the embedded corpus' if name == 'lab' else name}"


def _describe_rows(counts: Any) -> list[str]:
    lines = [
        f"{counts.read:,} rows read, {counts.train:,} to train on, {counts.held_out:,} held out"
    ]
    for reason, count in counts.left_out.items():
        names = ", ".join(counts.examples.get(reason, []))
        lines.append(f"left out {count:,}: {reason} ({names}{', ...' if count > 3 else ''})")
    return lines


def _describe_training(config: RunConfig, need: resources.Needs) -> str:
    on = (
        f"{need.gpus_per_worker:g} GPU"
        if need.gpus_per_worker
        else f"{config.cluster.cpus_per_worker:g} CPU"
    )
    return (
        f"{config.train.steps} PPO steps of {config.ppo.prompts_per_step} prompts on "
        f"{config.train.workers} worker(s) with {on} each"
    )


def _megabytes(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB"
