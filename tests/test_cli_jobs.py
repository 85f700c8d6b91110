"""`ray-detox submit`: the mistakes it refuses before sending, and whole runs on a real head."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ray_detox.cli import jobs as cli_jobs
from ray_detox.cli import main as cli
from tests.environment import python_path

ROOT = Path(__file__).parents[1]
SMALL = ["train.steps=4", "ppo.prompts_per_step=16", "evaluate.prompts=8"]
SMALL += ["train.workers=1", "evaluate.shards=1"]  # these tests are about jobs


def test_the_jobs_of_a_run_are_in_the_order_in_which_they_were_sent():
    # The clock of the head jumped back between the first two.
    sent = [("first", 900), ("first-resumed-1", 300), ("first-resumed-2", 400)]
    sent += [(f"first-resumed-{number}", 500) for number in range(3, 12)]
    details = [
        SimpleNamespace(submission_id=name, start_time=at, metadata={"run_id": "first"})
        for name, at in sent
    ]
    other = SimpleNamespace(submission_id="x", start_time=1, metadata=None)
    client = SimpleNamespace(list_jobs=lambda: [other, *sorted(details, key=id)])

    found = cli_jobs._jobs(client, "first")

    assert [job.submission_id for job in found] == [name for name, _ in sent]


@pytest.fixture
def refused(capsys, monkeypatch):
    """`refused(*words)`: submit with a mistake, and return the error line."""
    monkeypatch.setattr(cli_jobs, "HTTP_TIMEOUT_S", 0.5)

    def submit(*words: str) -> str:
        assert cli.main(["submit", *words]) == cli.MISTAKE
        said = capsys.readouterr().err
        assert said.startswith("ray-detox: ")
        assert said.count("\n") == 1
        return said

    return submit


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lab", "ppo.kl_coeff=1"], "kl_coef"),
        (["lab", "seed"], "Two recipes"),
        (["nowhere"], "Unknown recipe 'nowhere'"),
        (["lab", "--run-id", "../x"], "Run id '../x' cannot be used"),
        (["lab", "cluster.address=10.0.0.1:6379"], "the cluster that --address names"),
        (["--resume", "a", "--run-id", "b"], "exclude each other"),
        (["--resume", "a", "train.steps"], "train.steps"),
        (["--follow", "a", "lab"], "take nothing else"),
        (["--stop", "a", "--follow", "b"], "take nothing else"),
        (["--stop", ""], "Run id '' cannot be used"),
        (["lab", "--env", "NAME"], "expected NAME=VALUE"),
        (["lab", "--env", "HF_TOKEN=hf_x"], "would be shown on the dashboard"),
        (["lab", "--env", "AWS_SECRET_ACCESS_KEY=x"], "would be shown on the dashboard"),
        (["lab", "--address", "10.0.0.1:6379"], "expected the dashboard's address"),
        (["lab", "--address", "ray://10.0.0.1:10001"], "expected the dashboard's address"),
        (["lab", "--address", "http://127.0.0.1:9"], "No job server answers at http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_sent(refused, words, sentence):
    said = refused(*words)

    assert sentence in said
    assert "hf_x" not in said


def test_a_server_that_never_answers_is_refused_after_the_timeout(refused):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"No job server answers at {address}" in refused("lab", "--address", address)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [("2.9.0", "The cluster runs Ray 2.9.0"), (None, "is not a job server of Ray")],
)
def test_another_server_and_another_ray_version_are_refused(refused, version, sentence):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/api/version": {"ray_version": version}, "/api/jobs/": []}
            self.send_response(200 if version and self.path in known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(known.get(self.path, "?")).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert sentence in refused("lab", "--address", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_only_the_package_and_the_named_files_are_sent(tmp_path):
    (tmp_path / "mine" / "__pycache__").mkdir(parents=True)
    (tmp_path / "mine" / "rewards.py").write_text("x = 1")
    (tmp_path / "mine" / "__pycache__" / "rewards.pyc").write_text("")
    (tmp_path / "my.yaml").write_text("train: {steps: 3}")
    sent = tmp_path / "sent"
    sent.mkdir()
    words = [str(tmp_path / "my.yaml"), "--with", str(tmp_path / "mine"), "--run-id", "r"]
    args = cli._parser().parse_args(["submit", *words])

    run_id, command, files = cli_jobs._read(args)
    size = cli_jobs._gather(sent, files)

    assert (run_id, command) == ("r", ["my.yaml", "--run-id", "r"])
    assert sorted(path.name for path in sent.iterdir()) == ["mine", "my.yaml", "ray_detox"]
    assert [path.name for path in (sent / "mine").iterdir()] == ["rewards.py"]
    package = ROOT / "ray_detox"
    kept = {p.relative_to(package) for p in package.rglob("*") if "__pycache__" not in p.parts}
    assert {
        path.relative_to(sent / "ray_detox") for path in (sent / "ray_detox").rglob("*")
    } == kept
    assert size == sum(path.stat().st_size for path in sent.rglob("*") if path.is_file())


def test_files_that_cannot_be_sent_are_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3000)
    sent = tmp_path / "sent"
    sent.mkdir()
    with pytest.raises(cli_jobs.ConfigError, match="absent does not exist"):
        cli_jobs._gather(sent, [tmp_path / "absent"])
    monkeypatch.setattr(cli_jobs, "LARGEST", 2000)
    with pytest.raises(cli_jobs.ConfigError, match=r"the largest file is model\.safetensors"):
        cli_jobs._gather(sent, [tmp_path / "model.safetensors"])
    with pytest.raises(cli_jobs.ConfigError, match="is sent already"):
        cli_jobs._gather(sent, [tmp_path / "model.safetensors"])


class Server:
    """A job server whose log stream breaks `breaks` times; its job has ended with `job`."""

    def __init__(self, job: SimpleNamespace, breaks: int) -> None:
        self.job, self.breaks = job, breaks

    async def tail_job_logs(self, job_id: str) -> Any:
        self.breaks -= 1
        yield "step 1\n"
        if self.breaks >= 0:
            raise ConnectionResetError("the tunnel is gone")
        yield "step 2\n"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return self.job

    def get_job_logs(self, job_id: str) -> str:
        return "step 1\nstep 2\nstep 3\n"


def follow(server: Server, *words: str) -> int:
    """Follow a job in a thread, as pytest's own may have an event loop; return the exit code."""
    args = cli._parser().parse_args(["submit", *words])
    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(cli_jobs._follow, server, "r", "r", args).result(60)


@pytest.mark.parametrize(
    ("status", "driver", "code", "sentence"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 1, 1, "ended early; go on with ray-detox submit --resume r"),
        ("FAILED", -9, 1, "failed: why\njob       ended early"),
        ("FAILED", None, 1, "failed: why\njob       ended early"),
        ("STOPPED", 143, 143, "stopped; go on with ray-detox submit --resume r"),
    ],
)
def test_the_log_is_printed_once_and_the_exit_code_is_the_drivers(
    monkeypatch, capsys, status, driver, code, sentence
):
    monkeypatch.delenv("RAY_DETOX_SUBMIT", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    job = SimpleNamespace(status=status, driver_exit_code=driver, message="why")

    assert follow(Server(job, breaks=3)) == code

    printed = capsys.readouterr().out
    assert printed.startswith("step 1\nstep 2\nstep 3\n")
    assert printed.count("step") == 3
    assert sentence in printed
    assert ("--resume" in printed) == bool(sentence)


def test_a_log_cannot_steer_the_terminal(capsys):
    log = cli_jobs._Log()

    log.print_new("step 1\x1b[2J\r\n")
    log.print_new("step 1\x1b[2J\r\nhalf\rdone")

    assert capsys.readouterr().out == "step 1\\x1b[2J\nhalf\ndone"


def test_following_ends_when_the_job_server_stays_away(monkeypatch, capsys):
    monkeypatch.setattr(cli_jobs, "LOST_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    away = Server(SimpleNamespace(), breaks=10**6)
    assert follow(away, "--address", "http://far:8265") == 1

    said = capsys.readouterr().out
    assert "has not answered for 0 s (ConnectionResetError)" in said
    assert "--follow r --address http://far:8265" in said


# ---- a real head -----------------------------------------------------------------------------


class Head:
    """A head started by scripts/head.sh, and scripts/submit.sh as a user calls it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        names = ("RAY_", "AWS_", "PYTEST_", "PYTHONPATH", "TMPDIR")
        env = {key: value for key, value in os.environ.items() if not key.startswith(names)}
        self.env = env | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.env["PYTHONPATH"] = python_path()
        ports = [free_port() for _ in range(3)]
        self.env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{ports[0]}"
        options = [f"--dashboard-port={ports[0]}", f"--port={ports[1]}"]
        options += [f"--ray-client-server-port={ports[2]}", f"--temp-dir={home / 'ray'}"]
        options += ["--object-store-memory=200000000"]
        self.log = (home / "head.log").open("w")
        self.process = subprocess.Popen(
            ["bash", "scripts/head.sh", *options],
            cwd=ROOT,
            env=self.env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        for _ in range(240):
            if self.process.poll() is not None:
                break
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                    return
            time.sleep(0.5)
        pytest.fail(f"no head: {(home / 'head.log').read_text()[-2000:]}")

    def submit(self, *words: str, **settings: Any) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = ["bash", "scripts/submit.sh", *words]
        return subprocess.Popen(command, cwd=ROOT, env=self.env, **pipes | settings)

    def submitted(self, *words: str) -> tuple[int, str, str]:
        process = self.submit(*words)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def ray(self, *words: str) -> str:
        return subprocess.run(
            [Path(sys.executable).with_name("ray"), *words],
            env=self.env | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    def close(self) -> None:
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        _, left = psutil.wait_procs([psutil.Process(self.process.pid), *started], timeout=5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)
        self.log.close()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # A short path: the paths of Ray's sockets may have 107 characters at most.
    home = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    head = Head(home)
    yield head
    head.close()
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.ray
def test_a_run_with_own_files_is_submitted_stopped_and_resumed(head, tmp_path):
    (tmp_path / "own_rewards.py").write_text(
        "def brief(prompts, completions, **_):\n    return [-len(c) / 100 for c in completions]\n"
    )
    terms = "reward:\n  terms: [{function: own_rewards.brief, weight: 0.1}]\n"
    lab = (ROOT / "ray_detox" / "recipes" / "lab.yaml").read_text()
    (tmp_path / "own.yaml").write_text(lab.replace("reward:\n", terms))
    own = ["--with", str(tmp_path / "own_rewards.py")]
    longer = [*SMALL, "train.steps=400", "--run-id", "own"]

    process = head.submit(str(tmp_path / "own.yaml"), *longer, *own, bufsize=1)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step   2/"):
            break
    assert lines[0] == "run       own\n"
    assert lines[-1].startswith("step   2/400"), "".join(lines)

    code, _, err = head.submitted("lab", "--run-id", "own")
    assert code == 2
    assert "is being worked on (job own, running)" in err
    head.ray("job", "stop", "own", "--no-wait")
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 143, rest
    assert "stopping after this step, with a checkpoint" in rest
    assert "Stopped after step" in rest
    assert "job       stopped; go on with bash scripts/submit.sh --resume own" in rest
    code, _, err = head.submitted("lab", "--run-id", "own")
    assert code == 2
    assert "A job has had run 'own' (stopped)" in err

    # It resumes at its step, with fewer steps to go; the log is followed from its beginning.
    folder = head.home / "runs" / "own"
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    code, out, err = head.submitted("--resume", "own", f"train.steps={done + 2}", "--no-wait", *own)
    assert code == 0, err
    assert "submit.sh --stop own" in out
    code, out, err = head.submitted("--follow", "own")
    assert code == 0, out + err
    assert "\r" not in out
    assert "\x1b" not in out
    assert [int(step) for step in re.findall(rf"^step +(\d+)/{done + 2} ", out, re.MULTILINE)] == [
        done + 1,
        done + 2,
    ]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, done + 3))
    assert all("brief" in row["terms"] for row in rows)
    report = json.loads((folder / "report.json").read_text())
    assert (report["status"], report["n"]) == ("complete", 8)


@pytest.mark.ray
def test_a_refusal_by_the_driver_is_passed_on(head):
    code, out, _ = head.submitted("lab", "serving.gpus_per_actor=1", "--run-id", "greedy")

    assert code == 2
    assert "ray-detox: The run needs" in out
    assert "--resume" not in out


@pytest.mark.ray
def test_a_job_that_is_stopped_before_training_reports_it(head):
    process = head.submit("lab", *SMALL, "--run-id", "early", bufsize=1)
    for line in process.stdout:
        if line.startswith("ingest"):
            break

    code, out, err = head.submitted("--stop", "early")
    rest, _ = process.communicate(timeout=300)

    assert (code, process.returncode) == (0, 128 + signal.SIGTERM), out + err + rest
    assert "job       stopped; go on with" in out
    assert "ray-detox: stopped." in rest
