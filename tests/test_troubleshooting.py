"""The README's table of what may go wrong: every message, setting and file in it is one that exists."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from ray_detox.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## When something goes wrong\n")[2].partition("\n## ")[0]
ROWS = [row.strip("| ").split(" | ") for row in SECTION.splitlines() if row.startswith("| ")][1:]
OURS = {
    "The run needs ": "room.py",
    "waiting up to ": "stages/live.py",
    "The autoscaler:": "stages/live.py",
    "wants a token": "connect.py",
    ", and here is Ray ": "connect.py",
    "its temporary folder ": "stages/live.py",
    "lost its connection to another worker": "stages/train.py",
}
RAYS = {
    "No available node types can fulfill": "autoscaler/v2/event_logger.py",
    "SSH still not available": "autoscaler/_private/updater.py",
    "setting-up": "autoscaler/tags.py",
    "update-failed": "autoscaler/tags.py",
    "Failed to connect to Ray at address": "dashboard/modules/dashboard_sdk.py",
    "Version mismatch": "_private/utils.py",
    "exceeds the maximum size": "_private/runtime_env/packaging.py",
    ".rayignore": "_private/runtime_env/packaging.py",
    "The object store is using ": "_private/services.py",
    "killed due to the node running low on memory": "core/src/ray/raylet/raylet",
}


def test_every_row_says_what_is_seen_why_and_what_to_do():
    assert 12 <= len(ROWS) <= 18
    for row in ROWS:
        assert len(row) == 3, row
        assert all(row)


@pytest.mark.parametrize("message", OURS)
def test_a_message_of_ours_is_one_that_we_print(message):
    assert message in SECTION
    assert message in (ROOT / "ray_detox" / OURS[message]).read_text(encoding="utf-8")


@pytest.mark.parametrize("message", RAYS)
def test_a_message_of_rays_is_one_of_this_ray(message):
    assert message in SECTION
    (installed,) = importlib.util.find_spec("ray").submodule_search_locations  # not imported yet
    assert message.encode() in (Path(installed) / RAYS[message]).read_bytes()


def test_settings_and_files_that_it_names_are_there():
    sections = {field.name: field.type for field in dataclasses.fields(RunConfig)}
    named = re.findall(r"\b([a-z]+)\.([a-z_]+)\b", " ".join(re.findall(r"`([^`]*)`", SECTION)))
    settings = [(section, name) for section, name in named if section in sections]
    files = set(re.findall(r"\b(?:cluster|scripts)/\w+\.\w+", SECTION))

    assert len(set(settings)) >= 8
    for section, name in settings:
        assert name in {f.name for f in dataclasses.fields(sections[section])}, (section, name)
    assert {"cluster/aws.yaml", "scripts/aws_account.py", "cluster/setup_node.sh"} <= files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_its_numbers_are_rays_and_ours():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray.dashboard.consts import DEFAULT_JOB_START_TIMEOUT_SECONDS

    cluster = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8")

    assert f"{DASHBOARD_CLIENT_MAX_SIZE >> 20} MiB" in SECTION
    assert f"after {DEFAULT_JOB_START_TIMEOUT_SECONDS // 60} minutes" in SECTION
    for words in ("--shm-size=8g", "--object-store-memory=4000000000", "ulimit -n 65536"):
        assert words in SECTION
        assert words in cluster
