"""The nodes of the connected cluster: which are alive, what is free on them, which are draining.

    alive --drain--> draining --ends--> dead          Ray's view
      '-----crash or network cut------> dead          up to half a minute before Ray sees it

A node counts as usable if Ray lists it as alive, it is not draining, and it accepts a connection.
"""

import socket
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox import resources
from ray_detox.resources import Bundle, Node, placement

CAPACITY_POLL_S = 0.5
"""Interval between two queries for the free resources of the nodes."""
CONNECT_TIMEOUT_S = 1.0
"""Longest wait for a node to accept a connection."""


def free_nodes() -> list[Node]:
    """Return every usable node with what is free on it."""
    # Private, because Ray's public functions return only sums over all nodes, and include nodes
    # that are draining.
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
        # The two lists are read one after the other, and a node may join in between.
        if node["NodeID"] in total and accepts_connections(node)
    ]


def staying_nodes() -> set[str]:
    """Return the ids of the usable nodes."""
    return {node["NodeID"] for node in alive_nodes() if accepts_connections(node)}


def place_actors(need: resources.Needs) -> list[str]:
    """Return a node id for each reward actor that a run must have.

    The actors start before the workers. Left alone, Ray might put them on a node that is the only
    one large enough for a worker; this placement leaves room for both.
    """
    nodes = free_nodes()
    placed = placement(need.training, nodes)
    return [
        node.node_id for node, (_, actors) in zip(nodes, placed, strict=True) for _ in range(actors)
    ]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy for actors and tasks that must stay on this process's node.

    Such an actor is lost only if the driver's node is lost, which ends the run anyway.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are about to be removed."""
    from ray._private import state

    return set(state.state.get_draining_nodes())


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive and not draining."""
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def accepts_connections(node: dict[str, Any]) -> bool:
    """Whether a node accepts a connection: Ray lists a lost node for up to half a minute."""
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def node_name(node: dict[str, Any]) -> str:
    """Return the address of a node and the beginning of its id, for messages."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _bundle(amounts: dict[str, float]) -> Bundle:
    return Bundle(amounts.get("CPU", 0.0), amounts.get("GPU", 0.0))
