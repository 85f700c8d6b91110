"""A look at the connected cluster before a run takes it: is there room, can every node do its part?

    wait_for_room   nodes --> room.shortage --> none: go on
                                            --> nothing can add nodes, and idle ones would not do: refuse
                                            --> else wait, cluster.patience_s at most
    probe_nodes     every node at once: look at what the run names, versions, disk
                                            --> the first fault, with its node
    free_nodes, draining_nodes              what `stages/workers.py` goes by when nodes come and go
    asking_for_workers                      an autoscaler brings nodes for as many workers as may be

No wait here is without an end.
"""

import ctypes
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox import __version__, preflight
from ray_detox.config import ConfigError, RunConfig, config_from_dict
from ray_detox.room import Bundle, Node, Phase, place, shortage, shortage_beside

T = TypeVar("T")

POLL_S = 0.5
SETTLE_S = 1.0
"""A node that has just joined is seen by all of Ray within this time."""
PROBE_S = 60.0
"""Longest wait for the nodes to answer; a first process on a busy node takes seconds to start."""
ASK_S = 5.0
"""Between two requests for the same nodes; see `wait_for_room` on why one is not enough."""
KNOCK_S = 1.0
"""Longest wait for a node to take a connection."""
END_S = 10.0
"""Longest wait for a thread that was told to end; it may wait within Ray for what is lost."""


# ---- room ------------------------------------------------------------------------------------


def free_nodes() -> list[Node]:
    """Every node that answers and is not being drained, with what is free on it."""
    # Private, as the public functions have sums alone, and know no draining.
    from ray._private import state

    total, free = state.total_resources_per_node(), state.available_resources_per_node()
    return [
        Node(
            _name(node),
            _bundle(total[node["NodeID"]]),
            _bundle(free.get(node["NodeID"], {})),
            node["NodeID"],
        )
        for node in _alive()
        if node["NodeID"] in total and _answers(node)
    ]


def staying_nodes() -> set[str]:
    """Ids of the nodes that answer and are not being drained."""
    return {node["NodeID"] for node in _alive() if _answers(node)}


def nodes_for_actors(need: preflight.Needs) -> list[str]:
    """Ids of the nodes for the reward actors that a run must have, one for each.

    They come up before the workers do. Ray would put them on any node with room, such as one of the
    two that alone are large enough for a worker.
    """
    nodes = free_nodes()
    placement = place(need.training, nodes)
    return [
        node.node_id
        for node, (_, actors) in zip(nodes, placement, strict=True)
        for _ in range(actors)
    ]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Where an actor or a task goes that is to be lost with this process only."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def draining_nodes() -> set[str]:
    """Ids of the nodes that are to go."""
    from ray._private import state

    return set(state.state.get_draining_nodes())


def _alive() -> list[dict[str, Any]]:
    draining = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node takes a connection: Ray lists one that was cut off for half a minute more."""
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=KNOCK_S).close()
    except OSError:
        return False
    return True


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _bundle(resources: dict[str, float]) -> Bundle:
    return Bundle(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def has_autoscaler() -> bool:
    """Whether something may add nodes to this cluster.

    Ray does not tell. What gives it away are names of node types: `ray up` and KubeRay start every
    node with one, and the older autoscaler reports them; the nodes of `ray start` and `ray.init`
    have none, and reports call each by its id.
    """
    if any(node["Labels"].get("ray.io/node-group") for node in ray.nodes()):
        return True
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (report.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return any(not name.startswith("node_") for name in types.values())


def wait_for_room(
    config: RunConfig,
    say: Callable[[str], None] = print,
    look: Callable[[], object] = lambda: None,
) -> preflight.Needs:
    """Wait until the cluster has what a run needs, and return what that is.

    Args:
        config: of the run.
        say: is told once, if there is something to wait for.
        look: at the nodes, once there is room; again where one of them went away meanwhile. Until
            it has returned, none is removed that has been idle for too long by then, waiting for
            the others.

    Raises:
        ConfigError: what is short. At once where no wait could help: nothing adds nodes, and those
            there are would be too small even if they were idle. Else after `cluster.patience_s`.
    """
    began, waiting = time.monotonic(), False
    try:
        while True:
            nodes = free_nodes()
            need = preflight.needs(config, sum(node.total.gpus for node in nodes))
            short = shortage(need.phases, nodes)
            waited_s = time.monotonic() - began
            if short is None:
                try:
                    look()
                    return need
                except NodeGoneError:
                    if waited_s >= config.cluster.patience_s:
                        raise
                    time.sleep(POLL_S)
                    continue
            never = shortage(need.phases, [node.when_idle() for node in nodes])
            grows = has_autoscaler()
            if never and not grows and waited_s >= SETTLE_S:
                raise ConfigError(never)
            if waited_s >= max(SETTLE_S, config.cluster.patience_s):
                raise ConfigError(short + (_launches() if grows else ""))
            if (grows or not never) and not waiting:
                waiting = True
                say(f"{'':<9} waiting up to {config.cluster.patience_s:g} s for room: {short}")
            if waiting:
                # Again and again: a cluster keeps the last request alone, and where Ray Data has
                # been used before, an actor that it left asks for nothing every 20 seconds.
                _ask_for(config, need, config.train.least_workers)
            time.sleep(POLL_S)
    finally:
        if waiting:
            # What was asked for stands until it is taken back, and would hold nodes for ever.
            _request([])


def _ask_for(config: RunConfig, need: preflight.Needs, workers: int) -> None:
    _request([need.worker] * workers + [need.actor] * config.reward.least_actors)


@contextmanager
def asking_for_workers(config: RunConfig, need: preflight.Needs) -> Iterator[None]:
    """Inside, an autoscaler keeps nodes for as many workers as may be, and for the least actors.

    A group waits for its room before it starts, so nothing of it is ever pending: without this
    nobody would bring another node for one that was lost, nor those for more workers than the least.
    Actors above the least are pending until they have a node, which is asking enough.
    """
    if not has_autoscaler():
        yield
        return
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            # Where the head is lost, who trains will say so.
            with suppress(RayError, RuntimeError):
                _ask_for(config, need, config.train.most_workers)
            over.wait(ASK_S)

    asking = threading.Thread(target=ask, name="asking-for-workers", daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join(ASK_S)
        with suppress(RayError, RuntimeError):
            _request([])


def _request(bundles: list[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"CPU": b.cpus, "GPU": b.gpus} for b in bundles])


def _launches() -> str:
    """What the autoscaler says about nodes that do not come."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except (RayError, RuntimeError, AssertionError):
        return ""
    said = [
        f"{launch.count} x {launch.ray_node_type_name} failed: {launch.details}"
        for launch in status.failed_launches
    ]
    said += [f"{x.count} x {x.ray_node_type_name} is asked for" for x in status.pending_launches]
    said += [f"a {node.ray_node_type_name} is starting" for node in status.pending_nodes]
    return f" The autoscaler: {'; '.join(said[:4])}." if said else ""


class Patience:
    """Notices that a stage waits for room that the cluster no longer has.

    Args:
        config: of the run.
        phase: of `Needs.phases`; its reward actors are on their nodes already.
    """

    def __init__(self, config: RunConfig, phase: Phase) -> None:
        self._config = config
        self._phase = phase
        self._since = self._looked = time.monotonic()

    def check(self, something_happened: bool = False) -> None:
        """Call again and again.

        Raises:
            ConfigError: nothing happened, nor could, for `cluster.patience_s`.
        """
        now = time.monotonic()
        if something_happened:
            self._since = now
        if now - self._looked < POLL_S:
            return
        self._looked = now
        short = shortage_beside(self._phase, [node.when_idle() for node in free_nodes()])
        if short is None:
            self._since = now
        elif now - self._since > self._config.cluster.patience_s:
            raise ConfigError(short)


def attended(work: Callable[[], T], patience: Patience) -> T:
    """What `work` returns; given up where Ray would wait for ever for nodes that are gone.

    Raises:
        ConfigError: from `patience`.
    """
    ended: Future[T] = Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:  # handed to the thread that waits
            ended.set_exception(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        while True:
            try:
                return ended.result(timeout=POLL_S)
            except TimeoutError:
                if ended.done():  # it is what the work raised
                    raise
                patience.check()
    except BaseException:
        _end(worker)
        raise


def _end(worker: threading.Thread) -> None:
    """Have a thread leave what it does: were it to call Ray after Ray's shutdown, the process would end.

    It leaves Ray Data as Ctrl-C would, which ends the threads below it.
    """
    if worker.ident is not None and worker.is_alive():
        thread, reason = ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, reason)
        worker.join(END_S)


# ---- nodes -----------------------------------------------------------------------------------


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
    nodes = [node for node in _alive() if {"CPU", "GPU"} & node["Resources"].keys()]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [here]:
        return []
    began = time.monotonic()
    asked = {
        _look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(config.to_dict(), versions()): node
        for node in nodes
    }
    probes, waiting = [], list(asked)
    while waiting and (left_s := PROBE_S - (time.monotonic() - began)) > 0:
        done, waiting = ray.wait(waiting, timeout=left_s)
        seconds = time.monotonic() - began
        probes += [Probe(_name(asked[ref]), _answer(ref, asked[ref]), seconds) for ref in done]
    for ref in waiting:
        ray.cancel(ref, force=True)
        fault = f"it did not answer within {PROBE_S:g} s."
        probes.append(Probe(_name(asked[ref]), fault, PROBE_S))
    faulty = [probe for probe in probes if probe.fault]
    if faulty:
        more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
        raise ConfigError(f"Node {faulty[0].address}{more} cannot do its part: {faulty[0].fault}")
    return probes


def _answer(ref: Any, node: dict[str, Any]) -> str | None:
    try:
        fault: str | None = ray.get(ref)
    except RayError as error:
        if isinstance(error, NodeDiedError | TaskUnschedulableError) or not _answers(node):
            raise NodeGoneError(f"Node {_name(node)} went away while it was asked.") from None
        return one_line(error)  # such as that of a node without this package
    return fault


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"Python": python, "Ray": ray.__version__, "ray-detox": __version__}


@ray.remote(num_cpus=0, max_retries=0)
def _look(settings: dict[str, Any], expected: dict[str, str]) -> str | None:
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


def one_line(error: BaseException) -> str:
    """The cause of an error of Ray: its last line; those before say where in Ray it came up."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
