"""A run on the node types of `cluster/aws.yaml`, with Ray's own autoscaler and local nodes.

    python -m tests.on_ray.fake_autoscaler [--json] [FOLDER]     print a line with the time of each event

    this process     head node, and the parts of a run: wait_for_capacity, RewardPool, RewardClient
    Ray's monitor    the autoscaler: pending resources ---> FakeEC2 ---> local raylets

    stage   what happens                                        what the autoscaler should do
    room    the run waits for its resources                     add a node for each, and no other
    start   a reward actor starts, the worker group is placed   nothing
    load    texts wait: 1 actor .. 8                            add a reward node, once 4 are full
    quiet   nothing waits: 8 actors .. 1                        remove the reward node that is empty
    end     actors and workers end                              remove all

The worker group is only a placement group; the reward pool is that of a run with the embedded model. The
decisions do not depend on the speed of the machine: the pool asks for one actor at a time, and no node
is idle for too long while others start, because the idle times of `aws.yaml` hold until the load ends.
Only then are they divided by FASTER.
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
from tests.on_ray.fake_ec2 import OBJECTS, ROOT, autoscaling_config, sweep, wait_for_raylets

ASKED = [
    "train.workers=2",
    "cluster.cpus_per_worker=6",
    "cluster.gpus_per_worker=1",
    "reward.actors=1..8",
    "serving.gpus_per_actor=0.25",
]
"""Settings of the command in cluster/README.md."""
HERE = [
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
"""10 minutes of idle time become 2 seconds."""
LIMIT_S = 600
"""Longest wait for one thing to happen."""
SETTLE_S = 4
"""Several rounds of the autoscaler, in which an unwanted decision would show."""

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_FAKE_CLUSTER": "1",
    # As `ray up` sets on the head.
    "RAY_enable_autoscaler_v2": "1",
    "RAY_NODE_TYPE_NAME": "head",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # Without these, Ray starts a process for each CPU of a node in advance: 20 on this machine.
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
    "PYTHONPATH": str(ROOT),
}


class Story:
    """Prints what happens, as text or as JSON.

    Args:
        as_json: print JSON, for a program.
        log: the autoscaler's decisions.
    """

    def __init__(self, as_json: bool, log: Path) -> None:
        self._as_json = as_json
        self._log = log
        # Only our own lines: Ray prints advice at any time, even in the middle of a line.
        self._out = sys.stdout
        sys.stdout = sys.stderr
        self._began = time.monotonic()
        self._read = 0
        self._nodes: dict[str, int] = {}
        self._pool_was: tuple[int, int] | None = None
        self.pool: RewardPool | None = None
        self.stage = ""

    def enter(self, stage: str, text: str) -> None:
        """Begin a stage: events from now on belong to it."""
        self.look()
        self.stage = stage
        self._tell("stage", text)

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Wait for a condition, and print what happens meanwhile."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.stage}: waited {limit_s:g} s; nodes {self._nodes}")
            self.look()
            time.sleep(0.1)
        self.look()

    def settle(self) -> None:
        """Give the autoscaler time for a decision that it should not make."""
        until = time.monotonic() + SETTLE_S
        self.until(lambda: time.monotonic() > until)

    def look(self) -> None:
        """Print what changed."""
        self._look_at_decisions()
        nodes = node_counts()
        changes = [
            f"{name} {self._nodes.get(name, 0)} -> {nodes.get(name, 0)}"
            for name in sorted({*nodes, *self._nodes})
            if nodes.get(name, 0) != self._nodes.get(name, 0)
        ]
        if changes:
            self._nodes = nodes
            self._tell("nodes", ", ".join(changes), nodes=nodes)
        if self.pool is not None:
            metrics = self.pool.metrics()
            now = (metrics.wanted, metrics.actors)
            if now != self._pool_was:
                self._pool_was = now
                text = "queue {waiting} texts: {wanted} actors wanted, {actors} up"
                figures = asdict(metrics)
                self._tell("pool", text.format(**figures), **figures)

    def placed(self, what: str, nodes: list[str]) -> None:
        """Print on which nodes something is, given node ids or their prefixes."""
        types = {n["NodeID"][:8]: type_of(n) for n in ray.nodes()}
        where = Counter(node[:8] for node in nodes)
        text = ", ".join(f"{count} on {types[n]} {int(n)}" for n, count in sorted(where.items()))
        self._tell(what, text, where=[[types[n], count] for n, count in sorted(where.items())])

    def scores(self, texts: int) -> None:
        """Print how many texts were scored."""
        self._tell("scores", f"{texts} texts scored", texts=texts)

    def _look_at_decisions(self) -> None:
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        for line in lines[self._read :]:
            said = json.loads(line)["message"]
            if match := re.fullmatch(r"Adding (\d+) node\(s\) of type (\S+)\.", said):
                self._tell("add", said, type=match[2], count=int(match[1]))
            elif match := re.fullmatch(r"Removing (\d+) nodes of type (\S+) \((.+)\)\.", said):
                self._tell("remove", said, type=match[2], count=int(match[1]), why=match[3])
            elif not said.startswith(("Resized to", "Current cluster resources")):
                self._tell("warning", said)
        self._read = len(lines)

    def _tell(self, what: str, text: str, **more: Any) -> None:
        at = time.monotonic() - self._began
        if self._as_json:
            about = {"at": round(at, 1), "stage": self.stage, "what": what, "text": text}
            print(json.dumps(about | more), file=self._out, flush=True)
            return
        who = {"add": "autoscaler", "remove": "autoscaler", "warning": "autoscaler"}.get(what, what)
        print(f"{at:6.1f} s  {self.stage:<6} {who:<11} {text}", file=self._out, flush=True)


def type_of(node: dict[str, Any]) -> str:
    """The node type in the labels of a node."""
    return str(node["Labels"].get("ray.io/node-group"))


def node_counts() -> dict[str, int]:
    """Live nodes besides the head, by type."""
    types = [type_of(node) for node in ray.nodes() if node["Alive"]]
    return dict(Counter(name for name in types if name != "head"))


class Load:
    """Pending batches, enough of them that some find no free actor."""

    BATCH = 80

    def __init__(self, client: RewardClient) -> None:
        self._client = client
        self._waiting: list[Any] = []
        self.scored = 0

    def top_up(self) -> None:
        """Replace finished batches by new ones."""
        self._take(lambda pending: pending.scores.done())
        while len(self._waiting) < 5:
            self._waiting.append(self.submit(self.BATCH))

    def finish(self) -> None:
        """Wait for the remaining batches."""
        self._take(lambda pending: True)

    def submit(self, texts: int) -> Any:
        """Submit one batch, of which every chunk takes half a second."""
        rows = [f"text {i}" for i in range(texts)]
        return self._client.submit(
            ScoreRequest(rows, rows, [[1]] * texts, {"seconds": [0.5] * texts})
        )

    def _take(self, which: Callable[[Any], bool]) -> None:
        for pending in [one for one in self._waiting if which(one)]:
            self._waiting.remove(pending)
            self.scored += len(pending.result().rewards)


def tell_run(story: Story, config: RunConfig, hurry: Callable[[], None]) -> None:
    """Go through the stages.

    Args:
        story: prints the events.
        config: of the run.
        hurry: makes the autoscaler remove idle nodes sooner from then on.
    """
    story.enter("room", "the run waits for its resources")
    need = wait_for_capacity(story, config)
    story.settle()

    story.enter("start", "a reward actor starts, the worker group is placed")
    worker = {"CPU": need.worker.cpus, "GPU": need.worker.gpus}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            contextlib.closing(RewardPool(config, need.gpus_per_actor, place_actors(need)))
        )
        story.pool = pool
        group = placement_group([worker] * config.train.min_workers)
        story.until(lambda: group.wait(0))
        story.placed("workers", list(placement_group_table(group)["bundles_to_node_id"].values()))
        story.until(lambda: pool.metrics().actors == config.reward.min_actors)
        story.placed("actors", [actor.node for actor in pool.describe()])
        client = stack.enter_context(contextlib.closing(RewardClient(pool.directory, config)))
        load = Load(client)
        story.settle()

        story.enter("load", "texts wait")

        def all_are_up() -> bool:
            load.top_up()
            return pool.metrics().actors == config.reward.max_actors

        story.until(all_are_up)
        story.placed("actors", [actor.node for actor in pool.describe()])
        story.settle()

        story.enter("quiet", f"no text waits; idle nodes may stay {FASTER} times shorter")
        hurry()
        load.finish()
        story.until(lambda: pool.metrics().actors == config.reward.min_actors)
        story.until(lambda: node_counts()["reward_gpu_spot"] == 1)
        story.settle()
        story.placed("actors", [actor.node for actor in pool.describe()])
        story.scores(load.scored + len(load.submit(8).result().rewards))

        story.enter("end", "workers and actors end")
        story.pool = None
        remove_placement_group(group)
    story.until(lambda: not node_counts())
    story.settle()


def wait_for_capacity(story: Story, config: RunConfig) -> Needs:
    """Wait as a run does first, while the story goes on."""
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(admission.wait_for_capacity, config, lambda text: None)
        story.until(waiting.done, LIMIT_S + config.cluster.capacity_timeout_s)
        return waiting.result()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--json", action="store_true")
    options.add_argument("folder", nargs="?", type=Path)
    said = options.parse_args()
    # Short, for the paths of Ray's sockets may have 107 characters.
    folder = said.folder or Path(tempfile.mkdtemp(prefix="ray-"))
    # Ray notes the address of its newest cluster in this folder, and expects it to be there.
    (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
    told = folder / "autoscaling.json"
    write_atomic(told, json.dumps(autoscaling_config()))
    head: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": 0,
        "object_store_memory": OBJECTS,
        "include_dashboard": False,
        "temp_dir": str(folder),
        "autoscaling_config": str(told),
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
        tell_run(
            Story(said.json, log),
            load_config("lab", ASKED + HERE),
            hurry=lambda: write_atomic(told, json.dumps(autoscaling_config(FASTER))),
        )


if __name__ == "__main__":
    if os.environ.get("RAY_FAKE_CLUSTER") is None:
        # Ray reads some of these once, when it is imported.
        token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        words = [sys.executable, "-m", "tests.on_ray.fake_autoscaler", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | ENVIRONMENT | token)
    main()
