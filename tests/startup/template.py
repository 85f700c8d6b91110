"""A process from which the worker processes of Ray are forked, so that they share its imports.

    pytest --starts--> template: imports torch, transformers, peft and what Ray itself imports
    raylet --starts--> python default_worker.py --hands over--> template --forks--> default_worker.py
                       (or setup_worker.py, which would start it; `sitecustomize` calls `hand_over`, and
                       this process ends)

A worker process needs 5 to 8 seconds of CPU time for these imports, and the tests start hundreds. The
forked process has the arguments, environment, folder, open files, signals, namespaces and `sys.path` that
the raylet gave it, and runs Ray's own `default_worker.py`. The template imports no module of Ray or of
this package. A process starts as usual if its user, session, limits or settings of the imported libraries
differ from the template's, or while the template is not ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

SOCKET_VARIABLE = "TESTS_TEMPLATE"
"""Path of the template's socket; if it is not set, every process starts as usual."""
THRESHOLDS = (100_000, 50, 1000)
"""Of the garbage collector: see `sitecustomize`."""
MODULES = (
    "numpy",
    "pandas",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "yaml",
    "jinja2",
    "pydantic",
    "requests",
    "aiohttp",
    "tensorboardX",
    "torch",
    "torch.distributed",
    "transformers.models.t5.modeling_t5",
    "transformers.models.roberta.modeling_roberta",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "peft",
)
LIBRARY_SETTINGS = (
    "ACCELERATE_",
    "CUDA_",
    "GLOO_",
    "HF_",
    "HUGGINGFACE_",
    "LD_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
)
"""Beginnings of variables that libraries read when they are imported."""
NOT_COMPARED = ("PYTHONPATH", "PYTHONBREAKPOINT", "TORCHINDUCTOR_CACHE_DIR")
"""The forked process gets its own search path; torch and Ray set the others, for themselves."""
NAMESPACES = ("net", "mnt")
"""Namespaces that the forked process enters; simulated nodes have their own network."""
FILES = 3 + len(NAMESPACES)
"""Files that a request carries: standard input, output and error, and the namespaces."""


LIMITS = [
    number
    for name, number in vars(resource).items()
    if name.startswith("RLIMIT_") and number != resource.RLIMIT_NOFILE
]
"""Limits that are compared; that of open files, which Ray raises, is handed over."""


def _state() -> dict[str, Any]:
    """Return what a worker process and the template must have in common, as JSON values."""
    return {
        "user": [os.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups()],
        "session": os.getsid(0),
        "python": sys.executable,
        "limits": [resource.getrlimit(number) for number in LIMITS],
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(LIBRARY_SETTINGS) and name not in NOT_COMPARED
        },
    }


# ---- in a process that the raylet starts ---------------------------------------------------------


def hand_over() -> None:
    """Let the template fork this worker process, and end; return if it has to start as usual."""
    command = _command(sys.orig_argv[1:])
    if command is None:
        return
    ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
    request = {
        "state": _state(),
        "raylet": os.getppid(),
        "arguments": command,
        "environment": dict(os.environ),
        "path": sys.path,
        "folder": os.getcwd(),
        "group": 0 if os.getpgid(0) == os.getpid() else os.getpgid(0),
        "umask": _umask(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "ignored": [int(number) for number in ignored],
    }
    content = json.dumps(request).encode()
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET_VARIABLE])
        files = [0, 1, 2, *(os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES)]
        socket.send_fds(connection, [len(content).to_bytes(4)], files)
        connection.sendall(content)
        if connection.recv(1):
            os._exit(0)


def _command(words: list[str]) -> list[str] | None:
    """Return the command of a worker process, with its variables set; None if it is of another kind."""
    if words[0].endswith("default_worker.py"):
        return words
    command, context = [], {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
        elif name != "--language":
            command.append(word)
    variables = context.pop("env_vars", None) or {}
    usual = {"py_executable": sys.executable, "command_prefix": [], "java_jars": []}
    is_plain = all(value in (None, usual.get(name)) for name, value in context.items())
    is_plain = is_plain and not any("$" in value for value in variables.values())
    if not is_plain or not command or not command[0].endswith("default_worker.py"):
        return None
    os.environ.update(variables)
    return command


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# ---- the template --------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Import the modules, then fork a process for each request until standard input ends."""
    state = json.loads(json.dumps(_state()))  # imports set variables of their own
    for name in MODULES:
        importlib.import_module(name)
    shared = [name for name in sys.modules if name.partition(".")[0] in ("ray", "ray_detox")]
    assert not shared, f"{shared} were imported, and all workers would share their state"
    threads = {Path(path, "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()}
    # jemalloc starts its own thread again after a fork.
    others = threads - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}
    assert not others, f"the template has the threads {others}, and a forked process would not"
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forked processes leave no zombies
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.new")
        server.listen(64)
        Path(address).with_name("pid").write_text(str(os.getpid()))
        os.rename(f"{address}.new", address)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError, ValueError):
                size, files, _, _ = socket.recv_fds(connection, 4, FILES)
                request = json.loads(_receive(connection, int.from_bytes(size)))
                if request["state"] == state and os.fork() == 0:
                    server.close()
                    _record(address, os.getpid()).write_text(str(request["raylet"]))
                    _become_worker(request, files, connection)
                for file in files:
                    os.close(file)


def _record(address: str, pid: int) -> Path:
    """Return the file that names the raylet for which a process was forked."""
    return Path(address).with_name(f"raylet-of-{pid}")


def raylet_of(pid: int, parent: int) -> int:
    """Return the process that asked for a worker process: not its parent if it was forked here."""
    with contextlib.suppress(OSError, KeyError):
        address = os.environ[SOCKET_VARIABLE]
        if parent == int(Path(address).with_name("pid").read_text()):
            return int(_record(address, pid).read_text())
    return parent


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise OSError("the request ended early")
        content += part
    return content


def _become_worker(
    request: dict[str, Any], files: list[int], connection: socket.socket
) -> NoReturn:
    """Run `default_worker.py` in this forked process."""
    code = 1
    try:
        _set_up(request, files)
        connection.sendall(b"1")
        connection.close()
        script = request["arguments"][0]
        sys.argv = request["arguments"]
        sys.orig_argv[:] = [sys.executable, *sys.argv]
        sys.path[:] = [os.path.dirname(script), *request["path"]]
        import runpy

        import numpy

        numpy.random.seed()  # Python's own generator does so itself
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        import atexit

        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _set_up(request: dict[str, Any], files: list[int]) -> None:
    """Give this process what the process that handed over had."""
    for target, file in enumerate(files[:3]):
        os.dup2(file, target)
    for name, file in zip(NAMESPACES, files[3:], strict=True):
        if not os.path.sameopenfile(file, own := os.open(f"/proc/self/ns/{name}", os.O_RDONLY)):
            _enter_namespace(file)
        os.close(own)
    for file in files:
        os.close(file)
    os.setpgid(0, request["group"])
    os.umask(request["umask"])
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    for name in set(os.environ) - set(request["environment"]):
        del os.environ[name]
    os.environ.update(request["environment"])
    gc.set_threshold(*THRESHOLDS)


def _enter_namespace(file: int) -> None:
    # Python itself has setns since 3.12.
    if ctypes.CDLL(None, use_errno=True).setns(file, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


if __name__ == "__main__":
    serve(sys.argv[1])
