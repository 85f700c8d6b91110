"""A Ray of several nodes on a network of their own, with an S3 and a DynamoDB; jobs on it.

at the switch   moto, `ray job submit`, look.py
machine 0       ray start --head: 0 CPUs, dashboard; drivers, control actors, the final task
machine 1..N    ray start; workers, reward actors, measurers
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

from tests.many_nodes.network import GATEWAY, SWITCH, Network

ROOT = Path(__file__).parents[2]
RAY = ["-m", "ray.scripts.scripts"]
AWS_PORT = 5000
COME_UP_S = 300.0
"""Longest wait for processes to be there; a machine that tests may be busy."""
LOOK_S = 0.02
"""Between two looks at what a driver has printed."""


@dataclass
class Ended:
    """How a job ended."""

    code: int = -1
    """Of `ray job submit`."""
    said: list[tuple[float, str]] = field(default_factory=list)
    """What the driver printed: seconds since the job was submitted, and the line."""
    job: dict[str, Any] = field(default_factory=dict)
    """What Ray says of it."""

    @property
    def text(self) -> str:
        return "\n".join(f"{at:6.1f} {line}" for at, line in self.said)


class Cluster:
    """Nodes that know of each other by network only.

    Args:
        network: its machines are the head, and the other nodes.
        folder: for Ray, its logs and runs; short, for the paths of Ray's sockets may have 107
            characters.
        cpus: of each node but the head.
        settings: of Ray itself, as environment.
    """

    def __init__(self, network: Network, folder: Path, cpus: int, settings: dict[str, str]) -> None:
        self.network = network
        self.folder = folder
        self.cpus = cpus
        self.head = network.addresses[0]
        self._lives = [0] * len(network.addresses)
        self._rays: dict[int, subprocess.Popen[str]] = {}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "RAY_")) and not name.lower().endswith("_proxy")
        }
        self.environment = kept | {
            # As in cluster/aws.yaml: every process shows the token, and asks for it.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://{self.head}:8265",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{AWS_PORT}",
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
        """Start everything; all nodes, an empty bucket and an empty table are there then."""
        moto = ["-m", "moto.server", "-H", GATEWAY, "-p", str(AWS_PORT)]
        self._start(SWITCH, "moto", moto)
        self.join([0])
        wait_for("the bucket and the table", lambda: self._look("prepare"))
        self.join(range(1, len(self.network.addresses)))

    def join(self, machines: Sequence[int]) -> None:
        """Start Ray on machines, and wait until all of these nodes are there."""
        for machine in machines:
            self.start_node(machine)

        def are_there() -> bool:
            nodes = self.nodes()
            missing = [i for i in machines if self.network.addresses[i] not in nodes]
            for machine in missing:
                # `ray start` waits for a node for 30 seconds; a busy machine takes longer.
                if not self.runs_ray(machine):
                    self.start_node(machine)
            return not missing

        wait_for("the nodes", are_there)

    def start_node(self, machine: int) -> None:
        """Start Ray on a machine, with a folder of its own for each life of it."""
        self._lives[machine] += 1
        name = f"{machine}-{self._lives[machine]}"
        words = [*RAY, "start", "--block", "--include-log-monitor=false"]
        words += ["--node-ip-address", self.network.addresses[machine]]
        words += ["--temp-dir", str(self.folder / name)]
        words += [f"--object-store-memory={100 * 1024 * 1024}", "--num-gpus=0"]
        if machine == 0:
            words += ["--head", "--port=6379", "--num-cpus=0"]
            words += [f"--dashboard-host={self.head}", "--dashboard-port=8265"]
        else:
            words += [f"--address={self.head}:6379", f"--num-cpus={self.cpus}"]
        self._rays[machine] = self._start(machine, name, words)

    def runs_ray(self, machine: int) -> bool:
        """Whether the last `ray start` of a machine is still there, whatever others think of it."""
        return self._rays[machine].poll() is None

    def nodes(self) -> dict[str, str]:
        """Ids of the nodes that Ray takes to be alive, by address."""
        found = self._look("nodes") or []
        return {node["node_ip"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    # ---- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        run_id: str,
        words: list[str],
        on_line: Callable[[str], None] = lambda line: None,
        limit_s: float = 900,
    ) -> Ended:
        """Submit a job, follow it to its end, and return how it ended.

        Args:
            run_id: of the run, and of the job.
            words: for `ray-detox run`.
            on_line: hears what the driver prints at once. `ray job submit` looks every second,
                and some steps have gone by then.
            limit_s: longest time.

        Raises:
            TimeoutError: it had not ended.
        """
        command = [*RAY, "job", "submit", "--submission-id", run_id, "--", sys.executable]
        command += ["-m", "ray_detox", "run", *words, "--run-id", run_id]
        command += ["--output", str(self.folder / "runs")]
        printed = self.folder / f"0-{self._lives[0]}/session_latest/logs/job-driver-{run_id}.log"
        ended, began, read = Ended(), time.monotonic(), 0
        process = self._start(SWITCH, f"submit-{run_id}", command)
        over = False
        while not over:
            time.sleep(LOOK_S)
            over = process.poll() is not None
            now = time.monotonic() - began
            whole, newline, _ = _from(printed, read).rpartition(b"\n")
            read += len(whole + newline)
            for line in whole.decode().splitlines():
                ended.said.append((now, line))
                on_line(line)
            if now > limit_s:
                process.kill()
                raise TimeoutError(f"{run_id} had not ended after {limit_s:g} s:\n{ended.text}")
        ended.code = process.returncode
        ended.job = self._look("job", run_id) or {}
        return ended

    def left(self, storage: str, run_id: str) -> dict[str, Any]:
        """What a run left in the bucket and in the table; see `look.py`."""
        found = self._look("left", storage, run_id)
        assert found, (self.folder / "look.log").read_text()[-2000:]
        return dict(found)

    # ---- processes -----------------------------------------------------------------------------

    def _look(self, *words: str) -> Any:
        """What look.py prints; None where it cannot."""
        with (self.folder / "look.log").open("a") as log:
            process = self.network.start(
                SWITCH,
                [sys.executable, "-m", "tests.many_nodes.look", *words],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
            printed, _ = process.communicate(timeout=COME_UP_S)
        return json.loads(printed) if process.returncode == 0 else None

    def _start(self, where: int | str, name: str, words: list[str]) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.log").open("w") as log:
            return self.network.start(
                where,
                [sys.executable, *words],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def wait_for(what: str, is_there: Callable[[], Any]) -> None:
    """Ask until the answer is yes."""
    began = time.monotonic()
    while not is_there():
        assert time.monotonic() - began < COME_UP_S, f"{what}: not within {COME_UP_S:g} s"
        time.sleep(0.5)


def _from(file: Path, offset: int) -> bytes:
    """What a file has from an offset on; nothing where there is no file yet."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read()
