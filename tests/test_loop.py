"""The loop of one worker: a resumed run equals an uninterrupted one, bit for bit."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch.testing import assert_close

from ray_detox import draws
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
from ray_detox.errors import NonFiniteError
from ray_detox.models.loading import load_policy
from ray_detox.records import PreparedRow, Rollout, TokenBatch, UpdateStats
from ray_detox.rewards.reward import Reward
from ray_detox.rl import checkpoint
from ray_detox.rl.divergence import DivergedError
from ray_detox.rl.learner import Learner
from ray_detox.rl.loop import (
    Outcome,
    StartError,
    check_start,
    is_probed,
    objective_key,
    on_all_workers,
    train,
)
from ray_detox.rl.rollout import collect
from ray_detox.runs.checkpoint_store import unpack_folder
from ray_detox.runs.local import LocalRuntime

SHARDS = 4
TIMINGS = {
    "seconds",
    "seconds_sample",
    "seconds_score",
    "seconds_reference",
    "seconds_update",
    "seconds_probe",
}


class WorkerCrash(Exception):
    """A worker crashes."""


class CrashingRuntime(LocalRuntime):
    """Crashes while it logs the metrics of step `at`."""

    def __init__(self, *args, at):
        super().__init__(*args)
        self.at = at

    def log(self, stats):
        super().log(stats)
        if stats.step == self.at:
            raise WorkerCrash


class StoppingRuntime(LocalRuntime):
    """Asks the run to stop after `after` steps."""

    def __init__(self, *args, after):
        super().__init__(*args)
        self.after = after

    def should_stop(self):
        return len(self.logged) + 1 >= self.after


def word_count(completions, **_):
    """A reward term: the length of a response, in words."""
    return [float(len(text.split())) for text in completions]


def new_policy(config):
    return load_policy(config.policy, config.sampling, config.seed, critic=config.ppo.critic)


@pytest.fixture(scope="module")
def config(tiny_t5, tiny_roberta):
    """Five steps of eight prompts, with dropout in every config that has a setting for it."""
    return RunConfig(
        data=DataConfig(shards=SHARDS),
        policy=PolicyConfig(
            model=str(tiny_t5), dtype="float32", lora_rank=4, lora_alpha=8, lora_dropout=0.5
        ),
        sampling=SamplingConfig(max_new_tokens="6..8", min_new_tokens=2, batch_size=4),
        reward=RewardConfig(
            model=str(tiny_roberta),
            terms=(RewardTerm(function=f"{__name__}.word_count", weight=0.1),),
        ),
        ppo=PPOConfig(
            prompts_per_step=8,
            minibatches=2,
            epochs=2,
            learning_rate=3e-3,
            critic="detached",
            kl_controller="adaptive",
            adaptive_kl_horizon=50,
            adaptive_kl_coef_min=0.0,
        ),
        train=TrainConfig(steps=5, workers=1, checkpoint_every=2, probe_prompts=6, probe_every=2),
    )


@pytest.fixture(scope="module")
def reward(config):
    return Reward(config.reward)


@pytest.fixture(scope="module")
def rows(make_prompts):
    """The rows of each shard: 22 prompts in 4 shards."""
    batch = make_prompts(22)
    prepared = [
        PreparedRow(
            prompt_id=batch.ids[n],
            prompt=batch.texts[n],
            query_ids=batch.query_ids[n][batch.query_mask[n]].tolist(),
            columns={"summary": f"summary {n}"},
            copy=0,
            more_references=(),
        )
        for n in range(22)
    ]
    return {shard: prepared[shard::SHARDS] for shard in range(SHARDS)}


@pytest.fixture
def train_run(config, reward, rows, tokenizer):
    """`train_run(runtime)`: train a newly loaded policy and return the outcome."""

    def run(runtime, policy=None, **changes):
        settings = config.replace(**changes)
        policy = policy or new_policy(settings)
        return train(
            settings, runtime, policy, tokenizer, reward, PromptShards(settings, rows, pad_id=0)
        )

    return run


def metrics_of(runtime):
    """The logged metrics by step, without timings."""
    return {
        stats.step: {k: v for k, v in dataclasses.asdict(stats).items() if k not in TIMINGS}
        for stats in runtime.logged
    }


def kept(runtime):
    """Steps of the stored checkpoints."""
    return runtime.store.steps()


def assert_same_final_state(runtime, other):
    """Compare weights, optimiser, KL coefficient, settings and metrics (but timings) bit for bit."""
    one, two = (r.store.newest() for r in (runtime, other))
    assert (one.step, one.objective) == (two.step, two.objective)
    assert one.files.keys() == two.files.keys()
    for name in one.files.keys() - {"metrics.jsonl"}:
        assert one.files[name] == two.files[name], name
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMINGS}
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
    policy = new_policy(config)
    outcome = train(
        config, runtime, policy, tokenizer, reward, PromptShards(config, rows, pad_id=0)
    )
    assert outcome == Outcome(step=5, stopped=False)
    return runtime


# ---- a run -------------------------------------------------------------------------------------


def test_every_step_is_logged_once_and_every_metric_is_finite(uninterrupted):
    assert [stats.step for stats in uninterrupted.logged] == [1, 2, 3, 4, 5]
    for stats in uninterrupted.logged:
        plain = dataclasses.asdict(stats)
        terms = plain.pop("terms")
        if stats.step not in (2, 4, 5):  # no probe
            assert (plain.pop("probe_score"), plain.pop("probe_kl")) == (None, None)
        assert all(math.isfinite(value) for value in (plain | terms).values())


def test_the_first_ratio_of_every_step_is_one_although_dropout_is_configured(uninterrupted):
    for stats in uninterrupted.logged:
        assert stats.ratio == pytest.approx(1, abs=1e-4)


def test_the_kl_is_zero_in_the_first_step_and_not_in_the_last(uninterrupted):
    assert uninterrupted.logged[0].kl == pytest.approx(0, abs=1e-4)
    assert abs(uninterrupted.logged[-1].kl) > 1e-3


def test_the_metrics_are_in_the_range_of_the_settings(uninterrupted, config):
    for stats in uninterrupted.logged:
        assert 3 <= stats.length <= 8
        assert 0 <= stats.toxicity <= 1
        assert 0 <= stats.finished <= 1
        assert stats.minibatches == 4
        assert stats.truncated == 0
        assert stats.terms["word_count"] <= stats.length
        assert stats.entropy > 0
        assert stats.seconds >= stats.seconds_sample
    coefficients = [stats.kl_coef for stats in uninterrupted.logged]
    assert coefficients[0] == config.ppo.kl_coef
    assert len(set(coefficients)) == 5, "adaptive: each step logs the coefficient that it used"


def test_training_increases_the_rewarded_length(train_run, tmp_path):
    runtime = LocalRuntime(tmp_path)
    longer = RewardTerm(function=f"{__name__}.word_count", weight=1.0)

    train_run(
        runtime,
        reward=RewardConfig(terms=(longer,)),
        sampling=SamplingConfig(max_new_tokens=8, batch_size=32),
        ppo=PPOConfig(prompts_per_step=32, minibatches=2, learning_rate=1e-2, kl_coef=0.0),
        train=TrainConfig(steps=8, workers=1, checkpoint_every=8),
    )

    lengths = [stats.terms["word_count"] for stats in runtime.logged]
    assert sum(lengths[-2:]) > sum(lengths[:2]) + 1


# ---- interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_resumed_after_a_crash_equals_an_uninterrupted_one_bit_for_bit(
    train_run, uninterrupted, tmp_path, at
):
    crashed, resumed = CrashingRuntime(tmp_path, at=at), LocalRuntime(tmp_path)
    with pytest.raises(WorkerCrash):
        train_run(crashed)

    outcome = train_run(resumed)

    assert outcome == Outcome(step=5, stopped=False)
    # A step is logged before its checkpoint, so the newest checkpoint is of the last even step
    # before the crash.
    assert [stats.step for stats in resumed.logged] == list(range((at - 1) // 2 * 2 + 1, 6))
    expected = metrics_of(uninterrupted)
    for runtime in (crashed, resumed):
        for step, found in metrics_of(runtime).items():
            assert found == expected[step]
    assert_same_final_state(resumed, uninterrupted)


def test_a_stopped_run_saves_its_last_step_and_can_be_resumed(train_run, uninterrupted, tmp_path):
    stopped = StoppingRuntime(tmp_path, after=3)

    outcome = train_run(stopped)

    assert outcome == Outcome(step=3, stopped=True)
    assert {2, 3} <= set(kept(stopped))
    resumed = LocalRuntime(tmp_path)
    assert train_run(resumed) == Outcome(step=5, stopped=False)
    assert metrics_of(resumed) == {s: metrics_of(uninterrupted)[s] for s in (4, 5)}
    assert_same_final_state(resumed, uninterrupted)


def test_a_run_asked_to_stop_in_its_last_step_counts_as_complete(train_run, tmp_path):
    assert train_run(StoppingRuntime(tmp_path, after=5)) == Outcome(step=5, stopped=False)


def test_resuming_a_complete_run_does_nothing(train_run, uninterrupted):
    again = LocalRuntime(Path(uninterrupted.store.storage.address))

    assert train_run(again) == Outcome(step=5, stopped=False)
    assert again.logged == []


# ---- checkpoints -------------------------------------------------------------------------------


def test_the_newest_and_the_best_checkpoints_are_kept(train_run, uninterrupted, config, tmp_path):
    more = LocalRuntime(tmp_path, keep=10)

    train_run(more)

    assert kept(more) == [0, 2, 4, 5]
    start = more.store.load(0).objective.value
    objectives = {0: start} | {
        stats.step: stats.probe_score - config.ppo.kl_coef * stats.probe_kl
        for stats in more.logged
        if stats.probe_score is not None
    }
    assert objectives.keys() == {0, 2, 4, 5}
    assert objectives == {step: more.store.load(step).objective.value for step in kept(more)}
    best = max(objectives, key=objectives.get)
    assert more.store.best() == best
    assert kept(uninterrupted) == sorted({4, 5, best})


def test_an_objective_is_that_of_the_saved_policy_on_fixed_prompts_and_noise(
    uninterrupted, config, reward, rows, tokenizer
):
    shards = PromptShards(config, rows, pad_id=0)
    batch = shards.probe(6)
    policy = load_policy(config.policy, config.sampling, config.seed)
    learner = Learner(policy, config.ppo, config.seed)
    newest = uninterrupted.store.newest()
    unpack_folder(newest.files, lambda folder: checkpoint.read(folder, policy, learner))

    collected = collect(
        policy, tokenizer, reward, batch, seed=config.seed, step=draws.EVALUATION, chunk_size=3
    )

    rollout = collected.rollout
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(dim=1).mean()
    objective = rollout.scores.mean() - config.ppo.kl_coef * kl
    assert newest.objective.value == pytest.approx(float(objective), abs=1e-4)
    assert learner.kl_coef != config.ppo.kl_coef, "the controller's coefficient is another one"


@pytest.mark.parametrize(
    ("checkpoint_every", "probe_every", "steps"),
    [(1, 5, [0, 5, 10, 12]), (2, 5, [0, 6, 10, 12]), (5, 2, [0, 5, 10, 12]), (20, 1, [0, 12])],
)
def test_checkpoints_are_probed_at_regular_steps(checkpoint_every, probe_every, steps):
    config = TrainConfig(steps=12, checkpoint_every=checkpoint_every, probe_every=probe_every)

    assert [step for step in range(13) if is_probed(step, config)] == steps
    assert not any(is_probed(step, config.replace(probe_prompts=0)) for step in range(13))


def test_objectives_are_comparable_only_with_the_settings_they_depend_on(config):
    def change(name, **values):
        return objective_key(config.replace(**{name: getattr(config, name).replace(**values)}))

    key = objective_key(config)
    same = [
        change("ppo", learning_rate=1e-4),
        change("train", steps=9, workers=2, probe_every=3),
        change("reward", actors=2, batch_size=8),
        change("sampling", batch_size=8),
    ]
    other = [
        change("ppo", kl_coef=0.3),
        change("ppo", unfinished_penalty=1.0),
        change("train", probe_prompts=7),
        change("reward", weight=2.0),
        change("reward", terms=()),
        change("sampling", temperature=0.7),
        objective_key(config.replace(seed=1)),
    ]
    assert set(same) == {key}
    assert len({key, *other}) == 1 + len(other)


def test_a_run_resumed_with_another_kl_coef_compares_only_its_own_checkpoints(
    train_run, config, tmp_path
):
    short = config.train.replace(steps=1, checkpoint_every=1, probe_every=1, probe_prompts=2)
    runtime = LocalRuntime(tmp_path, keep=9)
    train_run(runtime, train=short)

    # With this coefficient the objectives are far from those of before.
    train_run(runtime, train=short.replace(steps=3), ppo=config.ppo.replace(kl_coef=50.0))

    keys = [runtime.store.load(step).objective.key for step in range(4)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert runtime.store.best() in (2, 3)


def test_without_a_probe_no_checkpoint_is_the_best(train_run, config, tmp_path):
    runtime = LocalRuntime(tmp_path)

    train_run(runtime, train=config.train.replace(steps=2, probe_prompts=0))

    assert kept(runtime) == [0, 2]
    assert runtime.store.best() is None
    assert [stats.probe_score for stats in runtime.logged] == [None, None]


def test_the_state_of_a_checkpoint_is_independent_of_the_number_of_workers(uninterrupted, config):
    state = unpack_folder(uninterrupted.store.newest().files, checkpoint.read_state)

    assert state.keys() == {"format", "version", "step", "seed", "kl_coef", "config"}
    assert state["step"] == 5
    assert state["config"] == config.to_dict()


def test_a_checkpoint_is_restored_from_disk(config, make_policy, make_rollout, tmp_path):
    policy, other = (make_policy(seed=seed, critic="detached") for seed in (0, 1))
    learner, restored = (Learner(p, config.ppo, seed=0) for p in (policy, other))
    rollout = make_rollout(policy, 8)
    learner.update(rollout, learner.targets(rollout), step=0)
    learner.kl_coef = 0.123
    numbers = {f.name: 0.5 for f in dataclasses.fields(UpdateStats)}
    stats = UpdateStats(**(numbers | {"step": 7, "terms": {"word_count": 2.0}}))

    checkpoint.write(tmp_path, policy, learner, config, 7, history=[stats])
    step, history = checkpoint.read(tmp_path, other, restored)

    assert (step, restored.kl_coef) == (7, 0.123)
    assert history == [stats]
    states = (learner.optimiser_state(), restored.optimiser_state())
    for one, two in ((policy.trainable(), other.trainable()), states):
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("critic", ["none", "shared"])
def test_a_run_resumed_with_another_critic_keeps_the_policy_and_starts_a_new_value_head(
    config, make_policy, make_rollout, tmp_path, critic
):
    policy = make_policy(critic="detached")
    learner, rollout = Learner(policy, config.ppo, seed=0), make_rollout(policy, 8)
    learner.update(rollout, learner.targets(rollout), step=0)
    checkpoint.write(tmp_path, policy, learner, config, 1)
    other = make_policy(seed=1, critic=critic, randomised=False)
    resumed = Learner(other, config.ppo.replace(critic=critic), seed=0)

    checkpoint.read(tmp_path, other, resumed)

    scores, before = other.score_tokens(rollout.tokens), policy.score_tokens(rollout.tokens)
    assert torch.equal(scores.logprobs, before.logprobs)
    assert before.values.any()
    assert not scores.values.any()
    resumed.update(rollout, resumed.targets(rollout), step=1)


@pytest.mark.parametrize(
    ("saved", "resumed", "kl_coef"),
    [
        ({}, {}, 0.123),
        ({}, {"kl_coef": 0.3}, 0.3),
        ({}, {"kl_controller": "fixed", "adaptive_kl_coef_min": None}, 0.15),
        ({"kl_controller": "fixed", "adaptive_kl_coef_min": None}, {}, 0.15),
    ],
    ids=["same settings", "another kl_coef", "now fixed", "was fixed"],
)
def test_a_run_resumed_with_another_kl_coef_or_controller_starts_from_the_new_one(
    config, make_policy, make_rollout, tmp_path, saved, resumed, kl_coef
):
    policy = make_policy(critic="detached")
    settings = config.replace(ppo=config.ppo.replace(**saved))
    learner, rollout = Learner(policy, settings.ppo, seed=0), make_rollout(policy, 8)
    learner.update(rollout, learner.targets(rollout), step=0)
    learner.kl_coef = 0.123
    checkpoint.write(tmp_path, policy, learner, settings, 1)
    again = Learner(policy, config.ppo.replace(**resumed), seed=0)

    checkpoint.read(tmp_path, policy, again)

    assert again.kl_coef == kl_coef


def test_a_resumed_run_logs_the_kl_coef_it_is_given(train_run, config, tmp_path):
    short = config.train.replace(steps=1, probe_prompts=0)
    train_run(LocalRuntime(tmp_path), train=short)
    resumed = LocalRuntime(tmp_path)

    train_run(resumed, train=short.replace(steps=2), ppo=config.ppo.replace(kl_coef=0.3))

    assert [stats.kl_coef for stats in resumed.logged] == [0.3]


def test_metrics_of_another_version_in_a_checkpoint_are_rejected(
    config, make_policy, make_rollout, tmp_path
):
    policy = make_policy(critic="detached")
    learner = Learner(policy, config.ppo, seed=0)
    rollout = make_rollout(policy, 8)
    learner.update(rollout, learner.targets(rollout), step=0)
    checkpoint.write(tmp_path, policy, learner, config, 1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "value_explained": 0.5}\n')

    with pytest.raises(ValueError, match=r"do not fit this version .*value_explained"):
        checkpoint.read(tmp_path, policy, learner)


def test_a_checkpoint_of_another_format_is_rejected_with_the_version_that_wrote_it(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": 99, "version": "9.9"}))

    with pytest.raises(ValueError, match=r"has format 99; this version reads 2\..*ray-detox 9\.9"):
        checkpoint.read_state(tmp_path)


# ---- what ends a run ---------------------------------------------------------------------------


def test_a_policy_that_differs_from_its_reference_before_training_is_rejected(
    train_run, config, make_policy, tmp_path
):
    moved = make_policy(sampling=config.sampling.model_dump(), critic="detached")
    runtime = LocalRuntime(tmp_path)

    with pytest.raises(
        RuntimeError,
        match=r"the policy differs from its reference by [\d.]+ nats on a token .* rounding",
    ):
        train_run(runtime, policy=moved)

    assert runtime.logged == []


def test_the_start_is_not_judged_by_one_token_in_a_thousand():
    shape = (64, 20)
    zeros, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    ids = torch.ones(shape, dtype=torch.long)
    tokens = TokenBatch(ids, mask, ids, mask, encoder_states=None, limits=None)
    rollout = Rollout(tokens, zeros.clone(), zeros, zeros, torch.zeros(64))
    rollout.logprobs[3, 4] = -5.0

    check_start(rollout, torch.bfloat16)
    rollout.logprobs[7, 0] = -5.0

    with pytest.raises(RuntimeError, match=r"by 5 nats on a token \(quantile 0\.999\)"):
        check_start(rollout, torch.bfloat16)


def test_a_difference_on_a_single_first_token_is_detected(make_policy, make_rollout):
    rollout = make_rollout(make_policy(randomised=False), 8)
    check_start(rollout, torch.float32)
    rollout.ref_logprobs[5, 0] -= 0.01

    with pytest.raises(RuntimeError, match=r"by 0\.01 nats"):
        check_start(rollout, torch.float32)
    check_start(rollout, torch.bfloat16)


def test_a_run_that_starts_from_an_adapter_starts_at_its_reference(
    train_run, config, make_policy, tmp_path
):
    make_policy().save_adapter(tmp_path / "start")
    runtime = LocalRuntime(tmp_path / "run")

    train_run(
        runtime,
        policy=new_policy(
            config.replace(policy=config.policy.replace(adapter=str(tmp_path / "start")))
        ),
        train=TrainConfig(steps=2, workers=1),
    )

    assert runtime.logged[0].kl == pytest.approx(0, abs=1e-3)
    assert runtime.logged[0].ratio == pytest.approx(1, abs=1e-4)


def test_a_score_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    config, rows, tokenizer, reward, tmp_path
):
    class FailingScorer:
        calls = 0

        def submit(self, request):
            pending = reward.submit(request)
            self.calls += 1
            if self.calls > 6:  # two chunks a step: the fourth step
                pending.result().rewards[0] = float("nan")
            return pending

    runtime = LocalRuntime(tmp_path)
    policy = new_policy(config)
    config = config.replace(train=config.train.replace(probe_prompts=0))

    with pytest.raises(NonFiniteError, match="in step 4"):
        train(
            config,
            runtime,
            policy,
            tokenizer,
            FailingScorer(),
            PromptShards(config, rows, pad_id=0),
        )

    assert runtime.store.newest().step == 2
    assert [stats.step for stats in runtime.logged] == [1, 2, 3]


@pytest.mark.parametrize("error", [NonFiniteError, StartError])
def test_a_failure_on_one_worker_is_raised_on_every_worker(two_workers, error):
    def work(rank, total):
        def part():
            if rank == 1:
                raise error("of worker 1")
            return "done"

        runtime = LocalRuntime.__new__(LocalRuntime)
        runtime.sum_over_workers = total
        assert on_all_workers(runtime, torch.device("cpu"), lambda: rank) == rank
        with pytest.raises(error) as raised:
            on_all_workers(runtime, torch.device("cpu"), part)
        return str(raised.value)

    other, own = two_workers(work)
    assert own == "of worker 1"
    assert "on another worker" in other


def test_a_diverged_run_stops_keeps_earlier_checkpoints_and_stops_again_when_resumed(
    train_run, config, uninterrupted, tmp_path
):
    # The first step whose KL is above that of all earlier ones; two updates have moved the policy.
    kl = [stats.kl for stats in uninterrupted.logged]
    step = next(n for n in range(3, 6) if kl[n - 1] > max(1e-6, *kl[: n - 1]))
    limit = (max(1e-6, *kl[: step - 1]) + kl[step - 1]) / 2
    changes = {
        "ppo": config.ppo.replace(max_kl=limit),
        "train": config.train.replace(probe_every=5, checkpoint_every=1),
    }
    first, resumed, changed = (LocalRuntime(tmp_path) for _ in range(3))

    with pytest.raises(DivergedError, match=f"in step {step}") as stopped:
        train_run(first, **changes)

    assert [stats.step for stats in first.logged] == [*range(1, step + 1)], "its metrics are kept"
    # Two newest ones, and the best, which is the only one measured.
    assert kept(first) == [0, step - 2, step - 1]
    assert first.store.best() == 0
    with pytest.raises(DivergedError) as again:
        train_run(resumed, **changes)
    assert str(again.value) == str(stopped.value)
    assert kept(resumed) == [0, step - 2, step - 1]
    changes["ppo"] = config.ppo.replace(max_kl=1e3)
    assert train_run(changed, **changes) == Outcome(step=5, stopped=False)


def test_a_checkpoint_whose_probe_has_diverged_is_not_kept(train_run, config, tmp_path):
    runtime = LocalRuntime(tmp_path)
    train = config.train.replace(probe_every=1, checkpoint_every=1)

    with pytest.raises(DivergedError, match="in step 1"):
        train_run(runtime, ppo=config.ppo.replace(max_kl=1e-3, learning_rate=0.3), train=train)

    assert runtime.logged[0].kl < 1e-3 < runtime.logged[0].probe_kl
    assert kept(runtime) == [0]


# ---- several workers ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2, 1])
def test_two_workers_with_equal_or_unequal_shares_equal_one_worker(
    config, rows, tokenizer, uninterrupted, two_workers, tmp_path, first
):
    # Loaded before the threads start, because loading a model is not thread-safe.
    policies = [new_policy(config) for _ in range(2)]
    rewards = [Reward(config.reward) for _ in range(2)]
    runtimes = [LocalRuntime(tmp_path / str(rank)) for rank in range(2)]

    def work(rank, total):
        runtimes[rank].rank = 0  # so that both log; otherwise only the worker of rank 0 does
        runtimes[rank].sum_over_workers = total
        own = range(first) if rank == 0 else range(first, SHARDS)
        shards = PromptShards(config, {shard: rows[shard] for shard in own}, pad_id=0)
        return train(config, runtimes[rank], policies[rank], tokenizer, rewards[rank], shards)

    assert two_workers(work) == [Outcome(step=5, stopped=False)] * 2
    alone = metrics_of(uninterrupted)
    for runtime in runtimes:
        for step, found in metrics_of(runtime).items():
            terms = found.pop("terms")
            assert terms == pytest.approx(alone[step]["terms"], rel=1e-3)
            rest = {k: v for k, v in alone[step].items() if k != "terms"}
            not_measured = [k for k, v in rest.items() if v is None]  # no probe in this step
            assert [found.pop(k) or rest.pop(k) for k in not_measured] == [None] * len(not_measured)
            assert found == pytest.approx(rest, rel=1e-2, abs=1e-3)
    final_weights = [
        load(runtime.store.newest().files["adapter/adapter_model.safetensors"])
        for runtime in (runtimes[0], uninterrupted)
    ]
    for name in final_weights[0]:
        assert_close(final_weights[0][name], final_weights[1][name], atol=1e-4, rtol=1e-3)
