"""Complete short runs on Ray: their files and results, stopping and resuming, and refusals."""

import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from peft import PeftModel
from pyarrow import fs, parquet
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import ray_detox
from ray_detox import lab
from ray_detox.cli import main as cli
from ray_detox.lab import corpus
from ray_detox.recipes.loading import load_config
from ray_detox.records import UpdateStats
from ray_detox.resources import needs
from ray_detox.runs import console as progress
from ray_detox.runs import resume
from ray_detox.runs.checkpoint_store import CheckpointStore
from ray_detox.runs.console import Console
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.metrics_log import read_metrics
from ray_detox.runs.storage import Storage
from ray_detox.stages import train
from ray_detox.stages.events import CheckpointTaken, StepDone
from ray_detox.stages.progress import start_progress
from ray_detox.stages.worker import TrainJob
from ray_detox.store.dynamodb import DynamoDBStore

pytestmark = pytest.mark.ray

STEPS, PROMPTS, MEASURED, SHARDS, PROBED = 4, 32, 24, 3, 8
SHORT = [
    f"train.steps={STEPS}",
    "train.checkpoint_every=2",
    f"train.probe_prompts={PROBED}",
    f"ppo.prompts_per_step={PROMPTS}",
    "sampling.max_new_tokens=8..16",
    f"evaluate.prompts={MEASURED}",
    "data.limit=400",
    f"evaluate.shards={SHARDS}",
    # One worker, and one evaluation task at a time: each takes a process. The run with S3 has two.
    "train.workers=1",
    "cluster.cpus_per_worker=1.5",
    "serving.cpus_per_actor=1.5",
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(output):
    """Run the shortened recipe to its end from Python: the folder, the report and the console output."""
    folder, printed = RunFolder(output, "whole"), io.StringIO()
    config = load_config("lab", SHORT)
    report = ray_detox.train(config, run_id="whole", output=output, stream=printed)
    return folder, report, printed.getvalue()


def metrics_without_times(folder):
    return [
        {n: value for n, value in row.items() if not n.startswith("seconds") and n != "pool"}
        for row in read_metrics(folder.path / "metrics.jsonl")
    ]


# ---- a run -----------------------------------------------------------------------------------


def test_the_report_has_every_metric(finished):
    _, report, _ = finished

    assert report["run_id"] == "whole"
    assert report["recipe"] == "lab"
    assert report["status"] == "complete"
    assert report["n"] == MEASURED
    toxicity = report["toxicity"]
    for side in ("before", "after"):
        assert set(toxicity[side]) >= {"mean", "std", "share"}
        assert 0 < report["rouge_l"][side] <= 1
    assert toxicity["delta"]["low"] <= toxicity["delta"]["mean"] <= toxicity["delta"]["high"]
    before, after = toxicity["before"]["mean"], toxicity["after"]["mean"]
    assert toxicity["improvement"] == pytest.approx((before - after) / before)
    assert math.isfinite(report["kl"])
    phases = {"ingest", "reward", "train", "evaluate"}
    assert phases <= set(report["seconds"])
    assert report["seconds"]["total"] == pytest.approx(
        sum(s for phase, s in report["seconds"].items() if phase != "total")
    )
    assert report["steps"] == STEPS
    assert report["prompts_seen"] == STEPS * PROMPTS
    assert any("template-trained" in note for note in report["notes"])
    assert report["config"] == load_config("lab", SHORT).to_dict()


def test_the_row_counts_add_up(finished):
    rows = finished[1]["rows"]

    assert rows["read"] == 400
    assert rows["train"] + rows["held_out"] + sum(rows["left_out"].values()) == 400


def test_the_reward_actor_scored_every_text(finished):
    (actor,) = finished[1]["training"]["actors"]

    # The probe is measured at the start and at the end.
    assert actor["texts"] == STEPS * PROMPTS + 2 * PROBED + 2 * MEASURED


def test_every_step_has_a_line_and_a_row_of_finite_metrics(finished):
    folder, _, printed = finished
    rows = read_metrics(folder.path / "metrics.jsonl")

    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert re.findall(r"^step (\d)/4 \| score", printed, re.MULTILINE) == list("1234")
    for row in rows:
        assert set(row) == {*UpdateStats.__dataclass_fields__, "pool"}
        plain = {name: value for name, value in row.items() if name != "terms"}
        if row["step"] < STEPS:
            assert (plain.pop("probe_score"), plain.pop("probe_kl")) == (None, None)
        assert all(math.isfinite(value) for value in (plain | plain.pop("pool")).values())
        assert row["ratio"] == pytest.approx(1, abs=1e-4)
        assert row["minibatches"] == 4
        assert row["grad_norm"] > 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3)


def test_the_files_of_a_run_agree_with_its_report(finished):
    folder, report, _ = finished

    assert json.loads((folder.path / "report.json").read_text()) == report
    assert report["verdict"]["name"] in (folder.path / "report.txt").read_text()
    samples = [json.loads(line) for line in (folder.path / "samples.jsonl").open()]
    assert [sample["index"] for sample in samples] == list(range(MEASURED))
    assert report["toxicity"]["after"]["mean"] == pytest.approx(
        np.mean([sample["toxicity_after"] for sample in samples])
    )
    assert list((folder.path / "tensorboard").iterdir())
    store = CheckpointStore(resume.run_storage(load_config("lab", SHORT), folder))
    assert store.best() in (0, 4), "the probed ones"
    assert store.steps() == sorted({2, 4, store.best()})
    assert report["training"]["best_step"] == store.best()
    assert store.newest().step == STEPS
    assert (
        store.newest().files["adapter/adapter_model.safetensors"]
        == (folder.adapter / "adapter_model.safetensors").read_bytes()
    )


def test_results_prints_the_stored_report(finished, output, capsys):
    assert cli.main(["results", "whole", "--json", "--output", str(output)]) == 0

    assert json.loads(capsys.readouterr().out) == finished[1]


def test_plain_peft_loads_the_adapter_and_it_was_trained(finished):
    base = AutoModelForSeq2SeqLM.from_pretrained(lab.T5)

    model = PeftModel.from_pretrained(base, str(finished[0].adapter))

    trained = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert trained
    assert all(parameter.abs().sum() > 0 for parameter in trained.values())


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_exported_model_generates_what_the_base_with_the_adapter_generates(
    finished, output, tmp_path
):
    target = tmp_path / "model"

    assert cli.main(["export", "whole", str(target), "--output", str(output)]) == 0

    plain = AutoModelForSeq2SeqLM.from_pretrained(target)
    base = AutoModelForSeq2SeqLM.from_pretrained(lab.T5)
    with_adapter = PeftModel.from_pretrained(base, str(finished[0].adapter))
    inputs = AutoTokenizer.from_pretrained(target)("Summarize: they met.", return_tensors="pt")
    start = torch.zeros((1, 1), dtype=torch.long)
    with torch.inference_mode():
        torch.testing.assert_close(
            plain(**inputs, decoder_input_ids=start).logits,
            with_adapter(**inputs, decoder_input_ids=start).logits,
            atol=1e-4,
            rtol=1e-4,
        )


def test_evaluating_a_run_again_reproduces_its_report(finished, output, capsys):
    assert cli.main(["evaluate", "whole", "--json", "--output", str(output)]) == 0

    again = json.loads(capsys.readouterr().out)
    report = finished[1]
    for name in ("toxicity", "rouge_l", "facts", "length", "kl", "n", "verdict"):
        assert again[name] == report[name]


def test_a_run_that_diverges_stops_and_its_best_checkpoint_can_be_measured(output, capsys):
    words = [*SHORT, "ppo.learning_rate=1", "ppo.max_kl=0.05"]
    where = ["--output", str(output)]

    code = cli.main(["run", "lab", *words, "--run-id", "far", *where])

    printed = capsys.readouterr()
    folder = RunFolder(output, "far")
    rows = read_metrics(folder.path / "metrics.jsonl")
    step = rows[-1]["step"]
    assert code == cli.FAILED
    assert f"Training has diverged in step {step}: the KL to the reference is" in printed.err
    assert "ray-detox evaluate far --checkpoint best --output" in printed.err
    assert step < STEPS
    assert max(rows[-1]["kl"], rows[-1]["probe_kl"] or 0) > 0.05
    assert max(CheckpointStore(Storage(str(folder.path))).steps()) < step
    assert not folder.adapter.exists()

    few = ["evaluate.prompts=4", "evaluate.shards=1"]
    code = cli.main(["evaluate", "far", *few, "--checkpoint", "best", "--json", *where])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["steps"] == report["training"]["checkpoint"]["step"] == 0
    assert report["kl"] == pytest.approx(0, abs=1e-3)
    assert not (folder.path / "evaluation").exists()


def mortal(file, calls):
    """Settings of a reward that kills its actor from a call on."""
    term = f"{{function: on_ray.reward_terms.Mortal, arguments: {{file: {file}, calls: {calls}}}}}"
    return [f"reward.terms=[{term}]", "reward.check_sentences=false", "serving.max_actor_deaths=2"]


def test_a_reward_that_kills_its_actors_ends_training_and_keeps_its_checkpoints(
    output, tmp_path, capsys
):
    one_chunk = [f"reward.batch_size={PROMPTS}", f"sampling.batch_size={PROMPTS}"]
    words = [*SHORT, *one_chunk, "train.checkpoint_every=1"]
    words += ["train.probe_prompts=0", *mortal(tmp_path / "calls", 2)]

    code = cli.main(["run", "lab", *words, "--run-id", "deadly", "--output", str(output)])

    printed = capsys.readouterr()
    folder = RunFolder(output, "deadly")
    assert code == cli.FAILED
    assert "Reward actors died 2 times in a row while they scored the same texts" in printed.err
    assert "go on from the last checkpoint with: ray-detox run --resume deadly" in printed.err
    assert [row["step"] for row in read_metrics(folder.path / "metrics.jsonl")] == [1, 2]
    assert CheckpointStore(Storage(str(folder.path))).newest().step == 2


def test_a_reward_that_kills_its_actors_ends_an_evaluation(finished, output, tmp_path, capsys):
    words = ["evaluate.shards=1", *mortal(tmp_path / "calls", 0)]

    code = cli.main(["evaluate", "whole", *words, "--output", str(output)])

    printed = capsys.readouterr()
    assert code == cli.FAILED
    assert printed.err.startswith("ray-detox: Reward actors died 2 times in a row")
    assert printed.err.count("\n") == 1


def test_an_interrupted_evaluation_measures_only_the_missing_shards(finished, output):
    shutil.copytree(finished[0].path, output / "cut")
    cut = RunFolder(output, "cut")
    for name in ("report.json", "samples.jsonl"):
        (cut.path / name).unlink()
    kept = sorted((cut.path / "evaluation").glob("*/shard-*.json"))
    assert len(kept) == SHARDS
    kept[1].unlink()
    kept[2].write_text(kept[2].read_text()[:-20])
    lines = (cut.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:40] + b"\n"
    (cut.path / "metrics.jsonl").write_bytes(b"".join(lines))

    assert cli.main(["run", "--resume", "cut", "--output", str(output)]) == 0

    report, samples = cut.read_result()
    assert samples == finished[0].read_result()[1]
    assert metrics_without_times(cut) == metrics_without_times(finished[0])
    assert (cut.path / "metrics.jsonl.damaged").read_bytes() == b"".join(lines)
    assert (
        sum(actor["texts"] for actor in report["training"]["actors"]) == 2 * 2 * MEASURED // SHARDS
    )


# ---- stopping and resuming -------------------------------------------------------------------


class StopAtOnce(Console):
    """A console that sends Ctrl-C as soon as the first worker has started."""

    def line(self, text=""):
        super().line(text)
        if "worker 0 on node" in text:
            os.kill(os.getpid(), signal.SIGINT)


@dataclass
class StoppedRun:
    """A run that Ctrl-C stopped, with its storage; each test resumes a copy of it."""

    words: list[str]
    """Arguments of `ray-detox run`, without `--output`."""
    output: Path
    storage: Path
    copy: Path
    """Copy of the storage as it was when the run stopped."""
    code: int
    printed: str
    steps: int
    """Steps done when it stopped."""


@pytest.fixture(scope="module")
def stopped(output):
    storage, home = output / "kept", output / "first-head"
    # A checkpoint every step slows training down, so that the signal arrives before the last step.
    words = [*SHORT, "train.checkpoint_every=1", f"train.storage={storage}", "--run-id", "part"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(progress, "Console", StopAtOnce)
        code = cli.main(["run", "lab", *words, "--output", str(home)])
    steps = len(read_metrics(home / "part/metrics.jsonl"))
    copy = shutil.copytree(storage, output / "kept-copy")
    return StoppedRun(words, home, storage, copy, code, printed.getvalue(), steps)


def assert_equal_runs(run, whole):
    assert metrics_without_times(run) == metrics_without_times(whole)
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(finished, stopped):
    whole, report, _ = finished
    part = RunFolder(stopped.output, "part")

    assert stopped.code == 128 + signal.SIGINT
    assert 1 <= stopped.steps < STEPS
    assert f"Stopped after step {stopped.steps}, with a checkpoint." in stopped.printed
    assert not part.adapter.exists()

    command = stopped.printed.partition("Go on with: ray-detox ")[2]
    assert cli.main(shlex.split(command)) == 0

    assert read_metrics(part.path / "metrics.jsonl")[-1]["step"] == STEPS
    assert_equal_runs(part, whole)
    samples = "samples.jsonl"
    assert (part.path / samples).read_text() == (whole.path / samples).read_text()
    resumed = json.loads((part.path / "report.json").read_text())
    assert resumed["toxicity"] == report["toxicity"]


def test_the_same_command_on_another_machine_resumes_the_run_from_its_storage(
    finished, stopped, output, capsys
):
    # As a retry of the job in cluster/kuberay.yaml: a new head, an empty disk, the same arguments.
    shutil.rmtree(stopped.storage)
    shutil.copytree(stopped.copy, stopped.storage)
    second = output / "second-head"

    code = cli.main(["run", "lab", *stopped.words, "--output", str(second)])

    printed = capsys.readouterr()
    assert code == 0, printed
    again = [int(step) for step in re.findall(rf"^step (\d)/{STEPS} ", printed.out, re.MULTILINE)]
    assert again == list(range(stopped.steps + 1, STEPS + 1))
    assert_equal_runs(RunFolder(second, "part"), finished[0])


def test_late_events_of_an_earlier_group_are_ignored(tmp_path):
    # A worker on a disconnected node runs on for a while; its events arrive after the reconnection.
    config, received = load_config("lab"), []
    writer = SimpleNamespace(newest=None, put=lambda checkpoint: received.append(checkpoint))
    progress_actor = start_progress()
    job = TrainJob(config, "group-2", progress_actor, directory=None, shards=[], start=None)
    need = needs(config, 0)
    group = train.WorkerGroup(job, need, None, 1, writer, tmp_path, received.append)
    step = StepDone("group-2", SimpleNamespace(step=9, seconds=1.0))
    late = StepDone("group-1", SimpleNamespace(step=3, seconds=1.0))
    checkpoint = CheckpointTaken("group-1", "of step 3")

    for event in (late, step, checkpoint):
        ray.get(progress_actor.put.remote(event))
    group._take_events()

    assert received == [step]
    ray.kill(progress_actor)


# ---- data, checkpoints and results on AWS ----------------------------------------------------


def test_two_workers_with_other_models_data_and_checkpoints_on_s3_and_results_in_dynamodb(
    aws, output, tiny_t5, tiny_roberta, capsys
):
    region = os.environ["AWS_DEFAULT_REGION"]
    boto3.client("s3").create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": region}
    )
    s3, root = fs.FileSystem.from_uri("s3://bucket/checkpoints")
    table = pa.Table.from_pylist(corpus.rows("ppo", 120))
    parquet.write_table(table, "bucket/data/rows.parquet", filesystem=s3)
    DynamoDBStore("ray-detox").create_table()
    words = [
        *SHORT[2:],
        "data.path=s3://bucket/data",
        "data.limit=100",
        "train.steps=1",
        "train.workers=2",
        "serving.cpus_per_actor=1",
        f"train.storage=s3://{root}",
        f"policy.model={tiny_t5}",
        f"reward.model={tiny_roberta}",
        "reward.check_sentences=false",  # its weights are random
        "results.store=dynamodb",
        "evaluate.prompts=8",
        "evaluate.shards=2",
    ]

    code = cli.main(["run", "lab", *words, "--run-id", "remote", "--output", str(output)])

    printed = capsys.readouterr()
    assert code == 0, printed
    folder = RunFolder(output, "remote")
    report = json.loads((folder.path / "report.json").read_text())
    assert sorted(re.findall(r"worker (\d) on node", printed.out)) == ["0", "1"]
    shares = [int(n) for n in re.findall(r"worker \d on .*, (\d+) prompts", printed.out)]
    assert sum(shares) == report["rows"]["train"]
    store = DynamoDBStore("ray-detox")
    assert store.get_run("remote") == report
    assert len(list(store.get_samples("remote"))) == report["n"] == 8
    store.close()
    assert CheckpointStore(Storage(f"s3://{root}/remote")).steps() == [0, 1]
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    assert not (folder.path / "checkpoints").exists()
    texts = PROMPTS + 2 * PROBED + 2 * 8
    assert sum(actor["texts"] for actor in report["training"]["actors"]) == texts

    # On another machine: all results are in the storage, so the run only publishes them again.
    elsewhere = output / "elsewhere"
    again = ["--resume", "remote", f"train.storage=s3://{root}", "--output", str(elsewhere)]
    assert cli.main(["run", *again]) == 0, capsys.readouterr()

    resumed = RunFolder(elsewhere, "remote")
    for name in ("samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed.path / name).read_bytes() == (folder.path / name).read_bytes()
    assert metrics_without_times(resumed) == metrics_without_times(folder)


def test_resuming_a_run_that_does_not_exist_is_refused(aws, output, capsys):
    code = cli.main(
        ["run", "--resume", "missing", f"train.storage={output}", "--output", str(output)]
    )

    assert code == cli.MISTAKE
    assert f"and none in train.storage={output}." in capsys.readouterr().err
    assert not RunFolder(output, "missing").path.exists()


@pytest.mark.parametrize("setting", ["data.path", "policy.model", "reward.model", "train.storage"])
def test_a_missing_s3_address_is_refused(aws, output, capsys, setting):
    code = cli.main(
        [
            "run",
            "lab",
            f"{setting}=s3://no-such-bucket/x",
            "--run-id",
            "s3",
            "--output",
            str(output),
        ]
    )

    printed = capsys.readouterr()
    assert code == cli.MISTAKE
    assert printed.out == ""
    assert printed.err.startswith(f"ray-detox: {setting} is 's3://no-such-bucket/x'")
    assert printed.err.count("\n") == 1
    assert not RunFolder(output, "s3").path.exists()


# ---- mistakes that are found after Ray has started -------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (["cluster.cpus_per_worker=50"], "needs 101 CPUs (train.workers=2 with cpus_per_worker=50"),
        (["cluster.gpus_per_worker=1"], "needs 2.25 GPUs (train.workers=2 with gpus_per_worker=1"),
        (
            ["serving.gpus_per_actor=2", "cluster.capacity_timeout_s=1"],
            "reward.actors=1 with gpus_per_actor=2",
        ),
    ],
)  # fmt: skip
def test_a_cluster_that_is_too_small_is_refused_and_no_files_are_left(
    output, capsys, settings, message
):
    # With an address, because on a local Ray the check of this machine would fail first.
    words = ["lab", *settings, "cluster.address=10.0.0.1:6379", "--run-id", "large"]

    code = cli.main(["run", *words, "--output", str(output)])

    error = capsys.readouterr().err
    assert code == cli.MISTAKE
    assert message in error
    assert "and the cluster has" in error
    assert error.count("\n") == 1
    assert not RunFolder(output, "large").path.exists()


def test_too_few_prompts_for_the_shards_are_refused_and_no_files_are_left(
    output, capsys, tmp_path, tiny_t5
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus.rows("ppo", 8)))
    words = ["lab", f"data.path={path}", f"policy.model={tiny_t5}", "--run-id", "small"]

    code = cli.main(["run", *words, "--output", str(output)])

    error = capsys.readouterr().err
    assert code == cli.MISTAKE
    assert "6 are left to train on and 2 to hold out" in error
    assert "expected at least 16 (data.shards) and 2" in error
    assert error.count("\n") == 1
    assert not RunFolder(output, "small").path.exists()
