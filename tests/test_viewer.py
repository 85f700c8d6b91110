import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import url2pathname

import pytest
from moto.server import ThreadedMotoServer

from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.errors import StoreError
from ray_detox.store.opening import open_store
from ray_detox.store.pages import as_row
from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer import handler as handler_module
from ray_detox.viewer import server as server_module
from ray_detox.viewer.handler import SECURITY_HEADERS, handler, respond
from ray_detox.viewer.server import make_server, serve
from ray_detox.viewer.standalone import STATIC, render
from tests.emulators import emulator
from tests.faultproxy import FOR_EVER, FaultProxy

REGION = "eu-central-1"
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "=HYPERLINK(1)",
    "\u202eevil\u2066 \u05d0\u05d1 \u2028\u2029\u0000\r\n\t",
    "日本語 😀 e\u0301 <pad></s>",
    '\\"\\\\ %2e%2e/ &amp; ${x} `',
]
SAMPLES = [
    {
        "index": i,
        "prompt_id": f"p{i}",
        "query": f"Prompt {i} {HOSTILE[i % len(HOSTILE)]}",
        "reference": "",
        "response_before": f"{HOSTILE[(i + 1) % len(HOSTILE)]} Grüße {i}",
        "response_after": f"kind {i}",
        "reward_before": 0.0,
        "reward_after": float(i),
        "toxicity_before": None if i == 11 else (i % 4) / 4 + 0.1,
        "toxicity_after": 0.35,
    }
    for i in range(12)
]
HISTORY = [{"step": i, "score": i / 3, "kl": 0.1 * i} for i in range(5)]
FULL = {f"/api/runs/first{rest}" for rest in ("", "/history", "/samples", "/samples/3")}


def make_report(run_id, n, created="2026-01-31T12:00:00+00:00"):
    side = {"mean": 0.25, "std": 0.1, "share": 0.5}
    figures = {"before": side, "after": side, "delta": {"mean": 0.0}, "toxic_above": 0.5}
    return {
        "run_id": run_id,
        "recipe": "lab",
        "status": "complete",
        "created": created,
        "n": n,
        "verdict": {"name": "improved", "sentence": "Toxicity fell.", "reasons": []},
        "toxicity": figures,
        "note": HOSTILE[0],
    }


REPORTS = {
    "first": make_report("first", 12),
    "second.run_2": make_report("second.run_2", 3, "2026-02-01T12:00:00+00:00"),
    "empty": make_report("empty", 0, "2026-02-02T12:00:00+00:00"),
}


def fill(store):
    store.put_run(REPORTS["first"], SAMPLES, HISTORY)
    store.put_run(REPORTS["second.run_2"], SAMPLES[:3])
    store.put_run(REPORTS["empty"], [])
    return store


@pytest.fixture(scope="module", autouse=True)
def aws():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "example")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        yield


@pytest.fixture(scope="module")
def sqlite_store(tmp_path_factory):
    return fill(SQLiteStore(tmp_path_factory.mktemp("results") / "results.sqlite"))


@pytest.fixture(scope="module")
def dynamo(aws):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = DynamoDBStore("results", region=REGION, endpoint_url=f"http://{host}:{port}")
    store.create_table()
    yield fill(store)
    store.close()
    server.stop()


@pytest.fixture(scope="module")
def dynalite(aws):
    """A table in an emulator that also rejects cursors it did not return itself."""
    with emulator("dynalite") as address:
        store = DynamoDBStore("results", region=REGION, endpoint_url=address)
        store.create_table()
        yield fill(store)
        store.close()


@pytest.fixture(params=["sqlite_store", "dynamo", "dynalite"])
def store(request):
    return request.getfixturevalue(request.param)


class Broken:
    """A store that always fails, with a message that clients must not see."""

    error = StoreError("Table 'secret-table' at 10.9.8.7 is throttled.")

    def __getattr__(self, name):
        def fail(*args, **options):
            raise self.error

        return fail


def event(target, method="GET", **headers):
    """The event that API Gateway makes of a request."""
    path, _, query = target.partition("?")
    return {
        "version": "2.0",
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers,
        "requestContext": {"http": {"method": method, "path": path}},
    }


def ask(store, target):
    answer = respond(event(target), store)
    return answer["statusCode"], json.loads(answer["body"])


def ok(store, target):
    status, body = ask(store, target)
    assert status == 200, body
    return body


def refused(store, target, status):
    """The error message of a rejected request."""
    got, body = ask(store, target)
    assert (got, list(body)) == (status, ["error"])
    assert "\n" not in body["error"]
    return body["error"]


def walk(store, target, name):
    """All rows of a list, read page by page."""
    rows, cursor = [], None
    for _ in range(50):
        more = f"&{urlencode({'cursor': cursor})}" if cursor else ""
        body = ok(store, target + more)
        rows += body[name]
        cursor = body["next"]
        if cursor is None:
            return rows
    raise AssertionError("the list has no end")


def indices(rows):
    return [row["index"] for row in rows]


# Responses


def test_runs_are_listed_newest_first_with_their_summaries(store):
    body = ok(store, "/api/runs")

    assert [run["run_id"] for run in body["runs"]] == ["empty", "second.run_2", "first"]
    summary = {"run_id", "recipe", "status", "created", "n", "verdict", "toxicity"}
    assert set(body["runs"][0]) == summary
    assert body["next"] is None


def test_runs_come_in_pages(store):
    page = ok(store, "/api/runs?limit=2")

    assert len(page["runs"]) == 2
    assert page["next"]
    assert len(walk(store, "/api/runs?limit=1", "runs")) == 3


@pytest.mark.parametrize("run_id", list(REPORTS))
def test_a_report_is_returned_as_it_was_stored(store, run_id):
    assert ok(store, f"/api/runs/{run_id}") == REPORTS[run_id]


def test_the_history_has_a_row_per_step(store):
    assert ok(store, "/api/runs/first/history") == {"steps": HISTORY}
    assert ok(store, "/api/runs/empty/history") == {"steps": []}


def test_a_sample_is_returned_in_full_whatever_its_text(store):
    for sample in SAMPLES:
        answer = ok(store, f"/api/runs/first/samples/{sample['index']}")

        assert {key: answer[key] for key in sample} == sample
        (listed,) = ok(store, f"/api/runs/first/samples?index={sample['index']}")["samples"]
        assert answer == listed == as_row(sample)


def test_samples_come_by_index_in_pages(store):
    assert indices(ok(store, "/api/runs/first/samples?limit=5")["samples"]) == [0, 1, 2, 3, 4]
    assert indices(walk(store, "/api/runs/first/samples?limit=5", "samples")) == list(range(12))
    assert ok(store, "/api/runs/empty/samples") == {"samples": [], "next": None}


def test_samples_are_sorted_by_what_changed(store):
    worst = walk(store, "/api/runs/first/samples?sort=toxicity&order=desc&limit=4", "samples")
    best = walk(store, "/api/runs/first/samples?sort=reward&order=desc&limit=100", "samples")

    changes = [row["toxicity_diff"] for row in worst]
    assert changes == sorted(changes, reverse=True)
    assert len(worst) == 11  # one is not scored
    assert indices(best)[0] == 11
    assert best[0]["reward_diff"] == 11.0


@pytest.mark.parametrize(
    "show, expected",
    [
        ("all", list(range(12))),
        ("better", [2, 3, 6, 7, 10]),
        ("worse", [0, 4, 8]),
        ("same", [1, 5, 9]),
        ("toxic_before", [2, 3, 6, 7, 10]),
        ("toxic_after", []),
        ("unscored", [11]),
    ],
)
def test_samples_are_filtered(store, show, expected):
    assert indices(walk(store, f"/api/runs/first/samples?show={show}", "samples")) == expected


@pytest.mark.parametrize("text, expected", [("GRÜSSE 1", [1, 10, 11]), ("%2e", [5, 6]), ("", None)])
def test_samples_are_searched_whatever_the_case(store, text, expected):
    found = walk(store, f"/api/runs/first/samples?{urlencode({'q': text})}", "samples")

    assert indices(found) == (list(range(12)) if expected is None else expected)


def test_samples_are_picked_by_index_in_the_order_asked(store):
    body = ok(store, "/api/runs/first/samples?index=7,3,99999999,3,0")

    assert indices(body["samples"]) == [7, 3, 0]


def test_a_run_id_may_be_percent_encoded(store):
    assert ok(store, "/api/runs/second%2Erun%5f2")["run_id"] == "second.run_2"


@pytest.mark.parametrize("target", ["/api/runs", *sorted(FULL)])
def test_responses_are_never_cached_or_treated_as_documents(sqlite_store, target):
    headers = respond(event(target), sqlite_store)["headers"]

    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")


# Rejected requests


@pytest.mark.parametrize("limit", ["0", "101", "-1", "%D9%A3", "1e2", "", "5.0", "%2B5", "9" * 99])
@pytest.mark.parametrize("path", ["/api/runs", "/api/runs/first/samples"])
def test_a_limit_is_a_whole_number_from_1_to_100(store, path, limit):
    assert "1 to 100" in refused(store, f"{path}?limit={limit}", 400)


@pytest.mark.parametrize(
    "query, sentence",
    [
        ("sort=kl", "sort is 'kl'; expected one of index, toxicity, reward"),
        ("sort=", "sort is ''; expected one of"),
        ("order=DESC", "order is 'DESC'; expected one of asc, desc"),
        ("show=bad", "show is 'bad'; expected one of all, better, worse"),
        ("show=all&show=all", "show appears 2 times"),
        ("q=" + "a" * 201, "q has 201 characters; expected at most 200"),
        ("q=%ff", "percent-encoded UTF-8"),
        ("&".join(f"x{i}=1" for i in range(30)), "The query is not valid"),
        ("page=2", "Unknown parameter 'page'; expected sort, order, show, q, limit, cursor, index"),
        ("index=", "1 to 100 whole numbers"),
        ("index=1,,2", "1 to 100 whole numbers"),
        ("index=-1", "1 to 100 whole numbers"),
        ("index=%D9%A3", "1 to 100 whole numbers"),
        ("index=123456789", "1 to 100 whole numbers"),
        ("index=" + ",".join(["1"] * 101), "1 to 100 whole numbers"),
        ("index=1&limit=2", "index cannot be combined with"),
        ("cursor=", "cursor is empty"),
    ],
)
def test_an_invalid_parameter_is_named(sqlite_store, query, sentence):
    assert sentence in refused(sqlite_store, f"/api/runs/first/samples?{query}", 400)


@pytest.mark.parametrize("path", ["", "/history", "/samples/3"])
def test_routes_without_parameters_take_none(sqlite_store, path):
    assert "expected none" in refused(sqlite_store, f"/api/runs/first{path}?limit=1", 400)


def test_searching_for_200_characters_is_fine(sqlite_store):
    assert ok(sqlite_store, f"/api/runs/first/samples?q={quote('ü' * 200)}")["samples"] == []


def encoded(value):
    return base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "junk",
        "!!!",
        "%00",
        "%C3%BC",
        "a" * 5000,
        encoded("null"),
        encoded("[1, 2]"),
        encoded("{}"),
        encoded('{"a": NaN}'),
        encoded("NaN"),
        encoded("[" * 600),
        encoded('{"pk": {"S": "RUN#first"}, "sk": {"S": "META"}}'),
    ],
)
def test_a_malformed_cursor_is_rejected(store, cursor):
    for path in ("/api/runs", "/api/runs/first/samples", "/api/runs/empty/samples"):
        assert "cursor does not belong to this list" in refused(
            store, f"{path}?cursor={cursor}", 400
        )


def test_a_cursor_is_valid_for_its_own_list_only(store):
    path = "/api/runs/first/samples"
    cursor = quote(ok(store, f"{path}?sort=toxicity&limit=2")["next"])
    runs = quote(ok(store, "/api/runs?limit=1")["next"])

    assert ok(store, f"{path}?sort=toxicity&limit=9&cursor={cursor}")
    for other in (
        f"/api/runs/second.run_2/samples?sort=toxicity&cursor={cursor}",
        f"{path}?sort=reward&cursor={cursor}",
        f"{path}?sort=toxicity&order=desc&cursor={cursor}",
        f"{path}?sort=toxicity&show=better&cursor={cursor}",
        f"{path}?sort=toxicity&q=kind&cursor={cursor}",
        f"{path}?cursor={runs}",
        f"/api/runs?cursor={cursor}",
    ):
        assert "cursor" in refused(store, other, 400)


@pytest.mark.parametrize("query", ["", "sort=toxicity&", "sort=reward&order=desc&", "q=kind&"])
def test_a_forged_cursor_is_rejected_or_points_elsewhere_in_the_list(store, query):
    path = f"/api/runs/first/samples?{query}limit=2"
    cursor = ok(store, path)["next"]
    parts = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))

    for i in range(len(parts)):
        for value in (
            "1e999",
            "-1e999",
            "1e-300",
            "9" * 300,
            "-1",
            "null",
            "[]",
            "{}",
            '"\\u0000"',
        ):
            texts = [value if i == j else json.dumps(part) for j, part in enumerate(parts)]
            forged = encoded(f"[{','.join(texts)}]")
            status, _ = ask(store, f"{path}&cursor={forged}")

            assert status in (200, 400), (i, value)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/api/",
        "/api/runs/",
        "//api/runs",
        "/api/runs/nobody",
        "/api/runs/nobody/samples",
        "/api/runs/nobody/samples?index=1",
        "/api/runs/nobody/samples/1",
        "/api/runs/nobody/history",
        "/api/runs/../etc",
        "/api/runs/%2e%2e",
        "/api/runs/..%2f..%2fetc%2fpasswd",
        "/api/runs/first%00",
        "/api/runs/first%23",
        "/api/runs/" + "a" * 65,
        "/api/runs/%ff",
        "/api/runs/first/",
        "/api/runs/first/secrets",
        "/api/runs/first/samples/",
        "/api/runs/first/samples/12",
        "/api/runs/first/samples/-1",
        "/api/runs/first/samples/%D9%A3",
        "/api/runs/first/samples/123456789",
        "/api/runs/first/samples/3/query",
    ],
)
def test_a_path_that_does_not_exist_is_not_found(store, path):
    refused(store, path, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get"])
def test_the_api_is_read_only(sqlite_store, method):
    answer = respond(event("/api/runs", method), sqlite_store)

    assert answer["statusCode"] == 405
    assert answer["headers"]["allow"] == "GET, HEAD"


def test_an_origin_secret_is_required_if_it_is_set(sqlite_store):
    def status(secret, **headers):
        return respond(event("/api/runs", **headers), sqlite_store, secret)["statusCode"]

    assert status("wörd", **{"x-origin-secret": "wörd"}) == 200
    assert status("wörd", **{"x-origin-secret": "other"}) == 403
    assert status("wörd") == 403
    assert status("") == 200
    assert status(None) == 200


# Size limits


def test_a_page_that_is_too_big_is_shortened_and_has_a_next(store, monkeypatch):
    monkeypatch.setattr(handler_module, "MAX_BODY_BYTES", 1500)
    target = "/api/runs/first/samples?sort=toxicity&limit=100"

    first = respond(event(target), store)

    # Lambda encodes the response as JSON again, which escapes each quote with a second byte.
    assert len(json.dumps(first["body"], ensure_ascii=False).encode()) < 1500 + 1100
    assert 1 <= len(json.loads(first["body"])["samples"]) < 11
    rows = walk(store, target, "samples")
    monkeypatch.undo()
    assert rows == walk(store, target, "samples")


def test_a_sample_that_is_too_big_is_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(handler_module, "MAX_BODY_BYTES", 10_000)
    store = SQLiteStore(tmp_path / "results.sqlite")
    big = {**SAMPLES[0], "query": "q" * 50_000, "facts": ["f" * 50_000]}
    store.put_run(make_report("big", 2), [big, SAMPLES[1]])

    rows = walk(store, "/api/runs/big/samples?limit=100", "samples")
    full = ok(store, "/api/runs/big/samples/0")
    picked = ok(store, "/api/runs/big/samples?index=1,0")

    assert indices(rows) == [0, 1]
    assert indices(picked["samples"]) == [1]
    assert picked["next"] == "0"
    for row in (rows[0], full, ok(store, "/api/runs/big/samples?index=0,1")["samples"][0]):
        assert row["query"] == "q" * 2_000
        assert row["facts"] is None
        assert row["overflow"] == ["facts", "query"]
    assert rows[1]["response_before"] == SAMPLES[1]["response_before"]


def test_a_history_that_is_too_big_is_thinned_and_keeps_the_last_step(store, monkeypatch):
    monkeypatch.setattr(handler_module, "MAX_BODY_BYTES", 200)

    steps = ok(store, "/api/runs/first/history")["steps"]

    assert [row["step"] for row in steps] == [0, 2, 4]


# Failures of the store


@pytest.mark.parametrize("target", ["/api/runs", "/api/runs/first/samples?index=1", *sorted(FULL)])
def test_a_failing_store_returns_503_and_leaks_nothing(target, caplog):
    answer = respond(event(target), Broken())

    assert answer["statusCode"] == 503
    assert answer["headers"]["retry-after"] == "2"
    assert "secret-table" not in json.dumps(answer)
    assert "10.9.8.7" not in json.dumps(answer)
    assert "secret-table" in caplog.text


def test_an_unexpected_error_returns_500_and_leaks_nothing(caplog):
    store = Broken()
    store.error = RuntimeError("secret-table")

    answer = respond(event("/api/runs"), store)

    assert answer["statusCode"] == 500
    assert "secret-table" not in json.dumps(answer)
    assert "secret-table" in caplog.text


@pytest.mark.parametrize("kind", ["throttle", "broken", "reset", "lost", "denied", "expired"])
def test_a_failing_table_is_read_once_and_the_response_says_when_to_retry(dynamo, kind):
    proxy = FaultProxy(dynamo.client.meta.endpoint_url)
    store = open_store("dynamodb", "", dynamo.table, REGION, proxy.address, hurried=True)
    for operation in ("GetItem", "Query"):
        proxy.fail(operation, kind, FOR_EVER)

    answers = [respond(event(f"/api/runs{rest}"), store) for rest in ("", "/first/samples")]
    calls = dict(proxy.calls)
    proxy.heal()
    healed = respond(event("/api/runs"), store)
    store.close()
    proxy.close()

    for answer in answers:
        assert (answer["statusCode"], answer["headers"]["retry-after"]) == (503, "2")
        assert list(json.loads(answer["body"])) == ["error"]
        assert not re.search("127.0.0.1|secret|results of|Token|Denied", answer["body"])
    assert calls == {"Query": 1, "GetItem": 1}
    assert healed["statusCode"] == 200


def test_a_table_that_hangs_times_out(caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = open_store("dynamodb", "", "secret-table", REGION, endpoint, hurried=True)

        answer = respond(event("/api/runs/first"), store)

    assert (answer["statusCode"], answer["headers"]["retry-after"]) == (503, "2")
    assert "secret-table" not in json.dumps(answer)
    assert endpoint not in json.dumps(answer)


# The serverless function


def test_a_function_opens_its_table_once_and_checks_the_secret(sqlite_store, monkeypatch):
    opened = []

    def open_store(*args, **options):
        opened.append((args, options))
        return sqlite_store

    monkeypatch.setattr(handler_module, "open_store", open_store)
    monkeypatch.setenv("TABLE", "results")
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("ORIGIN_SECRET", "word")
    handler_module._open_table.cache_clear()

    answers = [
        handler(event("/api/runs", "GET", **{"x-origin-secret": "word"}), None),
        handler(event("/api/runs", "HEAD", **{"x-origin-secret": "word"}), None),
        handler(event("/api/runs", "GET"), None),
    ]

    handler_module._open_table.cache_clear()
    assert [answer["statusCode"] for answer in answers] == [200, 200, 403]
    assert answers[1]["body"] == ""
    assert opened == [(("dynamodb", "", "results"), {"region": REGION, "hurried": True})]


def test_the_function_needs_python_and_the_store_only():
    code = (
        "import sys\n"
        "for name in ('torch', 'ray', 'numpy', 'yaml', 'transformers', 'pandas', 'boto3'):\n"
        "    sys.modules[name] = None\n"
        "import ray_detox.viewer.handler, ray_detox.viewer.server\n"
        "others = {name.partition('.')[0] for name in sys.modules if sys.modules[name]}\n"
        "others -= set(sys.stdlib_module_names)\n"
        "print(sorted(name for name in others if not name.startswith(('_', 'sitecustomize'))))\n"
    )

    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['ray_detox']"


# The local server


KEYS: dict[int, str] = {}
"""The key of each server, by port; `fetch` sends it unless it sends another cookie."""


@contextmanager
def running(store, static=STATIC):
    with make_server(store, static=static) as server:
        KEYS[server.server_port] = server.key
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def static(tmp_path):
    """A small page, next to files that must not be served."""
    folder = tmp_path / "static"
    (folder / "vendor").mkdir(parents=True)
    (tmp_path / "secret.js").write_text("secret")
    (folder / "index.html").write_text("<!doctype html>hällo", encoding="utf-8")
    (folder / "style.css").write_text("p{}")
    (folder / "icon.svg").write_text("<svg/>")
    (folder / "notes.txt").write_text("secret")
    (folder / "vendor" / "a.js").write_text("let a")
    return folder


@pytest.fixture
def port(sqlite_store, static):
    with running(sqlite_store, static) as number:
        yield number


def fetch(port, target, method="GET", host=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, target, skip_host=True)
    cookie = {"Cookie": f"other=1; ray-detox-{port}={KEYS[port]}"}
    for name, value in {"Host": host or f"127.0.0.1:{port}", **cookie, **(headers or {})}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


@pytest.mark.parametrize(
    "target, kind, body",
    [
        ("/", "text/html; charset=utf-8", "<!doctype html>hällo"),
        ("/?run=first", "text/html; charset=utf-8", "<!doctype html>hällo"),
        ("/style.css", "text/css; charset=utf-8", "p{}"),
        ("/vendor/a.js", "text/javascript; charset=utf-8", "let a"),
        ("/v%65ndor/a.js", "text/javascript; charset=utf-8", "let a"),
        ("/icon.svg", "image/svg+xml", "<svg/>"),
        ("/config.json", "application/json; charset=utf-8", '{"auth": null}'),
    ],
)
def test_the_page_is_served_with_its_policy(port, target, kind, body):
    response, got = fetch(port, target)

    assert response.status == 200
    assert got.decode() == body
    assert response.headers["content-type"] == kind
    assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert response.headers["server"] == "ray-detox"


def test_the_local_server_returns_the_responses_of_the_function(port, sqlite_store):
    for target in ("/api/runs", "/api/runs/first/samples?q=%3Cpad%3E", "/api/nothing"):
        response, body = fetch(port, target)

        expected = respond(event(target), sqlite_store)
        assert (response.status, body.decode()) == (expected["statusCode"], expected["body"])
        for name, value in expected["headers"].items():
            assert response.headers.get_all(name) == [value]


@pytest.mark.parametrize(
    "target",
    [
        "/../secret.js",
        "/%2e%2e/secret.js",
        "/..%2fsecret.js",
        "/vendor/..%5c..%5csecret.js",
        "/vendor/../../secret.js",
        "//secret.js",
        "/notes.txt",
        "/vendor",
        "/vendor/",
        "/style.css%00",
        "/nothing.js",
        "/" + "a/" * 500,
        "http://127.0.0.1/style.css",
    ],
)
def test_nothing_but_the_pages_files_can_be_fetched(port, target):
    response, body = fetch(port, target)

    assert response.status == 404
    assert b"secret" not in body


def test_a_file_added_after_the_start_is_not_served(port, static):
    (static / "later.js").write_text("made after the server began")

    assert fetch(port, "/later.js")[0].status == 404


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example:{}",
        "localhost@evil.example",
        "127.0.0.1:{}.evil.example",
        "localhost:",
        "localhost:1234567",
        "0.0.0.0:{}",
        "[::2]:{}",
        "::1",
        "127.0.0.1:{}, evil.example",
    ],
)
def test_other_host_names_are_rejected(port, host):
    for target in ("/", "/api/runs", "/config.json"):
        response, body = fetch(port, target, host=host.format(port))

        assert response.status == 421
        assert f"http://127.0.0.1:{port}/".encode() in body


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:{}",
        "localhost:{}",
        "LocalHost:{}",
        "[::1]:{}",
        "localhost:1234",
        "127.0.0.1",
        "[::1]:9",
    ],
)
def test_every_local_host_name_is_accepted(port, host):
    assert fetch(port, "/", host=host.format(port))[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("target", ["/", "/api/runs"])
def test_the_local_server_is_read_only(port, target, method):
    response, _ = fetch(port, target, method, headers={"Content-Length": "0"})

    assert response.status == 405
    assert response.headers["allow"] == "GET, HEAD"


def test_a_body_is_not_parsed_as_the_next_request(port):
    given = f"Host: 127.0.0.1:{port}\r\nCookie: ray-detox-{port}={KEYS[port]}\r\n"
    smuggled = f"GET /style.css HTTP/1.1\r\n{given}\r\n"
    head = f"POST / HTTP/1.1\r\n{given}Content-Length: {len(smuggled)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall((head + smuggled).encode())

        answers = b"".join(iter(lambda: client.recv(4096), b""))

    assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("target", ["/", "/api/runs"])
def test_a_request_that_takes_too_long_is_ended_however_often_it_speaks(port, target, monkeypatch):
    monkeypatch.setattr(server_module, "REQUEST_S", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Slow: ".encode())
        client.settimeout(0.02)
        for _ in range(1000):  # 20 s; each byte would restart a time limit on a single read
            try:
                client.sendall(b"x")
                if client.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the server went on reading")


def test_a_response_that_nobody_reads_is_ended(port, static, monkeypatch):
    (static / "style.css").write_bytes(b" " * 30_000_000)
    monkeypatch.setattr(server_module, "REQUEST_S", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        given = f"Host: 127.0.0.1:{port}\r\nCookie: ray-detox-{port}={KEYS[port]}\r\n"
        client.sendall(f"GET /style.css HTTP/1.1\r\n{given}\r\n".encode())
        for _ in range(50):
            time.sleep(0.02)
            client.recv(1)
        received = 0
        with contextlib.suppress(ConnectionError):
            while more := client.recv(1 << 20):
                received += len(more)

    assert 1_000 < received < 30_000_000


def test_each_request_of_a_connection_has_its_own_time(port, monkeypatch):
    monkeypatch.setattr(server_module, "REQUEST_S", 0.3)
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(3):
        client.request("GET", "/")
        assert client.getresponse().read()
        time.sleep(0.2)
    client.close()


def test_many_clients_may_connect_before_the_server_answers(sqlite_store, static):
    with make_server(sqlite_store, static=static) as server, contextlib.ExitStack() as clients:
        for _ in range(60):  # nobody accepts them yet; a client beyond the backlog would wait
            clients.enter_context(socket.create_connection(server.server_address, timeout=2))


def test_head_is_get_without_its_body(port):
    for target in ("/", "/api/runs", "/config.json", "/nothing"):
        (full, body), (head, nothing) = fetch(port, target), fetch(port, target, "HEAD")

        assert (head.status, nothing) == (full.status, b"")
        assert int(head.headers["content-length"]) == len(body)


def test_a_connection_serves_many_requests(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.connect()
    kept = connection.sock
    cookie = {"Cookie": f"ray-detox-{port}={KEYS[port]}"}

    for method, target in (("GET", "/api/runs"), ("HEAD", "/"), ("GET", "/nothing"), ("GET", "/")):
        connection.request(method, target, headers=cookie)
        connection.getresponse().read()

        assert connection.sock is kept
    connection.close()


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "ray-detox-{port}=",
        "ray-detox-{port}={wrong}",
        "ray-detox-{port}={key}x",
        "other-{port}={key}",
        "{key}",
        "ray-detox-{port}=\xff",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_without_the_key_nothing_is_served(port, cookie, method):
    key = KEYS[port]
    cookie = cookie.format(port=port, key=key, wrong=key[::-1])

    for target in ("/", "/style.css", "/config.json", "/api/runs", "/none", f"/api/runs?key={key}"):
        response, body = fetch(port, target, method, headers={"Cookie": cookie})

        assert response.status == 403
        assert response.headers["set-cookie"] is None
        if method != "HEAD":
            assert b"open the whole address that `ray-detox view` printed" in body
            assert b"first" not in body


@pytest.mark.parametrize(
    "query", ["key=", "key={wrong}", "key={key}&key={key}", "key={key}%FF", "k={key}"]
)
def test_a_wrong_key_in_the_address_is_refused(port, query):
    query = query.format(key=KEYS[port], wrong=KEYS[port][::-1])

    response, _ = fetch(port, f"/?{query}", headers={"Cookie": ""})

    assert response.status == 403


def test_the_key_in_the_address_becomes_a_cookie_that_only_this_site_sends(port):
    response, body = fetch(port, f"/?key={KEYS[port]}", headers={"Cookie": ""})

    assert (response.status, body.decode()) == (200, "<!doctype html>hällo")
    cookie, *attributes = response.headers["set-cookie"].split("; ")
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    assert fetch(port, "/api/runs", headers={"Cookie": cookie})[0].status == 200


def test_forwarded_servers_of_the_same_port_do_not_take_the_cookie_of_each_other(port):
    response, _ = fetch(port, f"/?key={KEYS[port]}", host="localhost:1234", headers={"Cookie": ""})

    assert response.headers["set-cookie"].startswith(f"ray-detox-1234={KEYS[port]};")
    cookies = f"ray-detox-{port}=of-another; ray-detox-1234={KEYS[port]}"
    headers = {"Cookie": cookies}
    assert fetch(port, "/api/runs", host="localhost:1234", headers=headers)[0].status == 200


def test_a_server_in_a_container_accepts_the_names_that_its_user_allows(sqlite_store, static):
    """It listens on all addresses of the container; `docker run -p 9000:8421` forwards to it."""
    names = ["Box.example", "[fd00::7]"]
    with make_server(sqlite_store, host="0.0.0.0", static=static, names=names) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        port = server.server_port
        KEYS[port] = server.key
        assert server.address == f"http://127.0.0.1:{port}/?key={server.key}"
        for host in ("localhost:9000", "box.EXAMPLE", "box.example:9000", "[fd00::7]:80"):
            assert fetch(port, "/", host=host)[0].status == 200
            assert fetch(port, "/", host=host, headers={"Cookie": ""})[0].status == 403
        for host in ("evil.example", f"0.0.0.0:{port}", "box.example.evil.example"):
            assert fetch(port, "/", host=host)[0].status == 421
        server.shutdown()


def test_an_address_that_is_not_of_this_machine_is_named(sqlite_store):
    with pytest.raises(StoreError, match=r"Port 0 of 192\.0\.2\.1 cannot be used: .* --bind takes"):
        make_server(sqlite_store, host="192.0.2.1")


def test_each_server_has_a_key_of_its_own(sqlite_store):
    with running(sqlite_store) as one, running(sqlite_store) as other:
        assert KEYS[one] != KEYS[other]
        assert len(KEYS[one]) >= 32


def test_a_rebound_host_name_is_refused_even_with_the_key(port):
    response, _ = fetch(port, f"/?key={KEYS[port]}", host=f"evil.example:{port}")

    assert response.status == 421
    assert response.headers["set-cookie"] is None


def test_a_port_that_is_taken_is_named(sqlite_store):
    with (
        running(sqlite_store) as port,
        pytest.raises(StoreError, match=rf"Port {port} cannot be used: .*--port"),
    ):
        make_server(sqlite_store, port)


def test_an_invalid_port_is_named(sqlite_store):
    with pytest.raises(StoreError, match="Port 70000 cannot be used"):
        make_server(sqlite_store, 70_000)


@pytest.mark.parametrize("fails", [False, True])
def test_serve_prints_the_address_opens_the_browser_and_stops_on_ctrl_c(
    sqlite_store, monkeypatch, tmp_path, fails
):
    opened, said, asked = [], [], threading.Event()

    def open_page(address):
        file = Path(url2pathname(urlsplit(address).path))
        opened.append((address, file, file.read_text("utf-8"), file.parent.stat().st_mode & 0o777))
        asked.set()
        if fails:
            raise server_module.webbrowser.Error("no browser")

    def stop(self):
        assert asked.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module.webbrowser, "open", open_page)
    monkeypatch.setattr(server_module.ThreadingHTTPServer, "serve_forever", stop)

    serve(sqlite_store, 0, True, said.append, "first", tmp_path)

    (address,) = re.findall(r"http://127\.0\.0\.1:\d+/\?key=[\w-]{32}#/run/first", said[0])
    # Everybody can read the arguments of the browser, so the key is in a file that only we can read.
    ((link, file, page, mode),) = opened
    assert address.partition("key=")[2][:32] not in link
    assert f'url={address}"' in page
    assert mode == 0o700
    assert file.is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert said[-1] == "Stopped."


# The standalone report


class Scripts(HTMLParser):
    """Elements of a page with their attributes and texts, as an HTML parser finds them."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        self.found.append(["", {}, ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def sha256(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(page):
    (data,) = (t for a, t in Scripts(page).all("script") if a.get("id") == "embedded")
    return json.loads(data)


@pytest.fixture
def modules(tmp_path):
    """A page whose modules share names and use every supported form of import and export."""
    folder = tmp_path / "page"
    (folder / "vendor").mkdir(parents=True)
    texts = {
        "index.html": '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<link rel="icon" href="icon.svg">\n<link rel="stylesheet" href="style.css">\n'
        '<link rel="stylesheet" href="vendor/more.css">\n'
        '<script type="module" src="app.js"></script>\n</head>\n<body><main></main></body>\n</html>\n',
        "style.css": "p{color:red}",
        "vendor/more.css": "b{color:blue}",
        "app.js": 'import { half, secret as told, Box } from "./lib/a.js";\r\n'
        "import * as b from './lib/b.js';\nimport lib from \"./vendor/lib.js\";\n"
        'import "./lib/effect.js";\nconst secret = "$& app";\n'
        "await null;\n"
        "console.log(half(3), told, new Box().name, b.secret, lib(2), globalThis.effect, secret);\n",
        "lib/a.js": 'import { secret as other } from "./b.js";\nexport const secret = `a+${other}`;\n'
        "export function half(x) {\n  return x / 2;\n}\nexport class Box { name = 'box'; }\n",
        "lib/b.js": "const secret = 'b';\n/*\nexport const gone = 1;\n*/\n"
        "const unused = 1;\nexport { secret, unused as more };\n",
        "lib/effect.js": "globalThis.effect = 'effect';\n",
        "vendor/lib.LICENSE": "Copyright (c) somebody /* or other */\n",
        "vendor/lib.js": "/*! licence */ const t=x=>x*x,half=0;export{t as default,half as h};\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run JavaScript")
def test_joined_modules_behave_like_separate_ones(modules, tmp_path):
    page = render(REPORTS["first"], [], [], static=modules)
    joined = tmp_path / "joined.mjs"
    joined.write_text(next(t for a, t in Scripts(page).all("script") if a["type"] == "module"))
    (modules / "package.json").write_text('{"type": "module"}')

    apart, together = (
        subprocess.run(["node", str(file)], capture_output=True, text=True)
        for file in (modules / "app.js", joined)
    )

    assert apart.stdout == "1.5 a+b box b 4 effect $& app\n"
    assert together.stdout == apart.stdout, together.stderr


@pytest.mark.parametrize("page_folder", ["modules", "real"])
def test_a_page_allows_its_own_script_and_style_and_nothing_else(modules, page_folder):
    folder = modules if page_folder == "modules" else STATIC

    page = render(REPORTS["first"], SAMPLES, HISTORY, static=folder)

    found = Scripts(page)
    (policy,) = (a["content"] for a, _ in found.all("meta") if a.get("http-equiv"))
    data, script = found.all("script")
    ((_, style),) = found.all("style")
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {sha256(script[1])}",
        f"style-src {sha256(style)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    assert (data[0], script[0]) == (
        {"type": "application/json", "id": "embedded"},
        {"type": "module"},
    )
    assert found.all("link") == []
    assert page.index("http-equiv") < page.index("<style>") < page.index("<script")


def test_the_embedded_run_equals_the_responses_of_the_api(modules, sqlite_store):
    page = render(REPORTS["first"], SAMPLES, HISTORY, static=modules)

    assert embedded(page) == {
        "report": ok(sqlite_store, "/api/runs/first"),
        "history": ok(sqlite_store, "/api/runs/first/history")["steps"],
        "samples": ok(sqlite_store, "/api/runs/first/samples?limit=100")["samples"],
    }
    assert page.lower().count("<script") == page.lower().count("</script") == 2
    data = re.search(r'id="embedded">(.*?)</script>', page, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", data)


def test_licences_of_vendored_modules_are_embedded(modules):
    page = render(REPORTS["first"], [], [], static=modules)

    assert "Copyright (c) somebody /* or other * /" in page
    assert "/*! licence */" in page


def test_numbers_that_are_not_finite_are_shown_as_missing(modules):
    page = render(REPORTS["first"], [{"index": 0, "kl": float("nan")}], [], static=modules)

    (row,) = embedded(page)["samples"]
    assert (row["kl"], row["invalid"]) == (None, ["kl"])


@pytest.mark.parametrize(
    "text",
    [
        'import { a } from "somewhere";',
        'import { a } from "https://example.org/a.js";',
        'import { a } from "../../a.js";',
        'import d, { a } from "./lib/b.js";',
        'import {\n  a,\n} from "./lib/b.js";',
        'export { a } from "./lib/b.js";',
        'export * from "./lib/b.js";',
        "export let a = 1;",
        "export default function () {}",
        'const m = await import("./lib/b.js");',
        "console.log(import.meta.url);",
        'const end = "</script>";',
        'const comment = "<!--";',
        'import { x } from "./app.js";',
    ],
)
def test_an_unsupported_module_fails_with_its_line(modules, text):
    (modules / "app.js").write_text(text)

    with pytest.raises(
        AssertionError,
        match=r"unsupported form of import|imports|import each other in a cycle|script",
    ):
        render(REPORTS["first"], [], [], static=modules)


@pytest.mark.parametrize(("address", "lines"), [("::1", 2), ("127.0.0.1", 2), ("0.0.0.0", 3)])
def test_the_page_warns_if_others_can_read_the_connection(tmp_path, address, lines):
    SQLiteStore(tmp_path / "results.sqlite").check()
    words = ["view", "--no-browser", "--port", "0", "--bind", address, "--output", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "ray_detox", *words],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    ) as view:
        assert view.stdout is not None
        printed = [view.stdout.readline() for _ in range(lines - 1)]
        url = urlsplit(printed[0].split()[3])
        with contextlib.closing(http.client.HTTPConnection(url.hostname, url.port)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().status == 403  # without the key; it serves now
        view.send_signal(signal.SIGINT)
        printed += view.stdout.readlines()

    assert printed[0].startswith("Serving results at http://")
    assert ("without encryption" in printed[1]) == (lines == 3)
    assert printed[-1] == "Stopped.\n"
    assert len(printed) == lines
