"""Export to the published notebook's table with awswrangler; no item of another run is lost."""

import os
import subprocess
import sys
import types
from decimal import Decimal

import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from ray_detox.store import notebook
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.errors import StoreError
from tests.faultproxy import FOR_EVER, FaultProxy

REPORT = {
    "run_id": "first",
    "recipe": "lab",
    "status": "complete",
    "created": "2026-01-31T12:00:00+00:00",
    "n": 2,
    "verdict": None,
    "toxicity": None,
}


def make_samples(n=2):
    return [
        {
            "index": i,
            "query": f"prompt {i}",
            "reference": None,
            "response_before": "",
            "response_after": "nice \U0001f600",
            "toxicity_before": 0.1 + 0.2,
            "toxicity_after": float("nan") if i == 1 else 5e-324,
            "kl": 1e126,
            "length_before": 7,
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def aws(monkeypatch):
    for name in ("AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture(params=["N", "S"])
def table(request, endpoint):
    """A table with the notebook's key: its name, and a client."""
    client = DynamoDBStore("any", endpoint_url=endpoint).client
    name = f"llm_with_rlhf_{request.param}"
    client.create_table(
        TableName=name,
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "conversation_id", "AttributeType": request.param}],
        KeySchema=[{"AttributeName": "conversation_id", "KeyType": "HASH"}],
    )
    yield name, client
    client.delete_table(TableName=name)


def items(table):
    name, client = table
    found = client.scan(TableName=name, ConsistentRead=True)["Items"]
    return sorted(found, key=lambda item: str(item["conversation_id"]))


def test_samples_become_flat_items_with_exact_numbers(table, endpoint):
    assert notebook.is_notebook_table(table[0], endpoint_url=endpoint)

    assert notebook.export_samples(REPORT, make_samples(), table[0], endpoint_url=endpoint) == 2

    first, second = items(table)
    kind = table[0][-1]
    assert first == {
        "conversation_id": {kind: "0"},
        "run_id": {"S": "first"},
        "recipe": {"S": "lab"},
        "query": {"S": "prompt 0"},
        "response_before": {"S": ""},
        "response_after": {"S": "nice \U0001f600"},
        "toxicity_before": {"N": "0.30000000000000004"},
        "toxicity_after": {"N": "0"},
        "toxicity_diff": {"N": "-0.30000000000000004"},
        "length_before": {"N": "7"},
    }
    # NaN, and a number beyond DynamoDB's range, are left out: no other value would be correct.
    assert not {"toxicity_after", "toxicity_diff", "kl"} & set(second)


def test_items_of_another_run_are_replaced_only_with_overwrite(table, endpoint):
    name, client = table
    other = REPORT | {"run_id": "other"}
    notebook.export_samples(REPORT, make_samples(60), name, endpoint_url=endpoint)
    client.put_item(TableName=name, Item={"conversation_id": {name[-1]: "60"}})
    before = items(table)

    with pytest.raises(StoreError, match=r"1 of no run.*, 60 of run 'first'\. Nothing was written"):
        notebook.export_samples(other, make_samples(61), name, endpoint_url=endpoint)
    assert items(table) == before

    notebook.export_samples(other, make_samples(61), name, endpoint_url=endpoint, overwrite=True)
    assert {item["run_id"]["S"] for item in items(table)} == {"other"}


def test_the_same_run_can_be_written_again(table, endpoint):
    for _ in range(2):
        notebook.export_samples(REPORT, make_samples(30), table[0], endpoint_url=endpoint)

    assert len(items(table)) == 30


def test_a_sample_that_is_too_large_is_named_before_the_first_write(table, endpoint):
    samples = make_samples(40)
    samples[37]["query"] = "\u6c49" * 140_000

    with pytest.raises(StoreError, match="Sample 37 of run 'first' takes 420,"):
        notebook.export_samples(REPORT, samples, table[0], endpoint_url=endpoint)

    assert items(table) == []


def test_a_table_that_stays_busy_is_an_error_after_the_last_attempt(table, endpoint, monkeypatch):
    pauses = []
    monkeypatch.setattr("ray_detox.store.backoff._sleep", pauses.append)

    def nothing_is_taken(**arguments):
        arguments["parsed"]["UnprocessedItems"] = {
            table[0]: [{"PutRequest": {"Item": {"conversation_id": {table[0][-1]: "0"}}}}]
        }

    session = notebook.boto3.session.Session

    def with_a_busy_table(**arguments):
        made = session(**arguments)
        made.events.register("after-call.dynamodb.BatchWriteItem", nothing_is_taken)
        return made

    monkeypatch.setattr(notebook.boto3.session, "Session", with_a_busy_table)

    with pytest.raises(StoreError, match="too busy"):
        notebook.export_samples(
            REPORT, make_samples(), table[0], endpoint_url=endpoint, overwrite=True
        )

    longest = [min(5.0, 0.05 * 2**attempt) for attempt in range(1, 8)]
    assert len(pauses) == 7
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))


@pytest.fixture
def proxy(endpoint, monkeypatch):
    """A proxy that can fail, with short timeouts and pauses of no length."""
    monkeypatch.setattr("ray_detox.store.backoff._sleep", lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time", types.SimpleNamespace(sleep=lambda seconds: None))
    patience = Config(read_timeout=0.5, retries={"mode": "standard", "total_max_attempts": 4})
    monkeypatch.setattr("ray_detox.store.dynamodb.PATIENT", patience)
    proxy = FaultProxy(endpoint)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("table", ["N"], indirect=True)
@pytest.mark.parametrize("kinds", [("half", "throttle", "broken"), ("reset", "lost", "hang")])
def test_a_temporary_network_fault_is_retried(table, proxy, kinds):
    for kind in kinds:
        proxy.fail("BatchWriteItem", kind)

    assert notebook.export_samples(REPORT, make_samples(60), table[0], endpoint_url=proxy.address)

    assert len(items(table)) == 60


@pytest.mark.parametrize("table", ["N"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("half", "too busy"),
        ("throttle", "too busy"),
        ("hang", "could not be reached at 127"),
        ("expired", r"refused the credentials \(ExpiredTokenException\)"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_a_repeat_succeeds(table, proxy, kind, words):
    proxy.fail("BatchWriteItem", kind, FOR_EVER, after=1)
    export = lambda: notebook.export_samples(
        REPORT, make_samples(60), table[0], endpoint_url=proxy.address
    )

    with pytest.raises(StoreError, match=words) as caught:
        export()

    assert "secret" not in str(caught.value)
    assert proxy.calls["BatchWriteItem"] <= 1 + 8 * 4
    proxy.heal()
    assert export() == len(items(table)) == 60


def test_a_table_with_another_key_is_not_a_notebook_table(endpoint):
    store = DynamoDBStore("whole-runs", endpoint_url=endpoint)
    store.create_table()

    for name in ("whole-runs", "nowhere"):
        assert not notebook.is_notebook_table(name, endpoint_url=endpoint)
        with pytest.raises(StoreError, match=f"{name}.* or its key is not conversation_id alone"):
            notebook.export_samples(REPORT, make_samples(), name, endpoint_url=endpoint)


def test_an_endpoint_that_does_not_answer_is_named():
    with pytest.raises(StoreError, match=r"could not be reached at 127\.0\.0\.1:9"):
        notebook.is_notebook_table("any", endpoint_url="http://127.0.0.1:9")


def test_awswrangler_does_not_start_ray_even_if_the_environment_says_so(table, endpoint):
    script = f"""
import sys
import ray
from ray_detox.store import notebook
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_notebook_table import REPORT, make_samples
notebook.export_samples(REPORT, make_samples(), {table[0]!r}, endpoint_url={endpoint!r})
assert not ray.is_initialized()
assert notebook.wrangler().engine.get().value == "python"
"""

    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"WR_ENGINE": "ray"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert len(items(table)) == 2


def test_decimals_equal_the_repr_of_the_float():
    (item,) = notebook.items_of(REPORT, make_samples(1), "N")

    assert item["toxicity_before"] == Decimal("0.30000000000000004")
