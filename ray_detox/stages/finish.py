"""The final Ray task: summarise the run, write its files and store its result."""

from typing import Any

import ray

from ray_detox.config import RunConfig
from ray_detox.evaluation.examples import PairedExample
from ray_detox.evaluation.summarise import RunFacts, rate, summarise
from ray_detox.runs.folder import RunFolder


@ray.remote(num_cpus=0, max_retries=3)
def store_result(
    config: RunConfig,
    folder: RunFolder,
    examples: list[PairedExample],
    facts: RunFacts,
    *,
    attempt: str,
    overwrite: bool,
) -> tuple[dict[str, Any], list[PairedExample], str | None]:
    """The final task: deltas, report, both written to the run's folder and then to the store.

    A store that fails must not lose a run: the report comes back all the same, with the store's
    sentence as the third value.

    Args:
        config: of the run.
        folder: of the run, on this machine.
        examples: from `run_evaluation`.
        facts: see `summarise`.
        attempt: a name that is the same when Ray runs this task again after a crash; a store lets
            an attempt write again what it had begun, and nobody else.
        overwrite: replace a stored run of the same id; for runs that were resumed.
    """
    from ray_detox.runs.publish import publish
    from ray_detox.store.errors import StoreError

    rated = rate(examples, config)
    report = summarise(rated, config, facts)
    folder.write_result(report, rated)
    try:
        publish(config.results, folder, attempt=attempt, overwrite=overwrite)
    except StoreError as error:
        return report, rated, str(error)
    return report, rated, None
