"""What a checkout and a job contain: line ends of scripts, and all files that `--with` names."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ray_detox.cli.jobs import _gather
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


def test_what_a_job_takes_along_arrives_whole(tmp_path):
    words = tmp_path / "my rewards"
    words.mkdir()
    (words / ".gitignore").write_text("*.txt")
    (words / "words.txt").write_text("one two")
    (tmp_path / "job").mkdir()

    _gather(tmp_path / "job", [words])

    assert (tmp_path / "job" / "my rewards" / "words.txt").read_text() == "one two"


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
