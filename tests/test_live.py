"""What a node finds when it looks at a run; here it is this process, and Ray is not started."""

import json
import shutil
from collections import namedtuple

import pytest

from ray_detox import preflight
from ray_detox.config import ConfigError, load_config
from ray_detox.stages import live


@pytest.fixture
def fault(tmp_path):
    """`fault(*settings)`: what this node finds wrong with a run, given what the driver wrote."""

    def find(*settings, storage=tmp_path / "storage", **expected):
        config = load_config("lab", settings)
        with live._token(str(storage)) as token:
            return live.find_fault(
                config.to_dict(), str(storage), token, live.versions() | expected, "node"
            )

    return find


def test_a_node_that_can_do_its_part_leaves_nothing_behind(fault, tmp_path):
    assert fault() is None
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_was_there_stays(fault, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/checkpoint").write_text("here first")

    assert fault(storage=tmp_path / "kept") is None
    assert [f.name for f in (tmp_path / "kept").iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["Python", "Ray", "ray-detox"])
def test_another_version_is_named(fault, name):
    mine = live.versions()[name]

    sentence = fault(**{name: "0.1.2.3"})

    assert f"it has {name} {mine}, and the run was started with {name} 0.1.2.3" in sentence


def test_settings_of_another_version_are_not_even_read():
    expected = live.versions() | {"ray-detox": "99"}

    assert "ray-detox 99" in live.find_fault({"unheard": "of"}, None, "token", expected, "node")


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
def test_what_a_node_does_not_find_is_named(fault, setting, sentence):
    assert sentence in fault(setting)


def test_a_storage_that_is_another_place_on_this_node_is_found_out(tmp_path):
    with live._token(str(tmp_path / "driver")) as token:
        found = live.find_fault(
            load_config("lab").to_dict(), str(tmp_path / "node"), token, live.versions(), "node"
        )

    assert f"{tmp_path}/node is another place there" in found
    assert "Set train.storage to an s3:// address" in found


def test_a_full_disk_is_named(fault, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 9 * 10**8, 10**8))

    assert "has 100 MB free, and checkpoints need 200 MB" in fault()


def test_a_storage_that_the_driver_cannot_write_to_is_refused_before_any_node_is_asked(tmp_path):
    (tmp_path / "file").write_text("here first")

    with (
        pytest.raises(ConfigError, match=f"Checkpoints cannot be kept in {tmp_path}/file: "),
        live._token(str(tmp_path / "file")),
    ):
        pass


def test_reaching_a_model_needs_no_weights_and_no_torch(tmp_path):
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "t5"}))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    words = [f"{name}.model={tmp_path / name}" for name in ("policy", "reward")]

    preflight.check_reach(load_config("lab", words))
