"""Code in a model's repository is never run: transformers would ask on the terminal, or run it at once."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_detox import lab
from tests.environment import python_path

ROOT = Path(__file__).parents[1]
ANSWERS = {"closed": "exec <&-; ", "yes": "yes | "}
"""What is on the terminal: nothing, or somebody who agrees to everything."""
WITHOUT_CODE = {"GenerationConfig", "LoraConfig", "PeftConfig", "PeftModel"}
"""Classes whose `from_pretrained` runs no code of a repository, and has no such argument."""


def test_every_model_config_and_tokenizer_is_loaded_without_its_repositorys_code():
    found = []
    for file in [*(ROOT / "ray_detox").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            if ast.unparse(node.func.value).rpartition(".")[2] in WITHOUT_CODE:
                continue
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            found.append((f"{file.name}:{node.lineno}", options.get("trust_remote_code")))

    assert len(found) > 10
    assert [where for where, trusts in found if trusts != "False"] == []


@pytest.fixture
def hostile(tmp_path):
    """`hostile(model, file, names)`: a copy of a lab model that wants to run its own code."""

    def make(model, file, classes, **settings):
        folder = tmp_path / "hostile"
        shutil.copytree(model, folder)
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        path = folder / file
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        content |= {"auto_map": {name: f"code.{name}" for name in classes}} | settings
        path.write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize("answers", list(ANSWERS))
@pytest.mark.parametrize(
    ("setting", "file", "classes", "more"),
    [
        ("policy", "config.json", ["AutoConfig"], {"model_type": "unknown"}),
        ("policy", "config.json", ["AutoModelForSeq2SeqLM"], {}),
        ("policy", "tokenizer_config.json", ["AutoTokenizer"], {}),
        ("reward", "config.json", ["AutoConfig"], {"model_type": "unknown"}),
    ],
)
def test_a_model_with_code_of_its_own_is_refused_in_one_sentence(
    hostile, tmp_path, setting, file, classes, more, answers
):
    folder = hostile(lab.T5 if setting == "policy" else lab.ROBERTA, file, classes, **more)
    words = f"check lab {setting}.model={folder}"

    done = subprocess.run(
        ["bash", "-c", f"{ANSWERS[answers]}{sys.executable} -m ray_detox {words}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{setting}.model is '{folder}', and its {file} names Python code" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["owner/kernel", {"decoder": "owner/kernel@main:name"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_model_that_names_a_kernel_of_the_hub_is_refused(hostile, key, value):
    from ray_detox.errors import ConfigError
    from ray_detox.models.sources import local_folder

    folder = hostile(lab.T5, "config.json", [], **{key: value})

    with pytest.raises(ConfigError, match=rf"names code of the hub \({key}\)"):
        local_folder(str(folder), None, "policy.model")


@pytest.mark.parametrize("classes", [["AutoConfig"], ["AutoModelForSeq2SeqLM"]])
def test_even_past_the_check_transformers_runs_no_code(hostile, tmp_path, monkeypatch, classes):
    from ray_detox.models import loading, sources
    from ray_detox.recipes.loading import load_config

    folder = hostile(lab.T5, "config.json", classes)
    monkeypatch.setattr(sources, "_refuse_code", lambda *arguments: None)
    monkeypatch.setattr("builtins.input", lambda *asked: "yes")

    config = load_config("lab", [f"policy.model={folder}"])
    loading.load_policy(config.policy, config.sampling, config.seed)

    assert not (tmp_path / "ran").exists()
