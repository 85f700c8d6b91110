"""Every message, setting and file in the troubleshooting section of cluster/README.md exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from ray_detox.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## Troubleshooting\n")[2].partition("\n## ")[0]
MESSAGES = [part.partition("\n") for part in SECTION.split("\n### ")[1:]]
"""Heading, newline and body of each entry."""
HEADINGS = [heading for heading, _, _ in MESSAGES]
OUR_MESSAGES = {
    "The run needs ": "resources.py",
    "waiting up to ": "stages/cluster/admission.py",
    "The autoscaler:": "stages/cluster/admission.py",
    "wants a token": "stages/cluster/connect.py",
    ", and here is Ray ": "stages/cluster/connect.py",
    "its temporary folder ": "stages/cluster/probe.py",
    "Reward actors died ": "stages/rewards/pool.py",
    "lost its connection to another worker": "stages/errors.py",
    "is being written by": "runs/lease.py",
    "was taken over by": "runs/lease.py",
    "was started with other content of": "runs/held.py",
    "would make another run of": "runs/resume.py",
    "holds nothing of run": "runs/held.py",
    "name functions that you have not run on this machine": "runs/trusted.py",
}
RAY_MESSAGES = {
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
ONLY_IN_BODY = {"The autoscaler:", ".rayignore"}
"""Texts that appear in the body of an entry and not in a heading."""


def test_every_message_has_a_heading_a_cause_and_a_fix():
    assert 24 <= len(MESSAGES) <= 48
    assert len(set(HEADINGS)) == len(HEADINGS)
    for heading, _, text in MESSAGES:
        assert re.match(r"`[^`]+`", heading), heading
        assert re.fullmatch(r"\s*Cause: \S.+\n\nFix: \S.+", text, re.S), heading


@pytest.mark.parametrize("message", OUR_MESSAGES)
def test_a_quoted_message_of_ray_detox_is_in_its_code(message):
    assert is_named(message)
    assert message in (ROOT / "ray_detox" / OUR_MESSAGES[message]).read_text(encoding="utf-8")


@pytest.mark.parametrize("message", RAY_MESSAGES)
def test_a_quoted_message_of_ray_is_in_the_installed_ray(message):
    assert is_named(message)
    (installed,) = importlib.util.find_spec(
        "ray"
    ).submodule_search_locations  # without importing Ray
    assert message.encode() in (Path(installed) / RAY_MESSAGES[message]).read_bytes()


def is_named(message):
    """Return whether a heading quotes the message, or the section if it is `ONLY_IN_BODY`."""
    return message in (SECTION if message in ONLY_IN_BODY else "\n".join(HEADINGS))


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
