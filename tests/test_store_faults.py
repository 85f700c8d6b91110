"""What a store does when the way to it, the table or its own process fails: on real wires."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
from botocore.config import Config

from ray_detox.store import StoreError
from ray_detox.store import dynamodb as dynamodb_module
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.sqlite import SQLiteStore
from tests.emulators import emulator
from tests.faultproxy import FOR_EVER, FaultProxy
from tests.test_store import CURVES, make_report, make_samples

REGION = "eu-central-1"


@pytest.fixture(scope="module")
def endpoint():
    with emulator("moto") as address:
        yield address


@pytest.fixture(autouse=True)
def aws(monkeypatch):
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIsecret")


@pytest.fixture
def proxy(endpoint):
    proxy = FaultProxy(endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def table(request, endpoint):
    name = f"faults-{abs(hash(request.node.name))}"
    store = DynamoDBStore(name, region=REGION, endpoint_url=endpoint)
    store.create_table()
    store.close()
    return name


@pytest.fixture
def store(proxy, table, monkeypatch):
    """A store behind the proxy, whose pauses take no time."""
    monkeypatch.setattr(dynamodb_module, "_pause", lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time", types.SimpleNamespace(sleep=lambda seconds: None))
    patience = Config(read_timeout=0.5, retries={"mode": "standard", "total_max_attempts": 4})
    monkeypatch.setattr(dynamodb_module, "_PATIENT", patience)
    store = DynamoDBStore(table, region=REGION, endpoint_url=proxy.address)
    yield store
    store.close()


def stored(store):
    return store.get_run("first"), list(store.get_samples("first")), store.get_curves("first")


WHOLE = make_report(), make_samples(60), CURVES


@pytest.mark.parametrize(
    ("operation", "kind", "times"),
    [
        ("BatchWriteItem", "half", 3),
        ("BatchWriteItem", "none", 3),
        ("BatchWriteItem", "throttle", 3),
        ("BatchWriteItem", "broken", 3),
        ("BatchWriteItem", "reset", 2),
        ("BatchWriteItem", "lost", 2),
        ("BatchWriteItem", "hang", 1),
        ("PutItem", "lost", 1),
        ("PutItem", "reset", 2),
        ("Query", "broken", 2),
        ("GetItem", "throttle", 2),
    ],
)
def test_what_passes_is_overcome(store, proxy, operation, kind, times):
    proxy.fail(operation, kind, times)

    assert store.put_run(*WHOLE)

    assert stored(store) == WHOLE


def test_a_lost_answer_to_the_last_write_is_overcome(store, proxy):
    proxy.fail("PutItem", "lost", after=1)

    assert store.put_run(*WHOLE)

    assert stored(store) == WHOLE


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "too busy"),
        ("half", "too busy"),
        ("throttle", "too busy"),
        ("broken", r"refused batch_write_item on table .* \(InternalServerError\)"),
        ("reset", "could not be reached at 127"),
        ("hang", "could not be reached at 127"),
        ("denied", "allows no batch_write_item on table"),
        ("expired", r"refused the credentials \(ExpiredTokenException\)"),
    ],
)
def test_what_does_not_pass_ends_in_a_sentence_and_a_repeat_goes_on(store, proxy, kind, words):
    # The second batch of three; a half of 25 is soon nothing, but one that stays is never taken.
    for operation_kind in {kind, "none"} if kind == "half" else {kind}:
        proxy.fail("BatchWriteItem", operation_kind, FOR_EVER, after=1)

    with pytest.raises(StoreError, match=words) as caught:
        store.put_run(*WHOLE)

    assert "secret" not in str(caught.value)
    assert store.list_runs() == []
    assert stored(store) == (None, [], [])
    proxy._faults.clear()
    assert store.put_run(*WHOLE)
    assert stored(store) == WHOLE


def test_a_hurried_reader_gives_up_soon(proxy, table):
    store = DynamoDBStore(table, region=REGION, endpoint_url=proxy.address, hurried=True)
    proxy.fail("GetItem", "hang", FOR_EVER)
    start = time.monotonic()

    with pytest.raises(StoreError, match="could not be reached"):
        store.get_run("first")

    assert proxy.calls["GetItem"] == 1
    assert time.monotonic() - start < 5  # the proxy's own patience: it was not waited for


def test_a_repeated_publish_writes_nothing(store, proxy):
    assert store.put_run(*WHOLE)
    written = proxy.calls["PutItem"], proxy.calls["BatchWriteItem"]

    assert not store.put_run(*WHOLE)

    assert (proxy.calls["PutItem"], proxy.calls["BatchWriteItem"]) == written
    with pytest.raises(StoreError, match="Another run 'first' is already"):
        store.put_run(make_report(kl=9.0), make_samples(60))
    assert proxy.calls["BatchWriteItem"] == written[1]


def test_an_attempt_of_the_same_name_may_write_again(store):
    store.put_run(*WHOLE, attempt="task-1")

    assert store.put_run(make_report(kl=9.0), make_samples(2), attempt="task-1")
    with pytest.raises(StoreError, match="already"):
        store.put_run(*WHOLE, attempt="task-2")

    assert stored(store) == (make_report(kl=9.0), make_samples(2), [])


PUBLISH = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from ray_detox.store.dynamodb import DynamoDBStore
    from ray_detox.store.sqlite import SQLiteStore
    from tests.test_store import CURVES, make_report, make_samples
    if sys.argv[2] == "sqlite":
        store = SQLiteStore(sys.argv[3])
    else:
        store = DynamoDBStore(sys.argv[3], region="eu-central-1", endpoint_url=sys.argv[2])
    print("ready", flush=True)
    store.put_run(make_report(), make_samples(60, reference="r" * 100), CURVES)
"""


def publishing(*arguments):
    root = os.path.dirname(os.path.dirname(__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PUBLISH), root, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_task_that_is_killed_between_batches_can_be_repeated(store, proxy, table, batches):
    proxy.fail("BatchWriteItem", "hang", FOR_EVER, after=batches)
    process = publishing(proxy.address, table)
    while proxy.calls["BatchWriteItem"] <= batches:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert stored(store) == (None, [], [])

    proxy._faults.clear()
    again = make_report(), make_samples(60, reference="r" * 100), CURVES
    assert store.put_run(*again)

    assert stored(store) == again
    found = store.client.scan(TableName=table, Select="COUNT")
    assert found["Count"] == 60 + 2  # the samples, META and the curves: no orphan


def test_a_killed_writer_of_the_file_leaves_it_whole(tmp_path):
    path = tmp_path / "results.sqlite"
    for delay in (0.0, 0.002, 0.005, 0.02):
        process = publishing("sqlite", path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert len(SQLiteStore(path).list_runs()) in (0, 1)

    store = SQLiteStore(path)
    store.put_run(*WHOLE, overwrite=True)
    assert stored(store) == WHOLE


@pytest.mark.parametrize("kind", ["sqlite", "dynamodb"])
def test_of_two_publishers_at_once_one_wins_and_the_run_is_whole(kind, tmp_path, table, endpoint):
    def open_one():
        if kind == "sqlite":
            return SQLiteStore(tmp_path / "results.sqlite")
        return DynamoDBStore(table, region=REGION, endpoint_url=endpoint)

    runs = [(make_report(kl=float(i)), make_samples(40 + i), CURVES) for i in range(2)]
    start = threading.Barrier(2)
    outcomes = [None, None]

    def publish(i):
        store = open_one()
        start.wait()
        try:
            outcomes[i] = store.put_run(*runs[i])
        except StoreError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    store = open_one()
    if True not in outcomes:
        # Each took the other's place; nothing half is shown, and a repeat settles it.
        assert store.get_run("first") is None
        assert store.put_run(*runs[0])
        outcomes[0] = True
    (loser,) = [outcome for outcome in outcomes if outcome is not True]
    assert "already" in loser or "another process" in loser
    assert stored(store) == runs[outcomes.index(True)]
    assert json.dumps(store.get_run("first")) == json.dumps(runs[outcomes.index(True)][0])
