"""Troubleshooting in cluster/README.md: every message, setting and file that it names exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from ray_detox.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
MESSAGES = [part.partition("\n") for part in SECTION.split("\n### ")[1:]]
"""Heading, newline and text of each message."""
HEADINGS = [heading for heading, _, _ in MESSAGES]
OURS = {
    "The run needs ": "resources.py",
    "waiting up to ": "stages/cluster/admission.py",
    "The autoscaler:": "stages/cluster/admission.py",
    "wants a token": "stages/cluster/connect.py",
    ", and here is Ray ": "stages/cluster/connect.py",
    "its temporary folder ": "stages/cluster/probe.py",
    "lost its connection to another worker": "stages/errors.py",
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
IN_THE_TEXT = {"The autoscaler:", ".rayignore"}
"""Words that are no message of their own, so that no heading has them."""


def test_every_message_has_a_heading_a_cause_and_a_fix():
    assert 24 <= len(MESSAGES) <= 48
    assert len(set(HEADINGS)) == len(HEADINGS)
    for heading, _, text in MESSAGES:
        assert re.match(r"`[^`]+`", heading), heading
        assert re.fullmatch(r"\s*Cause: \S.+\n\nFix: \S.+", text, re.S), heading


@pytest.mark.parametrize("message", OURS)
def test_a_quoted_message_of_ours_is_in_our_code(message):
    assert is_named(message)
    assert message in (ROOT / "ray_detox" / OURS[message]).read_text(encoding="utf-8")


@pytest.mark.parametrize("message", RAYS)
def test_a_quoted_message_of_ray_is_in_the_installed_ray(message):
    assert is_named(message)
    (installed,) = importlib.util.find_spec("ray").submodule_search_locations  # not imported yet
    assert message.encode() in (Path(installed) / RAYS[message]).read_bytes()


def is_named(message):
    """Whether a heading has the message, or the text if it belongs to another message."""
    return message in (SECTION if message in IN_THE_TEXT else "\n".join(HEADINGS))


def test_settings_and_files_in_the_troubleshooting_section_exist():
    sections = {k: v for k, v in RunConfig().to_dict().items() if isinstance(v, dict)}
    named = re.findall(r"\b([a-z]+)\.([a-z_]+)\b", " ".join(re.findall(r"`([^`]*)`", SECTION)))
    settings = {(section, name) for section, name in named if section in sections}
    files = set(re.findall(r"\b(?:cluster|scripts)/\w+\.\w+", SECTION))

    assert len(settings) >= 8
    for section, name in settings:
        assert name in sections[section], (section, name)
    assert {"cluster/aws.yaml", "scripts/aws_account.py", "cluster/setup_node.sh"} <= files
    for file in files:
        assert (ROOT / file).is_file(), file


def test_numbers_in_the_troubleshooting_section_match_the_code():
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray.dashboard.consts import DEFAULT_JOB_START_TIMEOUT_SECONDS

    cluster = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8")

    assert f"{DASHBOARD_CLIENT_MAX_SIZE >> 20} MiB" in SECTION
    assert f"after {DEFAULT_JOB_START_TIMEOUT_SECONDS // 60} minutes" in SECTION
    for words in ("--shm-size=8g", "--object-store-memory=4000000000", "ulimit -n 65536"):
        assert words in SECTION
        assert words in cluster
