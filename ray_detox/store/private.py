"""Files of runs: only their owner can read them, unless they are made in a folder of a group.

A folder that its group may write, and not everybody, is one that somebody shares on purpose
(`chmod 2770 runs`). What is made in it gets the ordinary mode, which the umask limits.
"""

import os
import stat
from pathlib import Path


def make_folder(folder: Path, *, exist_ok: bool = True) -> None:
    """Create a folder, and those above it.

    Raises:
        FileExistsError: a file has this name, or a folder has it and `exist_ok` is False.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir(0o777 if _is_shared(folder.parent) else 0o700)
    except FileExistsError:
        if not (exist_ok and folder.is_dir()):
            raise


def make_file(file: Path) -> None:
    """Create an empty file if there is none."""
    if file.exists():
        return
    mode = 0o666 if _is_shared(file.parent) else 0o600
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, mode))


def _is_shared(folder: Path) -> bool:
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWGRP) and not mode & stat.S_IWOTH
