"""Generate and score a response to each held-out prompt, before and after training."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ray_detox.config import RunConfig
from ray_detox.records import PreparedRow

SIDES = ("before", "after")


def measure(
    policy: Any,
    tokenizer: Any,
    scorer: Any,
    rows: Sequence[PreparedRow],
    config: RunConfig,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Answer and score every prompt twice: as the reference (before) and as trained (after).

    Args:
        policy: a `Policy` with the trained adapter.
        tokenizer: its tokenizer.
        scorer: a `Scorer`.
        rows: prepared rows, as `stages.ingest` makes them.
        config: of the run.
        on_done: told how many prompts each chunk had, once it is measured.

    Returns:
        One sample per row, in order: texts, rewards, toxicity, lengths in tokens, and the KL of
        the response after, in nats. `index` is the position in `rows`.
    """
    from ray_detox.data.shards import make_batch
    from ray_detox.draws import EVALUATION
    from ray_detox.rl.rollout import collect

    order = np.argsort([len(row.query_ids) for row in rows], kind="stable")
    samples: list[dict[str, Any]] = [{} for _ in rows]
    size = config.evaluate.batch_size
    for start in range(0, len(order), size):
        chunk = order[start : start + size].tolist()
        batch = make_batch([rows[i] for i in chunk], policy.pad_id)
        settings = {"seed": config.seed, "step": EVALUATION, "chunk_size": size}
        with policy.as_reference():
            before = collect(policy, tokenizer, scorer, batch, **settings)
        after = collect(policy, tokenizer, scorer, batch, **settings)
        rollout = after.rollout
        kl = (rollout.logprobs - rollout.ref_logprobs).sum(dim=1).tolist()
        for position, i in enumerate(chunk):
            row = rows[i]
            reference = row.columns.get(config.data.summary_column or "")
            sample: dict[str, Any] = {
                "index": i,
                "prompt_id": row.prompt_id,
                "query": row.prompt,
                "reference": reference if isinstance(reference, str) else None,
                "facts": _texts(row.columns.get("facts")),
                "kl": kl[position],
            }
            for side, collected in (("before", before), ("after", after)):
                scores = collected.scores
                sample[f"response_{side}"] = collected.responses[position]
                sample[f"reward_{side}"] = float(scores.rewards[position])
                sample[f"toxicity_{side}"] = float(scores.toxicity[position])
                sample[f"length_{side}"] = int(collected.rollout.response_mask[position].sum())
                sample[f"truncated_{side}"] = bool(scores.truncated[position])
                for name, values in scores.terms.items():
                    sample[f"{name}_{side}"] = float(values[position])
            samples[i] = sample
        on_done(len(chunk))
    return samples


def _texts(value: Any) -> list[str] | None:
    """A row's `facts`, if that is what its column of this name holds."""
    is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if is_texts else None
