"""Calls of many threads to one model: the same bits one by one, close scores in shared batches."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ray_detox.config import ClassifierConfig, RewardConfig, RewardTerm, ServingConfig
from ray_detox.records import ScoreRequest
from ray_detox.rewards.batching import ModelThread
from ray_detox.rewards.reward import Reward

CALLERS = 4

may_continue = threading.Event()


def scripted(completions, script, **_):
    """A reward term that does what the column `script` says, then returns the lengths."""
    if "raise" in script:
        raise KeyError("as scripted")
    if "wait" in script:
        may_continue.wait(timeout=60)
    return [float(len(text)) for text in completions]


def reward_of(folder, **changes):
    term = RewardTerm(function=f"{__name__}.scripted", weight=0.5)
    return Reward(RewardConfig(model=str(folder), terms=(term,), **changes))


def request_of(caller, script=""):
    responses = [chr(97 + caller) * (7 * caller + i) for i in range(4)]
    return ScoreRequest(["p"] * 4, responses, [[1]] * 4, {"script": [script] * 4})


def score_together(model, failing=None):
    """Score for all callers at once: a first call holds the model until all of theirs are queued."""
    may_continue.clear()
    with ThreadPoolExecutor(CALLERS + 1) as threads:
        threads.submit(model.score, request_of(0, "wait"))
        while model.state().passes == 0:
            time.sleep(0.001)
        requests = [request_of(i, "raise" if i == failing else "") for i in range(CALLERS)]
        futures = [threads.submit(model.score, request) for request in requests]
        while model.state().held < 4 * (CALLERS + 1):
            time.sleep(0.001)
        may_continue.set()
    return futures


def test_calls_scored_one_by_one_equal_the_reward_bit_for_bit(tiny_roberta):
    reward = reward_of(tiny_roberta, batch_size=3)
    expected = [reward(request_of(caller)) for caller in range(CALLERS)]
    model = ModelThread(reward, ServingConfig())

    found = [future.result() for future in score_together(model)]

    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_array_equal(one.toxicity, other.toxicity)
    assert model.state().passes == (CALLERS + 1) * 2


def test_calls_in_shared_batches_differ_by_rounding_and_take_fewer_forward_passes(tiny_roberta):
    reward = reward_of(tiny_roberta)
    serving = ServingConfig(batch_across_workers=True, batch_wait_ms=1000, max_batch_tokens=600)
    expected = [reward(request_of(caller)) for caller in range(CALLERS)]
    model = ModelThread(reward, serving)

    found = [future.result() for future in score_together(model)]

    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-5)
        np.testing.assert_array_equal(one.terms["scripted"], other.terms["scripted"])
    assert model.state().passes == 2


@pytest.mark.parametrize("across_workers", [False, True])
def test_several_classifiers_score_each_call_as_the_reward_does(tiny_roberta, across_workers):
    second = RewardTerm(classifier=ClassifierConfig(max_tokens=12), weight=2, name="second")
    scripted = RewardTerm(function=f"{__name__}.scripted")
    reward = Reward(RewardConfig(model=str(tiny_roberta), terms=(second, scripted)))
    expected = [reward(request_of(caller)) for caller in range(CALLERS)]
    serving = ServingConfig(batch_across_workers=across_workers, batch_wait_ms=100)
    model = ModelThread(reward, serving)

    found = [future.result() for future in score_together(model)]

    for one, other in zip(found, expected, strict=True):
        assert list(one.terms) == ["second", "scripted"]
        np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-4)
        np.testing.assert_allclose(one.terms["second"], other.terms["second"], atol=1e-4)
        np.testing.assert_array_equal(one.truncated, other.truncated)
    assert any(one.truncated.any() for one in found)


def test_a_single_caller_does_not_wait_for_others_to_fill_its_batch(tiny_roberta):
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
        model.score(request_of(0))

    assert model.state().passes == 3
    assert set(waits) <= {None}


@pytest.mark.parametrize("across_workers", [False, True])
def test_an_error_of_a_term_reaches_its_own_caller_only(tiny_roberta, across_workers):
    serving = ServingConfig(batch_across_workers=across_workers, batch_wait_ms=100)
    model = ModelThread(reward_of(tiny_roberta), serving)

    found = score_together(model, failing=2)

    with pytest.raises(KeyError, match="as scripted"):
        found[2].result()
    for caller in (0, 1, 3):
        assert len(found[caller].result().rewards) == 4


def test_a_forward_pass_holds_no_more_tokens_than_allowed(tiny_roberta):
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


def test_the_state_counts_texts_scored_and_texts_held(tiny_roberta):
    model = ModelThread(reward_of(tiny_roberta), ServingConfig())

    model.score(request_of(0))

    state = model.state()
    assert (state.texts, state.held, state.queued) == (4, 0, 0)
    assert state.stalled_s == 0
