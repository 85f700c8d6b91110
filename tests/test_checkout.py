"""What a checkout and a job contain: line ends of scripts, and all files that `--with` names."""

import io
import json
import os
import shutil
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from ray_detox.cli.jobs import _gather
from ray_detox.cli.main import main
from ray_detox.config import ConfigError

ROOT = Path(__file__).parents[1]


def test_scripts_keep_their_line_ends_in_a_checkout_on_windows(tmp_path):
    """With `core.autocrlf`, which Git for Windows sets; in a folder whose name has a space."""
    source, clone = tmp_path / "source", tmp_path / "a clone"
    (source / "scripts").mkdir(parents=True)
    for name in (".gitattributes", "scripts/head.sh", "scripts/_env.sh", "README.md"):
        shutil.copy(ROOT / name, source / name)
    identity = [
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.com",
        "-c",
        "commit.gpgsign=false",
    ]
    subprocess.run(["git", "init", "-q", source], check=True)
    subprocess.run(["git", "-C", source, "add", "-A"], check=True)
    subprocess.run(["git", *identity, "-C", source, "commit", "-qm", "first"], check=True)

    subprocess.run(["git", "-c", "core.autocrlf=true", "clone", "-q", source, clone], check=True)

    assert [file for file in clone.rglob("*.sh") if b"\r" in file.read_bytes()] == []
    help_text = subprocess.check_output(
        ["bash", clone / "scripts" / "head.sh", "--help"], text=True
    )
    assert help_text.startswith("Usage: bash scripts/head.sh")


@pytest.fixture
def job_server():
    """A job server that takes one job: its address, and the bodies that it got by path."""
    got = {}

    class Answer(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.command != "GET":
                got[self.path] = body
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            if "/packages/" in self.path:
                self.answer({}, 404)
            else:
                self.answer([] if "/jobs" in self.path else {"ray_version": ray.__version__})

        def do_PUT(self):
            self.answer({})

        def do_POST(self):
            self.answer({"job_id": "first", "submission_id": "first"})

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_what_a_job_takes_along_arrives_whole(tmp_path, job_server, monkeypatch):
    """Ray's own packaging leaves out what a .gitignore in a folder names."""
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address, got = job_server
    words = tmp_path / "my rewards"
    words.mkdir()
    (words / ".gitignore").write_text("*.txt")
    (words / "words.txt").write_text("one two")
    options = ["--with", str(words), "--address", address, "--run-id", "first", "--no-wait"]

    assert main(["submit", "lab", *options]) == 0

    (package,) = [body for path, body in got.items() if "/packages/" in path]
    with zipfile.ZipFile(io.BytesIO(package)) as sent:
        assert sent.read("my rewards/words.txt") == b"one two"
        assert "ray_detox/lab/models/t5/model.safetensors" in sent.namelist()
    assert json.loads(got["/api/jobs/"])["metadata"] == {"run_id": "first"}


def test_a_file_that_cannot_be_sent_is_named(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "job").mkdir()

    with pytest.raises(
        ConfigError, match=r"--with .*mine cannot be sent: .*gone\.txt: No such file"
    ):
        _gather(tmp_path / "job", [tmp_path / "mine"])
    with pytest.raises(ConfigError, match=r"--with .*pipe\.py cannot be sent: "):
        _gather(tmp_path / "job", [tmp_path / "pipe.py"])
