"""Failures of the network, the table and the store's own process, over real connections."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
from botocore.config import Config

from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample
from ray_detox.evaluation.summarise import RunFacts
from ray_detox.recipes.loading import load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.publish import publish
from ray_detox.store import dynamodb as dynamodb_module
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.errors import StoreError
from ray_detox.store.sqlite import SQLiteStore
from tests.emulators import emulator
from tests.faultproxy import FOR_EVER, FaultProxy
from tests.test_store import CURVES, make_report, make_samples

REGION = "eu-central-1"
ROOT = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture(scope="module")
def endpoint(request):
    with emulator(getattr(request, "param", "moto")) as address:
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
    """A store behind the proxy, with pauses of no length."""
    monkeypatch.setattr("ray_detox.store.backoff._sleep", lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time", types.SimpleNamespace(sleep=lambda seconds: None))
    patience = Config(read_timeout=0.5, retries={"mode": "standard", "total_max_attempts": 4})
    monkeypatch.setattr(dynamodb_module, "PATIENT", patience)
    store = DynamoDBStore(table, region=REGION, endpoint_url=proxy.address)
    yield store
    store.close()


def stored(store):
    return store.get_run("first"), list(store.get_samples("first")), store.get_history("first")


RUN = make_report(), make_samples(60), CURVES


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
def test_a_temporary_fault_is_retried(store, proxy, operation, kind, times):
    proxy.fail(operation, kind, times)

    assert store.put_run(*RUN)

    assert stored(store) == RUN


def test_a_lost_answer_to_the_last_write_is_retried(store, proxy):
    proxy.fail("PutItem", "lost", after=1)

    assert store.put_run(*RUN)

    assert stored(store) == RUN


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "too busy"),
        ("half", "too busy"),
        ("throttle", "too busy"),
        ("broken", r"refused batch_write_item on table .* \(InternalServerError\)"),
        ("reset", "could not be reached at 127"),
        ("hang", "could not be reached at 127"),
        ("denied", "does not allow batch_write_item on table"),
        ("expired", r"refused the credentials \(ExpiredTokenException\)"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_a_repeat_succeeds(store, proxy, kind, words):
    # The fault hits the second batch of three. Of 25 items that are halved, one is never taken.
    proxy.fail("BatchWriteItem", kind, FOR_EVER, after=1)

    with pytest.raises(StoreError, match=words) as caught:
        store.put_run(*RUN)

    assert "secret" not in str(caught.value)
    assert store.list_runs() == []
    assert stored(store) == (None, [], [])
    proxy.heal()
    assert store.put_run(*RUN)
    assert stored(store) == RUN


def test_a_hurried_reader_fails_within_two_seconds(proxy, table):
    store = DynamoDBStore(table, region=REGION, endpoint_url=proxy.address, hurried=True)
    proxy.fail("GetItem", "hang", FOR_EVER)

    with pytest.raises(StoreError, match="could not be reached"):
        store.get_run("first")

    # One request, and a wait of less than two seconds.
    assert proxy.calls["GetItem"] == 1
    patience = store.client.meta.config
    assert patience.connect_timeout + patience.read_timeout < 2


def test_a_confirmed_write_that_was_not_made_is_detected(store, proxy):
    proxy.fail("BatchWriteItem", "swallow", after=1)

    with pytest.raises(StoreError, match=r"Of 61 items of run 'first', 36 are in table"):
        store.put_run(*RUN)

    assert store.list_runs() == []
    assert store.get_run("first") is None
    assert store.put_run(*RUN)
    assert stored(store) == RUN


def test_a_failed_overwrite_can_be_repeated(store, proxy):
    store.put_run(make_report(kl=9.0), make_samples(90))
    proxy.fail("BatchWriteItem", "denied", after=1)

    with pytest.raises(StoreError, match="does not allow batch_write_item"):
        store.put_run(*RUN, overwrite=True)

    # Neither the old run nor the new one is complete, so neither is shown.
    assert store.list_runs() == []
    assert stored(store) == (None, [], [])
    assert store.put_run(*RUN)
    assert stored(store) == RUN


def test_a_repeated_publish_writes_nothing(store, proxy):
    assert store.put_run(*RUN)
    written = proxy.calls["PutItem"], proxy.calls["BatchWriteItem"]

    assert not store.put_run(*RUN)

    assert (proxy.calls["PutItem"], proxy.calls["BatchWriteItem"]) == written
    with pytest.raises(StoreError, match="Another run 'first' is already"):
        store.put_run(make_report(kl=9.0), make_samples(60))
    assert proxy.calls["BatchWriteItem"] == written[1]


def test_an_attempt_of_the_same_name_may_write_again(store):
    store.put_run(*RUN, attempt="task-1")

    assert store.put_run(make_report(kl=9.0), make_samples(2), attempt="task-1")
    with pytest.raises(StoreError, match="already"):
        store.put_run(*RUN, attempt="task-2")

    assert stored(store) == (make_report(kl=9.0), make_samples(2), [])


PUBLISH = """
    import pickle, sys
    sys.path.insert(0, sys.argv[1])
    from ray_detox.store.dynamodb import DynamoDBStore
    from ray_detox.store.sqlite import SQLiteStore
    run = pickle.load(sys.stdin.buffer)
    if sys.argv[2] == "sqlite":
        store = SQLiteStore(sys.argv[3])
    else:
        store = DynamoDBStore(sys.argv[3], region="eu-central-1", endpoint_url=sys.argv[2])
    print("ready", flush=True)
    store.put_run(*run)
"""


def start_with(input, program, *arguments, **pipes):
    """Start a program in a process of its own, with `input` pickled on its standard input.

    The program need not import the module of a test to get it, which would load torch.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), ROOT, *map(str, arguments)],
        stdin=subprocess.PIPE,
        **pipes,
    )
    process.stdin.write(pickle.dumps(input))
    process.stdin.close()
    return process


def publishing(*arguments):
    run = make_report(), make_samples(60, reference="r" * 100), CURVES
    process = start_with(run, PUBLISH, *arguments, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(
    "endpoint, batches",
    [("moto", 0), ("moto", 1), ("dynalite", 2), ("ministack", 1)],
    indirect=["endpoint"],
)
def test_a_task_that_is_killed_between_batches_can_be_repeated(store, proxy, table, batches):
    proxy.fail("BatchWriteItem", "hang", FOR_EVER, after=batches)
    process = publishing(proxy.address, table)
    while proxy.calls["BatchWriteItem"] <= batches:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert stored(store) == (None, [], [])

    proxy.heal()
    again = make_report(), make_samples(60, reference="r" * 100), CURVES
    assert store.put_run(*again)

    assert stored(store) == again
    found = store.client.scan(TableName=table, Select="COUNT")
    assert found["Count"] == 60 + 2  # the samples, META and the history: no orphaned item


def test_a_killed_writer_leaves_the_file_consistent(tmp_path):
    path = tmp_path / "results.sqlite"
    for delay in (0.0, 0.002, 0.005, 0.02):
        process = publishing("sqlite", path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert len(SQLiteStore(path).list_runs()) in (0, 1)

    store = SQLiteStore(path)
    store.put_run(*RUN, overwrite=True)
    assert stored(store) == RUN


FINAL_TASK = """
    import pickle, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from ray_detox.recipes.loading import load_config
    from ray_detox.runs.folder import RunFolder
    from ray_detox.stages.finish import store_result
    scored, facts = pickle.load(sys.stdin.buffer)
    config = load_config("lab", sys.argv[3:])
    folder = RunFolder(Path(sys.argv[2]), "first")
    store_result._function(config, folder, scored, facts, attempt="one", overwrite=False)
"""
FACTS = RunFacts(
    run_id="first",
    steps=1,
    rows={"read": 4, "left_out": {}, "examples": {}, "train": 2, "held_out": 2},
    seconds={},
    training={},
    fingerprints={},
    record={},
)


def scored():
    before, after = (
        EvaluatedResponse("They met.", 1.0, toxicity, 3, False, True) for toxicity in (0.9, 0.1)
    )
    return [
        PairedExample(
            index=i,
            prompt_id=f"{i:016x}",
            query="q",
            reference="They met.",
            facts=("met",),
            kl=0.5,
            before=before,
            after=after,
        )
        for i in range(60)
    ]


def test_a_final_task_killed_while_storing_loses_nothing(store, proxy, table, tmp_path):
    folder = RunFolder(tmp_path, "first")
    folder.path.mkdir()
    (folder.path / "config.json").write_text(json.dumps(load_config("lab").to_dict()))
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\n')
    settings = ["results.store=dynamodb", f"results.table={table}", f"results.region={REGION}"]
    settings += [f"results.endpoint_url={proxy.address}"]
    proxy.fail("BatchWriteItem", "hang", FOR_EVER, after=1)
    process = start_with((scored(), FACTS), FINAL_TASK, tmp_path, *settings)
    while proxy.calls["BatchWriteItem"] <= 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    # The store has no result, and the files of the run are complete.
    assert stored(store) == (None, [], [])
    assert folder.read_result()[0]["n"] == 60

    proxy.heal()
    assert publish(load_config("lab", settings).results, folder)

    report, examples = folder.read_result()
    samples = [example.to_json() for example in examples]
    assert stored(store) == (report, samples, [{"step": 1, "score": 0.5}])


@pytest.fixture
def open_one(request, tmp_path, endpoint, table):
    """A function that opens the same store each time."""
    if request.param == "sqlite":
        return lambda: SQLiteStore(tmp_path / "results.sqlite")
    return lambda: DynamoDBStore(table, region=REGION, endpoint_url=endpoint)


EVERY_STORE = pytest.mark.parametrize(
    "open_one, endpoint",
    [("sqlite", "moto"), ("dynamodb", "moto"), ("dynamodb", "dynalite")],
    indirect=True,
)


@EVERY_STORE
def test_a_concurrent_reader_sees_a_complete_run_or_none(open_one):
    versions = [make_samples(30 + i, query=f"version {i}") for i in range(5)]
    problems = []

    def overwrite():
        store = open_one()
        try:
            for samples in versions:
                store.put_run(make_report(n=len(samples)), samples, overwrite=True)
        except Exception as error:
            problems.append(error)

    publisher = threading.Thread(target=overwrite)
    publisher.start()
    reader = open_one()
    while publisher.is_alive():
        try:
            seen = list(reader.get_samples("first"))
        except StoreError as error:
            assert "another process is writing it" in str(error)  # noqa: PT017
            continue
        assert seen in ([], *versions)
        page = reader.sample_page("first", limit=100)
        assert page is None or len({row["query"] for row in page.rows}) <= 1
    publisher.join()

    assert problems == []
    assert list(reader.get_samples("first")) == versions[-1]


@EVERY_STORE
def test_of_two_concurrent_publishers_one_wins_and_the_run_is_complete(open_one):
    runs = [(make_report(kl=float(i)), make_samples(40 + i), CURVES) for i in range(2)]
    start = threading.Barrier(2)
    outcomes = [None, None]

    def store_one(i):
        store = open_one()
        start.wait()
        try:
            outcomes[i] = store.put_run(*runs[i])
        except StoreError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=store_one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    store = open_one()
    if True not in outcomes:
        # Each claimed the run from the other. No incomplete run is shown, and a repeat succeeds.
        assert store.get_run("first") is None
        assert store.put_run(*runs[0])
        outcomes[0] = True
    (loser,) = [outcome for outcome in outcomes if outcome is not True]
    assert "already" in loser or "another process" in loser
    assert stored(store) == runs[outcomes.index(True)]
    assert json.dumps(store.get_run("first")) == json.dumps(runs[outcomes.index(True)][0])


def test_many_processes_can_create_the_results_file_at_once(tmp_path):
    problems = []

    def use(store, start):
        start.wait()
        try:
            store.check()
        except StoreError as error:
            problems.append(str(error))

    for i in range(40):
        start = threading.Barrier(6)
        stores = [SQLiteStore(tmp_path / f"{i}.sqlite") for _ in range(6)]
        threads = [threading.Thread(target=use, args=(store, start)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert problems == []
