"""A Ray cluster on a `Network`, with emulated S3 and DynamoDB, to which tests submit jobs.

gateway         moto, `ray job submit`, query.py
machine 0       ray start --head: 0 CPUs, dashboard; drivers, control actors, the final task
machine 1..N    ray start; training workers, reward actors, evaluation tasks
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.environment import python_path
from tests.many_nodes.network import GATEWAY, GATEWAY_ADDRESS, Network

ROOT = Path(__file__).parents[2]
RAY = ["-m", "ray.scripts.scripts"]
AWS_PORT = 5000
START_TIMEOUT_S = 300.0
"""Longest wait for processes to start; long, since the machine may be busy."""
OUTPUT_POLL_S = 0.02
"""Time between two reads of a driver's output."""


@dataclass
class JobOutcome:
    """The end of a job."""

    code: int = -1
    """Exit code of `ray job submit`."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """Lines that the driver printed, each with the seconds since the job was submitted."""
    job: dict[str, Any] = field(default_factory=dict)
    """Status of the job as Ray reports it."""

    @property
    def text(self) -> str:
        return "\n".join(f"{at:6.1f} {line}" for at, line in self.lines)


class Cluster:
    """Ray nodes that reach each other only through a `Network`.

    Args:
        network: its first machine is the head, the others are worker nodes.
        folder: for Ray's files, logs and runs; its path must be short, because Ray's socket paths
            are limited to 107 characters.
        cpus: of each worker node.
        settings: environment variables that configure Ray.
    """

    def __init__(self, network: Network, folder: Path, cpus: int, settings: dict[str, str]) -> None:
        self.network = network
        self.folder = folder
        self.cpus = cpus
        self.head = network.addresses[0]
        self._starts = [0] * len(network.addresses)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "RAY_")) and not name.lower().endswith("_proxy")
        }
        self.environment = inherited | {
            # As in cluster/aws.yaml: every process sends the token and requires it.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://{self.head}:8265",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": python_path(ROOT),
            "AWS_ENDPOINT_URL": f"http://{GATEWAY_ADDRESS}:{AWS_PORT}",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_CONFIG_FILE": "/nonexistent",
            **settings,
        }

    # ---- nodes ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start moto and all nodes, and create an empty bucket and an empty table."""
        moto = ["-m", "moto.server", "-H", GATEWAY_ADDRESS, "-p", str(AWS_PORT)]
        self._start(GATEWAY, "moto", moto)
        self.join([0])
        wait_for("the bucket and the table", lambda: self._query("prepare"))
        self.join(range(1, len(self.network.addresses)))

    def join(self, machines: Sequence[int]) -> None:
        """Start Ray on machines, and wait until all of these nodes are alive."""
        for machine in machines:
            self.start_node(machine)

        def all_alive() -> bool:
            nodes = self.nodes()
            missing = [i for i in machines if self.network.addresses[i] not in nodes]
            for machine in missing:
                # `ray start` gives up after 30 seconds, and a busy machine takes longer.
                if not self.runs_ray(machine):
                    self.start_node(machine)
            return not missing

        wait_for("the nodes", all_alive)

    def start_node(self, machine: int) -> None:
        """Start Ray on a machine, with a new folder for each start."""
        self._starts[machine] += 1
        name = f"{machine}-{self._starts[machine]}"
        command = [*RAY, "start", "--block", "--include-log-monitor=false"]
        command += ["--node-ip-address", self.network.addresses[machine]]
        command += ["--temp-dir", str(self.folder / name)]
        command += [f"--object-store-memory={100 * 1024 * 1024}", "--num-gpus=0"]
        if machine == 0:
            command += ["--head", "--port=6379", "--num-cpus=0"]
            command += [f"--dashboard-host={self.head}", "--dashboard-port=8265"]
        else:
            command += [f"--address={self.head}:6379", f"--num-cpus={self.cpus}"]
        self._processes[machine] = self._start(machine, name, command)

    def runs_ray(self, machine: int) -> bool:
        """Return whether the last `ray start` of a machine still runs, even if the head lost it."""
        return self._processes[machine].poll() is None

    def nodes(self) -> dict[str, str]:
        """Return the ids of the nodes that are alive according to Ray, by address."""
        found = self._query("nodes") or []
        return {node["node_ip"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    # ---- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        run_id: str,
        arguments: list[str],
        on_line: Callable[[str], None] = lambda line: None,
        limit_s: float = 900,
    ) -> JobOutcome:
        """Submit a job, follow its output, and return its outcome.

        Args:
            run_id: id of the run and of the job.
            arguments: of `ray-detox run`.
            on_line: called with each line of the driver's log as soon as it is written. The
                output of `ray job submit` is up to a second late, which is several steps.
            limit_s: longest time that the job may take.

        Raises:
            TimeoutError: the job did not end within `limit_s`.
        """
        command = [*RAY, "job", "submit", "--submission-id", run_id, "--", sys.executable]
        command += ["-m", "ray_detox", "run", *arguments, "--run-id", run_id]
        command += ["--output", str(self.folder / "runs")]
        log = self.folder / f"0-{self._starts[0]}/session_latest/logs/job-driver-{run_id}.log"
        outcome, began, read = JobOutcome(), time.monotonic(), 0
        process = self._start(GATEWAY, f"submit-{run_id}", command)
        ended = False
        while not ended:
            time.sleep(OUTPUT_POLL_S)
            ended = process.poll() is not None
            now = time.monotonic() - began
            complete, newline, _ = _read_from(log, read).rpartition(b"\n")
            read += len(complete + newline)
            for line in complete.decode().splitlines():
                outcome.lines.append((now, line))
                on_line(line)
            if now > limit_s:
                process.kill()
                raise TimeoutError(f"{run_id} did not end within {limit_s:g} s:\n{outcome.text}")
        outcome.code = process.returncode
        outcome.job = self._query("job", run_id) or {}
        return outcome

    def stored(self, storage: str, run_id: str) -> dict[str, Any]:
        """Return what a run stored in the bucket and the table; see `query.stored`."""
        found = self._query("stored", storage, run_id)
        assert found, (self.folder / "query.log").read_text()[-2000:]
        return dict(found)

    # ---- processes -----------------------------------------------------------------------------

    def _query(self, *arguments: str) -> Any:
        """Return the output of query.py; None if it failed."""
        with (self.folder / "query.log").open("a") as log:
            process = self.network.start(
                GATEWAY,
                [sys.executable, "-m", "tests.many_nodes.query", *arguments],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            printed, _ = process.communicate(timeout=START_TIMEOUT_S)
        return json.loads(printed) if process.returncode == 0 else None

    def _start(self, where: int | str, name: str, arguments: list[str]) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.log").open("w") as log:
            return self.network.start(
                where,
                [sys.executable, *arguments],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def wait_for(what: str, condition: Callable[[], Any]) -> None:
    """Wait until a condition holds; fail after `START_TIMEOUT_S`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < START_TIMEOUT_S, (
            f"{what}: not within {START_TIMEOUT_S:g} s"
        )
        time.sleep(0.5)


def _read_from(file: Path, offset: int) -> bytes:
    """Return the bytes of a file from an offset on; none if there is no file yet."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read()
