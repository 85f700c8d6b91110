"""Generate and score a response to each held-out prompt, before and after training.

Both sides use the same sampling noise for a prompt, so that only the policy differs. No Ray here.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_detox.config import RunConfig
from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample
from ray_detox.records import PreparedRow

if TYPE_CHECKING:
    from ray_detox.rl.rollout import Collected


def measure(
    policy: Any,
    tokenizer: Any,
    scorer: Any,
    rows: Sequence[PreparedRow],
    config: RunConfig,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[PairedExample]:
    """Generate and score two responses to every prompt: with the reference, then as trained.

    Args:
        policy: a `Policy` with the trained adapter.
        tokenizer: its tokenizer.
        scorer: a `Scorer`.
        rows: prepared rows, as `stages.ingest` makes them.
        config: settings of the run.
        on_done: called after each chunk with its number of prompts.

    Returns:
        One example per row, in order, not yet rated; `index` is the position in `rows`.
    """
    from ray_detox.data.shards import make_batch
    from ray_detox.draws import EVALUATION
    from ray_detox.rl.rollout import collect

    # Prompts of similar length share a chunk, so there is little padding.
    order = np.argsort([len(row.query_ids) for row in rows], kind="stable")
    examples: dict[int, PairedExample] = {}
    size = config.evaluate.batch_size
    for start in range(0, len(order), size):
        chunk = order[start : start + size].tolist()
        batch = make_batch(
            [rows[i] for i in chunk], policy.pad_id, occurrences=[rows[i].copy for i in chunk]
        )
        settings = {"seed": config.seed, "step": EVALUATION, "chunk_size": size}
        with policy.as_reference():
            before = collect(policy, tokenizer, scorer, batch, **settings)
        after = collect(policy, tokenizer, scorer, batch, **settings)
        rollout = after.rollout
        kl = (rollout.logprobs - rollout.ref_logprobs).sum(dim=1).tolist()
        for position, i in enumerate(chunk):
            row = rows[i]
            own = row.columns.get(config.data.summary_column or "")
            references = (
                [own, *row.more_references] if isinstance(own, str) else row.more_references
            )
            examples[i] = PairedExample(
                index=i,
                prompt_id=row.prompt_id,
                query=row.prompt,
                reference=references[0] if references else None,
                more_references=tuple(references[1:]),
                facts=_facts(row.columns.get("facts")),
                kl=kl[position],
                before=_evaluated(before, position),
                after=_evaluated(after, position),
            )
        on_done(len(chunk))
    return [examples[i] for i in range(len(rows))]


def _evaluated(collected: "Collected", position: int) -> EvaluatedResponse:
    """One response of a chunk, as plain Python values."""
    scores = collected.scores
    return EvaluatedResponse(
        response=collected.responses[position],
        reward=float(scores.rewards[position]),
        toxicity=float(scores.toxicity[position]),
        length=int(collected.rollout.response_mask[position].sum()),
        truncated=bool(scores.truncated[position]),
        finished=bool(collected.finished[position]),
        terms={name: float(values[position]) for name, values in scores.terms.items()},
    )


def _facts(value: Any) -> tuple[str, ...] | None:
    """A row's `facts`, if its column of this name holds a list of texts."""
    is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return tuple(value) if is_texts else None
