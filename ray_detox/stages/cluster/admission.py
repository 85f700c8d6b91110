"""Admission: wait until the cluster has the resources for a run, and watch that it keeps them."""

import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import RayError

from ray_detox import resources
from ray_detox.config import ConfigError, RunConfig
from ray_detox.resources import Bundle, Phase, shortfall, shortfall_beside
from ray_detox.stages.cluster.nodes import CAPACITY_POLL_S, T, free_nodes
from ray_detox.stages.cluster.probe import NodeGoneError

NODE_JOIN_S = 1.0
"""A node that has just joined is seen by all of Ray within this time."""


REQUEST_INTERVAL_S = 5.0
"""Between two requests for the same nodes; see `wait_for_capacity` on why one is not enough."""


THREAD_END_TIMEOUT_S = 10.0
"""Longest wait for a thread that was told to end; it may wait within Ray for what is lost."""


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


def wait_for_capacity(
    config: RunConfig,
    say: Callable[[str], None] = print,
    look: Callable[[], object] = lambda: None,
) -> resources.Needs:
    """Wait until the cluster has what a run needs, and return what that is.

    Args:
        config: of the run.
        say: is told once, if there is something to wait for.
        look: at the nodes, once there is room; again where one of them went away meanwhile. Until
            it has returned, none is removed that has been idle for too long by then, waiting for
            the others.

    Raises:
        ConfigError: what is short. At once where no wait could help: nothing adds nodes, and those
            there are would be too small even if they were idle. Else after `cluster.capacity_timeout_s`.
    """
    began, waiting = time.monotonic(), False
    try:
        while True:
            nodes = free_nodes()
            need = resources.needs(config, sum(node.total.gpus for node in nodes))
            short = shortfall(need.phases, nodes)
            waited_s = time.monotonic() - began
            if short is None:
                try:
                    look()
                    return need
                except NodeGoneError:
                    if waited_s >= config.cluster.capacity_timeout_s:
                        raise
                    time.sleep(CAPACITY_POLL_S)
                    continue
            never = shortfall(need.phases, [node.when_idle() for node in nodes])
            grows = has_autoscaler()
            if never and not grows and waited_s >= NODE_JOIN_S:
                raise ConfigError(never)
            if waited_s >= max(NODE_JOIN_S, config.cluster.capacity_timeout_s):
                raise ConfigError(short + (_autoscaler_status() if grows else ""))
            if (grows or not never) and not waiting:
                waiting = True
                say(
                    f"{'':<9} waiting up to {config.cluster.capacity_timeout_s:g} s for room: {short}"
                )
            if waiting:
                # Again and again: a cluster keeps the last request alone, and where Ray Data has
                # been used before, an actor that it left asks for nothing every 20 seconds.
                _request_capacity(config, need, config.train.min_workers)
            time.sleep(CAPACITY_POLL_S)
    finally:
        if waiting:
            # What was asked for stands until it is taken back, and would hold nodes for ever.
            _request_bundles([])


def _request_capacity(config: RunConfig, need: resources.Needs, workers: int) -> None:
    _request_bundles([need.worker] * workers + [need.actor] * config.reward.min_actors)


@contextmanager
def requesting_workers(config: RunConfig, need: resources.Needs) -> Iterator[None]:
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
                _request_capacity(config, need, config.train.max_workers)
            over.wait(REQUEST_INTERVAL_S)

    asking = threading.Thread(target=ask, name="asking-for-workers", daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join(REQUEST_INTERVAL_S)
        with suppress(RayError, RuntimeError):
            _request_bundles([])


def _request_bundles(bundles: list[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"CPU": b.cpus, "GPU": b.gpus} for b in bundles])


def _autoscaler_status() -> str:
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


class CapacityWatchdog:
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
            ConfigError: nothing happened, nor could, for `cluster.capacity_timeout_s`.
        """
        now = time.monotonic()
        if something_happened:
            self._since = now
        if now - self._looked < CAPACITY_POLL_S:
            return
        self._looked = now
        short = shortfall_beside(self._phase, [node.when_idle() for node in free_nodes()])
        if short is None:
            self._since = now
        elif now - self._since > self._config.cluster.capacity_timeout_s:
            raise ConfigError(short)


def run_with_watchdog(work: Callable[[], T], patience: CapacityWatchdog) -> T:
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
                return ended.result(timeout=CAPACITY_POLL_S)
            except TimeoutError:
                if ended.done():  # it is what the work raised
                    raise
                patience.check()
    except BaseException:
        _end_thread(worker)
        raise


def _end_thread(worker: threading.Thread) -> None:
    """Have a thread leave what it does: were it to call Ray after Ray's shutdown, the process would end.

    It leaves Ray Data as Ctrl-C would, which ends the threads below it.
    """
    if worker.ident is not None and worker.is_alive():
        thread, reason = ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, reason)
        worker.join(THREAD_END_TIMEOUT_S)
