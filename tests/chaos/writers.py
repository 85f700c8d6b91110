"""Several drivers of one run at once: paused, killed, with storage that fails. Without Ray and models.

    python -m tests.chaos.writers --schedules 100 --first 0

A driver here is a forked process with the real leases, checkpoints, metrics, report and store. Only
the training is replaced: the weights after a step are a hash of those before, so that a checkpoint that
mixes two drivers shows. A schedule pauses (SIGSTOP), continues and kills drivers and starts others; at
the end one more driver finishes the run alone.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec

from ray_detox import pipeline
from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample
from ray_detox.evaluation.summarise import RunFacts
from ray_detox.recipes.loading import load_config
from ray_detox.records import UpdateStats
from ray_detox.runs import lease
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore, read_files
from ray_detox.runs.console import Console
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.resume import resume_from_storage, run_storage
from ray_detox.stages import finish, session
from ray_detox.stages.events import GroupStarted, StepDone
from ray_detox.stages.train import TrainingOutcome
from ray_detox.store.sqlite import SQLiteStore
from tests.chaos.driver import ChaosFileSystem

STEPS = 12
STALE_S = 1.0
RUN = "run"
REFUSALS = (
    "is being written by",
    "was taken over by",
    "has no run.json",
    "holds nothing of run",
    "cannot be written to",
    "cannot be read",
    "cannot be listed",
    "could not be kept",
    "no longer has the run's",
    "has been locked for",
    "was stored by a later process",
    "exists in",
    "has just started a run",
    "is already stored",
    "No run 'run' i",
)
"""Parts of the documented sentences with which a driver may end."""


def weights(step: int) -> bytes:
    """Return the weights after a number of steps."""
    state = b"start"
    for _ in range(step):
        state = hashlib.sha256(state).digest()
    return state


def _stats(step: int) -> UpdateStats:
    values: dict[str, Any] = {f.name: 0 for f in fields(UpdateStats)}
    return UpdateStats(**values | {"terms": {}, "step": step, "score": float(step)})


def _train(config, shards, pool, need, writer, scratch, on_event, stop_requested):
    """Stand in for `run_training`: short steps, each with a checkpoint."""
    state = writer.newest.files["adapter/adapter_model.safetensors"] if writer.newest else b"start"
    step = writer.newest.step if writer.newest else 0
    rows = writer.newest.files["metrics.jsonl"].decode() if writer.newest else ""
    on_event(GroupStarted(number=0, workers=1, step=step))
    while step < config.train.steps:
        time.sleep(0.03)
        state, step = hashlib.sha256(state).digest(), step + 1
        stats = _stats(step)
        rows += json.dumps(asdict(stats)) + "\n"
        files = {"adapter/adapter_model.safetensors": state, "metrics.jsonl": rows.encode()}
        files["adapter/adapter_config.json"] = b"{}"
        on_event(StepDone("group", stats))
        writer.put(Checkpoint(step, files))
    writer.flush(20)
    return TrainingOutcome(step=step)


class _Pool:
    def metrics(self):
        return None


def drive(words, output, log, resume):
    """Be a driver; its exit code and last line go to the file `log`."""
    console = Console(io.StringIO())
    try:
        code, said = 0, _drive(words, output, resume, console)
    except Exception as error:
        code, said = 1, str(error)
        if not any(part in said for part in REFUSALS):
            said = traceback.format_exc()
    log.write_text(json.dumps({"code": code, "said": said}))
    os._exit(code)


def _drive(words, output, resume, console):
    folder = RunFolder(output, RUN)
    config = load_config("lab", words)
    if resume and config.train.storage and not folder.has_settings():
        resume_from_storage(folder, config.train.storage, check=id)
    _, held = pipeline.prepare_run(config, folder, resume=resume, say=console.line)
    try:
        job = session.Session(
            config, console, need=SimpleNamespace(gpus_per_worker=0), pool=_Pool()
        )
        job.train(held, [])
        held.identify({"prompts": "same"}, accept=False)
        adapter = read_files(folder.adapter)
        time.sleep(0.05)
        facts = RunFacts(
            run_id=RUN,
            steps=STEPS,
            rows={},
            seconds={},
            training={},
            fingerprints={
                "adapter": hashlib.sha256(adapter["adapter_model.safetensors"]).hexdigest()
            },
            record=held.facts(),
        )
        _, _, problem = finish.store_result._function(
            config,
            RunFolder(output.resolve(), RUN),
            _examples(),
            facts,
            attempt=str(os.getpid()),
            overwrite=resume,
            guard=held.guard,
        )
        return problem or f"finished as taking {held.record.token}"
    finally:
        held.release()


def _examples():
    side = EvaluatedResponse("a", 0.0, 0.5, 1, False, True)
    return [
        PairedExample(
            index=i,
            prompt_id=str(i),
            query="q",
            reference=None,
            facts=None,
            kl=0.0,
            before=side,
            after=replace(side, toxicity=0.1),
        )
        for i in range(4)
    ]


@dataclass
class Ended:
    """The end of a schedule."""

    drivers: list[str]
    """What each driver said."""
    wrong: list[str]


def run_schedule(seed, storage, folder):
    """Run one schedule of drivers, and return what went wrong.

    Args:
        seed: of the schedule.
        storage: `train.storage` of the run, or None.
        folder: empty, for the run.
    """
    draw = random.Random(seed)
    fault = folder / "fault"
    os.environ["CHAOS_FAULT"] = str(fault)
    output = folder / "runs"
    words = [f"train.steps={STEPS}", "train.checkpoints_kept=2", "train.probe_prompts=0"]
    words += ["reward.check_sentences=false"]
    words += [f"train.storage={storage}"] if storage else []
    started = []

    def start(resume, elsewhere=False):
        log = folder / f"driver-{len(started)}.json"
        # Another machine has a folder of its own.
        where = folder / "other" if storage and elsewhere and draw.random() < 0.3 else output
        process = multiprocessing.get_context("fork").Process(
            target=drive, args=(words, where, log, resume)
        )
        process.start()
        started.append((process, log, where))
        return process

    begun = Path(storage.removeprefix("chaos://") if storage else output) / RUN / "run.json"
    start(resume=False)
    while not begun.exists() and draw.random() < 0.99:  # sometimes earlier
        time.sleep(0.05)
    time.sleep(draw.uniform(0.0, 0.5))
    paused = []
    for _ in range(draw.randint(2, 5)):
        live = [p for p, *_ in started if p.is_alive() and p not in paused]
        kind = draw.choice(["pause", "pause", "kill", "start", "start", "wake", "fault"])
        if kind == "pause" and live:
            victim = draw.choice(live)
            os.kill(victim.pid, signal.SIGSTOP)
            paused.append(victim)
        elif kind == "kill" and live:
            os.kill(draw.choice(live).pid, signal.SIGKILL)
        elif kind == "wake" and paused:
            os.kill(paused.pop(0).pid, signal.SIGCONT)
        elif kind == "fault" and storage:
            fault.write_text(draw.choice(["full", "slow"]))
        else:
            start(resume=True, elsewhere=True)
        time.sleep(draw.choice([0.05, 0.3, 1.5 * STALE_S]))
        fault.unlink(missing_ok=True)
    for victim in paused:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGCONT)
    for process, *_ in started:
        process.join(60)
    exists = (output / RUN / "config.json").exists()
    last = start(resume=exists)
    last.join(60)
    said = [
        json.loads(log.read_text())["said"] if log.exists() else "killed" for _, log, _ in started
    ]
    return Ended(said, _wrong(said, words, started[-1][2]))


def _wrong(said, words, output):
    wrong = [line for line in said if "Traceback" in line]
    if not said[-1].startswith("finished as taking"):
        return [*wrong, f"the last driver did not finish: {said[-1]}"]
    folder = RunFolder(output, RUN)
    if (folder.adapter / "adapter_model.safetensors").read_bytes() != weights(STEPS):
        wrong.append("the adapter mixes drivers")
    steps = [row["step"] for row in folder.read_history()]
    if steps != list(range(1, STEPS + 1)):
        wrong.append(f"metrics have steps {steps}")
    token = int(said[-1].rpartition(" ")[2])
    report, _ = folder.read_result()
    stored = SQLiteStore(folder.store_path).get_run(RUN)
    if report["writer"]["token"] != token or stored != report:
        wrong.append(f"the report is of taking {report['writer']}, not of {token}")
    config = load_config("lab", words)
    storage = run_storage(config, folder)
    record = lease.read_record(storage)
    store = CheckpointStore(storage, takings=record.takings)
    for step in store.complete():
        if store.load(step).files["adapter/adapter_model.safetensors"] != weights(step):
            wrong.append(f"checkpoint {step} mixes drivers")
    if store.complete()[-1:] != [STEPS]:
        wrong.append(f"checkpoints are those of {store.complete()}")
    return wrong


def prepare():
    """Shorten the times, and replace the training; before the first schedule."""
    lease.BEAT_S, lease.STALE_S, lease.WATCH_S = 0.2, STALE_S, 0.05
    lease.take.__defaults__ = (STALE_S,)
    session.run_training = _train
    session.requesting_workers = lambda *_: contextlib.nullcontext()
    fsspec.register_implementation("chaos", ChaosFileSystem, clobber=True)
    # A forked driver then has what it imports.
    with tempfile.TemporaryDirectory() as name:
        config = load_config("lab", ["reward.check_sentences=false"])
        _, held = pipeline.prepare_run(config, RunFolder(Path(name), RUN), resume=False)
        held.release()


def main():
    """Run schedules; return 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--storage", default="", help="an address; by default folders and chaos://")
    args = parser.parse_args()
    prepare()
    failures = 0
    for seed in range(args.first, args.first + args.schedules):
        with tempfile.TemporaryDirectory(prefix="writers-") as name:
            folder = Path(name)
            kinds = [None, f"chaos://{folder}/kept", f"{folder}/kept"]
            place, _, query = args.storage.partition("?")
            given = f"{place}/{seed}{'?' + query if query else ''}" if place else None
            ended = run_schedule(seed, given or kinds[seed % 3], folder)
        failures += bool(ended.wrong)
        kind = args.storage.partition(":")[0] or ["folder", "chaos", "mounted"][seed % 3]
        heard = "; ".join(line.strip().splitlines()[-1][:110] for line in ended.drivers)
        print(f"{seed} {kind} | {heard} | {'; '.join(ended.wrong) or 'right'}", flush=True)
    print(f"{failures} of {args.schedules} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
