"""Files that somebody wrote to do harm: nothing outside a folder is written, and nothing hangs."""

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from ray_detox import bounded
from ray_detox.bounded import DamagedError, parse, parse_yaml, read_file
from ray_detox.cli import main as cli
from ray_detox.config import ConfigError, PolicyConfig, RunConfig
from ray_detox.models import adapters
from ray_detox.models.loading import load_policy
from ray_detox.models.sizes import check_size_of
from ray_detox.models.sources import local_folder
from ray_detox.recipes.loading import apply_override, load_config
from ray_detox.runs.checkpoint_store import (
    FILE_NAMES,
    MAX_MANIFEST_BYTES,
    Checkpoint,
    CheckpointStore,
    unpack_folder,
    write_files,
)
from ray_detox.runs.conditional import versioned_file
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.metrics_log import MetricsLog, read_metrics
from ray_detox.runs.storage import Storage, StorageError
from ray_detox.stages import preflight
from ray_detox.store import sqlite as sqlite_module
from ray_detox.store.errors import StoreError
from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer.handler import respond
from tests.emulators import emulator
from tests.test_damage import EXAMPLES, REPORT

ESCAPES = (
    "/tmp/x",
    "../x",
    "adapter/../../x",
    "adapter//tmp/x",
    "adapter/./x",
    "adapter\\..\\x",
    "C:x",
    "x\0y",
    "",
    "adapter/",
    "~/x",
)
"""Names that are none of a file in a folder."""


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    """A store with a checkpoint of step 1."""
    store = CheckpointStore(Storage(str(tmp_path / "run")))
    store.save(Checkpoint(1, {"state.json": b"{}", "adapter/adapter_config.json": b"{}"}))
    return store


def change_manifest(store, change):
    """Call `change` with the parsed manifest of step 1, and write it again."""
    file = Path(store.storage.address) / "checkpoints/step-00000001/manifest.json"
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("name", [*ESCAPES, "adapter/adapter_model.bin", "other.json"])
def test_a_manifest_may_name_only_the_files_of_a_checkpoint(store, tmp_path, name):
    digest = {"bytes": 6, "sha256": "0" * 64}
    (tmp_path / "x").write_bytes(b"secret")
    change_manifest(store, lambda about: about["files"].update({name: digest}))

    with pytest.raises(StorageError, match="damaged or not one of ray-detox"):
        store.load(1)
    assert store.newest(lambda message: None) is None


@pytest.mark.parametrize("name", ESCAPES)
def test_no_file_is_written_outside_a_folder(tmp_path, name):
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)

    with pytest.raises(DamagedError, match="is not the name of a file"):
        write_files({"good": b"1", name: b"2"}, folder)
    with pytest.raises(DamagedError):
        unpack_folder({name: b"2"}, lambda unpacked: None)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("link", ["adapter", "state.json"])
def test_no_file_is_written_through_a_link_out_of_a_folder(tmp_path, link):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / link).symlink_to(outside if link == "adapter" else outside / "file")

    with pytest.raises(DamagedError, match="leads out of"):
        write_files({link if "." in link else f"{link}/x": b"1"}, folder)

    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter", "adapter.part"])
def test_an_adapter_replaces_a_link_instead_of_following_it(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = RunFolder(tmp_path, "first")
    folder.path.mkdir()
    (folder.path / name).symlink_to(outside)

    folder.write_adapter({"adapter/adapter_config.json": b"{}"})

    assert list(outside.iterdir()) == []
    assert not folder.adapter.is_symlink()
    assert (folder.adapter / "adapter_config.json").read_bytes() == b"{}"


def test_metrics_replace_a_link_instead_of_following_it(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(outside)
    log = MetricsLog(tmp_path / "run")
    log._rewrite([{"step": 1}])
    log.close()

    assert outside.read_bytes() == b""
    assert read_metrics(tmp_path / "run/metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    "link", ["checkpoints", "checkpoints/step-00000001", "tensorboard", "ray-train"]
)
def test_a_run_with_a_link_to_a_folder_elsewhere_is_refused_in_one_sentence(tmp_path, capsys, link):
    outside, run = tmp_path / "outside", tmp_path / "runs/first"
    outside.mkdir()
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(outside)
    (run / "config.json").write_text(json.dumps(load_config("lab").to_dict()))

    for words in (["run", "--resume", "first"], ["evaluate", "first"], ["export", "first", "x"]):
        assert cli.main([*words, "--output", str(tmp_path / "runs")]) == 2

    said = capsys.readouterr().err.splitlines()
    assert [line.count(f"{link} is a link out of the run's folder") for line in said] == [1, 1, 1]
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/step-00000001"])
def test_a_storage_writes_through_no_link_out_of_it(tmp_path, link):
    outside, kept = tmp_path / "outside", tmp_path / "kept"
    outside.mkdir()
    (kept / link).parent.mkdir(parents=True)
    (kept / link).symlink_to(outside)

    with pytest.raises(StorageError, match="is a link out of it"):
        CheckpointStore(Storage(str(kept))).save(Checkpoint(1, {"state.json": b"{}"}))

    assert list(outside.iterdir()) == []


def test_only_as_many_bytes_are_read_as_a_manifest_says(store, monkeypatch):
    file = Path(store.storage.address) / "checkpoints/step-00000001/state.json"
    file.write_bytes(b"x" * 100_000)
    read = []
    whole = Storage.read_start

    def watched(self, name, max_bytes):
        content = whole(self, name, max_bytes)
        read.append(len(content))
        return content

    monkeypatch.setattr(Storage, "read_start", watched)

    with pytest.raises(StorageError, match=r"state\.json is larger, not the 2 bytes"):
        store.load(1)
    assert read[-1] == 3


@pytest.mark.parametrize("size", [-1, 1 << 60, True, 1.5, "2"])
def test_a_manifest_with_an_odd_size_is_not_valid(store, size):
    change_manifest(store, lambda about: about["files"]["state.json"].update(bytes=size))

    with pytest.raises(StorageError, match="no valid manifest"):
        store.load(1)


def test_a_manifest_of_many_megabytes_is_not_valid(store):
    change_manifest(store, lambda about: about.update(more="x" * MAX_MANIFEST_BYTES))

    with pytest.raises(StorageError, match="no valid manifest"):
        store.load(1)


def test_a_checkpoint_that_no_reader_would_accept_is_not_saved(store):
    with pytest.raises(AssertionError, match="weights"):
        store.save(Checkpoint(2, {"weights": b""}))
    assert all(name.count("/") <= 1 for name in FILE_NAMES)


# ---- pipes and devices ---------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "device", "link to a device"])
def endless(request, tmp_path):
    """A path whose content never comes, or never ends."""
    path = tmp_path / "endless"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    return path


def test_a_pipe_or_a_device_is_not_read(endless, tmp_path):
    with pytest.raises(DamagedError, match="a device or a pipe"):
        read_file(endless)
    with pytest.raises(StorageError, match="a device or a pipe"):
        Storage(str(endless.parent)).read(endless.name)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        read_metrics(endless)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "run.json", "report.json", "samples.jsonl"])
def test_a_file_of_a_run_that_is_a_pipe_is_refused_in_one_sentence(tmp_path, capsys, name):
    folder = RunFolder(tmp_path, "first")
    folder.write_result(REPORT, EXAMPLES)
    settings = json.dumps(load_config("lab").to_dict())
    (folder.path / "config.json").write_text(settings)
    (folder.path / name).unlink(missing_ok=True)
    os.mkfifo(folder.path / name)

    if name == "run.json":
        with pytest.raises(StorageError, match="a device or a pipe"):
            versioned_file(Storage(str(folder.path))).read()
    else:
        assert cli.main(["publish", "first", "--output", str(tmp_path)]) == cli.MISTAKE
        printed = capsys.readouterr().err
        assert "a device or a pipe" in printed
        assert printed.count("\n") == 1


# ---- JSON and YAML -------------------------------------------------------------------------------


def test_json_is_bounded_in_depth_and_size(monkeypatch):
    deepest = b"[" * bounded.MAX_DEPTH + b"]" * bounded.MAX_DEPTH

    assert parse(deepest)
    with pytest.raises(DamagedError, match="nested too deeply"):
        parse(b"[" + deepest + b"]")
    monkeypatch.setattr(bounded, "MAX_JSON_BYTES", 10)
    with pytest.raises(DamagedError, match="more than 10 bytes"):
        parse(b'"1234567890"')


def bomb(levels, width):
    """YAML whose aliases expand to `width ** levels` values."""
    lines = ["a0: &a0 x"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


YAML_BOMBS = {
    "aliases": (bomb(12, 9), "once its aliases are expanded"),
    "an alias in itself": ("a: &a [*a]", "contains itself"),
    "brackets": ("a: " + "[" * 20_000, "nested too deeply"),
    "balanced brackets": ("a: " + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
    "braces": ("{" * 20_000, "nested too deeply"),
    "dashes": ("- " * 20_000, "nested too deeply"),
    "depth by aliases": (bomb(200, 1), "nested too deeply"),
    "a long number": ("a: 0x" + "f" * 100_000, "a number of 100,002 characters"),
    "a number in base 60": ("a: " + ":".join(["59"] * 50_000), "a number of 149,999 characters"),
    "a large file": ("# " + "x" * bounded.MAX_YAML_BYTES, "more than 1,048,576"),
    "an unknown tag": ("a: !!python/object/apply:os.getcwd []", "python/object/apply"),
    "NUL": ("a: \0", "not allowed"),
    "a tag that does not fit": ("a: !!bool x", "x"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", YAML_BOMBS)
def test_a_recipe_that_is_a_bomb_is_refused_in_one_sentence(kind, tmp_path):
    text, reason = YAML_BOMBS[kind]
    file = tmp_path / "mine.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=reason) as error:
        load_config(file)

    assert str(error.value).startswith(f"Recipe {file} is not valid YAML: ")
    assert "\n" not in str(error.value)
    if len(text) <= bounded.MAX_YAML_BYTES:
        with pytest.raises(ConfigError, match="the value is not valid YAML"):
            apply_override({}, f"reward.terms={text}")


def test_aliases_of_ordinary_size_are_read():
    assert parse_yaml("a: &a {b: 1}\nc: [*a, *a]\nd: {<<: *a, e: 2}") == {
        "a": {"b": 1},
        "c": [{"b": 1}, {"b": 1}],
        "d": {"b": 1, "e": 2},
    }


# ---- models and adapters -------------------------------------------------------------------------


@pytest.fixture
def model(tiny_t5, tmp_path):
    """`model(name, change)`: the folder of a tiny T5, one of whose JSON files is changed."""

    def make(name, change):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in tiny_t5.iterdir():
            (folder / file.name).symlink_to(file)
        target = folder / name
        if isinstance(change, dict):
            change = json.dumps(json.loads((tiny_t5 / name).read_text()) | change).encode()
        target.unlink(missing_ok=True)
        target.write_bytes(change)
        return folder

    return make


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{", "not valid JSON"),
        ({"vocab_size": 2**40}, "vocab_size=1.1e+12"),
        ({"num_layers": 10**6}, "num_layers=1e+06"),
        ({"num_labels": 2**30}, "num_labels=1.074e+09"),
        ({"d_model": 10**7}, "config.json describes a model of"),
        ({"num_layers": 300}, "config.json describes a model of"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_model_that_asks_for_more_than_its_files_have_is_refused(model, change, reason):
    folder = model("config.json", change)
    config = PolicyConfig(model=str(folder))

    with pytest.raises(ConfigError) as error:
        preflight.check_policy(RunConfig(policy=config))
    with pytest.raises(ConfigError):
        load_policy(config, RunConfig().sampling, seed=0)

    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"d_kv": -1},
        {"num_heads": "x"},
        {"architectures": {"a": 1}, "is_encoder_decoder": False},
        {"feed_forward_proj": 7},
        {"model_type": [1]},
        {"id2label": 5},
    ],
    ids=str,
)
def test_a_model_with_odd_values_is_refused_in_one_sentence(model, change):
    folder = model("config.json", change)

    with pytest.raises(ConfigError) as error:
        preflight.check_policy(RunConfig(policy=PolicyConfig(model=str(folder))))

    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"version": 3, "model": {}}', b"5"])
def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_sentence(model, name, content):
    folder = model(name, content)
    sentence = "policy.model is"

    try:
        preflight.check_policy(RunConfig(policy=PolicyConfig(model=str(folder))))
    except ConfigError as error:  # any other error fails the test
        sentence = str(error)
    else:
        assert name == "tokenizer_config.json", "a model without a vocabulary was accepted"

    assert sentence.startswith("policy.model is")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "weights.bin"}}, "'weights.bin'"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "'../x"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "'/x"),
        ("model.safetensors.index.json", {"weight_map": ["x"]}, "no weight_map"),
        ("adapter_config.json", {"peft_type": "LORA"}, "an adapter (adapter_config.json) is in"),
    ],
)
def test_a_model_is_made_of_the_safetensors_in_its_folder_alone(model, name, content, reason):
    folder = model(name, json.dumps(content).encode())

    with pytest.raises(ConfigError) as error:
        local_folder(str(folder), None, "policy.model")

    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("generation_config.json", b"[1]", "its generation_config.json cannot be used"),
        ("generation_config.json", {"watermarking_config": {"x": 1}}, "cannot be used"),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "is RagTokenizer"),
    ],
)
def test_generation_and_tokenizer_of_odd_kinds_are_refused(model, name, change, reason):
    folder = model(name, change)

    with pytest.raises(ConfigError, match=reason):
        preflight.check_policy(RunConfig(policy=PolicyConfig(model=str(folder))))


def test_a_key_of_a_bucket_leads_to_no_file_outside_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a/cache"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with emulator("moto") as endpoint:
        s3 = boto3.client("s3", region_name="us-east-1", endpoint_url=endpoint)
        s3.create_bucket(Bucket="bucket")
        for key in ("model/config.json", "model/../../../../out.json"):
            s3.put_object(Bucket="bucket", Key=key, Body=b"{}")
        host = endpoint.removeprefix("http://")

        folder = local_folder(
            f"s3://bucket/model?region=us-east-1&endpoint_override={host}&scheme=http",
            None,
            "policy.model",
        )

    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert list(tmp_path.rglob("out.json")) == []


@pytest.mark.timeout(60)
def test_a_pipe_among_the_files_of_a_model_is_refused(model):
    folder = model("config.json", {})
    os.mkfifo(folder / "notes.txt")

    with pytest.raises(ConfigError, match="a device or a pipe"):
        local_folder(str(folder), None, "policy.model")


def test_a_model_without_its_weights_here_is_not_compared_with_them(model):
    folder = model("config.json", {"num_layers": 300})
    for file in folder.glob("*.safetensors"):
        file.unlink()

    check_size_of(AutoModelForSeq2SeqLM, folder, "m", "policy.model")


@pytest.fixture
def adapter(tiny_t5, tmp_path):
    """`adapter(change)`: settings with a starting adapter whose adapter_config.json is changed."""

    def make(change):
        folder = tmp_path / "start"
        base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
        get_peft_model(base, LoraConfig(r=4, target_modules=["q", "v"])).save_pretrained(folder)
        file = folder / "adapter_config.json"
        if isinstance(change, dict):
            change = json.dumps(json.loads(file.read_text()) | change).encode()
        file.write_bytes(change)
        return PolicyConfig(model=str(tiny_t5), adapter=str(folder))

    return make


CATASTROPHES = [
    {"target_modules": r"(.*.)*\.(q|v)"},
    {"exclude_modules": "((.*)*)*Z"},
    {"rank_pattern": {"((.*)*)*Z": 2}},
    {"alpha_pattern": {"((.*)*)*Z": 2}},
    {"modules_to_save": ["((.*)*)*Z"]},
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("change", CATASTROPHES, ids=lambda change: next(iter(change)))
def test_an_expression_that_takes_years_is_refused(adapter, monkeypatch, change):
    monkeypatch.setattr(adapters, "PATTERN_TIMEOUT_S", 0.5)
    config = adapter(change)

    with pytest.raises(ConfigError, match=r"takes longer than 0\.5 s"):
        preflight.check_policy(RunConfig(policy=config))
    with pytest.raises(ConfigError, match=r"takes longer than 0\.5 s"):
        load_policy(config, RunConfig().sampling, seed=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 2**30}, "r=1073741824; expected a whole number from 1 to 4096"),
        ({"r": "4"}, "r='4'; expected a whole number"),
        ({"r": 4000}, "was not trained on"),
        ({"lora_alpha": [1]}, r"lora_alpha=[1]; expected a number"),
        ({"rank_pattern": {"q": 2**30}}, "rank_pattern={'q': 1073741824}; expected names with"),
        ({"rank_pattern": [1]}, "rank_pattern=[1]; expected names with"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern={'q': 'x'}; expected names with numbers"),
        ({"target_modules": {"q": 1}}, "target_modules={'q': 1}; expected a name or a list"),
        ({"target_modules": "("}, "unterminated subpattern"),
        ({"target_modules": "(q|v)*" * 9_999}, "more than 20,000 characters"),
        ({"layers_to_transform": "x"}, "does not fit"),
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "only LoRA is supported"),
        ({"monteclora_config": {"n": 1}}, "only LoRA is supported"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5; expected a name"),
        (b"[" * 100_000, "nested too deeply"),
        (b"5", "expected an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_adapter_with_odd_values_is_refused_in_one_sentence(adapter, change, reason):
    config = adapter(change)

    with pytest.raises(ConfigError) as error:
        preflight.check_policy(RunConfig(policy=config))

    assert reason in str(error.value)
    assert len(str(error.value)) < 500


def test_an_ordinary_expression_is_matched(adapter):
    config = adapter({"target_modules": r".*\.(q|v)"})

    preflight.check_policy(RunConfig(policy=config))


# ---- results.sqlite ------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """`results(*statements)`: a store with a run, after these statements."""

    def make(*statements):
        store = SQLiteStore(tmp_path / "results.sqlite")
        samples = [one.to_json() for one in EXAMPLES]
        store.put_run(REPORT, samples, [{"step": 1}])
        with closing(sqlite3.connect(store.path)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()
        return store

    return make


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT"
FOREIGN = {
    "a view in place of a table": (
        "DROP TABLE runs",
        f"CREATE VIEW runs AS {ENDLESS} x AS run_id, '' AS created, '{{}}' AS summary FROM c",
    ),
    "a trigger": ("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM samples; END",),
    "another table": ("CREATE TABLE extra (x)",),
    "another index": ("CREATE INDEX extra ON samples (hex(sample))",),
    "another column": ("ALTER TABLE runs ADD COLUMN x AS (hex(report))",),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_with_a_foreign_schema_is_refused(results, kind):
    store = results(*FOREIGN[kind])

    for use in (
        store.list_runs,
        store.list_page,
        store.check,
        lambda: store.get_run("first"),
        lambda: list(store.get_samples("first")),
        lambda: store.sample_page("first"),
        lambda: store.put_run({**REPORT, "run_id": "second"}, []),
    ):
        with pytest.raises(StoreError, match="is not a results file"):
            use()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
def test_a_pipe_beside_the_results_is_refused(results, suffix):
    store = results("PRAGMA journal_mode = DELETE")
    os.mkfifo(f"{store.path}{suffix}")

    with pytest.raises(StoreError, match=rf"results.sqlite{suffix} is not a file"):
        store.list_runs()


def test_statistics_of_sqlite_are_no_foreign_schema(results):
    assert results("ANALYZE").get_run("first") == REPORT


def test_a_file_of_a_newer_version_is_named_as_such(results):
    store = results("CREATE TABLE extra (x)", "PRAGMA user_version = 7")

    with pytest.raises(StoreError, match="written by a newer version"):
        store.list_runs()


def test_a_query_ends_after_a_number_of_instructions(results, monkeypatch):
    store = results()
    assert len(list(store.get_samples("first"))) == 2
    monkeypatch.setattr(sqlite_module, "_MAX_STEPS", 3)
    monkeypatch.setattr(sqlite_module, "_STEPS_PER_CALL", 1)

    with pytest.raises(StoreError, match="interrupted"):
        list(store.get_samples("first"))


ODD_JSON = ["'[1]'", "'3'", "5", "'\"\\ud800\"'"]
ODD = [*ODD_JSON, "'[1'", "x'ff00'", "'[' || hex(zeroblob(9999))"]
ODD_SUMMARIES = [
    *ODD,
    """'{"run_id": [1], "toxicity": 3, "verdict": 5, "created": {}, "n": "x", "status": [[]]}'""",
    """'{"n": 1e400, "recipe": "\\ud800", "toxicity": {"before": NaN, "toxic_above": -1e400}}'""",
]


@pytest.mark.parametrize("summary", ODD_SUMMARIES)
def test_a_damaged_summary_hides_no_other_run(results, tmp_path, capsys, summary):
    store = results(f"UPDATE runs SET summary = {summary}")
    store.put_run({**REPORT, "run_id": "second"}, [])

    for words in (["results"], ["results", "--json"]):
        assert cli.main([*words, "--output", str(tmp_path)]) == 0
        assert "second" in capsys.readouterr().out
    response = get(store, "/api/runs")
    assert response["statusCode"] == 200
    assert "second" in [run["run_id"] for run in json.loads(response["body"])["runs"]]


DAMAGE = [
    *(("runs SET report", value) for value in ODD),
    *(("runs SET curves", value) for value in ODD if value != "'[1]'"),
    # SQLite itself refuses a sample that is not JSON, because its numbers are columns.
    *(("samples SET sample", value) for value in ODD_JSON),
]


@pytest.mark.parametrize(("what", "value"), DAMAGE)
def test_a_damaged_value_is_named_in_one_sentence(results, tmp_path, capsys, what, value):
    store = results(f"UPDATE {what} = {value}")

    code = cli.main(["report", "first", "--output", str(tmp_path), "--html", os.devnull])

    assert code == cli.MISTAKE
    printed = capsys.readouterr().err
    assert printed.startswith("ray-detox: The results file ")
    assert printed.count("\n") == 1
    for path in ("/api/runs/first", "/api/runs/first/samples", "/api/runs/first/history"):
        assert get(store, path)["statusCode"] in (200, 503)


def test_numbers_and_texts_that_json_lacks_are_missing_on_the_page(results):
    store = results(
        """UPDATE samples SET sample = '{"index": 0, "kl": 1e400, "query": "\\ud800"}'"""
    )

    response = get(store, "/api/runs/first/samples")

    assert response["statusCode"] == 200
    row = json.loads(response["body"])["samples"][0]
    assert (row["kl"], row["query"]) == (None, "\ufffd")


def get(store, path, query=""):
    """Return the response of the page's API."""
    http = {"method": "GET"}
    event = {"rawPath": path, "rawQueryString": query, "requestContext": {"http": http}}
    return respond(event, store)
