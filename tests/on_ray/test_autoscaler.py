"""A run and Ray's autoscaler: which nodes of `cluster/aws.yaml` come, and which go."""

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
"""A minute and a half where nothing else runs."""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """No Ray of this folder: the tests of this file come first, and have a cluster of their own."""


@pytest.fixture(scope="module")
def story():
    """What `fake_autoscaler.py` tells, in a process of its own and without this folder's Ray."""
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


def decided(story, what, *stages):
    """Nodes by type that the autoscaler decided to `add` or to `remove`, in these stages or in all."""
    counts = Counter()
    for event in story:
        if event["what"] == what and (not stages or event["stage"] in stages):
            counts[event["type"]] += event["count"]
    return dict(counts)


def where(story, what, stage):
    return [e["where"] for e in story if e["what"] == what and e["stage"] == stage][-1]


def test_a_run_gets_a_node_for_each_worker_and_one_for_its_reward_actor(story):
    assert decided(story, "add", "room", "start") == {"train_gpu": 2, "reward_gpu_spot": 1}
    assert where(story, "workers", "start") == [["train_gpu", 1], ["train_gpu", 1]]
    assert where(story, "actors", "start") == [["reward_gpu_spot", 1]]


def test_a_queue_adds_one_reward_node_for_the_fifth_actor_and_none_that_trains(story):
    load = [event for event in story if event["stage"] == "load"]
    pool = [event for event in load if event["what"] == "pool"]
    (added,) = [event for event in load if event["what"] == "add"]
    before = [event for event in pool if load.index(event) < load.index(added)]

    assert decided(story, "add", "load") == {"reward_gpu_spot": 1}
    assert (before[-1]["wanted"], before[-1]["actors"]) == (5, 4)
    assert sorted({event["wanted"] for event in pool}) == [*range(2, 9)]
    assert all(event["waiting"] for event in pool if event["wanted"] > event["actors"])
    assert where(story, "actors", "load") == [["reward_gpu_spot", 4], ["reward_gpu_spot", 4]]


def test_no_node_goes_while_it_is_needed(story):
    assert decided(story, "remove", "room", "start", "load") == {}


def test_without_a_queue_the_pool_shrinks_and_only_the_node_that_is_empty_goes(story):
    wanted = [e["wanted"] for e in story if e["stage"] == "quiet" and e["what"] == "pool"]

    assert wanted == sorted(wanted, reverse=True)
    assert wanted[-1] == 1
    assert decided(story, "remove", "quiet") == {"reward_gpu_spot": 1}
    assert decided(story, "add", "quiet", "end") == {}
    assert where(story, "actors", "quiet") == where(story, "actors", "start")


def test_after_the_run_everything_goes_that_came(story):
    nodes = [event["nodes"] for event in story if event["what"] == "nodes"]

    assert decided(story, "remove", "end") == {"train_gpu": 2, "reward_gpu_spot": 1}
    assert decided(story, "add") == decided(story, "remove")
    assert {event["why"] for event in story if event["what"] == "remove"} == {"idle"}
    assert nodes[-1] == {}


def test_no_text_and_no_actor_was_lost_and_the_autoscaler_warned_of_nothing(story):
    pool = [event for event in story if event["what"] == "pool"][-1]
    (scores,) = [event for event in story if event["what"] == "scores"]

    assert scores["texts"] % 80 == 8
    assert (pool["lost"], pool["restarts"], pool["resent"]) == (0, 0, 0)
    assert not [event for event in story if event["what"] == "warning"]


def test_the_run_is_started_as_the_readme_says():
    from tests.on_ray.fake_autoscaler import ASKED

    text = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    start = text.index("bash scripts/submit.sh flan-t5-base \\\n  train")
    command = text[start:].split("```")[0]

    assert [word for word in ASKED if word not in command.split()] == []
