"""What a run may go on with: its storage, its settings, and the content it was started with."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_detox import lab, pipeline
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.runs import held as held_module
from ray_detox.runs.checkpoint_store import Checkpoint
from ray_detox.runs.conditional import versioned_file
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.held import Origin, OtherIdentity
from ray_detox.runs.identity import fingerprints
from ray_detox.runs.lease import create, read_record
from ray_detox.runs.resume import resume_from_storage
from ray_detox.runs.storage import Storage
from ray_detox.stages.evaluate import _KeptShards

QUICK = ["reward.check_sentences=false"]


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded policy, whose files a test may change."""
    return Path(shutil.copytree(lab.T5, tmp_path / "t5"))


def prepare(tmp_path, *words, resume=False, output="runs", accept_changes=False):
    """Create or resume the run `first`, and return it."""
    config = load_config("lab", [*QUICK, *words])
    folder = RunFolder(tmp_path / output, "first")
    _, found = pipeline.prepare_run(
        config, folder, resume=resume, accept_changes=accept_changes, say=lambda line: None
    )
    return found


def run_to_step(step, tmp_path, *words):
    """Start the run `first`, keep a checkpoint of a step, and end."""
    found = prepare(tmp_path, *words)
    found.begin(0)
    files = {"metrics.jsonl": b"", "adapter/adapter_config.json": b"{}"}
    found.checkpoints(2).save(Checkpoint(step, files))
    found.note_step(step)
    found.release()
    return found


def change_weights(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


# ---- the content -----------------------------------------------------------------------------------


def test_a_run_with_other_weights_goes_on_only_if_told_and_the_report_says_so(tmp_path, model):
    words = [f"policy.model={model}"]
    run_to_step(3, tmp_path, *words)
    change_weights(model)

    with pytest.raises(OtherIdentity) as refused:
        prepare(tmp_path, *words, "train.steps=60", resume=True)

    assert RunFolder(tmp_path / "runs", "first").read_config().train.steps == 40
    assert re.fullmatch(
        r"Run 'first' was started with other content of policy \(sha256:\w+ then, sha256:\w+ now\)\. "
        r"Put back what it was started with, start a new run, or go on with --accept-changes, which "
        r"the report will show\.",
        str(refused.value),
    )
    found = prepare(tmp_path, *words, resume=True, accept_changes=True)
    found.release()
    (change,) = found.facts()["changes"]["accepted"]
    assert (change["step"], change["name"]) == (3, "policy")
    assert change["before"] != change["after"]
    # Accepted once, and in the record for ever.
    again = prepare(tmp_path, *words, resume=True)
    again.release()
    assert again.facts()["changes"]["accepted"] == [change]


def test_a_starting_adapter_a_reward_a_function_and_the_package_are_part_of_the_identity(
    tmp_path, monkeypatch
):
    module = tmp_path / "my_reward.py"
    module.write_text("def shorter(completions, **_):\n    return [0.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(
        "lab",
        [
            *QUICK,
            "reward.terms=[{function: my_reward.shorter, name: a}, {classifier: {model: lab}}]",
        ],
    )

    found = fingerprints(config)

    assert found.keys() == {
        "package",
        "policy",
        "reward",
        "reward.terms[0].function",
        "reward.terms[1].classifier",
    }
    module.write_text("def shorter(completions, **_):\n    return [1.0] * len(completions)\n")
    assert fingerprints(config) == found | {
        "reward.terms[0].function": fingerprints(config)["reward.terms[0].function"]
    }
    assert fingerprints(config) != found


def test_prompts_that_differ_are_found_once_they_are_prepared(tmp_path):
    found = run_to_step(3, tmp_path)
    found = prepare(tmp_path, resume=True)
    found.identify({"prompts": "aa"}, accept=False)

    with pytest.raises(OtherIdentity, match=r"other content of prompts \(aa then, bb now\)"):
        found.identify({"prompts": "bb"}, accept=False)

    assert read_record(found.storage).identity["prompts"] == "aa"
    found.release()


def test_a_measurement_compares_what_its_settings_have_not_changed(tmp_path, model):
    words = [f"policy.model={model}"]
    run_to_step(3, tmp_path, *words)
    folder = RunFolder(tmp_path / "runs", "first")
    config = folder.read_config()
    reward = config.replace(reward=config.reward.replace(weight=2.0))

    Origin.of_run(reward, folder).compare({"reward": "another"}, accept=False)
    with pytest.raises(OtherIdentity):
        Origin.of_run(config, folder).compare({"reward": "another"}, accept=False)
    change_weights(model)
    origin = Origin.of_run(config, folder)
    with pytest.raises(OtherIdentity):
        origin.compare(fingerprints(config), accept=False)
    origin.compare(fingerprints(config), accept=True)

    assert [c["name"] for c in origin.facts()["changes"]["accepted"]] == ["policy"]
    assert read_record(Storage(str(folder.path))).accepted == ()


def test_shards_that_were_measured_with_other_content_are_not_reused(tmp_path):
    config, storage = load_config("lab"), Storage(str(tmp_path))
    one, other = (_KeptShards(storage, config, {}, [], {"reward": key}) for key in ("a", "b"))
    one.write(0, [])

    assert one.read(0, []) == []
    assert other.read(0, []) is None


# ---- the settings ----------------------------------------------------------------------------------


def test_settings_that_change_are_recorded_with_the_step_from_which_they_hold(tmp_path):
    run_to_step(3, tmp_path)

    found = prepare(tmp_path, "train.steps=60", "reward.actors=2", resume=True)
    found.note_step(5)
    found.release()
    found = prepare(tmp_path, "train.steps=70", "reward.actors=2", resume=True)
    found.release()

    assert [
        (change["step"], change["name"], change["before"], change["after"])
        for change in found.facts()["changes"]["settings"]
    ] == [(3, "reward.actors", 1, 2), (3, "train.steps", 40, 60), (5, "train.steps", 60, 70)]
    assert RunFolder(tmp_path / "runs", "first").read_config().train.steps == 70


@pytest.mark.parametrize(
    "word",
    [
        *(
            "reward.weight=2.0",
            "reward.max_tokens=64",
            "reward.terms=[]",
            "sampling.temperature=0.7",
        ),
        *(
            "ppo.kl_coef=0.9",
            "ppo.critic=detached",
            "data.limit=100",
            "policy.lora_rank=4",
            "seed=1",
        ),
        *("reward.input=prompt+response", "sampling.max_new_tokens=8"),
    ],
)
def test_settings_that_define_a_run_are_refused_and_nothing_changes(tmp_path, word):
    run_to_step(3, tmp_path, "reward.terms=[{classifier: {model: lab}}]")
    folder = tmp_path / "runs/first"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    terms = "reward.terms=[{classifier: {model: lab}}]"

    with pytest.raises(ConfigError, match=r"would make another run of 'lab': run 'first' has "):
        prepare(tmp_path, terms, word, resume=True)

    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


# ---- the storage -----------------------------------------------------------------------------------


def test_a_storage_that_is_away_stops_the_resume_and_nothing_changes(tmp_path):
    kept = tmp_path / "mount/kept"
    words = [f"train.storage={kept}"]
    run_to_step(3, tmp_path, *words)
    kept.rename(tmp_path / "unmounted")
    kept.mkdir()
    before = (tmp_path / "runs/first/config.json").read_bytes()

    with pytest.raises(
        ConfigError, match=r"holds nothing of run 'first', which is kept there\. Is it mounted"
    ):
        prepare(tmp_path, *words, resume=True)

    assert list(kept.iterdir()) == []
    assert (tmp_path / "runs/first/config.json").read_bytes() == before
    kept.rmdir()
    (tmp_path / "unmounted").rename(kept)
    found = prepare(tmp_path, *words, resume=True)
    assert found.checkpoints(2).newest().step == 3
    found.release()


def test_checkpoints_that_are_gone_stop_the_resume(tmp_path):
    run_to_step(3, tmp_path)
    shutil.rmtree(tmp_path / "runs/first/checkpoints")

    with pytest.raises(
        ConfigError, match=r"has no checkpoint of run 'first', and had that of step 3"
    ):
        prepare(tmp_path, resume=True)


@pytest.mark.parametrize("elsewhere", ["None", "other run"])
def test_a_run_is_not_resumed_in_the_storage_of_another_one(tmp_path, elsewhere):
    run_to_step(3, tmp_path, f"train.storage={tmp_path / 'kept'}")
    words, sentence = [], r"is kept in train\.storage=.*; expected that address"
    if elsewhere == "other run":
        words = [f"train.storage={tmp_path / 'other'}"]
        prepare(tmp_path, *words, output="more").release()
        sentence = r"keeps another run of the id 'first' than"

    with pytest.raises(ConfigError, match=sentence):
        prepare(tmp_path, *words, resume=True)


def test_a_storage_that_was_moved_with_its_runs_may_be_named_anew(tmp_path):
    run_to_step(3, tmp_path, f"train.storage={tmp_path / 'kept'}")
    (tmp_path / "kept").rename(tmp_path / "moved")

    found = prepare(tmp_path, f"train.storage={tmp_path / 'moved'}", resume=True)

    assert found.checkpoints(2).newest().step == 3
    found.release()


def test_a_run_goes_on_in_another_folder_from_its_storage(tmp_path):
    words = [f"train.storage={tmp_path / 'kept'}"]
    first = run_to_step(3, tmp_path, *words)
    folder = RunFolder(tmp_path / "elsewhere", "first")
    resume_from_storage(folder, str(tmp_path / "kept"), check=id)

    found = prepare(tmp_path, *words, resume=True, output="elsewhere")

    assert found.record.run == first.record.run
    assert (first.record.token, found.record.token) == (1, 2)
    found.release()


def test_a_new_run_does_not_take_the_folder_of_one_that_begins_at_the_same_time(tmp_path):
    found = prepare(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "runs/first").iterdir()}
    config, folder = load_config("lab", QUICK), RunFolder(tmp_path / "runs", "first")

    with pytest.raises(ConfigError, match=r"^Run 'first' exists in .*--resume first --output "):
        held_module.open_run(config, folder, print, resume=False, found={}, accept=False)

    found.release()
    names = {file.name for file in before} - {"run.json"}
    after = {file.name: file.read_bytes() for file in (tmp_path / "runs/first").iterdir()}
    assert {name: after[name] for name in names} == {
        file.name: content for file, content in before.items() if file.name in names
    }


def test_a_run_that_has_done_nothing_is_discarded_with_what_it_wrote_to_the_storage(tmp_path):
    found = prepare(tmp_path, f"train.storage={tmp_path / 'kept'}")

    found.discard()

    assert not (tmp_path / "runs/first").exists()
    assert Storage(str(tmp_path / "kept/first")).names() == ["run.lock"]
    prepare(tmp_path, f"train.storage={tmp_path / 'kept'}").release()


def test_the_files_of_a_new_run_are_those_that_count_as_nothing(tmp_path):
    prepare(tmp_path).release()

    assert {file.name for file in (tmp_path / "runs/first").iterdir()} == held_module.CREATED_FILES
    settings = json.loads((tmp_path / "runs/first/config.json").read_text())
    assert settings == load_config("lab", QUICK).to_dict()


def test_a_run_that_another_process_has_taken_is_not_discarded(tmp_path):
    found = prepare(tmp_path, f"train.storage={tmp_path / 'kept'}")
    for one in found.leases:
        one._released.set()
        one._thread.join()
        place = Storage(one.guard.address)
        file = versioned_file(place)
        version, _ = file.read()
        file.replace(dataclasses.replace(read_record(place), token=2).to_json(), version)
    before = sorted((tmp_path / "kept/first").iterdir())

    found.discard()

    assert sorted((tmp_path / "kept/first").iterdir()) == before
    assert (tmp_path / "runs/first/config.json").exists()


@pytest.mark.parametrize("left", ["config.json", "checkpoints/step-00000003/manifest.json"])
def test_a_storage_with_files_of_a_run_and_no_record_is_not_taken(tmp_path, left):
    file = tmp_path / "kept/first" / left
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(load_config("lab", QUICK).to_dict()))

    with pytest.raises(ConfigError, match=r"has files of a run 'first' and no run\.json"):
        prepare(tmp_path, f"train.storage={tmp_path / 'kept'}")

    assert [path for path in (tmp_path / "kept/first").rglob("*") if path.is_file()] == [file]


def test_the_output_folder_may_be_the_storage(tmp_path):
    words = [f"train.storage={tmp_path / 'runs'}"]
    run_to_step(3, tmp_path, *words)

    found = prepare(tmp_path, *words, resume=True)

    assert len(found.leases) == 1
    assert found.checkpoints(2).newest().step == 3
    found.release()


def test_a_start_that_was_cut_off_does_not_block_the_run_id(tmp_path):
    folder = tmp_path / "runs/first"
    create(Storage(str(folder)), "first").release()

    found = prepare(tmp_path)

    assert found.record.token == 1
    found.release()


def test_a_commit_may_be_pinned_on_resume(tmp_path):
    run_to_step(3, tmp_path)

    found = prepare(tmp_path, "policy.revision=abc", resume=True)

    assert [change.name for change in found.record.settings] == ["policy.revision"]
    found.release()


# ---- several drivers -------------------------------------------------------------------------------


def test_paused_and_killed_drivers_of_one_run_mix_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.writers", "--schedules", "6"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 of 6 wrong"
