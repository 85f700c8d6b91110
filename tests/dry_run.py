"""The output of `scripts/aws_dry_run.py`, which takes long enough to be shared by test modules."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def aws_dry_run() -> dict[str, Any]:
    """Run the script in a separate process, because Ray's launcher keeps global state."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/aws_dry_run.py"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
