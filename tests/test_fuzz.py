"""Random files, cursors and events: only our own errors, nothing outside the folder, bounded time.

RAY_DETOX_FUZZ=100 tries a hundred times as many examples, and others in every run.
"""

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_detox.bounded import DamagedError, parse, parse_yaml
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import apply_override, load_config
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, unpack_folder, write_files
from ray_detox.runs.folder import RunFolder, settings_from_json
from ray_detox.runs.metrics_log import parse_rows
from ray_detox.runs.publish import publish
from ray_detox.runs.record import record_from_json
from ray_detox.runs.report_text import describe_run, list_line, list_table
from ray_detox.runs.storage import Storage
from ray_detox.store.errors import BadCursor, StoreError
from ray_detox.store.pages import SHOWS, SORTS, SampleQuery, encode_cursor
from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer.handler import respond
from ray_detox.viewer.standalone import render
from tests.test_damage import CONFIG, EXAMPLES, REPORT, REPORT_BYTES, SAMPLES_BYTES

FACTOR = int(os.environ.get("RAY_DETOX_FUZZ", "1"))


def quick(count):
    """Return settings of a test that tries the same `count` examples in every run."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


NAMES = st.text(max_size=8) | st.sampled_from(
    ["..", "../x", "/tmp/x", "adapter/../../x", "state.json", "adapter/README.md", "a\\b", "\0", ""]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**70, -(2**70), "\ud800", "1e400", 10**18])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def changed(original):
    """A strategy of JSON values like `original`, of which some parts, by their path, are others."""

    def paths(value, above=()):
        yield above
        parts = value.items() if isinstance(value, dict) else ()
        for name, inner in parts:
            yield from paths(inner, (*above, name))

    def put(value, path, other):
        if not path:
            return other
        if not isinstance(value, dict):
            return value
        return value | {path[0]: put(value.get(path[0]), path[1:], other)}

    def apply(changes):
        value = original
        for path, other in changes:
            value = put(value, path, other)
        return value

    some = [path for path in paths(original) if path]
    return st.lists(st.tuples(st.sampled_from(some), VALUES), min_size=1, max_size=3).map(apply)


@contextmanager
def folder_alone():
    """A folder inside another one, in which nothing else may appear."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "inside"
        folder.mkdir()
        yield folder
        assert [path.name for path in Path(above).iterdir()] == ["inside"]


def one_sentence(error):
    assert "\n" not in str(error)
    assert str(error)


# ---- files of a run ------------------------------------------------------------------------------


@quick(60)
@given(
    names=st.dictionaries(
        NAMES, st.fixed_dictionaries({"bytes": LEAVES, "sha256": LEAVES}), max_size=3
    ),
    change=st.dictionaries(st.sampled_from(["step", "objective", "files"]), VALUES, max_size=1),
)
def test_a_manifest_leads_nowhere_else(names, change):
    with folder_alone() as folder:
        store = CheckpointStore(Storage(str(folder)))
        store.save(Checkpoint(1, {"state.json": b"{}"}))
        file = folder / "checkpoints/step-00000001/manifest.json"
        about = json.loads(file.read_text())
        about["files"] |= names
        file.write_text(json.dumps(about | change))

        fresh = CheckpointStore(Storage(str(folder)))
        newest = fresh.newest(lambda message: one_sentence(message))
        fresh.best()
        fresh.complete()
        if newest is not None:
            unpack_folder(newest.files, lambda unpacked: None)


@quick(60)
@given(files=st.dictionaries(NAMES, st.binary(max_size=4), max_size=3))
def test_packed_files_stay_in_their_folder(files):
    with folder_alone() as folder, suppress(DamagedError):
        write_files(files, folder)


@quick(40)
@given(
    content=st.binary(max_size=40) | changed(CONFIG.to_dict()).map(lambda v: json.dumps(v).encode())
)
def test_settings_of_any_content(content):
    try:
        settings_from_json(content, "config.json")
    except ConfigError as error:
        one_sentence(error)


RECORD = {
    "format": 1,
    "run": "5f2c",
    "token": 1,
    "beat": 1,
    "writer": None,
    "takings": [{"token": 1, "step": 0}],
    "identity": {"a": "b"},
    "accepted": [],
    "settings": [{"step": 1, "name": "a", "before": 1, "after": 2}],
    "step": None,
}


@quick(60)
@given(
    content=st.binary(max_size=40) | changed(RECORD).map(lambda value: json.dumps(value).encode())
)
def test_a_record_of_any_content(content):
    try:
        record_from_json(content, "run.json").to_json()
    except ConfigError as error:
        one_sentence(error)


@quick(40)
@given(
    report=st.just(REPORT_BYTES) | changed(REPORT).map(lambda value: json.dumps(value).encode()),
    samples=st.just(SAMPLES_BYTES)
    | st.binary(max_size=40)
    | changed(EXAMPLES[0].to_json()).map(lambda value: json.dumps(value).encode() + b"\n"),
)
def test_a_result_of_any_content_is_published_or_refused(report, samples):
    with folder_alone() as output:
        folder = RunFolder(output, "first")
        folder.path.mkdir()
        (folder.path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        (folder.path / "report.json").write_bytes(report)
        (folder.path / "samples.jsonl").write_bytes(samples)
        try:
            publish(CONFIG.results, folder)
        except (ConfigError, StoreError) as error:
            one_sentence(error)


@quick(60)
@given(
    lines=st.lists(
        st.binary(max_size=20) | VALUES.map(lambda v: json.dumps(v).encode()), max_size=4
    )
)
def test_metrics_of_any_content(lines):
    rows, damaged = parse_rows(b"\n".join(lines))

    assert all(row["step"] >= 1 for row in rows)
    assert all(damaged.values())


# ---- JSON, YAML, recipes -------------------------------------------------------------------------


@quick(100)
@given(content=st.binary(max_size=60) | st.text('[]{}":,1e \\u', max_size=60).map(str.encode))
def test_json_of_any_bytes(content):
    with suppress(DamagedError):
        parse(content)


@quick(150)
@given(text=st.text("[]{}:,-?&*!<|>'\"%@ \nab01", max_size=40) | st.text(max_size=30))
def test_yaml_of_any_text(text):
    with suppress(DamagedError):
        parse_yaml(text)


@quick(60)
@given(
    tree=changed({name: value for name, value in CONFIG.to_dict().items() if name != "recipe"}),
    override=st.text("abc.=[]{}:&*1 ", max_size=20) | st.text(max_size=12),
)
def test_a_recipe_of_any_values(tree, override):
    with folder_alone() as folder:
        file = folder / "mine.yaml"
        file.write_text(json.dumps(tree))
        try:
            load_config(file, [])
        except ConfigError as error:
            one_sentence(error)
    with suppress(ConfigError):
        apply_override({}, override)


# ---- stores and the page -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = SQLiteStore(tmp_path_factory.mktemp("fuzz") / "results.sqlite")
    samples = [EXAMPLES[0].to_json() | {"index": index} for index in range(5)]
    for run_id in ("first", "second"):
        store.put_run({**REPORT, "run_id": run_id}, samples, [{"step": 1}])
    return store


QUERIES = st.builds(
    SampleQuery,
    sort=st.sampled_from(SORTS),
    descending=st.booleans(),
    show=st.sampled_from(SHOWS),
    search=st.text(max_size=3),
)


@quick(100)
@given(cursor=st.text(max_size=20), position=st.lists(LEAVES, max_size=4), query=QUERIES)
def test_a_cursor_of_any_content(store, cursor, position, query):
    forged = [encode_cursor(position, "first", query), encode_cursor(position, "runs"), cursor]
    for one in forged:
        with suppress(BadCursor):
            page = store.list_page(1, one)
            assert {row["run_id"] for row in page.rows} <= {"first", "second"}
        with suppress(BadCursor):
            page = store.sample_page("first", query, 2, one)
            assert {row["index"] for row in page.rows} <= set(range(5))


WORDS = st.text(max_size=10) | st.sampled_from(
    ["api", "runs", "first", "samples", "history", "0", "-1", "%2e%2e", "%00", "%ff", "..", ""]
)
PAIRS = st.tuples(
    st.sampled_from(["limit", "cursor", "index", "q", "sort", "order", "show"])
    | st.text(max_size=4),
    WORDS,
)


@quick(150)
@given(
    path=st.lists(WORDS, max_size=6).map(lambda parts: "/" + "/".join(parts)),
    pairs=st.lists(PAIRS, max_size=3),
    method=st.sampled_from(["GET", "HEAD", "POST", ""]),
    headers=st.dictionaries(st.just("x-origin-secret"), st.text(max_size=5)),
    secret=st.none() | st.just("secret"),
)
def test_an_event_of_any_content_gets_a_response(store, path, pairs, method, headers, secret):
    event = {
        "rawPath": path,
        "rawQueryString": "&".join(f"{name}={value}" for name, value in pairs),
        "requestContext": {"http": {"method": method}},
        "headers": headers,
    }

    response = respond(event, store, secret)

    assert response["statusCode"] in (200, 400, 403, 404, 405)
    assert isinstance(json.loads(response["body"]), dict)
    response["body"].encode()


@quick(60)
@given(report=changed(REPORT), sample=changed(EXAMPLES[0].to_json()))
def test_a_report_of_any_values_is_shown(report, sample):
    text = describe_run(report, [sample])
    text += list_line(report) + list_table([report, REPORT], 80)
    with suppress(StoreError):
        text += render(report, [sample], [])

    assert text
