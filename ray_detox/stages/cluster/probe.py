"""Probe every node before a run: models, data, versions and disk."""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox import __version__
from ray_detox.config import ConfigError, RunConfig
from ray_detox.recipes.loading import config_from_dict
from ray_detox.stages import preflight
from ray_detox.stages.cluster.nodes import alive_nodes, node_name, takes_connections
from ray_detox.stages.errors import last_line

NODE_PROBE_TIMEOUT_S = 60.0
"""Longest wait for the nodes to answer; a first process on a busy node takes seconds to start."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a node said about itself."""

    address: str
    fault: str | None
    seconds: float


class NodeGoneError(ConfigError):
    """A node went away while it was asked."""


def probe_nodes(config: RunConfig) -> list[Probe]:
    """Have every node look at what the run asks of it; nothing where this process's node is alone.

    Returns:
        One for each node that can hold anything; none where the only node is this one, at whose
        files `preflight.check` has looked.

    Raises:
        ConfigError: a node's fault, with its address, or that it did not answer.
        NodeGoneError: Ray had listed it for some moments after its end.
    """
    nodes = [node for node in alive_nodes() if {"CPU", "GPU"} & node["Resources"].keys()]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [here]:
        return []
    began = time.monotonic()
    asked = {
        _find_fault_on_node.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(config.to_dict(), versions()): node
        for node in nodes
    }
    probes, waiting = [], list(asked)
    while waiting and (left_s := NODE_PROBE_TIMEOUT_S - (time.monotonic() - began)) > 0:
        done, waiting = ray.wait(waiting, timeout=left_s)
        seconds = time.monotonic() - began
        probes += [Probe(node_name(asked[ref]), _answer(ref, asked[ref]), seconds) for ref in done]
    for ref in waiting:
        ray.cancel(ref, force=True)
        fault = f"it did not answer within {NODE_PROBE_TIMEOUT_S:g} s."
        probes.append(Probe(node_name(asked[ref]), fault, NODE_PROBE_TIMEOUT_S))
    faulty = [probe for probe in probes if probe.fault]
    if faulty:
        more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
        raise ConfigError(f"Node {faulty[0].address}{more} cannot do its part: {faulty[0].fault}")
    return probes


def _answer(ref: Any, node: dict[str, Any]) -> str | None:
    try:
        fault: str | None = ray.get(ref)
    except RayError as error:
        if isinstance(error, NodeDiedError | TaskUnschedulableError) or not takes_connections(node):
            raise NodeGoneError(f"Node {node_name(node)} went away while it was asked.") from None
        return last_line(error)  # such as that of a node without this package
    return fault


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"Python": python, "Ray": ray.__version__, "ray-detox": __version__}


@ray.remote(num_cpus=0, max_retries=0)
def _find_fault_on_node(settings: dict[str, Any], expected: dict[str, str]) -> str | None:
    return find_fault(settings, expected)


def find_fault(settings: dict[str, Any], expected: dict[str, str]) -> str | None:
    """What keeps this node from doing its part of a run, in a sentence.

    Args:
        settings: the run's, as plain values: a node of another version may know others.
        expected: the driver's `versions()`.
    """
    for name, version in versions().items():
        if version != expected[name]:
            return (
                f"it has {name} {version}, and the run was started with {name} {expected[name]}. "
                "Install the same version on all nodes."
            )
    try:
        preflight.check_reach(config_from_dict(settings))
    except ConfigError as error:
        return str(error)
    # A worker writes a checkpoint there, and reads it, on its way to the driver.
    no_room = preflight.why_no_room(Path(tempfile.gettempdir()))
    return f"its temporary folder {no_room}. Make room there." if no_room else None
