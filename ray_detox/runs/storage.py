"""Files under one address: a folder, `s3://...`, or any other URL that pyarrow or fsspec opens.

A run keeps here what its next process needs: checkpoints, measured shards, settings. Readers see a
file only once it is complete, and every failure becomes a `StorageError` of one line.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ray_detox.addresses import credentials_in, has_credentials, redact
from ray_detox.bounded import MAX_JSON_BYTES, open_regular, read_start
from ray_detox.errors import ConfigError, first_line
from ray_detox.models.s3 import advice, open_s3
from ray_detox.recipes.names import expand
from ray_detox.store.private import make_folder

MIN_FREE_MB = 200
"""Free disk that checkpoints need: one of FLAN-T5-base takes 40 MB, and a run keeps several."""


OBJECT_STORES = frozenset(
    {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "az", "oss", "oci", "r2", "hf"}
)
"""Names of file systems that show a file only once it is complete, in pyarrow or fsspec."""


class StorageError(RuntimeError):
    """The storage cannot be read or written; the message is one line for the user."""


class Storage:
    """Reads and writes files by name under `address`; opens the file system on first use.

    Args:
        address: a folder, or a URL such as `s3://bucket/runs`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._opened: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Storage({redact(self.address)!r})"

    @property
    def local_folder(self) -> Path | None:
        """The folder on this machine, or None for any other address."""
        if "://" not in self.address:
            return Path(self.address)
        parts = urlsplit(self.address)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file and create the folders above it; replaces a file of the same name."""
        with self._as_storage_error("written to"):
            system, path = self._locate(name)
            if system.type_name == "local":
                file = Path(path)
                if (root := self.local_folder) is not None:
                    make_folder(root)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, content)
            elif system.type_name.rpartition("+")[2] in OBJECT_STORES:
                _write_through(system, path, content)
            else:
                # Elsewhere a process that ends here leaves half a file, which must not be the file.
                part = f"{path}.{secrets.token_hex(4)}.part"
                _write_through(system, part, content)
                system.move(part, path)

    def read(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Return a file's content, or None if there is no such file.

        Raises:
            StorageError: it cannot be read, or has more than `max_bytes`.
        """
        content = self.read_start(name, max_bytes + 1)
        if content is not None and len(content) > max_bytes:
            raise StorageError(
                f"{self.address} cannot be read: {name} has more than {max_bytes:,} bytes."
            )
        return content

    def read_start(self, name: str, max_bytes: int) -> bytes | None:
        """Return the first `max_bytes` of a file, or all; None if there is no such file."""
        from pyarrow import fs

        with self._as_storage_error("read"):
            system, path = self._locate(name)
            try:
                if system.type_name == "local":
                    with open_regular(Path(path)) as source:
                        return read_start(source, max_bytes)
                with system.open_input_stream(path) as source:
                    return read_start(source, max_bytes)
            except FileNotFoundError:
                if system.get_file_info(path).type == fs.FileType.NotFound:
                    return None
                raise  # fsspec also says so if it could not ask

    def names(self, folder: str = "") -> list[str]:
        """List the files and folders directly under `folder`, sorted; empty if it does not exist."""
        return sorted(info.base_name for info in self._list(folder))

    def folders(self, folder: str) -> list[str]:
        """List the folders directly under `folder`, sorted; empty if it does not exist."""
        from pyarrow import fs

        found = self._list(folder)
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with its contents; does nothing if it does not exist."""
        from pyarrow import fs

        with self._as_storage_error("written to"):
            system, path = self._locate(name)
            kind = system.get_file_info(path).type
            if kind == fs.FileType.Directory:
                system.delete_dir(path)
            elif kind == fs.FileType.File:
                system.delete_file(path)

    def _list(self, folder: str) -> list[Any]:
        from pyarrow import fs

        with self._as_storage_error("listed"):
            system, path = self._locate(folder)
            found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
            if not found:
                system.get_file_info(path)  # fails if fsspec found nothing because it could not ask
            return list(found)

    def _locate(self, name: str) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = open_address(self.address)
        system, root = self._opened
        path = f"{root.rstrip('/')}/{name}" if name else root
        # A run that came from elsewhere may have links in its folder.
        if system.type_name == "local" and name:
            folder = Path(path).parent
            if not folder.resolve().is_relative_to(Path(root).resolve()):
                raise OSError(f"{folder} is a link out of it")
        return system, path

    @contextmanager
    def _as_storage_error(self, verb: str) -> Iterator[None]:
        try:
            yield
        except MemoryError:  # this process is at fault, and a checkpoint in the storage may be good
            raise
        except Exception as error:  # a file system of fsspec may have errors of its own
            address = redact(self.address)
            raise StorageError(f"{address} cannot be {verb}: {first_line(error)}.") from error


def _write_through(system: Any, path: str, content: bytes) -> None:
    with system.open_output_stream(path) as sink:
        sink.write(content)


def join_address(address: str, name: str) -> str:
    """Return the address of `name` in the folder at `address`.

    The name goes before the query of a URL: `s3://bucket/runs?scheme=http` and `first` make
    `s3://bucket/runs/first?scheme=http`.
    """
    if "://" not in address:
        return f"{address.rstrip('/')}/{name}"
    # Not urllib.parse, which changes some addresses when it puts them together again.
    scheme, _, rest = address.partition("://")
    path, *query = re.split("(?=[?#])", rest, maxsplit=1)
    return f"{scheme}://{path.rstrip('/')}/{name}{''.join(query)}"


def open_address(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    Raises:
        Exception: the address cannot be opened; a file system of fsspec may raise any.
    """
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), address
    if address.startswith("s3://"):
        return open_s3(address)
    try:
        system, path = fs.FileSystem.from_uri(address)
    except (ValueError, NotImplementedError):  # pyarrow does not know the scheme; fsspec may
        import fsspec

        inner, path = fsspec.core.url_to_fs(address)
        # Some of fsspec's file systems have folders, and would refuse a file without its folder.
        inner.auto_mkdir = True
        system = fs.PyFileSystem(fs.FSSpecHandler(inner))
    return system, path


def write_atomic(file: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a local file so that readers see either the old content or the complete new content.

    Args:
        file: to write.
        content: text in UTF-8, or bytes.
        durable: return only once the content is on the disk, so that it survives a power loss.
    """
    # A name of its own: another process may be writing the same file.
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
            if durable:
                opened.flush()
                os.fsync(opened.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)  # on a full disk, half a file would take the last of its room


# ---- checks before a run -----------------------------------------------------------------------


def check_storage(address: str) -> None:
    """Check that `train.storage` is an address that can keep checkpoints.

    Raises:
        ConfigError: it cannot.
    """
    if has_credentials(address):  # from a command line that names the storage of an existing run
        raise ConfigError(credentials_in("train.storage"))
    if "://" in address:
        reason = _reason_not_reachable(address)
    else:
        folder = expand(address)
        reason = reason_not_writable(folder) or reason_disk_full(folder)
    if reason:
        raise ConfigError(
            f"train.storage is {address!r}, and no checkpoint can be kept there: {reason}."
        )


def reason_not_writable(folder: Path) -> str | None:
    """Say why the user may not write to a folder, which need not exist yet; None if they may."""
    existing = _first_existing(folder)
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"{existing} is not a folder you may write to"


def reason_disk_full(folder: Path) -> str | None:
    """Say why checkpoints do not fit into a folder, which need not exist yet; None if they do."""
    free_mb = shutil.disk_usage(_first_existing(folder)).free / 1e6
    if free_mb >= MIN_FREE_MB:
        return None
    return f"{folder} has {free_mb:.0f} MB free, and checkpoints need {MIN_FREE_MB} MB"


def _reason_not_reachable(address: str) -> str | None:
    from pyarrow import fs

    try:
        filesystem, root = open_address(address)
        bucket = root.partition("/")[0]
        # S3 does not create a missing bucket. Other file systems create a missing folder, so an
        # answer from them is enough.
        kind = filesystem.get_file_info(bucket if filesystem.type_name == "s3" else root).type
    except Exception as error:  # as in `Storage`
        hint = f". {advice(error)}" if address.startswith("s3://") else ""
        return first_line(error) if isinstance(error, ConfigError) else first_line(error) + hint
    if filesystem.type_name == "s3" and kind == fs.FileType.NotFound:
        return f"the bucket {bucket} does not exist, or you may not use it"
    return None


def _first_existing(folder: Path) -> Path:
    while not os.path.exists(folder):  # not Path.exists, which may raise PermissionError
        folder = folder.parent
    return folder
