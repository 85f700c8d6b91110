"""Reward actors: the same scores as in this process, whatever happens to the actors."""

import contextlib
import dataclasses
import os
import signal
import time

import numpy as np
import pytest
import ray

from ray_detox.config import ConfigError, RewardConfig, RewardTerm, RunConfig, ServingConfig
from ray_detox.records import PreparedRow, RewardError, ScoreRequest, Scores
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
    """A run with small batches and actors that take a tenth of a CPU."""
    reward = RewardConfig(model=str(model), terms=terms, batch_size=CHUNK, input="prompt+response")
    serving = ServingConfig(cpus_per_actor=0.1)
    return changed(RunConfig(reward=reward, serving=serving), **more)


def changed(config, **settings):
    """A run with other settings in its sections `reward` and `serving`."""
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
    """Three actors; tests may kill some and wait until they are back."""
    with contextlib.closing(RewardPool(config, 0.0)) as started:
        started.wait(timeout_s=600)
        yield started


def batch(**columns):
    """Texts of many lengths, some longer than the classifier reads."""
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
    """Scores of the usual batch, in the same chunks, computed in this process."""
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
    """A directory of some of the pool's actors, as a smaller pool would publish it."""
    pool.wait(timeout_s=240)
    directory = RewardDirectory.remote()
    actors = [info for info in pool._listed if int(info.name.split()[-1]) in numbers]
    ray.get(directory.publish.remote(1, actors))
    yield directory
    ray.kill(directory)


def score(directory, config, request):
    with contextlib.closing(RewardClient(directory, config)) as client:
        return client.submit(request).result()


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {timeout_s} s"
        time.sleep(0.05)


def all_up(pool):
    metrics = pool.metrics()
    return metrics.actors == metrics.wanted


# ---- the same scores ---------------------------------------------------------------------------


def test_an_actor_tries_the_reward_on_sentences_with_a_row_of_the_data(pool):
    columns = {"facts": "f", "seconds": 0.0, "marker": "", "hang": ""}
    row = PreparedRow("0", "a prompt", [1], columns, 0, ())

    with pytest.raises(ConfigError, match=r"The toxicity that .* measures is .* for insults"):
        pool.check(row)  # the weights of this classifier are random
    with pytest.raises(ConfigError, match=r"reward\.terms: echo failed on 4 sample responses"):
        pool.check(dataclasses.replace(row, columns={}))

    assert {report.state.texts for report in pool.describe()} == {0}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_actors_scores_as_this_process_does(config, pool, expected, count):
    with directory_of(pool, range(count)) as directory:
        found = score(directory, config, batch())

    assert_equal(found, expected)
    assert set(found.terms) == {term.name for term in TERMS}
    assert found.terms["echo"][7] == np.float32(len(batch().responses[7]) + 0.007)
    assert found.terms["get_repetition_penalty_reward"][4] == np.float32(-2 / 3)
    assert 0 < found.truncated.sum() < TEXTS


def test_all_actors_get_chunks_and_report_where_they_are(config, pool):
    wait_until(lambda: all_up(pool))
    before = [report.state.texts for report in pool.describe()]

    score(pool.directory, config, batch())

    after = pool.describe()
    shares = [report.state.texts - then for report, then in zip(after, before, strict=True)]
    assert sum(shares) == TEXTS
    assert min(shares) >= CHUNK
    for report in after:
        assert report.device == "cpu"
        assert report.max_tokens == 512
        assert report.node == ray.get_runtime_context().get_node_id()[:8]
        assert report.peak_mb > 0


def test_concurrent_batches_keep_the_order_of_their_texts(config, pool, expected):
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


def test_an_actor_holds_at_most_two_chunks_of_a_client(config, pool):
    def held():
        return [report.state.held for report in pool.describe()]

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


# ---- failures of actors ------------------------------------------------------------------------


def deaths(folder, count):
    """The column `marker` of texts in `count` chunks, each of which kills the actor that scores it."""
    order = np.argsort([len(text) for text in batch().responses], kind="stable")
    marks = [""] * TEXTS
    for i in range(count):
        marks[order[2 * i * CHUNK]] = str(folder / f"died {i}")
    return marks


def test_an_only_actor_that_dies_after_some_chunks_loses_no_scores(
    config, pool, expected, tmp_path
):
    before = pool.metrics()

    with directory_of(pool, [0]) as directory:
        found = score(directory, config, batch(marker=deaths(tmp_path, 1)))

    assert [path.name for path in tmp_path.iterdir()] == ["died 0"]
    assert_equal(found, expected)
    wait_until(lambda: all_up(pool))
    assert pool.metrics().restarts > before.restarts
    pool.check_scoring()  # the actor died with scores in between


def test_actors_that_die_lose_no_scores_and_metrics_count_chunks_that_were_sent_again(
    config, pool, expected, tmp_path
):
    wait_until(lambda: all_up(pool))
    before = pool.metrics()

    with contextlib.closing(RewardClient(pool.directory, config)) as client:
        found = client.submit(batch(marker=deaths(tmp_path, 3))).result()
        wait_until(lambda: pool.metrics().resent > before.resent)

    assert {path.name for path in tmp_path.iterdir()} == {f"died {i}" for i in range(3)}
    assert_equal(found, expected)
    # The directory keeps the last report of a client for some seconds.
    wait_until(lambda: all_up(pool) and pool.metrics().waiting == 0)
    metrics = pool.metrics()
    names = set("actors wanted waiting in_flight resent restarts lost".split())
    assert set(dataclasses.asdict(metrics)) == names
    assert (metrics.actors, metrics.wanted, metrics.waiting) == (3, 3, 0)
    assert metrics.restarts > before.restarts
    pool.check_scoring()


def test_texts_that_kill_each_actor_end_scoring_with_a_one_line_error(config, tmp_path):
    arguments = {"file": str(tmp_path / "calls"), "calls": 2}
    deadly = RewardTerm(function="on_ray.reward_terms.Mortal", arguments=arguments)
    fragile = changed(config, actors=1, terms=(deadly,), max_actor_deaths=2)
    with (
        contextlib.closing(RewardPool(fragile, 0.0)) as pool,
        contextlib.closing(RewardClient(pool.directory, fragile)) as client,
    ):
        pool.wait(timeout_s=240)
        client.submit(batch().select(range(CHUNK))).result()
        pool.check_scoring()
        client.submit(batch().select(range(CHUNK, 3 * CHUNK)))
        wait_until(lambda: pool._failure is not None)
        with pytest.raises(RewardError) as caught:
            pool.check_scoring()
        deaths = pool.metrics().restarts

    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "Reward actors died 2 times in a row while they scored the same texts"
    )
    assert "ray-detox check" in message
    assert deaths >= 2  # with a fast start, the actor has died again meanwhile


def test_an_actor_that_is_dead_for_good_is_replaced_and_no_scores_are_lost(config, pool, expected):
    wait_until(lambda: all_up(pool))
    lost = pool.metrics().lost

    with contextlib.closing(RewardClient(pool.directory, config)) as client:
        pending = client.submit(batch(seconds=[0.1] * TEXTS))
        ray.kill(pool._actors[1].handle)
        found = pending.result()

    np.testing.assert_array_equal(found.logits, expected.logits)
    wait_until(lambda: pool.metrics().lost == lost + 1 and all_up(pool))
    assert len(pool.describe()) == 3
    pool.check_scoring()


@pytest.mark.parametrize("count", [1, 3])
def test_chunks_of_an_actor_that_hangs_are_scored_elsewhere_or_after_its_restart(
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
        assert pool.metrics().restarts > before.restarts


def test_an_error_of_a_term_reaches_the_caller_unchanged(config, pool):
    without_facts = batch()
    del without_facts.columns["facts"]

    with pytest.raises(TypeError, match="facts"):
        score(pool.directory, config, without_facts)


# ---- timeouts, and actors that do not start ----------------------------------------------------


def test_a_timeout_is_a_one_line_error_that_names_the_actor_and_its_node(config, pool):
    impatient = changed(config, timeout_s=0.5)
    node = ray.get_runtime_context().get_node_id()[:8]

    with directory_of(pool, [2]) as directory, pytest.raises(RewardError) as caught:
        score(directory, impatient, batch(seconds=[2.0] * TEXTS))

    message = str(caught.value)
    assert "\n" not in message
    assert "of 50 texts within 0.5 s (serving.timeout_s): reward actor" in message
    assert f"on node {node} " in message
    assert "Add actors (reward.actors) or raise serving.timeout_s." in message


def test_actors_that_the_cluster_has_no_resources_for_are_a_one_line_error(tiny_roberta):
    config = settings(tiny_roberta, actors=2, cpus_per_actor=1000, timeout_s=2.0)
    with contextlib.closing(RewardPool(config, 0.0)) as pool:
        with pytest.raises(RewardError) as caught:
            pool.wait(timeout_s=0.5)
        wait_until(lambda: ray.get(pool.directory.sync.remote("", -1, 0, 0, 0)).actors)
        with pytest.raises(RewardError) as waited:
            score(pool.directory, config, batch())
        metrics = pool.metrics()

    message = str(caught.value)
    assert "\n" not in message
    assert "2 of 2 reward actors did not start within 0.5 s" in message
    assert "serving.cpus_per_actor" in message
    assert "reward actor 0 on no node yet has not started yet" in str(waited.value)
    assert (metrics.actors, metrics.wanted) == (0, 2)


def test_an_actor_that_cannot_start_is_a_one_line_error(tiny_roberta):
    config = settings(tiny_roberta, (RewardTerm(function="nowhere.f"),))
    with contextlib.closing(RewardPool(config, 0.0)) as pool, pytest.raises(RewardError) as caught:
        pool.wait(timeout_s=120)

    message = str(caught.value)
    assert "\n" not in message
    assert "A reward actor could not start" in message
    assert "nowhere.f cannot be imported" in message


# ---- scaling -----------------------------------------------------------------------------------


def test_the_pool_follows_the_load_and_scores_stay_the_same(config, expected):
    moving = changed(config, actors="1..2", upscale_delay_s=0.4, downscale_delay_s=1.0)
    with (
        contextlib.closing(RewardPool(moving, 0.0)) as pool,
        contextlib.closing(RewardClient(pool.directory, moving)) as client,
    ):
        pool.wait(timeout_s=240)
        load = [client.submit(batch(seconds=[0.2] * TEXTS)) for _ in range(3)]
        wait_until(lambda: pool.metrics().wanted == 2)
        while pool.metrics().actors < 2:
            load.append(client.submit(batch(seconds=[0.2] * TEXTS)))
            load[-2].result()
        found = [pending.result() for pending in load]
        wait_until(lambda: pool.metrics().wanted == 1)
        found.append(client.submit(batch(seconds=[0.0] * TEXTS)).result())
        wait_until(lambda: len(pool._actors) == 1)
        found.append(client.submit(batch(seconds=[0.0] * TEXTS)).result())
        lost = pool.metrics().lost

    for scores in found:
        assert_equal(scores, expected)
    assert lost == 0


def test_shrink_removes_actors_that_have_not_started_at_once(config):
    moving = changed(config, actors="1..3", cpus_per_actor=1000)
    with contextlib.closing(RewardPool(moving, 0.0)) as pool:
        with pool._lock:
            pool._wanted = 3
        wait_until(lambda: len(pool._actors) == 3)

        pool.shrink()

        assert len(pool._actors) == 1
        assert pool.metrics().wanted == 1


@pytest.fixture(scope="module")
def sharing(config):
    """A pool of one actor with batches of several chunks, to start on a node that no longer exists."""
    settings = changed(
        config, actors=1, batch_across_workers=True, batch_wait_ms=500.0, max_batch_tokens=10_000
    )
    gone = ray.NodeID.from_random().hex()
    with contextlib.closing(RewardPool(settings, 0.0, [gone])) as pool:
        yield settings, pool


def test_an_actor_whose_node_is_gone_starts_on_another(sharing):
    (report,) = sharing[1].wait(timeout_s=240)

    assert report.node == ray.get_runtime_context().get_node_id()[:8]


def test_texts_share_forward_passes_with_batch_across_workers(sharing, expected):
    settings, pool = sharing
    pool.wait(timeout_s=240)
    before = pool.describe()[0].state.passes

    found = score(pool.directory, settings, batch())

    passes = pool.describe()[0].state.passes - before
    np.testing.assert_allclose(found.rewards, expected.rewards, atol=1e-5)
    np.testing.assert_allclose(found.toxicity, expected.toxicity, atol=1e-5)
    assert 0 < passes < -(-TEXTS // CHUNK)
