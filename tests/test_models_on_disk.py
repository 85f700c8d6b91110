"""Models on disk, as other programs leave them: used rightly, or refused by a check in one sentence."""

import errno
import json
import shutil

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    MPNetConfig,
    MPNetForSequenceClassification,
)

from ray_detox import lab
from ray_detox.config import ConfigError, PolicyConfig, SamplingConfig
from ray_detox.models.classifier import longest_input
from ray_detox.models.loading import load_policy
from ray_detox.models.sources import local_folder
from ray_detox.recipes.loading import load_config
from ray_detox.stages.preflight import check_classifier, check_policy


@pytest.fixture
def copy(tmp_path):
    """`copy(model, **changes)`: a copy of an embedded model with changed settings in config.json."""

    def make(model, **changes):
        folder = tmp_path / "model"
        shutil.copytree(model, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return make


def check_models(config):
    check_policy(config)
    for setting, each in config.reward.classifiers:
        check_classifier(each, setting)


def refusal(*settings):
    config = load_config("lab", list(settings))
    with pytest.raises(ConfigError) as caught:
        check_models(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy, model):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"#Person{number}#" for number in range(300)])
    tokenizer.save_pretrained(folder)

    message = refusal(f"{model}.model={folder}")

    assert f"{model}.model is " in message
    assert "resize_token_embeddings" in message


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.model"])
def test_a_tokenizer_without_words_is_refused(copy, name):
    folder = copy(lab.T5)
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')

    message = refusal(f"policy.model={folder}")

    assert "T5Tokenizer has no vocabulary, so every word would be unknown" in message
    assert "it reads spiece.model, tokenizer.json" in message


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_a_missing_file_of_the_weights_is_named(copy, model):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert f"1 of the 2 files with its weights are missing, such as {names[1]}" in refusal(
        f"{model}.model={folder}"
    )


@pytest.mark.parametrize("model", ["policy", "reward"])
@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.fp16.safetensors", "pytorch.safetensors"]
)
def test_weights_in_files_that_transformers_does_not_load_are_refused(copy, model, name):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    (folder / "model.safetensors").rename(folder / name)

    message = refusal(f"{model}.model={folder}")

    assert f"its weights are in {name}, but transformers loads model.safetensors" in message


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_missing_weights_and_other_shapes_are_found_by_a_check(copy, model):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    file = folder / "model.safetensors"
    weights = load_file(file)
    key = next(name for name in sorted(weights) if name.endswith(("wo.weight", "dense.weight")))
    whole = weights[key]
    weights[key] = whole[:, 1:].clone()
    save_file(weights, file, {"format": "pt"})
    shapes = (
        f"{key} has shape {tuple(weights[key].shape)}, and config.json (labels, sizes) describes"
    )
    assert shapes in refusal(f"{model}.model={folder}")

    del weights[key]
    save_file(weights, file, {"format": "pt"})
    assert f"its files have no weights for {key}" in refusal(f"{model}.model={folder}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_policy_in_half_precision_is_accepted(copy, dtype):
    folder = copy(lab.T5, dtype=dtype)
    file = folder / "model.safetensors"
    kind = getattr(torch, dtype)
    half = {name: weight.to(kind) for name, weight in load_file(file).items()}
    save_file(half, file, {"format": "pt"})

    check_models(load_config("lab", [f"policy.model={folder}"]))


def test_a_policy_whose_config_leaves_out_what_its_family_says_is_accepted(copy):
    folder = copy(lab.T5)
    settings = json.loads((folder / "config.json").read_text())
    del settings["is_encoder_decoder"]
    (folder / "config.json").write_text(json.dumps(settings))

    check_models(load_config("lab", [f"policy.model={folder}"]))


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_quantized_weights_are_refused(copy, model):
    quantized = {"quant_method": "gptq", "bits": 4}
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model], quantization_config=quantized)

    assert "whose weights are quantized (gptq)" in refusal(f"{model}.model={folder}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(copy, name):
    folder = copy(lab.T5)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")

    assert f"its {name} is a pointer of Git LFS" in refusal(f"policy.model={folder}")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "encoder_model.onnx", "tf_model.h5", "flax_model.msgpack", "a.gguf"],
)
def test_weights_of_other_programs_are_named(copy, name):
    folder = copy(lab.T5)
    (folder / "model.safetensors").rename(folder / name)

    assert f"(it has {name}); save the model again" in refusal(f"policy.model={folder}")


@pytest.mark.parametrize("inner", ["checkpoint-500", "snapshots/abc", "models--a--b/snapshots/abc"])
def test_the_folder_of_a_model_below_the_one_given_is_pointed_out(tmp_path, inner):
    shutil.copytree(lab.T5, tmp_path / inner)

    assert f"such as {tmp_path / inner}, that save_pretrained" in refusal(
        f"policy.model={tmp_path}"
    )


def test_an_archive_in_place_of_a_models_folder_is_refused(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK")

    assert "this is a file and no folder" in refusal(f"policy.model={tmp_path}/model.zip")


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_weights_cut_short_are_refused(copy, model):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    assert "model.safetensors cannot be read" in refusal(f"{model}.model={folder}")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.model."])
@pytest.mark.parametrize("model", ["policy", "reward"])
def test_weights_of_other_names_are_refused_instead_of_random(copy, model, wrapper):
    folder = copy({"policy": lab.T5, "reward": lab.ROBERTA}[model])
    file = folder / "model.safetensors"
    weights = {f"{wrapper}{name}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})

    message = refusal(f"{model}.model={folder}")

    assert wrapper in message
    assert "all would be random" in message


def test_a_policy_that_lacks_some_weights_is_not_loaded(copy):
    folder = copy(lab.T5)
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "decoder.block" in name)
    del weights[name]
    save_file(weights, file, {"format": "pt"})

    with pytest.raises(ConfigError, match=r"have no weights for decoder\.block"):
        load_policy(PolicyConfig(model=str(folder)), SamplingConfig(), seed=0)


def test_prompts_and_responses_longer_than_the_positions_are_refused(tmp_path):
    sizes = {
        f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "ffn_dim")
    }
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = BartConfig(vocab_size=2100, d_model=8, max_position_embeddings=64, **sizes, **heads)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(lab.T5).save_pretrained(tmp_path)
    settings = [f"policy.model={tmp_path}", "policy.lora_targets=[q_proj]"]

    assert "data.max_prompt_tokens allows 1,024 tokens, and policy.model" in refusal(*settings)
    assert "Set it to at most 64." in refusal(
        *settings, "data.max_prompt_tokens=64", "sampling.max_new_tokens=65"
    )


def test_the_positions_of_mpnet_begin_after_its_padding():
    config = MPNetConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    config.max_position_embeddings = 514
    tokenizer = AutoTokenizer.from_pretrained(lab.T5)
    tokenizer.model_max_length = 514

    assert longest_input(tokenizer, MPNetForSequenceClassification(config)) == 512


@pytest.mark.parametrize("kind", ["whisper", "t5gemma9"])
def test_a_family_that_is_unknown_or_no_language_model_is_named(copy, kind):
    folder = copy(lab.T5, model_type=kind)

    assert f"policy.model is {str(folder)!r}" in refusal(f"policy.model={folder}")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx2.ProxyError("407 Proxy Authentication Required"), "through the proxy (ProxyError"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of the cache is full"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "Read-only file system: /x"),
        (httpx2.ConnectError("refused"), "cannot be reached from here (ConnectError)"),
    ],
)
def test_a_model_that_cannot_be_downloaded_is_refused_with_the_cause(error, expected, monkeypatch):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in (
        "https_proxy",
        "HTTPS_PROXY",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(ConfigError) as caught:
        local_folder("a/b", None, "policy.model")

    assert expected in str(caught.value)


def test_a_cache_without_weights_is_refused_while_the_hub_is_switched_off(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    shutil.copytree(lab.T5, snapshot)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert "the cache holds no weights, and the hub is switched off" in refusal("policy.model=a/b")


def test_a_hub_adapter_with_pickled_weights_is_refused_with_advice_for_adapters(
    tmp_path, monkeypatch
):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    monkeypatch.setattr("ray_detox.models.sources._from_hub", lambda *arguments: tmp_path)

    message = refusal("policy.adapter=some/adapter")

    assert "set policy.adapter to that folder" in message
    assert "policy.revision" not in message
