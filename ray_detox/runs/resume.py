"""Find a run and its checkpoints in its storage, and refuse a different run of the same id."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.recipes.loading import override_settings
from ray_detox.recipes.names import absolute_names, expand
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore
from ray_detox.runs.conditional import Conflict, versioned_file
from ray_detox.runs.folder import RunFolder, settings_from_json
from ray_detox.runs.lease import read_record
from ray_detox.runs.storage import (
    Storage,
    StorageError,
    check_storage,
    join_address,
    write_atomic,
)
from ray_detox.store.private import make_folder
from ray_detox.store.protocol import check_run_id

MAY_CHANGE = (
    "description",
    "policy.revision",
    "reward.revision",
    "sampling.batch_size",
    "reward.actors",
    "reward.batch_size",
    "reward.check_sentences",
    "ppo.micro_batch_size",
    "ppo.max_kl",
    "ppo.stop_on_collapse",
    "train",
    "evaluate",
    "serving",
    "cluster",
    "results",
)
"""Settings, and sections of them, that may change when a run is resumed. All others define it.

A revision may pin the commit that the run was started with: its content is compared."""


def changed_settings(before: RunConfig, after: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return the name, the old and the new value of every setting that differs."""
    old, new = _flat(before.to_dict()), _flat(after.to_dict())
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def require_same_run(config: RunConfig, begun: RunConfig, run_id: str) -> None:
    """Check that a run keeps the settings that define it.

    Args:
        config: of the run that is about to go on.
        begun: that it has now.
        run_id: of the run.

    Raises:
        ConfigError: a setting differs that makes it another run.
    """
    for name, old, new in changed_settings(begun, config):
        if not any(name == each or name.startswith(f"{each}.") for each in MAY_CHANGE):
            raise ConfigError(
                f"'{name}={_short(new)}' would make another run of {begun.recipe!r}: run {run_id!r} has "
                f"{_short(old)}. Start a new run instead, with another --run-id. What may change when a "
                f"run is resumed: {', '.join(MAY_CHANGE)}."
            )


def resumed_settings(begun: RunConfig, overrides: Sequence[str], run_id: str) -> RunConfig:
    """Apply words such as `train.steps=60` to the settings of a run that is resumed.

    Raises:
        ConfigError: a setting would make it another run, or is not valid.
    """
    config = absolute_names(override_settings(begun, overrides))
    require_same_run(config, begun, run_id)
    return config


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of settings as names such as `train.steps`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def resume_from_storage(
    folder: RunFolder, storage: str, check: Callable[[RunConfig], object]
) -> None:
    """Recreate the folder of a run that started on another machine from its storage.

    Args:
        folder: of the run, on this machine.
        storage: the `train.storage` that the run started with.
        check: called with the run's settings, which raises ConfigError to refuse them.

    Raises:
        ConfigError: the storage has no such run, or cannot be read, or the run's settings there are
            damaged or refused.
    """
    check_run_id(folder.run_id)
    check_storage(storage)
    if "://" not in storage:
        storage = os.path.abspath(expand(storage))
    kept = Storage(join_address(storage, folder.run_id))
    try:
        settings, record = kept.read("config.json"), read_record(kept)
        takings = record.takings if record else ()
        newest = CheckpointStore(kept, takings=takings).newest()
    except StorageError as error:
        raise ConfigError(f"train.storage: {error}") from error
    if settings is None or record is None:
        raise ConfigError(
            f"No run {folder.run_id!r} is in {folder.output}, and none in train.storage={storage}."
        )
    # Settings of another version may not be valid here: find out before the folder exists.
    check(settings_from_json(settings, f"{kept.address}/config.json"))
    make_folder(folder.path)
    # Nobody has the folder yet; who resumes the run takes it in the storage first.
    with suppress(Conflict):
        content = replace(record, writer=None).to_json()
        versioned_file(Storage(str(folder.path.resolve()))).replace(content, None)
    if newest is not None:
        metrics = newest.files.get("metrics.jsonl", b"")
        write_atomic(folder.path / "metrics.jsonl", metrics.decode(errors="replace"))
    # Last: a folder with config.json counts as a run that can be resumed.
    write_atomic(folder.path / "config.json", settings.decode())


def run_storage(config: RunConfig, folder: RunFolder) -> Storage:
    """Return where a run keeps what its next process needs; each run has its own subfolder."""
    if config.train.storage is None:
        return Storage(str(folder.path.resolve()))
    return Storage(join_address(config.train.storage, folder.run_id))


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
    storage = run_storage(config, folder)
    try:
        record = read_record(storage)
        store = CheckpointStore(storage, takings=record.takings if record else ())
        steps, best = store.complete(), store.best()
        if not steps:
            raise ConfigError(f"Run {folder.run_id!r} has no checkpoint yet.")
        kept = ", ".join(f"{step} (best)" if step == best else str(step) for step in steps)
        if name == "best" and best is None:
            reason = (
                "no objective that is a finite number"
                if store.is_measured()
                else "measured none of its checkpoints (train.probe_prompts=0)"
            )
            raise ConfigError(
                f"Run {folder.run_id!r} has {reason}, so none is the best; it keeps the checkpoints of "
                f"steps {kept}."
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
