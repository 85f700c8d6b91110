"""Where sampling and scoring meet: prompts in, a complete `Rollout` out.

    prompts, sorted by length, in chunks
      chunk 1   sample ---> submit for scoring . . . . . . . . . . . . . . . . result
      chunk 2              sample ---> submit . . . . . . . . . . . . . . . .  result
                                        reference log-probabilities of all     v
                                                                            Rollout

Scoring happens elsewhere (in reward actors, or at once in this process); this process goes on
sampling, then scores the reference, and only then waits. No gradients here, and no Ray.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_detox import prompts as draws
from ray_detox.policy import Policy
from ray_detox.records import PromptBatch, Rollout, Sample, Scores
from ray_detox.reward import Scorer


@dataclass(frozen=True, slots=True)
class Collected:
    """A rollout, what the reward said in full, the texts, and where the time went."""

    rollout: Rollout
    scores: Scores
    responses: list[str]
    seconds: dict[str, float]
    """`sample`, `reference`, and `score`: the wait for scores that nothing else filled."""


def collect(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    batch: PromptBatch,
    *,
    seed: int,
    step: int,
    chunk_size: int,
) -> Collected:
    """Answer every prompt once and have the answers scored.

    Args:
        policy: answers, and is its own reference.
        tokenizer: turns answers into text.
        scorer: scores texts, asynchronously if it can.
        batch: B prompts; the result keeps their order.
        seed: of the run.
        step: of the run; with seed and prompt it decides every draw.
        chunk_size: prompts sampled, and then sent for scoring, at a time.
    """
    # Neighbours in a chunk are of like length, so that little of it is padding.
    order = torch.argsort(batch.query_mask.sum(dim=1), stable=True).tolist()
    chunks = [order[i : i + chunk_size] for i in range(0, len(order), chunk_size)]
    seconds = {"sample": 0.0, "reference": 0.0, "score": 0.0}

    samples: list[Sample] = []
    queries: list[tuple[Tensor, Tensor]] = []
    texts: list[str] = []
    pending = []
    for chunk in chunks:
        began = time.perf_counter()
        part = batch.select(chunk)
        query_ids = part.query_ids.to(policy.device)
        query_mask = part.query_mask.to(policy.device)
        budgets, uniforms = draws.draw(part.ids, policy.sampling, seed, step)
        sample = policy.sample(
            query_ids,
            query_mask,
            torch.from_numpy(budgets).to(policy.device),
            torch.from_numpy(uniforms.astype(np.float32)).to(policy.device),
        )
        ids = [
            row[m].tolist()
            for row, m in zip(sample.response_ids, sample.response_mask, strict=True)
        ]
        responses = decode(tokenizer, ids)
        samples.append(sample)
        queries.append((query_ids, query_mask))
        texts += responses
        seconds["sample"] += time.perf_counter() - began
        pending.append(scorer.submit(part.texts, responses, ids, part.columns))

    began = time.perf_counter()
    references = [
        policy.ref_logprobs(*query, s.response_ids, s.response_mask, s.encoder_states)
        for query, s in zip(queries, samples, strict=True)
    ]
    seconds["reference"] = time.perf_counter() - began

    began = time.perf_counter()
    scores = Scores.concatenate([p.result() for p in pending])
    seconds["score"] = time.perf_counter() - began

    back = np.argsort(order)
    scores = scores.select(back)
    rows = torch.from_numpy(back).to(policy.device)
    join = lambda parts: _stack_padded(parts)[rows]
    has_states = samples[0].encoder_states is not None
    rollout = Rollout(
        query_ids=join([q for q, _ in queries]),
        query_mask=join([m for _, m in queries]),
        response_ids=join([s.response_ids for s in samples]),
        response_mask=join([s.response_mask for s in samples]),
        logprobs=join([s.logprobs for s in samples]),
        ref_logprobs=join(references),
        values=join([s.values for s in samples]),
        scores=torch.from_numpy(scores.rewards).to(policy.device),
        encoder_states=join([s.encoder_states for s in samples]) if has_states else None,
    )
    return Collected(rollout, scores, [texts[i] for i in back], seconds)


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Responses as text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(list(rows), skip_special_tokens=True)]


def _stack_padded(parts: Sequence[Tensor | None]) -> Tensor:
    """Tensors [b, n, ...] below one another, padded with zeros to the largest n."""
    tensors = [part for part in parts if part is not None]
    width = max(part.shape[1] for part in tensors)
    wide = []
    for part in tensors:
        padded = part.new_zeros((part.shape[0], width, *part.shape[2:]))
        padded[:, : part.shape[1]] = part
        wide.append(padded)
    return torch.cat(wide)
