"""`ray-detox` with one file system more: `chaos://`, a folder that can be outcome to fail.

What it is outcome lies in the file `$CHAOS_FAULT`: `full` (no space left) or `slow` (half a second
for every write).
"""

import errno
import os
import sys
import time
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ray_detox.cli import main as cli


class ChaosFileSystem(LocalFileSystem):
    protocol = "chaos"

    def _open(self, path, mode="rb", **rest):
        fault = Path(os.environ["CHAOS_FAULT"])
        kind = fault.read_text() if fault.exists() else ""
        if "w" in mode and kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if "w" in mode and kind == "slow":
            time.sleep(0.5)
        return super()._open(path, mode, **rest)


if __name__ == "__main__":
    fsspec.register_implementation("chaos", ChaosFileSystem)
    sys.exit(cli.main())
