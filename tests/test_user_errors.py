"""Errors of a user's functions and settings: named with file and line, and not tried again in vain."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ray_detox.config import ConfigError, RewardTerm
from ray_detox.recipes.loading import FOLDERS_VARIABLE, config_from_dict, load_config
from ray_detox.records import ScoreRequest
from ray_detox.rewards import functions
from ray_detox.runs import trusted
from ray_detox.stages import errors, train

ROOT = Path(__file__).parents[1]


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
    with pytest.raises(type(error), match=str(error)):
        functions.FunctionCaller()([(term, unreachable)], ScoreRequest(["p"], ["c"], [[1]], {}))

    assert errors.permanent_failure(error) is None


def test_a_wrong_setting_is_not_tried_again():
    assert errors.permanent_failure(ConfigError("policy.model is gone.")) == (
        "policy.model is gone.",
        "",
    )
    assert errors.permanent_failure(RuntimeError("CUDA error")) is None


# ---- modules beside the recipe ---------------------------------------------------------------

LENGTH = "def short(completions, **columns):\n    return [-len(c) / 1000 for c in completions]\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that names a function of a module beside it; the current folder is another one."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(FOLDERS_VARIABLE, raising=False)
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "rewards_beside_the_recipe.py").write_text(LENGTH)
    recipe = folder / "own.yaml"
    recipe.write_text("reward: {terms: [{function: rewards_beside_the_recipe.short}]}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield recipe
    sys.modules.pop("rewards_beside_the_recipe", None)


def test_a_module_beside_the_recipe_is_found_also_by_the_processes_that_ray_starts(recipe):
    config = load_config(recipe)

    assert config.reward.terms[0].name == "short"
    code = (
        "import sys, json\nfrom ray_detox.config import RewardTerm\n"
        "from ray_detox.rewards.functions import load_reward_function\n"
        "f = load_reward_function(RewardTerm(function='rewards_beside_the_recipe.short'))\n"
        "print(f(['abcd']))"
    )
    path = {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | path)
        == b"[-0.004]\n"
    )


def test_a_resumed_run_looks_where_its_recipe_was(recipe, monkeypatch, tmp_path):
    trusted.remember(load_config(recipe), "first")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(recipe.parent)])
    monkeypatch.delenv(FOLDERS_VARIABLE)
    stored = config_from_dict(load_config("lab").to_dict() | {"reward": {"terms": [
        {"function": "rewards_beside_the_recipe.short"}]}})  # fmt: skip

    trusted.require_own(stored, "first", trust=False, say=print)

    assert functions.load_reward_function(stored.reward.terms[0])(["ab"]) == [-0.002]


def test_a_module_beside_the_recipe_does_not_replace_one_of_a_library(recipe):
    (recipe.parent / "statistics.py").write_text("raise RuntimeError('the wrong module')")

    load_config(recipe)

    assert sys.path[-1] == str(recipe.parent)
