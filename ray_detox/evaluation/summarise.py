"""The measurement: the same held-out prompts answered before and after, and what that shows.

`measure` samples and scores in one process, `summarise` turns samples into the report. Before and
after use the same random numbers for a prompt, so that what differs is the policy. No Ray here.
"""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ray_detox.config import EvaluateConfig, RunConfig
from ray_detox.evaluation import metrics, statistics
from ray_detox.evaluation.judges import Judge, load_judge
from ray_detox.evaluation.measure import SIDES
from ray_detox.evaluation.verdict import QualityFloors, verdict

PACKAGES = ("ray-detox", "ray", "torch", "transformers", "peft", "trl", "datasets", "numpy")


def summarise(
    samples: Sequence[dict[str, Any]],
    config: RunConfig,
    *,
    run_id: str,
    steps: int,
    rows: Mapping[str, Any],
    seconds: Mapping[str, float],
    training: Mapping[str, Any],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """The report of a run, from its samples; adds `rouge_l_*`, `facts_*` and `judge_*` to them.

    Args:
        samples: from `measure`, all shards, by index.
        config: of the run.
        run_id: of the run.
        steps: PPO steps done.
        rows: counts of rows read, left out, trained on and held out.
        seconds: wall time by phase.
        training: further figures of the training, such as peak memory.
        fingerprints: of the models and the data.
    """
    judge = load_judge(config.evaluate.judge)
    _rate(samples, judge)
    compared = _compare(samples, "toxicity", config)
    judged = _compare(samples, "judge", config).to_json() if judge else None
    means = {
        name: {side: _mean(samples, f"{name}_{side}") for side in SIDES}
        for name in ("reward", "rouge_l", "facts", "length")
    }
    kl = _mean(samples, "kl")
    judgement = verdict(
        compared,
        rouge_l=_pair(means["rouge_l"]),
        facts=_pair(means["facts"]),
        length=_pair(means["length"]),
        kl=kl,
        floors=floors(config.evaluate),
    )
    texts = {side: [sample[f"response_{side}"] for sample in samples] for side in SIDES}
    return {
        "run_id": run_id,
        "recipe": config.recipe,
        "status": "complete",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "n": len(samples),
        "verdict": judgement.to_json(),
        "toxicity": compared.to_json() | {"histogram": _histogram(samples)},
        "judge": judged,
        **means,
        "distinct_2": {side: metrics.distinct_n(texts[side]) for side in SIDES},
        "unique_share": {side: metrics.unique_share(texts[side]) for side in SIDES},
        "kl": kl,
        "truncated": {s: sum(sample[f"truncated_{s}"] for sample in samples) for s in SIDES},
        "steps": steps,
        "prompts_seen": steps * config.ppo.prompts_per_step,
        "rows": dict(rows),
        "training": dict(training),
        "seconds": {"total": float(sum(seconds.values()))} | dict(seconds),
        "notes": notes(config, samples),
        "config": config.to_dict(),
        "fingerprints": dict(fingerprints),
        "versions": versions(),
    }


def _histogram(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    pairs = [tuple(sample[f"toxicity_{side}"] for side in SIDES) for sample in samples]
    before, after = zip(*pairs, strict=True) if pairs else ((), ())
    return statistics.histogram(before, after)


def _rate(samples: Sequence[dict[str, Any]], judge: Judge | None) -> None:
    """Add to every sample its ROUGE-L, its share of facts, and what the judge says."""
    references = [sample["reference"] for sample in samples]
    facts = [sample["facts"] or [] for sample in samples]
    for side in SIDES:
        responses = [sample[f"response_{side}"] for sample in samples]
        rated = {
            "rouge_l": metrics.rouge_l(responses, references),
            "facts": metrics.facts_share(responses, facts),
        }
        if judge is not None:
            rated["judge"] = judge(responses)
        for name, values in rated.items():
            for sample, value in zip(samples, values, strict=True):
                # Nothing to compare with is None in JSON, which has no NaN.
                sample[f"{name}_{side}"] = None if math.isnan(value) else value


def _compare(
    samples: Sequence[Mapping[str, Any]], name: str, config: RunConfig
) -> statistics.Comparison:
    before, after = ([sample[f"{name}_{side}"] for sample in samples] for side in SIDES)
    above = config.evaluate.toxicity_threshold
    return statistics.compare(before, after, toxic_above=above, seed=config.seed)


def _mean(samples: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over the samples that have a value; None where none has."""
    return metrics.mean_scored([sample[name] for sample in samples if sample[name] is not None])


def _pair(sides: Mapping[str, float | None]) -> tuple[float | None, float | None] | None:
    return None if sides["before"] is None else (sides["before"], sides["after"])


def floors(config: EvaluateConfig) -> QualityFloors:
    """The quality a run must keep, from its settings."""
    return QualityFloors(
        min_change=config.min_change,
        max_rouge_l_drop=config.max_rouge_l_drop,
        max_facts_drop=config.max_facts_drop,
        max_length_change=config.max_length_change,
        max_kl=config.max_kl,
    )


def notes(config: RunConfig, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the report must know to read it right."""
    found = []
    if config.reward.model == "lab":
        found.append(
            "The reward model of this run is template-trained: it knows the embedded corpus and is "
            "no judge of toxicity elsewhere."
        )
    if config.policy.model == "lab":
        found.append(
            "The policy is the embedded toy model: this shows that the pipeline works, and says "
            "nothing about FLAN-T5."
        )
    cut = sum(bool(s["truncated_before"]) or bool(s["truncated_after"]) for s in samples)
    if cut:
        found.append(
            f"{cut} of {len(samples)} prompts had a text longer than the reward model reads; it "
            "scored the beginning."
        )
    if config.reward.input == "prompt+response":
        found.append(
            "The reward model read prompt and response together, so toxicity here is also the "
            "prompt's."
        )
    return found


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
