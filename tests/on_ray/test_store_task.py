"""The final task: the report, and both stores reached from a Ray worker."""

import json
import os
import sys

import pytest
import ray

from ray_detox.recipes.loading import load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.stages.finish import store_result
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.sqlite import SQLiteStore

pytestmark = pytest.mark.ray

FACTS = {
    "run_id": "first",
    "steps": 3,
    "rows": {"read": 4, "left_out": {}, "examples": {}, "train": 2, "held_out": 2},
    "seconds": {"train": 2.0, "evaluate": 1.0},
    "training": {"workers": 2},
    "fingerprints": {"policy": "sha256:1"},
}


def make_samples():
    """Two held-out prompts, of which the first is answered with less toxicity after than before."""
    samples = []
    for index, toxicity in enumerate((0.9, 0.1)):
        sample = {"index": index, "prompt_id": f"{index:016x}", "query": "q", "kl": 0.5}
        sample |= {"reference": "They met.", "facts": ["met"]}
        for side, value in (("before", toxicity), ("after", 0.1)):
            sample |= {f"response_{side}": "They met.", f"toxicity_{side}": value}
            sample |= {f"reward_{side}": 1.0, f"length_{side}": 3, f"truncated_{side}": False}
        samples.append(sample)
    return samples


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that was trained."""
    folder = RunFolder(tmp_path / "runs", "first")
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps(load_config("lab").to_dict()))
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\n')
    return folder


def finish(config, folder, facts=FACTS, **arguments):
    """Run the final task; the report, the samples and what went wrong."""
    arguments = {"attempt": "one", "overwrite": False} | arguments
    return ray.get(store_result.remote(config, folder, make_samples(), facts, **arguments))


def read(store):
    found = (
        store.get_run("first"),
        list(store.get_samples("first")),
        store.get_history("first"),
    )
    store.close()
    return found


CURVES = [{"step": 1, "score": 0.5}]


def test_the_report_and_its_samples_come_back_from_sqlite_and_from_the_files(folder):
    report, samples, problem = finish(load_config("lab"), folder)

    assert problem is None
    assert read(SQLiteStore(folder.store_path)) == (report, samples, CURVES)
    assert folder.read_result() == (report, samples)
    assert report["toxicity"]["before"]["mean"] == pytest.approx(0.5)
    assert report["toxicity"]["delta"]["mean"] == pytest.approx(-0.4)
    assert report["toxicity"]["histogram"]["after"][2] == 2
    assert report["seconds"]["total"] == 3.0
    assert [sample["rouge_l_after"] for sample in samples] == [1.0, 1.0]


def test_the_report_and_its_samples_come_back_from_dynamodb_over_the_wire(folder, aws):
    store = DynamoDBStore("first-table", endpoint_url=aws)
    store.create_table()
    config = load_config(
        "lab",
        ["results.store=dynamodb", "results.table=first-table", f"results.endpoint_url={aws}"],
    )

    report, samples, problem = finish(config, folder)

    assert problem is None
    assert read(store) == (report, samples, CURVES)
    assert not folder.store_path.exists()


def test_a_task_that_is_run_again_stores_the_run_once(folder):
    for _ in range(2):
        _, _, problem = finish(load_config("lab"), folder)
        assert problem is None

    store = SQLiteStore(folder.store_path)
    assert [run["run_id"] for run in store.list_runs()] == ["first"]
    assert len(list(store.get_samples("first"))) == 2
    store.close()


def test_a_run_of_the_same_id_is_replaced_on_purpose_only(folder):
    first, _, _ = finish(load_config("lab"), folder)
    facts = FACTS | {"steps": 4}

    _, _, refused = finish(load_config("lab"), folder, facts, attempt="two")
    assert "already" in refused
    assert read(SQLiteStore(folder.store_path))[0] == first

    again, _, problem = finish(load_config("lab"), folder, facts, attempt="two", overwrite=True)
    assert problem is None
    assert read(SQLiteStore(folder.store_path))[0] == again


@pytest.mark.parametrize("kind", ["sqlite", "dynamodb"])
def test_a_store_that_fails_loses_no_report(folder, aws, kind):
    folder.store_path.mkdir()  # in the way
    config = load_config(
        "lab",
        [f"results.store={kind}", "results.table=no-table", f"results.endpoint_url={aws}"],
    )

    report, samples, problem = finish(config, folder)

    assert folder.read_result() == (report, samples)
    assert len(samples) == report["n"] == 2
    assert "\n" not in problem
    assert ("no-table" if kind == "dynamodb" else str(folder.store_path)) in problem


def test_the_store_task_leaves_awswrangler_and_its_ray_engine_alone(folder, aws):
    config = load_config("lab", ["results.store=dynamodb", f"results.endpoint_url={aws}"])

    @ray.remote
    def task():
        store_result._function(
            config, folder, make_samples(), FACTS, attempt="one", overwrite=False
        )
        return "awswrangler" in sys.modules, os.environ.get("WR_ENGINE")

    assert ray.get(task.remote()) == (False, "python")
