"""The environment of the processes that tests start."""

import os
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"


def python_path(*folders: Path | str) -> str:
    """Return a PYTHONPATH of folders, with which a process starts as `startup/sitecustomize.py` says."""
    return os.pathsep.join(map(str, (STARTUP, *folders)))
