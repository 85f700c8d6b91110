"""Credentials in addresses: refused where they are set, redacted wherever a text is shown."""

import json

import pytest

from ray_detox import api
from ray_detox.addresses import has_credentials, redact, redact_tree
from ray_detox.cli import jobs
from ray_detox.cli.main import main
from ray_detox.config import ConfigError, RunConfig
from ray_detox.errors import first_line
from ray_detox.recipes.loading import load_config
from ray_detox.runs.conditional import S3File
from ray_detox.runs.folder import settings_from_json
from ray_detox.runs.printable import printable
from ray_detox.runs.storage import Storage, StorageError, check_storage
from ray_detox.store.opening import open_store
from ray_detox.viewer.handler import respond
from ray_detox.viewer.standalone import render

SECRET = "hunter2"

WITH_CREDENTIALS = [
    f"s3://AKIA:{SECRET}@bucket/runs",
    f"s3://AKIA:ab/{SECRET}@bucket/runs?scheme=http",
    f"http://me:p@{SECRET}@127.0.0.1:9",
    f"https://{SECRET}@example.com/x",
    f"http://:{SECRET}@127.0.0.1",
    f"simplecache::s3://AKIA:{SECRET}@bucket",
    f"abfs://container:{SECRET}@account/x",
    f"s3://bucket/runs?region=x&secret_key={SECRET}",
    f"s3://bucket/runs?secret%5Fkey={SECRET}",
    f"s3://bucket?session_token={SECRET}&scheme=http",
    f"https://bucket/x?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c?sv=1&sig={SECRET}",
    f"https://example.com/?access_key={SECRET}",
    f"https://example.com/?token={SECRET}#x",
    f"https://example.com/?PASSWORD={SECRET}",
    f"https://example.com/?user=me&pw={SECRET}",
    f"https://example.com/x;jsessionid={SECRET}",
]
WITHOUT = [
    "lab",
    "google/flan-t5-base",
    "/data/a@b/c",
    "s3://bucket/a@b?region=eu-central-1&scheme=http&endpoint_override=127.0.0.1:9",
    "http://127.0.0.1:8000/x@v1",
    "abfs://container@account.dfs.core.windows.net/x",
    "gs://anonymous@bucket/x",
    "10.0.0.1:6379",
    "file:///x",
]
SETTINGS = (
    "data.path",
    "policy.model",
    "policy.adapter",
    "reward.model",
    "train.storage",
    "cluster.address",
    "results.endpoint_url",
)


@pytest.mark.parametrize("address", WITH_CREDENTIALS)
def test_an_address_with_credentials_is_found_and_redacted(address):
    assert has_credentials(address)
    shown = printable(f"it said: {address}, twice")
    assert SECRET not in shown
    assert "***" in shown
    assert redact(shown) == shown


def test_white_space_does_not_hide_them():
    assert has_credentials("s3://AKIA:hun\tter 2@bucket")


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_credentials_stays(address):
    assert not has_credentials(address, is_host="/" not in address)
    assert redact(address) == address


@pytest.mark.parametrize("address", WITH_CREDENTIALS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_is_an_address_refuses_credentials_in_one_sentence(name, address):
    section, _, key = name.partition(".")

    with pytest.raises(ConfigError, match=f"^{name} is an address with credentials.*profile") as e:
        RunConfig(**{section: {key: address}})

    assert SECRET not in str(e.value)


def test_no_setting_that_can_be_an_address_is_forgotten():
    schema = json.dumps(RunConfig.model_json_schema()["$defs"])
    assert schema.count("s3://") == 5, "a new setting that is an address belongs into SETTINGS"


@pytest.mark.parametrize("name", ["cluster.address", "results.endpoint_url"])
def test_a_host_without_a_scheme_refuses_them_too(name):
    with pytest.raises(ConfigError, match="address with credentials"):
        load_config("lab", [f"{name}=me:{SECRET}@127.0.0.1:9"])


def test_a_classifier_of_a_term_refuses_them():
    with pytest.raises(ConfigError, match=r"^reward\.terms\[0\]\.classifier\.model is an address"):
        RunConfig(reward={"terms": [{"classifier": {"model": WITH_CREDENTIALS[0], "label": "x"}}]})


@pytest.mark.parametrize("command", ["check", "run", "submit"])
def test_a_command_refuses_them_before_anything_starts(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main([command, "lab", f"results.endpoint_url=http://me:{SECRET}@h"]) == 2

    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_refuses_them_in_its_storage(tmp_path, capsys):
    words = ["--resume", "gone", f"train.storage={WITH_CREDENTIALS[0]}"]

    assert main(["run", *words, "--output", str(tmp_path)]) == 2
    assert main(["submit", *words]) == 2

    said = capsys.readouterr().err
    assert said.count("train.storage is an address with credentials") == 2
    assert SECRET not in said


def test_a_job_servers_address_refuses_them(capsys):
    assert main(["submit", "lab", "--address", f"http://me:{SECRET}@127.0.0.1:9"]) == 2

    said = capsys.readouterr().err
    assert "--address is an address with credentials" in said
    assert SECRET not in said


def test_settings_of_an_earlier_version_are_refused_without_repeating_them():
    stored = load_config("lab").to_dict()
    stored["results"]["endpoint_url"] = WITH_CREDENTIALS[2]

    with pytest.raises(ConfigError, match=r"results\.endpoint_url is an address") as caught:
        settings_from_json(json.dumps(stored).encode(), "config.json")

    assert SECRET not in str(caught.value)


def test_errors_of_a_storage_do_not_repeat_them(monkeypatch):
    storage = Storage(f"nothing://me:{SECRET}@host/runs")
    failed = S3File(storage)._failed("read", OSError(f"no http://me:{SECRET}@h"))

    with pytest.raises(StorageError, match="cannot be read") as caught:
        storage.read("x")
    with pytest.raises(ConfigError) as refused:
        check_storage(storage.address)

    said = f"{storage!r} {caught.value} {refused.value} {failed}"
    assert SECRET not in said
    assert "***@host" in said


def test_an_error_of_a_library_is_quoted_without_them():
    assert SECRET not in first_line(OSError(f"cannot reach http://me:{SECRET}@h/\nmore"))


def report(**more):
    return {
        "run_id": "old",
        "recipe": f"http://me:{SECRET}@h",
        "status": "complete",
        "created": "2026-01-31T12:00:00+00:00",
        "n": 0,
        "verdict": {"name": f"improved at s3://k:{SECRET}@b", "sentence": ""},
        "toxicity": {},
        "config": {"results": {"endpoint_url": f"http://me:{SECRET}@h"}, "x": [[f"s3://k:{SECRET}@b"]]},
        "notes": [f"read from s3://k:{SECRET}@b"],
    } | more  # fmt: skip


@pytest.fixture
def old_store(tmp_path, monkeypatch):
    """A store of an earlier version, which kept what it was given."""
    from ray_detox.store import prepare

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "redact_tree", lambda value: value)
        store = open_store("sqlite", tmp_path / "results.sqlite", table="")
        store.put_run(report(), [], [])
        store.close()
    assert SECRET.encode() in (tmp_path / "results.sqlite").read_bytes()
    return tmp_path


def test_what_an_earlier_version_stored_is_redacted_wherever_it_is_shown(old_store, capsys):
    output = ["--output", str(old_store)]
    assert main(["results", *output]) == 0
    assert main(["results", "--json", *output]) == 0
    assert main(["results", "old", *output]) == 0
    assert main(["results", "old", "--json", *output]) == 0
    assert main(["report", "old", "--html", str(old_store / "old.html"), *output]) == 0

    shown = capsys.readouterr().out + (old_store / "old.html").read_text()
    shown += json.dumps([api.results("old", old_store), api.results(output=old_store)])
    assert "http://***@h" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("path", ["/api/runs", "/api/runs/old"])
def test_the_page_gets_it_redacted(old_store, path):
    store = open_store("sqlite", old_store / "results.sqlite", table="")
    event = {"rawPath": path, "requestContext": {"http": {"method": "GET"}}}

    answer = respond(event, store)
    store.close()

    assert answer["statusCode"] == 200
    assert "***@" in answer["body"]
    assert SECRET not in answer["body"]


def test_a_report_with_them_is_stored_without(tmp_path):
    store = open_store("sqlite", tmp_path / "results.sqlite", table="")
    store.put_run(report(), [], [])
    store.close()

    assert SECRET.encode() not in (tmp_path / "results.sqlite").read_bytes()
    assert SECRET not in render(report(), [], [])


def test_values_that_are_nested_deeply_are_redacted():
    deep = f"http://me:{SECRET}@h"
    for _ in range(5000):
        deep = [deep]

    shown = redact_tree(deep)
    while isinstance(shown, list):
        (shown,) = shown

    assert shown == "http://***@h"


@pytest.mark.parametrize(
    ("piece", "redacted"),
    [("://a:b", "://a:b"), ("://", "://"), ("?a=", "?a="), ("?token=a&", "?token=***&")],
)
def test_a_long_text_is_redacted_without_backtracking(piece, redacted):
    # With time that grows with the square of the length, this test would not end.
    assert redact(piece * 200_000) == redacted * 200_000


# ---- variables of a job, which the dashboard shows ------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        f"APIKEY={SECRET}",
        f"OPENAI_API_KEY={SECRET}",
        f"MY_PWD={SECRET}",
        f"DATABASE_URL={SECRET}",
        f"SENTRY_DSN={SECRET}",
        f"AZURE_STORAGE_CONNECTION_STRING={SECRET}",
        f"SSH_PRIVATE={SECRET}",
        f"DB_PASS={SECRET}",
        f"PGPASSWORD={SECRET}",
        f"HTTPS_PROXY=http://me:{SECRET}@proxy:3128",
        f"SOURCE=https://account.blob.core.windows.net/c?sig={SECRET}",
    ],
)
def test_a_variable_with_a_secret_is_not_sent(pair, capsys):
    assert main(["submit", "lab", "--env", pair]) == 2

    said = capsys.readouterr().err
    assert f"--env {pair.partition('=')[0]} would be shown on the dashboard" in said
    assert SECRET not in said


def test_other_variables_are_sent():
    pairs = ["NCCL_DEBUG=INFO", "HTTPS_PROXY=http://proxy:3128", "BYPASS=1", "KEYBOARD=de", "A=b=c"]

    assert jobs._environment(pairs).items() >= dict(pair.split("=", 1) for pair in pairs).items()
