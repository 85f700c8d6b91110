"""Admission: wait until the cluster has the resources for a run, and watch that it keeps them.

    start --resources free, probe passes---------------------------------------> admitted
      |                                                                             ^
      |--busy, or an autoscaler may add nodes--> waiting --resources free, probe----|
      |                                             |
      |                                             '--cluster.capacity_timeout_s--> refused
      '--nothing adds nodes, and idle nodes would be too small--------------------> refused

    admitted --a stage lacks resources for cluster.capacity_timeout_s (nodes lost)--> refused

Refused means a `ConfigError` with the shortfall in one sentence. While a run waits and while it
trains, `request_resources` tells the autoscaler what it needs. Every wait here has a timeout.
"""

import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

import ray
from ray.exceptions import RayError

from ray_detox import resources
from ray_detox.config import ConfigError, RunConfig
from ray_detox.resources import Bundle, Phase, shortfall, shortfall_beside
from ray_detox.stages.cluster.nodes import CAPACITY_POLL_S, free_nodes
from ray_detox.stages.cluster.probe import NodeGoneError

T = TypeVar("T")

NODE_JOIN_S = 1.0
"""Time within which all of Ray's processes know of a node that has just joined."""
REQUEST_INTERVAL_S = 5.0
"""Interval between two requests for the same nodes; `wait_for_capacity` says why one is not enough."""
THREAD_END_TIMEOUT_S = 10.0
"""Longest wait for a thread to end: it may be inside a call to Ray that hangs."""


def has_autoscaler() -> bool:
    """Whether an autoscaler may add nodes to this cluster.

    Ray has no function for this, so it is inferred from the names of node types: `ray up` and
    KubeRay start every node with one, and the older autoscaler reports them. Nodes of `ray start`
    and `ray.init` have none, and reports name each of them by its id.
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
    on_wait: Callable[[str], None] = print,
    probe: Callable[[], object] = lambda: None,
) -> resources.Needs:
    """Wait until the cluster has the resources of a run, and return what the run needs.

    Args:
        config: of the run.
        on_wait: called once with a message if the run has to wait.
        probe: checks the nodes once the resources are free, such as `probe_nodes`. It is called
            again if it raises `NodeGoneError`. Until it returns, the request for nodes stands, so
            the autoscaler does not remove a node that was idle while the others started.

    Raises:
        ConfigError: the shortfall. At once if no wait can help, because nothing adds nodes and
            the existing ones are too small even when idle; otherwise after
            `cluster.capacity_timeout_s`.
    """
    began, waiting = time.monotonic(), False
    try:
        while True:
            nodes = free_nodes()
            # GPUs that the settings leave open depend on the nodes, and those may still change.
            need = resources.needs(config, sum(node.total.gpus for node in nodes))
            short = shortfall(need.phases, nodes)
            waited_s = time.monotonic() - began
            if short is None:
                try:
                    probe()
                    return need
                except NodeGoneError:
                    # Not a fault of the run: the next look no longer lists the node.
                    if waited_s >= config.cluster.capacity_timeout_s:
                        raise
                    time.sleep(CAPACITY_POLL_S)
                    continue
            never = shortfall(need.phases, [node.when_idle() for node in nodes])
            grows = has_autoscaler()
            # A driver that has just connected may not see all nodes yet, so it does not refuse
            # a run in its first moments.
            if never and not grows and waited_s >= NODE_JOIN_S:
                raise ConfigError(never)
            if waited_s >= max(NODE_JOIN_S, config.cluster.capacity_timeout_s):
                raise ConfigError(short + (_autoscaler_status() if grows else ""))
            if (grows or not never) and not waiting:
                waiting = True
                on_wait(
                    f"{'':<9} waiting up to {config.cluster.capacity_timeout_s:g} s for resources: "
                    f"{short}"
                )
            if waiting:
                # Repeated, because Ray keeps only the last request of the whole cluster: an actor
                # that Ray Data left behind requests nothing every 20 seconds and so cancels ours.
                _request_capacity(config, need, config.train.min_workers)
            time.sleep(CAPACITY_POLL_S)
    finally:
        if waiting:
            # A request stands until it is withdrawn, and would keep the nodes for ever.
            _request_bundles([])


def _request_capacity(config: RunConfig, need: resources.Needs, workers: int) -> None:
    _request_bundles([need.worker] * workers + [need.actor] * config.reward.min_actors)


@contextmanager
def requesting_workers(config: RunConfig, need: resources.Needs) -> Iterator[None]:
    """Inside, ask the autoscaler for nodes for `train.max_workers` and the least reward actors.

    The driver starts a worker group only when its resources are free, so Ray never sees pending
    workers. Without this request the autoscaler would replace no lost node, and add no node for
    more workers than the minimum. Reward actors above the minimum are pending until they have a
    node, so the autoscaler knows of them.
    """
    if not has_autoscaler():
        yield
        return
    over = threading.Event()

    def keep_requesting() -> None:
        while not over.is_set():
            # If the head is lost, the training stage reports it; this thread need not.
            with suppress(RayError, RuntimeError):
                _request_capacity(config, need, config.train.max_workers)
            over.wait(REQUEST_INTERVAL_S)

    thread = threading.Thread(target=keep_requesting, name="requesting-workers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        # Joined before the withdrawal, or the thread could repeat its request after it.
        thread.join(REQUEST_INTERVAL_S)
        with suppress(RayError, RuntimeError):
            _request_bundles([])


def _request_bundles(bundles: list[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{"CPU": b.cpus, "GPU": b.gpus} for b in bundles])


def _autoscaler_status() -> str:
    """Return what the autoscaler reports about nodes that have not started, for an error message."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
    except (RayError, RuntimeError, AssertionError):
        # The older autoscaler has no such status; the shortfall is worth reporting without it.
        return ""
    reported = [
        f"{launch.count} x {launch.ray_node_type_name} failed: {launch.details}"
        for launch in status.failed_launches
    ]
    reported += [
        f"{x.count} x {x.ray_node_type_name} is requested" for x in status.pending_launches
    ]
    reported += [f"a {node.ray_node_type_name} is starting" for node in status.pending_nodes]
    return f" The autoscaler: {'; '.join(reported[:4])}." if reported else ""


class CapacityWatchdog:
    """Notices that a stage waits for resources that the cluster no longer has.

    Args:
        config: of the run.
        phase: of `Needs.phases`; its reward actors are already on their nodes.
    """

    def __init__(self, config: RunConfig, phase: Phase) -> None:
        self._config = config
        self._phase = phase
        self._last_progress = self._last_check = time.monotonic()

    def check(self, something_happened: bool = False) -> None:
        """Compare the phase with the nodes; call it repeatedly.

        Args:
            something_happened: the stage made progress, so it does have resources.

        Raises:
            ConfigError: the resources have been missing for `cluster.capacity_timeout_s`, and the
                stage made no progress in that time.
        """
        now = time.monotonic()
        if something_happened:
            self._last_progress = now
        # Each look opens a connection to every node, so it is not made on every call.
        if now - self._last_check < CAPACITY_POLL_S:
            return
        self._last_check = now
        # As if idle: the stage itself holds resources, which it will use or release.
        short = shortfall_beside(self._phase, [node.when_idle() for node in free_nodes()])
        if short is None:
            self._last_progress = now
        elif now - self._last_progress > self._config.cluster.capacity_timeout_s:
            raise ConfigError(short)


def run_with_watchdog(work: Callable[[], T], watchdog: CapacityWatchdog) -> T:
    """Run `work` on a thread and return its result; abandon it when the watchdog raises.

    Ray Data waits for ever for resources that were lost, and offers no timeout.

    Raises:
        ConfigError: from `watchdog`.
    """
    ended: Future[T] = Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:  # raised again by the thread that waits
            ended.set_exception(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        while True:
            try:
                return ended.result(timeout=CAPACITY_POLL_S)
            except TimeoutError:
                if ended.done():  # `work` itself raised a TimeoutError
                    raise
                watchdog.check()
    except BaseException:
        _end_thread(worker)
        raise


def _end_thread(worker: threading.Thread) -> None:
    """Raise SystemExit inside a thread and wait until it ends.

    The thread must not outlive the connection: a call to Ray after `ray.shutdown` would end the
    whole process. SystemExit leaves Ray Data as Ctrl-C does, which also ends the threads that Ray
    Data started. Python offers this only through its C API.
    """
    if worker.ident is not None and worker.is_alive():
        thread, reason = ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, reason)
        worker.join(THREAD_END_TIMEOUT_S)
