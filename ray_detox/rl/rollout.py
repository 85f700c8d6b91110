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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_detox import draws
from ray_detox.models.policy import Policy
from ray_detox.records import (
    Generation,
    Pending,
    PromptBatch,
    Rollout,
    Scorer,
    ScoreRequest,
    Scores,
)


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
    """Answer every prompt once and have the chunks scored.

    Args:
        policy: chunks, and is its own reference.
        tokenizer: turns chunks into text.
        scorer: scores texts, asynchronously if it can.
        batch: B prompts; the result keeps their order.
        seed: of the run.
        step: of the run; with seed and prompt it decides every draw.
        chunk_size: prompts sampled, and then sent for scoring, at a time.
    """
    # Neighbours in a chunk are of like length, so that little of it is padding.
    order = torch.argsort(batch.query_mask.sum(dim=1), stable=True).tolist()
    seconds = {"sample": 0.0, "reference": 0.0, "score": 0.0}

    chunks: list[_Chunk] = []
    pending: list[Pending] = []
    for start in range(0, len(order), chunk_size):
        with _add_time(seconds, "sample"):
            part = batch.select(order[start : start + chunk_size])
            chunk = _generate(policy, tokenizer, part, seed, step)
        chunks.append(chunk)
        pending.append(
            scorer.submit(ScoreRequest(part.texts, chunk.texts, chunk.ids, part.columns))
        )

    with _add_time(seconds, "reference"):
        references = [
            policy.ref_logprobs(
                a.query_ids,
                a.query_mask,
                a.sample.response_ids,
                a.sample.response_mask,
                a.sample.encoder_states,
            )
            for a in chunks
        ]
    with _add_time(seconds, "score"):
        scores = Scores.concatenate([p.result() for p in pending])

    back = np.argsort(order)
    scores = scores.select(back)
    texts = [text for a in chunks for text in a.texts]
    return Collected(
        rollout=_assemble(chunks, references, scores, torch.from_numpy(back).to(policy.device)),
        scores=scores,
        responses=[texts[i] for i in back],
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk of prompts on the policy's device, and what it said to them."""

    query_ids: Tensor
    query_mask: Tensor
    sample: Generation
    ids: list[list[int]]
    texts: list[str]


def _generate(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, part: PromptBatch, seed: int, step: int
) -> _Chunk:
    query_ids = part.query_ids.to(policy.device)
    query_mask = part.query_mask.to(policy.device)
    max_new_tokens, noise = draws.sampling_noise(part.ids, policy.sampling, seed, step)
    sample = policy.sample(
        query_ids,
        query_mask,
        torch.from_numpy(max_new_tokens).to(policy.device),
        torch.from_numpy(noise.astype(np.float32)).to(policy.device),
    )
    rows = zip(sample.response_ids.tolist(), sample.response_mask.sum(dim=1).tolist(), strict=True)
    ids = [row[:length] for row, length in rows]
    return _Chunk(query_ids, query_mask, sample, ids, decode(tokenizer, ids))


def _assemble(
    chunks: Sequence[_Chunk], references: Sequence[Tensor], scores: Scores, back: Tensor
) -> Rollout:
    """The chunks as one rollout, its rows in the order that `back` restores."""
    samples = [a.sample for a in chunks]
    join = lambda parts: _stack_padded(parts)[back]
    states = [s.encoder_states for s in samples if s.encoder_states is not None]
    return Rollout(
        query_ids=join([a.query_ids for a in chunks]),
        query_mask=join([a.query_mask for a in chunks]),
        response_ids=join([s.response_ids for s in samples]),
        response_mask=join([s.response_mask for s in samples]),
        logprobs=join([s.logprobs for s in samples]),
        ref_logprobs=join(references),
        values=join([s.values for s in samples]),
        scores=torch.from_numpy(scores.rewards).to(back.device),
        encoder_states=join(states) if states else None,
    )


@contextmanager
def _add_time(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Responses as text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(list(rows), skip_special_tokens=True)]


def _stack_padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [b, n, ...] below one another, padded with zeros to the largest n."""
    width = max(part.shape[1] for part in parts)
    wide = []
    for part in parts:
        padded = part.new_zeros((part.shape[0], width, *part.shape[2:]))
        padded[:, : part.shape[1]] = part
        wide.append(padded)
    return torch.cat(wide)
