"""The files of a run: their paths, and its result as files.

    OUTPUT/results.sqlite        the embedded store, shared by all runs
    OUTPUT/RUN_ID/config.json    metrics.jsonl  tensorboard/  checkpoints/  evaluation/  adapter/
                  report.json    report.txt     samples.jsonl
                  ray-train/     during training: files of Ray Train

The result is written here before it goes to a store, so a store that fails loses no run.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.bounded import (
    MAX_JSON_BYTES,
    DamagedError,
    numbered_lines,
    parse,
    parse_object,
    read_file,
    read_if_there,
)
from ray_detox.errors import ConfigError
from ray_detox.evaluation.examples import PairedExample
from ray_detox.recipes.loading import config_from_dict
from ray_detox.recipes.names import absolute_names
from ray_detox.runs.card import CARD, model_card
from ray_detox.runs.checkpoint_store import adapter_files, read_files, write_files
from ray_detox.runs.commands import command
from ray_detox.runs.metrics_log import read_metrics
from ray_detox.runs.report_text import describe_run
from ray_detox.runs.storage import write_atomic
from ray_detox.store.private import make_folder

if TYPE_CHECKING:
    from ray_detox.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, which may not exist yet."""

    output: Path
    run_id: str

    @property
    def path(self) -> Path:
        """The run's own folder."""
        return self.output / self.run_id

    @property
    def store_path(self) -> Path:
        """The embedded store, shared by all runs of an output folder."""
        return self.output / "results.sqlite"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as plain peft loads it."""
        return self.path / "adapter"

    def command(self, verb: str, *options: str) -> str:
        """Return a command about this run, such as `ray-detox run --resume first`."""
        return command(verb, self.output, self.run_id, *options)

    def has_settings(self) -> bool:
        """Return whether the run was started here; a start that was cut off leaves a folder without them."""
        return (self.path / "config.json").exists()

    def write_adapter(self, checkpoint: Mapping[str, bytes]) -> None:
        """Write the adapter of a checkpoint atomically.

        Args:
            checkpoint: contents of a checkpoint's files by name; those under `adapter/` count.
        """
        part = self.adapter.with_name(self.adapter.name + ".part")
        _remove(part)
        write_files(adapter_files(checkpoint), part)
        _remove(self.adapter)
        part.rename(self.adapter)

    def read_adapter(self) -> dict[str, bytes]:
        """Return the files of the adapter by name, without its model card."""
        files = read_files(self.adapter)
        return {name: content for name, content in files.items() if name != CARD}

    def require_adapter(self) -> None:
        """Check that the run has finished training.

        Raises:
            ConfigError: the run has no adapter yet.
        """
        if not (self.adapter / "adapter_config.json").is_file():
            raise ConfigError(
                f"Run {self.run_id!r} has no adapter yet. Finish it first with "
                f"`{self.command('run --resume')}`."
            )

    def read_config(self) -> "RunConfig":
        """The settings that the run was started with.

        Raises:
            ConfigError: there is no such run, or its settings cannot be read, or it has a link to a
                folder elsewhere, into which a command would write.
        """
        file = self.path / "config.json"
        self._refuse_links()
        try:
            content = read_if_there(file, MAX_JSON_BYTES)
        except DamagedError as error:
            raise _damaged_settings(file, error) from None
        if content is None:
            runs = sorted(p.parent.name for p in self.output.glob("*/config.json"))
            known = f"the runs there are {', '.join(runs[-8:])}" if runs else "no run is there"
            raise ConfigError(f"No run {self.run_id!r} in {self.output}; {known}.")
        return settings_from_json(content, file)

    def _refuse_links(self) -> None:
        inside = self.path.resolve()
        for parent, folders, _ in os.walk(self.path):
            for folder in (Path(parent, name) for name in folders):
                if folder.is_symlink() and not folder.resolve().is_relative_to(inside):
                    raise ConfigError(
                        f"{folder} is a link out of the run's folder. Put the folder it leads to in its "
                        "place; to keep checkpoints elsewhere, a new run has train.storage."
                    )

    def read_history(self) -> list[dict[str, Any]]:
        """The metrics of every training step so far.

        Raises:
            ConfigError: a line is damaged.
        """
        return read_metrics(self.path / "metrics.jsonl")

    def write_result(self, report: Mapping[str, Any], examples: Sequence[PairedExample]) -> None:
        """Write report.json, report.txt, samples.jsonl and the adapter's card, each atomically."""
        make_folder(self.path)
        samples = [example.to_json() for example in examples]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_atomic(self.path / "samples.jsonl", lines)
        write_atomic(self.path / "report.txt", describe_run(report, samples) + "\n")
        if self.adapter.is_dir():
            config = config_from_dict(report["config"])
            write_atomic(self.adapter / CARD, model_card(config, self.run_id, report))
        # Written last: if report.json exists, the other files do as well.
        write_atomic(self.path / "report.json", json.dumps(report, indent=2) + "\n")

    def read_result(self) -> tuple[dict[str, Any], list[PairedExample]]:
        """The report and the evaluated prompts of a finished run.

        Raises:
            ConfigError: there is no such run, it has not finished, or a file is damaged.
        """
        self.read_config()
        file = self.path / "report.json"
        try:
            content = read_if_there(file, MAX_JSON_BYTES)
            if content is None:
                raise ConfigError(
                    f"Run {self.run_id!r} has no result yet. Finish it first with "
                    f"`{self.command('run --resume')}`."
                )
            report = parse_object(content)
            file = self.path / "samples.jsonl"
            examples = [_example(*line) for line in numbered_lines(read_file(file))]
            if report.get("n") != len(examples):
                raise DamagedError(
                    f"it has {len(examples)} lines, and the report is of {report.get('n')} prompts"
                )
        except DamagedError as error:
            raise ConfigError(
                f"{file} is damaged: {error}. Move it away and measure the run again with "
                f"`{self.command('run --resume')}`."
            ) from None
        return report, examples


def _remove(folder: Path) -> None:
    """Remove a folder, or a link or a file of its name, if it exists."""
    # Not through a link, which may lead out of the run's folder.
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def settings_from_json(content: bytes, where: object) -> "RunConfig":
    """Read the settings of a run from the content of a config.json.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ConfigError: it is damaged, or has settings that this version does not know.
    """
    try:
        return absolute_names(config_from_dict(parse_object(content)))
    except DamagedError as error:
        raise _damaged_settings(where, error) from None
    except ConfigError as error:
        raise ConfigError(
            f"{where} does not have the settings of a run of this version ({error}). Use the "
            "version of ray-detox that started the run, or start a new run."
        ) from None


def _damaged_settings(where: object, error: DamagedError) -> ConfigError:
    return ConfigError(
        f"{where} is damaged: {error}. Restore it from a copy (train.storage has one, and the "
        'report.json of a finished run under "config"), or start a new run.'
    )


def _example(number: int, line: bytes) -> PairedExample:
    try:
        return PairedExample.from_json(parse(line, number))
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"line {number}: {error}") from None


def run_exists(folder: RunFolder) -> str:
    """Say that the id of a new run is taken, and what to do."""
    return (
        f"Run {folder.run_id!r} exists in {folder.output}. Choose another --run-id, or resume it with "
        f"`{folder.command('run --resume')}`."
    )


def new_run_id(recipe: str) -> str:
    """Return a new run id: the recipe, the time in sortable form, and random digits."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", recipe[:32]).lstrip("._-") or "run"
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
