"""Find a run and its checkpoints in its storage, and refuse a different run of the same id."""

from ray_detox.config import ConfigError, RunConfig
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore
from ray_detox.runs.folder import FIXED_SETTINGS, RunFolder, settings_from_json
from ray_detox.runs.storage import Storage, StorageError, check_storage, write_atomic
from ray_detox.store.protocol import check_run_id


def require_same_run(config: RunConfig, begun: RunConfig, run_id: str) -> None:
    """Check that checkpoints in the storage come from a run of the same data, policy and seed.

    Args:
        config: of the run that is about to start.
        begun: settings that the storage keeps under the same run id.
        run_id: of both.

    Raises:
        ConfigError: they are different runs.
    """
    for name in FIXED_SETTINGS:
        if getattr(config, name) != getattr(begun, name):
            raise ConfigError(
                f"train.storage={config.train.storage} keeps a run {run_id!r} with other settings "
                f"({name}). Choose another --run-id, or go on with that run: "
                f"ray-detox run --resume {run_id} train.storage={config.train.storage}."
            )


def resume_from_storage(folder: RunFolder, storage: str) -> None:
    """Recreate the folder of a run that started on another machine from its storage.

    Args:
        folder: of the run, on this machine.
        storage: the `train.storage` that the run started with.

    Raises:
        ConfigError: the storage has no such run, or cannot be read, or the run's settings there are
            damaged.
    """
    check_run_id(folder.run_id)
    check_storage(storage)
    kept = Storage(f"{storage.rstrip('/')}/{folder.run_id}")
    try:
        settings, newest = kept.read("config.json"), CheckpointStore(kept).newest()
    except StorageError as error:
        raise ConfigError(f"train.storage: {error}") from error
    if settings is None:
        raise ConfigError(
            f"No run {folder.run_id!r} is in {folder.output}, and none in train.storage={storage}."
        )
    # Settings of another version may not be valid here: find out before the folder exists.
    settings_from_json(settings, f"{kept.address}/config.json")
    folder.path.mkdir(parents=True, exist_ok=True)
    if newest is not None:
        metrics = newest.files.get("metrics.jsonl", b"")
        write_atomic(folder.path / "metrics.jsonl", metrics.decode(errors="replace"))
    # Last: a folder with config.json counts as a run that can be resumed.
    write_atomic(folder.path / "config.json", settings.decode())


def run_storage(config: RunConfig, folder: RunFolder) -> Storage:
    """Return where a run keeps what its next process needs; each run has its own subfolder."""
    if config.train.storage is None:
        return Storage(str(folder.path.resolve()))
    return Storage(f"{config.train.storage.rstrip('/')}/{folder.run_id}")


def kept_checkpoint(config: RunConfig, folder: RunFolder, name: str) -> Checkpoint:
    """Read a kept checkpoint of a run.

    Args:
        config: of the run.
        folder: of the run.
        name: `best`, `newest` or the number of its step.

    Raises:
        ConfigError: the run keeps no such checkpoint, or it cannot be read.
    """
    if name not in ("best", "newest") and not (name.isascii() and name.isdecimal()):
        raise ConfigError(f"--checkpoint is {name!r}; expected best, newest or the step of one.")
    store = CheckpointStore(run_storage(config, folder))
    try:
        steps, best = store.complete(), store.best()
        if not steps:
            raise ConfigError(f"Run {folder.run_id!r} has no checkpoint yet.")
        kept = ", ".join(f"{step} (best)" if step == best else str(step) for step in steps)
        if name == "best" and best is None:
            raise ConfigError(
                f"Run {folder.run_id!r} has measured none of its checkpoints "
                f"(train.probe_prompts=0), so none is the best; it keeps those of steps {kept}."
            )
        step = {"best": best, "newest": steps[-1]}[name] if name.isalpha() else int(name)
        assert step is not None, "checked above"
        if step not in steps:
            raise ConfigError(
                f"Run {folder.run_id!r} keeps no checkpoint of step {step}; it keeps those of "
                f"steps {kept}."
            )
        return store.load(step)
    except StorageError as error:
        raise ConfigError(str(error)) from error
