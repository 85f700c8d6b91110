"""The policy: sampling and scoring agree, rows do not see each other, the reference stays put."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from ray_detox import draws
from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.models.loading import compute_dtype, export_model, load_policy, lora_config
from ray_detox.models.policy import Policy, _invert_cdf

EOS = 1


def answer(policy, batch, budgets=None, uniforms=None, step=0):
    """Sample one answer per prompt, with the draws that a run would use."""
    drawn, numbers = draws.sampling_noise(batch.ids, policy.sampling, seed=0, step=step)
    budgets = torch.from_numpy(drawn) if budgets is None else budgets
    uniforms = torch.from_numpy(numbers).float() if uniforms is None else uniforms
    return policy.sample(batch.query_ids, batch.query_mask, budgets, uniforms)


def read(policy, batch, sample, states=None):
    """Score the answers with teacher forcing."""
    with torch.no_grad():
        return policy.score_tokens(
            batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask, states
        )


def logits(model, batch):
    """A plain model's logits of some fixed answers."""
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
    ids=["plain", "cold", "hot", "min-new-tokens", "budgets"],
)
def test_sampled_logprobs_and_values_equal_teacher_forced_ones(make_policy, make_prompts, sampling):
    policy, batch = make_policy(sampling), make_prompts(24)

    sample = answer(policy, batch)

    scores = read(policy, batch, sample)
    assert sample.values.std() > 0.1, "a value head of zeros would agree with anything"
    assert_close(sample.logprobs, scores.logprobs, atol=2e-5, rtol=1e-4)
    assert_close(sample.values, scores.values, atol=2e-5, rtol=1e-4)


def test_the_temperature_divides_the_logits_in_the_scores(make_policy, make_prompts):
    batch = make_prompts(6)
    plain, hot = make_policy(), make_policy({"temperature": 2.0})
    sample = answer(plain, batch)

    scores = read(hot, batch, sample)

    decoder_ids = torch.nn.functional.pad(sample.response_ids[:, :-1], (1, 0), value=0)
    with torch.no_grad():
        raw = plain.model(
            input_ids=batch.query_ids,
            attention_mask=batch.query_mask.long(),
            decoder_input_ids=decoder_ids,
        ).logits
    expected = (raw / 2).log_softmax(-1).gather(2, sample.response_ids[..., None])[..., 0]
    assert_close(scores.logprobs, torch.where(sample.response_mask, expected, 0.0))


def test_a_hot_policy_is_less_sure_of_what_it_says(make_policy, make_prompts):
    batch = make_prompts(64)

    cold, hot = (answer(make_policy({"temperature": t}), batch) for t in (0.5, 2.0))

    mean = lambda sample: sample.logprobs[sample.response_mask].mean()
    assert mean(cold) > mean(hot) + 1


def test_an_answer_in_a_batch_of_one_equals_the_same_in_a_batch_of_eight(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(8)
    together = answer(policy, batch)

    for row in range(8):
        alone = answer(policy, batch.select([row]))

        length = int(together.response_mask[row].sum())
        assert alone.response_ids[0].tolist() == together.response_ids[row, :length].tolist()
        assert_close(alone.logprobs[0], together.logprobs[row, :length], atol=2e-5, rtol=1e-4)
        assert_close(alone.values[0], together.values[row, :length], atol=2e-5, rtol=1e-4)


def test_dropping_finished_rows_changes_nothing(make_policy, make_prompts, monkeypatch):
    policy, batch = make_policy(), make_prompts(16)

    samples = []
    for share in (0.0, 0.75, 1.1):  # never, as usual, at every token
        monkeypatch.setattr("ray_detox.models.policy.COMPACT_BELOW", share)
        samples.append(answer(policy, batch))

    kept = samples[0]
    assert kept.response_mask.sum(dim=1).unique().numel() > 3, "rows must end at different times"
    for dropped in samples[1:]:
        assert torch.equal(dropped.response_ids, kept.response_ids)
        assert torch.equal(dropped.response_mask, kept.response_mask)
        assert_close(dropped.logprobs, kept.logprobs, atol=2e-5, rtol=1e-4)
        assert_close(dropped.values, kept.values, atol=2e-5, rtol=1e-4)


def test_right_padding_changes_nothing(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(6)
    sample = answer(policy, batch)
    wide = lambda x, by, fill=0: torch.nn.functional.pad(x, (0, by), value=fill)

    with torch.no_grad():
        padded = policy.score_tokens(
            wide(batch.query_ids, 5, 17),
            wide(batch.query_mask, 5),
            wide(sample.response_ids, 3, 17),
            wide(sample.response_mask, 3),
        )

    width, scores = sample.response_ids.shape[1], read(policy, batch, sample)
    assert_close(padded.logprobs[:, :width], scores.logprobs, atol=2e-5, rtol=1e-4)
    assert_close(padded.values[:, :width], scores.values, atol=2e-5, rtol=1e-4)
    assert not padded.logprobs[:, width:].any()
    assert not padded.values[:, width:].any()


# ---- budgets and the end of sequence -----------------------------------------------------------


def test_no_answer_exceeds_its_budget_and_only_a_full_one_lacks_its_end(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(32)
    budgets = torch.tensor([1, 2, 5, 12] * 8)

    sample = answer(policy, batch, budgets)

    lengths = sample.response_mask.sum(dim=1)
    assert (lengths <= budgets).all()
    assert (lengths >= 1).all()
    assert (lengths[::4] == 1).all()
    last = sample.response_ids[torch.arange(32), lengths - 1]
    assert ((last == EOS) | (lengths == budgets)).all()
    assert (last == EOS).any()
    assert (last != EOS).any()


def test_the_end_of_sequence_counts_and_nothing_after_it_does(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(32)

    sample = answer(policy, batch)

    is_end = sample.response_ids == EOS
    ended = is_end.any(dim=1)
    assert ended.any()
    assert (is_end.sum(dim=1) <= 1).all()
    assert (sample.response_mask & is_end).sum() == ended.sum()
    assert not sample.response_ids[~sample.response_mask].any(), "padding is the pad token, 0"
    for per_token in (sample.logprobs, sample.values):
        assert not per_token[~sample.response_mask].any()
        assert per_token[sample.response_mask].all()


@pytest.mark.parametrize("budget", [1, 3])
def test_a_sample_is_as_wide_as_its_longest_answer(make_policy, make_prompts, budget):
    policy, batch = make_policy(), make_prompts(16)

    sample = answer(policy, batch, torch.full((16,), budget))

    assert sample.response_ids.shape == (16, budget)
    assert sample.response_mask[:, -1].any()


def test_min_new_tokens_bars_the_end_while_sampling_and_in_the_loss(make_policy, make_prompts):
    policy, batch = make_policy({"min_new_tokens": 4}), make_prompts(32)

    sample = answer(policy, batch)

    lengths = sample.response_mask.sum(dim=1)
    assert (lengths >= 5).all(), "the fifth token is the first that may end it"
    assert (lengths == 5).any()
    every_token = torch.arange(63)[:, None]
    one = batch.select([0])
    repeat = lambda x: x.expand(63, -1)
    with torch.no_grad():
        mass = policy.score_tokens(
            repeat(one.query_ids),
            repeat(one.query_mask),
            every_token,
            torch.ones(63, 1, dtype=torch.bool),
        ).logprobs.exp()
    assert mass[EOS] == 0
    assert float(mass.sum()) == pytest.approx(1, abs=1e-5), "the others share what it had"


# ---- drawing a token ---------------------------------------------------------------------------


def test_first_tokens_are_drawn_as_often_as_the_policy_says(make_policy, make_prompts):
    policy, one = make_policy(), make_prompts(1)
    draws = 4000
    many = one.select([0] * draws)
    uniforms = torch.rand(draws, 1, generator=torch.Generator().manual_seed(0))

    drawn = answer(policy, many, torch.ones(draws, dtype=torch.long), uniforms).response_ids[:, 0]

    all_tokens = torch.arange(63)[:, None]
    repeat = lambda x: x.expand(63, -1)
    with torch.no_grad():
        log_p = policy.score_tokens(
            repeat(one.query_ids),
            repeat(one.query_mask),
            all_tokens,
            torch.ones(63, 1, dtype=torch.bool),
        ).logprobs[:, 0]
    expected, seen = draws * log_p.exp(), torch.bincount(drawn, minlength=63)
    common = expected >= 5  # where the statistic is chi-square to a good approximation
    chi_square = float(((seen - expected) ** 2 / expected)[common].sum())
    freedom = int(common.sum())
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_draw_inverts_the_distribution_function():
    # Cumulative 0.5, 0.5, 0.75, 1: token 1 has no probability.
    log_p = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99])

    assert _invert_cdf(log_p, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_no_draw_is_a_token_of_probability_zero(uniform):
    # Barred at both ends; 1.0 is what rounding to float32 makes of the largest float64 below it.
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, -3:] = torch.finfo(torch.float32).min

    tokens = _invert_cdf(logits.log_softmax(-1), torch.full((50,), uniform))

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


def test_the_policy_is_itself_again_after_being_the_reference(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(4)
    before, names = logits(policy.model, batch), list(policy.trainable())

    with policy.as_reference(), policy.as_reference():
        pass
    with pytest.raises(ZeroDivisionError), policy.as_reference():
        raise ZeroDivisionError

    assert torch.equal(logits(policy.model, batch), before)
    assert list(policy.trainable()) == names


def test_a_fresh_policy_is_its_reference(make_policy, make_prompts):
    policy, batch = make_policy(stirred=False), make_prompts(8)
    sample = answer(policy, batch)

    reference = policy.ref_logprobs(
        batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask
    )

    assert torch.equal(reference, read(policy, batch, sample).logprobs)
    assert not sample.values.any(), "a fresh value head says 0"


def test_the_kl_is_measured_to_the_starting_adapter_and_not_to_the_base(
    make_policy, make_prompts, tmp_path
):
    batch, trained = make_prompts(8), make_policy()
    trained.save_adapter(tmp_path / "start")
    start = make_policy(policy={"adapter": str(tmp_path / "start")}, stirred=False)

    sample = answer(start, batch)
    pair = (batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask)
    to_reference = (sample.logprobs - start.ref_logprobs(*pair))[sample.response_mask]
    # The trained policy's own reference is the base, for it had no adapter to start from.
    to_base = (sample.logprobs - trained.ref_logprobs(*pair))[sample.response_mask]

    assert to_reference.abs().max() < 1e-4
    assert to_base.abs().max() > 0.5


def test_the_reference_stays_put_while_the_starting_adapter_is_trained(
    make_policy, make_prompts, tmp_path
):
    batch = make_prompts(8)
    make_policy().save_adapter(tmp_path / "start")
    policy = make_policy(policy={"adapter": str(tmp_path / "start")}, stirred=False)
    sample = answer(policy, batch)
    pair = (batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask)
    before = policy.ref_logprobs(*pair)

    with torch.no_grad():
        for weight in policy.trainable().values():
            weight += 0.3

    assert not any("reference" in name for name in policy.trainable())
    assert torch.equal(policy.ref_logprobs(*pair), before)
    assert not torch.allclose(read(policy, batch, sample).logprobs, before, atol=0.1)


def test_new_lora_weights_depend_on_the_seed_alone(make_policy):
    torch.manual_seed(1)
    one = make_policy(seed=3, stirred=False).trainable()
    torch.manual_seed(2)
    torch.rand(5)
    two, other = (make_policy(seed=seed, stirred=False).trainable() for seed in (3, 4))

    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---- a frozen encoder --------------------------------------------------------------------------


def test_a_frozen_encoder_has_no_adapter_and_encodes_once_for_every_pass(make_policy, make_prompts):
    policy, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(8)

    sample = answer(policy, batch)

    assert policy.frozen_encoder
    assert not any(".encoder." in name for name in policy.trainable())
    assert sample.encoder_states is not None
    again, reused = (read(policy, batch, sample, s) for s in (None, sample.encoder_states))
    assert torch.equal(again.logprobs, reused.logprobs)
    assert_close(sample.logprobs, reused.logprobs, atol=2e-5, rtol=1e-4)
    pair = (batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask)
    assert torch.equal(
        policy.ref_logprobs(*pair), policy.ref_logprobs(*pair, sample.encoder_states)
    )


def test_a_frozen_encoder_gives_the_decoder_the_same_gradient_from_kept_states(
    make_policy, make_prompts
):
    policy, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(8)
    sample = answer(policy, batch)
    pair = (batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask)

    gradients = []
    for states in (None, sample.encoder_states):
        policy.zero_grad()
        policy.score_tokens(*pair, states).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in list(policy.trainable().values())[:-2]])

    for fresh, kept in zip(*gradients, strict=True):
        assert_close(fresh, kept)
        assert fresh.any()


def test_an_encoder_with_an_adapter_is_encoded_anew_and_gets_a_gradient(make_policy, make_prompts):
    policy, batch = make_policy(), make_prompts(4)
    sample = answer(policy, batch)

    policy.score_tokens(
        batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask
    ).logprobs.sum().backward()

    assert sample.encoder_states is None
    encoder = [p for name, p in policy.trainable().items() if ".encoder." in name]
    assert encoder
    assert all(p.grad.any() for p in encoder)


def test_a_starting_adapter_on_the_decoder_alone_makes_the_encoder_frozen(make_policy, tmp_path):
    make_policy(policy={"frozen_encoder": True}).save_adapter(tmp_path)

    policy = make_policy(policy={"adapter": str(tmp_path)}, stirred=False)

    assert policy.frozen_encoder


# ---- eval, dropout, arithmetic -----------------------------------------------------------------


def test_the_policy_stays_in_eval_and_dropout_in_the_configs_has_no_effect(
    make_policy, make_prompts
):
    policy, batch = make_policy(policy={"lora_dropout": 0.9}), make_prompts(8)
    assert policy.model.config.dropout_rate > 0
    sample = answer(policy, batch)
    plain = make_policy()

    once = policy.score_tokens(
        batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask
    )
    once.logprobs.sum().backward()
    twice = read(policy, batch, sample)

    assert not any(module.training for module in policy.modules())
    assert torch.equal(once.logprobs, twice.logprobs)
    assert torch.equal(twice.logprobs, read(plain, batch, sample).logprobs)


def test_a_bfloat16_policy_samples_trains_and_keeps_its_adapter_in_float32(
    make_policy, make_prompts
):
    policy, batch = make_policy(policy={"dtype": "bfloat16"}), make_prompts(8)

    sample = answer(policy, batch)
    scores = policy.score_tokens(
        batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask
    )
    (scores.logprobs.sum() + scores.values.sum()).backward()

    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    assert scores.logprobs.dtype == scores.values.dtype == sample.logprobs.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in policy.trainable().values())
    gap = (scores.logprobs - sample.logprobs)[sample.response_mask].abs()
    assert gap.mean() < 0.05
    reference = make_policy().score_tokens(
        batch.query_ids, batch.query_mask, sample.response_ids, sample.response_mask
    )
    assert (reference.logprobs - scores.logprobs)[sample.response_mask].abs().mean() < 0.2


def test_auto_means_float32_on_a_cpu():
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_the_adapter_is_what_the_config_asks_for():
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


def test_an_adapter_trained_from_another_is_saved_whole(
    make_policy, make_prompts, tiny_t5, tmp_path
):
    make_policy().save_adapter(tmp_path / "start")
    policy = make_policy(policy={"adapter": str(tmp_path / "start")}, seed=1)

    policy.save_adapter(tmp_path / "end")

    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "end")).eval()
    batch = make_prompts(6)
    assert torch.equal(logits(plain, batch), logits(policy.model, batch))


def test_an_adapter_and_a_value_head_survive_the_disk(make_policy, tmp_path):
    policy, other = make_policy(), make_policy(seed=1, stirred=False)

    policy.save_adapter(tmp_path / "adapter")
    policy.save_value_head(tmp_path / "value_head.safetensors")
    other.load_adapter(tmp_path / "adapter")
    other.load_value_head(tmp_path / "value_head.safetensors")

    weights, read_back = policy.trainable(), other.trainable()
    assert weights.keys() == read_back.keys()
    assert all(torch.equal(weights[name], read_back[name]) for name in weights)


def test_an_adapter_of_another_shape_is_refused(make_policy, tmp_path):
    make_policy(policy={"lora_targets": ("q",)}).save_adapter(tmp_path)

    with pytest.raises(ValueError, match="of another shape than the policy's"):
        make_policy().load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_exported_model_needs_no_peft_and_is_not_tied(
    make_policy, make_prompts, tiny_t5, tmp_path
):
    policy, batch = make_policy(), make_prompts(6)
    policy.save_adapter(tmp_path / "adapter")

    export_model(PolicyConfig(model=str(tiny_t5)), tmp_path / "adapter", tmp_path / "out")

    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    expected = logits(policy.model, batch)
    # Merging rounds the weights, and what that does to a logit goes by the size of them all.
    rounding = 1e-5 * expected.abs().max().item()
    assert_close(logits(plain, batch), expected, atol=rounding, rtol=0)
    with policy.as_reference():
        assert (logits(policy.model, batch) - expected).abs().max() > 1000 * rounding
    assert plain.lm_head.weight is not plain.shared.weight
    assert not torch.equal(plain.lm_head.weight, plain.shared.weight)
    # Version 4 of transformers reads this key, and would tie the head where it is true.
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ba be").input_ids == [3, 4, 1]


def test_a_model_that_is_not_there_is_named_with_what_to_give_instead(tmp_path):
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
def test_other_encoder_decoders_score_their_samples_as_they_drew_them(
    kind, settings, targets, frozen_encoder
):
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **settings))
    config = PolicyConfig(lora_rank=4, lora_targets=targets, frozen_encoder=frozen_encoder)
    model = get_peft_model(base, lora_config(config))
    policy = Policy(model, SamplingConfig(max_new_tokens=12), frozen_encoder)
    for parameter in policy.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    query_mask = torch.arange(9) < torch.tensor([9, 4, 7, 3])[:, None]
    query_ids = torch.where(query_mask, torch.randint(5, 90, (4, 9)), policy.pad_id)

    drawn = policy.sample(query_ids, query_mask, torch.tensor([12, 3, 12, 1]), torch.rand(4, 12))
    response = drawn.response_ids, drawn.response_mask, drawn.encoder_states
    with torch.no_grad():
        scored = policy.score_tokens(query_ids, query_mask, *response)
    reference = policy.ref_logprobs(query_ids, query_mask, *response)

    assert_close(scored.logprobs, drawn.logprobs, atol=1e-5, rtol=0)
    assert_close(scored.values, drawn.values, atol=1e-5, rtol=0)
    assert (reference - drawn.logprobs).abs().max() > 1e-3
    assert (drawn.encoder_states is not None) == frozen_encoder
