"""The run's folder and the error message after a stage fails; without starting Ray."""

import io
import json
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import ray.exceptions

from ray_detox import pipeline
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.runs import resume
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, CheckpointWriter
from ray_detox.runs.console import Console
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.metrics_log import MetricsLog, read_metrics
from ray_detox.runs.storage import Storage, StorageError
from ray_detox.stages import errors
from ray_detox.stages.events import StepDone
from ray_detox.stages.session import Session, TrainingFacts
from ray_detox.stages.train import TrainingOutcome
from tests.test_console import stats as metrics_of


def run_with(stages, tmp_path, monkeypatch):
    """Run the recipe lab with the function `stages` in place of its stages."""
    folder = RunFolder(tmp_path, "first")
    monkeypatch.setattr(pipeline, "_run_stages", lambda *args, **kwargs: stages(folder))
    pipeline.run(load_config("lab"), folder, Console(io.StringIO()))


def task_error(cause: Exception) -> Exception:
    """Return the error that `ray.get` raises if a task raised `cause`."""
    trace = f"Traceback (most recent call last):\n  a page of it\n{cause}"
    return ray.exceptions.RayTaskError("measure_shard", trace, cause).as_instanceof_cause()


def test_a_run_that_did_not_start_leaves_no_folder(tmp_path, monkeypatch):
    def too_small(folder):
        raise ConfigError("The run needs 8 GPUs, and the cluster has 0.")

    with pytest.raises(ConfigError, match="8 GPUs"):
        run_with(too_small, tmp_path, monkeypatch)

    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_that_did_not_start_keeps_its_folder(tmp_path, monkeypatch):
    def too_small(*_, **__):
        raise ConfigError("The run needs 8 GPUs, and the cluster has 0.")

    config, folder = load_config("lab"), RunFolder(tmp_path, "first")
    pipeline.prepare_run(config, folder, resume=False)[1].release()
    monkeypatch.setattr(pipeline, "_run_stages", too_small)

    with pytest.raises(errors.StageError, match="8 GPUs"):
        pipeline.run(config, folder, Console(io.StringIO()), resume=True)

    assert folder.has_settings()


def test_a_failure_after_training_keeps_the_adapter(tmp_path, monkeypatch):
    def trained_and_then_no_model(folder):
        folder.adapter.mkdir()
        (folder.adapter / "adapter_config.json").write_text("{}")
        raise task_error(ConfigError("policy.model is '/gone', and no such folder is here."))

    # A StageError and not a ConfigError, because the run can be resumed.
    with pytest.raises(errors.StageError) as failed:
        run_with(trained_and_then_no_model, tmp_path, monkeypatch)

    assert str(failed.value) == "policy.model is '/gone', and no such folder is here."
    assert (tmp_path / "first/adapter/adapter_config.json").is_file()


def test_an_error_in_a_task_is_reported_by_its_cause(tmp_path, monkeypatch):
    def broken(folder):
        raise task_error(ValueError("The reward term length gave 3 values for 4 responses."))

    with pytest.raises(errors.StageError) as failed:
        run_with(broken, tmp_path, monkeypatch)

    expected = "ValueError: The reward term length gave 3 values for 4 responses."
    assert str(failed.value) == expected


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(28, "No space left on device", "metrics.jsonl"), "No space left on device"),
        (
            ray.exceptions.GetTimeoutError("Get timed out.\nThe reason"),
            "GetTimeoutError: The reason",
        ),
    ],
)
def test_a_full_disk_and_a_ray_timeout_are_reported_in_one_line(
    tmp_path, monkeypatch, error, message
):
    def fails(folder):
        raise error

    with pytest.raises(errors.StageError, match=message) as failed:
        run_with(fails, tmp_path, monkeypatch)

    assert "\n" not in str(failed.value)


def test_resuming_from_unreadable_storage_is_refused_in_one_line(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/first").write_text("in the way")

    with pytest.raises(ConfigError, match=r"^train.storage: .*first cannot be read"):
        resume.resume_from_storage(
            RunFolder(tmp_path / "runs", "first"), str(tmp_path / "kept"), check=id
        )


def test_runs_that_share_a_storage_have_separate_checkpoints(tmp_path):
    config = load_config("lab", ["train.storage=s3://bucket/runs/"])

    places = [resume.run_storage(config, RunFolder(tmp_path, name)).address for name in "ab"]

    assert places == ["s3://bucket/runs/a", "s3://bucket/runs/b"]


def test_runs_that_share_a_storage_with_a_query_are_found_again(tmp_path):
    address = f"file://{tmp_path}/kept?what=ever"
    config = load_config("lab", [f"train.storage={address}"])
    for name in "ab":
        pipeline.prepare_run(config, RunFolder(tmp_path / "here", name), resume=False)

    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a", "b"]
    elsewhere = RunFolder(tmp_path / "elsewhere", "a")
    resume.resume_from_storage(elsewhere, address, check=id)
    assert elsewhere.read_config() == config


@pytest.mark.parametrize("other", ["seed=1", "data.limit=300", "policy.lora_rank=4"])
def test_a_different_run_with_the_same_id_is_refused(tmp_path, other):
    words = [f"train.storage={tmp_path / 'kept'}"]
    config = load_config("lab", words)
    _, held = pipeline.prepare_run(config, RunFolder(tmp_path / "one", "first"), resume=False)
    held.release()

    # A retry on another machine is the same run, also with a setting that may change on resume.
    retried = load_config("lab", [*words, "train.steps=50"])
    _, held = pipeline.prepare_run(retried, RunFolder(tmp_path / "two", "first"), resume=False)
    held.release()
    assert [(c.name, c.after) for c in held.record.settings] == [("train.steps", 50)]
    changed = load_config("lab", [*words, other])
    with pytest.raises(ConfigError, match=rf"^'{other}' would make another run of 'lab'"):
        pipeline.prepare_run(changed, RunFolder(tmp_path / "three", "first"), resume=False)

    assert not (tmp_path / "three/first").exists()


class FullStore(CheckpointStore):
    """A store on a disk that stays full."""

    def save(self, checkpoint):
        raise StorageError("The disk is full.")


def test_a_step_warns_of_checkpoints_that_are_not_kept_and_in_the_end_stops_the_run(tmp_path):
    printed, failed = io.StringIO(), threading.Event()
    pool = SimpleNamespace(metrics=lambda: None)
    writer = CheckpointWriter(
        FullStore(Storage(str(tmp_path / "run"))), None, on_event=lambda text: failed.set()
    )

    def after_step(step, *words):
        config = load_config("lab", words)
        session = Session(config, Console(printed), need=None, pool=pool)
        done = StepDone("group", metrics_of(step))
        with closing(MetricsLog(tmp_path)) as metrics, session.console.bar(40, "steps") as bar:
            session._show(done, SimpleNamespace(check=lambda: None), metrics, bar, writer)

    after_step(1, "train.unsaved_warning_s=1e-9", "train.max_unsaved_s=1e-9")
    writer.put(Checkpoint(1, {"state.json": b"{}"}))
    assert failed.wait(30)
    after_step(2)
    after_step(3, "train.unsaved_warning_s=1e-9")
    with pytest.raises(
        StorageError, match=r"max_unsaved_s=1e-09, .* kept. The disk is full. Resume"
    ):
        after_step(4, "train.max_unsaved_s=1e-9")
    writer.close()

    steps, warnings = [], []
    for line in printed.getvalue().splitlines():
        (steps if line.startswith("step ") else warnings).append(line)
    assert len(steps) == 4
    assert [line.split(", after ")[0].strip() for line in warnings] == [
        "The checkpoints from step 1 on are not kept yet"
    ]
    assert warnings[0].endswith(" s. The disk is full.")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_of_two_starts_with_the_same_id_one_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    words = [f"train.storage={tmp_path / 'kept'}"]
    both_have_checked = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(pipeline, "check_store", lambda *_, **__: both_have_checked.wait())
    monkeypatch.setattr(pipeline.preflight, "check", lambda config: None)
    folder, refused = RunFolder(tmp_path / "runs", "first"), []
    held = []

    def start(steps):
        config = load_config("lab", [*words, f"train.steps={steps}"])
        try:
            held.append(pipeline.prepare_run(config, folder, resume=False)[1])
        except ConfigError as error:
            refused.append((steps, str(error)))

    threads = [threading.Thread(target=start, args=(steps,)) for steps in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    held[0].release()
    ((loser, sentence),) = refused
    assert sentence.startswith(
        (f"Run 'first' exists in {folder.output}. Choose", "Another process has just started a run")
    )
    assert folder.read_config().train.steps == 11 - loser
    kept = json.loads((tmp_path / "kept/first/config.json").read_text())
    assert kept["train"]["steps"] == 11 - loser


# ---- facts of the training ---------------------------------------------------------------------


def test_training_that_an_earlier_process_did_reports_no_measurements():
    unmeasured = TrainingFacts(TrainingOutcome(step=40), best_step=7, checkpoint_seconds=None)
    measured = TrainingFacts(
        TrainingOutcome(step=40, loop_seconds=1.5, peak_mb=700, lost=1), 7, 0.25
    )

    assert unmeasured.to_json() == {"best_step": 7, "checkpoint_seconds": None}
    assert measured.to_json() == {
        "loop_seconds": 1.5,
        "peak_mb": 700,
        "lost": 1,
        "moved": 0,
        "resized": 0,
        "best_step": 7,
        "checkpoint_seconds": 0.25,
    }
