"""What others load: model cards, the modes of exported files, and tokenizers for transformers 4."""

import json
import os
import stat
import warnings

import pytest
import yaml
from transformers import AutoTokenizer

from ray_detox.cli.main import main
from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.models.loading import export_model, load_policy
from ray_detox.recipes.loading import load_config
from ray_detox.runs.card import model_card
from ray_detox.runs.folder import RunFolder
from tests.browser.runs import make_report, make_samples


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def front_matter(card):
    _, about, text = card.split("---\n", 2)
    return yaml.safe_load(about), text


@pytest.fixture
def run(tiny_t5, tmp_path):
    """A run that has trained an adapter of a model in a folder, and was measured."""
    folder = RunFolder(tmp_path / "runs", "first")
    config = load_config("lab", [f"policy.model={tiny_t5}", "train.steps=3"])
    policy = load_policy(config.policy, config.sampling, seed=0)
    policy.save_adapter(tmp_path / "checkpoint" / "adapter")
    files = {
        f"adapter/{file.name}": file.read_bytes()
        for file in (tmp_path / "checkpoint" / "adapter").iterdir()
    }
    assert b"[More Information Needed]" in files["adapter/README.md"], "the card of peft"
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(json.dumps(config.to_dict()))
    folder.write_adapter(files)
    report = make_report("first", make_samples(0)) | {"n": 0, "config": config.to_dict()}
    folder.write_result(report, [])
    return folder


def test_the_card_of_an_adapter_says_what_it_is_and_how_to_load_it(run, tiny_t5):
    about, text = front_matter((run.adapter / "README.md").read_text())

    assert about == {"library_name": "peft", "tags": ["ray-detox", "ppo"]}
    assert "- Run: `first`, recipe `lab`, seed 0\n- Training: 3 PPO steps of 64 prompts" in text
    assert json.loads((run.path / "report.json").read_text())["verdict"]["name"] in text
    assert "toxicity, mean" in text
    assert 'PeftModel.from_pretrained(model, "path/to/this/folder")' in text
    assert "More Information Needed" not in text
    assert str(tiny_t5.parent) not in text, "a path of this machine"
    assert text.count("\n") < 60


def test_the_card_is_no_part_of_the_adapter(run):
    """So a measurement of the adapter finds the fingerprint that it had at the end of training."""
    assert "README.md" not in run.read_adapter()
    assert "adapter_model.safetensors" in run.read_adapter()


@pytest.mark.usefixtures("usual_umask")
def test_an_exported_model_has_a_card_and_can_be_read_by_everybody(run, tmp_path, capsys):
    assert main(["export", "first", str(tmp_path / "out"), "--output", str(run.output)]) == 0

    files = list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}
    about, text = front_matter((tmp_path / "out" / "README.md").read_text())
    assert about["library_name"] == "transformers"
    assert "with a LoRA adapter merged into it" in text
    assert 'AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")' in text
    assert capsys.readouterr().err == ""


def test_a_card_names_a_base_model_of_the_hub_and_quotes_what_others_wrote():
    words = [
        "policy.model=google/flan-t5-base",
        "data.template=`x` {dialogue}\n# Free",
        "recipe=a`b",
    ]
    about, text = front_matter(model_card(load_config("lab", words), "first", steps=7))

    assert about["base_model"] == "google/flan-t5-base"
    assert 'AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-base")' in text
    assert "Training: 7 PPO steps" in text
    assert "These weights were not measured." in text
    assert "\n# Free" not in text


def test_a_tokenizer_is_exported_with_names_that_transformers_4_knows(run, tiny_t5, tmp_path):
    """Version 5 writes a class that version 4 does not have, and a list where that expects names."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_t5.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [str(tokenizer.unk_token)]})
    tokenizer.save_pretrained(base)

    export_model(PolicyConfig(model=str(base)), run.adapter, tmp_path / "out")

    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == [tokenizer.unk_token]
    assert not settings.keys() & {"extra_special_tokens", "is_local", "local_files_only"}
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("one two").input_ids == tokenizer("one two").input_ids


@pytest.mark.parametrize("adapter", [False, True])
def test_a_policy_loads_without_warnings_of_libraries_about_each_other(run, tiny_t5, adapter):
    config = PolicyConfig(model=str(tiny_t5), adapter=str(run.adapter) if adapter else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_policy(config, SamplingConfig(), seed=0)
