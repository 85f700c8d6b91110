"""Machines with their own addresses on one network, made of Linux network namespaces.

    gateway        lan  10.77.0.1        a bridge; services that all machines use run here
                    |    |    |          veth pairs, each with one end in the bridge
    machine 0..N   eth0 10.77.0.10 ..    and the other end in a machine

The network is not connected to the host's own network, so its addresses cannot be in use already
and the host's firewall does not apply.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GATEWAY = "gateway"
"""Namespace of the bridge."""
GATEWAY_ADDRESS = "10.77.0.1"


class NoNetworkError(RuntimeError):
    """The host does not allow network namespaces; the message contains the error of `ip`."""


class Network:
    """Machines that reach one another until one of them is disconnected.

    Args:
        folder: for the file that programs on the machines see as `/etc/hosts`.
        machines: number of machines.

    Raises:
        NoNetworkError: the host does not allow network namespaces; nothing is left behind.
    """

    def __init__(self, folder: Path, machines: int) -> None:
        if shutil.which("ip") is None:
            raise NoNetworkError("a network of namespaces needs the command `ip` of iproute2")
        # As on many Linux distributions, the host name does not resolve to the machine's address.
        self._hosts = folder / "hosts"
        self._hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
        self._prefix = f"detox-{os.getpid()}-{secrets.token_hex(3)}"
        self._namespaces: list[str] = []
        self._started: list[subprocess.Popen[str]] = []
        self.addresses = [f"10.77.0.{10 + i}" for i in range(machines)]
        try:
            self._create()
        except NoNetworkError:
            self.close()
            raise

    def _create(self) -> None:
        self._add(GATEWAY)
        self._in(GATEWAY, "link add lan type bridge")
        self._in(GATEWAY, f"addr add {GATEWAY_ADDRESS}/24 dev lan")
        self._in(GATEWAY, "link set lan up")
        for machine, address in enumerate(self.addresses):
            self._add(machine)
            inside = f"name eth0 netns {self._name(machine)}"
            self._in(GATEWAY, f"link add port{machine} type veth peer {inside}")
            self._in(GATEWAY, f"link set port{machine} master lan up")
            self._in(machine, f"addr add {address}/24 dev eth0")
            self._in(machine, "link set eth0 up")
            # Programs determine their own address from the route to an external one.
            self._in(machine, f"route add default via {GATEWAY_ADDRESS}")
        tried = self.start(GATEWAY, ["true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed, _ = tried.communicate()
        if tried.returncode:
            raise NoNetworkError(f"programs cannot run in a network namespace: {printed.strip()}")

    def close(self) -> None:
        """Kill all processes on the machines, then delete the network."""
        for name in self._namespaces:
            for _ in range(100):  # a process may start another one before it is killed
                listed = subprocess.run(
                    ["ip", "netns", "pids", name], capture_output=True, text=True
                )
                found = [int(pid) for pid in listed.stdout.split()]
                if not found:
                    break
                for pid in found:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for process in self._started:
            process.wait()
        self._namespaces.clear()

    def disconnect(self, machine: int) -> None:
        """Cut a machine off from the network; its processes keep running."""
        self._in(GATEWAY, f"link set port{machine} down")

    def reconnect(self, machine: int) -> None:
        """Connect a machine to the network again."""
        self._in(GATEWAY, f"link set port{machine} up")

    def start(
        self, where: int | str, command: Sequence[str], **options: Any
    ) -> "subprocess.Popen[str]":
        """Start a program on a machine or the gateway; `options` are those of `subprocess.Popen`."""
        # `ip netns exec` gives the program its own mount namespace, so only it sees this mount.
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        prefix = ["ip", "netns", "exec", self._name(where), "sh", "-c", script, str(self._hosts)]
        self._started.append(subprocess.Popen([*prefix, *command], text=True, **options))
        return self._started[-1]

    def _name(self, where: int | str) -> str:
        return f"{self._prefix}-{where}"

    def _add(self, where: int | str) -> None:
        _ip("netns", "add", self._name(where))
        self._namespaces.append(self._name(where))
        self._in(where, "link set lo up")

    def _in(self, where: int | str, arguments: str) -> None:
        _ip("-n", self._name(where), *arguments.split())


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["no error message"]
        raise NoNetworkError(f"`ip {' '.join(arguments)}` failed: {errors[0]}")


@contextlib.contextmanager
def network(folder: Path, machines: int) -> Iterator[Network]:
    """Create a `Network`, and delete it at the end."""
    made = Network(folder, machines)
    try:
        yield made
    finally:
        made.close()
