"""The main job, from prompts to a stored result; the stages in order.

    preflight ---- nothing has started yet
    ray      ingest ------------ lanes --> train --> adapter --> evaluate --> final task
               (Ray Data)                 (Ray Train)            (Ray tasks)   report, store
             reward actors ................ scores ............... scores

What a run writes, and where, is `run_folder.py`.
"""

import json
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_detox import preflight
from ray_detox.config import ConfigError, RunConfig
from ray_detox.connect import cluster, count_gpus, is_local
from ray_detox.data import Source
from ray_detox.progress import Console, MetricsLog, step_line
from ray_detox.publish import check_store
from ray_detox.run_folder import RunFolder
from ray_detox.sources import fingerprint, folder_fingerprint
from ray_detox.store import check_run_id


class Stopped(Exception):
    """The run was asked to end early and left a checkpoint."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.signal_number = signal_number


class StageError(RuntimeError):
    """A Ray task failed; the message is its cause, in one line."""


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
    folder.path.mkdir(parents=True, exist_ok=resume)
    (folder.path / "config.json").write_text(
        json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8"
    )
    return source


def run(
    config: RunConfig, folder: RunFolder, console: Console, *, resume: bool = False
) -> dict[str, Any]:
    """Run the whole job and return its report.

    Raises:
        ConfigError, StoreError: a mistake, found before anything starts.
        Stopped: the run was asked to end; it can be resumed.
        TrainingError, RewardError: training failed; the newest checkpoint is kept.
        StageError: a task of another stage failed.
        NotStored: the result is in the run's folder, and nowhere else yet.
    """
    source = prepare_run(config, folder, resume=resume)
    console.line(f"run {folder.run_id} | recipe {config.recipe} | folder {folder.path}")
    try:
        with causes_in_one_sentence():
            return _run_stages(config, folder, console, source, resume)
    except ConfigError:
        # Such as a cluster that is too small: only the settings are there, nothing to go on with.
        if [file.name for file in folder.path.iterdir()] == ["config.json"]:
            shutil.rmtree(folder.path)
        raise


def _run_stages(
    config: RunConfig, folder: RunFolder, console: Console, source: Source, resume: bool
) -> dict[str, Any]:
    with cluster(config, console) as need:
        data, actors = _ingest(config, source, console, need)
        with console.stage("train", _describe_training(config, need)) as made:
            outcome = _train(config, folder, console, data.lanes, actors, need.gpus_per_worker)
            made.append(f"adapter saved to {folder.adapter}, {_megabytes(folder.adapter)}")
        samples = _measure(config, folder, console, data.held_out, actors, need)
        facts = {
            "run_id": folder.run_id,
            "steps": outcome["step"],
            "rows": asdict(data.counts),
            "seconds": dict(console.seconds),
            "fingerprints": _fingerprints(config, folder, data),
            "training": {
                "workers": config.train.workers,
                "worker_peak_mb": outcome["peak_mb"],
                "loop_seconds": outcome["loop_seconds"],
                "actors": _describe_actors(actors),
            },
        }
        return _finish(config, folder, samples, facts, resume)


def evaluate_run(config: RunConfig, folder: RunFolder, console: Console) -> dict[str, Any]:
    """Measure a run's adapter again, with changed settings if wished; stores nothing.

    Raises:
        ConfigError: the run has no adapter yet, or a setting is wrong.
    """
    folder.require_adapter()
    source = preflight.check(config)
    from ray_detox.evaluation import summarise

    with causes_in_one_sentence(), cluster(config, console) as need:
        data, actors = _ingest(config, source, console, need)
        samples = _measure(config, folder, console, data.held_out, actors, need)
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


def _ingest(
    config: RunConfig, source: Source, console: Console, need: preflight.Needs
) -> tuple[Any, list[Any]]:
    """Prepare the prompts, while the reward actors load their model; wait for both."""
    from ray_detox.stages import ingest, score

    actors = score.start_actors(config.reward, need.gpus_per_actor)
    with console.stage("ingest", _of(config.data.path, "prompts")) as made:
        data = ingest.ingest(config, source)
        made += _describe_rows(data.counts)
    with console.stage("reward", f"{len(actors)} actor(s) of {config.reward.model}") as made:
        about = score.wait_for_actors(actors, timeout_s=max(300.0, config.cluster.patience_s))
        made += [f"actor {i} on node {a['node']}, {a['device']}" for i, a in enumerate(about)]
    return data, actors


def _measure(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    rows: list[dict[str, Any]],
    actors: list[Any],
    need: preflight.Needs,
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
            actors,
            need.gpus_per_worker,
            on_event=lambda event: bar.add(event["prompts"]),
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


def _describe_actors(actors: list[Any]) -> list[dict[str, Any]]:
    from ray_detox.stages import score

    about = score.wait_for_actors(actors, timeout_s=60)
    return [{key: one[key] for key in ("texts", "peak_mb", "device")} for one in about]


def _train(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    lanes: list[Any],
    actors: list[Any],
    gpus_per_worker: float,
) -> dict[str, Any]:
    """Train, showing every step; copy the trained adapter into the run's folder."""
    from ray_detox.stages.train import run_training

    metrics = MetricsLog(folder.path)

    def on_event(event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            metrics.add(event["stats"])
            console.line(step_line(event["stats"], config.train.steps))
        elif event["kind"] == "worker":
            console.line(
                f"{'':<9} worker {event['rank']} on node {event['node']}, {event['device']}, "
                f"{event['prompts']:,} prompts"
            )

    with stop_on_signal(console) as stop:
        outcome = run_training(
            config,
            lanes,
            actors,
            gpus_per_worker,
            storage=_storage(config, folder),
            on_event=on_event,
            stop_requested=stop.event,
        )
    metrics.close()
    if outcome["stopped"]:
        raise Stopped(outcome["step"], stop.signal_number)
    _copy(outcome["filesystem"], f"{outcome['checkpoint']}/adapter", folder.adapter)
    return outcome


def _storage(config: RunConfig, folder: RunFolder) -> str:
    """Where checkpoints are kept; a place of its own for every run, or runs would take up others'."""
    if config.train.storage is None:
        return str(folder.path.resolve())
    return f"{config.train.storage.rstrip('/')}/{folder.run_id}"


def _finish(
    config: RunConfig,
    folder: RunFolder,
    samples: list[dict[str, Any]],
    facts: dict[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Run the final task."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ray_detox.stages.evaluate import store_result

    # The run's folder and the embedded store are on this machine.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = store_result.options(scheduling_strategy=here)
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


def _copy(filesystem: Any, source: str, target: Path) -> None:
    from pyarrow import fs

    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    fs.copy_files(
        source, str(part), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
    )
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


@dataclass(slots=True)
class _Stop:
    event: threading.Event
    signal_number: int = signal.SIGINT


@contextmanager
def stop_on_signal(console: Console) -> Iterator[_Stop]:
    """Inside, Ctrl-C and SIGTERM ask for a checkpoint first; a second Ctrl-C does not wait."""
    stop = _Stop(threading.Event())
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal_number = number
        stop.event.set()
        console.line(f"{'':<9} stopping after this step, with a checkpoint (again to stop at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def causes_in_one_sentence() -> Iterator[None]:
    """Turn what failed in a Ray task into its cause; Ray's own message is a page of traceback."""
    try:
        yield
    except Exception as error:
        ray = sys.modules.get("ray")
        if ray is None or not isinstance(error, ray.exceptions.RayTaskError):
            raise
        from ray_detox.stages.train import innermost, last_line

        cause = innermost(error)
        if isinstance(cause, ConfigError):
            raise ConfigError(str(cause)) from error
        raise StageError(f"{type(cause).__name__}: {last_line(cause)}") from error


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


def _describe_training(config: RunConfig, need: preflight.Needs) -> str:
    on = (
        f"{need.gpus_per_worker:g} GPU"
        if need.gpus_per_worker
        else f"{config.train.cpus_per_worker:g} CPU"
    )
    return (
        f"{config.train.steps} PPO steps of {config.ppo.prompts_per_step} prompts on "
        f"{config.train.workers} worker(s) with {on} each"
    )


def _megabytes(folder: Path) -> str:
    return f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e6:.1f} MB"
