"""The learner: several workers take the same steps as one, and padding has no effect."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ray_detox.config import PolicyConfig, PPOConfig, SamplingConfig
from ray_detox.errors import NonFiniteError
from ray_detox.models.loading import load_policy
from ray_detox.records import Rollout, Targets, TokenBatch
from ray_detox.rl import ppo
from ray_detox.rl.learner import Learner

ROWS = 8


def settings(**changes):
    base = {
        "prompts_per_step": ROWS,
        "minibatches": 2,
        "epochs": 2,
        "learning_rate": 3e-4,
        "critic": "shared",
    }
    return PPOConfig(**(base | changes))


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def assert_same_weights(actual, expected, atol=2e-6):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(actual[name], expected[name], atol=atol, rtol=1e-5)


def learn(policy, config, rollout, updates=3, **learner):
    """Take some updates on one rollout; return the last one's metrics."""
    made = Learner(policy, config, seed=0, **learner)
    for step in range(updates):
        metrics = made.update(rollout, made.targets(rollout), step=step)
    return metrics


@pytest.fixture
def make_long(make_policy):
    """Policies whose responses have several tokens.

    For a response of one token the decoder's self-attention is a softmax over one entry, whose
    gradient is zero up to rounding, and the size of Adam's first step does not depend on the size
    of the gradient.
    """
    return lambda sampling=None, **rest: make_policy(
        {"min_new_tokens": 3} | (sampling or {}), **rest
    )


def no_targets(rollout, **changes):
    """Targets with zero advantages and no value error."""
    zeros = torch.zeros_like(rollout.logprobs)
    return dataclasses.replace(Targets(zeros, zeros, zeros, rollout.values), **changes)


# ---- the first step ----------------------------------------------------------------------------


def test_a_learning_rate_of_zero_changes_no_weight_and_gives_zero_kl(make_policy, make_rollout):
    policy = make_policy(randomised=False)
    rollout, before = make_rollout(policy, ROWS), weights(policy)
    learner = Learner(policy, settings(learning_rate=0.0, epochs=3), seed=0)

    targets = learner.targets(rollout)
    update = learner.update(rollout, targets, step=0)

    assert_same_weights(weights(policy), before, atol=0.0)
    assert update.ratio == pytest.approx(1, abs=1e-5)
    assert 0 < update.log_ratio_std < learner.log_ratio_max < 1e-4, "rounding alone"
    assert update.clip_fraction == 0
    assert update.approx_kl == pytest.approx(0, abs=1e-8)
    assert targets.kl.abs().max() < 1e-4
    assert targets.kl[:, 0].abs().max() < 1e-4, "including the first token"
    assert update.minibatches == 6


def test_the_log_ratio_of_the_first_minibatch_is_reported(make_policy, make_rollout):
    policy = make_policy(randomised=False)
    rollout = make_rollout(policy, ROWS)
    rollout.logprobs[rollout.response_mask] -= 0.1
    rollout.logprobs[3, 0] -= 0.2
    learner = Learner(policy, settings(learning_rate=0.0, minibatches=1), seed=0)

    update = learner.update(rollout, learner.targets(rollout), step=0)

    count = int(rollout.response_mask.sum())
    assert learner.log_ratio_max == pytest.approx(0.3, abs=1e-4)
    # One token in `count` is 0.2 above the others.
    assert update.log_ratio_std == pytest.approx(0.2 * (1 / count - 1 / count**2) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-2, 1.0])
def test_the_first_ratio_is_one_at_any_learning_rate(make_policy, make_rollout, learning_rate):
    policy = make_policy({"temperature": 1.3, "min_new_tokens": 2})
    rollout = make_rollout(policy, ROWS)

    update = learn(policy, settings(learning_rate=learning_rate), rollout, updates=1)

    assert update.ratio == pytest.approx(1, abs=1e-5)


def test_a_response_of_one_token_changes_the_weights(make_policy, make_rollout):
    policy = make_policy({"max_new_tokens": 1})
    rollout, before = make_rollout(policy, ROWS), weights(policy)

    learn(policy, settings(), rollout, updates=1)

    assert rollout.response_ids.shape == (ROWS, 1)
    after = weights(policy)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert {"value_head.weight", "value_head.bias"} <= set(moved)
    assert any("EncDecAttention" in name for name in moved)
    assert any(".encoder." in name for name in moved)


def test_updates_make_rewarded_responses_more_likely(make_policy, make_rollout):
    policy = make_policy()
    rollout = make_rollout(policy, ROWS)
    good = rollout.scores > rollout.scores.median()

    learn(policy, settings(kl_coef=0.0, epochs=4, learning_rate=3e-3), rollout, updates=3)

    with torch.no_grad():
        now = policy.score_tokens(rollout.tokens).logprobs
    gain = (now - rollout.logprobs).sum(dim=1)
    assert gain[good].mean() > gain[~good].mean() + 0.1


def test_targets_are_the_functions_of_ppo_applied_to_the_rollout(make_policy, make_rollout):
    rollout = make_rollout(make_policy(), ROWS)
    config = settings(kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
    mask = rollout.response_mask

    targets = Learner(make_policy(), config, seed=0).targets(rollout)

    kl = torch.where(mask, ppo.reward_kl(rollout.logprobs, rollout.ref_logprobs), 0.0)
    rewards = ppo.token_rewards(rollout.scores, kl, mask, 0.3)
    advantages, returns = ppo.gae(rewards, rollout.values, mask, 0.9, 0.8)
    assert_close(targets.kl, kl)
    assert_close(targets.rewards, rewards)
    assert_close(targets.returns, returns)
    assert_close(targets.advantages, ppo.standardise(advantages, mask))


# ---- the critic --------------------------------------------------------------------------------


def adapter_gradients(make_policy, make_rollout, critic, returns_scale=1.0, **changes):
    """The adapter's gradient at every optimiser step of an update, [steps, weights]."""
    policy = make_policy(critic=critic)
    rollout = make_rollout(policy, ROWS)
    # Random advantages, the same for all critics: their values would give different ones.
    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    advantages = torch.where(rollout.response_mask, noise, 0.0)
    targets = no_targets(rollout, advantages=advantages, returns=returns_scale * noise)
    learner = Learner(policy, settings(critic=critic, **changes), seed=0)
    found = []
    adapter = [p for name, p in learner.trainable.items() if "lora_" in name]
    learner.optimiser.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in adapter]))
    )
    learner.update(rollout, targets, step=0)
    return torch.stack(found)


@pytest.mark.parametrize("max_grad_norm", [1e9, 1e-2], ids=["unclipped", "clipped"])
def test_only_a_shared_critic_moves_the_policy(make_policy, make_rollout, max_grad_norm):
    find = lambda critic, **changes: adapter_gradients(
        make_policy, make_rollout, critic, max_grad_norm=max_grad_norm, **changes
    )

    without = find("none")
    detached = [find("detached", value_coef=coef) for coef in (0.0, 0.1, 1.0, 10.0)]
    far = find("detached", returns_scale=100.0, value_clip_range=None)
    shared = [find("shared", value_coef=coef) for coef in (0.0, 1.0)]

    for gradient in (*detached, far, shared[0]):
        assert_close(gradient, without, atol=1e-6, rtol=1e-6)
    assert (shared[1] - without).norm() > 0.1 * without.norm()


def test_a_detached_critic_takes_steps_of_its_own_size(make_policy, make_rollout):
    policy = make_policy(critic="detached")
    rollout, before = make_rollout(policy, ROWS), weights(policy)
    config = settings(
        critic="detached", learning_rate=1e-5, critic_learning_rate=1e-2, minibatches=1, epochs=1
    )

    learn(policy, config, rollout, updates=1)

    # Adam's first step has the size of the learning rate, whatever the gradient is.
    moves = {name: float((w - before[name]).abs().max()) for name, w in weights(policy).items()}
    for name, move in moves.items():
        step = 1e-2 if name.startswith("value_head.") else 1e-5
        assert move == pytest.approx(step, rel=0.05), name


def test_a_detached_critic_learns_the_returns(make_policy, make_rollout):
    policy = make_policy(critic="detached", randomised=False)
    rollout = make_rollout(policy, ROWS)
    config = settings(critic="detached", epochs=30, kl_coef=0.0, gae_lambda=1.0)
    learner = Learner(policy, config, seed=0)
    targets = learner.targets(rollout)

    learner.update(rollout, targets, step=0)

    with torch.no_grad():
        values = policy.score_tokens(rollout.tokens).values
    mask = rollout.response_mask
    assert ppo.explained_variance(rollout.values, targets.returns, mask) == 0
    assert ppo.explained_variance(values, targets.returns, mask) > 0.5


def test_without_a_critic_values_are_zero_and_lambda_discounts(make_policy, make_rollout):
    policy = make_policy(critic="none")
    rollout = make_rollout(policy, ROWS)
    config = settings(critic="none", kl_coef=0.0, gae_lambda=0.9)

    learner = Learner(policy, config, seed=0)
    targets = learner.targets(rollout)
    update = learner.update(rollout, targets, step=0)

    assert not rollout.values.any()
    lengths = rollout.response_mask.sum(dim=1)
    assert_close(targets.returns[:, 0], rollout.scores * 0.9 ** (lengths - 1))
    assert update.critic_grad_norm == 0
    assert not any("value_head" in name for name in learner.optimiser_state())


# ---- what has no effect ------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_the_micro_batch_size_changes_nothing(make_long, make_rollout, micro_batch_size):
    rollout = make_rollout(make_long(), ROWS)
    one, other = make_long(), make_long()

    expected = learn(one, settings(micro_batch_size=4), rollout)
    metrics = learn(other, settings(micro_batch_size=micro_batch_size), rollout)

    assert_same_weights(weights(other), weights(one))
    assert dataclasses.asdict(metrics) == pytest.approx(dataclasses.asdict(expected), abs=1e-5)


def test_padding_a_rollout_changes_nothing(make_long, make_rollout):
    rollout = make_rollout(make_long(), ROWS)
    wide = lambda x, by: torch.nn.functional.pad(x, (0, by))
    padded = dataclasses.replace(
        rollout,
        tokens=TokenBatch(
            query_ids=wide(rollout.query_ids, 4),
            query_mask=wide(rollout.query_mask, 4),
            response_ids=wide(rollout.response_ids, 3),
            response_mask=wide(rollout.response_mask, 3),
            encoder_states=None,
            limits=None,
        ),
        **{
            name: wide(getattr(rollout, name), 3) for name in ("logprobs", "ref_logprobs", "values")
        },
    )
    one, other = make_long(), make_long()

    learn(one, settings(), rollout)
    learn(other, settings(), padded)

    assert_same_weights(weights(other), weights(one))


def test_reused_encoder_states_change_nothing(make_long, make_rollout):
    make = lambda: make_long(policy={"frozen_encoder": True})
    rollout = make_rollout(make(), ROWS)
    one, other = make(), make()

    learn(one, settings(), rollout)
    without_states = dataclasses.replace(rollout.tokens, encoder_states=None)
    learn(other, settings(), dataclasses.replace(rollout, tokens=without_states))

    assert rollout.encoder_states is not None
    assert_same_weights(weights(other), weights(one))


@pytest.mark.parametrize("minibatches", [1, 2, 4, 8])
def test_minibatches_have_the_same_rows_for_any_number_of_workers(make_policy, minibatches):
    learner = Learner(make_policy(), settings(minibatches=minibatches), seed=0)

    whole = learner._assign_minibatches(step=3, epoch=1, first_row=0, rows=ROWS)

    assert sorted(np.concatenate(whole).tolist()) == list(range(ROWS))
    assert {len(rows) for rows in whole} == {ROWS // minibatches}
    for workers in (2, 4, 8):
        share = ROWS // workers
        parts = [learner._assign_minibatches(3, 1, first, share) for first in range(0, ROWS, share)]
        for minibatch in range(minibatches):
            global_rows = [
                row + rank * share
                for rank, assignment in enumerate(parts)
                for row in assignment[minibatch]
            ]
            assert global_rows == whole[minibatch].tolist()


# ---- several workers ---------------------------------------------------------------------------

GLOO_STEPS = 4
CASES = {"uneven": (3, "shared"), "even": (11, "shared"), "detached": (3, "detached")}
"""Smallest number of new tokens, and the critic."""


def rollouts_by_name(make_policy, make_rollout):
    """A rollout with responses of different lengths, and one with responses of equal length."""
    made = {}
    for name, (min_new_tokens, critic) in CASES.items():
        policy = make_policy({"min_new_tokens": min_new_tokens}, critic=critic)
        made[name] = (policy, make_rollout(policy, ROWS))
    return made


def gloo_worker(rank, folder, model):
    """Run one of two processes: learn from its half of each rollout and save the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    def total(x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    for name, (min_new_tokens, critic) in CASES.items():
        fields = torch.load(f"{folder}/{name}.pt", weights_only=True)
        tokens = TokenBatch(**fields.pop("tokens"))
        rollout = Rollout(tokens=tokens, **fields)
        share = ROWS // 2
        part = rollout.select(torch.arange(rank * share, (rank + 1) * share))
        policy = load_policy(
            PolicyConfig(model=model, dtype="float32", lora_rank=4, lora_alpha=8),
            SamplingConfig(max_new_tokens=12, min_new_tokens=min_new_tokens),
            seed=0,
            critic=critic,
        )
        start = load_file(f"{folder}/{name}-start.safetensors")
        with torch.no_grad():
            for weight, parameter in policy.trainable().items():
                parameter.copy_(start[weight])
        learner = Learner(policy, settings(critic=critic), seed=0, sum_over_workers=total)
        for step in range(GLOO_STEPS):
            update = learner.update(part, learner.targets(part), step=step, first_row=rank * share)
        save_file(weights(policy), f"{folder}/{name}-{rank}.safetensors")
        torch.save(dataclasses.asdict(update), f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(make_policy, make_rollout, tiny_t5, tmp_path_factory):
    """Results of two processes: `{name: (weights of each, metrics of each, policy, rollout)}`."""
    folder = tmp_path_factory.mktemp("gloo")
    made = rollouts_by_name(make_policy, make_rollout)
    for name, (policy, rollout) in made.items():
        torch.save(dataclasses.asdict(rollout), folder / f"{name}.pt")
        save_file(weights(policy), folder / f"{name}-start.safetensors")
    mp.spawn(gloo_worker, (str(folder), str(tiny_t5)), nprocs=2)
    return {
        name: (
            [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)],
            [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)],
            *policy_and_rollout,
        )
        for name, policy_and_rollout in made.items()
    }


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_take_the_same_steps_as_one_with_all_rows(two_processes, name):
    found, metrics, policy, rollout = two_processes[name]
    lengths = rollout.response_mask.sum(dim=1)
    assert (lengths.unique().numel() == 1) == (name == "even")
    start = weights(policy)

    update = learn(policy, settings(critic=CASES[name][1]), rollout, updates=GLOO_STEPS)

    alone = weights(policy)
    unmoved = {n: gap for n in alone if (gap := float((alone[n] - start[n]).abs().max())) < 2e-5}
    assert unmoved == {}, "weights that did not move would agree without any training"
    for rank in range(2):
        assert_same_weights(found[rank], alone, atol=3e-6)
        assert metrics[rank] == pytest.approx(dataclasses.asdict(update), rel=1e-3, abs=1e-5)
    assert all(torch.equal(found[0][n], found[1][n]) for n in alone), "bit for bit"


def test_workers_with_unequal_shares_take_the_same_steps_as_one_with_all_rows(
    make_long, make_rollout, two_workers
):
    rollout = make_rollout(make_long(), ROWS)
    shares = [range(2), range(2, ROWS)]
    alone = make_long()
    learn(alone, settings(minibatches=4), rollout)
    policies = [make_long(), make_long()]

    def work(rank, total):
        part = rollout.select(torch.tensor(shares[rank]))
        learner = Learner(policies[rank], settings(minibatches=4), 0, total)
        for step in range(3):
            learner.update(part, learner.targets(part), step=step, first_row=shares[rank][0])
        return weights(policies[rank])

    for found in two_workers(work):
        assert_same_weights(found, weights(alone), atol=3e-6)


def test_a_minibatch_without_a_row_on_some_worker_still_updates_every_worker(
    make_long, make_rollout, two_workers
):
    # Eight minibatches of one row: each is on one worker only.
    rollout = make_rollout(make_long(), ROWS)
    alone = make_long()
    learn(alone, settings(minibatches=8), rollout, updates=1)
    policies = [make_long(), make_long()]

    def work(rank, total):
        policy = policies[rank]
        part = rollout.select(torch.arange(4 * rank, 4 * rank + 4))
        learner = Learner(policy, settings(minibatches=8), 0, total)
        learner.update(part, learner.targets(part), step=0, first_row=4 * rank)
        return weights(policy)

    for found in two_workers(work):
        assert_same_weights(found, weights(alone), atol=3e-6)


# ---- what ends an update -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_the_update_and_leaves_the_weights(
    make_policy, make_rollout, bad
):
    policy = make_policy()
    rollout, before = make_rollout(policy, ROWS), weights(policy)
    rollout.scores[3] = bad
    learner = Learner(policy, settings(), seed=0)

    with pytest.raises(NonFiniteError, match=r"Not a finite number in step 6: policy_loss"):
        learner.update(rollout, learner.targets(rollout), step=5)

    assert_same_weights(weights(policy), before, atol=0.0)
    assert not learner.optimiser_state()


def test_a_score_that_is_not_finite_on_one_worker_stops_every_worker(
    make_policy, make_rollout, two_workers
):
    policies = [make_policy(), make_policy()]
    rollouts = [
        make_rollout(policy, ROWS).select(torch.arange(4 * rank, 4 * rank + 4))
        for rank, policy in enumerate(policies)
    ]

    def work(rank, total):
        policy, rollout = policies[rank], rollouts[rank]
        if rank == 1:
            rollout.scores[0] = float("nan")
        before = weights(policy)
        learner = Learner(policy, settings(), 0, total)
        with pytest.raises(NonFiniteError):
            learner.update(rollout, learner.targets(rollout), step=0, first_row=4 * rank)
        return all(torch.equal(w, before[name]) for name, w in weights(policy).items())

    assert two_workers(work) == [True, True]


def test_an_update_beyond_target_kl_ends_before_its_next_optimiser_step(make_policy, make_rollout):
    rollout = make_rollout(make_policy(), ROWS)
    stopped, once, unlimited = make_policy(), make_policy(), make_policy()
    config = {"learning_rate": 0.1, "minibatches": 1}

    update = learn(stopped, settings(**config, epochs=4, target_kl=1e-3), rollout, updates=1)
    learn(once, settings(**config, epochs=1), rollout, updates=1)
    full = learn(unlimited, settings(**config, epochs=4), rollout, updates=1)

    assert update.minibatches == 1
    assert full.minibatches == 4
    assert_same_weights(weights(stopped), weights(once), atol=0.0)


def test_an_update_whose_first_minibatch_exceeds_target_kl_takes_no_optimiser_step(
    make_policy, make_rollout
):
    policy = make_policy()
    rollout, before = make_rollout(policy, ROWS), weights(policy)
    elsewhere = torch.where(rollout.response_mask, rollout.logprobs - 1, 0.0)
    far = dataclasses.replace(rollout, logprobs=elsewhere)

    update = learn(policy, settings(target_kl=0.1), far, updates=1)

    assert update.minibatches == 0
    assert update.approx_kl > 0.1
    assert update.ratio == pytest.approx(np.e, rel=1e-4)
    assert_same_weights(weights(policy), before, atol=0.0)


def test_gradients_are_clipped_in_every_minibatch(make_policy, make_rollout):
    policy = make_policy()
    rollout = make_rollout(policy, ROWS)
    learner = Learner(policy, settings(max_grad_norm=1e-3), seed=0)
    norms = []
    learner.optimiser.register_step_pre_hook(
        lambda *_: norms.append(
            float(torch.cat([p.grad.flatten() for p in learner.trainable.values()]).norm())
        )
    )

    for step in range(2):
        update = learner.update(rollout, learner.targets(rollout), step=step)

    assert norms == pytest.approx([1e-3] * 8, rel=1e-3)
    assert update.grad_norm > 1e-2, "the logged norm is the one before clipping"


def test_the_gradients_of_policy_and_detached_critic_are_clipped_apart(make_policy, make_rollout):
    policy = make_policy(critic="detached")
    rollout = make_rollout(policy, ROWS)
    config = settings(critic="detached", max_grad_norm=1e-3)
    learner = Learner(policy, config, seed=0)
    norms = []
    norm = lambda weights: float(torch.cat([p.grad.flatten() for p in weights]).norm())
    learner.optimiser.register_step_pre_hook(
        lambda *_: norms.append((norm(learner.policy_weights), norm(learner.critic_weights)))
    )

    update = learner.update(rollout, learner.targets(rollout), step=0)

    assert len(norms) == 4
    for pair in norms:
        assert pair == pytest.approx((1e-3, 1e-3), rel=1e-3)
    assert update.grad_norm > 1e-2
    assert update.critic_grad_norm > 1e-2


# ---- the KL coefficient ------------------------------------------------------------------------


def test_a_kl_penalty_in_the_loss_pulls_towards_the_reference(make_policy, make_rollout):
    policy = make_policy()
    rollout = make_rollout(policy, ROWS)
    config = settings(kl_in="loss", kl_coef=0.5, value_coef=0.0, learning_rate=1e-3)
    learner = Learner(policy, config, seed=0)

    first = learner.update(rollout, no_targets(rollout), step=0)
    for step in range(1, 10):
        learner.update(rollout, no_targets(rollout), step=step)

    with torch.no_grad():
        now = policy.score_tokens(rollout.tokens).logprobs
    far = ppo.loss_kl(rollout.logprobs, rollout.ref_logprobs).sum()
    assert first.grad_norm > 0
    assert ppo.loss_kl(now, rollout.ref_logprobs).sum() < 0.9 * far


@pytest.mark.parametrize(
    "changes",
    [{"kl_in": "loss", "kl_coef": 0.0}, {"kl_in": "reward", "kl_coef": 0.5}],
    ids=["kl-coef-zero", "kl-in-the-reward"],
)
def test_without_a_kl_penalty_in_the_loss_the_kl_has_no_gradient(
    make_policy, make_rollout, changes
):
    policy = make_policy()
    rollout, before = make_rollout(policy, ROWS), weights(policy)
    learner = Learner(policy, settings(value_coef=0.0, **changes), seed=0)

    update = learner.update(rollout, no_targets(rollout), step=0)

    assert update.grad_norm == 0
    assert_same_weights(weights(policy), before, atol=0.0)


def test_a_kl_penalty_in_the_loss_is_not_in_the_reward_as_well(make_policy, make_rollout):
    policy = make_policy()
    rollout = make_rollout(policy, ROWS)

    targets = Learner(policy, settings(kl_in="loss"), 0).targets(rollout)

    assert targets.kl.any()
    assert_close(targets.rewards.sum(dim=1), rollout.scores)
    assert (targets.rewards != 0).sum() == ROWS


def test_only_the_adaptive_controller_changes_the_kl_coefficient(make_policy):
    policy = make_policy()
    fixed = Learner(policy, settings(kl_coef=0.2), seed=0)
    adaptive = Learner(
        policy, settings(kl_coef=0.2, kl_controller="adaptive", adaptive_kl_horizon=80), seed=0
    )

    fixed.adapt_kl_coef(60.0)
    adaptive.adapt_kl_coef(60.0)

    assert fixed.kl_coef == 0.2
    assert adaptive.kl_coef == pytest.approx(0.2 * (1 + 0.2 * ROWS / 80))


def test_the_adaptive_controller_is_one_sided_unless_a_lower_minimum_is_set(make_policy):
    policy, config = make_policy(), {"kl_controller": "adaptive", "adaptive_kl_horizon": 80}
    one_sided = Learner(policy, settings(kl_coef=0.2, **config), seed=0)
    two_sided = Learner(policy, settings(kl_coef=0.2, **config, adaptive_kl_coef_min=0), seed=0)

    for learner in (one_sided, two_sided):
        for _ in range(3):
            learner.adapt_kl_coef(0.1)

    assert one_sided.kl_coef == 0.2
    assert two_sided.kl_coef == pytest.approx(0.2 * (1 - 0.2 * ROWS / 80) ** 3)


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["none", "detached", "shared"])
def test_a_restored_optimiser_takes_the_same_steps_as_an_uninterrupted_one(
    make_policy, make_rollout, tmp_path, critic
):
    policy, other = make_policy(critic=critic), make_policy(critic=critic)
    rollout = make_rollout(policy, ROWS)
    learner = Learner(policy, settings(critic=critic), seed=0)
    learner.update(rollout, learner.targets(rollout), step=0)

    save_file(learner.optimiser_state(), tmp_path / "optimiser.safetensors")
    resumed = Learner(other, settings(critic=critic), seed=0)
    with torch.no_grad():
        for name, weight in weights(policy).items():
            other.trainable()[name].copy_(weight)
    resumed.load_optimiser_state(load_file(tmp_path / "optimiser.safetensors"))
    for one in (learner, resumed):
        one.update(rollout, one.targets(rollout), step=1)

    assert_same_weights(weights(other), weights(policy), atol=0.0)
    state, again = learner.optimiser_state(), resumed.optimiser_state()
    assert len(state) == 3 * len(policy.trainable())
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
