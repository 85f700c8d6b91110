"""Run on several Ray nodes on this machine while scheduled faults are injected.

this process      Cluster: GCS and raylets as processes of this machine
  run(faults)     `ray-detox run` as a process; its output shows when the next fault is due;
                  if a fault ends the driver, `ray-detox run --resume` follows
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

from tests.chaos.schedule import DRIVERS, Fault
from tests.environment import python_path
from tests.startup.template import raylet_of

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
    "reward.check_sentences=false",
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
    "PYTHONPATH": python_path(Path(__file__).parents[2]),
}
NODE_ENVIRONMENT = {
    # No process is started in advance, for each CPU and each driver.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""For Ray's own processes.

Ray notices in 5 seconds that the processes of a node are gone; its own settings make that 15. A node
that is only slow may still be silent for 20 seconds.
"""
DRAIN_S = 8
HEADLESS_S = 150
"""Time within which a driver must detect that the head node is gone."""


@dataclass
class RunOutcome:
    """The end of a run, over all of its drivers."""

    codes: list[int]
    """Exit codes of its drivers, in order."""
    lines: list[str]
    """All lines that the drivers printed."""
    seconds: float
    injected: list[str] = field(default_factory=list)
    """Each injected fault with its victim."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Chaos:
    """A Ray cluster on this machine, on which runs are disturbed by faults.

    Args:
        folder: for runs and their storage.
        nodes: number of worker nodes beside the head, which has no CPU.
        cpus: of each worker node.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cpus = cpus
        self.count = nodes
        self.storage_fault = folder / "fault"
        self.return_s = 4.0
        """Seconds until a lost node is replaced and failed storage works again."""
        os.environ.update(ENVIRONMENT)
        self._recoveries: list[tuple[float, str]] = []
        self._start()

    def _start(self) -> None:
        # A short path, because Ray's socket paths are limited to 107 characters.
        self.temp = tempfile.mkdtemp(prefix="ray-")
        # Ray writes the address of its newest cluster into this folder, and fails if it is missing.
        (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
        memory = 100 * 1024 * 1024
        with mock.patch.dict(os.environ, NODE_ENVIRONMENT):
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "include_log_monitor": False,
                    "object_store_memory": memory,
                    "temp_dir": self.temp,
                },
            )
        for _ in range(self.count):
            self.add_node()

    def add_node(self) -> None:
        """Add a worker node."""
        with mock.patch.dict(os.environ, NODE_ENVIRONMENT):
            self.cluster.add_node(
                num_cpus=self.cpus,
                object_store_memory=100 * 1024 * 1024,
                include_log_monitor=False,
            )

    def close(self) -> None:
        """Stop all Ray processes that this object started."""
        self.cluster.shutdown()
        shutil.rmtree(self.temp, ignore_errors=True)

    # ---- a run ---------------------------------------------------------------------------------

    def run(
        self,
        run_id: str,
        settings: Sequence[str] = (),
        faults: Sequence[Fault] = (),
        limit_s: float = 900,
        seed: int = 0,
    ) -> RunOutcome:
        """Run `ray-detox run` to its end while the faults are injected.

        Raises:
            TimeoutError: the run did not end within `limit_s`.
        """
        self._random = random.Random(seed)
        outcome = RunOutcome([], [], 0.0)
        began = time.monotonic()
        waiting = list(faults)
        arguments = ["lab", *SETTINGS, *settings, f"cluster.address={self.cluster.address}"]
        arguments += [f"train.storage=chaos://{self.folder}/storage", "--run-id", run_id]
        while True:
            driver_hit = self._drive(run_id, arguments, waiting, outcome, began + limit_s)
            if outcome.codes[-1] == 0 or not driver_hit:
                break
            while self.storage_fault.exists():  # otherwise the disk would still be full
                self._recover()
                time.sleep(0.1)
            arguments = ["--resume", run_id, f"cluster.address={self.cluster.address}"]
        self._recover(everything=True)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _drive(
        self,
        run_id: str,
        arguments: list[str],
        waiting: list[Fault],
        outcome: RunOutcome,
        limit: float,
    ) -> bool:
        """Run one driver to its end; return whether a fault was injected into it."""
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.chaos.driver",
                "run",
                *arguments,
                "--output",
                str(self.folder / "runs"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"CHAOS_FAULT": str(self.storage_fault)},
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        step, since, driver_hit = -1, time.monotonic(), False
        while process.poll() is None:
            if time.monotonic() > limit:
                process.kill()
                raise TimeoutError(f"{run_id} did not end in time: {outcome.text[-3000:]}")
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.05).rstrip()
                outcome.lines.append(line)
                if line.startswith("train "):
                    step, since = max(step, 0), time.monotonic()
                elif line.startswith("step "):
                    step, since = int(line[5:].split("/")[0]), time.monotonic()
                elif line.startswith("evaluate "):
                    step, since = STEPS + 1, time.monotonic()
            self._recover()
            now = time.monotonic()
            is_due = waiting and step >= waiting[0].after_step and now - since >= waiting[0].delay_s
            if is_due and not driver_hit:
                fault = waiting.pop(0)
                effect = self._inject(fault, process, run_id)
                outcome.injected.append(f"{fault}: {effect}")
                driver_hit = fault.kind in DRIVERS
        reader.join(10)
        while not lines.empty():
            outcome.lines.append(lines.get().rstrip())
        outcome.codes.append(process.returncode)
        return driver_hit

    # ---- faults --------------------------------------------------------------------------------

    def _inject(self, fault: Fault, driver: subprocess.Popen[str], run_id: str) -> str:
        kind = fault.kind
        if kind in TITLES:
            found = self.processes(TITLES[kind])
            if not found:
                return "no such process"
            victim = self._random.choice(found)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
            return f"pid {victim.pid}"
        if kind in ("node", "actor_node", "worker_node", "raylet", "drain"):
            found = sorted(self.cluster.worker_nodes, key=lambda n: n.node_id)
            if kind in ("actor_node", "worker_node"):
                title = TITLES[kind.removesuffix("_node")]
                raylets = {raylet_of(p.pid, p.ppid()) for p in self.processes(title)}
                found = [node for node in found if _raylets(node) & raylets]
            node = self._random.choice(found)
            if kind == "drain":
                self._drain(node)
                self._recoveries.append((time.monotonic() + DRAIN_S, node.node_id))
            elif kind == "raylet":
                node.kill_raylet()
                self._recoveries.append((time.monotonic() + self.return_s, node.node_id))
            else:
                self.cluster.remove_node(node, allow_graceful=False)
                self._recoveries.append((time.monotonic() + self.return_s, ""))
            return f"node {node.node_id[:8]}"
        if kind == "return":
            self._recover(everything=True)
            return "everything recovered"
        if kind in ("full", "slow"):
            self.storage_fault.write_text(kind)
            self._recoveries.append((time.monotonic() + self.return_s, "fault"))
            return f"for {self.return_s:g} s"
        if kind == "head":
            self.cluster.head_node.kill_gcs_server()
            self.cluster.head_node.kill_raylet()
            # The driver gets no signal: it must detect the loss of the head node.
            driver.wait(HEADLESS_S)
            self._restart()
            return f"the driver ended with {driver.returncode}"
        driver.send_signal(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        if kind == "damage":
            driver.wait(30)
            return self._damage(run_id)
        if kind == "cluster":
            driver.wait(30)
            self._restart()
        return f"pid {driver.pid}"

    def _restart(self) -> None:
        self.close()
        self._recoveries = [entry for entry in self._recoveries if entry[1] == "fault"]
        self._start()

    def _recover(self, everything: bool = False) -> None:
        """Replace lost nodes and end storage faults that are due."""
        for entry in list(self._recoveries):
            when, what = entry
            if not everything and time.monotonic() < when:
                continue
            self._recoveries.remove(entry)
            if what == "fault":
                self.storage_fault.unlink(missing_ok=True)
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
        """Truncate a file of the newest checkpoint, if there is an earlier one."""
        kept = sorted(
            (self.folder / "storage" / run_id / "checkpoints").glob("step-*/manifest.json")
        )
        if len(kept) < 2:
            return "only one checkpoint"
        files = sorted(file for file in kept[-1].parent.rglob("*") if file.is_file())
        file = self._random.choice(files)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return f"{kept[-1].parent.name}/{file.name}"

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the Ray worker processes of this cluster with a title, oldest first."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        raylets = set().union(*map(_raylets, nodes))
        found = []
        for process in psutil.process_iter(["pid", "ppid", "cmdline", "create_time", "status"]):
            info = process.info
            named = title in " ".join(info["cmdline"] or [])
            if not named or info["status"] == psutil.STATUS_ZOMBIE:
                continue
            if raylet_of(process.pid, info["ppid"]) in raylets:
                found.append(process)
        return sorted(found, key=lambda process: process.info["create_time"])

    # ---- files of a run -------------------------------------------------------------------------

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Return the metrics of every step, without times and pool metrics."""
        file = self.folder / "runs" / run_id / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        drop = lambda name: name.startswith("seconds") or name == "pool"
        return [{name: value for name, value in row.items() if not drop(name)} for row in rows]

    def adapter(self, run_id: str) -> bytes:
        """Return the trained weights."""
        return (self.folder / "runs" / run_id / "adapter/adapter_model.safetensors").read_bytes()

    def samples(self, run_id: str) -> list[Mapping[str, Any]]:
        """Return the measured examples in their stored form."""
        file = self.folder / "runs" / run_id / "samples.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]


def _raylets(node: Any) -> set[int]:
    """Return the process id of a node's raylet, the parent of its Ray workers."""
    return {info.process.pid for info in node.all_processes.get("raylet", [])}


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)


@contextlib.contextmanager
def chaos(folder: Path, **arguments: Any) -> Iterator[Chaos]:
    """Start a `Chaos`, and close it at the end."""
    made = Chaos(folder, **arguments)
    try:
        yield made
    finally:
        made.close()
