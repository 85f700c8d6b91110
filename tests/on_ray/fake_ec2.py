"""The node types of `cluster/aws.yaml` as local raylets that Ray's autoscaler starts and ends.

Ray's autoscaler, a process of its own, finds `FakeEC2` by its name; `fake_autoscaler.py` is the
program around it.
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private import services
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = 80 * 2**20
"""Bytes for objects on a node, the minimum that Ray accepts."""
COMES_UP_S = 500
"""Longest wait for a raylet to start."""


def autoscaling_config(faster: float = 1) -> dict[str, Any]:
    """Return the settings of Ray's autoscaler: the file with another provider and no commands.

    Args:
        faster: divides the times that a node may be idle.
    """
    cluster = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text(encoding="utf-8"))
    golden = json.loads((ROOT / "tests/data/aws_launch.json").read_text(encoding="utf-8"))
    for name, node in cluster["available_node_types"].items():
        # With memory and the kind of GPU, as the launcher fills them in.
        node["resources"] = golden["resources"][name]
        if "idle_timeout_s" in node:
            node["idle_timeout_s"] /= faster
    kept = "cluster_name max_workers upscaling_speed head_node_type available_node_types".split()
    empty = (
        "initialization_commands setup_commands head_setup_commands worker_setup_commands "
        "head_start_ray_commands worker_start_ray_commands cluster_synced_files rsync_exclude "
        "rsync_filter"
    ).split()
    return (
        {name: cluster[name] for name in kept}
        | {key: [] for key in empty}
        | {"auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False}
        | {
            "idle_timeout_minutes": cluster["idle_timeout_minutes"] / faster,
            "provider": {
                "type": "external",
                "module": "tests.on_ray.fake_ec2.FakeEC2",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "disable_node_updaters": True,  # no setup over SSH
            },
        }
    )


class FakeEC2(FakeMultiNodeProvider):
    """Ray's own fake provider, adapted to a busy machine."""

    def __init__(self, config: dict[str, Any], cluster_name: str) -> None:
        # Ray chose a free port for the cluster; a fixed one might be in use.
        options = argparse.ArgumentParser()
        options.add_argument("--gcs-address", required=True)
        autoscaler, _ = options.parse_known_args()
        super().__init__(config | {"gcs_address": autoscaler.gcs_address}, cluster_name)
        self._nodes[FAKE_HEAD_NODE_ID]["tags"][TAG_RAY_USER_NODE_TYPE] = "head"
        wait_for_raylets()

    def _next_hex_node_id(self) -> str:
        # Ray's ids differ only in their last characters, while messages show the first ones.
        self._next_node_id += 1
        return f"{self._next_node_id:08}{'0' * 48}"

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        """Start nodes as Ray's provider does, but with little memory and the name of their type."""
        has = {name: amount for name, amount in resources.items() if name != "memory"}
        has["object_store_memory"] = OBJECTS
        with self.lock:
            os.environ["RAY_NODE_TYPE_NAME"] = tags[TAG_RAY_USER_NODE_TYPE]
            super().create_node_with_resources_and_labels(node_config, tags, count, has, labels)


def wait_for_raylets() -> None:
    """Make this process wait longer for a raylet that it starts, for busy machines.

    Ray waits half a minute. A raylet of the autoscaler that starts later would still join, beside the
    node that replaced it.
    """
    find = services.get_node

    def wait(*arguments: Any) -> Any:
        deadline = time.monotonic() + COMES_UP_S
        while True:
            try:
                return find(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    services.get_node = wait


def forget_gpus() -> None:
    """Make a process see no GPU, because the emulated nodes have none.

    Ray runs this when each of its workers starts. Ray still counts the GPU share of a reward actor,
    but the actor loads its model on the CPU.
    """
    ray.get_gpu_ids = list


def sweep(folder: Path) -> None:
    """Kill all processes of the Ray in a folder: nodes outlive the autoscaler that started them."""
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(folder) in " ".join(process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
