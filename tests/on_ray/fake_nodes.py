"""Run commands against a cluster of several local nodes, in a process of its own.

python fake_nodes.py [[WORD, ...], ...]     prints one JSON line for each command

Every command is one of `ray-detox`; the script appends the address of the cluster.
"""

import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from ray_detox.cli import main as cli

NODES = [{"num_cpus": 1}, {"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 3}]


def run(words: list[str]) -> dict[str, Any]:
    """Run a command, and return its exit code, output and seconds."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    seconds = time.monotonic() - began
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}


def main() -> None:
    # A short path, because Ray's socket paths are limited to 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    # Ray notes the address of its newest cluster in this folder, and expects it to be there.
    (Path(tempfile.gettempdir()) / "ray").mkdir(exist_ok=True)
    small: dict[str, Any] = {"object_store_memory": 100 * 1024 * 1024}
    head = NODES[0] | small | {"include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for node in NODES[1:]:
            cluster.add_node(**node, **small)
        for words in json.loads(sys.argv[1]):
            print(json.dumps(run([*words, f"cluster.address={cluster.address}"])), flush=True)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
