"""The machine that a process runs on: its CPUs, its environment and the modules of its Python.

Containers, batch systems and company networks change what libraries take for granted: the number of CPUs,
a name for the user, direct connections to this machine, and variables that are set.
"""

import importlib.util
import ipaddress
import os
import sys
from contextlib import suppress
from pathlib import Path

_BLANK_PREFIXES = ("AWS_", "HF_", "RAY_", "XDG_", "HUGGING_FACE_")
_BLANK_NAMES = ("HOME", "TMPDIR", "TMP", "TEMP", "USER", "LOGNAME", "COLUMNS")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

OPTIONAL_MODULES = {
    "_sqlite3": "SQLite (libsqlite3-dev)",
    "_lzma": "xz (liblzma-dev)",
    "_bz2": "bzip2 (libbz2-dev)",
    "_ctypes": "libffi (libffi-dev)",
    "_ssl": "OpenSSL (libssl-dev)",
    "_hashlib": "OpenSSL (libssl-dev)",
    "zlib": "zlib (zlib1g-dev)",
    "_curses": "ncurses (libncurses-dev)",
    "readline": "readline (libreadline-dev)",
    "_uuid": "libuuid (uuid-dev)",
}
"""Modules that Python is built without if a library is missing at that time; Debian's names of them."""
NEEDED_MODULES = ("_sqlite3", "_lzma", "_bz2", "_ctypes", "_ssl", "zlib")
"""Modules that a run cannot do without."""


def prepare_environment() -> None:
    """Correct variables of this process that would mislead libraries, and those that start from it."""
    for name, value in list(os.environ.items()):
        # A variable that is set to nothing is not set: `AWS_PROFILE=` would be a profile without a name.
        if not value.strip() and (name in _BLANK_NAMES or name.startswith(_BLANK_PREFIXES)):
            del os.environ[name]
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        reach_directly(*LOOPBACK_NAMES)
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        _name_user()


def reach_directly(*hosts: str) -> None:
    """Let this process, and those that it starts, connect to some hosts without the HTTP proxy."""
    for variable in ("no_proxy", "NO_PROXY"):
        known = [host.strip() for host in os.environ.get(variable, "").split(",") if host.strip()]
        if "*" not in known:
            os.environ[variable] = ",".join(dict.fromkeys((*known, *hosts)))


def is_private(host: str) -> bool:
    """Return whether a host is this machine, or an address of a network that no HTTP proxy serves."""
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_private
    return host == "localhost" or host.endswith(".localhost") or "." not in host


def proxy_in_use() -> str | None:
    """Return the first variable that names an HTTP proxy, such as `http_proxy`; None if none is set."""
    names = [each for name in _PROXIES for each in (name, name.upper())]
    return next((name for name in names if os.environ.get(name)), None)


def _name_user() -> None:
    """Set USER if the user id has no name, as in a container with a random one: libraries ask for it."""
    with suppress(ImportError):  # Windows has no such module
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"


def cpu_count() -> int:
    """Return the CPUs that this process may use: not more than affinity, container and SLURM allow."""
    try:
        counts = [float(len(os.sched_getaffinity(0)))]
    except (AttributeError, OSError):  # only Linux has it
        counts = [float(os.cpu_count() or 1)]
    counts += _cgroup_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    if "SLURM_JOB_ID" in os.environ or "SLURM_JOBID" in os.environ:
        for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
            if (given := os.environ.get(name, "")).isdecimal() and int(given):
                counts.append(int(given))
    return max(1, int(min(counts) + 0.999))


def _cgroup_limits(root: Path, own: Path) -> list[float]:
    """Return the CPUs that control groups of version 1 or 2 allow: those of this process, and above it."""
    limits = []
    for controllers, path in _cgroups(own):
        is_v2 = not controllers
        for base in [root] if is_v2 else [root / controllers, root / "cpu", root / "cpu,cpuacct"]:
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                limits += _limit(folder, is_v2)
                if folder == base:
                    break
    return limits


def _cgroups(own: Path) -> list[tuple[str, str]]:
    """Return the controllers and the path of the groups of this process that may limit its CPUs."""
    found = [("", "/"), ("cpu", "/")]  # in a container, the files at the root are its own
    with suppress(OSError):
        for line in own.read_text(errors="replace").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if not controllers or "cpu" in controllers.split(","):
                found.append((controllers, path))
    return found


def _limit(folder: Path, is_v2: bool) -> list[float]:
    files = ["cpu.max"] if is_v2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    with suppress(OSError, ValueError):
        words = [word for file in files for word in (folder / file).read_text().split()]
        quota, period = (float(word) for word in words)  # `max` is no number: no limit
        if quota > 0 and period > 0:
            return [quota / period]
    return []


def missing_modules() -> list[str]:
    """Return the modules of NEEDED_MODULES that this Python was built without."""
    return [name for name in NEEDED_MODULES if not _exists(name)]


def _exists(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def built_without(module: str) -> str:
    """Say that this Python lacks a module of its standard library, and what to do."""
    library = OPTIONAL_MODULES.get(module, module)
    return (
        f"This Python ({sys.executable}, {sys.version.split()[0]}) was built without {module}: {library} "
        "was missing at that time. Install another Python, such as that of your system, or install the "
        "library and build this one again."
    )
