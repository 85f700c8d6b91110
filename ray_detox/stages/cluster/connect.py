"""Connect to a Ray cluster, or start one on this machine.

    cluster.address   local, or auto without RAY_ADDRESS     host:port, or auto with RAY_ADDRESS
    first             count this machine's GPUs              probe the GCS: seconds, not minutes
    then              ray.init(address="local")              ray.init(address)
    then              admission.py: wait for the resources and probe every node

Every failure becomes a `ConfigError` of one line. Functions import Ray themselves, because Ray reads
its environment (authentication, for example) once, when it is imported.
"""

import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ray_detox import resources
from ray_detox.config import ConfigError, RunConfig
from ray_detox.machine import cpu_count
from ray_detox.recipes.loading import FOLDERS_VARIABLE
from ray_detox.recipes.names import JOB_VARIABLE
from ray_detox.runs.console import Console
from ray_detox.runs.printable import counted
from ray_detox.signals import defer_signals, end_on_signal
from ray_detox.stages.cluster.private import (
    LOOPBACK,
    loopback_allowed,
    private_folder,
    shared_memory_folder,
)

GCS_PROBE_TIMEOUT_S = 5.0
"""Longest wait for the head's GCS (global control service) to answer."""


@contextmanager
def cluster(config: RunConfig, console: Console) -> Iterator[resources.Needs]:
    """Connect to the cluster, or start one here, and wait until it is admitted to run `config`.

    Raises:
        ConfigError: the cluster cannot be reached, is too small, or a node failed its probe.
    """
    with connected(config, console):
        from ray_detox.stages.cluster import admission, probe

        yield admission.wait_for_capacity(
            config, on_wait=console.line, probe=lambda: probe.probe_nodes(config)
        )


@contextmanager
def connected(config: RunConfig, console: Console) -> Iterator[None]:
    """Inside, Ray is connected; keeps a connection that existed before.

    SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    # In every process: awswrangler chooses Ray as its engine when Ray is installed, and would start
    # its own cluster.
    os.environ.setdefault("WR_ENGINE", "python")
    # Ray Train notices a dead worker at its next check. Its own default is two seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Train gives up a worker that hangs after this long. Its own default is ten minutes.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # An actor for each worker group that watches for draining nodes, as `stages/train.py` does.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local(config) and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Other users of this machine can reach the ports of a local cluster, so it gets a token that
        # only its own processes know. Ray reads it once, when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    # The run itself reports a dead process in one line. Ray would print a page for each, past our
    # console and into the JSON of `--json`, and replacing this function is the only way to stop it.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    with end_on_signal():
        if ray.is_initialized():
            yield
            return
        address = "this machine" if is_local(config) else config.cluster.address
        with private_folder() if is_local(config) else nullcontext() as folder:
            try:
                with console.stage("cluster", address) as made:
                    # Ray's own processes ignore both then, as they ignore SIGINT. A shell,
                    # `timeout`, Slurm and systemd send it to all processes of a job, and Ray must not
                    # end before the driver has a checkpoint.
                    with defer_signals():
                        _connect(config, folder)
                    total = ray.cluster_resources()
                    made.append(
                        f"{counted(len(ray.nodes()), 'node')}, {counted(total.get('CPU', 0), 'CPU')}, "
                        f"{counted(total.get('GPU', 0), 'GPU')}"
                    )
                    if folder is not None and total.get("CPU", 0) > (have := cpu_count()):
                        made.append(
                            f"this machine has {have} CPUs for {total['CPU']:g}: processes share them"
                        )
                yield
            finally:
                _disconnect()


def is_local(config: RunConfig) -> bool:
    """Return whether the run starts its own Ray cluster on this machine."""
    address = config.cluster.address
    given = os.environ.get("RAY_ADDRESS", "").strip()
    return address == "local" or (address == "auto" and given in ("", "local"))


def count_gpus() -> int:
    """Return the number of GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _connect(config: RunConfig, folder: Path | None) -> None:
    """Connect to the cluster; with `folder`, start one here whose files are in that folder."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if folder is not None:
        need = resources.needs(config, count_gpus())
        # Ray passes the path of Python to a shell without quotes, and the path of a checkout may
        # contain a space.
        quoted = shlex.quote(sys.executable)
        # address="local", or Ray would join another cluster on this machine. Ray only counts CPUs
        # and binds no process to them, so a machine with few CPUs can run what asks for more.
        try:
            with loopback_allowed():
                ray.init(
                    address="local",
                    num_cpus=max(cpu_count(), int(need.cpus + 0.999)),
                    include_dashboard=False,
                    runtime_env={} if quoted == sys.executable else {"py_executable": quoted},
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder),
                    _plasma_directory=shared_memory_folder(folder),
                    **quiet,
                )
        except (
            Exception
        ) as error:  # Ray raises Exception itself if a process of its does not come up
            raise ConfigError(
                f"Ray did not start on this machine ({one_line(error)}). {_logs(folder)}Is there enough "
                "free memory and disk, and may this user start processes and listen on 127.0.0.1?"
            ) from error
        return
    address = config.cluster.address
    setting = "cluster.address"
    if address == "auto":
        address, setting = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    # With RAY_ADDRESS=auto only Ray knows the address: it reads it from its own files.
    if address != "auto":
        _probe_gcs(address, setting)
    try:
        ray.init(address=address, runtime_env=_import_folders(), **quiet)
    except Exception as error:  # Ray raises Exception itself, beside its own errors
        # For example another version of Python, or no node of that cluster on this machine. Ray's
        # message says which, but on several lines.
        raise ConfigError(
            f"The Ray cluster at {address} refused this process: {one_line(error)}"
        ) from error


def _disconnect() -> None:
    """End the connection, and Ray's processes if `_connect` has started them."""
    import ray

    node = ray._private.worker._global_node
    if node is not None:
        # They do without a regular end. `ray.shutdown` would send them SIGTERM, which is blocked,
        # and wait for a second each.
        for end in (node.kill_dashboard, node.kill_log_monitor, node.kill_monitor):
            end(check_alive=False)
    ray.shutdown()


def _import_folders() -> dict[str, Any]:
    """Return a runtime environment in which a cluster's processes look where this one looks for functions.

    A submitted job has one already: all of its processes start in the folder of what was sent.
    """
    folders = os.environ.get(FOLDERS_VARIABLE)
    if not folders or os.environ.get(JOB_VARIABLE):
        return {}
    return {"env_vars": {FOLDERS_VARIABLE: folders}}


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, or its type if it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _logs(folder: Path) -> str:
    """Keep Ray's logs of a start that failed, and say where they are."""
    found = sorted(folder.glob("session_2*/logs"))
    if not found:
        return ""
    kept = Path(tempfile.mkdtemp(prefix="ray-detox-")) / "logs"  # in a folder with mode 0700
    shutil.copytree(found[-1], kept, ignore_dangling_symlinks=True)
    return f"Its logs are in {kept}. "


def _probe_gcs(address: str, setting: str = "cluster.address") -> None:
    """Check that a Ray cluster of our version answers and accepts our token.

    `ray.init` would find the same out, but retries for minutes first.

    Raises:
        ConfigError: nothing answers at the address, something else than Ray does, Ray has another
            version, or it wants another token.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()) or "/" in address:
        raise ConfigError(
            f"The address of the cluster is {address!r} ({setting}); expected host:port, such as "
            "10.0.0.1:6379. With the address of a dashboard, use ray-detox submit --address."
        )
    import grpc
    import ray

    # Private, because Ray offers no check with a timeout. Ray's own processes send this request.
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    try:
        # Without an HTTP proxy, as in Ray's own connections.
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            answer = service.CheckAlive(
                gcs_service_pb2.CheckAliveRequest(), timeout=GCS_PROBE_TIMEOUT_S
            )
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(
                f"The Ray cluster at {address} wants a token, and did not get the right one. "
                "Set RAY_AUTH_MODE=token with RAY_AUTH_TOKEN, or keep the token in "
                "~/.ray/auth_token."
            ) from error
        reason = (error.details() or error.code().name).rpartition(": ")[2].strip(" .]")
        raise ConfigError(
            f"No Ray cluster answers at {address} ({reason}). Check cluster.address (host:port of "
            "the head node; the port is 6379 by default) and that the cluster is running."
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise ConfigError(
            f"RAY_AUTH_MODE is token, but there is no token for the cluster at {address}. "
            "Set RAY_AUTH_TOKEN, or keep the token in ~/.ray/auth_token."
        ) from error
    if answer.ray_version != ray.__version__:
        raise ConfigError(
            f"The cluster at {address} runs Ray {answer.ray_version}, and here is Ray "
            f"{ray.__version__}. Install the same version on both sides."
        )
