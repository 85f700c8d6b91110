"""Files of a run with any bytes in them: one sentence, or all that is still there; never a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_detox.config import ConfigError
from ray_detox.evaluation.examples import PairedExample
from ray_detox.recipes.loading import load_config
from ray_detox.records import PreparedRow
from ray_detox.runs import resume
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.held import open_run
from ray_detox.runs.lease import create
from ray_detox.runs.metrics_log import MetricsLog, read_metrics
from ray_detox.runs.publish import publish
from ray_detox.runs.report_text import describe_run, list_line, list_table
from ray_detox.runs.storage import Storage
from ray_detox.stages.evaluate import _KeptShards
from ray_detox.store.errors import StoreError
from ray_detox.store.sqlite import SQLiteStore

STEPS = 4
CONFIG = load_config("lab")
REPORT = {
    "run_id": "first",
    "recipe": "lab",
    "status": "complete",
    "created": "2026-01-31T12:00:00+00:00",
    "n": 2,
    "verdict": {"name": "improved", "sentence": "Toxicity fell.", "reasons": []},
    "steps": STEPS,
    "toxicity": {"before": {"mean": 0.5}, "after": {"mean": 0.4}, "toxic_above": 0.5},
    "writer": {"run": "5f2c", "token": 1},
}


def example(index):
    sides = {"before": ("thé idiot", 0.9), "after": ("ok", 0.1)}
    stored = {
        "index": index,
        "prompt_id": f"{index:04x}",
        "query": "q",
        "reference": None,
        "facts": ["key"],
        "kl": 1.5,
    }
    for side, (response, toxicity) in sides.items():
        stored |= {
            f"response_{side}": response,
            f"reward_{side}": -1.0,
            f"toxicity_{side}": toxicity,
            f"length_{side}": 3,
            f"truncated_{side}": False,
            f"finished_{side}": True,
            f"term_{side}": 0.5,
            f"rouge_l_{side}": None,
        }
    return PairedExample.from_json(stored)


EXAMPLES = [example(0), example(1)]
CONFIG_BYTES = json.dumps(CONFIG.to_dict(), indent=2).encode() + b"\n"
REPORT_BYTES = json.dumps(REPORT, indent=2).encode() + b"\n"
METRICS = b"".join(
    json.dumps({"step": step, "score": step / 8, "terms": {"t": 1.0}}).encode() + b"\n"
    for step in range(1, STEPS + 1)
)
SAMPLES_BYTES = b"".join(json.dumps(one.to_json()).encode() + b"\n" for one in EXAMPLES)
SHARD = json.dumps([one.to_json() for one in EXAMPLES]).encode()
FILES = ("config.json", "metrics.jsonl", "report.json", "samples.jsonl")


def make_run(output: Path) -> RunFolder:
    """Write all files of a finished run."""
    folder = RunFolder(output, "first")
    folder.write_result(REPORT, EXAMPLES)
    (folder.path / "config.json").write_text(json.dumps(CONFIG.to_dict(), indent=2))
    (folder.path / "metrics.jsonl").write_bytes(METRICS)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "runs")


# ---- worked examples -----------------------------------------------------------------------------

BROKEN = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "not UTF-8": lambda content: b'{"a": "\xff\xfe"}\n' + content,
    "a list": lambda content: b"[1, 2]\n",
    "a number": lambda content: b"3\n",
    "null": lambda content: b"null\n",
    "nested": lambda content: b"[" * 100_000 + b"\n",
    "a long number": lambda content: b'{"step": ' + b"1" * 5000 + b"}\n",
}


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(BROKEN[kind](content))


@pytest.mark.parametrize("kind", [*BROKEN, "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_publish_names_a_damaged_file_and_says_how_to_go_on(folder, refused, name, kind):
    damage(folder.path / name, kind)

    sentence = refused("publish", "first", "--output", folder.output)

    assert str(folder.path / name) in sentence
    assert len(sentence.replace(str(folder.output), "")) < 400
    assert "Restore it from a copy" in sentence or "ray-detox run --resume first" in sentence
    assert not folder.store_path.exists()


def test_a_result_without_its_samples_is_refused(folder, refused):
    (folder.path / "samples.jsonl").unlink()

    sentence = refused("publish", "first", "--output", folder.output)

    assert "samples.jsonl is damaged: it is missing. Move it away and measure" in sentence


def test_a_file_in_place_of_the_runs_folder_is_no_run(tmp_path, refused):
    (tmp_path / "first").write_text("")

    assert "No run 'first' in " in refused("publish", "first", "--output", tmp_path)


def test_a_list_of_samples_that_lacks_some_is_refused(folder, refused):
    file = folder.path / "samples.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])

    sentence = refused("publish", "first", "--output", folder.output)

    assert "samples.jsonl is damaged: it has 1 lines, and the report is of 2 prompts" in sentence


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"facts": 5}, "line 2: the field 'facts' of an evaluated prompt is 5, expected list"),
        ({"facts": ["a", 5]}, "line 2: the field 'facts' of an evaluated prompt is 5"),
        ({"index": True}, "'index' of an evaluated prompt is True, expected int"),
        ({"kl": None}, "'kl' of an evaluated prompt is None, expected float or int"),
        ({"toxicity_after": "0.5"}, "'toxicity_after' of an evaluated prompt is '0.5'"),
        ({"finished_before": 1}, "'finished_before' of an evaluated prompt is 1, expected bool"),
        ({"term_after": []}, "'term_after' of an evaluated prompt is [], expected float or int"),
        ({"rouge_l_after": {}}, "'rouge_l_after' of an evaluated prompt is {}"),
    ],
)
def test_a_sample_with_a_field_of_another_type_is_named_with_its_line(
    folder, refused, changes, words
):
    lines = [EXAMPLES[0].to_json(), EXAMPLES[1].to_json() | changes]
    (folder.path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))

    assert words in refused("publish", "first", "--output", folder.output)


def test_the_line_of_a_damaged_file_is_named(folder):
    lines = METRICS.splitlines(keepends=True)
    lines[2] = lines[2][:20] + b"\n"
    (folder.path / "metrics.jsonl").write_bytes(b"".join(lines))
    settings = (folder.path / "config.json").read_bytes().splitlines(keepends=True)
    settings[4] = b'  "data" 3,\n'
    (folder.path / "config.json").write_bytes(b"".join(settings))

    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 3 is not valid JSON: "):
        folder.read_history()
    with pytest.raises(ConfigError, match=r"config\.json is damaged: line 5 is not valid JSON: "):
        folder.read_config()


@pytest.mark.parametrize("line", [b"{}", b'{"step": 0}', b'{"step": "1"}', b'{"step": true}'])
def test_a_row_without_its_step_is_a_damaged_line(folder, line):
    (folder.path / "metrics.jsonl").write_bytes(METRICS + line + b"\n")

    with pytest.raises(ConfigError, match="line 5 has no step, which is a whole number from 1"):
        folder.read_history()


def test_a_partial_last_row_is_left_out(folder):
    (folder.path / "metrics.jsonl").write_bytes(METRICS + b'{"step": 5, "sc')

    assert [row["step"] for row in folder.read_history()] == [1, 2, 3, 4]


def test_a_folder_in_place_of_the_metrics_refuses_a_resume_before_anything_starts(folder, refused):
    damage(folder.path / "metrics.jsonl", "a folder")

    sentence = refused("run", "--resume", "first", "--output", folder.output)

    assert (
        "metrics.jsonl is damaged: it cannot be read: Is a directory. Move it away: the run"
        in sentence
    )


# ---- repair --------------------------------------------------------------------------------------


def rows_after(folder, content, kept):
    """Resume with these metrics in the folder and in the checkpoint; the rows and what was said."""
    said = []
    (folder.path / "metrics.jsonl").write_bytes(content)
    MetricsLog(folder.path, kept, said.append).close()
    return read_metrics(folder.path / "metrics.jsonl"), said


def test_damaged_rows_are_taken_from_the_checkpoint_and_the_file_is_kept(folder):
    lines = METRICS.splitlines(keepends=True)
    lines[0] = lines[0].replace(b"0.125", b"9.5")  # the file's own rows win: they have more fields
    broken = b"".join([lines[0], b"\0" * 30 + b"\n", lines[2], b"{\n"])
    upto_3 = b"".join(METRICS.splitlines(keepends=True)[:3])

    rows, said = rows_after(folder, broken, upto_3)

    assert [(row["step"], row["score"]) for row in rows] == [(1, 9.5), (2, 0.25), (3, 0.375)]
    assert (folder.path / "metrics.jsonl.damaged").read_bytes() == broken
    assert said == [
        "metrics.jsonl: lines 2, 4 cannot be read; metrics.jsonl.damaged keeps the file as it was",
        "metrics.jsonl: step 2 taken from the checkpoint of step 3; steps after 3 are trained again",
    ]


def test_a_step_that_nothing_else_has_is_named(folder):
    lines = METRICS.splitlines(keepends=True)
    broken = b"".join([lines[0], b"{\n", *lines[2:]])

    rows, said = rows_after(folder, broken, lines[3])

    assert [row["step"] for row in rows] == [1, 3, 4]
    assert said[1] == "metrics.jsonl: step 2 lost, which the checkpoint lacks as well"


def test_rows_that_nothing_has_damaged_stay_as_they_are(folder):
    beyond = METRICS + b'{"step": 5}\n{"step": 6'

    rows, said = rows_after(folder, beyond, METRICS)

    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert said == []
    assert not (folder.path / "metrics.jsonl.damaged").exists()


def test_the_metrics_are_complete_at_the_end_although_a_line_was_damaged_meanwhile(folder):
    said = []
    log = MetricsLog(folder.path, METRICS, said.append)
    (folder.path / "metrics.jsonl").write_bytes(METRICS.replace(b'"step": 3', b'"step" 3'))

    log.complete(METRICS)
    log.close()

    assert (folder.path / "metrics.jsonl").read_bytes() == METRICS
    assert len(said) == 1


# ---- any bytes -----------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated(draw, content):
    """Bytes that differ from `content`, or its JSON with another value somewhere."""
    if draw(st.booleans()):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)) | st.just(len(content)))
        return content[:start] + draw(st.binary(max_size=12)) + content[end:]
    lines = [content] if content in (CONFIG_BYTES, REPORT_BYTES) else content.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    root = {"": json.loads(lines[number])}
    node, key, parent = root[""], "", root
    while isinstance(node, dict | list) and node and draw(st.integers(0, 3)):
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, draw(st.sampled_from(list(keys)))
        node = node[key]
    if draw(st.integers(0, 3)):
        parent[key] = draw(values)
    elif parent is not root:
        del parent[key]
    lines[number] = json.dumps(root[""]).encode()
    return b"\n".join(lines) + b"\n"


def few(count):
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(act):
    """Return the sentence with which an action is refused; None if it is not."""
    try:
        act()
    except (ConfigError, StoreError) as error:
        sentence = str(error)
    else:
        return None
    assert "\n" not in sentence
    return sentence


@few(150)
@given(mutated(CONFIG_BYTES))
def test_any_settings_are_read_or_refused_in_a_sentence(folder, content):
    (folder.path / "config.json").write_bytes(content)

    assert "config.json" in (refusal(folder.read_config) or "config.json")


@few(60)
@given(mutated(CONFIG_BYTES))
def test_a_run_is_taken_from_any_storage_or_refused_in_a_sentence(tmp_path, content):
    kept = tmp_path / "kept/first"
    shutil.rmtree(tmp_path, ignore_errors=True)
    create(Storage(str(kept)), "first").release()
    folder = RunFolder(tmp_path / "runs", "first")
    config = load_config("lab", [f"train.storage={tmp_path / 'kept'}"])
    elsewhere = RunFolder(tmp_path / "more", "first")
    before = set(folder.output.glob("*/*"))

    for act in (
        lambda: resume.resume_from_storage(folder, str(tmp_path / "kept"), check=id),
        lambda: open_run(config, elsewhere, print, resume=False, found={}, accept=False).release(),
    ):
        (kept / "config.json").write_bytes(content)
        sentence = refusal(act)
        if sentence is not None:
            assert "first" in sentence
            assert (kept / "config.json").read_bytes() == content
            assert not elsewhere.path.exists()
    assert before <= set(folder.output.glob("*/*"))


@few(60)
@given(mutated(METRICS), mutated(METRICS))
def test_any_metrics_are_read_repaired_or_refused_in_a_sentence(tmp_path_factory, content, kept):
    folder = make_run(tmp_path_factory.mktemp("runs"))
    (folder.path / "metrics.jsonl").write_bytes(content)
    sentence = refusal(folder.read_history)
    whole = folder.read_history() if sentence is None else None
    assert "metrics.jsonl: line" in (sentence or "metrics.jsonl: line")

    rows, said = rows_after(folder, content, kept)

    assert all(type(row["step"]) is int for row in rows)
    assert bool(said) == (whole is None)
    if whole is not None:
        assert json.dumps(rows) == json.dumps(whole)
    else:
        assert (folder.path / "metrics.jsonl.damaged").read_bytes() == content


@few(60)
@given(st.sampled_from(["report.json", "samples.jsonl", "metrics.jsonl"]), st.data())
def test_any_result_is_published_or_refused_in_a_sentence(tmp_path_factory, name, data):
    whole = {"report.json": REPORT_BYTES, "samples.jsonl": SAMPLES_BYTES, "metrics.jsonl": METRICS}
    folder = make_run(tmp_path_factory.mktemp("runs"))
    (folder.path / name).write_bytes(data.draw(mutated(whole[name])))

    sentence = refusal(lambda: publish(CONFIG.results, folder))

    assert folder.store_path.exists() == (sentence is None)
    if sentence is None:
        store = SQLiteStore(folder.store_path)
        (summary,) = store.list_runs()
        run_id = summary["run_id"]
        assert list_line(summary)
        assert list_table([summary], 80)
        assert describe_run(store.get_run(run_id), store.get_samples(run_id))


@few(80)
@given(mutated(SHARD))
def test_any_kept_shard_is_whole_or_measured_again(tmp_path, content):
    rows = [PreparedRow(one.prompt_id, one.query, [1], {}, 0, ()) for one in EXAMPLES]
    kept = _KeptShards(Storage(str(tmp_path)), CONFIG, {}, rows, {})
    kept.write(0, EXAMPLES)
    assert kept.read(0, rows) == EXAMPLES
    (file,) = tmp_path.glob("evaluation/*/shard-00000.json")

    file.write_bytes(content)

    found = kept.read(0, rows)
    assert found is None or [one.prompt_id for one in found] == ["0000", "0001"]


def test_a_kept_shard_with_other_prompts_or_a_folder_in_its_place_is_measured_again(tmp_path):
    rows = [PreparedRow(one.prompt_id, one.query, [1], {}, 0, ()) for one in EXAMPLES]
    kept = _KeptShards(Storage(str(tmp_path)), CONFIG, {}, rows, {})

    kept.write(0, EXAMPLES[:1])
    too_few = kept.read(0, rows)
    (file,) = tmp_path.glob("evaluation/*/shard-00000.json")
    os.remove(file)
    file.mkdir()

    assert too_few is None
    assert kept.read(0, rows) is None
