"""Machines that differ from a developer's: containers, batch jobs, proxies, networks' file systems."""

import functools
import getpass
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from ray_detox import machine
from ray_detox.cli import main as cli
from ray_detox.cli.main import main
from ray_detox.recipes.loading import load_config
from ray_detox.stages.cluster import connect, private
from ray_detox.stages.preflight import check_local_cpus
from ray_detox.store import sqlite
from ray_detox.store.errors import StoreError
from ray_detox.store.sqlite import SQLiteStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restore the environment after each test, also what the code under test changes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# ---- CPUs ------------------------------------------------------------------------------------


def test_the_count_of_cpus_is_that_of_the_affinity_and_not_of_the_host(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    assert machine.cpu_count() <= len(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c"]
    code = "from ray_detox.machine import cpu_count; print(cpu_count())"
    assert subprocess.check_output([*command, code], cwd=ROOT, text=True) == "1\n"


@pytest.mark.parametrize(
    ("files", "own", "limits"),
    [
        ({"cpu.max": "250000 100000"}, "0::/", [2.5]),
        ({"cpu.max": "max 100000"}, "0::/", []),
        ({"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, "0::/job/step", [3.0]),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, "", [1.5]),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "", []),
        ({"cpu.max": ""}, "garbage", []),
    ],
)
def test_the_quota_of_a_container_limits_the_cpus(tmp_path, files, own, limits):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "own").write_text(own)

    assert set(machine._cgroup_limits(root, tmp_path / "own")) == set(limits)


def test_a_slurm_job_has_the_cpus_of_its_task(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(machine, "_cgroup_limits", lambda *files: [])
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert machine.cpu_count() == 64

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert machine.cpu_count() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert machine.cpu_count() == 2


def test_a_process_with_more_cpus_than_the_machine_has_is_refused(capsys, tmp_path):
    words = ["cluster.cpus_per_worker=6400", "--output", str(tmp_path)]

    assert main(["run", "lab", *words]) == cli.MISTAKE

    sentence = capsys.readouterr().err
    assert sentence.startswith("ray-detox: cluster.cpus_per_worker is 6400, and this machine has ")
    assert list(tmp_path.iterdir()) == []
    check_local_cpus(load_config("lab", ["train.workers=8", "cluster.cpus_per_worker=2"]), 2)


# ---- the environment -------------------------------------------------------------------------


def test_variables_that_are_set_to_nothing_count_as_not_set(monkeypatch):
    names = [
        "AWS_PROFILE",
        "HF_HOME",
        "RAY_ADDRESS",
        "XDG_STATE_HOME",
        "TMPDIR",
        "HOME",
        "RAY_TMPDIR",
    ]
    for name in names:
        monkeypatch.setenv(name, " " if name == "HF_HOME" else "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    machine.prepare_environment()

    assert not set(names) & os.environ.keys()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "here nothing means no GPU"
    assert connect.is_local(load_config("lab"))


@pytest.mark.parametrize("given", ["", "local"])
def test_an_address_of_nothing_or_local_starts_ray_here(monkeypatch, given):
    monkeypatch.setenv("RAY_ADDRESS", given)

    assert connect.is_local(load_config("lab"))


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "ray://10.0.0.1:10001", "head"])
def test_an_address_of_another_kind_is_refused_with_the_variable_that_has_it(
    monkeypatch, capsys, tmp_path, address
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    assert main(["run", "lab", "--output", str(tmp_path)]) == cli.MISTAKE

    sentence = capsys.readouterr().err
    assert (
        f"The address of the cluster is {address!r} (RAY_ADDRESS); expected host:port" in sentence
    )
    assert list(tmp_path.iterdir()) == []


def test_a_user_id_without_a_name_gets_one(monkeypatch):
    """As in a container that gets a random user id; torch and others ask for the user's name."""
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_002_700_000)
    with pytest.raises(KeyError):
        getpass.getuser()

    machine.prepare_environment()

    assert getpass.getuser() == "uid-1002700000"


# ---- proxies ---------------------------------------------------------------------------------


@pytest.fixture
def listener():
    """Address of a server that is no job server of Ray; it answers every request."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_server_on_this_machine_is_reached_without_the_proxy(
    monkeypatch, capsys, listener, variable
):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")

    assert main(["submit", "lab", "--address", f"http://{listener}"]) == cli.MISTAKE

    assert f"http://{listener} is not a job server of Ray" in capsys.readouterr().err
    assert os.environ["no_proxy"] == "localhost,127.0.0.1,::1"


def test_a_head_that_only_a_proxy_could_reach_is_reported_with_the_proxy(monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet.example")

    assert main(["submit", "lab", "--address", "http://head.invalid:8265"]) == cli.MISTAKE

    sentence = capsys.readouterr().err
    assert (
        "It was asked through http_proxy; if it is reached without, add head.invalid to no_proxy"
        in (sentence)
    )
    assert os.environ["no_proxy"] == "intranet.example,localhost,127.0.0.1,::1"


# ---- a Python without modules ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "command"),
    [("_lzma", "run"), ("_bz2", "check"), ("_ctypes", "evaluate"), ("_sqlite3", "results")],
)
def test_a_module_that_python_was_built_without_is_named(tmp_path, module, command):
    code = f"import sys; sys.modules[{module!r}] = None; from ray_detox.cli.main import main; "
    words = [command, *(["first"] if command == "evaluate" else []), "--output", str(tmp_path)]
    (tmp_path / "results.sqlite").touch()

    done = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit(main({words!r}))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == cli.MISTAKE, done.stderr
    assert done.stderr.startswith("ray-detox: This Python (")
    assert f"was built without {module}: " in done.stderr
    assert done.stderr.count("\n") == 1


# ---- Ray does not start ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Exception, RuntimeError, ValueError, OSError])
def test_a_ray_that_does_not_start_is_one_sentence_with_its_logs(
    monkeypatch, capsys, tmp_path, kind
):
    def init(_temp_dir, **asked):
        logs = Path(_temp_dir) / "session_2026-01-02_03-04-05_6_7" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text("no more threads")
        raise kind("The current node timed out during startup.\n See the logs.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    assert (
        main(["run", "lab", "--output", str(tmp_path / "runs"), "--run-id", "first"]) == cli.MISTAKE
    )

    sentence = capsys.readouterr().err
    assert sentence.startswith(
        "ray-detox: Ray did not start on this machine (The current node timed out during startup. See "
        "the logs). Its logs are in "
    )
    kept = Path(sentence.partition("Its logs are in ")[2].partition(". ")[0])
    assert (kept / "raylet.err").read_text() == "no more threads"
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert "resume" not in sentence, "nothing has begun"
    assert not (tmp_path / "runs" / "first").exists()


def test_ray_keeps_its_objects_on_disk_if_there_is_no_shared_memory(tmp_path):
    folder = tmp_path / "rdx-1" / "r"
    (tmp_path / "shm").mkdir()

    assert private.shared_memory_folder(folder, tmp_path / "none") == str(folder.parent)
    assert private.shared_memory_folder(folder, tmp_path / "shm") is None


# ---- the results file ------------------------------------------------------------------------


class OnNFS(sqlite3.Connection):
    """A connection to a file on NFS, which has no shared memory."""

    def execute(self, statement, *values):
        if statement == "PRAGMA journal_mode = WAL":
            raise sqlite3.OperationalError("locking protocol")
        return super().execute(statement, *values)


def test_a_results_file_on_nfs_gets_a_rollback_journal_and_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(
        sqlite.sqlite3, "connect", functools.partial(sqlite3.connect, factory=OnNFS)
    )
    store = SQLiteStore(tmp_path / "results.sqlite")

    store.check()

    assert "a file system without write-ahead logging (locking protocol)" in caplog.text
    assert store.list_runs() == []
    with sqlite3.connect(tmp_path / "results.sqlite") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_an_old_sqlite_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version_info", (3, 26, 0))
    monkeypatch.setattr(sqlite.sqlite3, "sqlite_version", "3.26.0")

    with pytest.raises(
        StoreError, match=r"This Python has SQLite 3.26.0, and 3.31 or newer is needed"
    ):
        SQLiteStore(tmp_path / "results.sqlite").check()


def test_results_of_somebody_else_can_be_read_without_leave_to_write():
    if os.geteuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        runs = Path(name) / "their runs"
        runs.mkdir()
        SQLiteStore(runs / "results.sqlite").check()
        (runs / "results.sqlite").chmod(0o644)
        runs.chmod(0o755)
        Path(name).chmod(0o755)
        code = (
            "import os, sys\nfrom ray_detox.cli.main import main\nmain(sys.argv[1:])\n"
            "os.setresgid(65534, 65534, 65534)\nos.setresuid(65534, 65534, 65534)\n"
            "sys.exit(main(sys.argv[1:]))"
        )

        done = subprocess.run(
            [sys.executable, "-c", code, "results", "--output", str(runs)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("No run is stored there yet") == 2
        assert sorted(file.name for file in runs.iterdir()) == ["results.sqlite"]
