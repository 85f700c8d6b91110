"""Our functions against what TRL 0.11.4's `PPOTrainer.step` computes on the same batch.

`data/golden.pt` holds eight queries and responses, an untied T5 with a LoRA adapter and a value
head, and every number that TRL made of them in four settings. Where TRL does something that we
do on purpose otherwise, its choice is fed to our functions, so that all the rest must agree:

    its mask        starts at position 1, so that the first token is never trained; ours counts it
    its decoder     reads the response unshifted; a response that starts with the start token is
                    ours with that token in front, another one has its first token for a start
    its reference   is the model with the adapter off, as ours is where no adapter was given

Of its settings these have no counterpart here, and their cases are left out: `kl_abs` (the
absolute difference estimates no KL), `kl_full` (over the whole vocabulary), `whiten_rewards`,
and `ratio_skip` (a minibatch that is skipped although Adam's momentum still moves the weights).
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.data.shards import pad_rows
from ray_detox.models.loading import load_policy
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
ESTIMATOR = {"kl": "k1", "mse": "k2"}


def assert_agrees(actual, expected):
    """Within what another order of additions in float32 explains."""
    assert_close(actual.float(), expected.float(), atol=2e-5, rtol=2e-5)


def settings(case):
    return DEFAULTS | case["ppo_config"]


@pytest.fixture(scope="module")
def make_golden_policy(tmp_path_factory):
    """The golden model as our policy, made anew for every test that trains it."""
    folder = tmp_path_factory.mktemp("golden")
    base = T5ForConditionalGeneration(T5Config(**GOLDEN["t5_config"]))
    # transformers 5 ties the head of a model made from a config, whatever the config says, and
    # loading the weights would then overwrite the embedding.
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
    """A trained weight's name in our policy."""
    if name.startswith("v_head.summary."):
        return name.replace("v_head.summary", "value_head")
    return f"model.base_model.model.{name}.default.weight"


def score(policy, rows):
    """Log-probabilities and values [rows, 15] of the golden responses as TRL feeds them."""
    logprobs, values = [], []
    for row in rows:
        query, response = GOLDEN["queries"][row], GOLDEN["responses"][row]
        policy.start_id = int(response[0])
        query_ids, query_mask = pad_rows([query.tolist()], pad_id=0)
        ids, mask = pad_rows([response[1:].tolist()], pad_id=0)
        scores = policy.score_tokens(query_ids, query_mask, ids, mask)
        wide = lambda x, width=15 - ids.shape[1]: nn.functional.pad(x, (0, width))
        logprobs.append(wide(scores.logprobs))
        values.append(wide(scores.values))
    policy.start_id = START
    return torch.cat(logprobs), torch.cat(values)


def advantages(case, mask=MASK, kl_coef=None):
    """KL, rewards, whitened advantages and returns by our functions, from golden log-probs."""
    config = settings(case)
    kl_coef = config["init_kl_coef"] if kl_coef is None else kl_coef
    kl = ppo.KL_ESTIMATORS[ESTIMATOR[config["kl_penalty"]]](PRE["logprobs"], PRE["ref_logprobs"])
    rewards = ppo.token_rewards(case["scores_used"], kl, mask, kl_coef)
    raw, returns = ppo.gae(rewards, PRE["values"], mask, config["gamma"], config["lam"])
    return kl, rewards, ppo.standardise(raw, mask), returns


# ---- before the update -------------------------------------------------------------------------


def test_the_policy_gives_trls_log_probabilities_and_values(make_golden_policy):
    policy = make_golden_policy()

    with torch.no_grad():
        logprobs, values = score(policy, range(8))

    assert_agrees(logprobs[MASK], PRE["logprobs"][MASK])
    assert_agrees(values[MASK], PRE["values"][MASK])


def test_the_reference_gives_trls_log_probabilities_with_the_adapter_off(make_golden_policy):
    policy = make_golden_policy()

    with torch.no_grad(), policy.as_reference():
        logprobs, _ = score(policy, range(8))

    assert_agrees(logprobs[MASK], PRE["ref_logprobs"][MASK])


@pytest.mark.parametrize(
    "name", ["default", "kl_mse", "gamma_lam", "score_clip", "init_kl_coef_0", "init_kl_coef_1.5"]
)
def test_rewards_and_advantages_are_trls(name):
    case = PRE if name == "default" else GOLDEN["pre_cases"][name]
    if name == "default":
        case = case | {"ppo_config": GOLDEN["cases"]["default"]["ppo_config"]}

    kl, rewards, whitened, returns = advantages(case)

    assert_agrees(kl[MASK], case["kls"][MASK])
    assert_agrees(rewards[MASK], case["rewards"][MASK])
    assert_agrees(whitened[MASK], case["advantages"][MASK])
    assert_agrees(returns[MASK], case["returns"][MASK])


def test_the_kl_of_a_response_and_the_price_that_follows_are_trls():
    stats = GOLDEN["cases"]["default"]["stats"]

    k1 = ppo.kl_k1(PRE["logprobs"], PRE["ref_logprobs"])
    kl = float(torch.where(MASK, k1, 0.0).sum(dim=1).mean())
    price = ppo.next_kl_coef(0.2, kl, kl_target=6.0, kl_horizon=10_000, responses=8)

    assert kl == pytest.approx(stats["objective/kl"], rel=1e-5)
    assert price == pytest.approx(GOLDEN["cases"]["default"]["kl_coef_after"], rel=1e-6)


# ---- the update --------------------------------------------------------------------------------


def minibatches(case):
    """Rows of every minibatch, in TRL's order."""
    size = case["ppo_config"]["mini_batch_size"]
    for order in case["orders"]:
        yield from order.split(size)


def losses(policy, case, rows):
    """Policy and value loss per token of a minibatch, where clipped, and new log-probs."""
    config, mask = settings(case), MASK[rows]
    targets = PRE | {"ppo_config": case["ppo_config"]}
    _, _, whitened, returns = advantages(targets)
    new_logprobs, new_values = score(policy, rows.tolist())
    policy_loss, clipped = ppo.policy_loss(
        new_logprobs, PRE["logprobs"][rows], whitened[rows], mask, config["cliprange"]
    )
    value = (new_values, PRE["values"][rows], returns[rows], mask)
    value_loss = ppo.value_loss(*value, config["cliprange_value"])
    value_held_back = value_loss > ppo.value_loss(*value, float("inf"))
    return policy_loss, value_loss, clipped, value_held_back, new_logprobs


@pytest.mark.parametrize("name", ["default", "epochs3", "accum2"])
def test_the_first_gradient_is_trls(make_golden_policy, name):
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
def test_every_minibatch_and_the_trained_weights_are_trls(make_golden_policy, name):
    case, policy = GOLDEN["cases"][name], make_golden_policy()
    config = settings(case)
    optimiser = torch.optim.Adam(policy.trainable().values(), lr=config["learning_rate"])
    every = config["gradient_accumulation_steps"]

    measured = []
    for index, rows in enumerate(minibatches(case)):
        mask = MASK[rows]
        policy_loss, value_loss, clipped, value_held_back, new = losses(policy, case, rows)
        loss = (policy_loss + config["vf_coef"] * value_loss).sum() / mask.sum()
        (loss / every).backward()
        if index % every == every - 1:
            optimiser.step()
            optimiser.zero_grad()
        approx_kl = ppo.kl_k2(new, PRE["logprobs"][rows])
        figures = (policy_loss, value_loss, clipped.float(), value_held_back.float(), approx_kl)
        measured.append([float(x.detach()[mask].mean()) for x in figures])

    names = ("policy_loss", "value_loss", "pg_clipfrac", "vf_clipfrac", "approxkl")
    for figure, key in zip(torch.tensor(measured).T, names, strict=True):
        assert_close(figure, case["minibatches"][key].float(), atol=1e-4, rtol=1e-3)
    # Adam divides by the gradient's size: where a gradient is rounding noise, its sign decides.
    # So a weight may be a step or two off, and nearly all must not be.
    trained = policy.trainable()
    after = case["lora_after"] | {f"v_head.{n}": w for n, w in case["v_head_after"].items()}
    before = GOLDEN["lora_state"] | {f"v_head.{n}": w for n, w in GOLDEN["v_head_state"].items()}
    gap = torch.cat([(trained[ours(n)].detach() - w).flatten() for n, w in after.items()])
    way = torch.cat([(after[n] - before[n]).flatten() for n in after])
    assert gap.norm() < 0.01 * way.norm()


# ---- where we differ, by design ----------------------------------------------------------------


def test_our_mask_gives_the_first_token_reward_advantage_and_gradient_and_trls_does_not(
    make_golden_policy,
):
    starts_right = torch.tensor([int(r[0]) == START for r in GOLDEN["responses"]])
    lengths = torch.tensor([len(r) - 1 for r in GOLDEN["responses"]])
    our_mask = torch.arange(15) < lengths[:, None]
    case = PRE | {"ppo_config": {}}
    policy = make_golden_policy()

    def first_token(mask):
        _, rewards, whitened, _ = advantages(case, mask)
        logprobs, _ = score(policy, range(8))
        logprobs.retain_grad()
        loss, _ = ppo.policy_loss(logprobs, PRE["logprobs"], whitened, mask, 0.2)
        loss.sum().backward()
        advantage = torch.where(mask, whitened, 0.0)
        return [x[starts_right, 0] for x in (rewards, advantage, logprobs.grad)]

    for ours_counts, trls_does_not in zip(first_token(our_mask), first_token(MASK), strict=True):
        assert ours_counts.all()
        assert not trls_does_not.any()


def test_our_explained_variance_forgives_a_constant_error_and_trls_does_not():
    stats = GOLDEN["cases"]["default"]["stats"]
    *_, returns = advantages(PRE | {"ppo_config": {}})

    explained = ppo.explained_variance(PRE["values"], returns, MASK)

    assert explained > stats["ppo/val/var_explained"]
    error, kept = (returns - PRE["values"])[MASK], returns[MASK]
    assert explained == pytest.approx(float(1 - error.var() / kept.var()), rel=1e-5)
