"""Probe every node before a run: models, data, versions and disk.

driver --settings, Versions--> one task on each node --> None, or the fault in one sentence
"""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox import __version__
from ray_detox.config import ConfigError, RunConfig
from ray_detox.recipes.loading import config_from_dict
from ray_detox.runs.storage import reason_disk_full
from ray_detox.stages import preflight
from ray_detox.stages.cluster.nodes import accepts_connections, alive_nodes, node_name
from ray_detox.stages.errors import last_line

NODE_PROBE_TIMEOUT_S = 60.0
"""Longest wait for all nodes to answer: on a busy node a new process takes seconds to start."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions that must be the same on all nodes."""

    python: str
    """Without the patch number, such as `3.12`."""
    ray: str
    ray_detox: str

    def first_difference(self, other: "Versions") -> tuple[str, str, str] | None:
        """Return the name of the first package that differs, our version, and the other's."""
        names = {"python": "Python", "ray": "Ray", "ray_detox": "ray-detox"}
        mine, theirs = asdict(self), asdict(other)
        return next(
            (
                (name, mine[field], theirs[field])
                for field, name in names.items()
                if mine[field] != theirs[field]
            ),
            None,
        )


def versions() -> Versions:
    """Return the versions of this process."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Versions(python, ray.__version__, __version__)


@dataclass(frozen=True, slots=True)
class Probe:
    """The answer of one node."""

    address: str
    fault: str | None
    """Reason why the node cannot run its share, in one line; None if it can."""
    seconds: float


class NodeGoneError(ConfigError):
    """A node was lost while the driver probed it."""


def probe_nodes(config: RunConfig, *, functions: bool = True) -> list[Probe]:
    """Have every node check what the run needs from it.

    Args:
        config: of the run.
        functions: have the nodes import the reward functions.

    Returns:
        One probe for each node with CPUs or GPUs. Empty if this is the only node:
        `preflight.check` has checked its files already.

    Raises:
        ConfigError: a node has a fault or did not answer; the message has its address.
        NodeGoneError: a node was lost meanwhile. Ray lists a lost node for some time.
    """
    nodes = [node for node in alive_nodes() if {"CPU", "GPU"} & node["Resources"].keys()]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [here]:
        return []
    settings = config.to_dict() if functions else _without_functions(config)
    began = time.monotonic()
    # Start all tasks, then wait once: the slowest node decides how long the probe takes.
    asked = {
        _find_fault_on_node.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(settings, asdict(versions())): node
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
        raise ConfigError(
            f"Node {faulty[0].address}{more} cannot run its share of the run: {faulty[0].fault}"
        )
    return probes


def _without_functions(config: RunConfig) -> dict[str, Any]:
    """Return settings that name no functions, for nodes that must not import any."""
    settings = config.to_dict()
    reward = settings["reward"]
    reward["terms"] = [term for term in reward["terms"] if term["function"] is None]
    reward["weight"] = 1.0  # or, if only functions had a weight, the rest would not be valid
    return settings


def _answer(ref: Any, node: dict[str, Any]) -> str | None:
    try:
        fault: str | None = ray.get(ref)
    except RayError as error:
        is_lost = isinstance(error, NodeDiedError | TaskUnschedulableError)
        if is_lost or not accepts_connections(node):
            raise NodeGoneError(f"Node {node_name(node)} was lost while it was probed.") from None
        return last_line(error)  # for example of a node without this package
    return fault


# The versions travel as plain values: an older package on the node may lack the class `Versions`,
# and the task would fail before it can name the version that it has.
@ray.remote(num_cpus=0, max_retries=0)
def _find_fault_on_node(settings: dict[str, Any], expected: dict[str, str]) -> str | None:
    return find_fault(settings, Versions(**expected))


def find_fault(settings: dict[str, Any], expected: Versions) -> str | None:
    """Find out why this node cannot run its share of a run; None if it can.

    Args:
        settings: of the run, as plain values: another version may have other settings.
        expected: versions of the driver.

    Returns:
        The first fault, in one line.
    """
    # Versions first: settings of another version may not even be valid here.
    differing = versions().first_difference(expected)
    if differing is not None:
        name, mine, theirs = differing
        return (
            f"it has {name} {mine}, and the run was started with {name} {theirs}. "
            "Install the same version on all nodes."
        )
    try:
        preflight.check_reachable(config_from_dict(settings))
    except ConfigError as error:
        return str(error)
    # A worker writes each checkpoint to a temporary folder on its way to the driver.
    reason = reason_disk_full(Path(tempfile.gettempdir()))
    return f"its temporary folder {reason}. Free some disk space there." if reason else None
