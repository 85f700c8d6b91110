"""Files under one address: a folder, `s3://...`, or whatever else pyarrow or fsspec can open.

What is kept of a run for its next process to find (checkpoints, measured shards, settings) is
read and written here. A file is there whole or not at all; a failure is one sentence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any


class StorageError(RuntimeError):
    """The storage cannot be read or written; the message is for people."""


class Storage:
    """Reads and writes files by name under `address`; cheap to make, opened when first used.

    Args:
        address: a folder, or a URL such as `s3://bucket/runs`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._opened: tuple[Any, str] | None = None

    def __repr__(self) -> str:
        return f"Storage({self.address!r})"

    def write(self, name: str, content: bytes) -> None:
        """Write a file, with the folders above it, in place of one of that name."""
        with self._failing_in_words("written to"):
            system, path = self._at(name)
            # An object store shows an object once it is whole; a disk would show half of it.
            on_disk = system.type_name == "local"
            part = f"{path}.part" if on_disk else path
            if on_disk:
                system.create_dir(str(PurePosixPath(path).parent), recursive=True)
            with system.open_output_stream(part) as sink:
                sink.write(content)
            if on_disk:
                system.move(part, path)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""
        with self._failing_in_words("read"):
            system, path = self._at(name)
            try:
                with system.open_input_stream(path) as source:
                    return bytes(source.read())
            except FileNotFoundError:
                return None

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders right under `folder`, sorted; none where it is not there."""
        from pyarrow import fs

        with self._failing_in_words("listed"):
            system, path = self._at(folder)
            found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return sorted(info.base_name for info in found)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing happens where it is not there."""
        from pyarrow import fs

        with self._failing_in_words("written to"):
            system, path = self._at(name)
            kind = system.get_file_info(path).type
            if kind == fs.FileType.Directory:
                system.delete_dir(path)
            elif kind == fs.FileType.File:
                system.delete_file(path)

    def _at(self, name: str) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = open_address(self.address)
        system, root = self._opened
        return system, f"{root.rstrip('/')}/{name}" if name else root

    @contextmanager
    def _failing_in_words(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise StorageError(f"{self.address} cannot be {done}: {reason}.") from error


def open_address(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        OSError, ValueError: it cannot be opened.
    """
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), address
    try:
        system, path = fs.FileSystem.from_uri(address)
    except (ValueError, NotImplementedError):  # a scheme that pyarrow does not know itself
        import fsspec

        inner, path = fsspec.core.url_to_fs(address)
        # It makes the folders that a file needs, where there are such things.
        inner.auto_mkdir = True
        system = fs.PyFileSystem(fs.FSSpecHandler(inner))
    return system, path


def write_atomic(file: Path, text: str) -> None:
    """Write a file of this machine, whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
