"""The rules by which a run has diverged, and the runs that they stop."""

import dataclasses
import math
from typing import Any

import pytest

from ray_detox.config import PPOConfig
from ray_detox.records import UpdateStats
from ray_detox.rl.divergence import DivergedError, check_divergence

NUMBERS: dict[str, Any] = {field.name: 0.5 for field in dataclasses.fields(UpdateStats)}
HEALTHY = UpdateStats(
    **NUMBERS
    | {"step": 1, "terms": {}, "kl": 0.0, "entropy": 0.4, "finished": 0.98, "probe_kl": None}
)


def history(*changes):
    """A healthy first step, and one step for each set of changed metrics."""
    return [HEALTHY] + [
        dataclasses.replace(HEALTHY, step=step, **each) for step, each in enumerate(changes, 2)
    ]


def test_a_healthy_run_goes_on():
    # The widest changes of the recipe lab with seed 0: KL 2.8 nats, half of the entropy.
    steps = history(*[{"kl": 2.8, "entropy": 0.19, "finished": 0.98, "probe_kl": 2.9}] * 9)

    for count in range(1, 11):
        check_divergence(steps[:count], PPOConfig())


@pytest.mark.parametrize("changed", [{"kl": 60.1}, {"kl": 3.0, "probe_kl": 60.1}])
def test_a_single_step_beyond_max_kl_stops_the_run(changed):
    steps = history({"kl": 60.0, "probe_kl": 60.0}, changed)

    check_divergence(steps[:2], PPOConfig())
    with pytest.raises(
        DivergedError,
        match=r"diverged in step 3: the KL to the reference is 60\.1 nats per response, above "
        r"ppo.max_kl=60. Lower ppo.learning_rate or raise ppo.kl_coef",
    ):
        check_divergence(steps, PPOConfig())
    check_divergence(steps, PPOConfig(max_kl=70))
    check_divergence(steps, PPOConfig(max_kl=None))


@pytest.mark.parametrize("name", ["kl", "probe_kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_kl", [60.0, None])
def test_a_kl_that_is_not_finite_stops_the_run(name, value, max_kl):
    with pytest.raises(
        DivergedError,
        match=r"diverged in step 2: the KL to the reference is not a finite number. Lower ",
    ):
        check_divergence(history({name: value}), PPOConfig(max_kl=max_kl))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"entropy": 0.003}, r"the entropy per token is 0.003 nats, and was 0.4 in step 1"),
        ({"finished": 0.0}, r"0% of the responses end before their limit, and 98% did in step 1"),
    ],
)
def test_three_collapsed_steps_in_a_row_stop_the_run(changed, reason):
    check_divergence(history(changed, changed), PPOConfig())
    check_divergence(history(changed, changed, {}, changed), PPOConfig())
    with pytest.raises(DivergedError, match=rf"collapsed in step 4: {reason}"):
        check_divergence(history(changed, changed, changed), PPOConfig())
    check_divergence(history(changed, changed, changed), PPOConfig(stop_on_collapse=False))


def test_responses_that_never_ended_are_no_collapse():
    first = dataclasses.replace(HEALTHY, finished=0.2)

    check_divergence([first, *history(*[{"finished": 0.0}] * 3)[1:]], PPOConfig())


def test_a_run_may_start_with_no_entropy():
    first = dataclasses.replace(HEALTHY, entropy=0.0)

    check_divergence([first, *history(*[{"entropy": 0.0}] * 3)[1:]], PPOConfig())
