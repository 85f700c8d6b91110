"""Admission without Ray: the probe of a node, here this process, and requests for nodes."""

import json
import shutil
import threading
import time
from collections import namedtuple
from dataclasses import replace

import pytest

from ray_detox import resources
from ray_detox.recipes.loading import load_config
from ray_detox.stages import preflight
from ray_detox.stages.cluster import admission, probe


def fault(*settings, **expected):
    """The fault that this node finds with a run whose driver has these versions."""
    driver = replace(probe.versions(), **expected)
    return probe.find_fault(load_config("lab", settings).to_dict(), driver)


def test_a_node_that_can_run_its_share_finds_no_fault():
    assert fault() is None


@pytest.mark.parametrize(
    "field, name", [("python", "Python"), ("ray", "Ray"), ("ray_detox", "ray-detox")]
)
def test_a_node_with_another_version_names_both(field, name):
    mine = getattr(probe.versions(), field)

    sentence = fault(**{field: "0.1.2.3"})

    assert f"it has {name} {mine}, and the run was started with {name} 0.1.2.3" in sentence


def test_a_node_with_another_version_does_not_read_the_settings():
    expected = replace(probe.versions(), ray_detox="99")

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
def test_a_node_names_the_setting_that_it_does_not_find(setting, sentence):
    assert sentence in fault(setting)


def test_a_node_names_its_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 9 * 10**8, 10**8))

    assert "has 100 MB free, and checkpoints need 200 MB" in fault()


def test_a_model_is_reachable_without_reading_its_weights(tmp_path):
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "t5"}))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    words = [f"{name}.model={tmp_path / name}" for name in ("policy", "reward")]

    preflight.check_reachable(load_config("lab", words))


class Interrupted:
    """A watchdog that ends the wait as Ctrl-C or a signal does."""

    def check(self):
        raise KeyboardInterrupt


def test_abandoned_work_ends_before_the_wait_returns():
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


def test_the_autoscaler_is_asked_for_all_workers_until_training_ends(monkeypatch):
    asked, often = [], threading.Event()

    def request(bundles):
        asked.append(bundles)
        if len(asked) == 3:
            often.set()
        if len(asked) == 2:
            raise RuntimeError("the head is busy")

    monkeypatch.setattr(admission, "_request_bundles", request)
    monkeypatch.setattr(admission, "REQUEST_INTERVAL_S", 0.01)
    monkeypatch.setattr(admission, "has_autoscaler", lambda: True)
    config = load_config("lab", ["train.workers=2..4", "reward.actors=1..8"])
    need = resources.needs(config, 0)

    with admission.requesting_workers(config, need):
        assert often.wait(30)

    assert asked[0] == asked[2] == [need.worker] * 4 + [need.actor]
    assert asked[-1] == []
    asked.clear()
    monkeypatch.setattr(admission, "has_autoscaler", lambda: False)
    with admission.requesting_workers(config, need):
        pass
    assert asked == []
