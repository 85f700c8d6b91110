"""The Python API: train and evaluate runs, and read their results, from a script or a notebook.

    train, evaluate  --> pipeline.py    stages, with a line of progress each
    results          --> store/         the embedded file, or DynamoDB

The command line is built on the same functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, overload

from ray_detox.addresses import redact_tree
from ray_detox.errors import ConfigError
from ray_detox.machine import prepare_environment
from ray_detox.recipes.loading import (
    apply_override,
    config_from_dict,
    load_config,
    override_settings,
)
from ray_detox.recipes.names import absolute_names, expand
from ray_detox.runs.folder import RunFolder, new_run_id
from ray_detox.store.errors import StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.protocol import ResultStore, check_run_id

if TYPE_CHECKING:
    from ray_detox.config import ResultsConfig, RunConfig

FIXED_SETTINGS = ("recipe", "data", "policy", "seed")
"""Settings of a run that a measurement of its adapter cannot change."""


def train(
    config: "RunConfig | None" = None,
    *,
    run_id: str | None = None,
    output: str | Path = "runs",
    resume: bool = False,
    accept_changes: bool = False,
    trust_functions: bool = False,
    quiet: bool = False,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Train a policy, measure it before and after on held-out prompts, and store the result.

    Ray is started on this machine, unless it runs already or `cluster.address` names a cluster.
    In the main thread, Ctrl-C and SIGTERM end the run after a checkpoint.

    Args:
        config: the settings of the run, such as `load_config` returns. With `resume`, None takes
            the settings that the run was started with.
        run_id: name of the run, 1 to 64 letters, digits, dots, dashes and underscores; None makes
            one up from the recipe and the time.
        output: folder where runs are kept. The run's own folder in it is named by `run_id`.
        resume: continue the run `run_id` from its newest checkpoint.
        accept_changes: continue even if the data, a model or the package is not the one that the run
            was started with; the report shows what differs.
        trust_functions: with `resume` and without `config`, import the reward functions that the
            run's stored settings name, even if this user has not run them on this machine.
        quiet: print no progress.
        stream: where to print progress; None is the standard output.

    Returns:
        The report of the run, as `results(run_id)` and the file `report.json` have it: `verdict`,
        `toxicity`, `rouge_l`, `kl`, `seconds` and more.

    Raises:
        ConfigError: a setting or an argument is not valid; nothing was started.
        StoreError: the result could not be stored; found before anything starts.
        pipeline.Stopped: a signal ended the run, which can be resumed.
        RuntimeError: training or evaluation failed; the newest checkpoint is kept.

    Example:
        config = ray_detox.load_config("lab", ["train.steps=4", "evaluate.prompts=64"])
        report = ray_detox.train(config, run_id="first")
        report["toxicity"]["before"]["mean"], report["toxicity"]["after"]["mean"]
    """
    folder = RunFolder(expand(output), _run_id(config, run_id, resume))
    check_run_id(folder.run_id)
    prepare_environment()
    from ray_detox import pipeline
    from ray_detox.runs import trusted
    from ray_detox.runs.console import Console
    from ray_detox.runs.publish import finished_report

    console = Console(stream, quiet=quiet)
    if resume:
        config = _resumed(config, folder, trust_functions, console.line)
    assert config is not None, "_run_id refuses a new run without settings"
    config = absolute_names(config)
    if resume and (report := finished_report(config, folder)) is not None:
        console.line(f"run {folder.run_id} is finished, and stays as it is")
        return report
    trusted.remember(config, folder.run_id)
    return pipeline.run(
        config,
        folder,
        console,
        resume=resume,
        accept_changes=accept_changes,
    )


def evaluate(
    run_id: str,
    overrides: Sequence[str] = (),
    output: str | Path = "runs",
    *,
    checkpoint: str | None = None,
    accept_changes: bool = False,
    trust_functions: bool = False,
    quiet: bool = False,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Measure the adapter of a trained run again; what is stored of the run stays as it is.

    Args:
        run_id: the run.
        overrides: changed settings such as `evaluate.prompts=96`, as for `load_config`. Data, policy
            and seed of a run cannot change.
        output: folder where runs are kept.
        checkpoint: measure a kept checkpoint instead of the final adapter: `best`, `newest` or
            its step, such as `"20"`. The run need not have finished.
        accept_changes: measure even if the data or a model is not the one that the run was started
            with; the report shows what differs.
        trust_functions: import the reward functions that the run's settings name, even if this user
            has not run them on this machine; those in `overrides` need no such word.
        quiet: print no progress.
        stream: where to print progress; None is the standard output.

    Returns:
        A report like that of `train`, without the metrics of training.

    Raises:
        ConfigError: the run does not exist, or has no adapter or no such checkpoint, or a setting
            is not valid.
        RuntimeError: the evaluation failed.

    Example:
        report = ray_detox.evaluate("first", ["evaluate.prompts=1024"])
        print(report["verdict"]["sentence"])
    """
    folder = RunFolder(expand(output), check_run_id(run_id))
    config = absolute_names(change_settings(folder.read_config(), overrides))
    from ray_detox import pipeline
    from ray_detox.runs import trusted
    from ray_detox.runs.console import Console

    console = Console(stream, quiet=quiet)
    if not any(word.partition("=")[0] in ("reward", "reward.terms") for word in overrides):
        trusted.require_own(config, run_id, trust=trust_functions, say=console.line)
    return pipeline.evaluate_run(config, folder, console, checkpoint, accept_changes=accept_changes)


@overload
def results(
    run_id: None = None, output: str | Path = "runs", overrides: Sequence[str] = ()
) -> list[dict[str, Any]]: ...
@overload
def results(
    run_id: str, output: str | Path = "runs", overrides: Sequence[str] = ()
) -> dict[str, Any]: ...
def results(
    run_id: str | None = None, output: str | Path = "runs", overrides: Sequence[str] = ()
) -> dict[str, Any] | list[dict[str, Any]]:
    """Read the stored report of a run, or the summaries of all runs.

    Args:
        run_id: the run; None lists all.
        output: folder where runs are kept.
        overrides: settings of the section `results`, such as `results.store=dynamodb`; the
            default is the embedded store in the output folder.

    Returns:
        A dict, the report that `train` returned; without `run_id` a list of dicts, newest run
        first, each with run_id, recipe, status, created, n, verdict and toxicity.

    Raises:
        ConfigError: no results are in the output folder, or a setting is not valid.
        StoreError: the run is not stored, or the store cannot be read.

    Example:
        for run in ray_detox.results():
            print(run["run_id"], run["verdict"]["name"])
        ray_detox.results("first")["seconds"]["total"]
    """
    store = open_results(overrides, output, run_id)
    try:
        return stored_runs(store) if run_id is None else stored_report(store, run_id)
    finally:
        store.close()


# ---- shared with the command line ------------------------------------------------------------


def change_settings(config: "RunConfig", overrides: Sequence[str]) -> "RunConfig":
    """Change settings of a stored run for a measurement of its adapter.

    Raises:
        ConfigError: a setting would make it another run, or is not valid.
    """
    for override in overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in FIXED_SETTINGS:
            raise ConfigError(
                f"{override!r} would make another run of {config.recipe!r}: data, policy and seed "
                "of a run stay as they are. Start a new run instead."
            )
    return override_settings(config, overrides)


def open_results(
    overrides: Sequence[str],
    output: str | Path,
    run_id: str | None = None,
    *,
    hurried: bool = False,
) -> ResultStore:
    """Open the store that settings such as `results.store=dynamodb` name.

    Args:
        overrides: settings of the section `results`.
        output: folder where runs are kept.
        run_id: a run that will be looked for.
        hurried: see `open_store`.

    Raises:
        ConfigError: a setting is not valid, or nothing is stored in the output folder.
    """
    from ray_detox.runs.publish import store_of

    folder = RunFolder(expand(output), run_id or "")
    results = results_settings(load_config("lab"), overrides) if overrides else None
    if results is not None and results.store != "sqlite":
        return store_of(results, folder, hurried=hurried)
    if not folder.store_path.is_file():
        raise ConfigError(f"No results in {output} yet; ray-detox run makes some.")
    # The default, also without loading the settings: pydantic takes longer than all the rest.
    return open_store("sqlite", folder.store_path, table="")


def results_settings(config: "RunConfig", overrides: Sequence[str]) -> "ResultsConfig":
    """Change the section `results` of a run by words such as `results.table=mine`.

    Raises:
        ConfigError: a setting is of another section, or not valid.
    """
    tree = config.to_dict()
    for override in overrides:
        if not override.startswith("results."):
            raise ConfigError(
                f"{override!r} is not a setting of results; expected results.name=value."
            )
        apply_override(tree, override)
    return config_from_dict(tree).results


def stored_runs(store: ResultStore) -> list[dict[str, Any]]:
    """Read the summaries of all runs from a store."""
    return [redact_tree(summary) for summary in store.list_runs()]


def stored_report(store: ResultStore, run_id: str) -> dict[str, Any]:
    """Read the report of a run from a store.

    Raises:
        StoreError: the run is not stored.
    """
    report = store.get_run(run_id)
    if report is None:
        raise StoreError(
            f"No result of a run {run_id!r} is stored; `ray-detox results`, with the same options, lists "
            "those that are. A run that was stopped goes on with ray-detox run --resume."
        )
    redacted: dict[str, Any] = redact_tree(report)
    return redacted


def _run_id(config: "RunConfig | None", run_id: str | None, resume: bool) -> str:
    if resume and run_id is None:
        raise ConfigError("resume=True continues a run that exists; name it with run_id.")
    if config is None and not resume:
        raise ConfigError("A new run needs settings; pass load_config('lab'), for example.")
    if run_id is not None:
        return run_id
    assert config is not None, "checked above"
    return new_run_id(config.recipe)


def _resumed(
    config: "RunConfig | None",
    folder: RunFolder,
    trust_functions: bool,
    say: Callable[[str], None],
) -> "RunConfig":
    """Return the settings of a run to resume, fetched from its storage if it is not here.

    Raises:
        ConfigError: there is no such run, or the settings are those of another one, or they name
            functions that the user has not run.
    """
    from ray_detox.runs import trusted
    from ray_detox.runs.resume import require_same_run, resume_from_storage

    if config is None:
        config = folder.read_config()
        trusted.require_own(config, folder.run_id, trust=trust_functions, say=say)
        return config
    if config.train.storage is not None and not folder.has_settings():
        given = absolute_names(config)
        resume_from_storage(
            folder,
            config.train.storage,
            lambda stored: require_same_run(given, stored, folder.run_id),
        )
    config = absolute_names(config)
    require_same_run(config, folder.read_config(), folder.run_id)
    return config
