"""One small file that several processes replace without losing each other's changes.

    version, content = file.read()
    file.replace(changed(content), version)      Conflict: somebody else was first; read again

    a folder      compared and replaced while FILE.lock is locked (flock)
    s3://         If-Match and If-None-Match: the service compares
    other URLs    compared, then replaced: two writers within the same moment may not notice each other

Every failure of the storage itself is a `StorageError`.
"""

import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from ray_detox.addresses import redact
from ray_detox.bounded import DamagedError, read_regular, read_stream
from ray_detox.errors import first_line
from ray_detox.runs.storage import Storage, StorageError, write_atomic
from ray_detox.store.private import make_folder

LOCK_TIMEOUT_S = 30.0
"""Longest wait for another process that has the lock of a file."""
LOCK_POLL_S = 0.01

NAME = "run.json"
MAX_BYTES = 4 << 20
"""Maximum size of the file; it grows by a few lines whenever a process takes the run."""


class Conflict(Exception):
    """The file is not the version that was to be replaced."""


class VersionedFile(Protocol):
    """The file `run.json` of a run in its storage."""

    def read(self) -> tuple[str | None, bytes | None]:
        """Return version and content; both None if there is no such file.

        Raises:
            StorageError: the storage cannot be read.
        """

    def replace(self, content: bytes, version: str | None) -> str:
        """Write the file if it still is the given version, and return its new version.

        Args:
            content: to write.
            version: from `read`; None if no such file exists.

        Raises:
            Conflict: the file is another version.
            StorageError: the storage cannot be written to.
        """


def versioned_file(storage: Storage) -> VersionedFile:
    """Return the record's file under an address."""
    if storage.local_folder is not None:
        return LocalFile(storage.local_folder / NAME)
    return S3File(storage) if storage.address.startswith("s3://") else PlainFile(storage)


_replacing = threading.Lock()
"""Held while a thread of this process compares and replaces a local file."""


class LocalFile:
    """A file on this machine or on a mounted file system."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> tuple[str | None, bytes | None]:
        """See `VersionedFile.read`."""
        try:
            content = read_regular(self.file, MAX_BYTES)
        except FileNotFoundError:
            return None, None
        except (OSError, DamagedError) as error:
            raise StorageError(f"{self.file} cannot be read: {first_line(error)}.") from error
        return _version(content), content

    def replace(self, content: bytes, version: str | None) -> str:
        """See `VersionedFile.replace`."""
        if version is None:
            self._make_folder()
        with locked(self.file), _replacing:
            if self.read()[0] != version:
                raise Conflict
            try:
                write_atomic(self.file, content, durable=True)
            except OSError as error:
                raise StorageError(
                    f"{self.file} cannot be written to: {first_line(error)}."
                ) from error
        return _version(content)

    def _make_folder(self) -> None:
        try:
            make_folder(self.file.parent)
        except OSError as error:
            raise StorageError(
                f"{self.file.parent} cannot be written to: {first_line(error)}."
            ) from error


@dataclass(slots=True)
class _Lock:
    """A lock file of this process, which all of its threads share."""

    mutex: threading.Lock
    threads: int = 0
    """Threads that hold it."""
    opened: int = -1
    """File descriptor, while a thread holds it."""


_locks: dict[str, _Lock] = {}
_locks_mutex = threading.Lock()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes from locking the same file; the threads of this one do not wait for each other.

    Otherwise a slow checkpoint would delay metrics and signs of life.

    Raises:
        StorageError: the folder cannot be written to, or another process keeps the lock.
    """
    path = file.with_name(file.stem + ".lock")
    with _locks_mutex:
        lock = _locks.setdefault(str(path), _Lock(threading.Lock()))
    with lock.mutex:
        if lock.threads == 0:
            lock.opened = _open_locked(path)
        lock.threads += 1
    try:
        yield
    finally:
        with lock.mutex:
            lock.threads -= 1
            if lock.threads == 0:
                os.close(lock.opened)  # ends the lock


def _open_locked(path: Path) -> int:
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise StorageError(f"{path} cannot be written to: {first_line(error)}.") from error
    try:
        _lock(opened, path)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _lock(opened: int, lock: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: as on a file system without locks
        return
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{lock} has been locked for {LOCK_TIMEOUT_S:g} s by another process, which was "
                    "paused while it wrote. End that process, then go on."
                ) from None
            time.sleep(LOCK_POLL_S)
        except OSError:
            return  # a file system without locks: as with other URLs


class PlainFile:
    """A file in a storage that cannot compare."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self) -> tuple[str | None, bytes | None]:
        """See `VersionedFile.read`."""
        content = self.storage.read(NAME, MAX_BYTES)
        return (None, None) if content is None else (_version(content), content)

    def replace(self, content: bytes, version: str | None) -> str:
        """See `VersionedFile.replace`."""
        if self.read()[0] != version:
            raise Conflict
        self.storage.write(NAME, content)
        return _version(content)


class S3File:
    """An object in S3, or in a service that speaks its protocol."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._client: Any = None
        self._place: dict[str, str] = {}

    def read(self) -> tuple[str | None, bytes | None]:
        """See `VersionedFile.read`."""
        import botocore.exceptions

        try:
            answer = self._opened().get_object(**self._place)
            return answer["ETag"], read_stream(answer["Body"], MAX_BYTES)
        except botocore.exceptions.ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None, None
            raise self._failed("read", error) from error
        except (botocore.exceptions.BotoCoreError, OSError, DamagedError) as error:
            raise self._failed("read", error) from error

    def replace(self, content: bytes, version: str | None) -> str:
        """See `VersionedFile.replace`."""
        import botocore.exceptions

        expected = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self._opened().put_object(**self._place, Body=content, **expected)
            return str(answer["ETag"])
        except botocore.exceptions.ClientError as error:
            if _code(error) == "NotImplemented":
                return self._replace_plainly(content, version)
            if _code(error) not in _CONFLICTS:
                raise self._failed("written to", error) from error
        except (botocore.exceptions.BotoCoreError, OSError) as error:
            raise self._failed("written to", error) from error
        # The answer to a request that succeeded may have been lost; its repetition then conflicts.
        found, there = self.read()
        if there != content or found is None:
            raise Conflict
        return found

    def _replace_plainly(self, content: bytes, version: str | None) -> str:
        """Replace the object in a service without conditional writes, as `PlainFile` does."""
        if self.read()[0] != version:
            raise Conflict
        return str(self._opened().put_object(**self._place, Body=content)["ETag"])

    def _opened(self) -> Any:
        if self._client is None:
            self._client, self._place = _open_s3(self.storage.address)
        return self._client

    def _failed(self, verb: str, error: Exception) -> StorageError:
        address = redact(self.storage.address)
        return StorageError(f"{address} cannot be {verb}: {first_line(error)}.")


_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "404", "409", "412")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@functools.lru_cache(maxsize=8)
def _open_s3(address: str) -> tuple[Any, dict[str, str]]:
    """Return a client and the object's place, from an address as pyarrow understands it.

    Once per address: each write of a run reads the record first, and a client takes long to make.
    """
    import boto3
    from botocore.config import Config

    parts = urlsplit(address)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    endpoint = options.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    client = boto3.client(
        "s3",
        region_name=options.get("region"),
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"total_max_attempts": 3, "mode": "standard"},
            # Some services refuse the checksums that botocore adds by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # As pyarrow does with another service than AWS.
            s3={"addressing_style": "path"} if endpoint else {},
        ),
    )
    key = "/".join(part for part in (unquote(parts.path).strip("/"), NAME) if part)
    return client, {"Bucket": parts.netloc, "Key": key}


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
