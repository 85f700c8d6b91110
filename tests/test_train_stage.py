"""The one-line description of a failed worker group, and the network interface of gloo."""

import importlib
import os
import socket
from datetime import timedelta
from unittest.mock import patch

import psutil
import pytest
import ray.util
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from ray_detox.stages.errors import describe
from ray_detox.stages.train import choose_interface

# By name: torch.distributed has a function of the same name.
RENDEZVOUS = importlib.import_module("torch.distributed.rendezvous")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undo what `choose_interface` changes in this process."""
    monkeypatch.setattr(RENDEZVOUS, "TCPStore", RENDEZVOUS.TCPStore)
    with patch.dict(os.environ):
        yield


class Died(Exception):
    """The error of Ray Train for a worker whose process has died."""

    def __init__(self, failure):
        super().__init__("A worker health check failed.\nWorker info: Worker(\n  ...\n)")
        self.health_check_failure = failure


def test_the_worker_that_died_is_named_instead_of_its_peers():
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")
    error = WorkerGroupError("...", {0: lost, 1: Died(ActorDiedError())})

    assert describe(error) == "worker 1 died (ActorDiedError)"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            WorkerGroupError("...", {2: ValueError("rows differ\n\nthe reason")}),
            "worker 2 failed with ValueError: the reason",
        ),
        (
            WorkerGroupError(
                "...", {1: RuntimeError("[gloo] Connection closed by peer [::1]:4711")}
            ),
            "worker 1 lost its connection to another worker",
        ),
        (RuntimeError("the controller is gone"), "RuntimeError: the controller is gone"),
        (RuntimeError(), "RuntimeError: no message"),
    ],
)
def test_a_failed_group_is_described_by_its_cause(error, message):
    assert describe(error) == message


def test_the_root_cause_behind_wrapped_errors_is_found():
    inner = ValueError("no such label")
    outer = RuntimeError("a page of traceback")
    outer.__cause__ = inner

    error = WorkerGroupError("...", {0: outer})

    assert describe(error) == "worker 0 failed with ValueError: no such label"


def test_gloo_is_bound_to_the_network_interface_of_ray(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    choose_interface()

    chosen = os.environ.pop("GLOO_SOCKET_IFNAME")
    assert "127.0.0.1" in [each.address for each in psutil.net_if_addrs()[chosen]]


def test_gloo_socket_ifname_is_respected(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")

    choose_interface()

    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_the_store_of_a_local_run_listens_on_loopback_only(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    choose_interface()
    store = RENDEZVOUS._create_c10d_store("127.0.0.1", port, 0, 1, timedelta(seconds=20))

    store.set("name", "value")
    assert store.get("name") == b"value"
    mine = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert [address.ip for address in mine if address.port == port] == ["127.0.0.1"]
