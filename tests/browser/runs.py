"""Example runs for the page."""

from ray_detox.evaluation import statistics as toxicity
from ray_detox.evaluation import verdict

HISTORY = [
    {
        "step": step,
        "score": 0.1 * step,
        "toxicity": 0.4 / step,
        "kl": 0.05 * step,
        "entropy": 0.2,
        "explained_variance": 0.9 - 0.5 / step,
        "length": 25.0,
        "seconds_sample": 0.5,
        "seconds_score": 0.1,
        "seconds_reference": 0.1,
        "seconds_update": 0.4,
    }
    for step in range(1, 21)
]


def make_samples(n, **more):
    """Samples: the first quarter became worse, the last is not scored, the rest became better."""
    samples = []
    for i in range(n):
        before, after = (0.1, 0.9) if i < n // 4 else (0.95 - i / (4 * n), 0.05)
        samples.append(
            {
                "index": i,
                "prompt_id": f"{i:016x}",
                "query": f"Summarize dialogue {i}.",
                "reference": f"They met {i} times.",
                "facts": ["met"],
                "response_before": f"The old fool met him {i} times.",
                "response_after": f"The old friend met him {i} times.",
                "toxicity_before": before,
                "toxicity_after": None if i == n - 1 else after,
                "reward_before": 1 - 4 * before,
                "reward_after": 1 - 4 * after,
                "length_before": 7,
                "length_after": 8,
                "kl": 0.5 + i / 100,
                **more,
            }
        )
    return samples


def make_report(run_id, samples, created="2026-01-31T12:00:00+00:00"):
    # A run without samples borrows its metrics from other samples.
    scored = [s for s in samples or make_samples(4) if s["toxicity_after"] is not None]
    before, after = ([s[f"toxicity_{side}"] for s in scored] for side in ("before", "after"))
    compared = toxicity.compare(before, after)
    figures = compared.to_json() | {"unscored": len(samples) - len(scored), "n": len(samples)}
    return {
        "run_id": run_id,
        "recipe": "lab",
        "status": "complete",
        "created": created,
        "n": len(samples),
        "verdict": verdict.verdict(compared).to_json(),
        "toxicity": figures | {"histogram": toxicity.histogram(before, after)},
        "reward": {"before": -1.0, "after": 0.5},
        "rouge_l": {"before": 0.8, "after": 0.81},
        "kl": 0.8,
        "steps": 20,
        "notes": ["Made for a test."],
        "config": {"ppo": {"kl_coef": 0.15}},
        "versions": {"torch": "2.13.0"},
    }
