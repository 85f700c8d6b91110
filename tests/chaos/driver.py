"""`ray-detox` with an additional file system, `chaos://`: a local folder whose writes can fail.

The file `$CHAOS_FAULT` contains the current fault: `full` (no space left) or `slow` (half a second
for every write). Without the file, writes succeed.
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

    def _open(self, path, mode="rb", **options):
        fault = Path(os.environ["CHAOS_FAULT"])
        kind = fault.read_text() if fault.exists() else ""
        if "w" in mode and kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if "w" in mode and kind == "slow":
            time.sleep(0.5)
        return super()._open(path, mode, **options)


if __name__ == "__main__":
    fsspec.register_implementation("chaos", ChaosFileSystem)
    sys.exit(cli.main())
