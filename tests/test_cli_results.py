"""The commands about results: their output, the mistakes they refuse, and no import of torch."""

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

from ray_detox.cli import main as cli
from ray_detox.errors import ConfigError
from ray_detox.evaluation.examples import PairedExample
from ray_detox.recipes.loading import load_config
from ray_detox.runs.folder import RunFolder
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.sqlite import SQLiteStore
from tests.faultproxy import FOR_EVER, FaultProxy
from tests.pseudo_terminal import on_terminal, screen


@pytest.fixture
def aws(monkeypatch):
    """The address of an AWS emulator in this process."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def mistake(refused, output):
    """`mistake(*words)`: `refused` in a folder with runs."""
    return refused


def make_report(run_id, created="2026-01-31T12:00:00+00:00"):
    side = {"mean": 0.5, "std": 0.1, "share": 0.5}
    return {
        "run_id": run_id,
        "recipe": "lab",
        "status": "complete",
        "created": created,
        "n": 1,
        "verdict": {"name": "improved", "sentence": "Toxicity fell.", "reasons": []},
        "toxicity": {"before": side, "after": side, "delta": {"mean": -0.1}},
    }


@pytest.fixture
def results(output):
    """Two stored runs."""
    store = SQLiteStore(RunFolder(output, "").store_path)
    sample = {"index": 0, "query": "q", "response_before": "b", "response_after": "a"}
    store.put_run(make_report("first"), [sample])
    store.put_run(make_report("second", "2026-02-01T12:00:00+00:00"), [])
    store.close()
    return output


def test_results_lists_runs_newest_first(results, capsys):
    assert cli.main(["results", "--output", str(results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cli.main(["results", "--json", "--output", str(results)]) == 0
    as_json = json.loads(capsys.readouterr().out)

    assert [line.split()[2] for line in lines] == ["second", "first"]
    assert [run["run_id"] for run in as_json] == ["second", "first"]


def test_results_prints_the_stored_report(results, capsys):
    assert cli.main(["results", "first", "--json", "--output", str(results)]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert cli.main(["results", "first", "--output", str(results)]) == 0
    as_text = capsys.readouterr().out

    assert as_json == make_report("first")
    assert "Toxicity fell." in as_text


def test_results_refuses_an_unknown_run(mistake, results):
    assert "No result of a run 'third' is stored" in mistake(
        "results", "third", "--output", results
    )


def test_results_refuses_a_folder_without_results(mistake, output):
    assert f"No results in {output} yet" in mistake("results", "first", "--output", output)
    assert f"No results in {output} yet" in mistake("results", "--output", output)


SAMPLE = {
    "index": 0,
    "prompt_id": "00ff",
    "query": "q",
    "reference": None,
    "facts": None,
    "kl": 0.5,
    "response_before": "b",
    "reward_before": -1.0,
    "toxicity_before": 0.75,
    "length_before": 2,
    "truncated_before": False,
    "finished_before": True,
    "response_after": "</script><b>a",
    "reward_after": 1.0,
    "toxicity_after": 0.25,
    "length_after": 5,
    "truncated_after": False,
    "finished_after": True,
}


@pytest.fixture
def folder(output):
    """The files of a finished run that is in no store."""
    folder = RunFolder(output, "third")
    folder.write_result(make_report("third"), [PairedExample.from_json(SAMPLE)])
    (folder.path / "config.json").write_text(json.dumps(load_config("lab").to_dict()))
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\n')
    return folder


def test_publish_stores_a_run_from_its_files_once(folder, output, capsys):
    assert cli.main(["publish", "third", "--output", str(output)]) == 0
    first = capsys.readouterr().out
    assert cli.main(["publish", "third", "--output", str(output)]) == 0
    second = capsys.readouterr().out

    store = SQLiteStore(folder.store_path)
    assert store.get_run("third") == make_report("third")
    assert list(store.get_samples("third")) == [SAMPLE]
    assert store.get_history("third") == [{"step": 1, "score": 0.5}]
    assert "is stored in" in first
    assert "unchanged" in second


def test_publish_replaces_a_run_only_with_overwrite(folder, output, mistake):
    assert cli.main(["publish", "third", "--output", str(output)]) == 0
    folder.write_result(make_report("third") | {"recipe": "seed", "n": 0}, [])

    assert "already" in mistake("publish", "third", "--output", output)
    assert cli.main(["publish", "third", "--overwrite", "--output", str(output)]) == 0
    assert SQLiteStore(folder.store_path).get_run("third")["recipe"] == "seed"


def test_a_finished_run_stays_as_it_is_when_it_is_resumed(folder, output, capsys):
    report = make_report("third") | {"steps": 1}
    folder.write_result(report, [PairedExample.from_json(SAMPLE)])
    settings = load_config("lab", ["train.steps=1"]).to_dict()
    (folder.path / "config.json").write_text(json.dumps(settings))
    assert cli.main(["publish", "third", "--output", str(output)]) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}

    assert cli.main(["run", "--resume", "third", "--output", str(output)]) == 0

    assert "run third is finished, and stays as it is\n" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_a_printed_command_works_from_the_folder_in_which_it_was_printed(tmp_path):
    strange = tmp_path / "my runs; $HOME"
    folder = RunFolder(strange, "first")

    _, *words = shlex.split(folder.command("results"))
    with pytest.raises(ConfigError) as caught:
        folder.require_adapter()

    assert words == ["results", "first", "--output", str(strange)]
    assert f"`{folder.command('run --resume')}`." in str(caught.value)
    assert RunFolder(Path("runs"), "first").command("results") == "ray-detox results first"


def test_publish_refuses_a_run_without_a_result(output, mistake):
    assert "No run 'none'" in mistake("publish", "none", "--output", output)

    folder = RunFolder(output, "begun")
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps(load_config("lab").to_dict()))
    assert "no result yet" in mistake("publish", "begun", "--output", output)
    assert "is not a setting of results" in mistake(
        "publish", "begun", "ppo.epochs=1", "--output", output
    )


def test_a_damaged_result_is_named(folder, output, mistake):
    (folder.path / "samples.jsonl").write_text("{")

    assert "samples.jsonl is damaged: line 1 is not valid JSON" in mistake(
        "publish", "third", "--output", output
    )


def test_a_table_is_created_checked_and_published_to(folder, output, aws, capsys, mistake):
    words = ["results.store=dynamodb", "results.table=made", f"results.endpoint_url={aws}"]

    assert "'made' was not found" in mistake("table", "check", *words)
    assert cli.main(["table", "create", *words]) == 0
    assert cli.main(["table", "check", *words]) == 0
    assert cli.main(["publish", "third", *words, "--output", str(output)]) == 0
    capsys.readouterr()
    assert cli.main(["results", "third", *words, "--json"]) == 0

    assert json.loads(capsys.readouterr().out) == make_report("third")


def make_notebook_table(aws, name, key="conversation_id"):
    client = DynamoDBStore("any", endpoint_url=aws).client
    client.create_table(
        TableName=name,
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": key, "AttributeType": "N"}],
        KeySchema=[{"AttributeName": key, "KeyType": "HASH"}],
    )
    return client


# ---- found before training -------------------------------------------------------------------


@pytest.fixture
def no_run(mistake, output, monkeypatch):
    """`no_run(*words)`: start a run that must be refused, and return its error line."""
    monkeypatch.setitem(sys.modules, "ray", None)
    # One attempt, so that a refusal takes no time.
    at_once = Config(connect_timeout=3, read_timeout=30, retries={"total_max_attempts": 1})
    monkeypatch.setattr("ray_detox.store.dynamodb.PATIENT", at_once)

    def refused(*words):
        sentence = mistake("run", "lab", *words, "--run-id", "new", "--output", output)
        assert not (output / "new").exists()
        return sentence

    return refused


IN_TABLE = ("results.store=dynamodb", "results.table=checked")


def test_wrong_credentials_region_and_endpoint_are_found_before_training(no_run, aws, monkeypatch):
    at = f"results.endpoint_url={aws}"
    assert "could not be reached at 127.0.0.1:9" in no_run(
        *IN_TABLE, "results.endpoint_url=http://127.0.0.1:9"
    )
    assert "is not a valid address" in no_run(*IN_TABLE, "results.endpoint_url=127.0.0.1:9")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_DEFAULT_REGION")
        assert "No AWS region is set" in no_run(*IN_TABLE, at)
    for name, value in (
        ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
        ("AWS_CONFIG_FILE", "/nonexistent"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "No AWS credentials were found" in no_run(*IN_TABLE, at)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("denied", "does not allow describe_table"),
        ("expired", "Sign in again"),
        ("hang", "be reached"),
    ],
)
def test_a_refusal_by_aws_is_found_before_training(no_run, aws, monkeypatch, kind, words):
    if kind == "hang":
        soon = Config(read_timeout=0.5, retries={"total_max_attempts": 1})
        monkeypatch.setattr("ray_detox.store.dynamodb.PATIENT", soon)
    proxy = FaultProxy(aws)
    proxy.fail("DescribeTable", kind, FOR_EVER)

    sentence = no_run(*IN_TABLE, f"results.endpoint_url={proxy.address}")
    proxy.close()

    assert words in sentence


def test_the_command_that_creates_a_table_may_be_repeated_and_says_how_to_use_it(aws, capsys):
    words = ["results.table=twice", f"results.endpoint_url={aws}"]

    assert [cli.main(["table", "create", *words]) for _ in range(2)] == [0, 0]

    first, second = capsys.readouterr().out.splitlines()
    use = f"use it with results.store=dynamodb results.table=twice results.endpoint_url={aws}."
    assert first == f"Table twice is ready; {use}"
    assert second == f"Table twice exists already, and can hold results; {use}"


def test_a_table_that_cannot_hold_the_run_is_found_before_training(no_run, aws, monkeypatch):
    # AWS_REGION alone is enough.
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    words = [*IN_TABLE, f"results.endpoint_url={aws}"]
    assert "'checked' was not found in eu-central-1" in no_run(*words)

    client = make_notebook_table(aws, "checked", key="other")
    assert "has the keys other (N); expected pk (S), sk (S)" in no_run(*words)

    client.delete_table(TableName="checked")
    store = DynamoDBStore("checked", endpoint_url=aws)
    store.create_table()
    store.put_run(make_report("new"), [])
    assert "A run 'new' is already stored" in no_run(*words)


def test_a_results_file_that_cannot_take_the_run_is_found_before_training(
    no_run, results, monkeypatch
):
    monkeypatch.setattr("ray_detox.store.sqlite._BUSY_TIMEOUT_S", 0.05)
    file = RunFolder(results, "").store_path
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert "database is locked" in no_run()
        db.execute("ROLLBACK")
        db.execute("PRAGMA user_version = 7")
    assert "written by a newer version" in no_run()

    file.write_bytes(b"no database, whatever its name says" * 30)
    assert "file is not a database" in no_run()


def test_a_stored_run_is_exported_to_the_notebooks_table(folder, output, aws, capsys, mistake):
    client, words = make_notebook_table(aws, "exported"), [f"results.endpoint_url={aws}"]
    assert cli.main(["publish", "third", "--output", str(output)]) == 0

    command = ["export-table", "third", "exported", *words, "--output", str(output)]
    assert cli.main(command) == 0

    items = client.scan(TableName="exported")["Items"]
    assert [item["response_after"]["S"] for item in items] == [SAMPLE["response_after"]]
    assert "1 sample" in capsys.readouterr().out

    # An item as the notebook writes it, without a run.
    client.put_item(TableName="exported", Item={"conversation_id": {"N": "0"}})
    assert "pass --overwrite" in mistake(*command)
    assert cli.main([*command, "--overwrite"]) == 0
    assert client.scan(TableName="exported")["Items"] == items


def test_publishing_to_the_notebooks_table_keeps_the_whole_run_as_well(folder, output, aws):
    client = make_notebook_table(aws, "llm_with_rlhf")
    words = ["results.store=dynamodb", "results.table=llm_with_rlhf"]

    command = ["publish", "third", *words, f"results.endpoint_url={aws}", "--output", str(output)]
    assert cli.main(command) == 0

    assert client.scan(TableName="llm_with_rlhf")["Count"] == 1
    assert SQLiteStore(folder.store_path).get_run("third") == make_report("third")


def test_results_of_an_empty_table_say_so(aws, capsys):
    words = ["results.store=dynamodb", "results.table=still-empty", f"results.endpoint_url={aws}"]
    assert cli.main(["table", "create", *words]) == 0
    capsys.readouterr()

    assert cli.main(["results", *words]) == 0
    assert "No run is stored there yet" in capsys.readouterr().out
    assert cli.main(["results", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_check_recognises_the_notebooks_table(aws, capsys):
    make_notebook_table(aws, "notes")

    command = ["table", "check", "results.table=notes", f"results.endpoint_url={aws}"]
    assert cli.main(command) == 0

    assert "can hold the samples of a run" in capsys.readouterr().out


def test_a_report_is_one_html_file(folder, output, tmp_path, capsys, mistake):
    assert cli.main(["publish", "third", "--output", str(output)]) == 0
    file = tmp_path / "third.html"

    assert cli.main(["report", "third", "--html", str(file), "--output", str(output)]) == 0

    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    nowhere = tmp_path / "none/third.html"
    assert "cannot be written" in mistake("report", "third", "--html", nowhere, "--output", output)


@pytest.mark.parametrize("run_id", ["../third", "a" * 65, "a#b"])
def test_every_command_refuses_an_invalid_run_id(folder, mistake, run_id):
    # `../third` would find a run in the folder above this one.
    inside = folder.output / "inside"
    RunFolder(inside, "any").write_result(make_report("any"), [])
    SQLiteStore(RunFolder(inside, "").store_path).put_run(make_report("any"), [])

    for command in (["results", run_id], ["publish", run_id], ["report", run_id], ["view", run_id]):
        assert "cannot be used. Take 1 to 64" in mistake(*command, "--output", inside)
    assert "cannot be used" in mistake("export-table", run_id, "any", "--output", inside)


def test_view_serves_the_page_until_it_is_interrupted(results):
    command = [sys.executable, "-m", "ray_detox", "view", "first", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--output", results],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts background processes with this signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    line = process.stdout.readline()
    port, key = re.search(r"http://127\.0\.0\.1:(\d+)/\?key=([\w-]+)#/run/first ", line).groups()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/runs", headers={"Cookie": f"ray-detox-{port}={key}"}
    )

    with urllib.request.urlopen(request, timeout=20) as answer:
        runs = json.loads(answer.read())["runs"]
    process.send_signal(signal.SIGINT)

    assert process.communicate(timeout=20) == ("Stopped.\n", None)
    assert process.returncode == 0
    assert [run["run_id"] for run in runs] == ["second", "first"]


def test_view_refuses_mistakes_before_it_serves(folder, output, mistake):
    assert "No results" in mistake("view", "--output", output)
    assert cli.main(["publish", "third", "--output", str(output)]) == 0

    assert "No result of a run 'x'" in mistake("view", "x", "--output", output)
    assert "--port is 70000" in mistake("view", "--port", 70000, "--output", output)


# ---- on a terminal and elsewhere -------------------------------------------------------------


@pytest.fixture
def hostile(output):
    """A stored run whose texts would steer a terminal, or do not fit an encoding."""
    store = SQLiteStore(RunFolder(output, "").store_path)
    text = "\x1b[2J[bold]caf\xe9:smile: 汉字\u202e"
    verdict = {"name": "improved", "sentence": f"Toxicity fell {text}.", "reasons": []}
    sample = {"index": 0, "query": text, "response_before": text, "response_after": text}
    store.put_run(make_report("hostile") | {"verdict": verdict}, [sample])
    store.close()
    return output


@pytest.mark.parametrize("columns", [60, 200])
def test_a_list_and_a_report_fit_the_terminal(results, hostile, columns):
    where = ["--output", str(results)]

    listed = on_terminal("-m", "ray_detox", "results", *where, columns=columns)
    report = on_terminal("-m", "ray_detox", "results", "hostile", *where, columns=columns)

    assert "\x1b" not in listed + report
    assert screen(listed)[0].split()[-1] == "verdict"
    assert len(screen(listed)) == 5  # a header, three runs and the line of the next prompt
    assert all(len(line) <= columns for line in screen(listed) + screen(report))
    assert "\\x1b[2J[bold]café:smile: 汉字\\u202e" in report


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", [["results", "hostile"], ["results"], ["results", "x汉\udcff"]])
def test_no_encoding_makes_a_command_fail(hostile, encoding, command):
    done = subprocess.run(
        [sys.executable, "-m", "ray_detox", *command, "--output", str(hostile)],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
        capture_output=True,
        timeout=120,
    )

    printed = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in printed
    if command[-1].startswith("x"):
        assert done.returncode == cli.MISTAKE
        assert "ray-detox: Run id 'x\\u6c49" in printed
    else:
        assert done.returncode == 0
    if command[-1] == "hostile":
        cafe = "café" if encoding == "latin-1" else "caf?"
        assert f"\\x1b[2J[bold]{cafe}:smile: ??\\u202e" in printed


@pytest.mark.parametrize("command", [["results", "first"], ["report", "first"], ["results"]])
def test_commands_about_results_answer_without_torch_and_ray(results, tmp_path, command):
    script = (
        "import sys; from ray_detox.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'boto3', 'pydantic', 'rich'}; "
        "assert not heavy & set(sys.modules); "
        "sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--output", str(results)],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
