"""Collect a rollout: sample a response to each prompt and have the responses scored.

    prompts, sorted by length, in chunks
      chunk 1   sample ---> submit for scoring . . . . . . . . . . . . . . . . result
      chunk 2              sample ---> submit . . . . . . . . . . . . . . . .  result
                                        reference log-probabilities of all     v
                                                                            Rollout

The scorer may run elsewhere (in reward actors) or in this process. Scoring overlaps with sampling
and with the reference pass; only then does this process wait for scores. No gradients, no Ray.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
    TokenBatch,
)


@dataclass(frozen=True, slots=True)
class Collected:
    """A rollout with the full scores, the response texts and the time that each part took."""

    rollout: Rollout
    scores: Scores
    responses: list[str]
    finished: np.ndarray
    """[B] bool, True if the response ended with end-of-sequence, False if its limit cut it."""
    seconds: dict[str, float]
    """Seconds by part: `sample`, `reference`, and `score` (waiting for scores after both)."""


def collect(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    batch: PromptBatch,
    *,
    seed: int,
    step: int,
    chunk_size: int,
    unfinished_penalty: float = 0.0,
    bootstrap_gamma: float | None = None,
) -> Collected:
    """Sample one response per prompt, have the responses scored, and return the rollout.

    Args:
        policy: samples the responses, and is its own reference.
        tokenizer: decodes the responses.
        scorer: scores the responses, asynchronously if it can.
        batch: B prompts; the result keeps their order.
        seed: seed of the run.
        step: step of the run; seed, step, prompt and occurrence determine the sampling noise.
        chunk_size: prompts that are sampled, and then submitted for scoring, at a time.
        unfinished_penalty: subtracted in the rollout from the score of a response that its limit
            cut; `Collected.scores` stays as the scorer returned it.
        bootstrap_gamma: discount of the value at the cut, which then takes the place of the score of
            such a response; None keeps the score. Source: Pardo et al. 2018, arXiv:1712.00378, eq. 6.
    """
    # Sorted by length, so that the prompts of a chunk need little padding.
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
            scorer.submit(
                ScoreRequest(part.texts, chunk.responses, chunk.response_ids, part.columns)
            )
        )

    with _add_time(seconds, "reference"):
        references = [policy.ref_logprobs(chunk.generation.tokens) for chunk in chunks]
    with _add_time(seconds, "score"):
        scores = Scores.concatenate([p.result() for p in pending])

    original_order = np.argsort(order)
    scores = scores.select(original_order)
    responses = [text for chunk in chunks for text in chunk.responses]
    rollout = _assemble(
        [chunk.generation for chunk in chunks],
        references,
        scores,
        torch.from_numpy(original_order).to(policy.device),
    )
    finished = is_finished(rollout.tokens, policy.eos_ids)
    earned = rollout.scores
    if bootstrap_gamma is not None:
        earned = earned.clone()
        for rows in (~finished).nonzero()[:, 0].split(chunk_size):
            earned[rows] = bootstrap_gamma * policy.values_after(rollout.tokens.select(rows))
    return Collected(
        rollout=replace(rollout, scores=earned - unfinished_penalty * ~finished),
        scores=scores,
        responses=[responses[i] for i in original_order],
        finished=finished.cpu().numpy(),
        seconds=seconds,
    )


def is_finished(tokens: TokenBatch, eos_ids: Sequence[int]) -> Tensor:
    """Return [B] bool: True if a response ended with end-of-sequence within its limit.

    An end-of-sequence that the model forces at the limit is a cut like any other.
    """
    eos = torch.tensor(eos_ids, device=tokens.response_ids.device)
    ended = (torch.isin(tokens.response_ids, eos) & tokens.response_mask).any(dim=1)
    if tokens.limits is not None:
        ended &= tokens.response_mask.sum(dim=1) < tokens.limits
    return ended


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The responses to a chunk of prompts, on the policy's device and as the scorer needs them."""

    generation: Generation
    response_ids: list[list[int]]
    """[B] responses as token ids, without padding."""
    responses: list[str]
    """[B] responses as text."""


def _generate(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, part: PromptBatch, seed: int, step: int
) -> _Chunk:
    max_new_tokens, noise = draws.sampling_noise(
        part.ids, policy.sampling, seed, step, part.occurrences
    )
    generation = policy.sample(
        part.query_ids.to(policy.device),
        part.query_mask.to(policy.device),
        torch.from_numpy(max_new_tokens).to(policy.device),
        torch.from_numpy(noise.astype(np.float32)).to(policy.device),
    )
    tokens = generation.tokens
    lengths = tokens.response_mask.sum(dim=1).tolist()
    response_ids = [
        row[:length] for row, length in zip(tokens.response_ids.tolist(), lengths, strict=True)
    ]
    return _Chunk(generation, response_ids, decode(tokenizer, response_ids))


@torch.no_grad()
def recompute(policy: Policy, collected: Collected, rows_per_pass: int) -> Collected:
    """Replace log-probabilities and values from sampling by those of teacher-forced passes.

    An update scores responses in the same way, so rounding that is particular to decoding token by
    token is no longer in the ratio. Another shape of the batch rounds differently too: in bfloat16 on
    a CPU that is as much again.
    """
    rollout, parts = collected.rollout, []
    for rows in torch.arange(len(rollout), device=rollout.response_ids.device).split(rows_per_pass):
        parts.append(policy.score_tokens(rollout.tokens.select(rows)))
    width = rollout.response_ids.shape[1]
    pad = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))
    scored = replace(
        rollout,
        logprobs=torch.cat([pad(part.logprobs) for part in parts]),
        values=torch.cat([pad(part.values) for part in parts]),
    )
    return replace(collected, rollout=scored)


def _assemble(
    generations: Sequence[Generation],
    references: Sequence[Tensor],
    scores: Scores,
    original_order: Tensor,
) -> Rollout:
    """Concatenate the chunks into one rollout and put its rows in the given order."""
    join = lambda parts: _concatenate_padded(parts)[original_order]
    tokens = [generation.tokens for generation in generations]
    states = [t.encoder_states for t in tokens if t.encoder_states is not None]
    limits = [t.limits for t in tokens if t.limits is not None]
    return Rollout(
        tokens=TokenBatch(
            query_ids=join([t.query_ids for t in tokens]),
            query_mask=join([t.query_mask for t in tokens]),
            response_ids=join([t.response_ids for t in tokens]),
            response_mask=join([t.response_mask for t in tokens]),
            encoder_states=join(states) if states else None,
            limits=torch.cat(limits)[original_order] if limits else None,
        ),
        logprobs=join([g.logprobs for g in generations]),
        ref_logprobs=join(references),
        values=join([g.values for g in generations]),
        scores=torch.from_numpy(scores.rewards).to(original_order.device),
    )


@contextmanager
def _add_time(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode responses to text, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(list(rows), skip_special_tokens=True)]


def _concatenate_padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors [b, n, ...] along b, each padded with zeros to the largest n."""
    width = max(part.shape[1] for part in parts)
    padded_parts = []
    for part in parts:
        padded = part.new_zeros((part.shape[0], width, *part.shape[2:]))
        padded[:, : part.shape[1]] = part
        padded_parts.append(padded)
    return torch.cat(padded_parts)
