"""The reward in actors: the same scores as in this process, whatever happens to the actors."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import ray

from ray_detox.config import RewardConfig, RewardTerm, RunConfig, ServingConfig
from ray_detox.records import RewardError, ScoreRequest, Scores
from ray_detox.rewards.reward import Reward
from ray_detox.stages.rewards.client import RewardClient
from ray_detox.stages.rewards.directory import RewardDirectory
from ray_detox.stages.rewards.pool import RewardPool

pytestmark = pytest.mark.ray

TEXTS = 50
CHUNK = 8
TERMS = (
    RewardTerm(function="on_ray.reward_terms.echo", weight=0.5),
    RewardTerm(function="on_ray.reward_terms.die_once"),
    RewardTerm(function="on_ray.reward_terms.hang_once"),
    RewardTerm(function="on_ray.reward_terms.pause"),
    RewardTerm(function="trl.rewards.get_repetition_penalty_reward", arguments={"ngram_size": 2}),
)


def settings(model, terms=TERMS, **more):
    """Small batches, little of the cluster for an actor, and these terms."""
    reward = RewardConfig(model=str(model), terms=terms, batch_size=CHUNK, input="prompt+response")
    serving = ServingConfig(cpus_per_actor=0.1)
    return changed(RunConfig(reward=reward, serving=serving), **more)


def changed(config, **settings):
    """A run with other settings of its reward and of how that is served."""
    of_reward = {k: v for k, v in settings.items() if k in RewardConfig.model_fields}
    of_serving = {k: v for k, v in settings.items() if k not in of_reward}
    return config.replace(
        reward=config.reward.replace(**of_reward), serving=config.serving.replace(**of_serving)
    )


@pytest.fixture(scope="module")
def config(tiny_roberta):
    return settings(tiny_roberta, actors=3, heartbeat_timeout_s=4.0)


@pytest.fixture(scope="module")
def pool(config):
    """Three actors, of which any test may kill some, to see them come back."""
    with contextlib.closing(RewardPool(config, 0.0)) as started:
        started.wait(timeout_s=240)
        yield started


def batch(**columns):
    """Texts of all lengths, some of them longer than the classifier reads."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 700, TEXTS)
    responses = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in lengths]
    prompts = [f"prompt {i:02}" for i in range(TEXTS)]
    ids = [[i] * (i % 5) for i in range(TEXTS)]
    usual = {"facts": ["f" * i for i in range(TEXTS)], "seconds": [0.0] * TEXTS}
    usual |= {"marker": [""] * TEXTS, "hang": [""] * TEXTS}
    return ScoreRequest(prompts, responses, ids, usual | columns)


@pytest.fixture(scope="module")
def expected(config):
    """Scores of the usual batch: its chunks by length, one after another in this process."""
    reward = Reward(config.reward)
    order = sorted(range(TEXTS), key=lambda i: len(batch().responses[i]))
    chunks = [order[i : i + CHUNK] for i in range(0, TEXTS, CHUNK)]
    scores = Scores.concatenate([reward(batch().select(rows)) for rows in chunks])
    return scores.select(np.argsort(order))


def assert_equal(found, expected):
    for name in ("rewards", "logits", "toxicity", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert found.terms.keys() == expected.terms.keys()
    for name, values in expected.terms.items():
        np.testing.assert_array_equal(found.terms[name], values, err_msg=name)


@contextlib.contextmanager
def directory_of(pool, numbers):
    """A list of some of the pool's actors: what a smaller pool would publish."""
    pool.wait(timeout_s=240)
    directory = RewardDirectory.remote()
    listings = [one for one in pool._listed if int(one.name.split()[-1]) in numbers]
    ray.get(directory.publish.remote(1, listings))
    yield directory
    ray.kill(directory)


def score(directory, config, request):
    with contextlib.closing(RewardClient(directory, config)) as client:
        return client.submit(request).result()


def wait_until(so, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def all_up(pool):
    figures = pool.metrics()
    return figures["actors"] == figures["wanted"]


# ---- the same scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_actors_score_as_this_process_does_whatever_their_number(config, pool, expected, count):
    with directory_of(pool, range(count)) as directory:
        found = score(directory, config, batch())

    assert_equal(found, expected)
    assert set(found.terms) == {term.name for term in TERMS}
    assert found.terms["echo"][7] == np.float32(len(batch()[1][7]) + 0.007)
    assert found.terms["get_repetition_penalty_reward"][4] == np.float32(-2 / 3)
    assert 0 < found.truncated.sum() < TEXTS


def test_all_actors_take_part_and_say_where_they_are(config, pool):
    wait_until(lambda: all_up(pool))
    before = [about["texts"] for about in pool.describe()]

    score(pool.directory, config, batch())

    after = pool.describe()
    shares = [about["texts"] - then for about, then in zip(after, before, strict=True)]
    assert sum(shares) == TEXTS
    assert min(shares) >= CHUNK
    for about in after:
        assert about["device"] == "cpu"
        assert about["max_tokens"] == 512
        assert about["node"] == ray.get_runtime_context().get_node_id()[:8]
        assert about["peak_mb"] > 0


def test_batches_that_are_scored_at_the_same_time_keep_their_order(config, pool, expected):
    with contextlib.closing(RewardClient(pool.directory, config)) as client:
        waiting = [client.submit(batch().select(range(i, TEXTS))) for i in range(4)]
        found = [pending.result() for pending in reversed(waiting)][::-1]

    for i, scores in enumerate(found):
        np.testing.assert_allclose(scores.logits, expected.logits[i:], atol=1e-5)
        np.testing.assert_array_equal(scores.terms["echo"], expected.terms["echo"][i:])


def test_two_clients_share_the_actors(config, pool, expected):
    with (
        contextlib.closing(RewardClient(pool.directory, config)) as one,
        contextlib.closing(RewardClient(pool.directory, config)) as other,
    ):
        found = [client.submit(batch()) for client in (one, other, one)]

        for pending in found:
            assert_equal(pending.result(), expected)


def test_an_actor_has_no_more_than_two_chunks_of_a_client(config, pool):
    def held():
        return [about["held"] for about in pool.describe()]

    with (
        directory_of(pool, [0]) as directory,
        contextlib.closing(RewardClient(directory, config)) as client,
    ):
        pending = client.submit(batch(seconds=[0.05] * TEXTS))
        seen = [held()]
        while not pending.scores.done():
            seen.append(held())

    assert CHUNK < max(held[0] for held in seen) <= 2 * CHUNK
    assert max(held[1] for held in seen) == 0


# ---- what befalls the actors -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_actors_that_die_every_few_chunks_lose_nothing(config, pool, expected, tmp_path, count):
    order = np.argsort([len(text) for text in batch()[1]], kind="stable")
    marks = [""] * TEXTS
    for i in range(count):
        marks[order[2 * i * CHUNK]] = str(tmp_path / f"died {i}")
    before = pool.metrics()

    with directory_of(pool, range(count)) as directory:
        found = score(directory, config, *batch(marker=marks))

    assert {path.name for path in tmp_path.iterdir()} == {f"died {i}" for i in range(count)}
    assert_equal(found, expected)
    wait_until(lambda: all_up(pool))
    assert pool.metrics()["restarts"] > before["restarts"]


def test_an_actor_that_is_gone_for_good_is_done_without_and_replaced(config, pool, expected):
    wait_until(lambda: all_up(pool))
    lost = pool.metrics()["lost"]

    with contextlib.closing(RewardClient(pool.directory, config)) as client:
        pending = client.submit(batch(seconds=[0.1] * TEXTS))
        ray.kill(pool._actors[1].handle)
        found = pending.result()

    np.testing.assert_array_equal(found.logits, expected.logits)
    wait_until(lambda: pool.metrics()["lost"] == lost + 1 and all_up(pool))
    assert len(pool.describe()) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_an_actor_that_hangs_is_done_without_or_started_again(
    config, pool, expected, tmp_path, count
):
    impatient = changed(config, heartbeat_timeout_s=1.0)
    wait_until(lambda: all_up(pool))
    before = pool.metrics()
    hang = [str(tmp_path / "hung") if i == 20 else "" for i in range(TEXTS)]

    with directory_of(pool, range(count)) as directory:
        try:
            found = score(directory, impatient, batch(hang=hang))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((tmp_path / "hung").read_text()), signal.SIGCONT)

    assert_equal(found, expected)
    if count == 1:
        assert pool.metrics()["restarts"] > before["restarts"]


def test_figures_tell_of_what_was_sent_again(config, pool, expected, tmp_path):
    wait_until(lambda: all_up(pool))
    before = pool.metrics()
    marks = [str(tmp_path / "died") if i == 20 else "" for i in range(TEXTS)]

    with contextlib.closing(RewardClient(pool.directory, config)) as client:
        found = client.submit(batch(marker=marks)).result()
        wait_until(lambda: pool.metrics()["resent"] > before["resent"])

    assert_equal(found, expected)
    wait_until(lambda: all_up(pool))
    figures = pool.metrics()
    assert set(figures) == set("actors wanted waiting in_flight resent restarts lost".split())
    assert (figures["actors"], figures["wanted"], figures["waiting"]) == (3, 3, 0)
    assert figures["restarts"] > before["restarts"]


def test_an_error_of_the_scoring_reaches_the_caller_as_it_is(config, pool):
    without_facts = batch()
    del without_facts.columns["facts"]

    with pytest.raises(TypeError, match="facts"):
        score(pool.directory, config, without_facts)


# ---- deadlines, and actors that do not come ----------------------------------------------------


def test_a_deadline_is_an_error_of_one_line_that_names_the_actor_and_its_node(config, pool):
    impatient = changed(config, timeout_s=0.5)
    node = ray.get_runtime_context().get_node_id()[:8]

    with directory_of(pool, [2]) as directory, pytest.raises(RewardError) as caught:
        score(directory, impatient, batch(seconds=[2.0] * TEXTS))

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "of 50 texts within 0.5 s (serving.timeout_s): reward actor" in sentence
    assert f"on node {node} " in sentence
    assert "Add actors (reward.actors), or raise the deadline." in sentence


def test_actors_that_the_cluster_has_no_room_for_are_an_error_of_one_line(tiny_roberta):
    config = settings(tiny_roberta, actors=2, cpus_per_actor=1000, timeout_s=2.0)
    with contextlib.closing(RewardPool(config, 0.0)) as pool:
        with pytest.raises(RewardError) as caught:
            pool.wait(timeout_s=0.5)
        wait_until(lambda: ray.get(pool.directory.sync.remote("", -1, 0, 0))[1])
        with pytest.raises(RewardError) as waited:
            score(pool.directory, config, batch())
        figures = pool.metrics()

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "2 of 2 reward actors did not come up within 0.5 s" in sentence
    assert "serving.cpus_per_actor" in sentence
    assert "reward actor 0 on no node yet has not come up yet" in str(waited.value)
    assert (figures["actors"], figures["wanted"]) == (0, 2)


def test_an_actor_that_cannot_start_is_an_error_of_one_line(tiny_roberta):
    config = settings(tiny_roberta, (RewardTerm(function="nowhere.f"),))
    with contextlib.closing(RewardPool(config, 0.0)) as pool, pytest.raises(RewardError) as caught:
        pool.wait(timeout_s=120)

    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "A reward actor could not start" in sentence
    assert "nowhere.f cannot be imported" in sentence


# ---- their number ------------------------------------------------------------------------------


def test_actors_come_with_the_load_and_go_without_it_and_change_no_score(config, expected):
    moving = changed(config, actors="1..2", upscale_delay_s=0.4, downscale_delay_s=1.0)
    with (
        contextlib.closing(RewardPool(moving, 0.0)) as pool,
        contextlib.closing(RewardClient(pool.directory, moving)) as client,
    ):
        pool.wait(timeout_s=240)
        load = [client.submit(batch(seconds=[0.2] * TEXTS)) for _ in range(3)]
        wait_until(lambda: pool.metrics()["wanted"] == 2)
        while pool.metrics()["actors"] < 2:
            load.append(client.submit(batch(seconds=[0.2] * TEXTS)))
            load[-2].result()
        found = [pending.result() for pending in load]
        wait_until(lambda: pool.metrics()["wanted"] == 1)
        found.append(client.submit(batch(seconds=[0.0] * TEXTS)).result())
        wait_until(lambda: len(pool._actors) == 1)
        found.append(client.submit(batch(seconds=[0.0] * TEXTS)).result())
        lost = pool.metrics()["lost"]

    for scores in found:
        assert_equal(scores, expected)
    assert lost == 0


def test_shrinking_takes_back_at_once_what_has_not_come(config):
    moving = changed(config, actors="1..3", cpus_per_actor=1000)
    with contextlib.closing(RewardPool(moving, 0.0)) as pool:
        with pool._lock:
            pool._wanted = 3
        wait_until(lambda: len(pool._actors) == 3)

        pool.shrink()

        assert len(pool._actors) == 1
        assert pool.metrics()["wanted"] == 1


def test_an_actor_whose_node_has_gone_comes_up_elsewhere(config):
    one = changed(config, actors=1)
    with contextlib.closing(RewardPool(one, 0.0, [ray.NodeID.from_random().hex()])) as pool:
        (about,) = pool.wait(timeout_s=240)

    assert about["node"] == ray.get_runtime_context().get_node_id()[:8]


def test_across_workers_texts_share_forward_passes(config, expected):
    shared = changed(
        config, actors=1, batch_across_workers=True, batch_wait_ms=500.0, max_batch_tokens=10_000
    )
    with contextlib.closing(RewardPool(shared, 0.0)) as pool:
        pool.wait(timeout_s=240)

        found = score(pool.directory, shared, batch())

        passes = pool.describe()[0]["passes"]
    np.testing.assert_allclose(found.rewards, expected.rewards, atol=1e-5)
    np.testing.assert_allclose(found.toxicity, expected.toxicity, atol=1e-5)
    assert passes < -(-TEXTS // CHUNK)
