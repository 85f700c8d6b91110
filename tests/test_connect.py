"""Connecting to a cluster: failures give a one-line error within seconds."""

import io
import os
import socket
import threading
import time
from concurrent import futures
from unittest.mock import patch

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.runs.console import Console
from ray_detox.stages.cluster import connect


@pytest.fixture
def refused(monkeypatch):
    """`refused(address)`: the error for an address, raised before Ray itself tries."""
    monkeypatch.setattr(connect, "GCS_PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **asked: pytest.fail("Ray would try for minutes"))

    def try_it(address):
        config = load_config("lab", [f"cluster.address={address}"])
        began = time.monotonic()
        with pytest.raises(ConfigError) as error, connect.connected(config, Console(io.StringIO())):
            pass
        assert time.monotonic() - began < 5
        return str(error.value)

    # `connected` sets variables of the environment; this restores them.
    with patch.dict(os.environ, RAY_AUTH_MODE="disabled"):
        yield try_it


@pytest.fixture
def listener():
    """`listener(answer)`: address of a server that sends `answer` on every connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(answer):
        def run():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield serve
    server.close()


@pytest.fixture
def head():
    """`head(answer)`: address of a head node that answers a probe by calling `answer(context)`."""
    servers = []

    def start(answer):
        class Service(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
            def CheckAlive(self, request, context):
                return answer(context)

        server = grpc.server(futures.ThreadPoolExecutor(1))
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


def test_an_address_without_a_server_is_refused(refused):
    sentence = refused("127.0.0.1:9")

    assert "No Ray cluster answers at 127.0.0.1:9 (Connection refused). Check" in sentence


def test_the_probe_ignores_an_http_proxy(refused, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8")

    assert "127.0.0.1:9 (Connection refused)" in refused("127.0.0.1:9")


def test_an_unknown_host_is_refused(refused):
    sentence = refused("nowhere.invalid:6379")

    assert "No Ray cluster answers at nowhere.invalid:6379 (Domain name not found)" in sentence


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_server_that_is_not_ray_is_refused(refused, listener, answer):
    assert "No Ray cluster answers at 127.0.0.1:" in refused(listener(answer))


@pytest.mark.parametrize("address", ["10.0.0.1", ":6379", "ray://10.0.0.1:10001", "10.0.0.1:port"])
def test_a_malformed_address_is_refused(refused, address):
    assert "expected host:port, such as 10.0.0.1:6379" in refused(address)


def test_a_cluster_that_wants_another_token_is_refused(refused, head):
    address = head(
        lambda context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing")
    )

    sentence = refused(address)

    assert f"The Ray cluster at {address} wants a token" in sentence
    assert "Set RAY_AUTH_MODE=token" in sentence


def test_a_cluster_with_another_version_of_ray_is_refused(refused, head):
    other = head(lambda context: gcs_service_pb2.CheckAliveReply(ray_version="2.9.3"))

    assert f"runs Ray 2.9.3, and here is Ray {ray.__version__}" in refused(other)


def test_a_cluster_with_the_same_version_passes_the_probe(head):
    connect._probe_gcs(
        head(lambda context: gcs_service_pb2.CheckAliveReply(ray_version=ray.__version__))
    )


def test_an_error_of_ray_init_becomes_one_sentence(refused, head, monkeypatch):
    def init(**asked):
        raise RuntimeError("Version mismatch:\n    Python: 3.9.1\nThis process: 3.11.7")

    address = head(lambda context: gcs_service_pb2.CheckAliveReply(ray_version=ray.__version__))
    monkeypatch.setattr(ray, "init", init)

    sentence = refused(address)

    assert sentence == (
        f"The Ray cluster at {address} refused this process: Version mismatch: "
        "Python: 3.9.1 This process: 3.11.7"
    )
