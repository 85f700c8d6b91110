"""Files and folders in settings and options: `~`, relative names, and runs that go on from elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ray_detox import api, pipeline
from ray_detox.cli import main as cli
from ray_detox.cli.main import main
from ray_detox.config import ConfigError, RunConfig
from ray_detox.recipes.loading import load_config
from ray_detox.recipes.names import JOB_VARIABLE, absolute_names, expand
from ray_detox.runs.folder import RunFolder

SETTINGS = ("data.path", "policy.model", "policy.adapter", "reward.model", "train.storage")


class Started(RuntimeError):
    """Raised in place of the stages of a run."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with folders of a model, an adapter and data, beside an empty current folder."""
    folder = tmp_path / "home of Zoë"
    for name in ("data.path", "policy.model", "policy.adapter", "reward.model"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "here")
    return folder


def values(config: RunConfig) -> dict[str, str]:
    tree = config.to_dict()
    return {name: tree[name.split(".")[0]][name.split(".")[1]] for name in SETTINGS}


@pytest.mark.parametrize("source", ["words", "recipe"])
def test_a_tilde_is_the_home_folder_in_every_setting(home, source):
    names = {name: f"~/{name}" for name in SETTINGS}
    if source == "words":
        config = load_config("lab", [f"{name}={value}" for name, value in names.items()])
    else:
        tree: dict[str, dict[str, str]] = {}
        for name, value in names.items():
            section, _, key = name.partition(".")
            tree.setdefault(section, {})[key] = value
        Path("own.yaml").write_text(json.dumps(tree))
        config = load_config("own.yaml")

    found = absolute_names(config)

    assert values(found) == {name: str(home / name) for name in SETTINGS}


def test_a_relative_name_is_absolute_if_it_exists_and_else_may_be_a_hub_id(home, monkeypatch):
    monkeypatch.chdir(home)
    term = "reward.terms=[{classifier: {model: reward.model}}]"
    config = load_config(
        "lab",
        ["policy.model=policy.model", "reward.model=google/x", "train.storage=new folder", term],
    )

    found = absolute_names(config)

    assert found.policy.model == str(home / "policy.model")
    assert found.reward.model == "google/x"
    assert found.reward.terms[0].classifier.model == str(home / "reward.model")
    assert found.reward.terms[0].name == config.reward.terms[0].name
    assert found.train.storage == str(home / "new folder")
    assert found.data.path == "lab"
    assert absolute_names(found) == found


def test_addresses_stay_as_they_are(home):
    words = [
        "train.storage=s3://b/runs?region=x",
        "data.path=s3://b/d.csv",
        "policy.model=s3://b/m",
    ]
    config = load_config("lab", words)

    assert absolute_names(config) == config


def test_an_option_takes_a_tilde(home, capsys):
    code = main(["results", "--output=~/runs"])

    assert code == cli.MISTAKE
    assert f"No results in {home / 'runs'} yet" in capsys.readouterr().err
    assert os.listdir() == []


def test_without_a_home_folder_a_tilde_is_refused(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name

    with pytest.raises(ConfigError, match="'~/x' begins with ~, and this user has no home folder"):
        expand("~/x")
    with pytest.raises(ConfigError, match="and a user 'nobody-here' has no home folder"):
        expand("~nobody-here/x")
    assert expand("~x") == Path("~x"), "a file may have this name"


def test_an_option_that_is_empty_is_refused_and_not_taken_for_the_current_folder(home, capsys):
    with pytest.raises(SystemExit):
        main(["run", "lab", "--output="])

    assert "argument --output: it is empty; expected the path" in capsys.readouterr().err
    assert main(["run", "lab", ""]) == cli.MISTAKE
    assert "An argument is empty" in capsys.readouterr().err


@pytest.fixture
def started(home, monkeypatch):
    """`started(*words)`: start a run up to its first stage; the settings that its stages get."""
    seen = []

    def stop(config, *args, **keywords):
        seen.append(config)
        raise Started("no stages here")

    monkeypatch.setattr(pipeline, "_run_stages", stop)

    def start(*words):
        assert main(["run", *words, "--output", str(home / "runs")]) == cli.FAILED
        return seen[-1]

    return start


@pytest.fixture
def model(tiny_t5, tmp_path):
    shutil.copytree(tiny_t5, tmp_path / "here" / "tiny t5")
    return tmp_path / "here" / "tiny t5"


def test_a_run_finds_relative_names_again_from_another_folder(started, model, home, monkeypatch):
    """All processes of the run get the whole path, as its settings in the folder have it."""
    config = started("lab", "policy.model=tiny t5", "train.storage=kept", "--run-id", "first")
    kept = model.parent / "kept"
    assert config.policy.model == str(model)
    assert config.train.storage == str(kept)
    assert (kept / "first" / "config.json").is_file()

    monkeypatch.chdir(home)
    again = started("--resume", "first")

    assert again == config
    shutil.rmtree(home / "runs" / "first")
    monkeypatch.chdir(model.parent)
    assert started("--resume", "first", "train.storage=kept") == config
    assert started("--resume", "first", "train.storage=./kept", "train.steps=41").train.steps == 41


def test_files_sent_with_a_job_are_found_by_the_next_job(started, model, home, monkeypatch):
    """The next job starts in another folder, to which the same files were sent."""
    monkeypatch.setenv(JOB_VARIABLE, "1")
    config = started("lab", "policy.model=tiny t5", "--run-id", "first")
    assert config.policy.model == str(model)

    other = home / "another package"
    other.mkdir()
    shutil.move(model, other)
    monkeypatch.chdir(other)

    assert started("--resume", "first").policy.model == str(other / "tiny t5")


def test_the_api_resolves_names_as_the_command_line_does(started, model, home):
    config = load_config("lab", ["policy.model=tiny t5"])

    with pytest.raises(Started):
        api.train(config, run_id="first", output="~/runs", quiet=True)
    with pytest.raises(Started):
        api.train(config, run_id="first", output="~/runs", quiet=True, resume=True)

    stored = RunFolder(home / "runs", "first").read_config()
    assert stored.policy.model == str(model)
