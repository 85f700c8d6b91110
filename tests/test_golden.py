"""Our functions against the values that TRL 0.11.4's `PPOTrainer.step` computes on the same batch.

`data/golden.pt` holds eight queries and responses, an untied T5 with a LoRA adapter and a value
head, and all values that TRL computed from them in four settings. On purpose we differ from TRL in
three points; there the tests pass TRL's choice to our functions, so that everything else must
agree:

    mask        TRL's starts at position 1 and never trains the first token; ours includes it
    decoder     TRL passes the response unshifted. A response that begins with the start token
                therefore corresponds to ours without that token; for any other response, its
                first token acts as the start token
    reference   TRL's is the model with the adapter off, as is ours if no adapter is given

Four settings of TRL have no counterpart here, and their cases are left out: `kl_abs` (the absolute
difference is not an estimator of the KL), `kl_full` (over the whole vocabulary), `whiten_rewards`,
and `ratio_skip` (it skips a minibatch although Adam's momentum still moves the weights).
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.data.shards import pad_rows
from ray_detox.models.constraints import Constraints
from ray_detox.models.loading import load_policy
from ray_detox.records import TokenBatch
from ray_detox.rl import ppo

GOLDEN = torch.load(Path(__file__).parent / "data" / "golden.pt", weights_only=True)
PRE = GOLDEN["cases"]["default"]["pre"]
MASK = PRE["masks"].bool()
START = 0
DEFAULTS = {
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gradient_accumulation_steps": 1,
}
ESTIMATE = {"kl": ppo.reward_kl, "mse": ppo.loss_kl}


def assert_agrees(actual, expected):
    """Compare up to differences from another order of float32 additions."""
    assert_close(actual.float(), expected.float(), atol=2e-5, rtol=2e-5)


def settings(case):
    return DEFAULTS | case["ppo_config"]


@pytest.fixture(scope="module")
def make_golden_policy(tmp_path_factory):
    """`make_golden_policy()`: the golden model as our policy, new for each test that trains it."""
    folder = tmp_path_factory.mktemp("golden")
    base = T5ForConditionalGeneration(T5Config(**GOLDEN["t5_config"]))
    # transformers 5 ties the head of a model made from a config even if the config says otherwise,
    # and loading the weights would then overwrite the embedding.
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.load_state_dict(GOLDEN["base_state"])
    base.save_pretrained(folder, safe_serialization=True)
    lora = GOLDEN["lora_config"]

    def make():
        policy = load_policy(
            PolicyConfig(
                model=str(folder),
                dtype="float32",
                lora_rank=lora["r"],
                lora_alpha=lora["lora_alpha"],
                lora_dropout=lora["lora_dropout"],
                lora_targets=tuple(lora["target_modules"]),
            ),
            SamplingConfig(max_new_tokens=16),
            seed=0,
            critic="shared",
        )
        # TRL allows the pad token.
        policy.constraints = Constraints(
            dataclasses.replace(policy.constraints.rules, forbidden=())
        )
        weights = dict(policy.named_parameters())
        with torch.no_grad():
            for name, value in GOLDEN["lora_state"].items():
                weights[ours(name)].copy_(value)
            for name, value in GOLDEN["v_head_state"].items():
                weights[ours(f"v_head.{name}")].copy_(value)
        return policy

    return make


def ours(name):
    """Name in our policy of a trained weight of TRL."""
    if name.startswith("v_head.summary."):
        return name.replace("v_head.summary", "value_head")
    return f"model.base_model.model.{name}.default.weight"


def score(policy, rows):
    """Log-probabilities and values [rows, 15] of the golden responses, shifted as in TRL."""
    logprobs, values = [], []
    for row in rows:
        query, response = GOLDEN["queries"][row], GOLDEN["responses"][row]
        policy.start_id = int(response[0])
        query_ids, query_mask = pad_rows([query.tolist()], pad_id=0)
        ids, mask = pad_rows([response[1:].tolist()], pad_id=0)
        scores = policy.score_tokens(TokenBatch(query_ids, query_mask, ids, mask, None, None))
        wide = lambda x, width=15 - ids.shape[1]: nn.functional.pad(x, (0, width))
        logprobs.append(wide(scores.logprobs))
        values.append(wide(scores.values))
    policy.start_id = START
    return torch.cat(logprobs), torch.cat(values)


def advantages(case, mask=MASK, kl_coef=None):
    """KL, rewards, standardised advantages and returns of our functions on golden log-probs."""
    config = settings(case)
    kl_coef = config["init_kl_coef"] if kl_coef is None else kl_coef
    kl = ESTIMATE[config["kl_penalty"]](PRE["logprobs"], PRE["ref_logprobs"])
    rewards = ppo.token_rewards(case["scores_used"], kl, mask, kl_coef)
    raw, returns = ppo.gae(rewards, PRE["values"], mask, config["gamma"], config["lam"])
    return kl, rewards, ppo.standardise(raw, mask), returns


# ---- before the update -------------------------------------------------------------------------


def test_log_probabilities_and_values_match_trl(make_golden_policy):
    policy = make_golden_policy()

    with torch.no_grad():
        logprobs, values = score(policy, range(8))

    assert_agrees(logprobs[MASK], PRE["logprobs"][MASK])
    assert_agrees(values[MASK], PRE["values"][MASK])


def test_reference_log_probabilities_match_trl_with_the_adapter_off(make_golden_policy):
    policy = make_golden_policy()

    with torch.no_grad(), policy.as_reference():
        logprobs, _ = score(policy, range(8))

    assert_agrees(logprobs[MASK], PRE["ref_logprobs"][MASK])


@pytest.mark.parametrize(
    "name", ["default", "kl_mse", "gamma_lam", "score_clip", "init_kl_coef_0", "init_kl_coef_1.5"]
)
def test_rewards_and_advantages_match_trl(name):
    case = PRE if name == "default" else GOLDEN["pre_cases"][name]
    if name == "default":
        case = case | {"ppo_config": GOLDEN["cases"]["default"]["ppo_config"]}

    kl, rewards, standardised, returns = advantages(case)

    assert_agrees(kl[MASK], case["kls"][MASK])
    assert_agrees(rewards[MASK], case["rewards"][MASK])
    assert_agrees(standardised[MASK], case["advantages"][MASK])
    assert_agrees(returns[MASK], case["returns"][MASK])


def test_kl_per_response_and_next_kl_coefficient_match_trl():
    stats = GOLDEN["cases"]["default"]["stats"]

    k1 = ppo.reward_kl(PRE["logprobs"], PRE["ref_logprobs"])
    kl = float(torch.where(MASK, k1, 0.0).sum(dim=1).mean())
    kl_coef = ppo.next_kl_coef(0.2, kl, kl_target=6.0, kl_horizon=10_000, responses=8)

    assert kl == pytest.approx(stats["objective/kl"], rel=1e-5)
    assert kl_coef == pytest.approx(GOLDEN["cases"]["default"]["kl_coef_after"], rel=1e-6)


# ---- the update --------------------------------------------------------------------------------


def minibatches(case):
    """Yield the rows of every minibatch, in TRL's order."""
    size = case["ppo_config"]["mini_batch_size"]
    for order in case["orders"]:
        yield from order.split(size)


def losses(policy, case, rows):
    """Policy and value loss per token of a minibatch, both clip masks, and new log-probs."""
    config, mask = settings(case), MASK[rows]
    targets = PRE | {"ppo_config": case["ppo_config"]}
    _, _, standardised, returns = advantages(targets)
    new_logprobs, new_values = score(policy, rows.tolist())
    policy_loss, clipped = ppo.policy_loss(
        new_logprobs, PRE["logprobs"][rows], standardised[rows], mask, config["cliprange"]
    )
    value = (new_values, PRE["values"][rows], returns[rows], mask)
    value_loss = ppo.value_loss(*value, config["cliprange_value"])
    value_clipped = value_loss > ppo.value_loss(*value, float("inf"))
    return policy_loss, value_loss, clipped, value_clipped, new_logprobs


@pytest.mark.parametrize("name", ["default", "epochs3", "accum2"])
def test_the_first_gradient_matches_trl(make_golden_policy, name):
    case, policy = GOLDEN["cases"][name], make_golden_policy()
    rows = next(minibatches(case))

    policy_loss, value_loss, *_ = losses(policy, case, rows)
    loss = (policy_loss + settings(case)["vf_coef"] * value_loss).sum() / MASK[rows].sum()
    (loss / settings(case)["gradient_accumulation_steps"]).backward()

    trained = policy.trainable()
    assert {ours(name) for name in case["first_grads"]} == trained.keys()
    for weight, expected in case["first_grads"].items():
        assert_close(trained[ours(weight)].grad, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["default", "epochs3", "accum2"])
def test_every_minibatch_and_the_trained_weights_match_trl(make_golden_policy, name):
    case, policy = GOLDEN["cases"][name], make_golden_policy()
    config = settings(case)
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=config["learning_rate"])
    every = config["gradient_accumulation_steps"]

    measured = []
    for index, rows in enumerate(minibatches(case)):
        mask = MASK[rows]
        policy_loss, value_loss, clipped, value_clipped, new = losses(policy, case, rows)
        loss = (policy_loss + config["vf_coef"] * value_loss).sum() / mask.sum()
        (loss / every).backward()
        if index % every == every - 1:
            optimiser.step()
            optimiser.zero_grad()
        approx_kl = ppo.loss_kl(new, PRE["logprobs"][rows])
        metrics = (policy_loss, value_loss, clipped.float(), value_clipped.float(), approx_kl)
        measured.append([float(x.detach()[mask].mean()) for x in metrics])

    names = ("policy_loss", "value_loss", "pg_clipfrac", "vf_clipfrac", "approxkl")
    for metric, key in zip(torch.tensor(measured).T, names, strict=True):
        assert_close(metric, case["minibatches"][key].float(), atol=1e-4, rtol=1e-3)
    # Adam normalises each gradient, so if a gradient is rounding noise, the noise sets the sign of
    # the step. A few weights may be a step or two off; the test bounds the norm over all weights.
    trained = policy.trainable()
    after = case["lora_after"] | {f"v_head.{n}": w for n, w in case["v_head_after"].items()}
    before = GOLDEN["lora_state"] | {f"v_head.{n}": w for n, w in GOLDEN["v_head_state"].items()}
    gap = torch.cat([(trained[ours(n)].detach() - w).flatten() for n, w in after.items()])
    change = torch.cat([(after[n] - before[n]).flatten() for n in after])
    assert gap.norm() < 0.01 * change.norm()


# ---- intended differences ----------------------------------------------------------------------


def test_the_first_token_has_reward_advantage_and_gradient_under_our_mask_only(
    make_golden_policy,
):
    starts_right = torch.tensor([int(r[0]) == START for r in GOLDEN["responses"]])
    lengths = torch.tensor([len(r) - 1 for r in GOLDEN["responses"]])
    our_mask = torch.arange(15) < lengths[:, None]
    case = PRE | {"ppo_config": {}}
    policy = make_golden_policy()

    def first_token(mask):
        _, rewards, standardised, _ = advantages(case, mask)
        logprobs, _ = score(policy, range(8))
        logprobs.retain_grad()
        loss, _ = ppo.policy_loss(logprobs, PRE["logprobs"], standardised, mask, 0.2)
        loss.sum().backward()
        advantage = torch.where(mask, standardised, 0.0)
        return [x[starts_right, 0] for x in (rewards, advantage, logprobs.grad)]

    for with_ours, with_trls in zip(first_token(our_mask), first_token(MASK), strict=True):
        assert with_ours.all()
        assert not with_trls.any()


def test_explained_variance_ignores_a_constant_error_unlike_trl():
    case = GOLDEN["cases"]["default"]
    *_, returns = advantages(PRE | {"ppo_config": {}})
    error = returns - PRE["values"]

    explained = ppo.explained_variance(PRE["values"], returns, MASK)

    # TRL averages the mean squared error and the variance over minibatches before it divides.
    parts = [(error[rows][MASK[rows]], returns[rows][MASK[rows]]) for rows in minibatches(case)]
    squares, variances = sum((e**2).mean() for e, _ in parts), sum(r.var() for _, r in parts)
    trls = case["stats"]["ppo/val/var_explained"]
    assert float(1 - squares / variances) == pytest.approx(trls, rel=1e-4)
    # The same formula over the whole batch: a constant error counts as an error, and not in ours.
    error, returns = error[MASK], returns[MASK]
    variance = returns.var(unbiased=False)
    as_trl = 1 - (error**2).mean() / variance
    assert explained == pytest.approx(float(1 - error.var() / returns.var()), rel=1e-5)
    assert explained == pytest.approx(float(as_trl + error.mean() ** 2 / variance), rel=1e-5)
