"""The mathematics of PPO on text, as functions of tensors.

Every function is stateless and runs in one process: tensors in, tensors out.
`rollout.py` collects responses, `learner.py` computes gradients, `stages/` runs on Ray.
The letters B, R and the masks are those of `records.py`: a mask is True where a token
counts, and each row of `response_mask` is True through end-of-sequence and then False.

An encoder-decoder needs no shift: the logits at decoder position t predict response token t,
so the first token and the end-of-sequence token are trained like any other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SumOverWorkers = Callable[[Tensor], Tensor]
"""Sums a tensor over workers; every worker gets the sum. `identity` if there is one worker."""


def identity(x: Tensor) -> Tensor:
    """Return `x` unchanged: the sum over workers when there is a single worker."""
    return x


# ---- KL ------------------------------------------------------------------------------------


#
# Estimates of KL(p || p_ref) per token, at tokens that were sampled from p. What PPO optimises is
# the gradient of a penalty, and only two of the usual penalties have the gradient of that KL:
#
#     estimate   in the reward                             in the loss
#     k1         the KL's gradient                         zero on average
#     k2         far too small near the reference          the KL's gradient
#     k3         far too small near the reference          the gradient of KL(p_ref || p)
#
# So `reward_kl` is k1, `loss_kl` is k2, and k3 only measures how far an update has moved.
# Source of the estimates: Schulman 2020, "Approximating KL divergence".

MAX_LOG_RATIO = 60.0
"""Largest log ratio of two probabilities, in nats, that the functions below exponentiate: float32
overflows at 89. Beyond it the result is constant and its gradient zero."""
MAX_TOKEN_KL = 1e4
"""Largest log ratio of a token, in nats, that `reward_kl` and `loss_kl` distinguish."""


def reward_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log p - log p_ref, the KL penalty in the reward: unbiased, may be negative.

    The policy gradient of this reward is the gradient of KL(p || p_ref). Same shape as the
    arguments, in nats, at most `MAX_TOKEN_KL` in size.
    """
    return (logprobs - ref_logprobs).clamp(-MAX_TOKEN_KL, MAX_TOKEN_KL)


def loss_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = (log p - log p_ref)^2 / 2, the KL penalty in the loss: its gradient is the KL's.

    Its value is the KL only to second order. Same shape as the arguments, in nats; the log ratio
    is cut at `MAX_TOKEN_KL`.
    """
    return 0.5 * (logprobs - ref_logprobs).clamp(-MAX_TOKEN_KL, MAX_TOKEN_KL) ** 2


def approx_kl(logprobs: Tensor, new_logprobs: Tensor) -> Tensor:
    """k3 = (r - 1) - log r with r = p_new / p: KL(p || p_new), unbiased and never negative.

    Only a measurement of how far an update has moved from the policy that sampled. Same shape as
    the arguments, in nats; the log ratio is cut at `MAX_LOG_RATIO`.
    """
    log_ratio = (new_logprobs - logprobs).clamp(-MAX_TOKEN_KL, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def probability_ratio(new_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """exp(new_logprobs - logprobs), with the log ratio cut at `MAX_LOG_RATIO`."""
    return torch.exp((new_logprobs - logprobs).clamp(max=MAX_LOG_RATIO))


MAX_KL_ERROR = 0.2
"""Largest relative distance from the target KL to which `next_kl_coef` reacts."""


def next_kl_coef(
    kl_coef: float,
    kl: float,
    kl_target: float,
    kl_horizon: int,
    responses: int,
    kl_coef_min: float = 0.0,
) -> float:
    """Adapt the KL coefficient so that a response's KL moves towards a target.

        max(kl_coef_min,
            kl_coef * (1 + clip(kl / kl_target - 1, -0.2, 0.2) * responses / kl_horizon))

    Without a lower bound the controller makes KL cheaper as long as it is below the target: it
    pays the policy for drifting there.

    Args:
        kl_coef: the coefficient of this step.
        kl: mean KL of a response in this step, in nats.
        kl_target: the target KL, in nats.
        kl_horizon: time constant of the controller, in responses.
        responses: responses in this step, over all workers.
        kl_coef_min: lower bound of the result, at least 0; 0 is the controller of the paper.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, without the lower bound.
    """
    error = min(max(kl / kl_target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return max(kl_coef_min, kl_coef * (1 + error * responses / kl_horizon))


# ---- rewards and advantages ----------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Spread one score per response into one reward per token.

    Every response token gets a penalty for diverging from the reference policy, and the last
    one also gets the reward model's score:

        r_t = -kl_coef * kl_t + [t is the last token] * score

    Args:
        scores: [B] reward-model logits; higher is less toxic.
        kl: [B, R] `reward_kl` of each token, in nats.
        response_mask: [B, R] True on response tokens, at least one per row.
        kl_coef: KL penalty per nat, in units of score.

    Returns:
        [B, R] rewards, zero outside the mask.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last_token = torch.where(response_mask, positions, 0).amax(dim=1)
    rewards[torch.arange(len(scores), device=scores.device), last_token] += scores
    return rewards


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation.

    Walking each response from its last token to its first:

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * gae_lambda * A_{t+1}

    A response is one finished episode, so V and A are zero after its last token; values
    on padding are ignored.

    Args:
        rewards: [B, R] r_t, the reward for generating token t.
        values: [B, R] V_t, the value estimated just before token t is generated.
        response_mask: [B, R] True on response tokens.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1]; 0 is one-step TD (relies on the critic), 1 is Monte Carlo. If all
            values are 0, it has the effect of a discount.

    Returns:
        advantages [B, R] and returns [B, R] = advantages + values, both zero outside the mask.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)

    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * gae_lambda * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]

    return advantages, advantages + values


def standardise(
    x: Tensor, mask: Tensor, sum_over_workers: SumOverWorkers = identity, eps: float = 1e-8
) -> Tensor:
    """Shift and scale the masked entries of `x` to mean 0 and standard deviation 1.

        (x - mean) / sqrt(variance + eps),  variance with Bessel's n - 1

    The moments are computed over all workers' batches, so two workers with half the batch
    each take the same step as one worker with the whole batch.

    Args:
        x: [B, R].
        mask: [B, R] True on entries that count, at least one over all workers.
        sum_over_workers: sums a tensor over workers; a Ray Train worker passes an all-reduce.
        eps: keeps the division finite if all entries are equal.

    Returns:
        [B, R], zero outside the mask.
    """
    x = torch.where(mask, x, 0.0)
    # float64: the sums run over many thousand tokens, and rounding must not depend on how the
    # tokens are split over workers.
    count, total = sum_over_workers(torch.stack([mask.sum().double(), x.double().sum()]))
    centred = torch.where(mask, x - (total / count).to(x.dtype), 0.0)
    square = sum_over_workers((centred.double() ** 2).sum())
    variance = square / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + eps).to(x.dtype)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, sum_over_workers: SumOverWorkers = identity
) -> float:
    """Share of the returns' variance that the value head predicts: at most 1, which is all of it.

        1 - Var(returns - values) / Var(returns), over the masked tokens of all workers

    Zero if the returns do not vary. Arguments are [B, R].
    """
    returns, error = returns[mask].double(), (returns - values)[mask].double()
    ones = torch.ones_like(returns)
    sums = torch.stack([c.sum() for c in (ones, returns, returns**2, error, error**2)])
    count, r, rr, e, ee = sum_over_workers(sums).tolist()
    variance = rr / count - (r / count) ** 2
    return 1 - (ee / count - (e / count) ** 2) / variance if variance > 1e-12 else 0.0


# ---- losses ----------------------------------------------------------------------------------
#
# The losses are per token and not a mean, because the mean divides by the token count of all
# workers, which only the caller knows.


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate loss per token, and the tokens that are clipped.

        ratio = exp(new_logprobs - logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_range, 1 + clip_range) * A)

    Args:
        new_logprobs: [B, R] under the policy being trained; carries the gradient.
        logprobs: [B, R] under the policy that sampled the response.
        advantages: [B, R].
        response_mask: [B, R] True on response tokens.
        clip_range: distance of the probability ratio from 1 beyond which a further move in the
            advantage's favour brings no gain.

    Returns:
        loss [B, R], to be summed and minimised, and is_clipped [B, R] bool, True on tokens whose
        clipped term is the smaller one; zero and False outside the mask.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    # Padding is masked before exp(): an infinity there would turn its zero gradient into NaN.
    new_logprobs, logprobs = (torch.where(response_mask, x, 0.0) for x in (new_logprobs, logprobs))
    ratio = probability_ratio(new_logprobs, logprobs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = torch.where(response_mask, -torch.minimum(unclipped, clipped), 0.0)
    return loss, (clipped < unclipped) & response_mask


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range: float | None,
) -> Tensor:
    """The clipped value loss per token: half the squared error of the value head.

        clipped = values + clip(new_values - values, -clip_range, clip_range)
        loss    = max((new_values - returns)^2, (clipped - returns)^2) / 2

    Args:
        new_values: [B, R] from the value head being trained; carries the gradient.
        values: [B, R] estimated while sampling.
        returns: [B, R].
        response_mask: [B, R] True on response tokens.
        clip_range: distance of a value from its old estimate beyond which a further move towards
            the return brings no gain; None leaves out the clipped term.

    Returns:
        loss [B, R], zero outside the mask.

    Source: Schulman et al. 2017 code release; Engstrom et al. 2020, arXiv:2005.12729, section 2.
    """
    # Padding is masked before the square: an infinity there would turn its zero gradient into NaN.
    new_values, values, returns = (
        torch.where(response_mask, x, 0.0) for x in (new_values, values, returns)
    )
    error = (new_values - returns) ** 2
    if clip_range is not None:
        clipped = values + (new_values - values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error
