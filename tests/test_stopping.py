"""SIGTERM to all processes of a local run, as Slurm and systemd send it, stops it with a checkpoint."""

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
from ray_detox.runs.storage import Storage
from tests.environment import python_path

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


def require_private(driver):
    """Check that others reach nothing of a run: neither its ports over the network, nor its files."""
    processes = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
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


@pytest.mark.ray
def test_sigterm_to_all_processes_of_a_run_stops_it_with_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "ray_detox", "run", "lab", *SHORT, "--run-id", "first"]
    run = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Without a session of its own, a mistake of this test could end the tests.
        start_new_session=True,
    )
    assert run.stdout is not None
    printed = ""
    while not re.search("^step +1/500 ", printed, re.MULTILINE):
        line = run.stdout.readline()
        assert line, printed
        printed += line

    outer = require_private(run.pid)
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    printed += run.communicate(timeout=200)[0]

    assert run.returncode == 128 + signal.SIGTERM, printed
    assert "Traceback" not in printed
    stopped = re.search(
        r"^Stopped after step (\d+), with a checkpoint\. "
        f"Go on with: ray-detox run --resume first --output {tmp_path}$",
        printed,
        re.MULTILINE,
    )
    assert stopped, printed
    kept = CheckpointStore(Storage(str(tmp_path / "first"))).newest()
    assert kept is not None
    assert kept.step == int(stopped[1])
    assert not (tmp_path / "first" / "ray-train").exists()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert not outer.exists()
