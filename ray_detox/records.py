"""Records that pass from one part of a run to the next: frozen, and complete when made.

Letters for shapes, here and in every docstring of the project:

    B  sequences in a batch      Q  prompt (query) tokens
    R  response tokens           V  vocabulary entries       D  model width

A mask is True where a token counts. Per-token tensors are `[B, R]` and zero outside the mask.
Log-probabilities are natural logarithms. Scores are higher for less toxic text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor  # a module that passes numbers and names only does not load torch

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A row of data that became a prompt.

    Example:

        prompt_id "00c3f1..."   prompt "Summarize ..."   query_ids [71, 8, 1]
        columns   {"id": "a1", "dialogue": "A: hi", "summary": "A says hi."}
    """

    prompt_id: str
    """Hash of the prompt's text, as `data.prompts.prompt_id` computes it."""
    prompt: str
    """The prompt as text."""
    query_ids: list[int]
    """The prompt as token ids, [Q]."""
    columns: dict[str, Any]
    """The row as it was read, with values of JSON types; reward functions receive every column,
    also one that is called `prompt`."""
    copy: int
    """Number of earlier rows of the data with the same prompt; 0 until `ingest` has counted."""
    more_references: tuple[str, ...]
    """Reference summaries of other rows with the same prompt; `ingest` merges those held out."""


@dataclass(frozen=True, slots=True)
class LeftOutRow:
    """A row of data that cannot become a prompt."""

    name: str
    """The row's id, or the start of its text, for messages."""
    reason: str
    """Why it is left out; rows are counted by reason."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts to respond to: tokens for the policy, texts for the reward.

    Example: two prompts, the second of one token.

        query_ids [[71, 8, 1], [5, 0, 0]]      query_mask [[T, T, T], [T, F, F]]
    """

    ids: list[str]
    """Hash of each prompt's text; pairs the response before training with the one after it."""
    texts: list[str]
    """The prompts as text."""
    query_ids: Tensor
    """[B, Q] int64, padded on the right: T5 counts positions from the left."""
    query_mask: Tensor
    """[B, Q] bool, True on prompt tokens."""
    columns: dict[str, list[Any]]
    """The data's other columns, such as the reference summary; reward functions receive them."""
    occurrences: list[int]
    """A number that tells the copies of a prompt in one step apart; 0 for the first."""

    def __post_init__(self) -> None:
        batch = len(self.ids)
        if self.query_ids.shape != self.query_mask.shape or len(self.query_ids) != batch:
            raise ValueError(
                f"PromptBatch.query_ids has shape {tuple(self.query_ids.shape)} and query_mask "
                f"{tuple(self.query_mask.shape)} for {batch} ids; expected [{batch}, Q] for both."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """Return the given rows, in that order, cut to the longest of them."""
        mask = self.query_mask[list(rows)]
        width = int(mask.sum(dim=1).max()) if len(rows) else 0
        return PromptBatch(
            ids=[self.ids[i] for i in rows],
            texts=[self.texts[i] for i in rows],
            query_ids=self.query_ids[list(rows), :width],
            query_mask=mask[:, :width],
            columns={name: [column[i] for i in rows] for name, column in self.columns.items()},
            occurrences=[self.occurrences[i] for i in rows],
        )


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Prompts and their responses as tokens: the input of a scoring pass of the policy.

    Example: one prompt of 3 tokens, a response of 2 tokens padded to 4.

        query_ids     [[71, 8, 1]]          response_ids  [[205, 1, 0, 0]]
        query_mask    [[T, T, T]]           response_mask [[T, T, F, F]]
    """

    query_ids: Tensor
    """[B, Q] int64 prompt tokens, padded on the right."""
    query_mask: Tensor
    """[B, Q] bool, True on prompt tokens."""
    response_ids: Tensor
    """[B, R] int64 sampled tokens, padded on the right."""
    response_mask: Tensor
    """[B, R] bool, True up to and including end-of-sequence, at least one per row."""
    encoder_states: Tensor | None
    """[B, Q, D] encoder output that later passes reuse, if the encoder is frozen; else None."""
    limits: Tensor | None
    """[B] int64, limit of each response in tokens, if the model forces end-of-sequence there."""

    def __post_init__(self) -> None:
        batch = len(self.response_ids)
        for ids, mask in (("query_ids", "query_mask"), ("response_ids", "response_mask")):
            shapes = [tuple(getattr(self, name).shape) for name in (ids, mask)]
            if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != batch:
                letter = "Q" if ids == "query_ids" else "R"
                raise ValueError(
                    f"TokenBatch.{mask} has shape {shapes[1]} and {ids} has shape {shapes[0]}; "
                    f"expected [{batch}, {letter}] for both."
                )
        states = self.encoder_states
        if states is not None and states.shape[:2] != self.query_ids.shape:
            raise ValueError(
                f"TokenBatch.encoder_states has shape {tuple(states.shape)}; expected "
                f"[{batch}, {self.query_ids.shape[1]}, D], one state per prompt token."
            )
        if self.limits is not None and self.limits.shape != (batch,):
            raise ValueError(
                f"TokenBatch.limits has shape {tuple(self.limits.shape)}, expected ({batch},): one "
                "limit per response."
            )
        if not bool(self.response_mask[:, :1].all()):
            raise ValueError(
                "TokenBatch.response_mask has an empty row; every response has a token."
            )

    def __len__(self) -> int:
        return len(self.response_ids)

    def select(self, rows: Tensor) -> TokenBatch:
        """Return the given rows (int64 [N]), cut to the longest prompt and response of them."""
        queries = int(self.query_mask[rows].sum(dim=1).max())
        responses = int(self.response_mask[rows].sum(dim=1).max())
        states = self.encoder_states
        return TokenBatch(
            query_ids=self.query_ids[rows, :queries],
            query_mask=self.query_mask[rows, :queries],
            response_ids=self.response_ids[rows, :responses],
            response_mask=self.response_mask[rows, :responses],
            encoder_states=None if states is None else states[rows, :queries],
            limits=None if self.limits is None else self.limits[rows],
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """Responses that the policy sampled for a batch of prompts, on the policy's device."""

    tokens: TokenBatch
    """The prompts and the sampled responses."""
    logprobs: Tensor
    """[B, R] float32, log-probability of each token under the distribution it was sampled from."""
    values: Tensor
    """[B, R] float32, the value estimated just before each token."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The reward's output for a batch of responses."""

    rewards: np.ndarray
    """[B] float32, the sum that PPO maximises: weighted classifier score plus weighted terms."""
    logits: np.ndarray
    """[B] float32, the classifier's score: its raw logit of "nothate", or see `classifier.Head`."""
    toxicity: np.ndarray
    """[B] float32, the classifier's probability of toxic: 1 minus that of "nothate"."""
    truncated: np.ndarray
    """[B] bool, True if the text was longer than a classifier's input and was cut."""
    terms: dict[str, np.ndarray]
    """Each term of `reward.terms` by name, [B] float32, before its weight."""

    @staticmethod
    def concatenate(parts: Sequence[Scores]) -> Scores:
        """Join several batches into one, in the order given."""
        import numpy as np  # late: `ray-detox check` reads rows of data, and needs no numpy

        join = lambda name: np.concatenate([getattr(part, name) for part in parts])
        return Scores(
            rewards=join("rewards"),
            logits=join("logits"),
            toxicity=join("toxicity"),
            truncated=join("truncated"),
            terms={
                name: np.concatenate([part.terms[name] for part in parts])
                for name in parts[0].terms
            },
        )

    def select(self, rows: Sequence[int] | np.ndarray) -> Scores:
        """Return the given rows, in that order."""
        return Scores(
            rewards=self.rewards[rows],
            logits=self.logits[rows],
            toxicity=self.toxicity[rows],
            truncated=self.truncated[rows],
            terms={name: values[rows] for name, values in self.terms.items()},
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """The policy's responses to a batch of prompts, with everything that an update needs.

    Example: one prompt of 3 tokens, a response of 2 tokens padded to 4.

        query_ids     [[71, 8, 1]]          response_ids  [[205, 1, 0, 0]]
        query_mask    [[T, T, T]]           response_mask [[T, T, F, F]]
        logprobs      [[-0.7, -0.1, 0, 0]]  scores        [3.2]
    """

    tokens: TokenBatch
    """The prompts and the sampled responses."""
    logprobs: Tensor
    """[B, R] float32, log-probability of each token under the policy that sampled it."""
    ref_logprobs: Tensor
    """[B, R] float32, the same under the frozen reference."""
    values: Tensor
    """[B, R] float32, the value estimated just before each token."""
    scores: Tensor
    """[B] float32, the reward for the whole response. If it was cut, `ppo.unfinished_penalty` is
    subtracted, and `ppo.bootstrap_unfinished` puts the value at the cut in its place."""

    def __post_init__(self) -> None:
        batch, response = self.response_ids.shape
        for name in ("logprobs", "ref_logprobs", "values"):
            shape = tuple(getattr(self, name).shape)
            if shape != (batch, response):
                raise ValueError(
                    f"Rollout.{name} has shape {shape}, but response_ids has shape "
                    f"{(batch, response)}; every per-token field is [B, R]."
                )
        if self.scores.shape != (batch,):
            raise ValueError(
                f"Rollout.scores has shape {tuple(self.scores.shape)}, expected ({batch},): "
                "one score per response. Sum or index the reward model's output first."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def query_ids(self) -> Tensor:
        """[B, Q] int64 prompt tokens, padded on the right."""
        return self.tokens.query_ids

    @property
    def query_mask(self) -> Tensor:
        """[B, Q] bool, True on prompt tokens."""
        return self.tokens.query_mask

    @property
    def response_ids(self) -> Tensor:
        """[B, R] int64 sampled tokens, padded on the right."""
        return self.tokens.response_ids

    @property
    def response_mask(self) -> Tensor:
        """[B, R] bool, True up to and including end-of-sequence, at least one per row."""
        return self.tokens.response_mask

    @property
    def encoder_states(self) -> Tensor | None:
        """[B, Q, D] encoder output that later passes reuse, if the encoder is frozen; else None."""
        return self.tokens.encoder_states

    def select(self, rows: Tensor) -> Rollout:
        """Return the given rows (int64 [N]), cut to the longest prompt and response of them."""
        tokens = self.tokens.select(rows)
        responses = tokens.response_ids.shape[1]
        return Rollout(
            tokens=tokens,
            logprobs=self.logprobs[rows, :responses],
            ref_logprobs=self.ref_logprobs[rows, :responses],
            values=self.values[rows, :responses],
            scores=self.scores[rows],
        )


@dataclass(frozen=True, slots=True)
class Targets:
    """Per-token learning targets computed from a rollout; every tensor is [B, R] float32."""

    kl: Tensor
    """Per-token estimate of KL(pi || ref), in nats (`ppo.reward_kl`)."""
    rewards: Tensor
    """Reward per token: the KL penalty on each, plus the score on the last."""
    advantages: Tensor
    """Generalised advantage estimates, standardised over all workers."""
    returns: Tensor
    """Regression targets of the critic."""

    def select(self, rows: Tensor, responses: int) -> Targets:
        """Return the given rows (int64 [N]), cut to `responses` tokens."""
        return Targets(*(getattr(self, f.name)[rows, :responses] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Objective:
    """The measure by which the checkpoints of a run are compared."""

    value: float
    """Score less KL penalty, on prompts and with noise that stay the same; maybe not finite."""
    key: str
    """Hash of the settings that it depends on: objectives with different keys are not comparable."""


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """Metrics of one PPO step, already reduced over all workers. One row of metrics.jsonl."""

    step: int
    """Steps done, including this one."""
    score: float
    """Mean of `Rollout.scores`."""
    score_std: float
    """Standard deviation of these rewards."""
    toxicity: float
    """Mean probability of hate of the sampled responses."""
    kl: float
    """KL to the reference per response, in nats (k1)."""
    kl_coef: float
    """KL coefficient that this step used."""
    entropy: float
    """Mean of -log p per sampled token, in nats."""
    length: float
    """Mean response length, in tokens."""
    finished: float
    """Share of responses that ended with end-of-sequence, before their limit cut them."""
    policy_loss: float
    """Mean over minibatches, per token."""
    value_loss: float
    """Mean over minibatches, per token, before value_coef; 0 without a critic."""
    approx_kl: float
    """Per-token KL from the sampling policy, mean over minibatches, in nats (k3)."""
    clip_fraction: float
    """Share of tokens whose ratio was clipped."""
    ratio: float
    """Mean probability ratio of the first minibatch; 1 if sampling and training agree."""
    log_ratio_std: float
    """Standard deviation of a token's log ratio in the first minibatch, in nats; rounding alone."""
    log_ratio_max: float
    """Largest absolute log ratio of a token in the first minibatch, in nats; rounding alone."""
    explained_variance: float
    """1 - Var(returns - values) / Var(returns), before the update; 0 without a critic."""
    grad_norm: float
    """Mean norm of the policy's gradient before clipping."""
    minibatches: int
    """Optimiser steps taken; fewer than configured if `ppo.target_kl` ended the update early."""
    truncated: int
    """Responses longer than the classifier's input."""
    terms: dict[str, float]
    """Mean of each extra reward term, before its weight."""
    seconds_sample: float
    """Time spent sampling, mean over workers."""
    seconds_score: float
    """Time spent waiting for scores after sampling, mean over workers."""
    seconds_reference: float
    """Time spent on log-probabilities under the reference, mean over workers."""
    seconds_update: float
    """Time spent on targets and optimiser steps, mean over workers."""
    seconds: float
    """Duration of the whole step without the probe, mean over workers."""
    seconds_probe: float
    """Time spent on the probe prompts, mean over workers; 0 if the step did not measure them."""
    probe_score: float | None
    """Mean reward on the probe prompts after the update; None if the step did not measure them."""
    probe_kl: float | None
    """KL to the reference per response on the probe prompts after the update, in nats; or None."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A batch of responses to score: what a rollout sends to the reward.

    Example: two responses.

        prompts ["Summarize ...", ...]   responses ["Tom is late.", ...]   response_ids [[205, 1], ...]
    """

    prompts: Sequence[str]
    """[B] prompts as text."""
    responses: Sequence[str]
    """[B] responses as text, without special tokens."""
    response_ids: Sequence[Sequence[int]]
    """[B] responses as token ids, for reward functions that count tokens."""
    columns: Columns
    """The data's other columns, [B] each."""

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, rows: Sequence[int]) -> ScoreRequest:
        """Return the given rows, in that order."""
        return ScoreRequest(
            prompts=[self.prompts[i] for i in rows],
            responses=[self.responses[i] for i in rows],
            response_ids=[self.response_ids[i] for i in rows],
            columns={name: [column[i] for i in rows] for name, column in self.columns.items()},
        )

    def classifier_inputs(self, kind: str) -> Sequence[str]:
        """Return the texts for the classifier.

        Args:
            kind: `response`, or `prompt+response` for both in one text.
        """
        if kind == "response":
            return self.responses
        return [prompt + text for prompt, text in zip(self.prompts, self.responses, strict=True)]


class Pending(Protocol):
    """Scores that were requested and may not have arrived yet."""

    def result(self) -> Scores:
        """Wait for the scores and return them."""


class Scorer(Protocol):
    """Anything that scores responses: the reward in this process, or a pool of actors."""

    def submit(self, request: ScoreRequest) -> Pending:
        """Request the scores of a batch, in the order given, without waiting for them."""


class RewardError(RuntimeError):
    """No reward actor returned scores in time, or none could start; the message is one line."""
