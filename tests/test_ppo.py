"""The PPO mathematics against worked examples and against laws that hold for every input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from ray_detox.rl import ppo

PADDING_VALUES = [0.0, 7.0, -1e30, math.inf, -math.inf, math.nan]
padding_values = st.sampled_from(PADDING_VALUES)


def numbers(draw, rows, width, low=-5, high=5):
    values = st.lists(st.floats(low, high, width=32), min_size=rows * width, max_size=rows * width)
    return tensor(draw(values), dtype=torch.float32).view(rows, width)


@st.composite
def responses(draw, count=2):
    """A mask of right-padded responses, and `count` tensors of numbers of its shape."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
    mask = torch.arange(width) < tensor(lengths)[:, None]
    return mask, *(numbers(draw, rows, width) for _ in range(count))


def fill_padding(x, mask, value):
    """`x` with `value` outside the mask."""
    return torch.where(mask, x, value)


def widen(x, extra, fill):
    """`x` with `extra` more columns of `fill`."""
    return torch.nn.functional.pad(x, (0, extra), value=fill)


# ---- sums over workers -------------------------------------------------------------------------


def test_the_sum_over_one_worker_is_its_own_tensor():
    x = tensor([1.0, 2.0])

    assert ppo.identity(x) is x


# ---- KL ----------------------------------------------------------------------------------------


def test_the_kl_estimates_match_the_worked_example():
    # p = 0.5 and p_ref = 0.25: log ratio = log 2, and r = p_ref / p = 1/2.
    logprobs, ref_logprobs = tensor([0.5]).log(), tensor([0.25]).log()

    assert_close(ppo.reward_kl(logprobs, ref_logprobs), tensor([math.log(2)]))
    assert_close(ppo.loss_kl(logprobs, ref_logprobs), tensor([math.log(2) ** 2 / 2]))
    assert_close(ppo.approx_kl(logprobs, ref_logprobs), tensor([math.log(2) - 0.5]))


ESTIMATES = {"k1": ppo.reward_kl, "k2": ppo.loss_kl, "k3": ppo.approx_kl}


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_kl_of_a_policy_with_itself_is_zero(name):
    logprobs = -torch.rand(3, 4)

    assert not ESTIMATES[name](logprobs, logprobs).any()


@given(st.floats(-40, 0), st.floats(-40, 0))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    logprobs, ref_logprobs = tensor([logprob]), tensor([ref_logprob])

    assert ppo.loss_kl(logprobs, ref_logprobs) >= 0
    assert ppo.approx_kl(logprobs, ref_logprobs) >= 0


LOWEST = torch.finfo(torch.float32).min
log_probabilities = st.one_of(
    st.floats(-200, 0), st.sampled_from([0.0, -89.0, -90.0, -1e4, -1e30, LOWEST, -math.inf])
)


@given(log_probabilities, log_probabilities.filter(math.isfinite))
def test_estimates_and_ratios_are_finite_for_any_log_probability(logprob, other):
    for pair in ((logprob, other), (other, logprob)):
        one, two = tensor([pair[0]]), tensor([pair[1]])
        mask = tensor([[True]])
        for function in (*ESTIMATES.values(), ppo.probability_ratio):
            leaf = one.clone().requires_grad_()
            value = function(leaf, two)
            value.sum().backward()
            assert value.isfinite().all(), (function, pair)
            assert leaf.grad.isfinite().all(), (function, pair)
        for advantage in (-3.0, 3.0):
            loss, _ = ppo.policy_loss(one[None], two[None], tensor([[advantage]]), mask, 0.2)
            assert loss.isfinite().all(), pair


def test_estimates_are_exact_within_their_documented_limits():
    x = tensor([-80.0, -50.0, -1.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    zero = torch.zeros_like(x)

    assert_close(ppo.reward_kl(x, zero), x)
    assert_close(ppo.loss_kl(x, zero), x**2 / 2)
    assert_close(ppo.approx_kl(zero, x), x.exp() - 1 - x)
    assert_close(ppo.probability_ratio(x, zero), x.exp())
    assert ppo.MAX_LOG_RATIO > 50


def test_k3_is_accurate_if_the_policies_almost_agree():
    # (r - 1) - log r = d^2 / 2 + ...; formed as exp(d) - 1 - d it would be rounding noise.
    difference = torch.tensor([1e-3])

    kl = ppo.approx_kl(torch.zeros(1), difference)

    assert_close(kl, difference**2 / 2, rtol=1e-3, atol=0.0)


@given(st.integers(0, 1000))
def test_k1_and_k3_are_unbiased_and_k2_is_unbiased_to_second_order(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, generator=generator, dtype=torch.float64)
    near = logits + 0.01 * torch.randn(8, generator=generator, dtype=torch.float64)
    log_p, log_ref, log_near = (x.log_softmax(0) for x in (logits, logits.flip(0), near))
    p = log_p.exp()
    kl = lambda log_q: (p * (log_p - log_q)).sum()

    assert_close((p * ppo.reward_kl(log_p, log_ref)).sum(), kl(log_ref))
    assert_close((p * ppo.approx_kl(log_p, log_ref)).sum(), kl(log_ref))
    assert_close((p * ppo.loss_kl(log_p, log_near)).sum(), kl(log_near), rtol=0.2, atol=1e-9)


def kl_gradient(logits, log_ref):
    """The gradient of KL(p || p_ref) with respect to the logits of p, and that KL."""
    x = logits.clone().requires_grad_()
    kl = (x.softmax(0) * (x.log_softmax(0) - log_ref)).sum()
    kl.backward()
    return x.grad, kl.item()


def penalty_gradient(logits, log_ref, estimate, where):
    """The expected gradient of a KL penalty as PPO takes it, by enumerating all V tokens.

    Each token is a response of one token, weighted by its probability. In the reward, the penalty
    passes through `token_rewards`, `gae` and `policy_loss`; in the loss, it is differentiated.
    """
    x = logits.clone().requires_grad_()
    log_p = x.log_softmax(0)[:, None]
    sampled, log_ref, mask = log_p.detach(), log_ref[:, None], torch.ones(len(x), 1).bool()
    if where == "loss":
        loss = estimate(log_p, log_ref)
    else:
        zeros = torch.zeros(len(x), 1, dtype=x.dtype)
        rewards = ppo.token_rewards(zeros[:, 0], estimate(sampled, log_ref), mask, kl_coef=1.0)
        advantages, _ = ppo.gae(rewards, zeros, mask, gamma=1.0, gae_lambda=1.0)
        loss, _ = ppo.policy_loss(log_p, sampled, advantages, mask, clip_range=0.2)
    (sampled.exp() * loss).sum().backward()
    return x.grad


def test_only_k1_in_the_reward_and_k2_in_the_loss_have_the_gradient_of_the_kl():
    """The share of the KL's gradient that a penalty has, mean of 20 policies of 50 tokens.

    distance of the logits   mean KL   k1 reward   k2 loss   k2 reward   k3 reward
    0.1                      0.004     1.00        1.00      0.014       0.010
    1.0                      0.41      1.00        1.00      0.594       0.257
    """
    shares = {}
    for distance in (0.1, 1.0):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(2, 50, generator=generator, dtype=torch.float64)
            log_ref = (2 * noise[0]).log_softmax(0)
            logits = log_ref + distance * noise[1]
            exact, kl = kl_gradient(logits, log_ref)
            shares.setdefault((distance, "KL"), []).append(kl)
            for name, where in (
                ("k1", "reward"),
                ("k2", "loss"),
                ("k2", "reward"),
                ("k3", "reward"),
                ("k1", "loss"),
            ):
                found = penalty_gradient(logits, log_ref, ESTIMATES[name], where)
                share = float(found @ exact / (exact @ exact))
                shares.setdefault((distance, name, where), []).append(share)
                if (name, where) in (("k1", "reward"), ("k2", "loss")):
                    assert_close(found, exact)
    mean = {key: sum(values) / len(values) for key, values in shares.items()}

    assert mean == pytest.approx(
        {
            (0.1, "KL"): 0.0037,
            (0.1, "k1", "reward"): 1,
            (0.1, "k2", "loss"): 1,
            (0.1, "k2", "reward"): 0.014,
            (0.1, "k3", "reward"): 0.010,
            (0.1, "k1", "loss"): 0,
            (1.0, "KL"): 0.410,
            (1.0, "k1", "reward"): 1,
            (1.0, "k2", "loss"): 1,
            (1.0, "k2", "reward"): 0.594,
            (1.0, "k3", "reward"): 0.257,
            (1.0, "k1", "loss"): 0,
        },
        abs=5e-4,
    )


def test_k3_in_the_loss_has_the_gradient_of_the_opposite_kl():
    noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_ref, x = noise[0].log_softmax(0), noise[1].clone().requires_grad_()

    (log_ref.exp() * (log_ref - x.log_softmax(0))).sum().backward()

    assert_close(penalty_gradient(noise[1], log_ref, ppo.approx_kl, "loss"), x.grad)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 64 / 1000)),  # a tenth above it
        (60.0, 0.2 * (1 + 0.2 * 64 / 1000)),  # far above: the error is clipped to 0.2
        (0.0, 0.2 * (1 - 0.2 * 64 / 1000)),  # far below
        (-3.0, 0.2 * (1 - 0.2 * 64 / 1000)),  # k1 may be negative
    ],
)
def test_the_controller_matches_the_worked_examples(kl, expected):
    actual = ppo.next_kl_coef(0.2, kl, kl_target=6.0, kl_horizon=1000, responses=64)

    assert actual == pytest.approx(expected)


@pytest.mark.parametrize("horizon", [1, 12, 100, 10_000])
def test_the_kl_coefficient_is_never_negative_nor_below_its_minimum(horizon):
    for kl in (-5.0, 0.0, 5.0, 500.0):
        assert ppo.next_kl_coef(0.2, kl, 6.0, horizon, responses=64) >= 0
        assert ppo.next_kl_coef(0.2, kl, 6.0, horizon, responses=64, kl_coef_min=0.2) >= 0.2


def test_a_controller_with_a_minimum_does_not_pay_for_drift():
    # The KL stays at one nat, below its target of six, for 200 steps of `flan-t5-base`.
    two_sided = one_sided = 0.2
    for _ in range(200):
        two_sided = ppo.next_kl_coef(two_sided, 1.0, 6.0, 2000, responses=128)
        one_sided = ppo.next_kl_coef(one_sided, 1.0, 6.0, 2000, responses=128, kl_coef_min=0.2)

    assert two_sided == pytest.approx(0.0152, abs=1e-4)
    assert one_sided == 0.2


@given(st.floats(1e-3, 10), st.floats(-50, 50), st.floats(0.1, 20), st.integers(1, 256))
def test_the_controller_moves_towards_its_target_and_never_to_zero(kl_coef, kl, target, responses):
    after = ppo.next_kl_coef(kl_coef, kl, target, kl_horizon=256, responses=responses)

    assert after >= kl_coef if kl >= target else after <= kl_coef
    assert 0.8 * kl_coef <= after * (1 + 1e-9)
    assert after <= 1.2 * kl_coef * (1 + 1e-9)


# ---- rewards -----------------------------------------------------------------------------------


def test_token_rewards_match_the_worked_example():
    # kl_coef = 0.5; the second response ends at its first token.
    kl = tensor([[1.0, -2.0, 4.0], [2.0, 9.0, 9.0]])
    mask = tensor([[True, True, True], [True, False, False]])

    rewards = ppo.token_rewards(tensor([5.0, 7.0]), kl, mask, kl_coef=0.5)

    assert_close(rewards, tensor([[-0.5, 1.0, 3.0], [6.0, 0.0, 0.0]]))


@given(responses(1), st.integers(0, 3), padding_values)
def test_the_score_is_on_the_last_token_at_any_width_of_padding(batch, extra, value):
    mask, kl = batch
    scores = torch.arange(1.0, len(mask) + 1)
    mask, kl = widen(mask, extra, False), widen(kl, extra, value)
    kl = fill_padding(kl, mask, value)

    rewards = ppo.token_rewards(scores, kl, mask, kl_coef=0.0)

    rows = torch.arange(len(mask))
    assert_close(rewards[rows, mask.sum(dim=1) - 1], scores)
    assert_close(rewards.sum(dim=1), scores)


@given(responses(1), padding_values)
def test_padding_never_changes_a_reward(batch, value):
    mask, kl = batch
    scores = torch.linspace(-2, 2, len(mask))

    rewards = ppo.token_rewards(scores, kl, mask, kl_coef=0.3)

    assert_close(ppo.token_rewards(scores, fill_padding(kl, mask, value), mask, 0.3), rewards)
    assert not rewards[~mask].any()


def test_token_rewards_does_not_modify_its_arguments():
    scores, kl, mask = torch.ones(1), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)

    ppo.token_rewards(scores, kl, mask, kl_coef=0.5)

    assert_close(kl, torch.ones(1, 2))
    assert_close(scores, torch.ones(1))


# ---- advantages --------------------------------------------------------------------------------


def test_gae_matches_the_worked_example():
    # gamma = 1, lambda = 0.5, one response of two tokens in a row of three.
    #   t=1: delta = 2 + 0 - 1   = 1     A = 1
    #   t=0: delta = 0 + 1 - 0.5 = 0.5   A = 0.5 + 0.5 * 1 = 1
    rewards = tensor([[0.0, 2.0, 0.0]])
    values = tensor([[0.5, 1.0, 9.0]])  # 9.0 is padding
    mask = tensor([[True, True, False]])

    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)

    assert_close(advantages, tensor([[1.0, 1.0, 0.0]]))
    assert_close(returns, tensor([[1.5, 2.0, 0.0]]))


def test_gae_discounts_the_next_value_as_well_as_the_next_advantage():
    # gamma = 0.5, lambda = 0.5
    #   t=1: delta = 4 - 2           = 2     A = 2
    #   t=0: delta = 1 + 0.5 * 2 - 3 = -1    A = -1 + 0.25 * 2 = -0.5
    rewards, values = tensor([[1.0, 4.0]]), tensor([[3.0, 2.0]])

    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5)

    assert_close(advantages, tensor([[-0.5, 2.0]]))
    assert_close(returns, tensor([[2.5, 4.0]]))


@given(responses(), st.integers(1, 5), padding_values)
def test_padding_never_changes_an_advantage(batch, extra, value):
    mask, rewards, values = batch
    width = mask.shape[1]
    dirty = lambda x: widen(fill_padding(x, mask, value), extra, value)

    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.8)
    padded, padded_returns = ppo.gae(
        dirty(rewards), dirty(values), widen(mask, extra, False), 0.9, 0.8
    )

    assert_close(padded[:, :width], advantages)
    assert_close(padded_returns[:, :width], returns)
    assert not padded[~widen(mask, extra, False)].any()
    assert not padded_returns[~widen(mask, extra, False)].any()


@given(responses(), st.floats(0, 1))
def test_lambda_one_is_monte_carlo(batch, gamma):
    mask, rewards, values = batch

    advantages, returns = ppo.gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)

    discounted = torch.zeros_like(rewards)
    for t in range(mask.shape[1]):
        discount = gamma ** torch.arange(mask.shape[1] - t).float()
        discounted[:, t] = ((rewards * mask)[:, t:] * discount).sum(dim=1)
    assert_close(returns, discounted * mask, atol=1e-4, rtol=1e-4)
    assert_close(advantages, (discounted - values) * mask, atol=1e-4, rtol=1e-4)


@given(responses(), st.floats(0, 1))
def test_lambda_zero_is_one_step_temporal_difference(batch, gamma):
    mask, rewards, values = batch

    advantages, _ = ppo.gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)

    next_values = widen((values * mask)[:, 1:], 1, 0.0)
    assert_close(advantages, (rewards + gamma * next_values - values) * mask)


@given(responses(), st.floats(0, 1), st.floats(0, 1))
def test_returns_are_advantages_plus_values(batch, gamma, gae_lambda):
    mask, rewards, values = batch

    advantages, returns = ppo.gae(rewards, values, mask, gamma, gae_lambda)

    assert_close(returns, (advantages + values) * mask)


@given(responses(), st.floats(0, 1))
def test_exact_values_give_zero_advantages(batch, gae_lambda):
    mask, rewards, _ = batch
    values = (rewards * mask).flip(1).cumsum(1).flip(1) * mask

    advantages, _ = ppo.gae(rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)

    assert_close(advantages, torch.zeros_like(advantages), atol=1e-4, rtol=0.0)


def test_gae_does_not_modify_its_arguments():
    rewards, values = tensor([[1.0, 2.0]]), tensor([[3.0, 4.0]])

    ppo.gae(rewards, values, tensor([[True, False]]), 0.9, 0.9)

    assert_close(rewards, tensor([[1.0, 2.0]]))
    assert_close(values, tensor([[3.0, 4.0]]))


# ---- standardise -------------------------------------------------------------------------------


def test_standardise_matches_the_worked_example():
    # 1, 3, 5: mean 3, variance (4 + 0 + 4) / (3 - 1) = 4
    x, mask = tensor([[1.0, 3.0, 99.0, 5.0]]), tensor([[True, True, False, True]])

    assert_close(ppo.standardise(x, mask), tensor([[-1.0, 0.0, 0.0, 1.0]]))


@given(responses(1))
def test_standardised_entries_have_mean_zero_and_deviation_one(batch):
    mask, x = batch
    x = x + torch.arange(x.numel()).view_as(x)  # not all equal

    z = ppo.standardise(x, mask)[mask]

    assert abs(float(z.mean())) < 1e-4
    if len(z) > 1 and x[mask].std() > 0.1:
        assert float(z.std()) == pytest.approx(1, abs=1e-3)


@given(responses(1), st.integers(0, 3), padding_values)
def test_padding_never_changes_standardised_entries(batch, extra, value):
    mask, x = batch
    wide = widen(mask, extra, False)

    padded = ppo.standardise(widen(fill_padding(x, mask, value), extra, value), wide)

    assert_close(padded[:, : mask.shape[1]], ppo.standardise(x, mask))
    assert not padded[~wide].any()


@pytest.mark.parametrize("count", [1, 5])
def test_equal_entries_are_standardised_to_zero(count):
    z = ppo.standardise(torch.full((1, count), 3.3), torch.ones(1, count, dtype=torch.bool))

    assert_close(z, torch.zeros(1, count))


def test_two_identical_workers_standardise_like_one_with_both_batches():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.7

    with_two = ppo.standardise(x, mask, sum_over_workers=lambda total: 2 * total)

    alone = ppo.standardise(torch.cat([x, x]), torch.cat([mask, mask]))
    assert_close(with_two, alone[:4])


def test_workers_with_unequal_shares_standardise_like_one_with_all_rows(two_workers):
    torch.manual_seed(0)
    x, mask = torch.randn(8, 5), torch.rand(8, 5) < 0.6
    shares = [slice(0, 2), slice(2, 8)]

    parts = two_workers(
        lambda rank, total: ppo.standardise(x[shares[rank]], mask[shares[rank]], total)
    )

    assert_close(torch.cat(parts), ppo.standardise(x, mask))


# ---- explained variance ------------------------------------------------------------------------


def test_explained_variance_matches_the_worked_example():
    # returns 0, 4: variance 4. errors 0, 2: variance 1. So 3/4 is explained.
    returns, values = tensor([[0.0, 4.0, 9.0]]), tensor([[0.0, 2.0, 9.0]])
    mask = tensor([[True, True, False]])

    assert ppo.explained_variance(values, returns, mask) == pytest.approx(0.75)


@given(responses(1), st.floats(-3, 3), padding_values)
def test_values_with_a_constant_error_explain_all_variance(batch, constant, value):
    mask, returns = batch
    returns = returns + torch.arange(returns.numel()).view_as(returns)

    explained = ppo.explained_variance(
        fill_padding(returns + constant, mask, value), fill_padding(returns, mask, value), mask
    )

    if mask.sum() > 1 and returns[mask].std() > 0.1:
        assert explained == pytest.approx(1, abs=1e-3)


def test_constant_values_explain_no_variance():
    torch.manual_seed(0)
    returns, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)

    assert ppo.explained_variance(torch.full((3, 4), 2.0), returns, mask) == pytest.approx(
        0, abs=1e-6
    )


def test_explained_variance_is_zero_if_the_returns_do_not_vary():
    mask = torch.ones(2, 3, dtype=torch.bool)

    assert ppo.explained_variance(torch.randn(2, 3), torch.full((2, 3), 5.0), mask) == 0


def test_explained_variance_over_workers_equals_that_of_one_with_all_rows(two_workers):
    torch.manual_seed(0)
    returns, values, mask = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4) < 0.8
    shares = [slice(0, 1), slice(1, 6)]

    parts = two_workers(
        lambda rank, total: ppo.explained_variance(
            values[shares[rank]], returns[shares[rank]], mask[shares[rank]], total
        )
    )

    assert parts == pytest.approx(2 * [ppo.explained_variance(values, returns, mask)])


# ---- the policy's loss -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, +1.0, -1.2, True),  # a good token, already more likely: no gain beyond 1 + clip_range
        (0.5, +1.0, -0.5, False),  # a good token, made less likely: not clipped
        (0.5, -1.0, +0.8, True),  # a bad token, already less likely: no gain below 1 - clip_range
        (1.5, -1.0, +1.5, False),  # a bad token, made more likely: not clipped
    ],
)
def test_only_moves_in_favour_of_the_advantage_are_clipped(ratio, advantage, loss, clipped):
    new = torch.full((1, 1), ratio).log().requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)

    actual, is_clipped = ppo.policy_loss(new, torch.zeros(1, 1), tensor([[advantage]]), mask, 0.2)
    actual.sum().backward()

    assert_close(actual.detach(), tensor([[loss]]))
    assert is_clipped.item() == clipped
    assert_close(new.grad, tensor([[0.0 if clipped else -ratio * advantage]]))


@given(responses(), st.floats(0.01, 0.9))
def test_the_first_ratio_is_one_and_clips_nothing(batch, clip_range):
    mask, logprobs, advantages = batch
    new = logprobs.clone().requires_grad_()

    loss, clipped = ppo.policy_loss(new, logprobs, advantages, mask, clip_range)
    loss.sum().backward()

    assert_close(loss.detach(), torch.where(mask, -advantages, 0.0))
    assert_close(new.grad, torch.where(mask, -advantages, 0.0))
    assert not clipped.any()


@given(responses(3), st.integers(0, 3), padding_values)
def test_padding_does_not_change_the_policy_loss_and_has_zero_gradient(batch, extra, value):
    mask, new, old, advantages = batch
    width = mask.shape[1]
    dirty = lambda x: widen(fill_padding(x, mask, value), extra, value)
    clean, padded = new.clone().requires_grad_(), dirty(new).requires_grad_()
    wide = widen(mask, extra, False)

    loss, clipped = ppo.policy_loss(clean, old, advantages, mask, 0.2)
    dirty_loss, dirty_clipped = ppo.policy_loss(padded, dirty(old), dirty(advantages), wide, 0.2)
    loss.sum().backward()
    dirty_loss.sum().backward()

    assert_close(dirty_loss[:, :width], loss)
    assert torch.equal(dirty_clipped[:, :width], clipped)
    assert_close(padded.grad[:, :width], clean.grad)
    for padding in (dirty_loss, dirty_clipped, padded.grad):
        assert not padding[~wide].any()


@given(responses(3), st.floats(0.05, 0.5))
def test_the_clipped_loss_is_never_below_the_unclipped_loss(batch, clip_range):
    mask, new, old, advantages = batch

    loss, clipped = ppo.policy_loss(new, old, advantages, mask, clip_range)

    unclipped = torch.where(mask, -torch.exp(new - old) * advantages, 0.0)
    assert (loss >= unclipped).all()
    assert_close(loss[~clipped], unclipped[~clipped])


# ---- the value head's loss ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_value", "returns", "loss", "gradient"),
    [
        (0.1, 1.0, 0.405, -0.9),  # within the clip: half the squared error
        (0.5, 1.0, 0.320, 0.0),  # towards the return, beyond 0.2: counts as 0.2, no gradient
        (0.5, -1.0, 1.125, 1.5),  # away from the return: not clipped
        (3.0, 1.0, 2.000, 2.0),  # beyond the return, with a larger error than the clipped value
    ],
)
def test_only_value_moves_towards_the_return_are_clipped(new_value, returns, loss, gradient):
    new = tensor([[new_value]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)

    actual = ppo.value_loss(new, torch.zeros(1, 1), tensor([[returns]]), mask, 0.2)
    actual.sum().backward()

    assert_close(actual.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))


@given(responses(2))
def test_the_loss_of_an_unchanged_value_is_half_its_squared_error(batch):
    mask, values, returns = batch

    loss = ppo.value_loss(values, values, returns, mask, clip_range=0.2)

    assert_close(loss, torch.where(mask, 0.5 * (values - returns) ** 2, 0.0))


@given(responses(3))
def test_without_a_clip_range_the_value_loss_is_half_the_squared_error(batch):
    mask, new, old, returns = batch

    loss = ppo.value_loss(new, old, returns, mask, clip_range=None)

    assert_close(loss, torch.where(mask, 0.5 * (new - returns) ** 2, 0.0))
    assert (loss <= ppo.value_loss(new, old, returns, mask, clip_range=0.2)).all()


@given(responses(3), st.integers(0, 3), padding_values)
def test_padding_does_not_change_the_value_loss_and_has_zero_gradient(batch, extra, value):
    mask, new, old, returns = batch
    width = mask.shape[1]
    dirty = lambda x: widen(fill_padding(x, mask, value), extra, value)
    clean, padded = new.clone().requires_grad_(), dirty(new).requires_grad_()
    wide = widen(mask, extra, False)

    loss = ppo.value_loss(clean, old, returns, mask, 0.2)
    dirty_loss = ppo.value_loss(padded, dirty(old), dirty(returns), wide, 0.2)
    loss.sum().backward()
    dirty_loss.sum().backward()

    assert_close(dirty_loss[:, :width], loss)
    assert_close(padded.grad[:, :width], clean.grad)
    assert not dirty_loss[~wide].any()
    assert not padded.grad[~wide].any()
