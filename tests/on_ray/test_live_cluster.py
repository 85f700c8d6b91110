"""Admission on a live cluster: the Ray of this folder, and beside it a cluster of three nodes."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.stages.cluster import admission, nodes, probe
from tests.environment import python_path

pytestmark = pytest.mark.ray

HERE = Path(__file__).parent


@ray.remote(num_cpus=3)
class Busy:
    """Holds its CPUs until it is killed."""

    def ready(self):
        return True


@pytest.fixture
def busy():
    """An actor that holds 3 of this Ray's 4 CPUs."""
    actor = Busy.remote()
    ray.get(actor.ready.remote())
    yield actor
    ray.kill(actor)


def test_busy_nodes_are_waited_for_until_the_capacity_timeout(busy):
    messages = []
    began = time.monotonic()

    with pytest.raises(ConfigError, match="the cluster has 4 CPUs, of which 1 free"):
        admission.wait_for_capacity(
            load_config("lab", ["cluster.capacity_timeout_s=2"]), messages.append
        )

    assert 2 <= time.monotonic() - began < 4
    assert "waiting up to 2 s for resources: The run needs 3 CPUs" in messages[0]
    assert len(messages) == 1


def test_a_run_is_admitted_once_resources_are_released(busy):
    killer = threading.Timer(1.5, ray.kill, [busy])
    killer.start()

    need = admission.wait_for_capacity(
        load_config("lab", ["cluster.capacity_timeout_s=30"]), lambda text: None
    )

    assert need.cpus == 3


def test_nodes_are_requested_until_the_probe_passes_and_then_withdrawn(busy, monkeypatch):
    asked = []
    monkeypatch.setattr(
        admission, "_request_bundles", lambda bundles: asked.append([b.cpus for b in bundles])
    )
    killer = threading.Timer(2.5, ray.kill, [busy])
    killer.start()

    admission.wait_for_capacity(
        load_config("lab", ["cluster.capacity_timeout_s=30"]),
        on_wait=lambda text: None,
        probe=lambda: asked.append("probed"),
    )

    assert asked[:3] == [[1, 1, 1]] * 3
    assert asked[-2:] == ["probed", []]
    assert asked.count([]) == 1


def test_a_run_that_can_never_fit_is_refused_at_once(busy):
    began = time.monotonic()

    with pytest.raises(ConfigError, match=r"needs 7 CPUs .* and the cluster has 4 CPUs\."):
        admission.wait_for_capacity(
            load_config("lab", ["train.workers=6", "cluster.capacity_timeout_s=60"])
        )

    assert time.monotonic() - began < 3


def test_a_cluster_of_one_node_is_not_probed_again():
    assert probe.probe_nodes(load_config("lab")) == []
    assert not admission.has_autoscaler()


def test_a_node_that_was_just_lost_is_no_fault(monkeypatch):
    # Ray lists a lost node for some moments; here it lists one that never existed.
    config = load_config("lab", ["cluster.capacity_timeout_s=30"])
    there = nodes.alive_nodes()
    listed = [[*there, there[0] | {"NodeID": "1" * 56}], there]
    errors = []

    def probe_once():
        with monkeypatch.context() as patch:
            patch.setattr(probe, "alive_nodes", lambda: listed.pop(0))
            try:
                probe.probe_nodes(config)
            except probe.NodeGoneError as error:
                errors.append(str(error))
                raise

    need = admission.wait_for_capacity(config, on_wait=lambda text: None, probe=probe_once)

    assert need.cpus == 3
    assert listed == []
    assert [sentence[-40:] for sentence in errors] == ["(11111111) was lost while it was probed."]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Output of each command below, on a cluster of nodes with 1, 2 (and 1 GPU) and 3 CPUs."""
    folder = tmp_path_factory.mktemp("live")
    common = ["check", "--live", "lab", "--output", str(folder / "runs")]
    commands = {
        "fits": [f"train.storage={folder}/storage"],
        "too many": ["train.workers=9"],
        "too large": ["train.workers=1", "cluster.cpus_per_worker=4", "cluster.gpus_per_worker=0"],
        "no storage": [f"train.storage={folder}/file"],
        "no table": ["results.store=dynamodb", "results.endpoint_url=http://127.0.0.1:9"],
    }
    (folder / "file").write_text("here first")
    words = json.dumps([common + settings for settings in commands.values()])
    done = subprocess.run(
        [sys.executable, HERE / "fake_nodes.py", words],
        env=os.environ | {"PYTHONPATH": python_path(*sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(commands, results, strict=True))


def test_a_cluster_that_fits_is_shown_with_the_probe_of_every_node(checked):
    result = checked["fits"]

    assert result["code"] == 0, result["err"]
    assert re.search(r"^need +3 +0$", result["out"], re.M)
    assert re.search(r"^free +6 +1$", result["out"], re.M)
    assert "autoscaler: no" in result["out"]
    assert len(re.findall(r"^node .*: models, data, versions", result["out"], re.M)) == 3


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("too many", "The run needs 10 CPUs (train.workers=9 with cpus_per_worker=1"),
        ("too large", "1 of 1 training worker (train.workers=1) with 4 CPUs each fit on no"),
        ("no storage", "/file', and no checkpoint can be kept there"),
        ("no table", "DynamoDB could not be reached at 127.0.0.1:9"),
    ],
)
def test_a_cluster_that_cannot_run_it_is_one_sentence(checked, what, sentence):
    result = checked[what]

    assert result["code"] == 2
    assert result["err"].startswith("ray-detox: ")
    assert result["err"].count("\n") == 1
    assert sentence in result["err"]
