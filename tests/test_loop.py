"""The loop of one worker: what is interrupted goes on as if nothing had happened."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch.testing import assert_close

from ray_detox.config import (
    DataConfig,
    PolicyConfig,
    PPOConfig,
    RewardConfig,
    RewardTerm,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from ray_detox.data.shards import PromptShards
from ray_detox.models.loading import load_policy
from ray_detox.records import UpdateStats
from ray_detox.rewards.reward import Reward
from ray_detox.rl import checkpoint
from ray_detox.rl.learner import Learner, NonFiniteError
from ray_detox.rl.loop import Outcome, check_start, train
from ray_detox.runs.checkpoint_store import unpack_folder
from ray_detox.runs.local import LocalRuntime

LANES = 4
CLOCK = {"seconds", "seconds_sample", "seconds_score", "seconds_reference", "seconds_update"}


class Interrupted(Exception):
    """A worker dies."""


class Dies(LocalRuntime):
    """Dies while a step's figures are published."""

    def __init__(self, *args, at):
        super().__init__(*args)
        self.at = at

    def log(self, stats):
        super().log(stats)
        if stats.step == self.at:
            raise Interrupted


class Stops(LocalRuntime):
    """Is asked to end after some steps."""

    def __init__(self, *args, after):
        super().__init__(*args)
        self.after = after

    def should_stop(self):
        return len(self.logged) + 1 >= self.after


def length(completions, **_):
    """A reward term: how long an answer is, in words."""
    return [float(len(text.split())) for text in completions]


@pytest.fixture(scope="module")
def config(tiny_t5, tiny_roberta):
    """Five steps of eight prompts, with dropout in every config that has a place for it."""
    return RunConfig(
        data=DataConfig(shards=LANES),
        policy=PolicyConfig(
            model=str(tiny_t5), dtype="float32", lora_rank=4, lora_alpha=8, lora_dropout=0.5
        ),
        sampling=SamplingConfig(max_new_tokens="6..8", min_new_tokens=2, batch_size=4),
        reward=RewardConfig(
            model=str(tiny_roberta),
            terms=(RewardTerm(function=f"{__name__}.length", weight=0.1),),
        ),
        ppo=PPOConfig(
            prompts_per_step=8,
            minibatches=2,
            epochs=2,
            learning_rate=3e-3,
            kl_controller="adaptive",
            adaptive_kl_horizon=50,
        ),
        train=TrainConfig(steps=5, workers=1, checkpoint_every=2),
    )


@pytest.fixture(scope="module")
def reward(config):
    return Reward(config.reward)


@pytest.fixture(scope="module")
def rows(make_prompts):
    """The rows of each shard: 22 prompts in 4 shards."""
    batch = make_prompts(22)
    prepared = [
        {
            "prompt_id": batch.ids[n],
            "prompt": batch.texts[n],
            "query_ids": batch.query_ids[n][batch.query_mask[n]].tolist(),
            "summary": f"summary {n}",
        }
        for n in range(22)
    ]
    return {shard: prepared[shard::LANES] for shard in range(LANES)}


@pytest.fixture
def go(config, reward, rows, tokenizer):
    """`go(runtime)`: train a policy that was loaded anew; return how it ended."""

    def run(runtime, policy=None, **changes):
        settings = config.replace(**changes)
        policy = policy or load_policy(settings.policy, settings.sampling, settings.seed)
        return train(
            settings, runtime, policy, tokenizer, reward, PromptShards(settings, rows, pad_id=0)
        )

    return run


def metrics_of(runtime):
    """The logged figures by step, without the clock's."""
    return {
        stats.step: {k: v for k, v in dataclasses.asdict(stats).items() if k not in CLOCK}
        for stats in runtime.logged
    }


def kept(runtime):
    """Steps of the checkpoints that are kept."""
    return runtime.store.steps()


def assert_same_end(runtime, other):
    """To the last bit: weights, optimiser, price of KL, settings; figures but for the clock's."""
    one, two = (r.store.newest() for r in (runtime, other))
    assert (one.step, one.objective) == (two.step, two.objective)
    assert one.files.keys() == two.files.keys()
    for name in one.files.keys() - {"metrics.jsonl"}:
        assert one.files[name] == two.files[name], name
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in CLOCK}
            for line in found.files["metrics.jsonl"].splitlines()
        ]
        for found in (one, two)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, one.step + 1))


@pytest.fixture(scope="module")
def uninterrupted(config, reward, rows, tokenizer, tmp_path_factory):
    """A run of five steps."""
    runtime = LocalRuntime(tmp_path_factory.mktemp("uninterrupted"))
    policy = load_policy(config.policy, config.sampling, config.seed)
    outcome = train(
        config, runtime, policy, tokenizer, reward, PromptShards(config, rows, pad_id=0)
    )
    assert outcome == Outcome(step=5, stopped=False)
    return runtime


# ---- a run -------------------------------------------------------------------------------------


def test_every_step_is_logged_once_and_every_figure_is_finite(uninterrupted):
    assert [stats.step for stats in uninterrupted.logged] == [1, 2, 3, 4, 5]
    for stats in uninterrupted.logged:
        plain = dataclasses.asdict(stats)
        terms = plain.pop("terms")
        assert all(math.isfinite(value) for value in (plain | terms).values())


def test_the_first_ratio_of_every_step_is_one_although_dropout_is_configured(uninterrupted):
    for stats in uninterrupted.logged:
        assert stats.ratio == pytest.approx(1, abs=1e-4)


def test_the_kl_starts_at_zero_and_then_leaves_it(uninterrupted):
    assert uninterrupted.logged[0].kl == pytest.approx(0, abs=1e-4)
    assert abs(uninterrupted.logged[-1].kl) > 1e-3


def test_the_figures_are_those_of_the_run(uninterrupted, config):
    for stats in uninterrupted.logged:
        assert 3 <= stats.length <= 8
        assert 0 <= stats.toxicity <= 1
        assert stats.minibatches == 4
        assert stats.truncated == 0
        assert stats.terms["length"] <= stats.length
        assert stats.entropy > 0
        assert stats.seconds >= stats.seconds_sample
    prices = [stats.kl_coef for stats in uninterrupted.logged]
    assert prices[0] == config.ppo.kl_coef
    assert len(set(prices)) == 5, "the adaptive price moved, and each step names the one in force"


def test_training_moves_what_it_rewards(go, tmp_path):
    runtime = LocalRuntime(tmp_path)
    longer = RewardTerm(function=f"{__name__}.length", weight=1.0)

    go(
        runtime,
        reward=RewardConfig(terms=(longer,)),
        sampling=SamplingConfig(max_new_tokens=8, batch_size=32),
        ppo=PPOConfig(prompts_per_step=32, minibatches=2, learning_rate=1e-2, kl_coef=0.0),
        train=TrainConfig(steps=8, workers=1, checkpoint_every=8),
    )

    lengths = [stats.terms["length"] for stats in runtime.logged]
    assert sum(lengths[-2:]) > sum(lengths[:2]) + 1


# ---- interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_that_died_goes_on_bit_for_bit_as_if_it_had_not(go, uninterrupted, tmp_path, at):
    died, resumed = Dies(tmp_path, at=at), LocalRuntime(tmp_path)
    with pytest.raises(Interrupted):
        go(died)

    outcome = go(resumed)

    assert outcome == Outcome(step=5, stopped=False)
    # The checkpoint of a step comes after its log: the newest is of the last even step before.
    assert [stats.step for stats in resumed.logged] == list(range((at - 1) // 2 * 2 + 1, 6))
    expected = metrics_of(uninterrupted)
    for runtime in (died, resumed):
        for step, found in metrics_of(runtime).items():
            assert found == expected[step]
    assert_same_end(resumed, uninterrupted)


def test_a_run_that_was_asked_to_stop_keeps_its_step_and_goes_on(go, uninterrupted, tmp_path):
    stops = Stops(tmp_path, after=3)

    outcome = go(stops)

    assert outcome == Outcome(step=3, stopped=True)
    assert {2, 3} <= set(kept(stops))
    resumed = LocalRuntime(tmp_path)
    assert go(resumed) == Outcome(step=5, stopped=False)
    assert metrics_of(resumed) == {s: metrics_of(uninterrupted)[s] for s in (4, 5)}
    assert_same_end(resumed, uninterrupted)


def test_a_run_asked_to_stop_at_its_last_step_was_not_stopped(go, tmp_path):
    assert go(Stops(tmp_path, after=5)) == Outcome(step=5, stopped=False)


def test_a_run_that_is_complete_does_nothing_more(go, uninterrupted):
    again = LocalRuntime(Path(uninterrupted.store.storage.address))

    assert go(again) == Outcome(step=5, stopped=False)
    assert again.logged == []


# ---- checkpoints -------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_the_best_are_kept(go, uninterrupted, tmp_path):
    more = LocalRuntime(tmp_path, keep=10)

    go(more)

    assert kept(more) == [0, 2, 4, 5]
    prices = {s.step: s.score - s.kl_coef * s.kl for s in more.logged if s.step in (2, 4, 5)}
    best = max(prices, key=prices.get)
    assert more.store.best() == best
    assert kept(uninterrupted) == sorted({4, 5, best})


def test_a_checkpoint_says_what_it_is_and_holds_no_number_of_workers(uninterrupted, config):
    state = unpack_folder(uninterrupted.store.newest().files, checkpoint.read_state)

    assert state.keys() == {"format", "version", "step", "seed", "kl_coef", "config"}
    assert state["step"] == 5
    assert state["config"] == config.to_dict()


def test_a_checkpoint_survives_the_disk(config, make_policy, make_rollout, tmp_path):
    policy, other = make_policy(), make_policy(seed=1)
    learner, taken_up = (Learner(p, config.ppo, seed=0) for p in (policy, other))
    rollout = make_rollout(policy, 8)
    learner.update(rollout, learner.targets(rollout), step=0)
    learner.kl_coef = 0.123
    numbers = {f.name: 0.5 for f in dataclasses.fields(UpdateStats)}
    stats = UpdateStats(**(numbers | {"step": 7, "terms": {"length": 2.0}}))

    checkpoint.write(tmp_path, policy, learner, config, 7, history=[stats])
    step, history = checkpoint.read(tmp_path, other, taken_up)

    assert (step, taken_up.kl_coef) == (7, 0.123)
    assert history == [stats]
    for one, two in ((policy.trainable(), other.trainable()), states(learner, taken_up)):
        assert all(torch.equal(one[name], two[name]) for name in one)


def states(*learners):
    return [learner.optimiser_state() for learner in learners]


def test_a_checkpoint_of_another_format_is_refused_with_the_version_that_wrote_it(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": 99, "version": "9.9"}))

    with pytest.raises(ValueError, match=r"has format 99; this version reads 1\..*ray-detox 9\.9"):
        checkpoint.read_state(tmp_path)


# ---- what must stop a run ----------------------------------------------------------------------


def test_a_policy_that_does_not_start_at_its_reference_is_refused(
    go, config, make_policy, tmp_path
):
    moved = make_policy(sampling=config.sampling.model_dump())
    runtime = LocalRuntime(tmp_path)

    with pytest.raises(RuntimeError, match=r"the policy differs from its reference by [\d.]+ nats"):
        go(runtime, policy=moved)

    assert runtime.logged == []


def test_a_gap_on_the_first_token_alone_is_seen(make_policy, make_rollout):
    rollout = make_rollout(make_policy(stirred=False), 8)
    check_start(rollout, torch.float32)
    rollout.ref_logprobs[5, 0] -= 0.01

    with pytest.raises(RuntimeError, match=r"by 0\.01 nats"):
        check_start(rollout, torch.float32)
    check_start(rollout, torch.bfloat16)


def test_a_run_that_starts_from_an_adapter_starts_at_its_reference(
    go, config, make_policy, tmp_path
):
    make_policy().save_adapter(tmp_path / "start")
    runtime = LocalRuntime(tmp_path / "run")

    go(
        runtime,
        policy=load_policy(
            config.policy.replace(adapter=str(tmp_path / "start")),
            config.sampling,
            config.seed,
        ),
        train=TrainConfig(steps=2, workers=1),
    )

    assert runtime.logged[0].kl == pytest.approx(0, abs=1e-3)
    assert runtime.logged[0].ratio == pytest.approx(1, abs=1e-4)


def test_a_score_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    config, rows, tokenizer, reward, tmp_path
):
    class Breaks:
        calls = 0

        def submit(self, request):
            pending = reward.submit(request)
            self.calls += 1
            if self.calls > 6:  # two chunks a step: the fourth step
                pending.result().rewards[0] = float("nan")
            return pending

    runtime = LocalRuntime(tmp_path)
    policy = load_policy(config.policy, config.sampling, config.seed)

    with pytest.raises(NonFiniteError, match="in step 4"):
        train(config, runtime, policy, tokenizer, Breaks(), PromptShards(config, rows, pad_id=0))

    assert runtime.store.newest().step == 2
    assert [stats.step for stats in runtime.logged] == [1, 2, 3]


# ---- many workers ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2, 1])
def test_two_workers_make_the_run_of_one_also_with_unequal_shares(
    config, rows, tokenizer, uninterrupted, two_workers, tmp_path, first
):
    # Loaded one after the other: what two threads share must not be loaded by both.
    policies = [load_policy(config.policy, config.sampling, config.seed) for _ in range(2)]
    rewards = [Reward(config.reward) for _ in range(2)]
    runtimes = [LocalRuntime(tmp_path / str(rank)) for rank in range(2)]

    def work(rank, total):
        runtimes[rank].rank = 0  # so that each logs; a worker of many would leave it to the first
        runtimes[rank].sum_over_workers = total
        mine = range(first) if rank == 0 else range(first, LANES)
        shards = PromptShards(config, {shard: rows[shard] for shard in mine}, pad_id=0)
        return train(config, runtimes[rank], policies[rank], tokenizer, rewards[rank], shards)

    assert two_workers(work) == [Outcome(step=5, stopped=False)] * 2
    alone = metrics_of(uninterrupted)
    for runtime in runtimes:
        for step, found in metrics_of(runtime).items():
            terms = found.pop("terms")
            assert terms == pytest.approx(alone[step]["terms"], rel=1e-3)
            rest = {k: v for k, v in alone[step].items() if k != "terms"}
            assert found == pytest.approx(rest, rel=1e-2, abs=1e-3)
    ended = [
        load(runtime.store.newest().files["adapter/adapter_model.safetensors"])
        for runtime in (runtimes[0], uninterrupted)
    ]
    for name in ended[0]:
        assert_close(ended[0][name], ended[1][name], atol=1e-4, rtol=1e-3)
