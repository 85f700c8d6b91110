"""Calls of many threads before one model: the same scores, alone or in company."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ray_detox.config import RewardConfig, RewardTerm, ServingConfig
from ray_detox.records import ScoreRequest
from ray_detox.rewards.batching import ModelThread
from ray_detox.rewards.reward import Reward

CALLERS = 4


go_on = threading.Event()


def obey(completions, told, **_):
    if "raise" in told:
        raise KeyError("told to")
    if "wait" in told:
        go_on.wait(timeout=60)
    return [float(len(text)) for text in completions]


def reward_of(folder, **changes):
    term = RewardTerm(function=f"{__name__}.obey", weight=0.5)
    return Reward(RewardConfig(model=str(folder), terms=(term,), **changes))


def call_of(caller, told=""):
    responses = [chr(97 + caller) * (7 * caller + i) for i in range(4)]
    return ScoreRequest(["p"] * 4, responses, [[1]] * 4, {"told": [told] * 4})


def score_together(model, told=None):
    """All callers at once: another call holds the model until all of theirs queue before it."""
    go_on.clear()
    with ThreadPoolExecutor(CALLERS + 1) as threads:
        threads.submit(model.score, call_of(0, "wait"))
        while model.state()["passes"] == 0:
            time.sleep(0.001)
        calls = [call_of(i, "raise" if i == told else "") for i in range(CALLERS)]
        futures = [threads.submit(model.score, call) for call in calls]
        while model.state()["held"] < 4 * (CALLERS + 1):
            time.sleep(0.001)
        go_on.set()
    return futures


def test_alone_each_call_has_the_very_bits_of_the_reward(tiny_roberta):
    reward = reward_of(tiny_roberta, batch_size=3)
    expected = [reward(call_of(caller)) for caller in range(CALLERS)]
    model = ModelThread(reward, ServingConfig())

    found = [future.result() for future in score_together(model)]

    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_array_equal(one.toxicity, other.toxicity)
    assert model.state()["passes"] == (CALLERS + 1) * 2


def test_across_workers_scores_differ_by_rounding_and_forward_passes_are_fewer(tiny_roberta):
    reward = reward_of(tiny_roberta)
    serving = ServingConfig(batch_across_workers=True, batch_wait_ms=1000, max_batch_tokens=600)
    expected = [reward(call_of(caller)) for caller in range(CALLERS)]
    model = ModelThread(reward, serving)

    found = [future.result() for future in score_together(model)]

    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-5)
        np.testing.assert_array_equal(one.terms["obey"], other.terms["obey"])
    assert model.state()["passes"] == 2


def test_a_caller_that_is_alone_does_not_wait_for_others(tiny_roberta):
    serving = ServingConfig(batch_across_workers=True, max_batch_tokens=1_000_000)
    model = ModelThread(reward_of(tiny_roberta), serving)
    waits = []

    class Watched:
        def __init__(self, calls):
            self.calls = calls

        def put(self, call):
            self.calls.put(call)

        def get(self, timeout=None):
            waits.append(timeout)
            return self.calls.get(timeout=timeout)

    model._calls = Watched(model._calls)

    for _ in range(3):
        model.score(call_of(0))

    assert model.state()["passes"] == 3
    assert set(waits) <= {None}


@pytest.mark.parametrize("across_workers", [False, True])
def test_what_a_term_raises_is_for_its_caller_alone(tiny_roberta, across_workers):
    serving = ServingConfig(batch_across_workers=across_workers, batch_wait_ms=100)
    model = ModelThread(reward_of(tiny_roberta), serving)

    found = score_together(model, told=2)

    with pytest.raises(KeyError, match="told to"):
        found[2].result()
    for caller in (0, 1, 3):
        assert len(found[caller].result().rewards) == 4


def test_a_batch_across_workers_holds_no_more_tokens_than_it_may(tiny_roberta):
    reward = reward_of(tiny_roberta, batch_size=2)
    sizes = []
    reward.classifier.model.register_forward_hook(
        lambda model, args, kwargs, output: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    rows, _ = reward.classifier.tokenize(["x" * n for n in (3, 30, 2, 1, 20, 4, 100)])

    logits, _ = reward.classifier.forward(rows, batch_tokens=32)

    assert sum(count for count, _ in sizes) == 7
    assert all(count * longest <= 32 or count == 1 for count, longest in sizes)
    assert sizes[0] == (4, 6)
    np.testing.assert_allclose(logits, reward.classifier.forward(rows)[0], atol=1e-5)


def test_the_state_tells_what_was_scored_and_what_is_held(tiny_roberta):
    model = ModelThread(reward_of(tiny_roberta), ServingConfig())

    model.score(call_of(0))

    state = model.state()
    assert (state["texts"], state["held"], state["queued"]) == (4, 0, 0)
    assert state["standstill_s"] == 0
