"""A run from prompts to a stored result: the stages in order, one screen per verb.

    prepare_run      finds invalid settings before anything starts
    Ray:  ingest ------------ shards --> train --> adapter --> evaluate --> finish
          (Ray Data)                  (Ray Train)            (Ray tasks)   report, store
            reward actors ............. scores ............... scores

The stages are methods of `stages/session.py`; the files of a run are in `runs/folder.py`.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.data.files import Source
from ray_detox.evaluation.summarise import RunFacts, rate, summarise
from ray_detox.models.sources import fingerprint, folder_fingerprint
from ray_detox.recipes.loading import config_from_dict
from ray_detox.runs.checkpoint_store import adapter_files, read_files, unpack_folder
from ray_detox.runs.console import Console
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.publish import check_store
from ray_detox.runs.resume import kept_checkpoint, require_same_run, run_storage
from ray_detox.runs.storage import StorageError, write_atomic
from ray_detox.stages import preflight
from ray_detox.stages.cluster.connect import cluster, count_gpus, is_local
from ray_detox.stages.errors import (
    NotStored,
    StageError,
    Stopped,
    TrainingDiverged,
    flatten_ray_errors,
)
from ray_detox.store.protocol import check_run_id

if TYPE_CHECKING:
    from ray_detox.stages.ingest import Ingested
    from ray_detox.stages.session import Session

__all__ = [
    "NotStored",
    "StageError",
    "Stopped",
    "TrainingDiverged",
    "evaluate_run",
    "prepare_run",
    "run",
]


def run(
    config: RunConfig, folder: RunFolder, console: Console, *, resume: bool = False
) -> dict[str, Any]:
    """Run the whole job and return its report.

    Args:
        config: of the run.
        folder: of the run.
        console: shows progress.
        resume: continue from the newest checkpoint, if there is one.

    Raises:
        ConfigError, StoreError: the settings are not valid; nothing has started.
        Stopped: the user stopped the run; it can be resumed.
        TrainingError, RewardError: training failed; the newest checkpoint is kept.
        TrainingDiverged: the policy has diverged; earlier checkpoints are kept.
        StageError: a task of another stage failed, or the cluster lost resources of the run.
        NotStored: the result is in the run's folder, but not in the result store.
    """
    source = prepare_run(config, folder, resume=resume)
    console.line(f"run {folder.run_id} | recipe {config.recipe} | folder {folder.path}")
    try:
        with flatten_ray_errors():
            return _run_stages(config, folder, console, source, overwrite=resume)
    except ConfigError as error:
        if [file.name for file in folder.path.iterdir()] != ["config.json"]:
            # The cluster lost nodes after the start: the run can be resumed, and its settings
            # are valid.
            raise StageError(str(error)) from error
        shutil.rmtree(folder.path)
        raise


def _run_stages(
    config: RunConfig, folder: RunFolder, console: Console, source: Source, overwrite: bool
) -> dict[str, Any]:
    with _session(config, console) as session:
        data = session.ingest(source)
        training = session.train(folder, data.shards)
        adapter = read_files(folder.adapter)
        examples = session.measure(folder, adapter, data.held_out)
        measured = training.to_json() | {"actors": _actors(session)}
        facts = _facts(config, folder, console, data, adapter, training.outcome.step, measured)
        return session.finish(folder, examples, facts, overwrite=overwrite)


def evaluate_run(
    config: RunConfig, folder: RunFolder, console: Console, checkpoint: str | None = None
) -> dict[str, Any]:
    """Measure a run's adapter again, possibly with changed settings; store nothing.

    Args:
        config: of the run, with the changes.
        folder: of the run.
        console: shows progress.
        checkpoint: measure a kept checkpoint (`best`, `newest` or its step) instead of the final
            adapter; the run need not have finished.

    Raises:
        ConfigError: the run has no adapter or checkpoint of that name, or a setting is not valid.
    """
    steps, training = config.train.steps, dict[str, Any]()
    if checkpoint is None:
        folder.require_adapter()
        adapter = read_files(folder.adapter)
    else:
        found = kept_checkpoint(config, folder, checkpoint)
        adapter, steps = adapter_files(found.files), found.step
        training["checkpoint"] = {
            "name": checkpoint,
            "step": found.step,
            "objective": found.objective,
        }
        console.line(f"checkpoint of step {found.step} ({checkpoint})")
    source = preflight.check(config)
    with flatten_ray_errors(), _session(config, console) as session:
        data = session.ingest(source)
        examples = session.measure(folder, adapter, data.held_out, keep=False)
    facts = _facts(config, folder, console, data, adapter, steps, training)
    return summarise(rate(examples, config), config, facts)


def prepare_run(config: RunConfig, folder: RunFolder, *, resume: bool) -> Source:
    """Check everything that can be checked before the start, then create the run's folder.

    Raises:
        ConfigError, StoreError: a check failed; nothing has started and no files are left.
    """
    check_run_id(folder.run_id)
    preflight.check_output(folder.output)
    if folder.path.exists() and not resume:
        raise ConfigError(
            f"Run {folder.run_id!r} exists in {folder.output}. Choose another --run-id, or resume "
            f"it: ray-detox run --resume {folder.run_id}."
        )
    if is_local(config):
        preflight.check_local_gpus(config, count_gpus)
    source = preflight.check(config)
    check_store(config.results, folder, new_run=not resume)
    settings = json.dumps(config.to_dict(), indent=2) + "\n"
    if config.train.storage is not None:
        _claim_storage(config, folder, settings)
    folder.path.mkdir(parents=True, exist_ok=resume)
    write_atomic(folder.path / "config.json", settings)
    return source


def _claim_storage(config: RunConfig, folder: RunFolder, settings: str) -> None:
    """Write the run's settings to `train.storage`, unless a different run with this id is there.

    The same run may be there already: a job that is retried on another machine resumes from it.
    """
    storage = run_storage(config, folder)
    try:
        stored = storage.read("config.json")
        if stored is not None:
            require_same_run(config, config_from_dict(json.loads(stored)), folder.run_id)
        storage.write("config.json", settings.encode())
    except StorageError as error:
        raise ConfigError(f"train.storage: {error}") from error


@contextmanager
def _session(config: RunConfig, console: Console) -> Iterator["Session"]:
    """Connect to the cluster and open a session on it."""
    with cluster(config, console) as need:
        # Ray reads its environment, which `cluster` sets, when it is imported.
        from ray_detox.stages.session import open_session

        with open_session(config, console, need) as session:
            yield session


def _facts(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    data: "Ingested",
    adapter: Mapping[str, bytes],
    steps: int,
    training: dict[str, Any],
) -> RunFacts:
    return RunFacts(
        run_id=folder.run_id,
        steps=steps,
        rows=asdict(data.counts),
        seconds=dict(console.seconds),
        training=training,
        fingerprints=_fingerprints(config, adapter, data),
    )


def _fingerprints(
    config: RunConfig, adapter: Mapping[str, bytes], data: "Ingested"
) -> dict[str, str]:
    """Return content fingerprints of the models, the adapter and the prompts of this run."""
    policy, (_, *others) = config.policy, config.reward.classifiers
    of_terms = {
        f"{setting}.model": fingerprint(each.model, each.revision, f"{setting}.model")
        for setting, each in others
    }
    reward = config.reward
    return of_terms | {
        "policy": fingerprint(policy.model, policy.revision, "policy.model"),
        "reward": fingerprint(reward.model, reward.revision, "reward.model"),
        "adapter": unpack_folder(adapter, folder_fingerprint),
        "prompts": data.fingerprint,
    }


def _actors(session: "Session") -> list[dict[str, Any]]:
    """Return the facts about each reward actor for the report."""
    return [
        {"texts": report.state.texts, "peak_mb": report.peak_mb, "device": report.device}
        for report in session.pool.describe()
    ]
