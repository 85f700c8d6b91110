"""Emulators of DynamoDB: moto, and two stricter ones if they are installed.

`scripts/test_tools.sh` installs the two, and prints the variables that point the tests to them.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

NAMES = ("moto", "dynalite", "ministack")


@contextmanager
def emulator(name: str) -> Iterator[str]:
    """Run an emulator on a free local port, and yield its address."""
    if name == "moto":
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()
        return
    variable = f"RAY_DETOX_{name.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set; scripts/test_tools.sh fetches it")
    program = os.environ[variable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = {
        "dynalite": ["node", program, "--host", "127.0.0.1", "--port", str(port)],
        "ministack": [program],
    }
    # By default dynalite takes half a second to create a table.
    commands["dynalite"] += ["--createTableMs", "0", "--deleteTableMs", "0"]
    settings = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "IOT_MTLS_ENABLED": "0"}
    process = subprocess.Popen(
        commands[name],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"{name} did not answer within 30 seconds")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
