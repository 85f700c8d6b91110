"""The policy: sampling and scoring agree, rows are independent, the reference never changes."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from ray_detox import draws
from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.errors import NonFiniteError
from ray_detox.models.critic import make_value_head
from ray_detox.models.loading import compute_dtype, export_model, load_policy, lora_config
from ray_detox.models.policy import Policy, _invert_cdf
from ray_detox.records import TokenBatch

EOS = 1


def generate(policy, batch, max_new_tokens=None, noise=None):
    """Sample one response per prompt, by default with the limits and noise of a run's first step."""
    limits, uniforms = draws.sampling_noise(batch.ids, policy.sampling, seed=0, step=0)
    return policy.sample(
        batch.query_ids,
        batch.query_mask,
        torch.from_numpy(limits) if max_new_tokens is None else max_new_tokens,
        torch.from_numpy(uniforms).float() if noise is None else noise,
    )


def score(policy, tokens):
    """Score responses with teacher forcing."""
    with torch.no_grad():
        return policy.score_tokens(tokens)


def first_token_logprobs(policy, one):
    """Log-probability of each of the 63 tokens as the first of a response to one prompt, [63]."""
    tokens = TokenBatch(
        query_ids=one.query_ids.expand(63, -1),
        query_mask=one.query_mask.expand(63, -1),
        response_ids=torch.arange(63)[:, None],
        response_mask=torch.ones(63, 1, dtype=torch.bool),
        encoder_states=None,
        limits=None,
    )
    return score(policy, tokens).logprobs[:, 0]


def logits(model, batch):
    """Logits of a plain model for a fixed response."""
    decoder_ids = torch.tensor([[0, 5, 9, 30]]).expand(len(batch), 4)
    with torch.no_grad():
        return model(
            input_ids=batch.query_ids,
            attention_mask=batch.query_mask.long(),
            decoder_input_ids=decoder_ids,
        ).logits


# ---- sampling and scoring are one distribution -------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.9},
        {"min_new_tokens": 5},
        {"max_new_tokens": "1..12"},
    ],
    ids=["plain", "cold", "hot", "min-new-tokens", "random-limits"],
)
def test_sampled_logprobs_and_values_equal_teacher_forced_ones(make_policy, make_prompts, sampling):
    policy, batch = make_policy(sampling), make_prompts(24)

    generation = generate(policy, batch)

    scores = score(policy, generation.tokens)
    assert generation.values.std() > 0.1, "a value head of zeros would agree with anything"
    assert_close(generation.logprobs, scores.logprobs, atol=2e-5, rtol=1e-4)
    assert_close(generation.values, scores.values, atol=2e-5, rtol=1e-4)


def test_the_temperature_divides_the_logits_in_the_scores(make_policy, make_prompts):
    batch = make_prompts(6)
    plain, hot = make_policy(), make_policy({"temperature": 2.0})
    tokens = generate(plain, batch).tokens

    scores = score(hot, tokens)

    decoder_ids = torch.nn.functional.pad(tokens.response_ids[:, :-1], (1, 0), value=0)
    with torch.no_grad():
        raw = plain.model(
            input_ids=batch.query_ids,
            attention_mask=batch.query_mask.long(),
            decoder_input_ids=decoder_ids,
        ).logits
    raw[..., 0] = -torch.inf  # the pad token is never sampled
    expected = (raw / 2).log_softmax(-1).gather(2, tokens.response_ids[..., None])[..., 0]
    assert_close(scores.logprobs, torch.where(tokens.response_mask, expected, 0.0))


def test_a_higher_temperature_lowers_the_mean_log_probability(make_policy, make_prompts):
    batch = make_prompts(64)

    cold, hot = (generate(make_policy({"temperature": t}), batch) for t in (0.5, 2.0))

    mean = lambda generation: generation.logprobs[generation.tokens.response_mask].mean()
    assert mean(cold) > mean(hot) + 1


def test_a_response_does_not_depend_on_the_other_prompts_in_its_batch(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(8)
    together = generate(policy, batch)

    for row in range(8):
        alone = generate(policy, batch.select([row]))

        length = int(together.tokens.response_mask[row].sum())
        expected_ids = together.tokens.response_ids[row, :length]
        assert alone.tokens.response_ids[0].tolist() == expected_ids.tolist()
        assert_close(alone.logprobs[0], together.logprobs[row, :length], atol=2e-5, rtol=1e-4)
        assert_close(alone.values[0], together.values[row, :length], atol=2e-5, rtol=1e-4)


def test_removing_finished_rows_from_the_decoder_changes_nothing(
    make_policy, make_prompts, monkeypatch
):
    policy, batch = make_policy(), make_prompts(16)

    generations = []
    for threshold in (0.0, 0.75, 1.1):  # never, the default, at every token
        monkeypatch.setattr("ray_detox.models.policy.COMPACTION_THRESHOLD", threshold)
        generations.append(generate(policy, batch))

    never = generations[0]
    lengths = never.tokens.response_mask.sum(dim=1)
    assert lengths.unique().numel() > 3, "rows must end at different times"
    for compacted in generations[1:]:
        assert torch.equal(compacted.tokens.response_ids, never.tokens.response_ids)
        assert torch.equal(compacted.tokens.response_mask, never.tokens.response_mask)
        assert torch.equal(compacted.tokens.query_mask, batch.query_mask)
        assert_close(compacted.logprobs, never.logprobs, atol=2e-5, rtol=1e-4)
        assert_close(compacted.values, never.values, atol=2e-5, rtol=1e-4)


def test_right_padding_changes_nothing(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(6)
    tokens = generate(policy, batch).tokens
    wide = lambda x, by, fill=0: torch.nn.functional.pad(x, (0, by), value=fill)

    padded = score(
        policy,
        TokenBatch(
            query_ids=wide(tokens.query_ids, 5, 17),
            query_mask=wide(tokens.query_mask, 5),
            response_ids=wide(tokens.response_ids, 3, 17),
            response_mask=wide(tokens.response_mask, 3),
            encoder_states=None,
            limits=None,
        ),
    )

    width, scores = tokens.response_ids.shape[1], score(policy, tokens)
    assert_close(padded.logprobs[:, :width], scores.logprobs, atol=2e-5, rtol=1e-4)
    assert_close(padded.values[:, :width], scores.values, atol=2e-5, rtol=1e-4)
    assert not padded.logprobs[:, width:].any()
    assert not padded.values[:, width:].any()


# ---- length limits and the end of sequence -----------------------------------------------------


def test_no_response_exceeds_its_limit_and_only_one_at_its_limit_lacks_end_of_sequence(
    make_policy, make_prompts
):
    policy, batch = make_policy(), make_prompts(32)
    limits = torch.tensor([1, 2, 5, 12] * 8)

    tokens = generate(policy, batch, limits).tokens

    lengths = tokens.response_mask.sum(dim=1)
    assert (lengths <= limits).all()
    assert (lengths >= 1).all()
    assert (lengths[::4] == 1).all()
    last = tokens.response_ids[torch.arange(32), lengths - 1]
    assert ((last == EOS) | (lengths == limits)).all()
    assert (last == EOS).any()
    assert (last != EOS).any()


def test_the_mask_includes_end_of_sequence_and_nothing_after_it(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(32)

    generation = generate(policy, batch)

    tokens = generation.tokens
    is_end = tokens.response_ids == EOS
    ended = is_end.any(dim=1)
    assert ended.any()
    assert (is_end.sum(dim=1) <= 1).all()
    assert (tokens.response_mask & is_end).sum() == ended.sum()
    assert not tokens.response_ids[~tokens.response_mask].any(), "padding is the pad token, 0"
    for per_token in (generation.logprobs, generation.values):
        assert not per_token[~tokens.response_mask].any()
        assert per_token[tokens.response_mask].all()


@pytest.mark.parametrize("limit", [1, 3])
def test_a_generation_is_as_wide_as_its_longest_response(make_policy, make_prompts, limit):
    policy, batch = make_policy(), make_prompts(16)

    tokens = generate(policy, batch, torch.full((16,), limit)).tokens

    assert tokens.response_ids.shape == (16, limit)
    assert tokens.response_mask[:, -1].any()


def test_min_new_tokens_excludes_end_of_sequence_from_sampling_and_from_scoring(
    make_policy, make_prompts
):
    policy, batch = make_policy({"min_new_tokens": 4}), make_prompts(32)

    tokens = generate(policy, batch).tokens

    lengths = tokens.response_mask.sum(dim=1)
    assert (lengths >= 5).all(), "end-of-sequence is at the fifth token at the earliest"
    assert (lengths == 5).any()
    probabilities = first_token_logprobs(policy, batch.select([0])).exp()
    assert probabilities[EOS] == 0
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5), "renormalised over the others"


# ---- sampling a token --------------------------------------------------------------------------


def test_first_tokens_are_sampled_with_the_probabilities_of_the_policy(make_policy, make_prompts):
    policy, one = make_policy(), make_prompts(1)
    samples = 4000
    many = one.select([0] * samples)
    noise = torch.rand(samples, 1, generator=torch.Generator().manual_seed(0))

    tokens = generate(policy, many, torch.ones(samples, dtype=torch.long), noise).tokens

    expected = samples * first_token_logprobs(policy, one).exp()
    seen = torch.bincount(tokens.response_ids[:, 0], minlength=63)
    common = expected >= 5  # the statistic is then chi-square distributed to a good approximation
    chi_square = float(((seen - expected) ** 2 / expected)[common].sum())
    freedom = int(common.sum())
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_token_is_sampled_by_inverting_the_distribution_function():
    # Cumulative 0.5, 0.5, 0.75, 1: token 1 has no probability.
    log_p = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, 4)
    noise = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99])

    assert _invert_cdf(log_p, noise).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_policy_with_a_weight_that_is_not_a_number_says_so_when_it_samples(
    make_policy, make_prompts
):
    policy, batch = make_policy(), make_prompts(4)
    next(iter(policy.trainable().values())).data[0, 0] = torch.nan

    with pytest.raises(NonFiniteError, match=r"Check the weights of policy\.model and policy\.ad"):
        generate(policy, batch)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_sampled(noise):
    # Masked at both ends. 1.0 is the largest float64 below 1, rounded to float32.
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, -3:] = torch.finfo(torch.float32).min

    tokens = _invert_cdf(logits.log_softmax(-1), torch.full((50,), noise))

    assert (tokens >= 3).all()
    assert (tokens < 37).all()


# ---- the reference -----------------------------------------------------------------------------


def test_the_adapter_off_is_exactly_the_base_model(make_policy, make_prompts, tiny_t5):
    policy, batch = make_policy(), make_prompts(8)
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()

    with policy.as_reference():
        reference = logits(policy.model, batch)

    assert torch.equal(reference, logits(base, batch))
    assert not torch.allclose(logits(policy.model, batch), reference, atol=0.1)


def test_the_policy_is_restored_after_being_the_reference(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(4)
    before, names = logits(policy.model, batch), list(policy.trainable())

    with policy.as_reference(), policy.as_reference():
        pass
    with pytest.raises(ZeroDivisionError), policy.as_reference():
        raise ZeroDivisionError

    assert torch.equal(logits(policy.model, batch), before)
    assert list(policy.trainable()) == names


def test_a_new_policy_equals_its_reference(make_policy, make_prompts):
    policy, batch = make_policy(randomised=False), make_prompts(8)
    generation = generate(policy, batch)

    reference = policy.ref_logprobs(generation.tokens)

    assert torch.equal(reference, score(policy, generation.tokens).logprobs)
    assert not generation.values.any(), "a new value head returns 0"


# ---- the critic --------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["none", "detached", "shared"])
def test_the_first_values_are_zero(make_policy, make_prompts, critic):
    policy = make_policy(critic=critic, randomised=False)

    generation = generate(policy, make_prompts(8))

    assert not generation.values.any()
    assert not score(policy, generation.tokens).values.any()


def test_the_values_of_a_detached_critic_have_no_gradient_in_the_policy(make_policy, make_prompts):
    detached, shared = make_policy(critic="detached"), make_policy(critic="shared")
    tokens = generate(shared, make_prompts(8)).tokens

    for policy in (detached, shared):
        policy.score_tokens(tokens).values.sum().backward()

    trained = detached.trainable()
    assert {name for name, p in trained.items() if p.grad is not None and p.grad.any()} == {
        name for name in trained if name.startswith("value_head.")
    }
    assert any(p.grad.any() for name, p in shared.trainable().items() if "lora_" in name)


def test_sampled_values_of_a_detached_critic_equal_teacher_forced_ones(make_policy, make_prompts):
    policy = make_policy(critic="detached")

    generation = generate(policy, make_prompts(8))

    assert generation.values.std() > 0.1
    assert_close(generation.values, score(policy, generation.tokens).values, atol=2e-5, rtol=1e-4)


def test_a_critic_does_not_change_the_responses(make_policy, make_prompts):
    batch = make_prompts(8)

    found = [
        generate(make_policy(critic=critic, randomised=False), batch)
        for critic in ("none", "detached", "shared")
    ]

    for other in found[1:]:
        assert torch.equal(other.tokens.response_ids, found[0].tokens.response_ids)
        assert torch.equal(other.logprobs, found[0].logprobs)


def test_the_kl_is_measured_to_the_starting_adapter_and_not_to_the_base_model(
    make_policy, make_prompts, tmp_path
):
    batch, trained = make_prompts(8), make_policy()
    trained.save_adapter(tmp_path / "start")
    start = make_policy(policy={"adapter": str(tmp_path / "start")}, randomised=False)

    generation = generate(start, batch)
    tokens, mask = generation.tokens, generation.tokens.response_mask
    to_reference = (generation.logprobs - start.ref_logprobs(tokens))[mask]
    # The reference of `trained` is the base model, because it started without an adapter.
    to_base = (generation.logprobs - trained.ref_logprobs(tokens))[mask]

    assert to_reference.abs().max() < 1e-4
    assert to_base.abs().max() > 0.5


def test_the_reference_does_not_change_while_the_starting_adapter_is_trained(
    make_policy, make_prompts, tmp_path
):
    batch = make_prompts(8)
    make_policy().save_adapter(tmp_path / "start")
    policy = make_policy(policy={"adapter": str(tmp_path / "start")}, randomised=False)
    tokens = generate(policy, batch).tokens
    before = policy.ref_logprobs(tokens)

    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.3

    assert not any("reference" in name for name in policy.trainable())
    assert torch.equal(policy.ref_logprobs(tokens), before)
    assert not torch.allclose(score(policy, tokens).logprobs, before, atol=0.1)


def test_new_lora_weights_depend_on_the_seed_alone(make_policy):
    torch.manual_seed(1)
    one = make_policy(seed=3, randomised=False).trainable()
    torch.manual_seed(2)
    torch.rand(5)
    two, other = (make_policy(seed=seed, randomised=False).trainable() for seed in (3, 4))

    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---- a frozen encoder --------------------------------------------------------------------------


def test_a_frozen_encoder_has_no_adapter_and_encodes_once_for_every_pass(make_policy, make_prompts):
    policy, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(8)

    generation = generate(policy, batch)

    tokens = generation.tokens
    assert policy.frozen_encoder
    assert not any(".encoder." in name for name in policy.trainable())
    assert tokens.encoder_states is not None
    without_states = dataclasses.replace(tokens, encoder_states=None)
    encoded_anew, reused = (score(policy, t) for t in (without_states, tokens))
    assert torch.equal(encoded_anew.logprobs, reused.logprobs)
    assert_close(generation.logprobs, reused.logprobs, atol=2e-5, rtol=1e-4)
    assert torch.equal(policy.ref_logprobs(without_states), policy.ref_logprobs(tokens))


def test_scoring_uses_the_encoder_states_of_its_tokens(make_policy, make_prompts):
    policy, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(8)
    tokens = generate(policy, batch).tokens
    other = dataclasses.replace(tokens, encoder_states=torch.zeros_like(tokens.encoder_states))

    assert not torch.allclose(score(policy, other).logprobs, score(policy, tokens).logprobs)


def test_reused_encoder_states_give_the_decoder_the_same_gradient(make_policy, make_prompts):
    policy, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(8)
    tokens = generate(policy, batch).tokens

    gradients = []
    for states in (None, tokens.encoder_states):
        policy.zero_grad()
        scores = policy.score_tokens(dataclasses.replace(tokens, encoder_states=states))
        scores.logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in list(policy.trainable().values())[:-2]])

    for encoded_anew, reused in zip(*gradients, strict=True):
        assert_close(encoded_anew, reused)
        assert encoded_anew.any()


def test_an_encoder_with_an_adapter_encodes_in_every_pass_and_gets_a_gradient(
    make_policy, make_prompts
):
    policy, batch = make_policy(), make_prompts(4)
    tokens = generate(policy, batch).tokens

    policy.score_tokens(tokens).logprobs.sum().backward()

    assert tokens.encoder_states is None
    encoder = [p for name, p in policy.trainable().items() if ".encoder." in name]
    assert encoder
    assert all(p.grad.any() for p in encoder)


def test_the_encoder_is_frozen_if_the_starting_adapter_covers_only_the_decoder(
    make_policy, tmp_path
):
    make_policy(policy={"frozen_encoder": True}).save_adapter(tmp_path)

    policy = make_policy(policy={"adapter": str(tmp_path)}, randomised=False)

    assert policy.frozen_encoder


# ---- eval, dropout, arithmetic -----------------------------------------------------------------


def test_the_policy_stays_in_eval_mode_and_configured_dropout_has_no_effect(
    make_policy, make_prompts
):
    policy, batch = make_policy(policy={"lora_dropout": 0.9}), make_prompts(8)
    assert policy.model.config.dropout_rate > 0
    tokens = generate(policy, batch).tokens
    plain = make_policy()

    once = policy.score_tokens(tokens)
    once.logprobs.sum().backward()
    twice = score(policy, tokens)

    assert not any(module.training for module in policy.modules())
    assert torch.equal(once.logprobs, twice.logprobs)
    assert torch.equal(twice.logprobs, score(plain, tokens).logprobs)


def test_a_bfloat16_policy_samples_trains_and_keeps_its_adapter_in_float32(
    make_policy, make_prompts
):
    policy, batch = make_policy(policy={"dtype": "bfloat16"}), make_prompts(8)

    generation = generate(policy, batch)
    tokens, mask = generation.tokens, generation.tokens.response_mask
    scores = policy.score_tokens(tokens)
    (scores.logprobs.sum() + scores.values.sum()).backward()

    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    dtypes = {x.dtype for x in (scores.logprobs, scores.values, generation.logprobs)}
    assert dtypes == {torch.float32}
    assert all(p.grad.isfinite().all() for p in policy.trainable().values())
    assert (scores.logprobs - generation.logprobs)[mask].abs().mean() < 0.05
    in_float32 = make_policy().score_tokens(tokens)
    assert (in_float32.logprobs - scores.logprobs)[mask].abs().mean() < 0.2


def test_the_output_head_of_a_bfloat16_policy_computes_in_float32(make_policy, make_prompts):
    policy, batch = make_policy(policy={"dtype": "bfloat16"}), make_prompts(8)
    head, seen = policy.model.get_base_model().get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, output: seen.append((args[0], output.clone())))

    score(policy, generate(policy, batch).tokens)

    states, logits = seen[-1]
    assert states.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert_close(logits, states.float() @ head.weight.T)


def test_dtype_auto_is_float32_on_a_cpu():
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_lora_config_follows_the_settings():
    both = lora_config(PolicyConfig(lora_rank=3, lora_alpha=6, lora_targets=("q", "k")))
    decoder = lora_config(PolicyConfig(frozen_encoder=True))

    assert (both.r, both.lora_alpha, both.target_modules) == (3, 6, {"q", "k"})
    assert isinstance(decoder.target_modules, str)
    assert "decoder" in decoder.target_modules


# ---- to and from disk --------------------------------------------------------------------------


def test_a_saved_adapter_loads_in_plain_peft_with_equal_logits(
    make_policy, make_prompts, tiny_t5, tmp_path
):
    policy, batch = make_policy(), make_prompts(6)

    policy.save_adapter(tmp_path)

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits(plain, batch), logits(policy.model, batch))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_t5)


def test_an_adapter_trained_from_a_starting_adapter_is_saved_completely(
    make_policy, make_prompts, tiny_t5, tmp_path
):
    make_policy().save_adapter(tmp_path / "start")
    policy = make_policy(policy={"adapter": str(tmp_path / "start")}, seed=1)

    policy.save_adapter(tmp_path / "end")

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "end")).eval()
    batch = make_prompts(6)
    assert torch.equal(logits(plain, batch), logits(policy.model, batch))


@pytest.mark.parametrize("critic", ["none", "detached", "shared"])
def test_adapter_and_value_head_are_restored_from_disk(make_policy, tmp_path, critic):
    policy = make_policy(critic=critic)
    other = make_policy(seed=1, randomised=False, critic=critic)

    policy.save_adapter(tmp_path / "adapter")
    policy.save_value_head(tmp_path / "value_head.safetensors")
    other.load_adapter(tmp_path / "adapter")
    other.load_value_head(tmp_path / "value_head.safetensors")

    weights, read_back = policy.trainable(), other.trainable()
    assert weights.keys() == read_back.keys()
    assert all(torch.equal(weights[name], read_back[name]) for name in weights)
    assert (tmp_path / "value_head.safetensors").exists() == (critic != "none")


def test_loading_an_adapter_with_other_layers_fails(make_policy, tmp_path):
    make_policy(policy={"lora_targets": ("q",)}).save_adapter(tmp_path)

    with pytest.raises(
        ValueError, match=r"has other layers than the policy.s adapter\. Use the policy\.lora"
    ):
        make_policy().load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_exported_model_loads_without_peft_and_has_an_untied_head(
    make_policy, make_prompts, tiny_t5, tmp_path
):
    policy, batch = make_policy(), make_prompts(6)
    policy.save_adapter(tmp_path / "adapter")

    export_model(PolicyConfig(model=str(tiny_t5)), tmp_path / "adapter", tmp_path / "out")

    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    expected = logits(policy.model, batch)
    # Merging rounds the weights; the effect on a logit scales with the size of all logits.
    rounding = 1e-5 * expected.abs().max().item()
    assert_close(logits(plain, batch), expected, atol=rounding, rtol=0)
    with policy.as_reference():
        assert (logits(policy.model, batch) - expected).abs().max() > 1000 * rounding
    assert plain.lm_head.weight is not plain.shared.weight
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    # Version 4 of transformers reads this key and would tie the head if it were true.
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ba be").input_ids == [3, 4, 1]


def test_a_missing_model_folder_is_named_in_the_message(tmp_path):
    missing = PolicyConfig(model=str(tmp_path / "nowhere"))

    with pytest.raises(
        ValueError, match=r"policy.model is '.*nowhere', and no such folder is here"
    ):
        load_policy(missing, SamplingConfig(), seed=0)


SMALL_BART = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
SMALL_T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize(
    "kind, settings, targets",
    [
        ("bart", SMALL_BART, ("q_proj", "v_proj")),
        ("pegasus", SMALL_BART, ("q_proj", "v_proj")),
        ("mt5", SMALL_T5, ("q", "v")),
        ("longt5", SMALL_T5, ("q", "v")),
    ],
)
def test_other_encoder_decoders_score_tokens_as_they_sampled_them(
    kind, settings, targets, frozen_encoder
):
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **settings))
    config = PolicyConfig(lora_rank=4, lora_targets=targets, frozen_encoder=frozen_encoder)
    model = get_peft_model(base, lora_config(config))
    head = make_value_head("shared", model.config.hidden_size, seed=0)
    policy = Policy(model, SamplingConfig(max_new_tokens=12), frozen_encoder, value_head=head)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    query_mask = torch.arange(9) < torch.tensor([9, 4, 7, 3])[:, None]
    query_ids = torch.where(query_mask, torch.randint(5, 90, (4, 9)), policy.pad_id)

    noise = torch.rand(4, 12)
    generation = policy.sample(query_ids, query_mask, torch.tensor([12, 3, 12, 1]), noise)
    scores = score(policy, generation.tokens)
    reference = policy.ref_logprobs(generation.tokens)

    assert_close(scores.logprobs, generation.logprobs, atol=1e-5, rtol=0)
    assert_close(scores.values, generation.values, atol=1e-5, rtol=0)
    assert (reference - generation.logprobs).abs().max() > 1e-3
    assert (generation.tokens.encoder_states is not None) == frozen_encoder
