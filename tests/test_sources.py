"""Fingerprints of models: the same content gives the same fingerprint, wherever it is stored."""

import shutil

from ray_detox import lab
from ray_detox.models.sources import fingerprint, folder_fingerprint


def test_a_fingerprint_depends_on_the_content_of_a_model_and_not_on_its_folder(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(lab.T5, copy)
    (copy / "README.md").write_text("not part of the model")

    assert fingerprint(str(copy), None, "policy.model") == fingerprint("lab", None, "policy.model")

    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert folder_fingerprint(copy) != folder_fingerprint(lab.T5)


def test_the_fingerprint_of_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("ray_detox.models.sources._from_hub", lambda *arguments: snapshot)

    assert fingerprint("a/b", None, "policy.model") == "commit:0123abcd"
