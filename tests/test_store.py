import itertools
import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import botocore.exceptions
import numpy as np
import pandas as pd
import pytest
import torch
from botocore.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_detox.store import dynamodb as dynamodb_module
from ray_detox.store import sqlite as sqlite_module
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.dynamodb_items import table_schema
from ray_detox.store.errors import BadCursor, StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.pages import (
    SHOWS,
    SORTS,
    Limits,
    SampleQuery,
    as_row,
    encode_cursor,
    limits_of,
    matches,
)
from ray_detox.store.protocol import SUMMARY_KEYS, check_run_id
from ray_detox.store.sqlite import SQLiteStore
from tests.emulators import emulator

REGION = "eu-central-1"
SECRET = "wJalrXUtnFEMIsecret"
tables = (f"table-{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def endpoint():
    with emulator("moto") as address:
        yield address


@pytest.fixture(autouse=True)
def aws(monkeypatch):
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


@pytest.fixture
def sqlite_store(tmp_path):
    return SQLiteStore(tmp_path / "results" / "results.db")


@pytest.fixture
def dynamo(endpoint):
    store = DynamoDBStore(next(tables), region=REGION, endpoint_url=endpoint)
    store.create_table()
    yield store
    store.close()


def strict(name):
    """Return fixtures for an emulator that may not be installed: its address, and a store on it."""

    @pytest.fixture(scope="module", name=f"{name}_endpoint")
    def address():
        with emulator(name) as address:
            yield address

    @pytest.fixture(name=name)
    def store(request):
        endpoint = request.getfixturevalue(f"{name}_endpoint")
        store = DynamoDBStore(next(tables), region=REGION, endpoint_url=endpoint)
        store.create_table()
        yield store
        store.close()

    return address, store


dynalite_endpoint, dynalite = strict("dynalite")
ministack_endpoint, ministack = strict("ministack")


@pytest.fixture(params=["sqlite_store", "dynamo", "dynalite", "ministack"])
def store(request):
    return request.getfixturevalue(request.param)


def make_report(run_id="first", created="2026-01-31T12:00:00+00:00", **more):
    side = {"mean": 0.1 + 0.2, "std": 1e-17, "share": 1.0}
    return {
        "run_id": run_id,
        "recipe": "lab",
        "status": "complete",
        "created": created,
        "n": 3,
        "verdict": {"name": "improved", "sentence": "Toxicity fell.", "reasons": []},
        "toxicity": {"before": side, "after": side, "delta": {"mean": -0.0, "low": 5e-324}},
        "facts": None,
        "kl": 1.0,
        "converged": True,
        **more,
    }


def make_samples(n, **more):
    return [
        {"index": i, "query": f"prompt {i}", "toxicity_before": i / 7, "length_after": i, **more}
        for i in range(n)
    ]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


CURVES = [{"step": 1, "score": 0.5, "kl": 1e-17}, {"step": 2, "score": None, "kl": 1.0}]


# The conformance suite: each test runs over every store.


def test_a_run_survives_the_store_unchanged(store):
    report, samples = make_report(), make_samples(60)

    store.put_run(report, samples)

    back = store.get_run("first")
    assert back == report
    assert json.dumps(back) == json.dumps(report)
    found = list(store.get_samples("first"))
    assert found == samples
    assert json.dumps(found) == json.dumps(samples)


def test_samples_are_returned_in_order_of_index(store):
    store.put_run(make_report(), list(reversed(make_samples(30))))

    assert [sample["index"] for sample in store.get_samples("first")] == list(range(30))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NUL \x00 in the middle",
        "汉字 ☕ שלום \u202e",
        "a\r\nb\u2028c\t",
        "<pad>'\"\\{}",
        "z" * 300_000,
    ],
)
def test_text_survives_the_store_unchanged(store, text):
    samples = [{"index": 0, "query": text, text[:9]: 1}]

    store.put_run(make_report(description=text[:1000]), samples)

    assert list(store.get_samples("first")) == samples
    assert store.get_run("first")["description"] == text[:1000]


def test_lone_surrogates_are_replaced(store):
    store.put_run(make_report(note="a\ud800b"), [{"index": 0, "query": "\udfff"}])

    assert store.get_run("first")["note"] == "a\ufffdb"
    assert list(store.get_samples("first")) == [{"index": 0, "query": "\ufffd"}]


finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | finite | st.integers(-(10**60), 10**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plain, st.dictionaries(st.text(max_size=9), finite | st.integers(), max_size=4))
def test_any_json_survives_the_store(store, config, figures):
    report, samples = make_report(config=config), [{**figures, "index": 0}]

    store.put_run(report, samples, overwrite=True)

    assert json.dumps(store.get_run("first")) == json.dumps(report)
    assert json.dumps(list(store.get_samples("first"))) == json.dumps(samples)


def test_numbers_of_numpy_and_torch_become_plain_numbers(store):
    sample = {
        "index": np.int64(4),
        "kl": np.float32(0.5),
        "flag": np.bool_(True),
        "price": Decimal("0.25"),
        "zero_d": np.array(3),
        "tensor": torch.tensor(0.25),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
    }

    store.put_run(make_report(n=np.int64(1), config={"targets": ("q", "v")}), [sample])

    expected = {"index": 4, "kl": 0.5, "flag": True, "price": 0.25, "zero_d": 3}
    expected |= {"tensor": 0.25, "half": 1.5}
    assert list(store.get_samples("first")) == [expected]
    assert store.get_run("first")["config"] == {"targets": ["q", "v"]}


def test_a_number_that_is_not_finite_is_named_in_its_sample(store):
    samples = [
        {"index": 0, "kl": math.nan, "toxicity_after": -math.inf, "reward_after": 1.5},
        {"index": 1, "kl": None, "reward_after": np.float32("nan"), "invalid": ["kl"]},
    ]

    store.put_run(make_report(), samples)

    assert list(store.get_samples("first")) == [
        {
            "index": 0,
            "kl": None,
            "toxicity_after": None,
            "reward_after": 1.5,
            "invalid": ["kl", "toxicity_after"],
        },
        {"index": 1, "kl": None, "reward_after": None, "invalid": ["kl", "reward_after"]},
    ]


def test_extreme_numbers_survive_the_store_and_can_be_sorted_by(store):
    rewards = [1e126, 1e17, 2.0, 5e-324, -1e100, 10**20]
    samples = [{"index": i, "reward_before": 0, "reward_after": x} for i, x in enumerate(rewards)]

    store.put_run(make_report(), samples)

    assert list(store.get_samples("first")) == samples
    # DynamoDB's numbers end below 1e126, so its indexes cannot contain this one.
    found = [row["index"] for row in all_pages(store, SampleQuery("reward"), 1)]
    assert found in ([4, 3, 2, 1, 5], [4, 3, 2, 1, 5, 0])


def test_a_stored_run_can_be_stored_again(store):
    store.put_run(make_report(), [{"index": 0, "kl": math.nan}])
    once = list(store.get_samples("first"))

    store.put_run(store.get_run("first"), once, overwrite=True)

    assert list(store.get_samples("first")) == once


@pytest.mark.parametrize(
    ("report", "samples", "words"),
    [
        (make_report(kl=math.nan), [], r"not finite: kl\. "),
        (make_report(a={"b": [1, math.inf]}), [], r"not finite: a\.b\[1\]"),
        (make_report(config={"path": object()}), [], r"config\.path is a object; expected text"),
        (make_report(config={1: 2}), [], "config has the key 1; expected text"),
        ({"run_id": "first", "n": 1}, [], "lacks recipe, status, created, verdict, toxicity"),
        (make_report(created="yesterday"), [], "created is 'yesterday'"),
        (make_report(created="2026-01-31T12:00:00"), [], "a time with its zone"),
        (make_report(created=None), [], "created is None"),
        (make_report(created="0001-01-01T00:00:00+09:00"), [], "created is '0001-01-01T"),
        (make_report(deep=nested(2000)), [], "too deeply"),
        (make_report(), [{"query": "?"}], "Sample 0 has the index None"),
        (make_report(), [{"index": -1}], "Sample 0 has the index -1"),
        (make_report(), [{"index": 10**8}], "index 100000000"),
        (make_report(), [{"index": 3}, {"index": 3}], "Two samples of run 'first' have the index 3"),
        (make_report(), [{"index": 0, "ids": np.zeros(2)}], "Sample 0: ids is a ndarray"),
        (make_report(), [{"index": 0, "z": 1j}], "Sample 0: z is a complex"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_stored_is_refused_before_the_first_write(
    store, report, samples, words
):
    with pytest.raises(StoreError, match=words):
        store.put_run(report, [*make_samples(0), *samples])

    assert store.list_runs() == []
    assert store.get_run("first") is None


BAD_RUN_IDS = [
    "",
    "a" * 65,
    "../x",
    "a/b",
    "a b",
    "a#b",
    ".hidden",
    "-x",
    "a\n",
    "a\x00",
    "ä",
    None,
]


@pytest.mark.parametrize("run_id", BAD_RUN_IDS)
def test_invalid_run_ids_are_refused(run_id):
    with pytest.raises(StoreError, match="cannot be used"):
        check_run_id(run_id)


def test_every_method_of_a_store_checks_the_run_id(store):
    for act in (
        lambda: store.put_run(make_report("../x"), []),
        lambda: store.get_run("../x"),
        lambda: store.get_samples("../x"),
        lambda: store.get_sample("../x", 0),
        lambda: store.sample_page("../x"),
        lambda: store.get_history("../x"),
    ):
        with pytest.raises(StoreError, match="cannot be used"):
            act()


@pytest.mark.parametrize("run_id", ["a", "0", "a" * 64, "Run_1.2-final"])
def test_valid_run_ids_are_accepted(run_id):
    assert check_run_id(run_id) == run_id


def test_an_existing_run_is_refused(store):
    store.put_run(make_report(), make_samples(3))

    with pytest.raises(StoreError, match="Another run 'first' is already in"):
        store.put_run(make_report(kl=9.0), make_samples(1))

    assert store.get_run("first") == make_report()
    assert list(store.get_samples("first")) == make_samples(3)


def test_overwriting_removes_all_of_the_old_run(store):
    store.put_run(make_report(), make_samples(60))

    store.put_run(make_report(kl=9.0), make_samples(2), overwrite=True)

    assert store.get_run("first") == make_report(kl=9.0)
    assert list(store.get_samples("first")) == make_samples(2)
    assert len(store.list_runs()) == 1


def taken(token, run="5f2c", **more):
    """The report of a run that was written by the process that took it as number `token`."""
    return make_report(writer={"run": run, "token": token}, **more)


LOST = r"'first' was stored by a later process of this run \(taking 3\); this one \(taking 2\) has"


@pytest.mark.parametrize("how", [{"overwrite": True}, {"attempt": "task"}, {}])
def test_a_process_that_has_lost_its_run_does_not_replace_what_a_later_one_stored(store, how):
    store.put_run(taken(3), make_samples(3), CURVES, attempt="task")

    with pytest.raises(StoreError, match=LOST):
        store.put_run(taken(2, kl=9.0), make_samples(1), **how)

    assert store.get_run("first") == taken(3)
    assert list(store.get_samples("first")) == make_samples(3)
    assert store.get_history("first") == CURVES


@pytest.mark.parametrize(
    "report",
    [taken(3, kl=9.0), taken(4), taken(10), taken(1, run="77aa"), make_report()],
    ids=["same process", "later", "much later", "another run", "no writer"],
)
def test_other_writers_may_overwrite_a_run(store, report):
    store.put_run(taken(3), make_samples(3))

    assert store.put_run(report, make_samples(1), overwrite=True)

    assert store.get_run("first") == report


def test_a_run_of_an_earlier_version_may_be_overwritten_by_any_process(store):
    store.put_run(make_report(), make_samples(3))

    assert store.put_run(taken(1), make_samples(1), overwrite=True)

    assert store.get_run("first") == taken(1)


@pytest.mark.parametrize(
    "writer", [5, "5f2c", [], {}, {"run": "5f2c"}, {"run": 5, "token": 1}, {"run": "", "token": 1}]
    + [{"run": "5f2c", "token": token} for token in (-1, True, 1.0, "1", 2**60)],
)  # fmt: skip
def test_a_writer_of_another_form_is_refused(store, writer):
    with pytest.raises(StoreError, match=r"The report's writer is .*; expected the id of the run"):
        store.put_run(make_report(writer=writer), [])

    assert store.list_runs() == []


def test_overwriting_a_missing_run_stores_it(store):
    store.put_run(make_report(), make_samples(2), overwrite=True)

    assert list(store.get_samples("first")) == make_samples(2)


def test_runs_are_listed_newest_first(store):
    store.put_run(make_report("b", "2026-01-31T12:00:00+00:00"), [])
    store.put_run(make_report("c", "2026-01-31T13:30:00+02:00"), [])  # 11:30 UTC
    store.put_run(make_report("a", "2026-01-31T12:00:00.5Z"), [])

    listed = store.list_runs()

    assert [run["run_id"] for run in listed] == ["a", "b", "c"]
    assert set(listed[0]) == {
        "run_id", "recipe", "status", "created", "n", "verdict", "toxicity",
    }  # fmt: skip
    assert listed[1]["toxicity"] == make_report()["toxicity"]
    assert listed[2]["created"] == "2026-01-31T13:30:00+02:00"


def test_a_run_without_samples_can_be_stored(store):
    store.put_run(make_report(), [])

    assert list(store.get_samples("first")) == []
    assert store.get_run("first") == make_report()


def test_a_missing_run_is_none(store):
    assert store.get_run("nobody") is None
    assert list(store.get_samples("nobody")) == []
    assert store.list_runs() == []


def test_a_working_store_passes_its_check_and_can_be_closed(store):
    store.check()
    store.close()
    store.put_run(make_report(), [])
    store.close()
    store.close()

    assert store.get_run("first") == make_report()


def test_runs_do_not_see_each_others_samples(store):
    store.put_run(make_report("run"), make_samples(2))
    store.put_run(make_report("run2"), make_samples(3))

    assert len(list(store.get_samples("run"))) == 2


def test_several_threads_may_write_at_once(store):
    errors = []

    def publish(name):
        try:
            store.put_run(make_report(name), make_samples(30))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(f"run-{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(store.list_runs()) == 6


# Only SQLite.


def test_reading_a_missing_file_does_not_create_it(sqlite_store):
    assert sqlite_store.list_runs() == []

    assert not sqlite_store.path.parent.exists()


def test_a_reader_sees_the_last_complete_state_during_a_write(sqlite_store):
    sqlite_store.put_run(make_report(), make_samples(3))

    with sqlite_store._writing() as db:
        db.execute("DELETE FROM samples")
        db.execute("DELETE FROM runs")
        seen = sqlite_store.get_run("first"), len(list(sqlite_store.get_samples("first")))

    assert seen == (make_report(), 3)


def test_a_reader_keeps_its_snapshot(sqlite_store):
    sqlite_store.put_run(make_report(), make_samples(3))
    reading = sqlite_store.get_samples("first")
    first = next(reading)

    sqlite_store.put_run(make_report(), make_samples(1, query="new"), overwrite=True)

    assert [first, *reading] == make_samples(3)


def test_an_interrupted_write_leaves_nothing(sqlite_store):
    def die_while_writing():
        with sqlite_store._writing() as db:
            db.execute(
                "INSERT INTO runs (run_id, created, summary, report) VALUES ('x', 'x', '{}', '{}')"
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die_while_writing()

    assert sqlite_store.list_runs() == []


def test_a_newer_schema_is_refused(sqlite_store):
    sqlite_store.check()
    with sqlite3.connect(sqlite_store.path) as db:
        db.execute("PRAGMA user_version = 7")

    store_one = lambda: sqlite_store.put_run(make_report(), [])
    for act in (sqlite_store.check, sqlite_store.list_runs, store_one):
        with pytest.raises(StoreError, match=r"newer version \(schema 7, this one knows 2\)"):
            act()


def test_a_file_that_is_not_a_database_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for a header of one. " * 9)

    for act in (SQLiteStore(path).check, SQLiteStore(path).list_runs):
        with pytest.raises(StoreError, match=r"notes\.txt cannot be used: file is not a database"):
            act()


def test_a_damaged_file_is_named(sqlite_store):
    sqlite_store.put_run(make_report(), make_samples(900))
    whole = sqlite_store.path.read_bytes()
    sqlite_store.path.write_bytes(whole[: len(whole) // 2])

    for act in (
        sqlite_store.list_runs,
        lambda: list(sqlite_store.get_samples("first")),
        lambda: sqlite_store.put_run(make_report("second"), make_samples(9)),
    ):
        with pytest.raises(StoreError, match="cannot be used: database disk image is malformed"):
            act()


def test_a_read_only_file_is_named_and_left_unchanged():
    # Not in tmp_path, which only root may read: root may write everywhere, so the test uses another user.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        store = SQLiteStore(f"{folder}/results.sqlite")
        store.put_run(make_report(), make_samples(3))
        store.path.chmod(0o444)

        with (
            not_as_root(),
            pytest.raises(StoreError, match=r"results\.sqlite cannot be used: .*read"),
        ):
            store.put_run(make_report("second"), [])

        store.path.chmod(0o644)
        assert [run["run_id"] for run in store.list_runs()] == ["first"]
        assert list(store.get_samples("first")) == make_samples(3)


@contextmanager
def not_as_root():
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="cannot be created"):
        SQLiteStore(tmp_path / "file" / "results.db").check()
    with pytest.raises(StoreError, match="is not a file"):
        SQLiteStore(tmp_path).check()


def test_a_locked_file_is_named(sqlite_store, monkeypatch):
    monkeypatch.setattr("ray_detox.store.sqlite._BUSY_TIMEOUT_S", 0.05)

    with sqlite_store._writing(), pytest.raises(StoreError, match="database is locked"):
        sqlite_store.put_run(make_report(), [])


def test_unusual_file_names_work(tmp_path):
    store = SQLiteStore(tmp_path / "50% of #1? ä" / "r.db")

    store.put_run(make_report(), make_samples(1))

    assert store.path.exists()
    assert store.get_run("first") == make_report()


# Only DynamoDB.


def items(store):
    return store.client.scan(TableName=store.table)["Items"]


def test_the_items_of_a_run_have_the_documented_keys(dynamo):
    dynamo.put_run(make_report(), [{"index": 42, "kl": 0.1, "tiny": 5e-324, "query": "?"}])

    meta, sample = sorted(items(dynamo), key=lambda item: item["sk"]["S"])

    assert (meta["pk"]["S"], meta["sk"]["S"]) == ("RUN#first", "META")
    assert (meta["state"]["S"], meta["n"]["N"]) == ("COMPLETE", "3")
    assert meta["list_pk"]["S"] == "RUNS"
    assert meta["created_at"]["S"] == "2026-01-31T12:00:00.000000+00:00#first"
    assert "run_id" not in meta  # an index by run_id would list META as a sample
    assert (sample["pk"]["S"], sample["sk"]["S"]) == ("RUN#first", "SAMPLE#00000042")
    assert sample["kl"] == {"N": "0.1"}
    assert sample["tiny"] == {"N": "0"}  # below the range of numbers; exact in the JSON
    assert sample["query"] == {"S": "?"}
    assert json.loads(sample["sample"]["S"])["tiny"] == 5e-324
    assert not {"list_pk", "toxicity_diff"} & set(sample)


def test_a_run_is_invisible_while_it_is_written(dynamo, monkeypatch):
    seen = []
    write = dynamo._write_batch

    def look_and_write(requests):
        seen.append((dynamo.get_run("first"), dynamo.list_runs()))
        seen.append(list(dynamo.get_samples("first")))
        write(requests)

    monkeypatch.setattr(dynamo, "_write_batch", look_and_write)
    dynamo.put_run(make_report(), make_samples(26))

    assert seen == [(None, []), []] * 2


@pytest.fixture(params=["dynamo", "dynalite", "ministack"])
def table_store(request):
    return request.getfixturevalue(request.param)


def test_an_unfinished_run_can_be_claimed(table_store, monkeypatch):
    long = make_samples(40)
    long[39]["query"] = "\u6c49" * 140_000
    with monkeypatch.context() as patch:
        patch.setattr(table_store, "_complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            table_store.put_run(make_report(), long, CURVES)
    assert table_store.get_run("first") is None

    table_store.put_run(make_report(), make_samples(2))

    assert list(table_store.get_samples("first")) == make_samples(2)
    # The 38 orphaned items are deleted, with the long text and the history.
    keys = sorted(item["sk"]["S"] for item in items(table_store))
    assert keys == ["META", "SAMPLE#00000000", "SAMPLE#00000001"]


def test_a_later_process_that_stores_its_result_meanwhile_wins(table_store, monkeypatch):
    later = DynamoDBStore(table_store.table, region=REGION, endpoint_url=table_store._endpoint_url)
    write = table_store._write_batch

    def write_after_the_other(requests):
        if later.get_run("first") is None:
            later.put_run(taken(3), make_samples(3), overwrite=True)
        write(requests)

    monkeypatch.setattr(table_store, "_write_batch", write_after_the_other)
    with pytest.raises(StoreError, match=LOST):
        table_store.put_run(taken(2), make_samples(60), overwrite=True)
    later.put_run(taken(3), make_samples(3), overwrite=True)  # repairs what the late batch replaced

    assert later.get_run("first") == taken(3)
    assert list(later.get_samples("first")) == make_samples(3)
    later.close()


def test_a_process_that_has_lost_its_run_does_not_claim_what_a_later_one_has_begun(
    table_store, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(table_store, "_complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            table_store.put_run(taken(3), make_samples(3))

    with pytest.raises(StoreError, match=LOST):
        table_store.put_run(taken(2), make_samples(1))
    table_store.put_run(taken(3), make_samples(3))

    assert table_store.get_run("first") == taken(3)


def test_a_text_too_long_for_an_item_is_stored_in_parts(table_store):
    # 250,000 characters would fit into an item; their 750,000 bytes do not.
    text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FA5, 250_000)))

    table_store.put_run(make_report(), [{"index": 7, "query": text, "kl": 0.5}])

    found = {item["sk"]["S"]: item for item in items(table_store)}
    assert {"META", "SAMPLE#00000007", "TEXT#00000007#0000", "TEXT#00000007#0001"} <= set(found)
    assert found["SAMPLE#00000007"]["query"]["S"] == text[:2000]
    assert found["SAMPLE#00000007"]["kl"] == {"N": "0.5"}
    assert all(len(item["part"]["B"]) <= 350_000 for item in found.values() if "part" in item)
    assert table_store.get_sample("first", 7)["query"] == text


def test_of_two_writers_the_later_wins_and_the_earlier_stops(dynamo, endpoint, monkeypatch):
    rival = DynamoDBStore(dynamo.table, region=REGION, endpoint_url=endpoint)
    write = dynamo._write_batch

    def write_and_be_overtaken(requests):
        monkeypatch.setattr(dynamo, "_write_batch", write)
        write(requests)
        rival.put_run(make_report(kl=2.0), make_samples(20, query="rival"))

    monkeypatch.setattr(dynamo, "_write_batch", write_and_be_overtaken)
    with pytest.raises(StoreError, match="written by another process at the same time"):
        dynamo.put_run(make_report(), make_samples(60))

    assert rival.get_run("first") == make_report(kl=2.0)
    assert list(rival.get_samples("first")) == make_samples(20, query="rival")


def test_samples_of_two_writers_are_never_mixed(dynamo, endpoint, monkeypatch):
    rival = DynamoDBStore(dynamo.table, region=REGION, endpoint_url=endpoint)
    write = dynamo._write_batch

    def be_overtaken_and_write(requests):
        monkeypatch.setattr(dynamo, "_write_batch", write)
        rival.put_run(make_report(kl=2.0), make_samples(30, query="rival"))
        write(requests)  # sent before the rival claimed the run

    monkeypatch.setattr(dynamo, "_write_batch", be_overtaken_and_write)
    with pytest.raises(StoreError, match="written by another process at the same time"):
        dynamo.put_run(make_report(), make_samples(10))

    with pytest.raises(StoreError, match="has 30 samples, but 20 could be read"):
        list(rival.get_samples("first"))
    again = make_report(kl=2.0), make_samples(30, query="rival")
    assert not rival.put_run(*again)
    assert rival.put_run(*again, overwrite=True)
    assert list(rival.get_samples("first")) == again[1]
    assert not rival.put_run(*again, overwrite=True)


class Client:
    """A client that writes only a part of each batch."""

    def __init__(self, client, spoil):
        self._client, self._spoil, self.calls = client, spoil, 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def batch_write_item(self, RequestItems):
        self.calls += 1
        (table, requests) = next(iter(RequestItems.items()))
        kept, left = self._spoil(requests)
        if kept:
            self._client.batch_write_item(RequestItems={table: kept})
        return {"UnprocessedItems": {table: left} if left else {}}


def test_items_that_a_busy_table_did_not_take_are_sent_again(dynamo, monkeypatch):
    pauses = []
    monkeypatch.setattr("ray_detox.store.backoff._sleep", pauses.append)
    dynamo.client = Client(dynamo.client, lambda r: (r[: len(r) // 2 + 1], r[len(r) // 2 + 1 :]))

    dynamo.put_run(make_report(), make_samples(30))

    assert list(dynamo.get_samples("first")) == make_samples(30)
    assert dynamo.client.calls > 2
    assert len(pauses) == dynamo.client.calls - 2
    assert all(0 < pause <= 5 for pause in pauses)


def test_a_table_that_stays_busy_is_an_error_after_the_last_attempt(dynamo, monkeypatch):
    pauses = []
    monkeypatch.setattr("ray_detox.store.backoff._sleep", pauses.append)
    dynamo.client = Client(dynamo.client, lambda requests: ([], requests))

    with pytest.raises(StoreError, match="too busy"):
        dynamo.put_run(make_report(), make_samples(3))

    assert len(pauses) == 7
    assert dynamo.list_runs() == []


def test_a_report_too_large_is_refused_before_the_first_write(dynamo):
    with pytest.raises(StoreError, match="The report of run 'first' takes 42"):
        dynamo.put_run(make_report(log="汉" * 140_000), make_samples(30))

    assert items(dynamo) == []


def test_many_samples_are_read_over_many_pages(dynamo):
    samples = make_samples(12, reference="r" * 200_000)

    dynamo.put_run(make_report(), samples)

    assert list(dynamo.get_samples("first")) == samples


def test_a_missing_table_is_named(endpoint):
    store = DynamoDBStore("nowhere", region=REGION, endpoint_url=endpoint)

    for act in (store.check, lambda: store.put_run(make_report(), []), store.list_runs):
        with pytest.raises(StoreError, match="Table 'nowhere' was not found in eu-central-1"):
            act()


def test_a_table_with_other_keys_is_named(endpoint):
    store = DynamoDBStore("published", region=REGION, endpoint_url=endpoint)
    store.client.create_table(
        TableName="published",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "conversation_id", "AttributeType": "N"}],
        KeySchema=[{"AttributeName": "conversation_id", "KeyType": "HASH"}],
    )

    with pytest.raises(
        StoreError, match=r"has the keys conversation_id \(N\); expected pk \(S\), sk"
    ):
        store.check()
    with pytest.raises(StoreError, match="Table 'published' cannot hold results"):
        store.create_table()


def test_a_table_without_the_index_is_named(endpoint):
    store = DynamoDBStore("bare", region=REGION, endpoint_url=endpoint)
    store.client.create_table(
        TableName="bare",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": n, "AttributeType": "S"} for n in ("pk", "sk")],
        KeySchema=table_schema("bare")["KeySchema"],
    )

    with pytest.raises(StoreError, match=r"index by_time has the keys \(there is none\)"):
        store.check()


def test_a_table_is_created_once_if_the_command_is_repeated(dynamo):
    assert dynamo.create_table() is False


def test_a_run_of_a_newer_schema_is_refused(dynamo):
    dynamo.put_run(make_report(), [])
    dynamo.client.update_item(
        TableName=dynamo.table,
        Key={"pk": {"S": "RUN#first"}, "sk": {"S": "META"}},
        UpdateExpression="SET #s = :seven",
        ExpressionAttributeNames={"#s": "schema"},
        ExpressionAttributeValues={":seven": {"N": "7"}},
    )

    with pytest.raises(StoreError, match=r"newer version \(schema 7"):
        dynamo.get_run("first")


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_may_come_from_the_environment(endpoint, monkeypatch, name):
    monkeypatch.setenv(name, "us-west-2")

    assert DynamoDBStore("t", endpoint_url=endpoint).client.meta.region_name == "us-west-2"


def test_a_missing_region_is_named(endpoint):
    with pytest.raises(StoreError, match="No AWS region is set"):
        DynamoDBStore("t", endpoint_url=endpoint).check()


def test_missing_credentials_are_named(endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(StoreError, match="No AWS credentials were found"):
        DynamoDBStore("t", region=REGION, endpoint_url=endpoint).check()


def test_an_unknown_profile_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")

    with pytest.raises(StoreError, match="AWS_PROFILE does not exist"):
        DynamoDBStore("t", region=REGION, endpoint_url=endpoint).check()


def test_a_sign_in_that_is_missing_is_named_with_its_command(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "config").write_text(
        "[profile p]\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\n"
        "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://example.com/start\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "p")

    with pytest.raises(StoreError, match="aws sso login --profile p"):
        DynamoDBStore("t", region=REGION, endpoint_url=endpoint).check()


def test_an_invalid_endpoint_is_named():
    with pytest.raises(StoreError, match=r"results\.endpoint_url is not a valid address"):
        DynamoDBStore("t", region=REGION, endpoint_url="localhost:8000").check()


def test_an_endpoint_that_refuses_is_named_without_its_password(monkeypatch):
    monkeypatch.setattr(dynamodb_module, "Config", lambda **_: FAST)
    store = DynamoDBStore("t", region=REGION, endpoint_url="http://me:hunter2@127.0.0.1:9")

    with pytest.raises(StoreError, match=r"could not be reached at 127\.0\.0\.1:9") as caught:
        store.check()
    assert "hunter2" not in str(caught.value)


FAST = Config(connect_timeout=1, retries={"total_max_attempts": 1})


def test_an_invalid_table_name_is_named(endpoint):
    with pytest.raises(StoreError, match="'' is not a valid name of a DynamoDB table"):
        DynamoDBStore("", region=REGION, endpoint_url=endpoint).check()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AccessDeniedException", "AWS does not allow describe_table on table"),
        ("ExpiredTokenException", r"refused the credentials \(ExpiredTokenException\)"),
        ("InvalidSignatureException", "Sign in again"),
        ("ProvisionedThroughputExceededException", "too busy"),
        ("LimitExceededException", r"\(LimitExceededException\)"),
    ],
)
def test_a_refusal_of_aws_is_reported_without_its_own_message(dynamo, monkeypatch, code, words):
    def refuse(**_):
        message = f"The canonical string should have been x-amz-security-token:{SECRET}"
        raise botocore.exceptions.ClientError(
            {"Error": {"Code": code, "Message": message}}, "DescribeTable"
        )

    monkeypatch.setattr(dynamo.client, "describe_table", refuse)

    monkeypatch.setattr(dynamo.client, "create_table", lambda **_: {})

    for act in (dynamo.check, dynamo.create_table):
        with pytest.raises(StoreError, match=words) as caught:
            act()
        assert SECRET not in str(caught.value)
        assert caught.value.__suppress_context__


# Opening.


def test_settings_select_the_store(tmp_path):
    assert isinstance(open_store("sqlite", tmp_path / "r.db", ""), SQLiteStore)
    assert isinstance(open_store("dynamodb", "", "t", REGION, None), DynamoDBStore)
    with pytest.raises(StoreError, match="Unknown store 'redis'; expected sqlite or dynamodb"):
        open_store("redis", "", "")


def test_the_sqlite_store_imports_no_heavy_library():
    program = (
        "import sys; from ray_detox.store.opening import open_store; open_store('sqlite', 'r.db', '');"
        "import ray_detox.runs.report_text;"
        "assert not {'boto3', 'torch', 'ray', 'numpy'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


# ---- pages -----------------------------------------------------------------------------------


def scored_samples(n):
    """Samples with distinct differences, and some without a difference."""
    generator = np.random.default_rng(0)
    samples = []
    for i, (before, after) in enumerate(generator.random((n, 2)).tolist()):
        samples.append(
            {
                "index": 3 * i,
                "query": f"Prompt {i} \u7b28\u86cb" if i % 5 == 0 else f"Prompt {i}",
                "reference": "GRO\u00dfe" if i % 7 == 0 else None,
                "response_before": "b" * (i % 11),
                "response_after": "a",
                "toxicity_before": before,
                "toxicity_after": None if i % 10 == 9 else after,
                "reward_before": -before,
                "reward_after": None if i % 12 == 11 else after / 3,
            }
        )
    return samples


def all_pages(store, query, limit):
    rows, cursor = [], None
    while True:
        page = store.sample_page("first", query, limit, cursor)
        assert len(page.rows) <= limit
        rows += page.rows
        if page.next is None:
            return rows
        assert len(page.next) <= 1000
        cursor = page.next


def test_pages_contain_the_matching_samples_in_order(store):
    samples = scored_samples(60)
    samples[7]["toxicity_after"] = samples[7]["toxicity_before"] + 0.25
    report = make_report(toxicity={"toxic_above": 0.4, "same_within": 0.25})
    store.put_run(report, samples)

    queries = [SampleQuery(*some) for some in itertools.product(SORTS, (False, True), SHOWS)]
    searches = ("\u7b28\u86cb", "gro\u00dfE", "nowhere")
    queries += [SampleQuery("toxicity", True, "worse", search) for search in searches]
    for query in queries:
        expected = [row for row in map(as_row, samples) if matches(row, query, limits_of(report))]
        expected.sort(key=lambda row: row[query.key], reverse=query.descending)

        # Seven at a time, or all at once: the same rows.
        for limit in (7, 100) if query.show == "all" else (20,):
            assert all_pages(store, query, limit) == expected, query


def test_a_run_without_limits_gets_the_defaults_of_its_version():
    assert limits_of({"toxicity": None}) == limits_of({}) == Limits(0.5, 0.0)
    assert limits_of({"toxicity": {"toxic_above": 1, "same_within": None}}) == Limits(1.0, 0.0)


def test_a_missing_run_has_no_page_no_sample_and_no_history(store):
    assert store.sample_page("first") is None
    assert store.get_sample("first", 0) is None
    assert store.get_history("first") == []


def test_runs_with_no_or_one_sample_have_pages(store):
    store.put_run(make_report(), [])
    store.put_run(make_report("second"), make_samples(1))

    assert store.sample_page("first").rows == []
    assert [row["index"] for row in store.sample_page("second").rows] == [0]
    assert store.get_sample("second", 1) is None


def test_one_sample_and_the_history_survive_the_store(store):
    store.put_run(make_report(), make_samples(3), CURVES)

    assert json.dumps(store.get_sample("first", 1)) == json.dumps(make_samples(3)[1])
    assert json.dumps(store.get_history("first")) == json.dumps(CURVES)


def test_the_list_of_runs_has_pages(store):
    for i in range(5):
        store.put_run(make_report(f"run-{i}", f"2026-01-0{i + 1}T00:00:00+00:00"), [])

    first = store.list_page(2)
    second = store.list_page(2, first.next)
    third = store.list_page(2, second.next)

    found = [run["run_id"] for page in (first, second, third) for run in page.rows]
    assert found == ["run-4", "run-3", "run-2", "run-1", "run-0"]
    assert third.next is None


FUTURE = "2999-01-0{}T00:00:00+00:00"


def test_runs_whose_clock_was_ahead_come_last(store):
    soon = (datetime.now(UTC) + timedelta(hours=20)).isoformat()
    for run_id, created in {
        "older": "2026-01-01T00:00:00+00:00",
        "ahead": FUTURE.format(1),
        "soon": soon,
        "further": FUTURE.format(2),
        "newer": "2026-01-02T00:00:00+00:00",
    }.items():
        store.put_run(make_report(run_id, created), [])

    listed = ["soon", "newer", "older", "further", "ahead"]
    assert [run["run_id"] for run in store.list_runs()] == listed
    for limit in range(1, 6):
        found, cursor = [], None
        while cursor is not None or not found:
            page = store.list_page(limit, cursor)
            assert len(page.rows) <= limit
            found += [run["run_id"] for run in page.rows]
            cursor = page.next
        assert found == listed, limit


def test_pages_of_one_list_agree_on_what_is_the_future(store, monkeypatch):
    for i, created in enumerate(("2026-01-01T00:00:00+00:00", FUTURE.format(1), FUTURE.format(3))):
        store.put_run(make_report(f"run-{i}", created), [])
    first = store.list_page(1)
    between = FUTURE.format(2).replace("+", ".000000+")
    for module in (sqlite_module, dynamodb_module):
        monkeypatch.setattr(module, "future_from", lambda: between)

    second = store.list_page(1, first.next)
    third = store.list_page(1, second.next)

    found = [run["run_id"] for page in (first, second, third) for run in page.rows]
    assert found == ["run-0", "run-2", "run-1"]
    assert [run["run_id"] for run in store.list_runs()] == ["run-1", "run-0", "run-2"]


def test_a_cursor_with_other_moments_is_refused(store):
    moment = "2026-01-01T00:00:00.000000+00:00"
    for place in (["", moment, "a"], [moment, "~", "a"], [moment, moment, ""], [moment, "a"]):
        with pytest.raises(BadCursor):
            store.list_page(2, encode_cursor(place, "runs"))


@pytest.mark.parametrize("junk", ["junk", "x" * 5000, "W10", "bnVsbA", "\u0663", "", "====", "e30"])
def test_a_cursor_of_another_list_is_refused(store, junk):
    store.put_run(make_report(), scored_samples(30))
    store.put_run(make_report("second"), scored_samples(30))
    other_run = store.sample_page("second", limit=2).next
    other_query = store.sample_page("first", SampleQuery("toxicity"), limit=2).next

    for cursor in (junk, other_run, other_query):
        with pytest.raises(BadCursor):
            store.sample_page("first", limit=2, cursor=cursor)
    with pytest.raises(BadCursor):
        store.list_page(2, junk)


def test_a_text_of_five_megabytes_is_stored_and_shortened_in_a_page(store):
    text = "\u6c49\u0000\u202e" + "".join(
        map(chr, np.random.default_rng(0).integers(97, 500, 2_500_000))
    )
    samples = make_samples(2)
    samples[1] |= {"response_after": text, "toxicity_after": 0.5}

    store.put_run(make_report(), samples)

    assert list(store.get_samples("first")) == samples
    assert store.get_sample("first", 1) == samples[1]
    page = store.sample_page("first", SampleQuery("toxicity"))
    (row,) = page.rows
    assert row["toxicity_diff"] == 0.5 - 1 / 7
    assert row["response_after"][:2000] == text[:2000]
    if "overflow" in row:
        assert row["overflow"] == ["response_after"]
        assert len(row["response_after"]) == 2000


def test_missing_values_of_pandas_count_as_not_finite(store):
    sample = {"index": 0, "toxicity_after": pd.NA, "kl": pd.NaT, "reward_after": np.float32("nan")}
    sample["judge_after"] = torch.tensor(-math.inf)

    store.put_run(make_report(), [sample])

    (found,) = store.get_samples("first")
    assert found["invalid"] == ["toxicity_after", "kl", "reward_after", "judge_after"]
    assert found["toxicity_after"] is found["kl"] is None


def test_a_file_of_an_earlier_version_is_read_and_upgraded(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as db:
        for statement in sqlite_module._SCHEMA_1:
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        report, sample = make_report(), scored_samples(1)[0]
        summary = {key: report[key] for key in SUMMARY_KEYS}
        texts = [json.dumps(value) for value in (summary, report, sample)]
        db.execute("INSERT INTO runs VALUES ('first', '2026', ?, ?)", texts[:2])
        db.execute("INSERT INTO samples VALUES ('first', 0, ?)", texts[2:])
    db.close()
    store = SQLiteStore(path)

    assert store.get_run("first") == report
    assert store.sample_page("first", SampleQuery("toxicity")).rows == [as_row(sample)]
    assert store.get_history("first") == []
