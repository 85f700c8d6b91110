"""The file with the token of a cluster: whoever reads it runs code on the cluster."""

import io
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ray_detox.cli import jobs

ROOT = Path(__file__).parents[1]


def test_wherever_a_token_is_made_only_its_owner_can_read_it():
    places = [*(ROOT / "scripts").iterdir(), *(ROOT / "cluster").iterdir(), ROOT / "README.md"]
    found = 0
    for place in places:
        text = place.read_text("utf-8") if place.is_file() else ""
        for use in re.finditer("get-auth-token", text):
            found += 1
            assert "umask 077" in text[max(0, use.start() - 250) : use.start()], place
    assert found >= 3


def test_with_that_umask_ray_makes_a_private_file(tmp_path):
    ray = Path(sys.executable).with_name("ray")

    subprocess.run(
        ["bash", "-c", f"umask 077; '{ray}' get-auth-token --generate"],
        env=os.environ | {"HOME": str(tmp_path)},
        check=True,
        capture_output=True,
    )

    file = tmp_path / ".ray/auth_token"
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_submit_warns_in_one_line_if_others_can_read_the_token(tmp_path, capsys, mode):
    file = tmp_path / "auth token"
    file.touch(mode)
    file.chmod(mode)

    jobs._warn_if_shared(file)

    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning   other users of this machine can read the token in ")
    assert line.endswith(f"Make it private: chmod 600 '{file}'")


def test_submit_says_nothing_about_a_private_token_or_none(tmp_path, capsys):
    file = tmp_path / "auth_token"
    jobs._warn_if_shared(file)
    file.touch(0o600)
    jobs._warn_if_shared(file)

    assert capsys.readouterr().out == ""


def test_submit_looks_at_the_token_that_it_sends(tmp_path, capsys, monkeypatch):
    looked = []
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or the client would set it for all tests
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    monkeypatch.setattr(jobs, "_warn_if_shared", looked.append)
    monkeypatch.setattr("urllib.request.urlopen", lambda *asked, **more: io.BytesIO())
    monkeypatch.setattr(
        "ray.job_submission.JobSubmissionClient", lambda address: pytest.fail("reached")
    )

    with pytest.raises(pytest.fail.Exception, match="reached"):
        jobs._reach("http://127.0.0.1:9")

    assert looked == [tmp_path / "mine"]
