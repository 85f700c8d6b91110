"""Nodes of `cluster/aws.yaml` that Ray's autoscaler adds and removes during a run."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.on_ray.fake_ec2 import ROOT, sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PROGRAM = "tests.on_ray.fake_autoscaler"
LIMIT_S = 1200
"""Long, since the machine may be busy; on an idle one it takes a minute and a half."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """No Ray of this folder: the tests of this file come first, and have a cluster of their own."""


@pytest.fixture(scope="module")
def events():
    """Events of `fake_autoscaler.py`, which runs in a process without the Ray of this folder."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    program = subprocess.Popen(
        [sys.executable, "-m", PROGRAM, "--json", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        out, err = program.communicate(timeout=LIMIT_S)
    finally:
        program.kill()
        sweep(folder)
        shutil.rmtree(folder, ignore_errors=True)
    assert program.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def decided(events, what, *stages):
    """Count by type the nodes that the autoscaler decided to `add` or `remove` in some or all stages."""
    counts = Counter()
    for event in events:
        if event["what"] == what and (not stages or event["stage"] in stages):
            counts[event["type"]] += event["count"]
    return dict(counts)


def where(events, what, stage):
    return [e["where"] for e in events if e["what"] == what and e["stage"] == stage][-1]


def test_the_autoscaler_adds_a_node_per_worker_and_one_for_the_actor(events):
    assert decided(events, "add", "wait", "start") == {"train_gpu": 2, "reward_gpu_spot": 1}
    assert where(events, "workers", "start") == [["train_gpu", 1], ["train_gpu", 1]]
    assert where(events, "actors", "start") == [["reward_gpu_spot", 1]]


def test_a_queue_adds_a_reward_node_for_the_fifth_actor_only(events):
    load = [event for event in events if event["stage"] == "load"]
    pool = [event for event in load if event["what"] == "pool"]
    (added,) = [event for event in load if event["what"] == "add"]
    before = [event for event in pool if load.index(event) < load.index(added)]

    assert decided(events, "add", "load") == {"reward_gpu_spot": 1}
    assert (before[-1]["wanted"], before[-1]["actors"]) == (5, 4)
    assert sorted({event["wanted"] for event in pool}) == [*range(2, 9)]
    assert all(event["waiting"] for event in pool if event["wanted"] > event["actors"])
    assert where(events, "actors", "load") == [["reward_gpu_spot", 4], ["reward_gpu_spot", 4]]


def test_no_node_is_removed_while_it_is_needed(events):
    assert decided(events, "remove", "wait", "start", "load") == {}


def test_without_a_queue_the_pool_shrinks_and_the_empty_node_is_removed(events):
    wanted = [e["wanted"] for e in events if e["stage"] == "quiet" and e["what"] == "pool"]

    assert wanted == sorted(wanted, reverse=True)
    assert wanted[-1] == 1
    assert decided(events, "remove", "quiet") == {"reward_gpu_spot": 1}
    assert decided(events, "add", "quiet", "end") == {}
    assert where(events, "actors", "quiet") == where(events, "actors", "start")


def test_after_the_run_all_added_nodes_are_removed(events):
    nodes = [event["nodes"] for event in events if event["what"] == "nodes"]

    assert decided(events, "remove", "end") == {"train_gpu": 2, "reward_gpu_spot": 1}
    assert decided(events, "add") == decided(events, "remove")
    assert {event["why"] for event in events if event["what"] == "remove"} == {"idle"}
    assert nodes[-1] == {}


def test_no_text_and_no_actor_is_lost_and_the_autoscaler_prints_no_warning(events):
    pool = [event for event in events if event["what"] == "pool"][-1]
    (scores,) = [event for event in events if event["what"] == "scores"]

    assert scores["texts"] % 80 == 8
    assert (pool["lost"], pool["restarts"], pool["resent"]) == (0, 0, 0)
    assert not [event for event in events if event["what"] == "warning"]


def test_the_run_uses_the_settings_of_the_readme():
    from tests.on_ray.fake_autoscaler import README_SETTINGS

    text = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    start = text.index("bash scripts/submit.sh flan-t5-base \\\n  train")
    command = text[start:].split("```")[0]

    assert [word for word in README_SETTINGS if word not in command.split()] == []
