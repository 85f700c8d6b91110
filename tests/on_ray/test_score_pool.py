"""The reward in actors: the same scores as in this process, whatever happens to the actors."""

import dataclasses

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
TERMS = (
    RewardTerm(function="on_ray.reward_terms.echo", weight=0.5),
    RewardTerm(function="on_ray.reward_terms.die_once"),
    RewardTerm(function="on_ray.reward_terms.pause"),
    RewardTerm(function="trl.rewards.get_repetition_penalty_reward", arguments={"ngram_size": 2}),
)


def settings(model, terms=TERMS, **more):
    """Small batches, little of the cluster for an actor, and these terms."""
    more = {"batch_size": CHUNK, "cpus_per_actor": 0.1} | more
    return RewardConfig(model=str(model), terms=terms, **more)


@pytest.fixture(scope="module")
def config(tiny_roberta):
    return settings(tiny_roberta, actors=3, reads="prompt+response")


@pytest.fixture(scope="module")
def actors(config):
    """Three actors, of which any test may kill some, to see them come back."""
    started = start_actors(config, gpus=0)
    wait_for_actors(started, timeout_s=240)
    yield started
    for actor in started:
        ray.kill(actor)


def batch(**columns):
    """Texts of all lengths, some of them longer than the classifier reads."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 700, TEXTS)
    responses = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in lengths]
    prompts = [f"prompt {i}" for i in range(TEXTS)]
    ids = [[i] * (i % 5) for i in range(TEXTS)]
    usual = {"facts": ["f" * i for i in range(TEXTS)], "marker": [""] * TEXTS}
    return prompts, responses, ids, usual | {"seconds": [0.0] * TEXTS} | columns


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


@pytest.mark.parametrize("count", [1, 2, 3])
def test_actors_score_as_this_process_does_whatever_their_number(config, actors, count):
    expected = in_this_process(config, *batch())

    found = RewardClient(actors[:count], config).submit(*batch()).result()

    assert_equal(found, expected)
    assert set(found.terms) == {term.name for term in TERMS}
    assert found.terms["echo"][7] == np.float32(len(batch()[1][7]) + 0.007)
    assert found.terms["get_repetition_penalty_reward"][4] == np.float32(-2 / 3)
    assert 0 < found.truncated.sum() < TEXTS


def test_all_actors_take_part(config, actors):
    before = texts_scored(actors)

    RewardClient(actors, config).submit(*batch()).result()

    shares = [now - then for now, then in zip(texts_scored(actors), before, strict=True)]
    assert sum(shares) == TEXTS
    assert min(shares) >= CHUNK


def test_batches_that_are_scored_at_the_same_time_keep_their_order(config, actors):
    client = RewardClient(actors, config)
    prompts, responses, ids, columns = batch()

    waiting = [
        client.submit(
            prompts[i:], responses[i:], ids[i:], {name: c[i:] for name, c in columns.items()}
        )
        for i in range(4)
    ]
    found = [pending.result() for pending in reversed(waiting)][::-1]

    for i, scores in enumerate(found):
        assert len(scores.logits) == TEXTS - i
        np.testing.assert_allclose(scores.logits, found[0].logits[i:], atol=1e-5)
        np.testing.assert_array_equal(scores.terms["echo"], found[0].terms["echo"][i:])


@pytest.mark.parametrize("count", [1, 2])
def test_an_actor_that_dies_while_it_scores_loses_nothing(config, actors, tmp_path, count):
    marks = [str(tmp_path / "died") if i == 20 else "" for i in range(TEXTS)]

    found = RewardClient(actors[:count], config).submit(*batch(marker=marks)).result()

    assert (tmp_path / "died").exists()
    assert_equal(found, in_this_process(config, *batch(marker=marks)))


def test_an_actor_that_is_killed_while_texts_wait_for_it_loses_nothing(config, actors):
    slow = batch(seconds=[0.1] * TEXTS)

    pending = RewardClient(actors, config).submit(*slow)
    ray.kill(actors[0], no_restart=False)

    assert_equal(pending.result(), in_this_process(config, *slow))


def test_an_actor_that_is_gone_for_good_is_done_without(config, actors):
    gone = start_actors(config, gpus=0)[0]
    ray.kill(gone)

    found = RewardClient([gone, *actors[1:]], config).submit(*batch()).result()

    assert_equal(found, in_this_process(config, *batch()))


def test_no_actor_at_all_is_an_error_of_one_line_once_the_deadline_has_passed(tiny_roberta):
    config = settings(tiny_roberta, actors=2, deadline_s=1.0)
    actors = start_actors(config, gpus=0)
    for actor in actors:
        ray.kill(actor)

    with pytest.raises(RewardError) as caught:
        RewardClient(actors, config).submit(*batch()).result()

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "of 2 gave no scores for 8 texts within 1 s (reward.deadline_s)" in sentence
    assert "Add actors, or raise the deadline" in sentence


def test_an_actor_that_hangs_is_an_error_of_one_line_once_the_deadline_has_passed(config, actors):
    impatient = dataclasses.replace(config, deadline_s=0.5)

    with pytest.raises(RewardError) as caught:
        RewardClient(actors, impatient).submit(*batch(seconds=[2.0] * TEXTS)).result()

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "of 3 gave no scores for 8 texts within 0.5 s (reward.deadline_s)" in sentence


def test_actors_that_the_cluster_has_no_room_for_are_an_error_of_one_line(tiny_roberta):
    config = settings(tiny_roberta, actors=2, cpus_per_actor=1000)
    actors = start_actors(config, gpus=0)

    with pytest.raises(RewardError) as caught:
        wait_for_actors(actors, timeout_s=0.5)

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "2 of 2 reward actors did not come up within 0.5 s" in sentence
    assert "reward.cpus_per_actor" in sentence


def test_an_actor_that_cannot_start_is_an_error_of_one_line(tiny_roberta):
    actors = start_actors(settings(tiny_roberta, (RewardTerm(function="nowhere.f"),)), gpus=0)

    with pytest.raises(RewardError) as caught:
        wait_for_actors(actors, timeout_s=120)

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "A reward actor could not start" in sentence
    assert "nowhere.f cannot be imported" in sentence


def test_an_actor_says_where_it_is(config, actors):
    for about in wait_for_actors(actors, timeout_s=60):
        assert about["device"] == "cpu"
        assert about["max_tokens"] == 512
        assert about["node"] == ray.get_runtime_context().get_node_id()[:8]
        assert about["peak_mb"] > 0
