"""Signals that end a local run keep its last step, and leave no process behind.

SIGTERM goes to all processes, as Slurm and systemd send it; SIGHUP as well, as from a terminal that is
closed; SIGKILL to the driver alone, as the kernel sends it that is out of memory.
"""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ray_detox.runs.checkpoint_store import CheckpointStore
from ray_detox.runs.lease import read_record
from ray_detox.runs.storage import Storage
from tests.environment import python_path
from tests.startup.template import raylet_of

SHORT = [
    "train.steps=500",  # more than there is time for
    "train.checkpoint_every=500",
    "train.workers=1",
    "train.probe_prompts=0",
    "ppo.prompts_per_step=16",
    "sampling.max_new_tokens=8",
    "data.limit=200",
    "evaluate.prompts=8",
]
ENVIRONMENT = {
    "PYTHONPATH": python_path(Path(__file__).parents[1]),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def require_private(run):
    """Check that others reach nothing of a run: neither its ports over the network, nor its files."""
    processes = processes_of(run)
    listening = [
        (process.name(), address)
        for process in processes
        for address in process.net_connections("inet")
        if address.status == psutil.CONN_LISTEN
    ]
    assert len({name for name, _ in listening}) >= 4  # gcs_server, raylet, agents, workers
    loopback = ("127.0.0.1", "::ffff:127.0.0.1", "::1")
    assert [each for each in listening if each[1].laddr.ip not in loopback] == []

    sockets = [
        address.laddr
        for process in processes
        for address in process.net_connections("unix")
        if "/sockets/" in str(address.laddr)
    ]
    (session,) = {Path(name).parents[1] for name in sockets}
    outer = session.parents[1]
    assert outer.stat().st_mode & 0o777 == 0o700
    for folder in outer.parents:
        assert not folder.stat().st_mode & 0o022 or folder.stat().st_mode & stat.S_ISVTX, folder
    if os.geteuid() == 0:
        seen = subprocess.run(
            ["/bin/ls", str(session)], user=65534, group=65534, extra_groups=[], capture_output=True
        )
        assert b"Permission denied" in seen.stderr
    return outer


def start(output, *words):
    """Start a run, or go on with one; return its process once a step more is done, and what it printed."""
    run = subprocess.Popen(
        [sys.executable, "-m", "ray_detox", "run", *words, "--output", str(output)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # otherwise a mistake of this test could end the tests
    )
    assert run.stdout is not None
    printed = ""
    while not re.search(r"^step +\d+/500 ", printed, re.MULTILINE):
        line = run.stdout.readline()
        assert line, printed
        printed += line
    return run, printed


def processes_of(run):
    """Return all processes of a run, also workers that the tests' template forked for its raylet."""
    own = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    ids = {process.pid for process in own}
    return own + [
        process
        for process in psutil.process_iter(["ppid"])
        if process.pid not in ids and raylet_of(process.pid, process.info["ppid"]) in ids
    ]


def stop(run, printed, number, output):
    """Send a signal to all processes of a run; return the step with which it ended."""
    processes = processes_of(run)
    for process in processes:
        process.send_signal(number)
    printed += run.communicate(timeout=200)[0]

    assert run.returncode == 128 + number, printed
    assert "Traceback" not in printed
    stopped = re.search(
        r"^Stopped after step (\d+), with a checkpoint\. "
        f"Go on with: ray-detox run --resume first --output {output}$",
        printed,
        re.MULTILINE,
    )
    assert stopped, printed
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    return int(stopped[1])


def newest_step(output):
    kept = CheckpointStore(Storage(str(output / "first"))).newest()
    assert kept is not None
    return kept.step


def training_seconds(output):
    record = read_record(Storage(str(output / "first")))
    assert record is not None
    return record.seconds["train"]


@pytest.mark.ray
def test_a_run_that_is_ended_by_a_signal_keeps_its_last_step_and_goes_on(tmp_path):
    run, printed = start(tmp_path, "lab", *SHORT, "--run-id", "first")
    outer = require_private(run)
    terminated = stop(run, printed, signal.SIGTERM, tmp_path)
    assert newest_step(tmp_path) == terminated
    assert not (tmp_path / "first" / "ray-train").exists()
    assert not outer.exists()

    run, printed = start(tmp_path, "--resume", "first", "train.checkpoint_every=1")
    assert f"resuming from the checkpoint of step {terminated}\n" in printed
    assert f"step {terminated + 1:>3}/500" in printed
    processes = processes_of(run)
    run.kill()
    run.communicate(timeout=60)
    killed = newest_step(tmp_path)
    assert killed >= terminated
    seconds = training_seconds(tmp_path)

    run, printed = start(tmp_path, "--resume", "first")
    assert f"resuming from the checkpoint of step {killed}\n" in printed
    hung_up = stop(run, printed, signal.SIGHUP, tmp_path)
    assert newest_step(tmp_path) == hung_up > killed
    assert training_seconds(tmp_path) > seconds > 0
    # Ray's agents report the end of their node for a minute to a GCS that has ended as well.
    _, alive = psutil.wait_procs(processes, timeout=180)
    assert not alive
