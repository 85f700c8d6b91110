"""Worker processes of Ray are forked from a process with imported libraries, and are like others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from tests.startup.template import SOCKET_VARIABLE

pytestmark = pytest.mark.ray

SCRIPT = """
import gc, json, os, resource, signal, sys
mask = os.umask(0)
facts = {
    "arguments": sys.argv,
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "group": os.getpgid(0) == os.getpid(),
    "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "path": sys.path,
    "umask": mask,
    "nice": os.nice(0),
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "network": os.readlink("/proc/self/ns/net"),
    "thresholds": gc.get_threshold(),
    "name": __name__,
    "input": sys.stdin.read(),
}
print(json.dumps([facts, "torch" in sys.modules]))
sys.exit(3)
"""


@pytest.fixture(scope="module")
def template():
    deadline = time.monotonic() + 120
    while not Path(os.environ[SOCKET_VARIABLE]).exists():
        assert time.monotonic() < deadline, "the template did not start"
        time.sleep(0.1)


SETUP = Path(ray.__file__).parent / "_private" / "workers" / "setup_worker.py"


def run(folder, *prefix, context=None, **environment):
    """Run a program in the place of Ray's `default_worker.py`; return its facts, and if it was forked.

    With a context of a runtime environment, Ray's `setup_worker.py` starts it.
    """
    script = folder / "default_worker.py"
    script.write_text(SCRIPT)
    output = folder / "output"
    command = [sys.executable, script]
    if context is not None:
        command[1:] = [
            SETUP,
            script,
            "--language=PYTHON",
            f"--serialized-runtime-env-context={json.dumps(context)}",
        ]
    with output.open("w") as file:
        subprocess.run(
            [*prefix, *command, "--one", "two words"],
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", "MINE": "ä", **os.environ, **environment},
            input="given",
            stdout=file,
            text=True,
            umask=0o027,
            process_group=0,
        )
    deadline = time.monotonic() + 30
    while not output.read_text().endswith("\n"):
        assert time.monotonic() < deadline, "the process wrote nothing"
        time.sleep(0.05)
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "prefix",
    [[], ["nice", "-n", "3"], ["env", "--ignore-signal=USR1,INT"], ["prlimit", "--nofile=500:600"]],
)
def test_a_forked_process_differs_from_a_new_one_only_in_its_imports(template, tmp_path, prefix):
    facts, has_torch = run(tmp_path, *prefix)
    usual, has_torch_usually = run(tmp_path, *prefix, **{SOCKET_VARIABLE: "/nowhere"})

    assert (has_torch, has_torch_usually) == (True, False)
    assert facts["environment"].pop(SOCKET_VARIABLE) != usual["environment"].pop(SOCKET_VARIABLE)
    assert facts == usual


@pytest.mark.parametrize(
    "context",
    [
        {"env_vars": {"MINE": "other", "NEW": "two words"}, "py_executable": sys.executable},
        {"env_vars": {"MINE": "${HOME}x"}},
        {"py_executable": f"env MINE=prefix {sys.executable}"},
    ],
)
def test_a_forked_process_has_the_variables_of_its_runtime_environment(template, tmp_path, context):
    facts, has_torch = run(tmp_path, context=context)
    usual, _ = run(tmp_path, context=context, **{SOCKET_VARIABLE: "/nowhere"})

    assert has_torch
    for environment in (facts["environment"], usual["environment"]):
        del environment[SOCKET_VARIABLE]
        for name in ("_", "SHLVL", "RAY_CLIENT_MODE", "PYTHONBREAKPOINT", "OLDPWD", "PWD"):
            environment.pop(name, None)
    assert facts == usual


@pytest.mark.parametrize(
    ("prefix", "environment"),
    [
        ([], {"HF_HOME": "/elsewhere"}),
        ([], {"OMP_NUM_THREADS": "2"}),
        (["setsid"], {}),
        (["prlimit", "--core=1000"], {}),
    ],
)
def test_a_process_with_other_settings_starts_as_usual(template, tmp_path, prefix, environment):
    facts, has_torch = run(tmp_path, *prefix, **environment)

    assert not has_torch
    assert facts["arguments"][1:] == ["--one", "two words"]
