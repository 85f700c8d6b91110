"""Files of runs are private, unless they are made in a folder that a group shares."""

import os
import stat
import subprocess

import pytest

from ray_detox.errors import ConfigError
from ray_detox.runs.conditional import versioned_file
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.storage import Storage
from ray_detox.store.errors import StoreError
from ray_detox.store.private import make_folder
from ray_detox.store.sqlite import SQLiteStore
from tests.browser.runs import make_report, make_samples

SAMPLES = make_samples(2)


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write_run(output):
    folder = RunFolder(output, "first")
    folder.write_result(make_report("first", SAMPLES), [])
    SQLiteStore(folder.store_path).put_run(make_report("first", SAMPLES), SAMPLES)
    return folder


@pytest.mark.parametrize("exists", [False, True])
def test_nobody_else_reads_a_run(tmp_path, exists):
    output = tmp_path / "runs"
    if exists:
        output.mkdir(0o755)  # as an earlier version made it

    folder = write_run(output)

    assert mode(folder.path) == 0o700
    assert mode(folder.store_path) == 0o600
    assert mode(output) == (0o755 if exists else 0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_an_attempt_of_another_user_fails(tmp_path):
    output = tmp_path / "runs"
    output.mkdir(0o755)
    folder = write_run(output)
    for parent in tmp_path.parents:
        if mode(parent) & 0o005 != 0o005:
            parent.chmod(0o755)  # or it fails above, at a folder of pytest

    for file in (folder.path / "report.json", folder.store_path):
        done = subprocess.run(
            ["/bin/cat", str(file)], user=65534, group=65534, extra_groups=[], capture_output=True
        )
        assert b"Permission denied" in done.stderr
    assert write_run(output).path.is_dir()  # the owner goes on as before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_files_of_somebody_else_are_refused_as_such_and_not_as_damaged(tmp_path):
    folder = write_run(tmp_path / "runs")
    (folder.path / "config.json").write_text("{}")
    store = SQLiteStore(folder.store_path)
    assert [run["run_id"] for run in store.list_runs()] == ["first"]
    for parent in (tmp_path / "runs", tmp_path, *tmp_path.parents):
        if mode(parent) & 0o005 != 0o005:
            parent.chmod(0o755)
    folder.path.chmod(0o755)
    (folder.path / "config.json").chmod(0o600)
    os.seteuid(65534)
    try:
        with pytest.raises(
            ConfigError, match=r"config\.json cannot be read: Permission denied\. It may"
        ):
            folder.read_config()
        with pytest.raises(StoreError, match=r"results\.sqlite cannot be read by this user\. Ask"):
            store.list_runs()
    finally:
        os.seteuid(0)


def test_a_group_that_shares_its_output_folder_reads_and_writes_the_runs(tmp_path):
    output = tmp_path / "runs"
    output.mkdir()
    output.chmod(0o2770)
    os.umask(0o002)

    folder = write_run(output)

    assert mode(folder.path) & 0o070 == 0o070
    assert mode(folder.path / "report.json") & 0o060 == 0o060
    assert mode(folder.store_path) & 0o060 == 0o060


def test_a_folder_that_everybody_may_write_is_not_shared_on_purpose(tmp_path):
    tmp_path.chmod(0o1777)

    make_folder(tmp_path / "runs/first")

    assert mode(tmp_path / "runs") == mode(tmp_path / "runs/first") == 0o700


def test_checkpoints_in_another_folder_are_private(tmp_path):
    (tmp_path / "storage").mkdir(0o755)
    address = tmp_path / "storage/first"

    versioned_file(Storage(str(address))).replace(b"{}", None)
    Storage(str(address)).write("evaluation/shard.json", b"[]")

    assert mode(address) == 0o700
    assert (address / "evaluation/shard.json").read_bytes() == b"[]"


def test_an_existing_folder_or_file_keeps_its_mode(tmp_path):
    output = tmp_path / "runs"
    folder = RunFolder(output, "first")
    folder.path.mkdir(parents=True)
    folder.path.chmod(0o755)
    write_run(output)
    folder.store_path.chmod(0o644)

    write_run(output)

    assert mode(folder.path) == 0o755
    assert mode(folder.store_path) == 0o644
