"""The public Python API: names, documentation, cost of the import, and what is refused."""

import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import ray_detox
from ray_detox import pipeline
from ray_detox.runs.folder import RunFolder
from ray_detox.store.sqlite import SQLiteStore
from tests.environment import python_path

HEAVY = "{'torch', 'ray', 'pandas', 'numpy', 'transformers', 'pydantic', 'yaml', 'rich', 'tqdm'}"


def make_report(run_id):
    side = {"mean": 0.5, "std": 0.1, "share": 0.5}
    return {
        "run_id": run_id,
        "recipe": "lab",
        "status": "complete",
        "created": "2026-01-31T12:00:00+00:00",
        "n": 2,
        "verdict": {"name": "improved", "sentence": "Toxicity fell.", "reasons": []},
        "toxicity": {"before": side, "after": side, "delta": {"mean": -0.1}},
    }


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was started and has not finished."""
    folder = RunFolder(tmp_path / "runs", "first")
    folder.path.mkdir(parents=True)
    config = ray_detox.load_config("lab", ["train.steps=3"])
    (folder.path / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture
def calls(monkeypatch):
    """The arguments of `pipeline.run`, which does nothing but remember them."""
    seen = []

    def run(config, folder, console, *, resume, accept_changes):
        assert accept_changes is False
        seen.append((config, folder, resume))
        console.line("progress")
        return {"run_id": folder.run_id}

    monkeypatch.setattr(pipeline, "run", run)
    return seen


def test_importing_the_package_loads_nothing_heavy():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ray_detox; from ray_detox import ConfigError, StoreError; "
            f"assert not {HEAVY} & set(sys.modules), set(sys.modules); "
            "from ray_detox import train, evaluate, results; "
            f"assert not {HEAVY} & set(sys.modules), set(sys.modules)",
        ],
        env=os.environ | {"PYTHONPATH": python_path(Path(ray_detox.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_is_documented():
    assert set(ray_detox.__all__) <= set(dir(ray_detox))
    for name in ray_detox.__all__:
        value = getattr(ray_detox, name)
        assert name == "__version__" or inspect.getdoc(value), name
    for function in (ray_detox.train, ray_detox.evaluate, ray_detox.results):
        text = inspect.getdoc(function)
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Example:"))
        assert all(f"    {name}: " in text for name in inspect.signature(function).parameters)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ray_detox.trian  # noqa: B018


def test_train_passes_settings_and_folder_on(calls, tmp_path, capsys):
    config = ray_detox.load_config("lab", ["train.steps=2"])

    report = ray_detox.train(config, run_id="first", output=str(tmp_path))
    assert capsys.readouterr().out == "progress\n"
    unnamed = ray_detox.train(config, output=tmp_path, quiet=True)
    assert capsys.readouterr().out == ""

    assert report == {"run_id": "first"}
    assert unnamed["run_id"].startswith("lab-")
    assert calls[0] == (config, RunFolder(tmp_path, "first"), False)


def test_train_resumes_with_the_stored_settings_or_with_allowed_changes(calls, begun):
    longer = ray_detox.load_config("lab", ["train.steps=9"])

    ray_detox.train(run_id="first", output=begun.output, resume=True)
    ray_detox.train(longer, run_id="first", output=begun.output, resume=True)

    assert [(config.train.steps, resume) for config, _, resume in calls] == [(3, True), (9, True)]


def test_train_refuses_wrong_arguments(calls, begun):
    config, output = ray_detox.load_config("lab"), begun.output
    for words, sentence in (
        ({"config": config, "resume": True}, "name it with run_id"),
        ({}, "needs settings"),
        ({"config": config, "run_id": "../x"}, "cannot be used"),
        ({"run_id": "none", "resume": True}, "No run 'none' in"),
        (
            {"config": config.replace(seed=1), "run_id": "first", "resume": True},
            "'seed=1' would make another run of 'lab': run 'first' has 0",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            ray_detox.train(**words, output=output)
    assert not calls


def test_evaluate_refuses_a_change_of_the_data_and_a_run_without_adapter(begun):
    with pytest.raises(ray_detox.ConfigError, match="would make another run"):
        ray_detox.evaluate("first", ["data.path=x.csv"], begun.output)
    with pytest.raises(ray_detox.ConfigError, match="has no adapter yet"):
        ray_detox.evaluate("first", ["evaluate.prompts=4"], begun.output, quiet=True)


def test_results_returns_the_list_or_one_report(tmp_path):
    with pytest.raises(ray_detox.ConfigError, match="No results in"):
        ray_detox.results(output=tmp_path)
    store = SQLiteStore(RunFolder(tmp_path, "").store_path)
    store.put_run(make_report("first"), [])
    store.close()

    assert [run["run_id"] for run in ray_detox.results(output=tmp_path)] == ["first"]
    assert ray_detox.results("first", tmp_path) == make_report("first")
    assert ray_detox.results("first", tmp_path, ["results.store=sqlite"]) == make_report("first")
    with pytest.raises(ray_detox.StoreError, match="No result of a run 'second'"):
        ray_detox.results("second", tmp_path)
    with pytest.raises(ray_detox.ConfigError, match="not a setting of results"):
        ray_detox.results("first", tmp_path, ["train.steps=1"])


def test_the_default_store_is_that_of_the_settings():
    # `results` opens it without loading the settings.
    assert ray_detox.RunConfig().results.store == "sqlite"
    assert ray_detox.load_config("lab").results.store == "sqlite"


def test_train_works_in_a_thread_that_gets_no_signals(begun, monkeypatch):
    from ray_detox import signals

    def run(config, folder, console, *, resume, accept_changes):
        with (
            signals.end_on_signal(),
            signals.defer_signals(),
            signals.stop_on_signal(console),
        ):
            return {"run_id": folder.run_id}

    monkeypatch.setattr(pipeline, "run", run)
    reports = []
    words = {"run_id": "first", "output": begun.output, "resume": True, "quiet": True}
    thread = threading.Thread(target=lambda: reports.append(ray_detox.train(**words)))
    thread.start()
    thread.join()

    assert reports == [{"run_id": "first"}]


@pytest.mark.parametrize("run_id", ["../elsewhere", "", None])
def test_evaluating_a_run_with_an_invalid_id_is_refused(tmp_path, run_id):
    with pytest.raises(ray_detox.StoreError, match="cannot be used"):
        ray_detox.evaluate(run_id, output=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is damaged: it is empty"),
        ("[]", "is damaged: it is a list, expected an object"),
        ('{"data": {"lanes": 16}}', "does not have the settings of a run of this version"),
    ],
)
def test_settings_of_a_run_that_cannot_be_read_are_refused_with_the_file(tmp_path, content, words):
    (tmp_path / "first").mkdir()
    file = tmp_path / "first" / "config.json"
    file.write_text(content)

    with pytest.raises(ray_detox.ConfigError) as error:
        ray_detox.evaluate("first", output=tmp_path)

    assert str(error.value).startswith(f"{file} {words}")
