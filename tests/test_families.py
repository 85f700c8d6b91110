"""Every encoder-decoder architecture of transformers keeps the policy's contract, or is refused.

The models are tiny random builds of each architecture; `tests/family_table.py` makes them. The rules
of generation are compared with transformers' own logits processors.
"""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, GenerationConfig
from transformers.models.nllb import NllbTokenizer

from ray_detox.config import ConfigError, PolicyConfig, RunConfig, SamplingConfig
from ray_detox.models import trial
from ray_detox.models.constraints import (
    Constraints,
    GenerationRules,
    check_language,
    describe_generation,
    generation_config,
    generation_rules,
)
from ray_detox.models.loading import export_model, load_policy
from ray_detox.models.trial import failed_trial, tiny_model
from tests.conftest import randomise_weights
from tests.family_table import FAMILIES, family_config, refusal, save_family, targets_in

WORKING = frozenset(
    "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian "
    "mbart mt5 mvp nllb-moe pegasus pegasus_x plbart seamless_m4t seamless_m4t_v2 "
    "switch_transformers t5 t5gemma umt5".split()
)
"""Families that must not be refused; any other may be, in a sentence."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Results of trials are not taken from the cache of the person who runs the tests."""
    if "ray-detox-tests" not in os.environ.get("XDG_CACHE_HOME", ""):
        root = tmp_path_factory.getbasetemp() / "ray-detox-tests"
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """`family(name)`: the folder of a tiny model."""
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).exists() else save_family(name, root / name)


def a_policy(folder, **settings):
    """A policy on a saved model, with random weights of adapter and value head."""
    defaults = {"model": str(folder), "lora_targets": targets_in(folder), "lora_rank": 4}
    config = PolicyConfig(**defaults | settings)
    return randomise_weights(load_policy(config, SamplingConfig(max_new_tokens=10), seed=0))


def prompts(policy, rows=4):
    """Random prompts of different lengths: ids and mask, [B, Q]."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 3] * (rows // 4))[:, None]
    ids = torch.randint(4, 64, mask.shape, generator=generator)
    return torch.where(mask, ids, policy.pad_id), mask


def sample(policy, rows=4):
    """Sample responses with limits from 1 to 10."""
    query_ids, mask = prompts(policy, rows)
    limits = torch.tensor([10, 3, 10, 1] * (rows // 4))
    noise = torch.rand(rows, 10, generator=torch.Generator().manual_seed(1))
    return policy.sample(query_ids, mask, limits, noise)


def plain_logits(model, tokens, start_id):
    """Logits of a plain model for responses, [B, R, V]."""
    start = torch.full_like(tokens.response_ids[:, :1], start_id)
    with torch.no_grad():
        return model(
            input_ids=tokens.query_ids,
            attention_mask=tokens.query_mask.long(),
            decoder_input_ids=torch.cat([start, tokens.response_ids[:, :-1]], dim=1),
            use_cache=False,
        ).logits


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture_keeps_the_contract_or_is_refused_in_a_sentence(name, family, tmp_path):
    folder = family(name)
    sentence = refusal(folder)
    if name not in WORKING:
        assert sentence is not None, f"{name} works now: add it to WORKING"
        assert sentence.startswith(f"policy.model is '{folder}'")
        assert "\n" not in sentence
        return

    assert sentence is None
    policy = load_policy(
        PolicyConfig(model=str(folder), lora_targets=targets_in(folder), lora_rank=4),
        SamplingConfig(max_new_tokens=10),
        seed=0,
        critic="shared",
    )
    close = {"atol": 5e-5, "rtol": 1e-4}

    # Before training the KL is 0.
    generation = sample(policy)
    assert_close(policy.ref_logprobs(generation.tokens), generation.logprobs, **close)

    # Sampled equals scored, alone and in the batch.
    generation = sample(randomise_weights(policy))
    tokens, mask = generation.tokens, generation.tokens.response_mask
    assert not (tokens.response_ids == policy.pad_id)[mask].any()
    scores = policy.score_tokens(tokens)
    assert_close(scores.logprobs, generation.logprobs, **close)
    assert_close(scores.values, generation.values, **close)
    for row in range(4):
        alone = policy.score_tokens(tokens.select(torch.tensor([row])))
        width = alone.logprobs.shape[1]
        assert_close(alone.logprobs[0], scores.logprobs[row, :width], **close)
        assert_close(alone.values[0], scores.values[row, :width], **close)

    # The gradient reaches every weight.
    (scores.logprobs.sum() + scores.values.sum()).backward()
    assert [n for n, p in policy.trainable().items() if p.grad is None or not p.grad.any()] == []

    # Restored from disk, in plain peft, and exported.
    policy.save_adapter(tmp_path / "adapter")
    other = a_policy(folder)
    other.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other.score_tokens(tokens).logprobs, scores.logprobs)
    expected = plain_logits(policy.model, tokens, policy.start_id)[mask]
    base = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert_close(plain_logits(plain, tokens, policy.start_id)[mask], expected, **close)
    export_model(PolicyConfig(model=str(folder)), tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    rounding = 5e-5 * max(1.0, float(expected.abs().max()))
    exported = plain_logits(merged, tokens, policy.start_id)[mask]
    assert_close(exported, expected, atol=rounding, rtol=0)


# ---- generation settings -----------------------------------------------------------------------

RULES = {
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 1,
    "bad_words_ids": [[5], [1], [6, 7], [8, 6, 5, 4]],
    "suppress_tokens": [11, 12],
    "begin_suppress_tokens": [13, 1],
    "min_length": 4,
    "min_new_tokens": 2,
}


def restricted(tmp_path, **rules):
    """The folder of a BART whose generation_config.json has these settings."""
    folder = save_family("bart", tmp_path / "bart")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | rules))
    return folder


def with_lengths_of_generate(base, settings, inputs):
    """Settings after the step of `generate` in which `min_new_tokens` replaces `min_length`."""
    return base._prepare_generated_length(settings, False, True, "input_ids", 1, inputs)


@pytest.mark.parametrize(
    "rules",
    [{}, *({name: value} for name, value in RULES.items()), RULES],
    ids=["none", *RULES, "all"],
)
def test_every_position_has_the_distribution_of_the_processors_of_generate(rules, tmp_path):
    policy = a_policy(restricted(tmp_path, **rules))
    generation = sample(policy, rows=32)
    tokens, mask = generation.tokens, generation.tokens.response_mask

    limits = torch.tensor([10, 3, 10, 1] * 8)
    logits = plain_logits(policy.model, tokens, policy.start_id)
    start = torch.full_like(tokens.response_ids[:, :1], policy.start_id)
    inputs = torch.cat([start, tokens.response_ids], dim=1)
    base = policy.model.get_base_model()
    expected = torch.zeros_like(generation.logprobs)
    for limit in limits.unique().tolist():
        settings = GenerationConfig.from_dict(base.generation_config.to_dict())
        # The policy forbids the pad token as well.
        settings.bad_words_ids = [*(settings.bad_words_ids or []), [policy.pad_id]]
        settings.max_length = limit + 1
        settings = with_lengths_of_generate(base, settings, inputs)
        base._prepare_special_tokens(settings, device=logits.device)
        processors = base._get_logits_processor(settings, input_ids_seq_length=1)
        for row in (limits == limit).nonzero()[:, 0].tolist():
            for t in range(int(mask[row].sum())):
                seen = inputs[row : row + 1, : t + 1]
                processed = processors(seen, logits[row : row + 1, t].clone()).log_softmax(-1)
                expected[row, t] = processed[0, tokens.response_ids[row, t]]

    with torch.no_grad():
        scores = policy.score_tokens(tokens)
    assert_close(scores.logprobs, expected, atol=2e-5, rtol=1e-4)
    assert_close(generation.logprobs, expected, atol=2e-5, rtol=1e-4)


def test_the_constrained_distribution_equals_that_of_generate_for_every_token(tmp_path):
    policy = a_policy(restricted(tmp_path, **RULES))
    base = policy.model.get_base_model()
    generator = torch.Generator().manual_seed(0)
    # Few tokens, so that prefixes of the longer bad words occur.
    inputs = torch.randint(4, 10, (200, 8), generator=generator)
    inputs[:, 0] = policy.start_id
    logits = torch.randn(200, 8, 69, generator=generator)
    limits = torch.full((200,), 8)

    at_once = logits.clone()
    policy.constraints.apply_(at_once, inputs, limits)
    one_by_one = logits.clone()
    for t in range(8):
        policy.constraints.apply_(one_by_one[:, t : t + 1], inputs[:, : t + 1], limits, t)

    settings = GenerationConfig.from_dict(base.generation_config.to_dict())
    settings.bad_words_ids = [*settings.bad_words_ids, [policy.pad_id]]
    settings.max_length = 9
    settings = with_lengths_of_generate(base, settings, inputs)
    base._prepare_special_tokens(settings, device=logits.device)
    processors = base._get_logits_processor(settings, input_ids_seq_length=1)
    assert torch.equal(at_once, one_by_one)
    for t in range(8):
        expected = processors(inputs[:, : t + 1], logits[:, t].clone()).softmax(-1)
        assert_close(at_once[:, t].softmax(-1), expected)


def test_a_forced_token_has_probability_one_and_no_gradient(tmp_path):
    policy = a_policy(restricted(tmp_path, forced_bos_token_id=9, forced_eos_token_id=1))

    tokens = sample(policy, rows=32).tokens
    scores = policy.score_tokens(tokens)
    lengths = tokens.response_mask.sum(dim=1)
    scores.logprobs[:, 0].sum().backward()

    limits = torch.tensor([10, 3, 10, 1] * 8)
    at_limit = (lengths == limits).nonzero()[:, 0]
    assert (tokens.response_ids[limits > 1, 0] == 9).all()
    assert (tokens.response_ids[at_limit, lengths[at_limit] - 1] == 1).all()
    assert not scores.logprobs[:, 0].any()
    assert not scores.logprobs[at_limit, lengths[at_limit] - 1].any()
    assert not any(p.grad.any() for p in policy.trainable().values() if p.grad is not None)


def test_masks_outside_the_graph_give_the_gradient_of_masks_inside_it():
    rules = GenerationRules(start_id=0, pad_id=0, eos_ids=(1,), forbidden=(0, 4), min_new_tokens=1)
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[5, 1], [6, 7], [8, 1]])

    ours = logits.clone().requires_grad_()
    masked = ours * 1
    Constraints(rules).apply_(masked, targets, None)
    masked.log_softmax(-1).gather(2, targets[..., None]).sum().backward()
    inside = logits.clone().requires_grad_()
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[..., [0, 4]], mask[:, 0, 1] = True, True
    recorded = inside.masked_fill(mask, -torch.inf).log_softmax(-1)
    recorded.gather(2, targets[..., None]).sum().backward()

    assert_close(ours.grad, inside.grad)


def test_sampling_min_new_tokens_replaces_the_minimum_of_the_author(tmp_path):
    folder = restricted(tmp_path, min_length=30)
    config = PolicyConfig(model=str(folder), lora_targets=("q_proj",))

    with pytest.raises(ConfigError, match=r"a minimum of 29 tokens before end-of-sequence, and "):
        load_policy(config, SamplingConfig(max_new_tokens=10), seed=0)
    policy = load_policy(config, SamplingConfig(max_new_tokens=10, min_new_tokens=0), seed=0)

    assert policy.constraints.rules.min_new_tokens == 0


def test_min_new_tokens_replaces_min_length_as_in_generate(tmp_path):
    folder = restricted(tmp_path, min_length=5, min_new_tokens=2)

    policy = a_policy(folder)
    notes = describe_generation(PolicyConfig(model=str(folder)), SamplingConfig())

    assert policy.constraints.rules.min_new_tokens == 2
    assert "min_new_tokens=2 are in force" in notes[0]
    assert "min_length=5 are not in force" in notes[1]


OUTSIDE = {"suppress_tokens": [-1, 70000, 11], "begin_suppress_tokens": [-1, 70000]}


def test_forbidden_tokens_outside_the_vocabulary_change_nothing(tmp_path):
    settings = OUTSIDE | {"bad_words_ids": [[70000], [6, 70000], [6, 7]]}
    policy = a_policy(restricted(tmp_path, **settings))

    rules = policy.constraints.rules

    assert rules.forbidden == (policy.pad_id, 11)
    assert rules.forbidden_at_begin == ()
    assert rules.forbidden_sequences == ((6, 7),)
    assert sample(policy).logprobs.isfinite().all()


EVERY = list(range(69))
"""The ids of the vocabulary of `restricted`."""


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ({"forced_bos_token_id": 70000}, "forced_bos_token_id 70000, and its vocabulary has the"),
        ({"forced_eos_token_id": [1, -3]}, "forced_eos_token_id -3, and its vocabulary has the"),
        ({"decoder_start_token_id": [3, 3]}, "decoder_start_token_id [3, 3], one for each row"),
        ({"suppress_tokens": [1]}, "end-of-sequence (suppress_tokens), so no response can end"),
        ({"forced_bos_token_id": 1}, "so every response is this one token. Set policy.forced_bos"),
        ({"suppress_tokens": EVERY}, "forbids every token but end-of-sequence (bad_words_ids, s"),
        ({"begin_suppress_tokens": EVERY}, "forbids every first token but end-of-sequence"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rules_that_leave_nothing_to_sample_are_refused(rules, sentence, tmp_path):
    assert sentence in str(refusal(restricted(tmp_path, **rules)))


def test_the_token_that_a_setting_names_starts_every_response(tmp_path):
    folder = save_family("bart", tmp_path / "bart")

    policy = a_policy(folder, forced_bos_token="w5")
    policy.save_adapter(tmp_path / "adapter")
    config = PolicyConfig(model=str(folder), forced_bos_token="w5")
    export_model(config, tmp_path / "adapter", tmp_path / "out")

    assert (sample(policy).tokens.response_ids[:, 0] == 9).all()
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert (exported.generate(prompts(policy)[0], max_new_tokens=3)[:, 1] == 9).all()
    with pytest.raises(
        ConfigError, match=r"policy\.forced_bos_token is 'fr_XX', and the tokenizer"
    ):
        a_policy(folder, forced_bos_token="fr_XX")


def test_a_multilingual_model_without_a_language_is_refused(family):
    tokenizer = NllbTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, merges=[])
    silent = GenerationRules(start_id=2, pad_id=1, eos_ids=(2,))

    with pytest.raises(ConfigError, match=r"Set policy\.forced_bos_token to the code of the lang"):
        check_language(silent, tokenizer, "nllb")
    check_language(GenerationRules(2, 1, (2,), forced_bos_id=7), tokenizer, "nllb")
    check_language(GenerationRules(start_id=7, pad_id=1, eos_ids=(2,)), tokenizer, "mbart")


def test_a_model_that_does_not_say_how_responses_start_is_refused(family):
    settings = GenerationConfig(eos_token_id=1, pad_token_id=0)
    config = generation_config(family("bart"))

    with pytest.raises(ConfigError, match=r"has no decoder_start_token_id, so responses"):
        generation_rules(settings, GenerationConfig(), SamplingConfig())
    assert generation_rules(config, GenerationConfig(), SamplingConfig()).start_id == 3


def test_the_notes_tell_which_settings_of_the_author_are_in_force(tmp_path):
    rules = {"forced_bos_token_id": 9, "num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 4}
    rules |= {"forced_decoder_ids": [[1, 5]]}
    policy = PolicyConfig(model=str(restricted(tmp_path, **rules)))

    with_minimum = describe_generation(policy, SamplingConfig())
    replaced = describe_generation(policy, SamplingConfig(min_new_tokens=2))

    assert "settings, forced_bos_token_id=9, min_length=4 are in force" in with_minimum[0]
    not_in_force = "num_beams=4, no_repeat_ngram_size=3, forced_decoder_ids=[[1, 5]]"
    assert f"{not_in_force} are not in force" in with_minimum[1]
    assert "settings, forced_bos_token_id=9 are in force" in replaced[0]
    assert f"{not_in_force}, min_length=4 are not in force" in replaced[1]


# ---- trials ------------------------------------------------------------------------------------


def test_a_mixture_of_experts_is_refused_if_responses_exceed_the_capacity_of_an_expert(family):
    folder = family("switch_transformers")
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"expert_capacity": 3}))

    assert "rates the tokens that it sampled differently" in str(refusal(folder))
    file.write_text(json.dumps(settings))


def test_a_trial_is_made_once_for_the_same_settings(family, monkeypatch):
    folder, trials = family("t5"), []

    def counted(*given, **named):
        trials.append(given)
        return failed_trial(*given, **named)

    monkeypatch.setattr("ray_detox.models.trial.failed_trial", counted)
    for rank in (3, 3, 5):
        refusal(folder, lora_rank=rank)

    assert len(trials) == 2


def test_an_adapter_of_an_upper_layer_is_tried_on_a_copy_of_full_depth(tmp_path):
    config = family_config("bart")
    config.encoder_layers = config.decoder_layers = 4
    rules = GenerationRules(start_id=3, pad_id=0, eos_ids=(1,))
    model = tiny_model(config, rules, depth=False)
    folder = save_family("bart", tmp_path / "bart")
    model.save_pretrained(folder)
    chosen = LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[3], layers_pattern="layers"
    )
    pattern = LoraConfig(r=2, target_modules=r".*layers\.3\..*q_proj")
    for name, adapter in (("chosen", chosen), ("pattern", pattern)):
        get_peft_model(copy.deepcopy(model), adapter).save_pretrained(tmp_path / name)

    layer = "decoder.layers.{}.self_attn.q_proj"
    assert refusal(folder, lora_targets=(layer.format(3),)) is None
    assert refusal(folder, adapter=str(tmp_path / "chosen")) is None
    assert refusal(folder, adapter=str(tmp_path / "pattern")) is None
    sentence = str(refusal(folder, lora_targets=(layer.format(9),)))
    assert "policy.lora_targets names 'decoder.layers.9.self_attn.q_proj', and" in sentence
    assert "has no linear layer of that name; it has " in sentence


def test_the_cache_of_trials_does_not_depend_on_the_order_of_a_set():
    ordered = trial._as_json({"v", "q", "k"})

    assert ordered == ["k", "q", "v"]


def test_layers_that_text_does_not_reach_are_refused_and_the_remedy_works(family):
    folder = family("t5gemma2")

    assert "text does not reach the adapted layer model.encoder.vision" in str(refusal(folder))
    assert refusal(folder, frozen_encoder=True) is None


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_an_adapter_on_a_head_that_is_tied_to_the_embedding_is_refused(name, family):
    folder = family(name)
    targets = ("lm_head", *targets_in(folder))

    sentence = refusal(folder, lora_targets=targets)

    assert sentence is not None
    assert "it adapts lm_head, whose weight the model uses in another place too" in sentence
    with pytest.raises(ConfigError, match="it adapts lm_head"):
        load_policy(PolicyConfig(model=str(folder), lora_targets=targets), SamplingConfig(), seed=0)


def test_an_adapter_on_a_head_of_its_own_is_accepted(tiny_t5):
    settings = {"model": str(tiny_t5), "lora_targets": ("q", "lm_head")}
    RunConfig(policy=settings)

    assert refusal(tiny_t5, lora_targets=("q", "lm_head")) is None
