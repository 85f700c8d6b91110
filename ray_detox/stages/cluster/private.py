"""Keep other users of this machine, and the network, away from a Ray that starts on it.

    TMP/rdx-XXXXXXXX/lock    a local run: 0700, locked while the run lives, removed at its end
                     r/      0777, made by Ray: sessions, sockets, logs, unpacked packages
    TMP/ray-UID/r/           a head, see scripts/head.sh: the same, but kept

Ray makes its own folders writable for everybody, and whoever can replace an unpacked package runs code
as its owner. So they are inside a folder that only this user may enter.
"""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ray_detox.errors import ConfigError

LOOPBACK = "127.0.0.1"
PREFIX = "rdx-"
_SESSION_BYTES = len("/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store")
_OUR_BYTES = len("/ray-4294967295/r")
MAX_BYTES = (103 if sys.platform == "darwin" else 107) - _SESSION_BYTES - _OUR_BYTES
"""Longest path of the folder for ours: the operating system limits the paths of Ray's sockets."""
T = TypeVar("T")


@contextmanager
def private_folder() -> Iterator[Path]:
    """Inside, there is a temporary folder for a local Ray, which no other user can reach.

    Folders of earlier runs that were killed are removed first.

    Raises:
        ConfigError: no folder suits, see `user_folder`.
    """

    def make(parent: Path) -> tuple[Path, int]:
        _remove_stale(parent)
        return _make(parent)

    if os.name == "nt":  # the temporary folder of Windows is the user's own
        with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
            yield Path(name)
        return
    folder, lock = _in_first_suitable(make)
    try:
        yield folder / "r"
    finally:
        # Ray's last processes may still be ending. What they leave is removed by the next run.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def user_folder() -> Path:
    """Return a temporary folder for the heads of this user, which no other user can reach.

    It is in RAY_TMPDIR, TMPDIR or /tmp, the first of them that suits.

    Raises:
        ConfigError: none of them suits.
    """

    def make(parent: Path) -> Path:
        folder = parent / f"ray-{os.geteuid()}"
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        about = folder.lstat()
        # Its name can be guessed, so somebody else may have made it.
        if about.st_uid != os.geteuid() or about.st_mode != stat.S_IFDIR | 0o700:
            raise OSError(0, f"{folder} is not a folder of your own with mode 0700")
        return folder / "r"

    return _in_first_suitable(make)


def _in_first_suitable(make: Callable[[Path], T]) -> T:
    given = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    refused = []
    for parent in dict.fromkeys(Path(name).absolute() for name in given if name):
        try:
            _check(parent)
            return make(parent)
        except OSError as error:
            refused.append(f"{parent} ({error.strerror})")
    raise ConfigError(
        f"Ray needs a temporary folder, and none of these suits: {', '.join(refused)}. Set TMPDIR to "
        f"an existing folder in which other users cannot rename files, with a path of at most "
        f"{MAX_BYTES} characters."
    )


def _check(parent: Path) -> None:
    """Check that a private folder can be in `parent`.

    Raises:
        OSError: it cannot, see `strerror`.
    """
    if len(os.fsencode(parent)) > MAX_BYTES:
        raise OSError(0, "path too long for Ray's sockets")
    # Whoever may write a folder that is not sticky can rename ours and put another in its place.
    # Its owner can do so even if it is sticky. The owner of / is trusted: root, whatever its number is in
    # this container.
    trusted = {os.geteuid(), os.stat("/").st_uid}
    for folder in (real := parent.resolve(strict=True), *real.parents):
        about = folder.stat()
        is_open = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not about.st_mode & stat.S_ISVTX
        if is_open or about.st_uid not in trusted:
            raise OSError(0, f"other users can rename files in {folder}")


def _make(parent: Path) -> tuple[Path, int]:
    """Make a folder with a lock, and return it with the file descriptor that holds the lock."""
    import fcntl

    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
    lock = -1
    try:
        part = folder / "lock.part"
        lock = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.rename(folder / "lock")  # locked before `_remove_stale` of another run can see it
    except OSError:
        if lock >= 0:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, lock


def _remove_stale(parent: Path) -> None:
    """Remove this user's folders whose run has ended; leave those of others and of live runs."""
    import fcntl

    for folder in parent.glob(f"{PREFIX}????????"):
        with suppress(OSError):
            about = folder.lstat()
            if about.st_uid != os.geteuid() or about.st_mode != stat.S_IFDIR | 0o700:
                continue
            lock = os.open(folder / "lock", os.O_RDWR | os.O_NOFOLLOW)
            try:
                # A process that dies, by whatever cause, releases its lock.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def shared_memory_folder(folder: Path, shared: Path = Path("/dev/shm")) -> str | None:
    """Return a folder for Ray's objects if the machine has no shared memory; None takes Ray's choice.

    Ray itself takes its temporary folder if /dev/shm is small, and fails if there is none.
    """
    if sys.platform != "linux" or (
        shared.is_dir() and os.access(shared, os.R_OK | os.W_OK | os.X_OK)
    ):
        return None
    return str(folder.parent)


@contextmanager
def loopback_allowed() -> Iterator[None]:
    """Inside, `ray.init` takes 127.0.0.1 as the address of its node.

    Ray would replace it by the address of a network interface, and listen on all interfaces.
    """
    from ray._private import services

    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


if __name__ == "__main__":
    try:
        print(user_folder())
    except ConfigError as error:
        sys.exit(str(error))
