"""The reward in actors: the same scores as in this process, whatever happens to the actors."""

import numpy as np
import pytest
import ray

from ray_detox.config import RewardConfig, RewardTerm
from ray_detox.records import Scores
from ray_detox.reward import Reward
from ray_detox.stages.score import RewardClient, RewardError, start_actors, wait_for_actors

pytestmark = pytest.mark.ray

TEXTS = 50
CHUNK = 8


@pytest.fixture
def settings(tiny_roberta):
    """`settings(function, ...)`: small batches, and these functions as terms."""

    def make(*functions, **more):
        more = {"model": str(tiny_roberta), "batch_size": CHUNK, "cpus_per_actor": 0.1} | more
        return RewardConfig(
            terms=tuple(RewardTerm(function=f, weight=0.5) for f in functions), **more
        )

    return make


@pytest.fixture
def pool():
    """`pool(config)`: that many actors, loaded; they end with the test."""
    started = []

    def make(config):
        actors = start_actors(config, gpus=0)
        started.extend(actors)
        wait_for_actors(actors, timeout_s=120)
        return actors

    yield make
    for actor in started:
        ray.kill(actor)


def batch(**columns):
    """Texts of all lengths, some of them longer than the classifier reads."""
    rng = np.random.default_rng(0)
    responses = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in
                 rng.integers(0, 700, TEXTS)]  # fmt: skip
    prompts = [f"prompt {i}" for i in range(TEXTS)]
    ids = [[i] * (i % 5) for i in range(TEXTS)]
    return prompts, responses, ids, columns


def in_this_process(config, prompts, responses, ids, columns):
    """Scores of the same chunks, one after another."""
    reward = Reward(config)
    return Scores.concatenate(
        [
            reward(prompts[at], responses[at], ids[at], {n: c[at] for n, c in columns.items()})
            for at in (slice(i, i + CHUNK) for i in range(0, TEXTS, CHUNK))
        ]
    )


def assert_equal(found, expected):
    for name in ("rewards", "logits", "toxicity", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.terms.keys() == expected.terms.keys()
    for name, values in expected.terms.items():
        np.testing.assert_array_equal(found.terms[name], values, err_msg=name)


def texts_scored(actors):
    return [about["texts"] for about in wait_for_actors(actors, timeout_s=60)]


def test_actors_score_as_this_process_does_whatever_their_number(settings, pool):
    columns = {"facts": ["f" * i for i in range(TEXTS)], "summary": ["s"] * TEXTS}
    config = settings(
        "on_ray.reward_terms.echo", "trl.rewards.think_format_reward", reads="prompt+response"
    )
    asked = batch(**columns)
    actors = pool(settings(*(t.function for t in config.terms), reads=config.reads, actors=3))
    expected = in_this_process(config, *asked)

    for count in (1, 3):
        client = RewardClient(actors[:count], config)
        assert_equal(client.submit(*asked).result(), expected)

    assert expected.terms["echo"][7] == np.float32(len(asked[1][7]) + 0.007)
    assert set(expected.terms) == {"echo", "think_format_reward"}
    assert 0 < expected.truncated.sum() < TEXTS


def test_all_actors_take_part(settings, pool):
    config = settings(actors=2)
    actors = pool(config)

    RewardClient(actors, config).submit(*batch()).result()

    first, second = texts_scored(actors)
    assert first + second == TEXTS
    assert min(first, second) >= TEXTS // 2 - CHUNK


def test_batches_that_wait_together_keep_their_order(settings, pool):
    config = settings(actors=2)
    client = RewardClient(pool(config), config)
    prompts, responses, ids, _ = batch()

    waiting = [client.submit(prompts[i:], responses[i:], ids[i:], {}) for i in range(4)]
    found = [pending.result() for pending in reversed(waiting)]

    whole = found[-1]
    for i, scores in enumerate(reversed(found)):
        assert len(scores.logits) == TEXTS - i
        np.testing.assert_allclose(scores.logits, whole.logits[i:], atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_an_actor_that_dies_while_it_scores_loses_nothing(settings, pool, tmp_path, count):
    config = settings("on_ray.reward_terms.die_once", actors=count)
    marks = [str(tmp_path / "died") if i == 20 else "" for i in range(TEXTS)]
    actors = pool(config)

    found = RewardClient(actors, config).submit(*batch(marker=marks)).result()

    assert (tmp_path / "died").exists()
    assert_equal(found, in_this_process(config, *batch(marker=marks)))


def test_an_actor_that_is_killed_while_others_wait_loses_nothing(settings, pool):
    config = settings("on_ray.reward_terms.pause", actors=2)
    seconds = [0.1] * TEXTS
    actors = pool(config)

    pending = RewardClient(actors, config).submit(*batch(seconds=seconds))
    ray.kill(actors[0], no_restart=False)

    assert_equal(pending.result(), in_this_process(config, *batch(seconds=seconds)))


def test_an_actor_that_is_gone_for_good_is_done_without(settings, pool):
    config = settings(actors=2)
    actors = pool(config)
    ray.kill(actors[0])

    found = RewardClient(actors, config).submit(*batch()).result()

    assert_equal(found, in_this_process(config, *batch()))


def test_no_actor_at_all_is_an_error_of_one_line_once_the_deadline_has_passed(settings, pool):
    config = settings(actors=2, deadline_s=1.0)
    actors = pool(config)
    for actor in actors:
        ray.kill(actor)

    with pytest.raises(RewardError) as caught:
        RewardClient(actors, config).submit(*batch()).result()

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "of 2 gave no scores for 8 texts within 1 s (reward.deadline_s)" in sentence
    assert "Add actors, or raise the deadline" in sentence


def test_an_actor_that_hangs_is_an_error_of_one_line_once_the_deadline_has_passed(settings, pool):
    config = settings("on_ray.reward_terms.pause", deadline_s=1.0)

    with pytest.raises(RewardError) as caught:
        RewardClient(pool(config), config).submit(*batch(seconds=[60.0] * TEXTS)).result()

    assert "gave no scores for 8 texts within 1 s (reward.deadline_s): GetTimeoutError" in str(
        caught.value
    )


def test_actors_that_the_cluster_has_no_room_for_are_an_error_of_one_line(settings):
    actors = start_actors(settings(cpus_per_actor=1000, actors=2), gpus=0)

    with pytest.raises(RewardError) as caught:
        wait_for_actors(actors, timeout_s=0.5)

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "2 of 2 reward actors did not come up within 0.5 s" in sentence
    assert "reward.cpus_per_actor" in sentence


def test_an_actor_says_where_it_is_once_its_model_is_loaded(settings, pool):
    (about,) = wait_for_actors(pool(settings()), timeout_s=60)

    assert about["device"] == "cpu"
    assert about["max_tokens"] == 512
    assert about["texts"] == 0
    assert about["node"]
    assert about["peak_mb"] > 0
