"""A look at the connected cluster before a run takes it: is there room, can every node do its part?

    wait_for_capacity   nodes --> room.shortfall --> none: go on
                                            --> nothing can add nodes, and idle ones would not do: refuse
                                            --> else wait, cluster.capacity_timeout_s at most
    probe_nodes     every node at once: look at what the run names, versions, disk
                                            --> the first fault, with its node
    free_nodes, draining_nodes              what `stages/workers.py` goes by when nodes come and go
    requesting_workers                      an autoscaler brings nodes for as many workers as may be

No wait here is without an end.
"""

import socket
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox import resources
from ray_detox.resources import Bundle, Node, placement

T = TypeVar("T")

CAPACITY_POLL_S = 0.5
CONNECT_TIMEOUT_S = 1.0
"""Longest wait for a node to take a connection."""


# ---- room ------------------------------------------------------------------------------------


def free_nodes() -> list[Node]:
    """Every node that answers and is not being drained, with what is free on it."""
    # Private, as the public functions have sums alone, and know no draining.
    from ray._private import state

    total, free = state.total_resources_per_node(), state.available_resources_per_node()
    return [
        Node(
            node_name(node),
            _bundle(total[node["NodeID"]]),
            _bundle(free.get(node["NodeID"], {})),
            node["NodeID"],
        )
        for node in alive_nodes()
        if node["NodeID"] in total and takes_connections(node)
    ]


def staying_nodes() -> set[str]:
    """Ids of the nodes that answer and are not being drained."""
    return {node["NodeID"] for node in alive_nodes() if takes_connections(node)}


def place_actors(need: resources.Needs) -> list[str]:
    """Ids of the nodes for the reward actors that a run must have, one for each.

    They come up before the workers do. Ray would put them on any node with room, such as one of the
    two that alone are large enough for a worker.
    """
    nodes = free_nodes()
    placed = placement(need.training, nodes)
    return [
        node.node_id for node, (_, actors) in zip(nodes, placed, strict=True) for _ in range(actors)
    ]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor or a task goes that is to be lost with this process only."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go."""
    from ray._private import state

    return set(state.state.get_draining_nodes())


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive and not being drained."""
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def takes_connections(node: dict[str, Any]) -> bool:
    """Whether a node takes a connection: Ray lists one that was cut off for half a minute more."""
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def node_name(node: dict[str, Any]) -> str:
    """Address of a node with the beginning of its id, for messages."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _bundle(resources: dict[str, float]) -> Bundle:
    return Bundle(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


# ---- nodes -----------------------------------------------------------------------------------
