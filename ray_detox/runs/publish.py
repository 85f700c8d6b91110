"""From a run's files to the store that its settings name; also the check before a run starts.

    results.store=sqlite      OUTPUT/results.sqlite
    results.store=dynamodb    the table, by its keys:
        pk, sk                whole runs
        conversation_id       flat rows as the published notebook has them; the whole run then
                              goes into OUTPUT/results.sqlite

What a run's files are is `run_folder.py`, what a table holds is `store/`.
"""

from typing import TYPE_CHECKING

from ray_detox.runs.folder import RunFolder
from ray_detox.store.errors import StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.protocol import ResultStore

if TYPE_CHECKING:
    from ray_detox.config import ResultsConfig


def store_of(results: "ResultsConfig", folder: RunFolder, *, hurried: bool = False) -> ResultStore:
    """The store that the settings name; nothing is opened or created yet."""
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
    """Store a finished run from its files; False where the very same run was there already.

    Args:
        results: names the store.
        folder: of the run.
        attempt: see `ResultStore.put_run`.
        overwrite: replace what is stored under the run's id.

    Raises:
        ConfigError: the run has no result.
        StoreError: the store did not take it; what it had is whole.
    """
    report, samples = folder.read_result()
    history = folder.read_history()
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


def check_store(results: "ResultsConfig", folder: RunFolder, *, new_run: bool) -> None:
    """Find out before training whether the run can be stored under its id.

    Raises:
        StoreError: credentials, region, endpoint, table or its keys are wrong; the results file
            cannot be written; or `new_run` and a run of this id is stored already.
    """
    if _is_notebook_table(results):
        # Its items are told apart by their own run_id; the whole run goes into the embedded store.
        results = results.replace(store="sqlite")
    store = store_of(results, folder)
    try:
        # A file that is not there yet is made by the run, and not by a mistake in its settings.
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
