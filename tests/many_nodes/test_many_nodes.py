"""A run loses the network connection to a node whose processes keep running."""

import contextlib
import hashlib
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.many_nodes.cluster import Cluster, JobOutcome, wait_for
from tests.many_nodes.network import NoNetworkError, network

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

STEPS, MEASURED, SHARDS, CUT_AFTER = 8, 32, 2, 2
STORAGE = "s3://bucket/runs"
SETTINGS = [
    f"train.steps={STEPS}",
    "ppo.prompts_per_step=32",
    "sampling.max_new_tokens=8..16",
    "sampling.batch_size=8",
    f"evaluate.prompts={MEASURED}",
    f"evaluate.shards={SHARDS}",
    "data.limit=400",
    "reward.batch_size=8",
    "reward.check_sentences=false",
    f"train.storage={STORAGE}",
    "results.store=dynamodb",
    "results.table=ray-detox",
    # On three nodes of 2 CPUs, some node always has a worker and an actor: if two actors share a
    # node, the third one shares its node with a worker. Two nodes fit the actors and one worker.
    "train.workers=1..3",
    "reward.actors=3",
]
CPUS = 2
NODE_ENVIRONMENT = {
    # No process is started in advance, for each CPU.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}
"""Ray declares a silent node dead after 20 seconds; with its default settings, after 65."""


@dataclass
class Observations:
    """What the tests check after a run that lost a node."""

    address: str
    """Of the machine that was disconnected."""
    outcome: JobOutcome
    stored: dict[str, Any]
    """Contents of the bucket and the table; see `query.stored`."""
    adapter: bytes
    """The adapter's weights in the run's folder on the head node."""
    nodes: list[dict[str, str]]
    """Ids of the nodes alive for Ray, by address: before the run, after it, and after the rejoin."""
    still_running: bool
    """Whether Ray still ran on the disconnected machine when the run had ended."""


@dataclass
class Disconnector:
    """Watches a driver's output, then disconnects a node with a worker and a reward actor."""

    cluster: Cluster
    nodes: dict[str, str]
    seen: dict[str, set[str]] = field(default_factory=lambda: {"worker": set(), "actor": set()})
    machine: int | None = None
    """The disconnected machine."""

    def on_line(self, line: str) -> None:
        if found := re.search(r"(worker|actor) \d on node (\w{8})", line):
            self.seen[found[1]].add(found[2])
        if self.machine is None and re.match(rf"step +{CUT_AFTER}/", line):
            both = self.seen["worker"] & self.seen["actor"]
            addresses = [address for address, node in self.nodes.items() if node[:8] in both]
            self.machine = self.cluster.network.addresses.index(sorted(addresses)[0])
            self.cluster.network.disconnect(self.machine)


@pytest.fixture(scope="module")
def observed():
    # A short path, because Ray's socket paths are limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mn-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            lan = stack.enter_context(network(folder, machines=4))
        except NoNetworkError as error:
            pytest.skip(str(error))
        yield run_and_disconnect(Cluster(lan, folder, CPUS, NODE_ENVIRONMENT))


def run_and_disconnect(cluster: Cluster) -> Observations:
    """Run a job, disconnect a node during it, and let the node rejoin after it."""
    cluster.start()
    nodes = [cluster.nodes()]
    disconnector = Disconnector(cluster, nodes[0])
    outcome = cluster.submit("cut", ["lab", *SETTINGS], disconnector.on_line)
    machine = disconnector.machine
    assert machine is not None, outcome.text
    still_running = cluster.runs_ray(machine)
    nodes.append(cluster.nodes())

    cluster.network.reconnect(machine)
    wait_for("Ray to end on the node", lambda: not cluster.runs_ray(machine))
    cluster.join([machine])
    nodes.append(cluster.nodes())
    return Observations(
        address=cluster.network.addresses[machine],
        outcome=outcome,
        stored=cluster.stored(STORAGE, "cut"),
        adapter=(cluster.folder / "runs/cut/adapter/adapter_model.safetensors").read_bytes(),
        nodes=nodes,
        still_running=still_running,
    )


def test_a_run_that_loses_a_node_to_the_network_ends_with_code_0(observed):
    assert observed.outcome.code == 0, observed.outcome.text
    assert observed.outcome.job["status"] == "SUCCEEDED"
    assert observed.outcome.job["driver_exit_code"] == 0


def test_ray_detects_the_partition_while_the_node_is_still_alive(observed):
    before, after, _ = observed.nodes

    assert set(before) - set(after) == {observed.address}
    assert observed.still_running


def test_the_run_resumes_with_fewer_workers_from_its_newest_checkpoint(observed):
    output = observed.outcome.text
    first, _, _ = output.partition("resuming from step")
    ((step, workers),) = re.findall(r"resuming from step (\d+) with (\d) work", output)

    placed = re.findall(r"worker (\d) on node (\w+)", first)
    assert sorted(rank for rank, _ in placed) == ["0", "1", "2"]
    assert len({node for _, node in placed}) > 1
    assert CUT_AFTER <= int(step) < STEPS
    assert int(workers) == 1


def test_the_result_is_stored_once_and_complete(observed):
    stored = observed.stored

    assert stored["runs"] == ["cut"]
    assert stored["report"]["status"] == "complete"
    assert stored["report"]["training"]["lost"] == 1
    assert [row["step"] for row in stored["history"]] == list(range(1, STEPS + 1))
    assert [sample["index"] for sample in stored["samples"]] == list(range(MEASURED))


def test_checkpoints_and_measured_shards_are_in_the_bucket(observed):
    stored = observed.stored

    assert stored["newest"] == STEPS
    assert stored["adapter"] == hashlib.sha256(observed.adapter).hexdigest()
    assert stored["shards"] == [f"shard-{number:05d}.json" for number in range(SHARDS)]


def test_a_node_that_comes_back_gets_a_new_id(observed):
    before, _, again = observed.nodes

    # Ray ends itself on a node that was declared dead; the fixture started it again.
    assert set(again) == set(before)
    assert again[observed.address] != before[observed.address]
