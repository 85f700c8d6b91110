"""Checkpoints: the complete state of a run, in one folder of safetensors and JSON.

    adapter/                  LoRA weights and settings; plain peft loads this folder
    value_head.safetensors    not without a critic
    optimiser.safetensors     Adam's moments by parameter name
    metrics.jsonl             the metrics of every step so far
    state.json                step, KL coefficient, seed, the run's settings

A checkpoint does not depend on the number of workers. It needs no state of a random generator:
every random number is a function of seed, step and prompt, and so is the position in the data.
`runs/checkpoint_store.py` decides where checkpoints are kept.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ray_detox import __version__
from ray_detox.bounded import numbered_lines, parse_object, read_file
from ray_detox.config import RunConfig
from ray_detox.models.policy import Policy
from ray_detox.records import UpdateStats
from ray_detox.rl.learner import Learner

FORMAT = 2


def write(
    folder: Path,
    policy: Policy,
    learner: Learner,
    config: RunConfig,
    step: int,
    history: Sequence[UpdateStats] = (),
) -> None:
    """Write the state after `step` steps into an empty folder; `history` is their metrics."""
    policy.save_adapter(folder / "adapter")
    policy.save_value_head(folder / "value_head.safetensors")
    save_file(learner.optimiser_state(), folder / "optimiser.safetensors")
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in history)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    state = {
        "format": FORMAT,
        "version": __version__,
        "step": step,
        "seed": config.seed,
        "kl_coef": learner.kl_coef,
        "config": config.to_dict(),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, policy: Policy, learner: Learner) -> tuple[int, list[UpdateStats]]:
    """Restore the state that `write` saved; return its step and the metrics of the steps so far.

    Raises:
        ValueError: this version cannot read the checkpoint.
    """
    state = read_state(folder)
    policy.load_adapter(folder / "adapter")
    saved, config = state["config"]["ppo"], learner.config
    # A run that is resumed with another `ppo.critic` continues with a new value head.
    if saved["critic"] == config.critic:
        policy.load_value_head(folder / "value_head.safetensors")
    learner.load_optimiser_state(load_file(folder / "optimiser.safetensors"))
    # What the controller has reached holds only for the settings that it started from.
    start = (config.kl_controller, config.kl_coef)
    if start == ("adaptive", saved["kl_coef"]) and saved["kl_controller"] == "adaptive":
        learner.kl_coef = float(state["kl_coef"])
    lines = numbered_lines(read_file(folder / "metrics.jsonl"))
    try:
        history = [UpdateStats(**parse_object(line, number)) for number, line in lines]
    except TypeError as error:
        raise ValueError(
            f"The metrics in the checkpoint {folder} do not fit this version ({error}). "
            f"Resume the run with ray-detox {state.get('version')}."
        ) from None
    return int(state["step"]), history


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint.

    Raises:
        ValueError: the checkpoint has a format that this version cannot read.
    """
    state = parse_object(read_file(folder / "state.json"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint {folder} has format {state.get('format')}; this version reads "
            f"{FORMAT}. Continue the run with ray-detox {state.get('version')}."
        )
    saved = state.get("config")
    if (
        type(state.get("step")) is not int
        or not isinstance(state.get("kl_coef"), int | float)
        or not isinstance(saved, dict)
        or not isinstance(saved.get("ppo"), dict)
        or not {"critic", "kl_coef", "kl_controller"} <= saved["ppo"].keys()
    ):
        raise ValueError(
            f"The checkpoint {folder} is damaged: state.json lacks the state of a run."
        )
    return state
