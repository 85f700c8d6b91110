"""The files of a run: their paths, and its result as files.

    OUTPUT/results.sqlite        the embedded store, shared by all runs
    OUTPUT/RUN_ID/config.json    metrics.jsonl  tensorboard/  checkpoints/  evaluation/  adapter/
                  report.json    report.txt     samples.jsonl
                  ray-train/     during training: files of Ray Train

The result is written here before it goes to a store, so a store that fails loses no run.
"""

import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.errors import ConfigError
from ray_detox.evaluation.examples import PairedExample
from ray_detox.recipes.loading import config_from_dict
from ray_detox.runs.checkpoint_store import adapter_files, write_files
from ray_detox.runs.metrics_log import read_metrics
from ray_detox.runs.report_text import describe_run
from ray_detox.runs.storage import write_atomic

if TYPE_CHECKING:
    from ray_detox.config import RunConfig

FIXED_SETTINGS = ("recipe", "data", "policy", "seed")
"""Settings that identify a run: another value of one of them makes a different run."""


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

    def write_adapter(self, checkpoint: Mapping[str, bytes]) -> None:
        """Write the adapter of a checkpoint atomically.

        Args:
            checkpoint: contents of a checkpoint's files by name; those under `adapter/` count.
        """
        part = self.adapter.with_name(self.adapter.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        write_files(adapter_files(checkpoint), part)
        shutil.rmtree(self.adapter, ignore_errors=True)
        part.rename(self.adapter)

    def require_adapter(self) -> None:
        """Check that the run has finished training.

        Raises:
            ConfigError: the run has no adapter yet.
        """
        if not (self.adapter / "adapter_config.json").is_file():
            raise ConfigError(
                f"Run {self.run_id!r} has no adapter yet. Finish it first: "
                f"ray-detox run --resume {self.run_id}."
            )

    def read_config(self) -> "RunConfig":
        """The settings that the run was started with.

        Raises:
            ConfigError: there is no such run, or its settings cannot be read.
        """
        file = self.path / "config.json"
        if not file.is_file():
            runs = sorted(p.parent.name for p in self.output.glob("*/config.json"))
            known = f"the runs there are {', '.join(runs[-8:])}" if runs else "no run is there"
            raise ConfigError(f"No run {self.run_id!r} in {self.output}; {known}.")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError(f"it holds a {type(settings).__name__}")
            return config_from_dict(settings)
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            raise ConfigError(
                f"{file} does not have the settings of a run of this version ({error}). Use the "
                "version of ray-detox that started the run, or start a new run."
            ) from None

    def read_history(self) -> list[dict[str, Any]]:
        """The metrics of every training step so far."""
        return read_metrics(self.path / "metrics.jsonl")

    def write_result(self, report: Mapping[str, Any], examples: Sequence[PairedExample]) -> None:
        """Write report.json, report.txt and samples.jsonl, each atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        samples = [example.to_json() for example in examples]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_atomic(self.path / "samples.jsonl", lines)
        write_atomic(self.path / "report.txt", describe_run(report, samples) + "\n")
        # Written last: if report.json exists, the other two files do as well.
        write_atomic(self.path / "report.json", json.dumps(report, indent=2) + "\n")

    def read_result(self) -> tuple[dict[str, Any], list[PairedExample]]:
        """The report and the evaluated prompts of a finished run.

        Raises:
            ConfigError: there is no such run, it has not finished, or a file is damaged.
        """
        self.read_config()
        file = self.path / "report.json"
        if not file.is_file():
            raise ConfigError(
                f"Run {self.run_id!r} has no result yet. Finish it first: "
                f"ray-detox run --resume {self.run_id}."
            )
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            file = self.path / "samples.jsonl"
            with file.open(encoding="utf-8") as lines:
                return report, [PairedExample.from_json(json.loads(line)) for line in lines]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}). Measure the run again: "
                f"ray-detox run --resume {self.run_id}."
            ) from None


def new_run_id(recipe: str) -> str:
    """Return a new run id: the recipe, the time in sortable form, and random digits."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", recipe[:32]).lstrip("._-") or "run"
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
