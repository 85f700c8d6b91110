"""Starting adapters: each gives the logits that plain peft gives, or `check` refuses it."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from ray_detox.config import ConfigError, PolicyConfig, RunConfig, SamplingConfig
from ray_detox.models.adapters import check_adapter_settings
from ray_detox.models.loading import export_model, load_policy
from ray_detox.stages.preflight import check_policy


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Results of trials are not taken from the cache of the person who runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def start(tiny_t5, tmp_path):
    """`start(described=None, **settings)`: the folder of an adapter with random weights.

    `settings` are peft's; `described` changes adapter_config.json afterwards.
    """

    def make(described=None, **settings):
        torch.manual_seed(0)
        base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
        lora = LoraConfig(**{"r": 4, "target_modules": ["q", "v"]} | settings)
        model = get_peft_model(base, lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / "start")
        file = tmp_path / "start/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (described or {})))
        return tmp_path / "start"

    return make


def logits(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch.query_ids,
            attention_mask=batch.query_mask.long(),
            decoder_input_ids=torch.tensor([[0, 5, 9, 30]]).expand(len(batch), 4),
        ).logits


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"q": 2}, "alpha_pattern": {"v": 16}},
        {"target_modules": ["q", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["final_layer_norm"]},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_policy_starts_where_plain_peft_loads_the_adapter(
    settings, start, tiny_t5, make_prompts, tmp_path
):
    folder, batch = start(**settings), make_prompts(6)
    config = PolicyConfig(model=str(tiny_t5), adapter=str(folder))
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    plain = PeftModel.from_pretrained(base, str(folder)).eval()

    check_policy(RunConfig(policy=config))
    policy = load_policy(config, SamplingConfig(max_new_tokens=12), seed=0)

    expected = logits(plain, batch)
    assert_close(logits(policy.model, batch), expected)
    with policy.as_reference():
        assert_close(logits(policy.model, batch), expected)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.1
    with policy.as_reference():
        assert_close(logits(policy.model, batch), expected)
    trained = logits(policy.model, batch)
    assert (trained - expected).abs().max() > 0.05

    policy.save_adapter(tmp_path / "end")
    export_model(config, tmp_path / "end", tmp_path / "out")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert_close(logits(merged, batch), trained, atol=5e-5 * float(trained.abs().max()), rtol=0)


def test_an_adapter_of_a_saved_layer_in_the_encoder_trains_the_encoder(start, tiny_t5):
    folder = start(target_modules=r".*decoder.*\.q", modules_to_save=["final_layer_norm"])

    config = PolicyConfig(model=str(tiny_t5), adapter=str(folder))
    policy = load_policy(config, SamplingConfig(), seed=0)

    assert not policy.frozen_encoder


@pytest.mark.parametrize(
    "described, message",
    [
        ({"init_lora_weights": "pissa"}, "it was initialised with pissa, which changes the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "it was initialised with pissa_niter_16, which"),
        ({"init_lora_weights": "olora"}, "it was initialised with olora, which changes the base"),
        ({"bias": "lora_only"}, r"it also trains biases of the base model \(bias=lora_only\)"),
        ({"bias": "all"}, r"it also trains biases of the base model \(bias=all\)"),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"it replicates layers of the base model"),
        ({"trainable_token_indices": [5]}, r"it trains single rows of the embedding"),
        ({"base_model_name_or_path": "BERT"}, "trained on a bert model, '.*BERT', and"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_does_not_only_add_to_the_base_model_is_refused(
    described, message, start, tiny_t5, tmp_path
):
    if "base_model_name_or_path" in described:
        (tmp_path / "BERT").mkdir()
        (tmp_path / "BERT/config.json").write_text('{"model_type": "bert"}')
        described = {"base_model_name_or_path": str(tmp_path / "BERT")}
    folder = start(described)
    config = PolicyConfig(model=str(tiny_t5), adapter=str(folder))

    with pytest.raises(ConfigError, match=rf"policy\.adapter is '.*start', .*{message}") as refused:
        check_policy(RunConfig(policy=config))
    assert "\n" not in str(refused.value)


def test_a_policy_refuses_such_an_adapter_without_a_check_as_well(start, tiny_t5):
    config = PolicyConfig(model=str(tiny_t5), adapter=str(start({"bias": "all"})))

    with pytest.raises(ConfigError, match="it also trains biases of the base model"):
        load_policy(config, SamplingConfig(), seed=0)


def test_initialisations_that_need_data_are_refused_before_peft_asks_for_it():
    settings = LoraConfig()
    settings.init_lora_weights = "corda"

    with pytest.raises(ConfigError, match="initialised with corda, which changes the base weights"):
        check_adapter_settings(settings, "start")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_of_a_tied_head_is_refused(settings, start, tiny_t5, tmp_path):
    folder = start(**settings)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        **sizes, vocab_size=63, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "tied")
    for file in tiny_t5.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "tied")

    with pytest.raises(
        ConfigError, match="it adapts lm_head, whose weight the model uses in another"
    ):
        check_policy(RunConfig(policy={"model": str(tmp_path / "tied"), "adapter": str(folder)}))


def test_an_adapter_of_another_hub_model_is_refused(start, tiny_t5, monkeypatch):
    folder = start({"base_model_name_or_path": "google/t5-v1_1-base"})
    monkeypatch.setattr(
        "ray_detox.stages.preflight.local_folder",
        lambda name, *rest, **named: folder if name == str(folder) else tiny_t5,
    )
    monkeypatch.setattr("ray_detox.stages.preflight.hub_has_safetensors", lambda *given: True)
    policy = {"model": "google/flan-t5-base", "adapter": str(folder)}

    with pytest.raises(
        ConfigError,
        match=r"trained on 'google/t5-v1_1-base' by its adapter_config\.json, and policy\.model is "
        r"'google/flan-t5-base'",
    ):
        check_policy(RunConfig(policy=policy))
