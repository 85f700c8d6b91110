"""A run on the node types of `cluster/aws.yaml`, with Ray's own autoscaler and local nodes.

    python -m tests.on_ray.fake_autoscaler [--json] [FOLDER]     print each event with its time

    this process     head node, and the parts of a run: wait_for_capacity, RewardPool, RewardClient
    Ray's monitor    the autoscaler: pending resources ---> FakeEC2 ---> local raylets

    stage   what happens                                        what the autoscaler should do
    wait    the run waits for its resources                     add one node for each, and no more
    start   a reward actor starts, the worker group is placed   nothing
    load    texts queue: 1 actor .. 8                           add a reward node when 4 are full
    quiet   empty queue: 8 actors .. 1                          remove the empty reward node
    end     workers and actors stop                             remove all nodes

A placement group stands in for the worker group; the reward pool is that of a run with the embedded
model. The decisions do not depend on the speed of the machine: the pool adds one actor at a time, and no
node is idle for too long while others start, because the idle timeouts of `aws.yaml` apply until the load
ends. After that, they are divided by FASTER.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from ray_detox.config import RunConfig
from ray_detox.recipes.loading import load_config
from ray_detox.records import ScoreRequest
from ray_detox.resources import Needs
from ray_detox.runs.storage import write_atomic
from ray_detox.stages.cluster import admission
from ray_detox.stages.cluster.nodes import place_actors
from ray_detox.stages.rewards.client import RewardClient
from ray_detox.stages.rewards.pool import RewardPool
from tests.environment import python_path
from tests.on_ray.fake_ec2 import OBJECTS, ROOT, autoscaling_config, sweep, wait_for_raylets

README_SETTINGS = [
    "train.workers=2",
    "cluster.cpus_per_worker=6",
    "cluster.gpus_per_worker=1",
    "reward.actors=1..8",
    "serving.gpus_per_actor=0.25",
]
"""Settings of the command in cluster/README.md."""
TEST_SETTINGS = [
    "cluster.capacity_timeout_s=600",
    "serving.upscale_delay_s=1",
    "serving.downscale_delay_s=1",
    "reward.batch_size=8",
    "serving.heartbeat_timeout_s=600",
    "serving.timeout_s=600",
    "reward.terms=[{function: tests.on_ray.reward_terms.pause}]",
]
"""Fast scaling, and long timeouts for a busy machine."""
FASTER = 300
"""Divides the idle timeout: 10 minutes become 2 seconds."""
LIMIT_S = 600
"""Longest wait for one condition."""
SETTLE_S = 4
"""Several update intervals of the autoscaler, enough to reveal an unwanted decision."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_FAKE_CLUSTER": "1",
    # As `ray up` sets on the head.
    "RAY_enable_autoscaler_v2": "1",
    "RAY_NODE_TYPE_NAME": "head",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # Without these, Ray starts a process in advance for each CPU that the nodes claim to have.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # On a busy machine a slow process must not count as dead.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_failure_threshold": "60",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": python_path(ROOT),
}


class EventPrinter:
    """Prints events of the run, the nodes and the autoscaler as text or JSON.

    Args:
        as_json: print JSON.
        log: file to which the autoscaler writes its decisions.
    """

    def __init__(self, as_json: bool, log: Path) -> None:
        self._as_json = as_json
        self._log = log
        # Ray prints at any time, even within a line, so its output goes to stderr.
        self._out = sys.stdout
        sys.stdout = sys.stderr
        self._began = time.monotonic()
        self._read = 0
        self._nodes: dict[str, int] = {}
        self._pool_was: tuple[int, int] | None = None
        self.pool: RewardPool | None = None
        self.stage = ""

    def enter(self, stage: str, text: str) -> None:
        """Begin a stage, to which the events from now on belong."""
        self.update()
        self.stage = stage
        self._print("stage", text)

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Wait for a condition, and print events in the meantime."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.stage}: waited {limit_s:g} s; nodes {self._nodes}")
            self.update()
            time.sleep(0.1)
        self.update()

    def settle(self) -> None:
        """Wait long enough for an unwanted decision of the autoscaler to appear."""
        until = time.monotonic() + SETTLE_S
        self.until(lambda: time.monotonic() > until)

    def update(self) -> None:
        """Print changes since the last call."""
        self._print_decisions()
        nodes = node_counts()
        changes = [
            f"{name} {self._nodes.get(name, 0)} -> {nodes.get(name, 0)}"
            for name in sorted({*nodes, *self._nodes})
            if nodes.get(name, 0) != self._nodes.get(name, 0)
        ]
        if changes:
            self._nodes = nodes
            self._print("nodes", ", ".join(changes), nodes=nodes)
        if self.pool is not None:
            metrics = self.pool.metrics()
            now = (metrics.wanted, metrics.actors)
            if now != self._pool_was:
                self._pool_was = now
                text = "queue {waiting} texts: {wanted} actors wanted, {actors} up"
                figures = asdict(metrics)
                self._print("pool", text.format(**figures), **figures)

    def placed(self, what: str, nodes: list[str]) -> None:
        """Print how many workers or actors are on each node, given the prefixes of node ids."""
        types = {n["NodeID"][:8]: type_of(n) for n in ray.nodes()}
        where = Counter(node[:8] for node in nodes)
        text = ", ".join(f"{count} on {types[n]} {int(n)}" for n, count in sorted(where.items()))
        self._print(what, text, where=[[types[n], count] for n, count in sorted(where.items())])

    def scores(self, texts: int) -> None:
        """Print how many texts were scored."""
        self._print("scores", f"{texts} texts scored", texts=texts)

    def _print_decisions(self) -> None:
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        for line in lines[self._read :]:
            message = json.loads(line)["message"]
            if match := re.fullmatch(r"Adding (\d+) node\(s\) of type (\S+)\.", message):
                self._print("add", message, type=match[2], count=int(match[1]))
            elif match := re.fullmatch(r"Removing (\d+) nodes of type (\S+) \((.+)\)\.", message):
                self._print("remove", message, type=match[2], count=int(match[1]), why=match[3])
            elif not message.startswith(("Resized to", "Current cluster resources")):
                self._print("warning", message)
        self._read = len(lines)

    def _print(self, what: str, text: str, **more: Any) -> None:
        at = time.monotonic() - self._began
        if self._as_json:
            event = {"at": round(at, 1), "stage": self.stage, "what": what, "text": text}
            print(json.dumps(event | more), file=self._out, flush=True)
            return
        who = "autoscaler" if what in ("add", "remove", "warning") else what
        print(f"{at:6.1f} s  {self.stage:<6} {who:<11} {text}", file=self._out, flush=True)


def type_of(node: dict[str, Any]) -> str:
    """Return the node type from the labels of a node."""
    return str(node["Labels"].get("ray.io/node-group"))


def node_counts() -> dict[str, int]:
    """Count the live nodes by type, without the head."""
    types = [type_of(node) for node in ray.nodes() if node["Alive"]]
    return dict(Counter(name for name in types if name != "head"))


class Load:
    """Keeps enough batches pending that some of them wait for a free actor."""

    BATCH = 80

    def __init__(self, client: RewardClient) -> None:
        self._client = client
        self._waiting: list[Any] = []
        self.scored = 0

    def top_up(self) -> None:
        """Replace finished batches with new ones."""
        self._take(lambda pending: pending.scores.done())
        while len(self._waiting) < 5:
            self._waiting.append(self.submit(self.BATCH))

    def finish(self) -> None:
        """Wait for the remaining batches."""
        self._take(lambda pending: True)

    def submit(self, texts: int) -> Any:
        """Submit a batch; each chunk of it takes half a second to score."""
        rows = [f"text {i}" for i in range(texts)]
        return self._client.submit(
            ScoreRequest(rows, rows, [[1]] * texts, {"seconds": [0.5] * texts})
        )

    def _take(self, which: Callable[[Any], bool]) -> None:
        for pending in [one for one in self._waiting if which(one)]:
            self._waiting.remove(pending)
            self.scored += len(pending.result().rewards)


def run_stages(printer: EventPrinter, config: RunConfig, hurry: Callable[[], None]) -> None:
    """Go through the stages.

    Args:
        printer: prints the events.
        config: of the run.
        hurry: shortens the idle timeout of the autoscaler.
    """
    printer.enter("wait", "the run waits for its resources")
    need = wait_for_capacity(printer, config)
    printer.settle()

    printer.enter("start", "a reward actor starts, the worker group is placed")
    worker = {"CPU": need.worker.cpus, "GPU": need.worker.gpus}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            contextlib.closing(RewardPool(config, need.gpus_per_actor, place_actors(need)))
        )
        printer.pool = pool
        group = placement_group([worker] * config.train.min_workers)
        printer.until(lambda: group.wait(0))
        printer.placed("workers", list(placement_group_table(group)["bundles_to_node_id"].values()))
        printer.until(lambda: pool.metrics().actors == config.reward.min_actors)
        printer.placed("actors", [actor.node for actor in pool.describe()])
        client = stack.enter_context(contextlib.closing(RewardClient(pool.directory, config)))
        load = Load(client)
        printer.settle()

        printer.enter("load", "texts queue")

        def all_are_up() -> bool:
            load.top_up()
            return pool.metrics().actors == config.reward.max_actors

        printer.until(all_are_up)
        printer.placed("actors", [actor.node for actor in pool.describe()])
        printer.settle()

        printer.enter("quiet", f"the queue is empty; the idle timeout is {FASTER} times shorter")
        hurry()
        load.finish()
        printer.until(lambda: pool.metrics().actors == config.reward.min_actors)
        printer.until(lambda: node_counts()["reward_gpu_spot"] == 1)
        printer.settle()
        printer.placed("actors", [actor.node for actor in pool.describe()])
        printer.scores(load.scored + len(load.submit(8).result().rewards))

        printer.enter("end", "workers and actors stop")
        printer.pool = None
        remove_placement_group(group)
    printer.until(lambda: not node_counts())
    printer.settle()


def wait_for_capacity(printer: EventPrinter, config: RunConfig) -> Needs:
    """Wait for the run's resources in a thread, and print events in the meantime."""
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(admission.wait_for_capacity, config, lambda text: None)
        printer.until(waiting.done, LIMIT_S + config.cluster.capacity_timeout_s)
        return waiting.result()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    # A short path, because Ray's socket paths are limited to 107 characters.
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="ray-"))
    # Ray writes the address of its newest cluster into this folder, and fails if it is missing.
    (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
    autoscaling = folder / "autoscaling.json"
    write_atomic(autoscaling, json.dumps(autoscaling_config()))
    head: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": 0,
        "object_store_memory": OBJECTS,
        "include_dashboard": False,
        "temp_dir": str(folder),
        "autoscaling_config": str(autoscaling),
        "env_vars": dict.fromkeys(
            ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"), FAKE_HEAD_NODE_ID
        ),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(sweep, folder)
        wait_for_raylets()
        cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"worker_process_setup_hook": "tests.on_ray.fake_ec2.forget_gpus"},
        )
        stack.callback(ray.shutdown)
        log = Path(cluster.head_node.get_logs_dir_path()) / "events/event_AUTOSCALER.log"
        run_stages(
            EventPrinter(arguments.json, log),
            load_config("lab", README_SETTINGS + TEST_SETTINGS),
            hurry=lambda: write_atomic(autoscaling, json.dumps(autoscaling_config(FASTER))),
        )


if __name__ == "__main__":
    if os.environ.get("RAY_FAKE_CLUSTER") is None:
        # Ray reads some of these variables only when it is imported.
        token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        command = [sys.executable, "-m", "tests.on_ray.fake_autoscaler", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ENVIRONMENT | token)
    main()
