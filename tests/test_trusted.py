"""Functions that settings name run only if the user's own recipe names them, or the user says so.

The attempts use `subprocess.check_output`, which any machine has, and a module that leaves a mark when
it is imported.
"""

import json
import sys

import pytest

from ray_detox import api
from ray_detox.cli import main as cli
from ray_detox.errors import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.runs import trusted
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.lease import create
from ray_detox.runs.resume import run_storage


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Make Ray unimportable."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The folder where the user's functions are noted."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state/ray-detox/functions"


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that exists once the module `hostile` has been imported."""
    file = tmp_path / "imported"
    (tmp_path / "hostile.py").write_text(
        f"from pathlib import Path\nPath({str(file)!r}).touch()\nraise ImportError('ended here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("hostile", None)


@pytest.fixture
def command(tmp_path, capsys):
    """`command(*words)`: the exit code, the output and the error of a command."""

    def run(*words):
        code = cli.main([*words, "--output", str(tmp_path / "runs")])
        return code, *capsys.readouterr()

    return run


HOSTILE = "reward.terms=[{function: hostile.f, arguments: {a: 1}}]"


def shell(file):
    """A setting that runs a command when the function is called with its arguments."""
    return f"reward.terms=[{{function: subprocess.check_output, arguments: {{args: [touch, {file}]}}}}]"


def stored(tmp_path, *words, name="first", recipe="lab"):
    """Make the folder of a run that came from elsewhere."""
    config = load_config(recipe, words)
    folder = RunFolder(tmp_path / "runs", name)
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps(config.to_dict()))
    (folder.path / "adapter").mkdir()
    (folder.path / "adapter/adapter_config.json").write_text("{}")
    return folder


# ---- check -----------------------------------------------------------------------------------


def test_check_runs_nothing_that_a_recipe_names(command, tmp_path, mark):
    done = tmp_path / "done"

    code, out, _ = command("check", "lab", shell(done))
    assert (code, done.exists()) == (0, False)
    assert "note: not imported or tried: subprocess.check_output; add --try-functions" in out

    code, out, _ = command("check", "lab", HOSTILE)
    assert (code, mark.exists()) == (0, False)


def test_check_runs_it_when_asked(command, tmp_path, mark):
    done = tmp_path / "done"

    code, _, err = command("check", "lab", "--try-functions", shell(done))
    assert (code, done.exists()) == (2, True)
    assert "subprocess.check_output is not a function" in err

    code, _, err = command("check", "lab", "--try-functions", HOSTILE)
    assert (code, mark.exists()) == (2, True)


def test_a_check_has_no_note_without_functions(command):
    code, out, _ = command("check", "lab")

    assert code == 0
    assert "note:" not in out


def test_a_reward_that_only_functions_give_is_checked_without_them(command, mark):
    code, _, err = command("check", "lab", "reward.weight=0", HOSTILE)

    assert (code, err, mark.exists()) == (0, "", False)


def test_nodes_get_no_functions_from_a_check(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray")
    from ray_detox.recipes.loading import config_from_dict
    from ray_detox.stages.cluster.probe import _without_functions

    sent = config_from_dict(_without_functions(load_config("lab", ["reward.weight=0", HOSTILE])))

    assert trusted.named_functions(sent) == []


# ---- runs from elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("words", [("run", "--resume", "first"), ("evaluate", "first")])
def test_a_run_folder_from_elsewhere_runs_nothing(command, tmp_path, mark, words):
    done = tmp_path / "done"
    folder = stored(tmp_path, shell(done))
    before = sorted(folder.path.rglob("*"))

    code, out, err = command(*words)

    assert (code, out, done.exists()) == (2, "", False)
    assert f'subprocess.check_output({{"args": ["touch", "{done}"]}})' in err
    assert "add --trust-functions" in err
    assert err.count("\n") == 1
    assert sorted(folder.path.rglob("*")) == before

    (folder.path / "config.json").write_text(json.dumps(load_config("lab", [HOSTILE]).to_dict()))
    code, _, err = command(*words)
    assert (code, mark.exists()) == (2, False)
    assert 'hostile.f({"a": 1})' in err


def test_a_storage_from_elsewhere_runs_nothing_and_leaves_no_folder(command, tmp_path, mark):
    storage = f"train.storage={tmp_path / 'kept'}"
    config = load_config("lab", [storage, HOSTILE])
    kept = run_storage(config, RunFolder(tmp_path, "first"))
    create(kept, "first").release()
    kept.write("config.json", json.dumps(config.to_dict()).encode())

    code, _, err = command("run", "--resume", "first", storage)
    assert (code, mark.exists(), (tmp_path / "runs/first").exists()) == (2, False, False)
    assert "name functions that you have not run on this machine: hostile.f" in err

    code, out, _ = command("run", "--resume", "first", storage, "--trust-functions")
    assert (code, mark.exists()) == (2, True)
    assert 'run first names functions, which are trusted: hostile.f({"a": 1})' in out


def test_the_api_refuses_them_as_well(tmp_path, mark):
    stored(tmp_path, HOSTILE)

    with pytest.raises(ConfigError, match="trust_functions=True"):
        api.train(run_id="first", resume=True, output=tmp_path / "runs")
    with pytest.raises(ConfigError, match="trust_functions=True"):
        api.evaluate("first", output=tmp_path / "runs")
    assert not mark.exists()


@pytest.mark.parametrize("words", [("run", "--resume", "first"), ("evaluate", "first")])
def test_a_user_who_trusts_them_says_so_once(command, tmp_path, mark, words):
    stored(tmp_path, HOSTILE)

    code, out, err = command(*words, "--trust-functions")
    assert (code, mark.exists()) == (2, True)
    assert "hostile.f cannot be imported" in err
    assert "which are trusted: hostile.f" in out

    code, out, err = command(*words)
    assert "hostile.f cannot be imported" in err
    assert "trusted" not in out


# ---- the user's own --------------------------------------------------------------------------


def test_a_run_that_began_here_goes_on_here_without_a_word(command, tmp_path, mark, state):
    code, _, err = command("run", "lab", HOSTILE, "--run-id", "first")
    assert (code, mark.exists()) == (2, True)
    assert "hostile.f cannot be imported" in err
    assert state.stat().st_mode & 0o077 == 0

    stored(tmp_path, HOSTILE)
    for words in (("run", "--resume", "first"), ("evaluate", "first")):
        _, _, err = command(*words)
        assert "hostile.f cannot be imported" in err


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("second", "{function: hostile.f, arguments: {a: 1}}"),
        ("first", "{function: hostile.f, arguments: {a: 2}}"),
        ("first", "{function: hostile.f}"),
        ("first", "{function: hostile.g, arguments: {a: 1}}"),
        ("first", "{function: hostile.f, arguments: {a: 1}}, {function: os.system}"),
    ],
)
def test_another_run_or_function_or_argument_is_not_the_users_own(command, tmp_path, name, terms):
    trusted.remember(load_config("lab", [HOSTILE]), "first")
    stored(tmp_path, f"reward.terms=[{terms}]", name=name)

    code, _, err = command("run", "--resume", name)

    assert code == 2
    assert "that you have not run on this machine" in err


def test_a_retried_job_needs_no_word(command, tmp_path, mark, monkeypatch):
    """A cluster runs the same command again, on a head with another home folder or none."""
    for home in "ab":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / home))
        _, _, err = command("run", "lab", HOSTILE, "--run-id", "first")
        assert "hostile.f cannot be imported" in err


def test_a_user_without_a_home_folder_can_run(command, tmp_path, mark, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    _, _, err = command("run", "lab", HOSTILE, "--run-id", "first")
    assert "hostile.f cannot be imported" in err

    stored(tmp_path, HOSTILE)
    _, _, err = command("run", "--resume", "first")
    assert "add --trust-functions" in err


def test_functions_of_the_command_line_are_the_users_own(command, tmp_path, mark):
    stored(tmp_path, shell(tmp_path / "done"))

    code, _, err = command("evaluate", "first", HOSTILE)

    assert (code, mark.exists(), (tmp_path / "done").exists()) == (2, True, False)
    assert "hostile.f cannot be imported" in err


def test_runs_without_functions_are_noted_nowhere(tmp_path, state):
    config = load_config("lab")

    trusted.remember(config, "first")
    trusted.require_own(config, "first", trust=False, say=print)

    assert not state.exists()
