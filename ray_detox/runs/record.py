"""The record of a run, `run.json`: who may write the run, what it is, and what has changed since.

Plain data and its JSON form; `lease.py` reads and writes it.
"""

import functools
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray_detox.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Writer:
    """A process that writes a run."""

    id: str
    """Random, so that no two takings are equal."""
    host: str
    pid: int
    born: str
    """Boot of the machine, PID namespace and start of the process; empty where the system does not
    tell. With the PID it tells processes of one machine apart."""
    since: str
    """When it took the run, in ISO 8601; only for messages, since clocks differ."""

    def describe(self) -> str:
        """Name the process in a sentence."""
        return f"process {self.pid} on {self.host}, which began at {self.since}"


@dataclass(frozen=True, slots=True)
class Taking:
    """A process took the run; the takings of a run are numbered."""

    token: int
    step: int
    """Step of the checkpoint from which it went on. Checkpoints that an earlier taking wrote for later
    steps do not count: it wrote them when it no longer had the run."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something about a run that changed at a step."""

    step: int
    """Steps done before; the new value holds from the next step on."""
    name: str
    """A setting, such as `train.workers`, or an entry of the identity."""
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Content of `run.json`."""

    format: Literal[1]
    """Version of the file."""
    run: str
    """Random id of this run: another run of the same name has another one."""
    token: int
    """Number of the current taking, from 1."""
    beat: int
    """Grows while the writer lives."""
    writer: Writer | None
    """None if nobody writes the run."""
    takings: tuple[Taking, ...]
    identity: Mapping[str, str]
    """Fingerprints of what the run was started with, by name; empty until they are taken."""
    accepted: tuple[Change, ...]
    """Differences from the identity that a user accepted."""
    settings: tuple[Change, ...]
    """Settings that changed when the run was resumed."""
    step: int | None
    """Step of the newest checkpoint in the storage; None if there is none."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by phase, of all processes that have written the run; each beat adds to it."""

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def record_from_json(content: bytes, where: str) -> RunRecord:
    """Read a record.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    import pydantic

    try:
        record: RunRecord = _reader().validate_json(content, strict=True)
        return record
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{where} is damaged, or of another version of ray-detox ({place}: {first['msg']}), and "
            "nothing else says who may write the run. Restore it from a backup, use the version that "
            "started the run, or start a new run."
        ) from error


@functools.cache
def _reader() -> Any:
    import pydantic

    return pydantic.TypeAdapter(RunRecord)


# ---- processes of this machine -------------------------------------------------------------------


def this_process(id: str, since: str) -> Writer:
    """Return this process as a writer."""
    pid = os.getpid()
    return Writer(id=id, host=platform.node(), pid=pid, born=_born(pid) or "", since=since)


def is_gone(writer: Writer) -> bool:
    """Return True if the writer was a process of this machine that has ended.

    False if it lives, or if it cannot be told from here.
    """
    here = _machine()
    if here is None or not writer.born.startswith(f"{here} "):
        return False
    fields = _stat(writer.pid)
    if fields is not None:
        return fields[0] in ENDED or _born(writer.pid) != writer.born
    try:
        os.kill(writer.pid, 0)
    except OSError as error:  # or it is another user's process, which /proc may hide
        return isinstance(error, ProcessLookupError)
    return False


def _machine() -> str | None:
    """Return a text that only processes with the same view of process ids share; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


ENDED = ("Z", "X")
"""States of a process that has ended, though its parent has not noticed."""


def _born(pid: int) -> str | None:
    """Return `Writer.born` of a process; None if the system does not tell."""
    machine, fields = _machine(), _stat(pid)
    # Field 22 is the start in clock ticks since boot, which no change of the clock moves.
    return None if machine is None or fields is None else f"{machine} {fields[19]}"


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the third on, the state; None if it cannot be read."""
    try:
        # The name in parentheses before them may contain spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
