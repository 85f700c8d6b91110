"""Errors of a user's functions and settings: named with file and line, and not tried again in vain."""

import pickle

import pytest

from ray_detox.config import ConfigError, RewardTerm
from ray_detox.records import ScoreRequest
from ray_detox.rewards import functions
from ray_detox.stages import errors, train


def test_an_error_of_a_function_names_its_term_file_and_line_after_it_was_pickled(
    tmp_path, monkeypatch
):
    """The error is raised in a reward actor, and the driver describes it."""
    (tmp_path / "rewards_with_a_bug.py").write_text(
        "def share(completions, **columns):\n    return [1 / len(c.split('x')[1:]) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    term = RewardTerm(function="rewards_with_a_bug.share", name="x-share")
    request = ScoreRequest(["p"], ["no such letter"], [[1]], {})
    with pytest.raises(ZeroDivisionError) as caught:
        functions.FunctionCaller()([(term, functions.load_reward_function(term))], request)

    error = pickle.loads(pickle.dumps(caught.value))
    reason, trace = errors.permanent_failure(error)

    where = f"{tmp_path}/rewards_with_a_bug.py, line 2"
    assert reason == (
        f"the reward term x-share failed with ZeroDivisionError: division by zero ({where})"
    )
    assert "return [1 / len(c.split('x')[1:]) for c in completions]" in trace
    with pytest.raises(
        errors.TrainingError, match=r"Training failed at step 4: the reward term x-share"
    ):
        train.end_if_permanent(error, 3, tmp_path)
    assert (tmp_path / "error.txt").read_text() == trace


@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), TimeoutError("too slow"), OSError("full")]
)
def test_a_function_that_could_not_reach_something_is_tried_again(error):
    def unreachable(completions):
        raise error

    term = RewardTerm(function="a.b", name="remote")
    with pytest.raises(OSError):
        functions.FunctionCaller()([(term, unreachable)], ScoreRequest(["p"], ["c"], [[1]], {}))

    assert errors.permanent_failure(error) is None


def test_a_wrong_setting_is_not_tried_again():
    assert errors.permanent_failure(ConfigError("policy.model is gone.")) == (
        "policy.model is gone.",
        "",
    )
    assert errors.permanent_failure(RuntimeError("CUDA error")) is None
