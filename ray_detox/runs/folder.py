"""The files of a run: where they are, and the result read and written as files.

    OUTPUT/results.sqlite        the embedded store, shared by all runs
    OUTPUT/RUN_ID/config.json    metrics.jsonl  tensorboard/  checkpoints/  evaluation/  adapter/
                  report.json    report.txt     samples.jsonl

The result is written here before any store sees it, so that no store can lose a run.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.errors import ConfigError
from ray_detox.recipes.loading import config_from_dict
from ray_detox.runs.metrics_log import read_metrics
from ray_detox.runs.report_text import describe_run
from ray_detox.runs.storage import write_atomic

if TYPE_CHECKING:
    from ray_detox.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the files of a run are."""

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

    def require_adapter(self) -> None:
        """Refuse a run that has not finished training.

        Raises:
            ConfigError: the run has no adapter yet.
        """
        if not (self.adapter / "adapter_config.json").is_file():
            raise ConfigError(
                f"Run {self.run_id!r} has no adapter yet. Finish it first: "
                f"ray-detox run --resume {self.run_id}."
            )

    def read_config(self) -> "RunConfig":
        """The settings the run was started with.

        Raises:
            ConfigError: there is no such run.
        """
        file = self.path / "config.json"
        if not file.is_file():
            runs = sorted(p.parent.name for p in self.output.glob("*/config.json"))
            known = f"the runs there are {', '.join(runs[-8:])}" if runs else "no run is there"
            raise ConfigError(f"No run {self.run_id!r} in {self.output}; {known}.")
        return config_from_dict(json.loads(file.read_text(encoding="utf-8")))

    def read_history(self) -> list[dict[str, Any]]:
        """The figures of every training step so far."""
        return read_metrics(self.path / "metrics.jsonl")

    def write_result(self, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Write report.json, report.txt and samples.jsonl, each whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_atomic(self.path / "samples.jsonl", lines)
        write_atomic(self.path / "report.txt", describe_run(report, samples) + "\n")
        # Last: where it is, the others are too.
        write_atomic(self.path / "report.json", json.dumps(report, indent=2) + "\n")

    def read_result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The report and the samples of a finished run.

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
                return report, [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}). Measure the run again: "
                f"ray-detox run --resume {self.run_id}."
            ) from None


def new_run_id(recipe: str) -> str:
    """A run id that sorts by time and does not collide."""
    return f"{recipe[:32]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
