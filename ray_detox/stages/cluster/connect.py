"""Reach a Ray cluster, or start one on this machine; every way that fails ends in one sentence.

    cluster.address   auto, local                  host:port
    first             GPUs counted                 knock: a second, where ray.init would wait minutes
    then              ray.init(address="local")    ray.init(address)
    then              stages/live.py: is there room, and can every node do its part?

Ray is imported inside the functions: it reads how to sign in once, when it is imported.
"""

import logging
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ray_detox import resources
from ray_detox.config import ConfigError, RunConfig
from ray_detox.runs.console import Console

GCS_PROBE_TIMEOUT_S = 5.0
"""Longest wait for a cluster to say that it is there."""


@contextmanager
def cluster(config: RunConfig, console: Console) -> Iterator[resources.Needs]:
    """Connect to the cluster, or start one here, and see that it has room and can do the run.

    Raises:
        ConfigError: it is not there, too small, or a node of it cannot do its part.
    """
    with connected(config, console):
        from ray_detox.stages.cluster import admission, probe

        yield admission.wait_for_capacity(
            config, say=console.line, look=lambda: probe.probe_nodes(config)
        )


@contextmanager
def connected(config: RunConfig, console: Console) -> Iterator[None]:
    """Inside, Ray is connected; a connection that was there before is left as it is.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    # The embedded engine, in every process: awswrangler would start a Ray of its own otherwise.
    os.environ.setdefault("WR_ENGINE", "python")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A worker that hangs is given up after this long, and not after ten minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local(config) and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # A cluster of our own takes no strangers: a token that only its processes know. Ray reads
        # this once, when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    # What dies is told by the run itself, in a line. Ray would print a page for each, past our
    # console and into the JSON of `--json`; its only switch is this function.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    if ray.is_initialized():
        yield
        return
    with console.stage(
        "cluster", "this machine" if is_local(config) else config.cluster.address
    ) as made:
        _connect(config)
        total = ray.cluster_resources()
        made.append(
            f"{len(ray.nodes())} node(s), {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        )
    try:
        yield
    finally:
        ray.shutdown()


def is_local(config: RunConfig) -> bool:
    """True where the run starts a Ray of its own on this machine."""
    address = config.cluster.address
    return address == "local" or (address == "auto" and "RAY_ADDRESS" not in os.environ)


def count_gpus() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _connect(config: RunConfig) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if is_local(config):
        need = resources.needs(config, count_gpus())
        # Ray hands the path of Python to a shell as it is, and a checkout may lie under one with
        # a space.
        quoted = shlex.quote(sys.executable)
        # address: or it would join any other Ray on this machine. CPUs are only accounted for,
        # not bound, so a small machine can run what a larger one would.
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(need.cpus + 0.999)),
            include_dashboard=False,
            runtime_env={} if quoted == sys.executable else {"py_executable": quoted},
            **quiet,
        )
        return
    address = config.cluster.address
    if address == "auto":
        address = os.environ["RAY_ADDRESS"]
    # RAY_ADDRESS=auto, which Ray resolves from its own files.
    if address != "auto":
        _probe_gcs(address)
    try:
        ray.init(address=address, **quiet)
    except (RuntimeError, OSError, ValueError, AssertionError, ray.exceptions.RayError) as error:
        # Another version of Python, or no node of that cluster on this machine: Ray says which.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The Ray cluster at {address} did not take this process: {reason}"
        ) from (error)


def _probe_gcs(address: str) -> None:
    """See that a Ray of our version answers and lets us in; `ray.init` would try for minutes.

    Raises:
        ConfigError: nobody is there, no Ray, another version, or it wants a token.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()) or "/" in address:
        raise ConfigError(
            f"The address of the cluster is {address!r}; expected host:port, such as 10.0.0.1:6379."
        )
    import grpc
    import ray

    # Private, as Ray offers no check with a deadline: the question that its own processes ask.
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    try:
        # No proxy, as in Ray's own connections.
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            answer = service.CheckAlive(
                gcs_service_pb2.CheckAliveRequest(), timeout=GCS_PROBE_TIMEOUT_S
            )
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(
                f"The Ray cluster at {address} wants a token, and has not been shown the right one. "
                "Set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or keep the token in "
                "~/.ray/auth_token."
            ) from error
        reason = (error.details() or error.code().name).rpartition(": ")[2].strip(" .]")
        raise ConfigError(
            f"No Ray cluster answers at {address} ({reason}). Check cluster.address (host:port of "
            "the head node, 6379 if it was not changed) and that it is running."
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(
            f"RAY_AUTH_MODE is token, and there is no token to show to the cluster at {address}. "
            "Set RAY_AUTH_TOKEN, or keep the token in ~/.ray/auth_token."
        ) from error
    if answer.ray_version != ray.__version__:
        raise ConfigError(
            f"The cluster at {address} runs Ray {answer.ray_version}, and here is Ray "
            f"{ray.__version__}. Install the same version on both sides."
        )
