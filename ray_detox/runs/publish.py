"""Store a finished run from its files, and check before a run starts that this will work.

    results.store=sqlite      OUTPUT/results.sqlite
    results.store=dynamodb    the table, by its keys:
        pk, sk                whole runs
        conversation_id       flat rows in the published notebook's layout; the whole run then
                              goes into OUTPUT/results.sqlite

`folder.py` reads and writes a run's files; `store/` reads and writes the stores.
"""

from typing import TYPE_CHECKING, Any

from ray_detox.errors import ConfigError
from ray_detox.runs.folder import RunFolder
from ray_detox.store.errors import StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.protocol import ResultStore

if TYPE_CHECKING:
    from ray_detox.config import ResultsConfig, RunConfig


def store_of(results: "ResultsConfig", folder: RunFolder, *, hurried: bool = False) -> ResultStore:
    """Return the store that the settings name, not yet opened or created."""
    return open_store(
        results.store,
        folder.store_path,
        results.table,
        results.region,
        results.endpoint_url,
        hurried=hurried,
    )


def publish(
    results: "ResultsConfig",
    folder: RunFolder,
    *,
    attempt: str | None = None,
    overwrite: bool = False,
) -> bool:
    """Store a finished run from its files.

    Args:
        results: settings that name the store.
        folder: folder of the run.
        attempt: see `ResultStore.put_run`.
        overwrite: replace the run that is stored under this id.

    Returns:
        True, or False if the same run was stored already.

    Raises:
        ConfigError: the run has no result, or a file of it is damaged.
        StoreError: the store rejected the run; its earlier content is unchanged.
    """
    report, examples = folder.read_result()
    samples = [example.to_json() for example in examples]
    history = folder.read_history()
    steps = report.get("steps")
    if isinstance(steps, int) and len(history) < steps:
        raise ConfigError(
            f"{folder.path}/metrics.jsonl has {len(history)} of the {steps} steps of the report. The run "
            "takes the others from its newest checkpoint when it is resumed with "
            f"`{folder.command('run --resume')}`."
        )
    if _is_notebook_table(results):
        from ray_detox.store import notebook

        embedded = open_store("sqlite", folder.store_path, results.table)
        wrote = embedded.put_run(report, samples, history, attempt=attempt, overwrite=overwrite)
        notebook.export_samples(
            report,
            samples,
            results.table,
            region=results.region,
            endpoint_url=results.endpoint_url,
            overwrite=overwrite,
        )
        return wrote
    store = store_of(results, folder)
    try:
        return store.put_run(report, samples, history, attempt=attempt, overwrite=overwrite)
    finally:
        store.close()


def finished_report(config: "RunConfig", folder: RunFolder) -> dict[str, Any] | None:
    """Return the report of a run that has nothing left to do with these settings; None if it has.

    Raises:
        ConfigError, StoreError: the settings or the store cannot be read.
    """
    try:
        report, _ = folder.read_result()
    except ConfigError:  # it goes on, and writes its result again
        return None
    if report.get("steps") != config.train.steps or folder.read_config() != config:
        return None
    results = config.results
    if _is_notebook_table(results):
        results = results.replace(store="sqlite")
    store = store_of(results, folder)
    try:
        return report if store.get_run(folder.run_id) is not None else None
    finally:
        store.close()


def check_store(results: "ResultsConfig", folder: RunFolder, *, new_run: bool) -> None:
    """Check before training that the run can be stored under its id.

    Raises:
        StoreError: credentials, region, endpoint, table or its keys are wrong; the results file
            cannot be written; or `new_run` is True and a run of this id is stored already.
    """
    if _is_notebook_table(results):
        # The notebook's table takes rows of any run, so only the embedded store can refuse an id.
        results = results.replace(store="sqlite")
    store = store_of(results, folder)
    try:
        # check() would create a missing results file, also for a run that then fails its checks.
        if results.store == "dynamodb" or folder.store_path.exists():
            store.check()
        if new_run and store.get_run(folder.run_id) is not None:
            raise StoreError(f"A run {folder.run_id!r} is already stored. Choose another --run-id.")
    finally:
        store.close()


def _is_notebook_table(results: "ResultsConfig") -> bool:
    if results.store != "dynamodb":
        return False
    from ray_detox.store import notebook

    return notebook.is_notebook_table(
        results.table, region=results.region, endpoint_url=results.endpoint_url
    )
