"""The final Ray task: the report, and both stores written from a Ray worker."""

import json
import os
import sys
from dataclasses import replace

import pytest
import ray

from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample
from ray_detox.evaluation.summarise import RunFacts
from ray_detox.recipes.loading import load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.stages.finish import store_result
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.sqlite import SQLiteStore

pytestmark = pytest.mark.ray

FACTS = RunFacts(
    run_id="first",
    steps=1,
    rows={"read": 4, "left_out": {}, "examples": {}, "train": 2, "held_out": 2},
    seconds={"train": 2.0, "evaluate": 1.0},
    training={"workers": 2},
    fingerprints={"policy": "sha256:1"},
    record={},
)


def make_examples():
    """Two held-out prompts; the response to the first one is less toxic after than before."""
    return [
        PairedExample(
            index=index,
            prompt_id=f"{index:016x}",
            query="q",
            reference="They met.",
            facts=("met",),
            kl=0.5,
            before=EvaluatedResponse("They met.", 1.0, toxicity, 3, False, True),
            after=EvaluatedResponse("They met.", 1.0, 0.1, 3, False, True),
        )
        for index, toxicity in enumerate((0.9, 0.1))
    ]


@pytest.fixture
def folder(tmp_path):
    """The folder of a trained run."""
    folder = RunFolder(tmp_path / "runs", "first")
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps(load_config("lab").to_dict()))
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\n')
    return folder


def finish(config, folder, facts=FACTS, **arguments):
    """Run the final task; return the report, the rated examples and the store's error, if any."""
    arguments = {"attempt": "one", "overwrite": False} | arguments
    return ray.get(store_result.remote(config, folder, make_examples(), facts, **arguments))


def to_json(examples):
    return [example.to_json() for example in examples]


def read(store):
    """The report, the samples and the history of the run in a store, which is then closed."""
    found = (
        store.get_run("first"),
        list(store.get_samples("first")),
        store.get_history("first"),
    )
    store.close()
    return found


CURVES = [{"step": 1, "score": 0.5}]


def test_the_task_writes_report_and_samples_to_sqlite_and_to_files(folder):
    report, examples, problem = finish(load_config("lab"), folder)

    assert problem is None
    assert read(SQLiteStore(folder.store_path)) == (report, to_json(examples), CURVES)
    assert folder.read_result() == (report, examples)
    assert report["toxicity"]["before"]["mean"] == pytest.approx(0.5)
    assert report["toxicity"]["delta"]["mean"] == pytest.approx(-0.4)
    assert report["toxicity"]["histogram"]["after"][2] == 2
    assert report["seconds"]["total"] == 3.0
    assert [sample["rouge_l_after"] for sample in to_json(examples)] == [1.0, 1.0]


def test_the_task_writes_report_and_samples_to_dynamodb(folder, aws):
    store = DynamoDBStore("first-table", endpoint_url=aws)
    store.create_table()
    config = load_config(
        "lab",
        ["results.store=dynamodb", "results.table=first-table", f"results.endpoint_url={aws}"],
    )

    report, examples, problem = finish(config, folder)

    assert problem is None
    assert read(store) == (report, to_json(examples), CURVES)
    assert not folder.store_path.exists()


def test_a_task_that_is_run_again_stores_the_run_once(folder):
    for _ in range(2):
        _, _, problem = finish(load_config("lab"), folder)
        assert problem is None

    store = SQLiteStore(folder.store_path)
    assert [run["run_id"] for run in store.list_runs()] == ["first"]
    assert len(list(store.get_samples("first"))) == 2
    store.close()


def test_a_run_of_the_same_id_is_replaced_only_with_overwrite(folder):
    first, _, _ = finish(load_config("lab"), folder)
    facts = replace(FACTS, steps=0)

    _, _, refused = finish(load_config("lab"), folder, facts, attempt="two")
    assert "already" in refused
    assert read(SQLiteStore(folder.store_path))[0] == first

    again, _, problem = finish(load_config("lab"), folder, facts, attempt="two", overwrite=True)
    assert problem is None
    assert read(SQLiteStore(folder.store_path))[0] == again


@pytest.mark.parametrize("kind", ["sqlite", "dynamodb"])
def test_a_failing_store_loses_no_report(folder, aws, kind):
    folder.store_path.mkdir()  # SQLite cannot open a folder
    config = load_config(
        "lab",
        [f"results.store={kind}", "results.table=no-table", f"results.endpoint_url={aws}"],
    )

    report, examples, problem = finish(config, folder)

    assert folder.read_result() == (report, examples)
    assert len(examples) == report["n"] == 2
    assert "\n" not in problem
    assert ("no-table" if kind == "dynamodb" else str(folder.store_path)) in problem


def test_the_store_task_does_not_import_awswrangler_with_its_ray_engine(folder, aws):
    config = load_config("lab", ["results.store=dynamodb", f"results.endpoint_url={aws}"])

    @ray.remote
    def task():
        store_result._function(
            config, folder, make_examples(), FACTS, attempt="one", overwrite=False
        )
        return "awswrangler" in sys.modules, os.environ.get("WR_ENGINE")

    assert ray.get(task.remote()) == (False, "python")
