"""The record of a run, `run.json`: who may write the run, what it is, and what has changed since.

Plain data and its JSON form; `lease.py` reads and writes it.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_detox.errors import ConfigError

FORMAT = 1


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

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n").encode()


def record_from_json(content: bytes, where: str) -> RunRecord:
    """Read a record.

    Args:
        content: of the file.
        where: the file, for messages.

    Raises:
        ConfigError: it is damaged, or of another version.
    """
    try:
        tree = json.loads(content)
        if tree.pop("format") != FORMAT:
            raise ConfigError(
                f"{where} is of another version of ray-detox. Use the version that started the run."
            )
        writer = tree.pop("writer")
        changes = {
            name: tuple(Change(**change) for change in tree.pop(name))
            for name in ("accepted", "settings")
        }
        takings = tuple(Taking(**taking) for taking in tree.pop("takings"))
        record = RunRecord(
            writer=None if writer is None else Writer(**writer),
            takings=takings,
            **changes,
            **tree,
        )
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{where} is damaged ({error}), and nothing else says who may write the run. Restore it "
            "from a backup, or start a new run."
        ) from error
    return record


def _check(record: RunRecord) -> None:
    numbers = [record.token, record.beat, *([] if record.step is None else [record.step])]
    numbers += [n for taking in record.takings for n in (taking.token, taking.step)]
    numbers += [change.step for change in record.accepted + record.settings]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a number is not one")
    texts = [record.run, *record.identity, *record.identity.values()]
    texts += [change.name for change in record.accepted + record.settings]
    if record.writer is not None:
        writer = record.writer
        texts += [writer.id, writer.host, writer.born, writer.since]
        if type(writer.pid) is not int:
            raise ValueError("a number is not one")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is not one")


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
    return _born(writer.pid) != writer.born


def _machine() -> str | None:
    """Return a text that only processes with the same view of process ids share; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """Return `Writer.born` of a process; None if it has ended or the system does not tell."""
    machine = _machine()
    try:
        # Field 22 is the start in clock ticks since boot, which no change of the clock moves. The
        # name in parentheses may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if machine is None or fields[0] in ("Z", "X"):  # ended, though its parent has not noticed
        return None
    return f"{machine} {fields[19]}"
