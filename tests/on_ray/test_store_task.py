"""The final task: the report, and both stores reached from a Ray worker."""

import os
import sys

import pytest
import ray

from ray_detox.config import load_config
from ray_detox.stages.evaluate import store_result
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.sqlite import SQLiteStore

pytestmark = pytest.mark.ray

FACTS = {
    "run_id": "first",
    "steps": 3,
    "rows": {"read": 4, "left_out": {}, "examples": {}, "train": 2, "held_out": 2},
    "seconds": {"train": 2.0, "evaluate": 1.0},
    "training": {"workers": 2},
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


def stored(config, path, store):
    """Run the task, and return what it returned and what the store holds."""
    report, samples, problem = ray.get(
        store_result.remote(config, make_samples(), FACTS, str(path))
    )
    found = store.get_run("first"), list(store.get_samples("first"))
    store.close()
    return (report, samples, problem), found


def test_the_report_and_its_samples_come_back_from_sqlite(tmp_path):
    path = tmp_path / "results.sqlite"

    (report, samples, problem), found = stored(load_config("lab"), path, SQLiteStore(path))

    assert problem is None
    assert found == (report, samples)
    assert report["toxicity"]["before"]["mean"] == pytest.approx(0.5)
    assert report["toxicity"]["delta"]["mean"] == pytest.approx(-0.4)
    assert report["seconds"]["total"] == 3.0
    assert [sample["rouge_l_after"] for sample in samples] == [1.0, 1.0]


def test_the_report_and_its_samples_come_back_from_dynamodb_over_the_wire(tmp_path, aws):
    store = DynamoDBStore("first-table", endpoint_url=aws)
    store.create_table()
    config = load_config(
        "lab",
        ["results.store=dynamodb", "results.table=first-table", f"results.endpoint_url={aws}"],
    )

    (report, samples, problem), found = stored(config, tmp_path / "unused.sqlite", store)

    assert problem is None
    assert found == (report, samples)
    assert not (tmp_path / "unused.sqlite").exists()


def test_a_task_that_is_run_again_stores_the_run_once(tmp_path):
    path = tmp_path / "results.sqlite"
    config = load_config("lab")

    for _ in range(2):
        _, _, problem = ray.get(store_result.remote(config, make_samples(), FACTS, str(path)))
        assert problem is None

    store = SQLiteStore(path)
    assert [run["run_id"] for run in store.list_runs()] == ["first"]
    assert len(list(store.get_samples("first"))) == 2
    store.close()


@pytest.mark.parametrize("kind", ["sqlite", "dynamodb"])
def test_a_store_that_fails_loses_no_report(tmp_path, aws, kind):
    path = tmp_path / "in-the-way"
    path.mkdir()
    config = load_config(
        "lab",
        [f"results.store={kind}", "results.table=no-table", f"results.endpoint_url={aws}"],
    )

    report, samples, problem = ray.get(
        store_result.remote(config, make_samples(), FACTS, str(path))
    )

    assert report["run_id"] == "first"
    assert len(samples) == report["n"] == 2
    assert "\n" not in problem
    assert ("no-table" if kind == "dynamodb" else str(path)) in problem


def test_a_run_that_no_store_can_hold_loses_no_report(tmp_path):
    facts = FACTS | {"run_id": "not a name"}
    task = store_result.remote(load_config("lab"), make_samples(), facts, str(tmp_path / "r"))

    report, _, problem = ray.get(task)

    assert report["run_id"] == "not a name"
    assert "cannot be used" in problem


def test_the_store_task_leaves_awswrangler_and_its_ray_engine_alone(tmp_path, aws):
    config = load_config("lab", ["results.store=dynamodb", f"results.endpoint_url={aws}"])

    @ray.remote
    def task():
        store_result._function(config, make_samples(), FACTS, "unused")
        return "awswrangler" in sys.modules, os.environ.get("WR_ENGINE")

    assert ray.get(task.remote()) == (False, "python")
