"""Ray's temporary folder: no other user reaches it, and nothing is left of runs that have ended."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_detox.errors import ConfigError
from ray_detox.stages.cluster import private

ROOT = Path(__file__).parents[1]
NOBODY = 65534
HOLD = """
import sys
from ray_detox.stages.cluster.private import private_folder
with private_folder() as folder:
    folder.mkdir(mode=0o777)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def parent(monkeypatch, tmp_path):
    """A temporary folder like /tmp: everybody may write it, and it is sticky."""
    # `tmp_path` was made before `tempfile` changes; its own path is too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        yield folder


def hold():
    """Start a process that holds a folder; return it and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def modes(folder):
    return {str(each): stat.S_IMODE(each.stat().st_mode) for each in (folder, *folder.parents)}


def test_a_folder_above_rays_own_is_closed_to_others_and_removed_at_the_end(parent):
    with private.private_folder() as folder:
        folder.mkdir()
        folder.chmod(0o777)  # as Ray does

        assert folder.is_relative_to(parent)
        assert modes(folder)[str(folder.parent)] == 0o700
        for each, mode in modes(folder.parent).items():
            assert not mode & 0o022 or mode & stat.S_ISVTX, each
    assert list(parent.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_another_user_can_replace_nothing_below_or_beside_the_folder(parent):
    attempt = (
        "import os, sys\n"
        "folder, failed = sys.argv[1], []\n"
        "outer = os.path.dirname(folder)\n"
        "for act in (lambda: os.listdir(folder), lambda: open(folder + '/package.py', 'w'),\n"
        "            lambda: os.rename(folder + '/package.py', folder + '/old.py'),\n"
        "            lambda: os.rename(outer, outer + 'x'), lambda: os.chmod(outer, 0o777)):\n"
        "    try:\n"
        "        act()\n"
        "    except PermissionError:\n"
        "        failed.append(True)\n"
        "print(len(failed))\n"
    )

    with private.private_folder() as folder:
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "package.py").write_text("mine")

        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", attempt, str(folder)],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
        )

        assert done.stdout.strip() == "5", done.stderr
        assert (folder / "package.py").read_text() == "mine"


def test_the_folder_of_a_killed_run_is_removed_by_the_next_and_that_of_a_live_run_is_not(parent):
    killed, stale = hold()
    live, used = hold()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait(20)
        assert stale.exists()

        with private.private_folder():
            pass

        assert not stale.parent.exists()
        assert used.exists()
    finally:
        live.communicate("", timeout=20)
    assert not used.parent.exists()


@pytest.mark.parametrize("change", ["mode", "no lock", "link", "owner"])
def test_what_is_not_a_stale_folder_of_this_user_is_left_alone(parent, tmp_path, change):
    folder = parent / "rdx-abcdefgh"
    real = tmp_path / "real" if change == "link" else folder
    real.mkdir(mode=0o700)
    (real / "lock").touch()
    if change == "mode":
        real.chmod(0o755)
    elif change == "no lock":
        (real / "lock").unlink()
    elif change == "link":
        folder.symlink_to(real)
    elif os.geteuid() == 0:
        os.chown(real, NOBODY, NOBODY)
    else:
        pytest.skip("needs root, to give a folder to another user")

    with private.private_folder():
        pass

    assert folder.exists()


def test_a_folder_in_which_others_can_rename_ours_is_not_used(parent):
    parent.chmod(0o777)

    with private.private_folder() as folder:
        assert not folder.is_relative_to(parent)
        assert folder.is_relative_to("/tmp")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_sticky_folder_whose_owner_is_another_user_is_not_used(parent):
    parent.chmod(0o1777)
    os.chown(parent, NOBODY, -1)

    with private.private_folder() as folder:
        assert not folder.is_relative_to(parent)


def test_a_path_that_is_too_long_for_rays_sockets_is_not_used(parent, monkeypatch):
    long = parent / ("x" * private.MAX_BYTES)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    with private.private_folder() as folder:
        assert (
            len(f"{folder}/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store") <= 107
        )


def test_without_any_suitable_folder_one_sentence_names_each(parent, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/x")
    monkeypatch.setattr(private, "MAX_BYTES", 3)

    with pytest.raises(ConfigError) as error, private.private_folder():
        pass

    sentence = str(error.value)
    assert "none of these suits: /x (No such file or directory)" in sentence
    assert f"{parent} (path too long for Ray's sockets)" in sentence
    assert "Set TMPDIR to an existing folder" in sentence


def test_the_folder_for_heads_is_kept_and_is_the_users_own(parent):
    folder = private.user_folder()

    assert folder == parent / f"ray-{os.geteuid()}/r"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert private.user_folder() == folder


@pytest.mark.parametrize("how", ["open", "link", "owner"])
def test_a_folder_for_heads_that_somebody_else_prepared_is_not_used(
    parent, tmp_path, monkeypatch, how
):
    taken = parent / f"ray-{os.geteuid()}"
    if how == "link":
        taken.symlink_to(tmp_path)
    else:
        taken.mkdir(mode=0o700)
        if how == "open":
            taken.chmod(0o777)
        elif os.geteuid() == 0:
            os.chown(taken, NOBODY, NOBODY)
        else:
            pytest.skip("needs root, to give a folder to another user")
    other = parent / "other"
    other.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(parent))
    monkeypatch.setattr(tempfile, "tempdir", str(other))

    assert private.user_folder() == other / f"ray-{os.geteuid()}/r"
