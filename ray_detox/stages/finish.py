"""The final Ray task: summarise the run, write its files and store its result."""

import secrets
from contextlib import nullcontext
from typing import Any

import ray

from ray_detox.config import ConfigError, RunConfig
from ray_detox.evaluation.examples import PairedExample
from ray_detox.evaluation.summarise import RunFacts, rate, summarise
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.held import HeldRun
from ray_detox.runs.lease import Guard
from ray_detox.runs.publish import publish
from ray_detox.stages.cluster.nodes import on_this_node
from ray_detox.stages.errors import NotStored
from ray_detox.store.errors import StoreError


@ray.remote(num_cpus=0, max_retries=3)
def store_result(
    config: RunConfig,
    folder: RunFolder,
    examples: list[PairedExample],
    facts: RunFacts,
    *,
    attempt: str,
    overwrite: bool,
    guard: Guard | None = None,
) -> tuple[dict[str, Any], list[PairedExample], str | None]:
    """Summarise the run, write the report to its folder and store the result.

    A failing store must not lose a run: the report is returned in any case, with the error message
    of the store, or None, as the third value.

    Args:
        config: of the run.
        folder: of the run, on this machine.
        examples: from `run_evaluation`.
        facts: see `summarise`.
        attempt: an id that stays the same when Ray runs this task again after a crash; the store
            lets only the same attempt overwrite a result that was partly written.
        overwrite: replace a stored run of the same id; for runs that were resumed.
        guard: of the folder; None if nobody else can write it.

    Raises:
        LeaseLost: another process has taken the run; nothing was written.
    """
    rated = rate(examples, config)
    report = summarise(rated, config, facts)
    with nullcontext() if guard is None else guard.hold():
        folder.write_result(report, rated)
    if guard is not None:
        guard.check()
    try:
        publish(config.results, folder, attempt=attempt, overwrite=overwrite)
    except (ConfigError, StoreError) as error:
        return report, rated, str(error)
    return report, rated, None


def finish(
    config: RunConfig,
    held: HeldRun,
    examples: list[PairedExample],
    facts: RunFacts,
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """Run the final task on the driver's node, and return the report.

    Args:
        config: of the run.
        held: the run.
        examples: from `run_evaluation`.
        facts: see `summarise`.
        overwrite: replace a stored run of the same id; for runs that were resumed.

    Raises:
        LeaseLost: another process has taken the run.
        NotStored: the report is in the run's folder, but could not be stored.
    """
    folder = held.folder
    # Here and not in the task: only the driver needs to reach the storage.
    for guard in held.guards:
        guard.check()
    # The run's folder and the SQLite store are on this machine.
    task = store_result.options(scheduling_strategy=on_this_node())
    report, _, problem = ray.get(
        task.remote(
            config,
            RunFolder(folder.output.resolve(), folder.run_id),
            examples,
            facts,
            attempt=secrets.token_hex(8),
            overwrite=overwrite,
            guard=held.guard,
        )
    )
    if problem:
        raise NotStored(
            f"The run is complete and its report is in {folder.path}, but it could not be stored: "
            f"{problem} Repeat that step alone with: {folder.command('publish')}"
        )
    return report
