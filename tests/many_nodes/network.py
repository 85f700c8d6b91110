"""Machines with addresses of their own on one switch, made of Linux's network namespaces.

    switch         lan  10.77.0.1        a bridge; what all machines reach runs here
                    |    |    |          cables, each with one end in the bridge
    machine 0..N   eth0 10.77.0.10 ..    and the other in a machine

Nothing of it is joined to this machine's own network, so that no address can be taken already,
and no firewall of this machine lies between.
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

GATEWAY = "10.77.0.1"
SWITCH = "switch"


class NoNetworkError(RuntimeError):
    """`ip` did not do as it was told; the message says what it said."""


class Network:
    """Some machines that reach one another, until a cable is pulled.

    Args:
        folder: for what programs on a machine find as `/etc/hosts`.
        machines: how many.

    Raises:
        NoNetworkError: this machine does not let us make it; nothing is left behind.
    """

    def __init__(self, folder: Path, machines: int) -> None:
        if shutil.which("ip") is None:
            raise NoNetworkError("a network of namespaces needs the command `ip` of iproute2")
        # As on many a Linux, where a machine's name does not lead to its address.
        self._hosts = folder / "hosts"
        self._hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
        self._prefix = f"detox-{os.getpid()}-{secrets.token_hex(3)}"
        self._made: list[str] = []
        self._started: list[subprocess.Popen[str]] = []
        self.addresses = [f"10.77.0.{10 + i}" for i in range(machines)]
        try:
            self._make()
        except NoNetworkError:
            self.close()
            raise

    def _make(self) -> None:
        self._add(SWITCH)
        self._in(SWITCH, "link add lan type bridge")
        self._in(SWITCH, f"addr add {GATEWAY}/24 dev lan")
        self._in(SWITCH, "link set lan up")
        for machine, address in enumerate(self.addresses):
            self._add(machine)
            inside = f"name eth0 netns {self._name(machine)}"
            self._in(SWITCH, f"link add port{machine} type veth peer {inside}")
            self._in(SWITCH, f"link set port{machine} master lan up")
            self._in(machine, f"addr add {address}/24 dev eth0")
            self._in(machine, "link set eth0 up")
            # Programs find out their own address by asking for the way to one out there.
            self._in(machine, f"route add default via {GATEWAY}")
        tried = self.start(SWITCH, ["true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = tried.communicate()
        if tried.returncode:
            raise NoNetworkError(f"no program may run in a network namespace here: {said.strip()}")

    def close(self) -> None:
        """End all that runs on the machines, then take the network away."""
        for name in self._made:
            for _ in range(100):  # one that is ending may have started another
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
        self._made.clear()

    def cut(self, machine: int) -> None:
        """Pull the machine's cable: what runs there goes on, and nobody hears of it."""
        self._in(SWITCH, f"link set port{machine} down")

    def mend(self, machine: int) -> None:
        """Plug the cable in again."""
        self._in(SWITCH, f"link set port{machine} up")

    def start(
        self, where: int | str, command: Sequence[str], **rest: Any
    ) -> "subprocess.Popen[str]":
        """Start a program on a machine, or at the switch; `rest` as for `subprocess.Popen`."""
        # `ip netns exec` has given the program mounts of its own: nobody else sees this one.
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        words = ["ip", "netns", "exec", self._name(where), "sh", "-c", script, str(self._hosts)]
        self._started.append(subprocess.Popen([*words, *command], text=True, **rest))
        return self._started[-1]

    def _name(self, where: int | str) -> str:
        return f"{self._prefix}-{where}"

    def _add(self, where: int | str) -> None:
        _ip("netns", "add", self._name(where))
        self._made.append(self._name(where))
        self._in(where, "link set lo up")

    def _in(self, where: int | str, words: str) -> None:
        _ip("-n", self._name(where), *words.split())


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise NoNetworkError(f"`ip {' '.join(words)}` failed: {said[0]}")


@contextlib.contextmanager
def network(folder: Path, machines: int) -> Iterator[Network]:
    """A `Network` that is taken away in the end."""
    made = Network(folder, machines)
    try:
        yield made
    finally:
        made.close()
