"""Rate the evaluated prompts and summarise them in the report of a run. No Ray here."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.evaluation import statistics
from ray_detox.evaluation.examples import SIDES, EvaluatedResponse, PairedExample
from ray_detox.evaluation.judges import Judge, load_judge
from ray_detox.evaluation.metrics import JUDGE, METRICS, Metric
from ray_detox.evaluation.statistics import Pair
from ray_detox.evaluation.verdict import verdict

PACKAGES = ("ray-detox", "ray", "torch", "transformers", "peft", "trl", "datasets", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Facts about a run for the report, beside its settings and its evaluated prompts."""

    run_id: str
    steps: int
    """PPO steps done."""
    rows: Mapping[str, Any]
    """Counts of rows read, left out, trained on and held out."""
    seconds: Mapping[str, float]
    """Wall time by phase; of a run that was resumed, of all its processes together."""
    training: Mapping[str, Any]
    """Further values of the training, such as peak memory; empty if nothing was trained."""
    fingerprints: Mapping[str, str]
    """Content fingerprints of the models and the data."""
    record: Mapping[str, Any]
    """What the run's record says: `writer`, and `changes` of settings and content since the start."""


def rate(examples: Sequence[PairedExample], config: RunConfig) -> list[PairedExample]:
    """Return the examples with every rating of `METRICS`, and the judge's if there is a judge."""
    judge = load_judge(config.evaluate.judge)
    before = _rate(examples, [example.before for example in examples], judge)
    after = _rate(examples, [example.after for example in examples], judge)
    return [
        replace(example, before=first, after=second)
        for example, first, second in zip(examples, before, after, strict=True)
    ]


def _rate(
    examples: Sequence[PairedExample], responses: Sequence[EvaluatedResponse], judge: Judge | None
) -> list[EvaluatedResponse]:
    """The responses of one side, with their ratings."""
    ratings = {
        metric.name: [metric.rating(*pair) for pair in zip(examples, responses, strict=True)]
        for metric in METRICS
        if metric.rating is not None
    }
    if judge is not None:
        ratings[JUDGE] = judge([response.response for response in responses])
    return [
        # A rating that does not apply is None in JSON, which has no NaN.
        replace(
            response,
            ratings={
                name: None if math.isnan(values[i]) else values[i]
                for name, values in ratings.items()
            },
        )
        for i, response in enumerate(responses)
    ]


def summarise(
    examples: Sequence[PairedExample], config: RunConfig, facts: RunFacts
) -> dict[str, Any]:
    """Return the report of a run, as JSON values.

    Args:
        examples: from `rate`: all held-out prompts, by index.
        config: settings of the run.
        facts: the rest of what the report says.
    """
    before = [example.before for example in examples]
    after = [example.after for example in examples]
    compared = _compare(_toxicity(before), _toxicity(after), config)
    judged = None
    if config.evaluate.judge != "none":
        judged = _compare(_judged(before), _judged(after), config).to_json()
    means = {
        metric.name: (
            None if metric.after_only else metric.summarise(examples, before),
            metric.summarise(examples, after),
        )
        for metric in METRICS
    }
    return {
        "run_id": facts.run_id,
        "recipe": config.recipe,
        "status": "complete",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": len(examples),
        "verdict": verdict(compared, means, config.evaluate).to_json(),
        "toxicity": compared.to_json()
        | {"histogram": statistics.histogram(_toxicity(before), _toxicity(after))},
        "judge": judged,
        **{metric.name: _to_json(metric, means[metric.name]) for metric in METRICS},
        "truncated": {
            side: sum(response.truncated for response in responses)
            for side, responses in zip(SIDES, (before, after), strict=True)
        },
        "steps": facts.steps,
        "prompts_seen": facts.steps * config.ppo.prompts_per_step,
        "rows": dict(facts.rows),
        "training": dict(facts.training),
        "seconds": {"total": float(sum(facts.seconds.values()))} | dict(facts.seconds),
        "notes": notes(config, examples) + _change_notes(facts.record),
        "config": config.to_dict(),
        "fingerprints": dict(facts.fingerprints),
        **facts.record,
        "versions": versions(),
    }


def _toxicity(responses: Sequence[EvaluatedResponse]) -> list[float]:
    return [response.toxicity for response in responses]


def _judged(responses: Sequence[EvaluatedResponse]) -> list[float]:
    scores = [response.ratings[JUDGE] for response in responses]
    return [math.nan if score is None else score for score in scores]


def _compare(
    before: Sequence[float], after: Sequence[float], config: RunConfig
) -> statistics.Comparison:
    above = config.evaluate.toxicity_threshold
    return statistics.compare(before, after, toxic_above=above, seed=config.seed)


def _to_json(metric: Metric, pair: Pair) -> Any:
    """A metric as it is stored: one number if it has no value before, else both sides."""
    return pair[1] if metric.after_only else dict(zip(SIDES, pair, strict=True))


def notes(config: RunConfig, examples: Sequence[PairedExample]) -> list[str]:
    """Caveats that a reader of the report needs to know."""
    found = []
    if config.reward.model == "lab":
        found.append(
            "The reward model of this run is template-trained: it knows the embedded corpus and "
            "does not measure toxicity elsewhere."
        )
    if config.policy.model == "lab":
        found.append(
            "The policy is the embedded toy model: this shows that the pipeline works, and says "
            "nothing about FLAN-T5."
        )
    cut = sum(example.before.truncated or example.after.truncated for example in examples)
    if cut:
        found.append(
            f"{cut} of {len(examples)} prompts had a text longer than the reward model reads; it "
            + (
                "scored the beginning."
                if config.reward.input == "response"
                else "scored the end of the prompt with the response."
            )
        )
    if config.reward.weight == 0:
        found.append(
            "The reward model measured toxicity and had no weight in the reward (reward.weight=0)."
        )
    if config.reward.input == "prompt+response":
        found.append(
            "The reward model read prompt and response together, so toxicity here is also the "
            "prompt's."
        )
    return found + _generation_notes(config)


def _change_notes(record: Mapping[str, Any]) -> list[str]:
    """Say what changed while the run lasted."""
    changes = record.get("changes", {})
    settings = [
        f"{change['name']} was {change['before']} until step {change['step']}, and then {change['after']}"
        for change in changes.get("settings", [])
    ]
    content = [
        f"{change['name']} since step {change['step']}" for change in changes.get("accepted", [])
    ]
    found = []
    if settings:
        found.append(f"Settings changed when the run was resumed: {'; '.join(settings)}.")
    if content:
        found.append(
            "This run went on with other content than it was started with (--accept-changes): "
            f"{', '.join(content)}. Its figures belong to no single state of it."
        )
    return found


def _generation_notes(config: RunConfig) -> list[str]:
    """Describe the model's generation settings; the embedded model has none that matter."""
    if config.policy.model == "lab":
        return []
    from ray_detox.models.constraints import describe_generation

    try:
        return describe_generation(config.policy, config.sampling)
    except ConfigError:  # a note must not cost a finished run its report
        return []


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
