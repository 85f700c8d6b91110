"""A Ray of several nodes on this machine, a run on it, and what happens to them on a schedule.

this process      Cluster: GCS and raylets as processes of this machine
  go(blows)       `ray-detox run` as a process; its lines say when the next blow is due
                  a driver that ended is followed by `ray-detox run --resume`
"""

import contextlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from ray.cluster_utils import Cluster

from tests.chaos.schedule import DRIVERS, Blow

STEPS, PROMPTS, MEASURED = 8, 32, 24
SETTINGS = [
    f"train.steps={STEPS}",
    f"ppo.prompts_per_step={PROMPTS}",
    "sampling.max_new_tokens=8..16",
    "sampling.batch_size=8",
    f"evaluate.prompts={MEASURED}",
    "evaluate.shards=3",
    "data.limit=400",
    "reward.batch_size=8",
    "serving.heartbeat_timeout_s=3",
    "cluster.cpus_per_worker=1",
    "cluster.capacity_timeout_s=60",
]
TITLES = {
    "worker": "RayTrainWorker",
    "actor": "RewardActor",
    "controller": "TrainController",
    "measurer": "measure_shard",
    "progress": "Progress",
    "directory": "Directory",
}
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
HEALTH_CHECK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""Ray notices in 5 seconds that the processes of a node are gone; its own settings make that 15.

A node that is only slow may still be silent for 20 seconds.
"""
DRAIN_S = 8
HEADLESS_S = 150
"""A driver must have noticed by then that the head of its cluster is gone."""


@dataclass
class Ended:
    """How a run ended."""

    codes: list[int]
    """Exit codes of its drivers, one after another."""
    said: list[str]
    """All lines that they printed."""
    seconds: float
    happened: list[str] = field(default_factory=list)
    """What happened, and to whom."""

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Chaos:
    """Some nodes, and runs on them.

    Args:
        folder: for runs and their storage.
        nodes: besides the head, which has no CPU.
        cpus: of each.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cpus = cpus
        self.count = nodes
        self.fault = folder / "fault"
        self.return_s = 4.0
        """After this time a node that was lost is there again, and storage that failed works."""
        os.environ.update(ENVIRONMENT)
        self._later: list[tuple[float, str]] = []
        self._start()

    def _start(self) -> None:
        # Short, for the paths of Ray's sockets may have 107 characters.
        self.temp = tempfile.mkdtemp(prefix="ray-")
        # Ray notes the address of its newest cluster in this folder, and expects it to be there.
        (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
        memory = 100 * 1024 * 1024
        with mock.patch.dict(os.environ, HEALTH_CHECK):
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": memory,
                    "temp_dir": self.temp,
                },
            )
        for _ in range(self.count):
            self.add_node()

    def add_node(self) -> None:
        """One node more."""
        self.cluster.add_node(num_cpus=self.cpus, object_store_memory=100 * 1024 * 1024)

    def close(self) -> None:
        """End all of Ray that this object started."""
        self.cluster.shutdown()
        shutil.rmtree(self.temp, ignore_errors=True)

    # ---- a run ---------------------------------------------------------------------------------

    def go(
        self,
        run_id: str,
        settings: Sequence[str] = (),
        blows: Sequence[Blow] = (),
        limit_s: float = 300,
        seed: int = 0,
    ) -> Ended:
        """Run to the end, through all that happens.

        Raises:
            TimeoutError: it had not ended after `limit_s`.
        """
        self._draw = random.Random(seed)
        ended = Ended([], [], 0.0)
        began = time.monotonic()
        waiting = list(blows)
        words = ["lab", *SETTINGS, *settings, f"cluster.address={self.cluster.address}"]
        words += [f"train.storage=chaos://{self.folder}/storage", "--run-id", run_id]
        while True:
            asked = self._drive(run_id, words, waiting, ended, began + limit_s)
            if ended.codes[-1] == 0 or not asked:
                break
            while self.fault.exists():  # nobody resumes on a disk that is full
                self._catch_up()
                time.sleep(0.1)
            words = ["--resume", run_id, f"cluster.address={self.cluster.address}"]
        self._catch_up(everything=True)
        ended.seconds = time.monotonic() - began
        return ended

    def _drive(
        self, run_id: str, words: list[str], waiting: list[Blow], ended: Ended, limit: float
    ) -> bool:
        """One driver's life; True where it was ended by a blow."""
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.chaos.driver",
                "run",
                *words,
                "--output",
                str(self.folder / "runs"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"CHAOS_FAULT": str(self.fault)},
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        step, since, asked = -1, time.monotonic(), False
        while process.poll() is None:
            if time.monotonic() > limit:
                process.kill()
                raise TimeoutError(f"{run_id} had not ended: {ended.text[-3000:]}")
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.05).rstrip()
                ended.said.append(line)
                if line.startswith("train "):
                    step, since = max(step, 0), time.monotonic()
                elif line.startswith("step "):
                    step, since = int(line[5:].split("/")[0]), time.monotonic()
                elif line.startswith("evaluate "):
                    step, since = STEPS + 1, time.monotonic()
            self._catch_up()
            now = time.monotonic()
            is_due = waiting and step >= waiting[0].after_step and now - since >= waiting[0].delay_s
            if is_due and not asked:
                blow = waiting.pop(0)
                told = self._strike(blow, process, run_id)
                ended.happened.append(f"{blow}: {told}")
                asked = blow.kind in DRIVERS
        reader.join(10)
        while not lines.empty():
            ended.said.append(lines.get().rstrip())
        ended.codes.append(process.returncode)
        return asked

    # ---- what happens --------------------------------------------------------------------------

    def _strike(self, blow: Blow, driver: subprocess.Popen[str], run_id: str) -> str:
        kind = blow.kind
        if kind in TITLES:
            found = self.processes(TITLES[kind])
            if not found:
                return "there was none"
            victim = self._draw.choice(found)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
            return f"pid {victim.pid}"
        if kind in ("node", "actor_node", "raylet", "drain"):
            node = self._draw.choice(sorted(self.cluster.worker_nodes, key=lambda n: n.node_id))
            if kind == "actor_node":
                raylets = {a.ppid() for a in self.processes(TITLES["actor"])}
                (node,) = [n for n in self.cluster.worker_nodes if _raylets(n) & raylets]
            if kind == "drain":
                self._drain(node)
                self._later.append((time.monotonic() + DRAIN_S, node.node_id))
            elif kind == "raylet":
                node.kill_raylet()
                self._later.append((time.monotonic() + self.return_s, node.node_id))
            else:
                self.cluster.remove_node(node, allow_graceful=False)
                self._later.append((time.monotonic() + self.return_s, ""))
            return f"node {node.node_id[:8]}"
        if kind == "return":
            self._catch_up(everything=True)
            return "all is there again"
        if kind in ("full", "slow"):
            self.fault.write_text(kind)
            self._later.append((time.monotonic() + self.return_s, "fault"))
            return f"for {self.return_s:g} s"
        if kind == "head":
            self.cluster.head_node.kill_gcs_server()
            self.cluster.head_node.kill_raylet()
            # Nobody ends the driver: it must find out for itself.
            driver.wait(HEADLESS_S)
            self._start_anew()
            return f"the driver ended with {driver.returncode}"
        driver.send_signal(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        if kind == "damage":
            driver.wait(30)
            return self._damage(run_id)
        if kind == "cluster":
            driver.wait(30)
            self._start_anew()
        return f"pid {driver.pid}"

    def _start_anew(self) -> None:
        self.close()
        self._later = [entry for entry in self._later if entry[1] == "fault"]
        self._start()

    def _catch_up(self, everything: bool = False) -> None:
        """Bring back what has been away for long enough."""
        for entry in list(self._later):
            when, what = entry
            if not everything and time.monotonic() < when:
                continue
            self._later.remove(entry)
            if what == "fault":
                self.fault.unlink(missing_ok=True)
                continue
            for node in list(self.cluster.worker_nodes):
                if node.node_id == what:
                    self.cluster.remove_node(node, allow_graceful=False)
            self.add_node()

    def _drain(self, node: Any) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", self.cluster.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(DRAIN_S)]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _damage(self, run_id: str) -> str:
        """Cut a file of the newest checkpoint short, if there is an earlier one."""
        kept = sorted(
            (self.folder / "storage" / run_id / "checkpoints").glob("step-*/manifest.json")
        )
        if len(kept) < 2:
            return "no checkpoint to spare"
        files = sorted(file for file in kept[-1].parent.rglob("*") if file.is_file())
        file = self._draw.choice(files)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return f"{kept[-1].parent.name}/{file.name}"

    def processes(self, title: str) -> list[psutil.Process]:
        """Ray's workers of this cluster with a title, oldest first."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        raylets = set().union(*map(_raylets, nodes))
        found = []
        for process in psutil.process_iter(["pid", "ppid", "cmdline", "create_time", "status"]):
            about = process.info
            named = title in " ".join(about["cmdline"] or [])
            if named and about["ppid"] in raylets and about["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return sorted(found, key=lambda process: process.info["create_time"])

    # ---- what a run left -----------------------------------------------------------------------

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The figures of every step, without the clock's and the pool's."""
        file = self.folder / "runs" / run_id / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        drop = lambda name: name.startswith("seconds") or name == "pool"
        return [{name: value for name, value in row.items() if not drop(name)} for row in rows]

    def adapter(self, run_id: str) -> bytes:
        """The trained weights."""
        return (self.folder / "runs" / run_id / "adapter/adapter_model.safetensors").read_bytes()

    def samples(self, run_id: str) -> list[Mapping[str, Any]]:
        """What was measured."""
        file = self.folder / "runs" / run_id / "samples.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


def _raylets(node: Any) -> set[int]:
    """The process whose children are Ray's workers on a node."""
    return {info.process.pid for info in node.all_processes.get("raylet", [])}


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)


@contextlib.contextmanager
def chaos(folder: Path, **arguments: Any) -> Iterator[Chaos]:
    """A `Chaos` that is ended in the end."""
    made = Chaos(folder, **arguments)
    try:
        yield made
    finally:
        made.close()
