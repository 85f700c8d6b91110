"""The command line: a mistake gives one line and exit code 2 before anything has started.

Commands run in this process with Ray made unimportable, or in a new process if the test is about
the state of a new process.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from transformers import AutoModelForSeq2SeqLM

from ray_detox import pipeline
from ray_detox.cli import main as cli
from ray_detox.recipes.loading import config_from_dict, load_config, recipe_names
from ray_detox.records import Objective
from ray_detox.runs.checkpoint_store import Checkpoint, CheckpointStore
from ray_detox.runs.folder import RunFolder
from ray_detox.runs.resume import kept_checkpoint
from ray_detox.runs.storage import Storage
from ray_detox.stages import errors
from tests.pseudo_terminal import on_terminal

LONG = "#Person1#: Did you see the match?\n#Person2#: I did, and what a match it was!\n" * 4
ROWS = [{"dialogue": f"{LONG}{i}", "summary": "A match."} for i in range(3)]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Make Ray unimportable."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def mistake(capsys, output):
    """`mistake(*words)`: run a command that must be refused, and return its error line."""

    def run(*words, verb="run"):
        before = files(output)
        capsys.readouterr()

        code = cli.main([verb, *map(str, words), "--output", str(output)])

        printed = capsys.readouterr()
        assert code == cli.MISTAKE
        assert printed.out == ""
        assert printed.err.startswith("ray-detox: ")
        assert printed.err.count("\n") == 1, "one sentence has one line"
        assert files(output) == before, "a mistake leaves nothing behind"
        return printed.err

    return run


@pytest.fixture
def stored_run(output):
    """`stored_run(name, *settings)`: the folder of a run that has started and not finished."""

    def make(name="first", *settings):
        folder = RunFolder(output, name)
        folder.path.mkdir(parents=True)
        config = load_config("lab", ["train.steps=3", *settings])
        (folder.path / "config.json").write_text(json.dumps(config.to_dict()))
        return folder

    return make


def files(folder):
    return {str(p): p.is_file() and p.read_bytes() for p in [folder, *folder.rglob("*")]}


def write_rows(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0])] + [",".join(f'"{v}"' for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


def save_description(folder, **settings):
    """Create the folder of a model with nothing but its config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def with_pickled_weights(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["labb"], "Unknown recipe 'labb'; did you mean 'lab'?"),
        (["quux"], "the recipes are flan-t5-base, lab, seed"),
        (["nowhere/own.yaml"], "Unknown recipe 'nowhere/own.yaml'"),
        (["lab", "seed"], "Two recipes, 'lab' and 'seed'; give one."),
        (["ppo.kl_coeff=1"], "Unknown setting 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        (["polcy.model=lab"], "Unknown setting 'polcy'; did you mean 'policy'?"),
        (["kl_coef=1"], "Unknown setting 'kl_coef'; did you mean 'ppo.kl_coef'?"),
        (["train.steps=three"], "train.steps is 'three'; expected a whole number."),
        (["train.steps=1.5"], "train.steps is 1.5; expected a whole number."),
        (["ppo.kl_coef=.nan"], "ppo.kl_coef is nan; expected a number."),
        (["policy.frozen_encoder=1"], "policy.frozen_encoder is 1; expected true or false."),
        (["policy.lora_targets=q"], "policy.lora_targets is 'q'; expected a list"),
        (["ppo=3"], "ppo is 3; expected a section, such as ppo.key=value."),
        (["ppo.kl_coef=["], "the value is not valid YAML"),
        (["train.steps=0"], "train.steps is 0; expected at least 1."),
        (["reward.input=all"], "reward.input is 'all'; expected one of response, prompt+response"),
        (["data.template=Summarise"], "expected text that contains {dialogue}"),
        # Sizes that contradict each other
        (["ppo.minibatches=3"], "does not divide into ppo.minibatches (3). Use a multiple, such as 63"),
        (["train.workers=17"], "train.workers (17) is more than data.shards (16)"),
        (["ppo.prompts_per_step=24"], "ppo.prompts_per_step (24) is not a multiple of data.shards (16)"),
        (["sampling.max_new_tokens=48..16"], "a whole number of at least 1, or a range such as 1..4"),
        (["sampling.min_new_tokens=48"], "expected less than sampling.max_new_tokens (48)"),
        (["data.min_chars=1000"], "data.max_chars (1000) leaves no length above data.min_chars (1000)"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused(mistake, words, sentence):
    assert sentence in mistake(*words)


def test_a_recipe_that_is_not_yaml_is_refused(mistake, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("ppo: [1\n")

    assert f"Recipe {recipe} is not valid YAML" in mistake(recipe)


def test_settings_may_stand_before_and_after_options(monkeypatch, output, capsys):
    seen = []

    def run(config, folder, console, *, resume, accept_changes):
        seen.append((config, folder))
        raise pipeline.Stopped(1, signal.SIGINT)

    monkeypatch.setattr(pipeline, "run", run)
    option = ["--run-id", "x", "--output", str(output)]
    settings = ["train.steps=5", "seed=3"]

    for words in (
        ["lab", *settings, *option],
        [*option, "lab", *settings],
        ["lab", settings[0], *option, settings[1]],
        [*option[:2], "lab", settings[0], *option[2:], settings[1]],
    ):
        cli.main(["run", *words])

    assert seen == [(load_config("lab", settings), RunFolder(output, "x"))] * 4


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["run", "lab", "--frobnicate"], "unknown option --frobnicate; see ray-detox run --help"),
        (
            ["run", "--train.steps=2"],
            "unknown option --train.steps=2; a setting has no dashes: train.steps=2",
        ),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["export", "first", "folder", "train.steps=1"], "export takes no 'train.steps=1'"),
        ([], "required: COMMAND"),
    ],
)
def test_an_invalid_command_is_refused(capsys, words, sentence):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)

    assert caught.value.code == cli.MISTAKE
    assert sentence in capsys.readouterr().err


# ---- data ------------------------------------------------------------------------------------


def test_missing_data_are_refused(mistake, tmp_path):
    sentence = mistake("lab", f"data.path={tmp_path}/none.parquet")

    assert "data.path is" in sentence
    assert "no such file is here" in sentence


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_missing_column_is_refused(mistake, tmp_path, kind):
    path = write_rows(tmp_path, kind, ROWS)

    dialogue = mistake("lab", f"data.path={path}", "data.dialogue_column=text")
    summary = mistake("lab", f"data.path={path}", "data.summary_column=gist")

    assert "has no column 'text'; its columns are dialogue, summary" in dialogue
    assert "has no column 'gist'; its columns are dialogue, summary" in summary


def test_a_missing_column_of_the_embedded_corpus_is_refused(mistake):
    dialogue = mistake("lab", "data.dialogue_column=1")
    summary = mistake("lab", "data.summary_column=gist")
    chars = mistake("lab", "data.min_chars=90000", "data.max_chars=99999")

    assert "data.path=lab has no column '1'; its columns are id, dialogue, summary" in dialogue
    assert "data.path=lab has no column 'gist'; its columns are" in summary
    assert "rows of data.path=lab is left after filtering" in chars


def test_a_setting_in_the_form_of_yaml_is_refused_with_how_to_write_it(mistake):
    assert "'train.steps: 2' has no '='; write train.steps=2." in mistake("lab", "train.steps: 2")


def test_data_without_a_usable_row_are_refused_with_counts(mistake, tmp_path):
    path = write_rows(tmp_path, "jsonl", [*ROWS, {"dialogue": "", "summary": ""}])

    sentence = mistake("lab", f"data.path={path}", "data.min_chars=500")

    assert "None of the 4 rows" in sentence
    assert "is left after filtering: 3 not over 500 characters, 1 empty dialogue." in sentence


# ---- models ----------------------------------------------------------------------------------


def test_a_missing_model_is_refused(mistake):
    for setting in ("policy.model", "reward.model"):
        assert f"{setting} is '/nowhere', and no such folder is here" in mistake(
            "lab", f"{setting}=/nowhere"
        )


def test_a_folder_without_a_model_is_refused(mistake, tmp_path):
    for setting in ("policy.model", "reward.model"):
        assert "no config.json is in that folder" in mistake("lab", f"{setting}={tmp_path}")


@pytest.mark.parametrize("content", ["{", "[1]", "caf\xe9"])
def test_a_model_description_that_is_not_a_json_object_is_refused(mistake, tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))

    for setting in ("policy.model", "reward.model"):
        sentence = mistake("lab", f"{setting}={tmp_path}")
        assert f"{setting} is" in sentence
        assert "config.json" in sentence


def test_a_causal_model_is_refused_as_a_policy(mistake, tmp_path):
    model = save_description(tmp_path / "gpt", model_type="gpt2", architectures=["GPT2LMHeadModel"])

    sentence = mistake("lab", f"policy.model={model}")

    assert "a GPT2LMHeadModel; expected an encoder-decoder such as google/flan-t5-base" in sentence


def test_a_classifier_is_refused_as_a_policy(mistake, tiny_roberta):
    assert "a RobertaForSequenceClassification; expected an encoder-decoder" in mistake(
        "lab", f"policy.model={tiny_roberta}"
    )


def test_an_encoder_decoder_is_refused_as_a_reward_model(mistake, tiny_t5):
    assert "a T5ForConditionalGeneration; expected a sequence classifier" in mistake(
        "lab", f"reward.model={tiny_t5}"
    )


def test_a_causal_model_is_refused_as_a_reward_model(mistake, tmp_path):
    model = save_description(tmp_path / "gpt", model_type="gpt2", architectures=["GPT2LMHeadModel"])

    assert "a GPT2LMHeadModel; expected a sequence classifier" in mistake(
        "lab", f"reward.model={model}"
    )


def test_an_unknown_label_is_refused_with_the_known_ones(mistake):
    sentence = mistake("lab", "reward.label=kind")

    assert "has no label 'kind'; its labels are 'nothate', 'hate'" in sentence
    assert "Set reward.label" in sentence


def test_a_classifier_without_the_label_is_refused(mistake, make_roberta):
    model = make_roberta(("nothate", "hate"), names={0: "LABEL_0", 1: "LABEL_1"})

    assert "has no label 'nothate'; its labels are 'LABEL_0', 'LABEL_1'" in mistake(
        "lab", f"reward.model={model}"
    )


def test_an_ambiguous_label_is_refused(mistake, make_roberta):
    model = make_roberta(("nothate", "hate"), names={0: "NOTHATE", 1: "NotHate"})

    assert "has more than one label 'nothate'" in mistake("lab", f"reward.model={model}")


def test_pickled_weights_are_refused(mistake, tmp_path, tiny_t5, tiny_roberta):
    policy = with_pickled_weights(tiny_t5, tmp_path / "t5")
    reward = with_pickled_weights(tiny_roberta, tmp_path / "roberta")

    for words in (f"policy.model={policy}", f"reward.model={reward}"):
        sentence = mistake("lab", words)
        assert "has no .safetensors file. Pickled weights can run code" in sentence
        assert "save the model again with save_pretrained" in sentence


def test_a_model_without_a_tokenizer_is_refused(mistake, tmp_path, tiny_t5):
    folder = tmp_path / "t5"
    shutil.copytree(tiny_t5, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))

    assert "and no tokenizer is in it" in mistake("lab", f"policy.model={folder}")


def test_a_broken_tokenizer_is_refused(mistake, tmp_path, tiny_t5):
    folder = tmp_path / "t5"
    shutil.copytree(tiny_t5, folder)
    (folder / "tokenizer.json").write_text("{}")

    assert "no tokenizer can be loaded from it" in mistake("lab", f"policy.model={folder}")


def test_lora_targets_that_match_nothing_are_refused_with_the_layers_that_exist(mistake):
    sentence = mistake("lab", "policy.lora_targets=[q, query_key_value]")

    assert "names 'query_key_value', and lab has no linear layer of that name" in sentence
    assert "it has k, lm_head, o, q, v, wi_0, wi_1, wo." in sentence


# ---- no network ------------------------------------------------------------------------------

HUB = {
    "policy.model": "google/flan-t5-base",
    "reward.model": "facebook/roberta-hate-speech-dynabench-r4-target",
    "data.path": "knkarthick/dialogsum",
}
INSTEAD = {
    "policy.model": "set policy.model=/path/to/its/folder (or s3://bucket/prefix)",
    "reward.model": "set reward.model=/path/to/its/folder (or s3://bucket/prefix)",
    "data.path": "set data.path=/path/to/file.parquet (or .jsonl, .csv, s3://...)",
}


@pytest.mark.parametrize("setting", HUB)
def test_a_hub_id_without_network_is_refused_with_the_alternatives(
    mistake, monkeypatch, tmp_path, setting
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    sentence = mistake("lab", f"{setting}={HUB[setting]}")

    assert sentence.startswith(f"ray-detox: {setting} is the hub id {HUB[setting]!r}")
    assert INSTEAD[setting] in sentence


# ---- a starting adapter ----------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path, tiny_t5):
    """`adapter(**settings)`: the folder of an adapter on the tiny T5, and the T5 as a setting."""

    def make(**settings):
        folder = tmp_path / "start"
        base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
        get_peft_model(base, LoraConfig(r=4, target_modules=["q", "v"])).save_pretrained(folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return folder

    return make


def test_a_missing_adapter_is_refused(mistake, tmp_path):
    missing = mistake("lab", "policy.adapter=/nowhere")
    empty = mistake("lab", f"policy.adapter={tmp_path}")

    assert "policy.adapter is '/nowhere', and no such folder is here" in missing
    assert "no adapter_config.json is there" in empty


@pytest.mark.parametrize(
    "described, kind", [({}, "unknown"), ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING")]
)
def test_an_adapter_of_another_kind_is_refused(mistake, adapter, described, kind):
    folder = adapter()
    (folder / "adapter_config.json").write_text(json.dumps(described))

    assert f"an adapter of type {kind}; expected LORA" in mistake("lab", f"policy.adapter={folder}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "and its adapter_config.json is damaged: line 1 is not valid JSON"),
        ("[]", "and its adapter_config.json is damaged: it is a list, expected an object"),
        ('{"peft_type": "LORAX"}', "and it cannot be read"),
    ],
)
def test_an_adapter_with_an_unreadable_description_is_refused(mistake, adapter, content, reason):
    folder = adapter()
    (folder / "adapter_config.json").write_text(content)

    assert reason in mistake("lab", f"policy.adapter={folder}")


def test_an_adapter_with_pickled_weights_is_refused(mistake, adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    assert "has no .safetensors file" in mistake("lab", f"policy.adapter={folder}")


def test_an_adapter_for_other_layers_is_refused(mistake, adapter):
    folder = adapter(target_modules=["query", "value"])

    assert "and it does not fit lab" in mistake("lab", f"policy.adapter={folder}")


def test_an_adapter_of_another_model_is_refused_with_the_first_difference(mistake, adapter):
    sentence = mistake("lab", f"policy.adapter={adapter()}")

    assert "and it was not trained on lab: base_model.model.decoder.block.0." in sentence
    assert "lora_A.weight is (4, 32), expected (4, " in sentence


def test_an_adapter_of_the_same_model_is_accepted(adapter, tiny_t5):
    words = [f"policy.model={tiny_t5}", f"policy.adapter={adapter()}"]

    assert cli.main(["check", "lab", *words]) == 0


# ---- reward terms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "term, sentence",
    [
        ("{function: shorter}", "'shorter' is not an import path"),
        ("{function: nowhere.f}", "nowhere.f cannot be imported"),
        ("{function: json.f}", "json.f cannot be imported"),
        ("{function: math.pi}", "math.pi is not a function"),
        ("{function: json.dumps, arguments: {x: 1}}", "json.dumps refuses its arguments"),
        ("{fun: json.dumps}", "Unknown setting"),
        ("{weight: 1}", "is incomplete"),
        ("{function: json.dumps, weight: much}", "expected a number"),
    ],
)
def test_a_reward_term_that_cannot_be_called_is_refused(mistake, term, sentence):
    assert sentence in mistake("lab", f"reward.terms=[{term}]")


# ---- the output folder -----------------------------------------------------------------------


def test_a_file_in_the_way_of_the_output_folder_is_refused(mistake, output):
    output.write_text("here first")

    sentence = mistake("lab")

    assert f"The output folder {output} cannot be written to" in sentence
    assert "Choose another with --output" in sentence


@pytest.mark.parametrize(
    "storage, reason",
    [
        ("nowhere://x", "Protocol not known: nowhere"),
        ("{file}", "{file} is not a folder you may write to"),
        ("{file}/below", "{file} is not a folder you may write to"),
    ],
)
def test_a_storage_that_cannot_keep_checkpoints_is_refused(mistake, tmp_path, storage, reason):
    (tmp_path / "file").write_text("here first")
    place = storage.format(file=tmp_path / "file")

    sentence = mistake("lab", f"train.storage={place}")

    assert f"train.storage is {place!r}, and no checkpoint can be kept there" in sentence
    assert reason.format(file=tmp_path / "file") in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_is_read_only_is_refused(mistake, output):
    output.mkdir(mode=0o500)

    assert "cannot be written to" in mistake("lab")


def test_a_run_id_that_exists_is_refused(mistake, stored_run):
    stored_run("first")

    sentence = mistake("lab", "--run-id", "first")

    assert "Run 'first' exists in" in sentence
    assert "ray-detox run --resume first" in sentence


@pytest.mark.parametrize("name", ["../first", "a/b", "a b", ".hidden", "x" * 65, "é", ""])
def test_a_run_id_that_is_not_a_file_name_is_refused(mistake, name):
    assert "cannot be used. Take 1 to 64 letters, digits" in mistake("lab", f"--run-id={name}")


# ---- more than there is ----------------------------------------------------------------------


def test_more_gpus_than_exist_are_refused_at_once(mistake):
    sentence = mistake("lab", "cluster.gpus_per_worker=64", "serving.gpus_per_actor=0.5")

    assert "The run needs 128.5 GPUs (train.workers=2 with gpus_per_worker=64" in sentence
    assert "reward.actors=1 with gpus_per_actor=0.5), and the cluster has" in sentence


# ---- runs that exist -------------------------------------------------------------------------


def test_an_unknown_run_is_refused_with_the_known_ones(mistake, stored_run):
    nothing = mistake("--resume", "first")
    stored_run("first")
    other = mistake("--resume", "frist")

    assert "No run 'first' in" in nothing
    assert "no run is there" in nothing
    assert "No run 'frist' in" in other
    assert "the runs there are first" in other


@pytest.mark.parametrize(
    "change",
    ["data.path=other.csv", "policy.lora_rank=4", "seed=1", "data.shards=8", "recipe=seed"],
)
def test_a_resumed_run_keeps_its_data_policy_and_seed(mistake, stored_run, change):
    stored_run("first")

    sentence = mistake("--resume", "first", change)

    assert f"'{change}' would make another run of 'lab'" in sentence
    assert "Start a new run instead" in sentence


def test_a_resumed_run_keeps_its_recipe_and_name(mistake, stored_run):
    stored_run("first")

    assert "give only section.name=value" in mistake("seed", "--resume", "first")
    assert "--run-id and --resume exclude each other" in mistake(
        "--resume", "first", "--run-id", "second"
    )


def test_a_resumed_run_accepts_other_changes(monkeypatch, stored_run, output):
    seen = []

    def run(config, folder, console, *, resume, accept_changes):
        seen.append((config, folder, resume))
        raise pipeline.Stopped(4, signal.SIGTERM)

    monkeypatch.setattr(pipeline, "run", run)
    folder = stored_run("first", "ppo.kl_coef=0.5")

    code = cli.main(["run", "--resume", "first", "train.steps=9", "--output", str(output)])

    settings = ["ppo.kl_coef=0.5", "train.steps=9"]
    assert seen == [(load_config("lab", settings), folder, True)]
    assert code == 128 + signal.SIGTERM


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_run_without_an_adapter_is_not_evaluated_or_exported(mistake, stored_run, tmp_path, verb):
    stored_run("first")
    words = ["first", tmp_path / "model"] if verb == "export" else ["first"]

    sentence = mistake(*words, verb=verb)

    assert "Run 'first' has no adapter yet" in sentence
    assert "ray-detox run --resume first" in sentence
    assert not (tmp_path / "model").exists()


@pytest.fixture
def checkpoints(stored_run):
    """`checkpoints({step: objective})`: a run that keeps these checkpoints."""

    def make(objectives):
        folder = stored_run("first")
        store = CheckpointStore(Storage(str(folder.path)), keep=9)
        for step, objective in objectives.items():
            files = {"adapter/adapter_config.json": b"{}", "state.json": str(step).encode()}
            measured = None if objective is None else Objective(objective, "")
            store.save(Checkpoint(step, files, measured))
        return folder

    return make


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("objectives", "name", "sentence"),
    [
        ({}, "best", "Run 'first' has no checkpoint yet."),
        ({}, "bets", "--checkpoint is 'bets'; expected best, newest or the step of one."),
        ({2: None, 3: None}, "best", "has measured none of its checkpoints (train.probe_prompts=0)"),
        ({2: float("nan"), 3: None}, "best", "has no objective that is a finite number"),
        ({1: 0.5, 2: 0.9, 3: None}, "7", "keeps no checkpoint of step 7; it keeps those of steps "
         "1, 2 (best), 3."),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_kept_is_refused_with_those_that_are(
    mistake, checkpoints, tmp_path, verb, objectives, name, sentence
):
    checkpoints(objectives)
    words = ["first", tmp_path / "model"] if verb == "export" else ["first"]

    assert sentence in mistake(*words, "--checkpoint", name, verb=verb)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("name", "step"), [("best", 2), ("newest", 3), ("1", 1)])
def test_a_checkpoint_is_found_by_its_name(checkpoints, name, step):
    folder = checkpoints({1: 0.5, 2: 0.9, 3: None})

    found = kept_checkpoint(folder.read_config(), folder, name)

    assert (found.step, found.files["state.json"]) == (step, str(step).encode())


def test_the_named_checkpoint_is_evaluated_and_exported(monkeypatch, checkpoints, output, tmp_path):
    checkpoints({1: 0.5, 2: 0.9, 3: None})
    seen = []
    monkeypatch.setattr(
        "ray_detox.models.loading.export_model",
        lambda policy, adapter, target: seen.append(sorted(f.name for f in adapter.iterdir())),
    )
    monkeypatch.setattr(
        pipeline,
        "evaluate_run",
        lambda config, folder, console, which, **_: seen.append(which) or {},
    )
    where = ["--output", str(output)]

    cli.main(["export", "first", str(tmp_path / "model"), "--checkpoint", "best", *where])
    cli.main(["evaluate", "first", "--checkpoint", "newest", *where])

    assert seen == [["adapter_config.json"], "newest"]


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_an_unknown_run_is_not_evaluated_or_exported(mistake, tmp_path, verb):
    words = ["first", tmp_path / "model"] if verb == "export" else ["first"]

    assert "No run 'first' in" in mistake(*words, verb=verb)


def test_export_does_not_overwrite_a_folder(mistake, stored_run, tmp_path):
    folder = stored_run("first")
    folder.adapter.mkdir()
    (folder.adapter / "adapter_config.json").write_text("{}")
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")

    assert "is not empty. Give a new folder" in mistake("first", target, verb="export")
    assert "thesis.tex is not a folder. Give a new" in mistake(
        "first", target / "thesis.tex", verb="export"
    )


# ---- how a run ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending, code, said",
    [
        (pipeline.Stopped(7, signal.SIGINT), 130, "Stopped after step 7, with a checkpoint."),
        (pipeline.Stopped(7, signal.SIGTERM), 143, "Stopped after step 7, with a checkpoint."),
        (pipeline.Stopped(0, signal.SIGTERM), 143, "Stopped before step 1."),
        (RuntimeError("Training failed: no."), cli.FAILED, "ray-detox: Training failed: no.\n"),
        (pipeline.NotStored("Kept here alone."), cli.FAILED, "ray-detox: Kept here alone.\n"),
        (KeyboardInterrupt(), 130, "ray-detox: stopped."),
        (KeyboardInterrupt(signal.SIGTERM), 143, "ray-detox: stopped."),
    ],
)
def test_a_run_that_ends_early_prints_the_command_to_resume_it(
    monkeypatch, capsys, output, ending, code, said
):  # fmt: skip
    def run(config, folder, console, *, resume, accept_changes):
        folder.path.mkdir(parents=True)
        raise ending

    monkeypatch.setattr(pipeline, "run", run)

    ended = cli.main(["run", "lab", "--run-id", "first", "--output", str(output)])

    printed = capsys.readouterr()
    assert ended == code
    assert said in printed.out + printed.err
    assert f"ray-detox run --resume first --output {output}" in printed.out + printed.err


@pytest.mark.parametrize(
    ("settings", "which"), [([], "best"), (["train.probe_prompts=0"], "newest")]
)
def test_a_run_that_diverges_says_how_to_measure_its_last_good_checkpoint(
    monkeypatch, capsys, output, settings, which
):
    def run(config, folder, console, *, resume, accept_changes):
        raise pipeline.TrainingDiverged("Training has diverged in step 7: the KL ...")

    monkeypatch.setattr(pipeline, "run", run)

    ended = cli.main(["run", "lab", *settings, "--run-id", "first", "--output", str(output)])

    first, second, third = capsys.readouterr().err.splitlines()
    assert ended == cli.FAILED
    assert first == "ray-detox: Training has diverged in step 7: the KL ..."
    assert f"ray-detox evaluate first --checkpoint {which} --output {output}" in second
    assert third.endswith(f"ray-detox run --resume first --output {output}")


def test_an_unsupported_python_and_a_missing_package_are_reported(monkeypatch, capsys, output):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2, "final", 0))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ray_detox", run_name="__main__")
    assert ended.value.code == cli.MISTAKE
    assert "needs Python 3.11 to 3.13" in capsys.readouterr().err
    monkeypatch.undo()

    missing = ["peft.tuners", "ray_detox.tuner"]

    def run(*_, **__):
        raise ModuleNotFoundError(name=missing.pop(0))

    monkeypatch.setattr(pipeline, "run", run)
    assert cli.main(["run", "lab", "--output", str(output)]) == cli.MISTAKE
    assert f"ray-detox: peft is missing in {sys.executable}." in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):  # a fault of our own is shown in full
        cli.main(["run", "lab", "--output", str(output)])


# ---- check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", recipe_names())
def test_check_shows_every_setting_and_touches_nothing(capsys, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)

    code = cli.main(["check", recipe, "train.steps=7"])

    out = capsys.readouterr().out
    assert code == 0
    shown, _, needs = out.partition("---\n")
    assert config_from_dict(yaml.safe_load(shown)) == load_config(recipe, ["train.steps=7"])
    assert re.search(r"^training: +training worker +\d+ ", needs, re.M)
    assert re.search(r"^need +\d+ +[\d.]+$", needs, re.M)
    assert list(tmp_path.iterdir()) == []


def test_check_lists_the_files_to_fetch(capsys):
    cli.main(["check", "seed", "policy.revision=abc", "data.path=s3://bucket/rows.parquet"])

    out = capsys.readouterr().out
    assert "to be fetched: data.path s3://bucket/rows.parquet\n" in out
    assert "to be fetched: policy.model google/flan-t5-base@abc\n" in out
    assert "to be fetched: reward.model facebook/roberta-hate-speech-dynabench-r4-target\n" in out


def test_check_of_the_embedded_recipe_fetches_nothing(capsys):
    cli.main(["check"])

    out = capsys.readouterr().out
    assert "recipe: lab\n" in out
    assert "to be fetched" not in out


def test_the_output_of_check_is_a_recipe(capsys, tmp_path):
    cli.main(["check", "seed", "seed=5"])
    recipe = tmp_path / "seed.yaml"
    recipe.write_text(capsys.readouterr().out.partition("---\n")[0])

    assert load_config(str(recipe)) == load_config("seed", ["seed=5"])


def test_check_shows_the_least_a_run_holds_and_the_most_it_would_use(capsys):
    cli.main(["check", "lab", "train.workers=2..4", "cluster.cpus_per_worker=3"])

    out = capsys.readouterr().out
    assert re.search(r"^training: +training worker +2\.\.4 +3 +0 +6 +0$", out, re.M)
    assert re.search(r"^need +7 +0$", out, re.M)
    assert re.search(r"^used if free +13 +0$", out, re.M)


def test_a_live_check_finds_missing_gpus_before_ray_is_started(mistake):
    sentence = mistake("lab", "--live", "cluster.gpus_per_worker=64", verb="check")

    assert "The run needs 128.25 GPUs" in sentence


@pytest.mark.parametrize("verb", ["check", "run"])
def test_check_refuses_the_mistakes_that_run_refuses(capsys, output, tmp_path, verb):
    words = ["lab", f"data.path={tmp_path}/none.csv"]
    words += ["--output", str(output)] if verb == "run" else []

    assert cli.main([verb, *words]) == cli.MISTAKE
    assert "no such file is here" in capsys.readouterr().err


# ---- in a new process ------------------------------------------------------------------------


def in_process(*words, cwd, code="", **environment):
    """Run a command in a fresh process, then `code` in the same."""
    script = f"import sys; from ray_detox.cli.main import main; code = main(sys.argv[1:]); {code}\n"
    return subprocess.run(
        [sys.executable, "-c", script + "sys.exit(code)", *map(str, words)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


HEAVY = "{'torch', 'ray', 'pandas', 'transformers', 'datasets', 'tqdm', 'rich', 'numpy'}"


def test_check_answers_without_heavy_imports(tmp_path):
    code = f"assert not {HEAVY} & set(sys.modules), set(sys.modules)"

    done = in_process("check", "flan-t5-base", cwd=tmp_path, code=code)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "google/flan-t5-base" in done.stdout


def test_help_answers_without_heavy_imports(tmp_path):
    script = (
        "import sys\nfrom ray_detox.cli.main import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit as ended:\n    code = ended.code\n"
        f"assert not ({HEAVY} | {{'pydantic', 'yaml', 'asyncio'}}) & set(sys.modules)\n"
        "sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert "flan-t5-base, lab, seed" in done.stdout


def test_check_fits_a_narrow_terminal():
    needs = on_terminal("-m", "ray_detox", "check", "flan-t5-base", columns=60).partition("---")[2]

    table = needs.partition("each step")[0].splitlines()
    assert max(map(len, table)) <= 60
    assert any(re.fullmatch(r"  training worker +\d+ +1 +0 +\d+ +0", line) for line in table)


def test_check_shows_a_recipe_in_any_encoding(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("description: café 汉字\n", encoding="utf-8")

    done = in_process("check", recipe, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="1")

    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout.partition("---\n")[0])["description"] == "café 汉字"


def test_an_error_cannot_steer_the_terminal(mistake, tmp_path):
    path = write_rows(tmp_path, "csv", [{"a\x1b[2Jb": "x"}])

    assert "its columns are a\\x1b[2Jb" in mistake("lab", f"data.path={path}")


def test_a_mistake_in_a_new_process_is_one_line_and_ray_is_not_imported(tmp_path):
    done = in_process(
        "run", "lab", "policy.lora_targets=[nothing]", "--output", tmp_path / "runs",
        cwd=tmp_path, code="assert 'ray' not in sys.modules",
    )  # fmt: skip

    assert done.returncode == cli.MISTAKE
    assert done.stdout == ""
    assert done.stderr.startswith("ray-detox: policy.lora_targets names 'nothing'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_reported_in_one_line(tmp_path):
    done = in_process(
        "run", "lab", "policy.model=google/flan-t5-base", "--output", tmp_path / "runs",
        # A port of this machine on which nothing listens
        cwd=tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip

    assert done.returncode == cli.MISTAKE, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("ray-detox: policy.model is the hub id 'google/flan-t5-base'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_hub_model_with_only_pickled_weights_is_refused_before_the_download(
    monkeypatch, mistake, tiny_roberta
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    described = tiny_roberta

    def only_description(name, revision, setting, weights):
        folder = described.parent / "description"
        folder.mkdir(exist_ok=True)
        for file in described.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    monkeypatch.setattr("ray_detox.models.sources._from_hub", only_description)
    # The hub fetches nothing of a repository without safetensors.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **asked: [])

    sentence = mistake("lab", "reward.model=someone/classifier")

    assert "the hub id 'someone/classifier', which has no .safetensors file" in sentence
    assert "set reward.revision to one that has" in sentence


def test_a_failed_evaluation_is_reported_in_one_line(monkeypatch, stored_run, output, capsys):
    def fails(*args, **kwargs):
        raise errors.StageError("ValueError: The reward term gave nothing.")

    stored_run("first")
    monkeypatch.setattr(pipeline, "evaluate_run", fails)

    code = cli.main(["evaluate", "first", "--output", str(output)])

    assert code == cli.FAILED
    assert capsys.readouterr().err == "ray-detox: ValueError: The reward term gave nothing.\n"
