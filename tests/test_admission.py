"""What a node finds when it looks at a run; here it is this process, and Ray is not started."""

import json
import shutil
import threading
import time
from collections import namedtuple

import pytest

from ray_detox import resources
from ray_detox.recipes.loading import load_config
from ray_detox.stages import preflight
from ray_detox.stages.cluster import admission, probe
from ray_detox.stages.cluster import nodes as live


def fault(*settings, **expected):
    """What this node finds wrong with a run, whose driver has these versions."""
    return probe.find_fault(load_config("lab", settings).to_dict(), probe.versions() | expected)


def test_a_node_that_can_do_its_part_finds_nothing():
    assert fault() is None


@pytest.mark.parametrize("name", ["Python", "Ray", "ray-detox"])
def test_another_version_is_named(name):
    mine = probe.versions()[name]

    sentence = fault(**{name: "0.1.2.3"})

    assert f"it has {name} {mine}, and the run was started with {name} 0.1.2.3" in sentence


def test_settings_of_another_version_are_not_even_read():
    expected = probe.versions() | {"ray-detox": "99"}

    assert "ray-detox 99" in probe.find_fault({"unheard": "of"}, expected)


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("policy.model=/gone", "policy.model is '/gone', and no such folder is here"),
        ("reward.model=/gone", "reward.model is '/gone', and no such folder is here"),
        ("policy.adapter=/gone", "policy.adapter is '/gone', and no such folder is here"),
        ("data.path=/gone.csv", "data.path is '/gone.csv', and no such file is here"),
        ("reward.terms=[{function: nowhere.f}]", "nowhere.f cannot be imported"),
    ],
)
def test_what_a_node_does_not_find_is_named(setting, sentence):
    assert sentence in fault(setting)


def test_a_full_disk_is_named(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 9 * 10**8, 10**8))

    assert "has 100 MB free, and checkpoints need 200 MB" in fault()


def test_reaching_a_model_needs_no_weights_and_no_torch(tmp_path):
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "t5"}))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    words = [f"{name}.model={tmp_path / name}" for name in ("policy", "reward")]

    preflight.check_reach(load_config("lab", words))


class Interrupted:
    """A patience that ends as Ctrl-C or a signal does."""

    def check(self):
        raise KeyboardInterrupt


def test_who_is_not_waited_for_any_more_leaves_ray_alone():
    left = threading.Event()

    def work():
        try:
            while True:
                time.sleep(0.01)
        finally:
            left.set()

    with pytest.raises(KeyboardInterrupt):
        admission.run_with_watchdog(work, Interrupted())

    assert left.is_set()


def test_an_autoscaler_is_asked_for_all_workers_until_training_ends(monkeypatch):
    asked, often = [], threading.Event()

    def request(bundles):
        asked.append(bundles)
        if len(asked) == 3:
            often.set()
        if len(asked) == 2:
            raise RuntimeError("the head is busy")

    monkeypatch.setattr(live, "_request", request)
    monkeypatch.setattr(live, "ASK_S", 0.01)
    monkeypatch.setattr(live, "has_autoscaler", lambda: True)
    config = load_config("lab", ["train.workers=2..4", "reward.actors=1..8"])
    need = resources.needs(config, 0)

    with admission.requesting_workers(config, need):
        assert often.wait(30)

    assert asked[0] == asked[2] == [need.worker] * 4 + [need.actor]
    assert asked[-1] == []
    asked.clear()
    monkeypatch.setattr(live, "has_autoscaler", lambda: False)
    with admission.requesting_workers(config, need):
        pass
    assert asked == []
