"""How the tests are divided among the worker processes of pytest-xdist (`-n 2`).

    worker A   most files that start Ray, one after another
    worker B   the other files, the longest first; worker A takes some of them when Ray is done

The tests of a file run on one worker, because they share the file's fixtures. `--dist loadgroup`
cannot do this: pytest-xdist 3.8 appends the group to a test's id, which pytest 9.2 ignores.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.environment import STARTUP
from tests.startup.template import SOCKET_VARIABLE

RAY = "ray"
FOLDERS_WITH_RAY = ("tests/on_ray/", "tests/chaos/")
NODES = "nodes"
GROUPS = {
    # They have tests that start Ray. More than two clusters at once would need too much memory.
    "tests/test_cli_jobs.py": RAY,
    "tests/test_kuberay.py": RAY,
    "tests/test_stopping.py": RAY,
    "tests/test_template.py": RAY,
    # They start Ray as well, in processes of their own, and wait more than they compute.
    "tests/many_nodes/test_many_nodes.py": NODES,
    "tests/on_ray/test_autoscaler.py": NODES,
    # They share the output of `scripts/aws_dry_run.py`, which a process makes once.
    "tests/test_cluster.py": "dry run",
    "tests/test_cluster_installer.py": "dry run",
}
LONGEST_FIRST = (
    RAY,
    NODES,
    "tests/browser/test_page.py",
    "tests/test_store.py",
    "tests/test_store_faults.py",
    "tests/test_learner.py",
    "dry run",
)
"""Groups that start first, so that no worker waits for one of them at the end."""


def group_of(nodeid: str) -> str:
    """The group of a test: its file, unless several files form a group.

    Args:
        nodeid: the test's id in pytest, such as `tests/test_ppo.py::test_gae`.
    """
    file = nodeid.partition("::")[0]
    return GROUPS.get(file) or (RAY if file.startswith(FOLDERS_WITH_RAY) else file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of a worker by group; all workers do the same."""
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        return
    groups: dict[str, list[pytest.Item]] = {group: [] for group in LONGEST_FIRST}
    for item in items:
        group = group_of(item.nodeid)
        if item.get_closest_marker("ray") and group not in (RAY, NODES):
            raise pytest.UsageError(
                f"{item.nodeid} has the marker 'ray', but its file is not in a group with Ray. "
                "Add the file to GROUPS in tests/groups.py."
            )
        groups.setdefault(group, []).append(item)
    items[:] = [item for group in groups.values() for item in group]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the template of Ray's worker processes before the first test that may start Ray."""
    if group_of(item.nodeid) in (RAY, NODES) or item.get_closest_marker("ray"):
        _start_template()


@functools.cache
def _start_template() -> None:
    if SOCKET_VARIABLE in os.environ:
        return
    address = Path(tempfile.mkdtemp(prefix="template-")) / "socket"
    variables = os.environ | {"OMP_NUM_THREADS": "1"}  # as Ray sets it in its workers
    process = subprocess.Popen(
        [sys.executable, STARTUP / "template.py", address], stdin=subprocess.PIPE, env=variables
    )
    os.environ[SOCKET_VARIABLE] = str(address)

    def stop() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        shutil.rmtree(address.parent)

    atexit.register(stop)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scheduler that hands out whole groups, in the order of the collected tests."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)
