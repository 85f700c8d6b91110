"""A run from prompts to a stored result: the stages in order, one screen per verb.

    prepare_run      finds invalid settings before anything starts
    Ray:  ingest ------------ shards --> train --> adapter --> evaluate --> finish
          (Ray Data)                  (Ray Train)            (Ray tasks)   report, store
            reward actors ............. scores ............... scores

The stages are methods of `stages/session.py`; the files of a run are in `runs/folder.py`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.data.files import Source
from ray_detox.evaluation.summarise import RunFacts, rate, summarise
from ray_detox.machine import cpu_count
from ray_detox.models.sources import folder_fingerprint
from ray_detox.runs.checkpoint_store import adapter_files, unpack_folder
from ray_detox.runs.console import Console
from ray_detox.runs.folder import RunFolder, run_exists
from ray_detox.runs.held import CREATED_FILES, HeldRun, Origin, OtherIdentity, open_run
from ray_detox.runs.identity import fingerprints
from ray_detox.runs.lease import LeaseLost
from ray_detox.runs.metrics_log import read_raw
from ray_detox.runs.publish import check_store
from ray_detox.runs.resume import kept_checkpoint
from ray_detox.runs.storage import StorageError
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

log = logging.getLogger(__name__)

__all__ = [
    "LeaseLost",
    "NotStored",
    "OtherIdentity",
    "StageError",
    "Stopped",
    "TrainingDiverged",
    "evaluate_run",
    "prepare_run",
    "run",
]


def run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    *,
    resume: bool = False,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Run the whole job and return its report.

    Args:
        config: of the run.
        folder: of the run.
        console: shows progress.
        resume: continue from the newest checkpoint, if there is one.
        accept_changes: go on although something is not what the run was started with.

    Raises:
        ConfigError, StoreError: the settings are not valid; nothing has started.
        OtherIdentity: the data, a model or the package is not what the run was started with.
        Stopped: the user stopped the run; it can be resumed.
        TrainingError, RewardError: training failed; the newest checkpoint is kept.
        TrainingDiverged: the policy has diverged; earlier checkpoints are kept.
        LeaseLost: another process has taken the run; this one has written nothing since.
        StorageError: newer checkpoints could not be kept; those in the storage are.
        StageError: a task of another stage failed, or the cluster lost resources of the run.
        NotStored: the result is in the run's folder, but not in the result store.
    """
    source, held = prepare_run(
        config, folder, resume=resume, accept_changes=accept_changes, say=console.line
    )
    held.measure(console.elapsed)
    console.line(f"run {folder.run_id} | recipe {config.recipe} | folder {folder.path}")
    try:
        with flatten_ray_errors():
            return _run_stages(
                config, held, console, source, overwrite=resume, accept_changes=accept_changes
            )
    except OtherIdentity:
        raise
    except ConfigError as error:
        if resume or {file.name for file in folder.path.iterdir()} - CREATED_FILES:
            # The cluster lost nodes after the start: the run can be resumed, and its settings
            # are valid.
            raise StageError(str(error)) from error
        held.discard()
        raise
    finally:
        held.release()


def _run_stages(
    config: RunConfig,
    held: HeldRun,
    console: Console,
    source: Source,
    *,
    overwrite: bool,
    accept_changes: bool,
) -> dict[str, Any]:
    with _session(config, console) as session:
        data = session.ingest(source)
        held.identify(data.identity, accept=accept_changes)
        training = session.train(held, data.shards)
        # Again: training may have taken days.
        held.identify(fingerprints(config), accept=accept_changes)
        adapter = held.folder.read_adapter()
        examples = session.measure(adapter, data.held_out, held)
        measured = training.to_json() | {"actors": _actors(session)}
        steps, seconds = training.outcome.step, held.seconds()
        facts = _facts(config, held.folder, seconds, data, adapter, steps, measured, held.facts())
        return session.finish(held, examples, facts, overwrite=overwrite)


def evaluate_run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    checkpoint: str | None = None,
    *,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Measure a run's adapter again, possibly with changed settings; store nothing.

    Args:
        config: of the run, with the changes.
        folder: of the run.
        console: shows progress.
        checkpoint: measure a kept checkpoint (`best`, `newest` or its step) instead of the final
            adapter; the run need not have finished.
        accept_changes: measure although something is not what the run was started with.

    Raises:
        ConfigError: the run has no adapter or checkpoint of that name, or a setting is not valid.
        OtherIdentity: the data or a model is not what the run was started with.
    """
    steps, training = config.train.steps, dict[str, Any]()
    if checkpoint is None:
        folder.require_adapter()
        adapter = folder.read_adapter()
    else:
        found = kept_checkpoint(config, folder, checkpoint)
        adapter, steps = adapter_files(found.files), found.step
        training["checkpoint"] = {
            "name": checkpoint,
            "step": found.step,
            "objective": None if found.objective is None else found.objective.value,
        }
        console.line(f"checkpoint of step {found.step} ({checkpoint})")
    source = preflight.check(config)
    origin = Origin.of_run(config, folder)
    origin.compare(fingerprints(config), accept=accept_changes)
    with flatten_ray_errors(), _session(config, console) as session:
        data = session.ingest(source)
        origin.compare(data.identity, accept=accept_changes)
        examples = session.measure(adapter, data.held_out)
    seconds = console.seconds
    facts = _facts(config, folder, seconds, data, adapter, steps, training, origin.facts())
    return summarise(rate(examples, config), config, facts)


def prepare_run(
    config: RunConfig,
    folder: RunFolder,
    *,
    resume: bool,
    accept_changes: bool = False,
    say: Callable[[str], None] = log.warning,
) -> tuple[Source, HeldRun]:
    """Check everything that can be checked before the start, then create or take the run.

    Args:
        config: of the run.
        folder: of the run.
        resume: the run exists.
        accept_changes: go on although something is not what the run was started with.
        say: called with a line while the run may be held by another process.

    Raises:
        ConfigError, StoreError: a check failed; nothing has started and no files are left.
    """
    check_run_id(folder.run_id)
    preflight.check_output(folder.output)
    if resume:
        read_raw(folder.path / "metrics.jsonl")
    elif folder.has_settings():
        raise ConfigError(run_exists(folder))
    if is_local(config):
        preflight.check_local_gpus(config, count_gpus)
        preflight.check_local_cpus(config, cpu_count())
    source = preflight.check(config)
    check_store(config.results, folder, new_run=not resume)
    found = fingerprints(config)
    try:
        held = open_run(config, folder, say, resume=resume, found=found, accept=accept_changes)
    except StorageError as error:
        raise ConfigError(f"train.storage: {error}") from error
    return source, held


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
    seconds: Mapping[str, float],
    data: "Ingested",
    adapter: Mapping[str, bytes],
    steps: int,
    training: dict[str, Any],
    record: Mapping[str, Any],
) -> RunFacts:
    content = {"adapter": unpack_folder(adapter, folder_fingerprint), "prompts": data.fingerprint}
    return RunFacts(
        run_id=folder.run_id,
        steps=steps,
        rows=asdict(data.counts),
        seconds=seconds,
        training=training,
        fingerprints=fingerprints(config) | content,
        record=record,
    )


def _actors(session: "Session") -> list[dict[str, Any]]:
    """Return the facts about each reward actor for the report."""
    return [
        {"texts": report.state.texts, "peak_mb": report.peak_mb, "device": report.device}
        for report in session.pool.describe()
    ]
