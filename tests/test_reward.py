"""The reward: the label looked up by name, long texts truncated, reward functions of TRL's protocol."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
)

from ray_detox.config import ConfigError, RewardConfig, RewardTerm
from ray_detox.models.classifier import Classifier, label_index, label_names, longest_input
from ray_detox.records import ScoreRequest
from ray_detox.rewards.functions import load_reward_function
from ray_detox.rewards.reward import Reward

TEXTS = ["you are kind", "you fool", "", "what a long and winding text this is, my friend", "ü?"]


def classifier(folder, **changes):
    return Classifier(RewardConfig(model=str(folder), **changes))


def call(reward, responses, prompts=None, columns=None):
    prompts = ["a prompt: "] * len(responses) if prompts is None else prompts
    return reward(ScoreRequest(prompts, responses, [[5, 1]] * len(responses), columns or {}))


# ---- reward functions that the tests name in settings ---------------------------------------------


def shorter_is_better(completions, **_):
    return [-float(len(text)) for text in completions]


def one_too_few(completions, **_):
    return [0.0] * (len(completions) - 1)


def not_a_number(completions, **_):
    return [float("nan")] * len(completions)


def sometimes_not_applicable(completions, **_):
    return [None if text == "" else 1.0 for text in completions]


def scaled(factor):
    return lambda completions, **_: [factor * len(text) for text in completions]


def recording(prompts, completions, completion_ids, summary, **rest):
    recording.seen = {"prompts": prompts, "completions": completions}
    recording.seen |= {"completion_ids": completion_ids, "summary": summary, "rest": rest}
    return [0.0] * len(completions)


NOT_A_FUNCTION = 3


def path_of(name):
    return f"{__name__}.{name}"


# ---- the label ---------------------------------------------------------------------------------


def test_the_score_is_the_raw_logit_of_the_named_label(tiny_roberta):
    tokenizer = AutoTokenizer.from_pretrained(tiny_roberta)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_roberta).eval()

    logits, toxicity, truncated = classifier(tiny_roberta)(TEXTS)

    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert logits[row] == pytest.approx(float(expected[0]), abs=1e-5)
        assert toxicity[row] == pytest.approx(float(expected.softmax(0)[1]), abs=1e-5)
    assert not truncated.any()
    assert logits.dtype == toxicity.dtype == np.float32


def test_permuted_labels_give_the_same_scores(tiny_roberta, make_roberta):
    permuted = make_roberta(("hate", "nothate"))

    scores, others = (classifier(folder)(TEXTS) for folder in (tiny_roberta, permuted))

    assert classifier(tiny_roberta).label == 0
    assert classifier(permuted).label == 1
    for one, other in zip(scores, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_score_is_that_of_the_label_even_if_the_other_logit_is_larger(tiny_roberta):
    hate = classifier(tiny_roberta, label="hate")(TEXTS)[0]
    nothate = classifier(tiny_roberta)(TEXTS)[0]

    assert (hate > nothate).any(), "a score that took the larger logit would differ here"
    np.testing.assert_array_less(0, np.abs(hate - nothate))


def test_the_case_of_a_label_does_not_matter(make_roberta):
    upper_case = make_roberta(("nothate", "hate"), names={0: "NOTHATE", 1: "HATE"})

    assert classifier(upper_case).label == 0


def test_an_unknown_label_is_an_error_that_lists_the_labels(make_roberta):
    unnamed = make_roberta(("nothate", "hate"), names={0: "LABEL_0", 1: "LABEL_1"})

    with pytest.raises(ConfigError, match=r"has no label 'nothate'; its labels are 'LABEL_0', "):
        classifier(unnamed)


def test_an_ambiguous_label_is_an_error():
    labels = {"id2label": {"0": "nothate", "1": "NotHate"}}

    with pytest.raises(ConfigError, match=r"clf has more than one label 'NOTHATE'; its labels are"):
        label_index(labels, "NOTHATE", "clf")
    with pytest.raises(ConfigError, match=r"clf has more than one label 'same'; its labels are"):
        label_index({"id2label": {"0": "same", "1": "same"}}, "same", "clf")
    assert label_index(labels, "nothate", "clf") == 0
    assert label_index(labels, "NotHate", "clf") == 1


def test_a_classifier_without_labels_has_those_of_autoconfig(tmp_path):
    for settings in ({}, {"num_labels": 3}, {"id2label": {"0": "x", "1": "y"}}):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"} | settings))

        assert label_names(settings, "clf") == AutoConfig.from_pretrained(tmp_path).id2label

    assert label_index({}, "label_1", "clf") == 1
    with pytest.raises(
        ConfigError, match=r"its labels are 'LABEL_0', 'LABEL_1'\. Set reward\.label"
    ):
        label_index({}, "nothate", "clf")


# ---- batches and lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_neither_batch_size_nor_padding_changes_a_score(tiny_roberta, batch_size):
    texts = [text * repeat for text in TEXTS for repeat in (1, 7, 2)]
    alone = [classifier(tiny_roberta)([text])[0][0] for text in texts]

    logits, *_ = classifier(tiny_roberta, batch_size=batch_size)(texts)

    np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_a_text_longer_than_the_classifier_reads_is_truncated_and_marked(tiny_roberta):
    # One token per byte and two special tokens: 510 bytes fill 512 positions.
    fits, too_long = "x" * 510, "x" * 511

    logits, _, truncated = classifier(tiny_roberta)([fits, too_long, "x" * 3000])

    assert truncated.tolist() == [False, True, True]
    assert logits[1] == pytest.approx(logits[0], abs=1e-5)
    assert logits[2] == pytest.approx(logits[0], abs=1e-5)


def test_max_tokens_lowers_the_limit_and_never_raises_it(tiny_roberta):
    low, high = (classifier(tiny_roberta, max_tokens=n) for n in (8, 9999))

    assert low.max_tokens == 8
    assert high.max_tokens == 512
    assert low(["x" * 6, "x" * 7])[2].tolist() == [False, True]


TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RobertaConfig(**TINY, max_position_embeddings=514, pad_token_id=1), 512),
        (BertConfig(**TINY, max_position_embeddings=512, pad_token_id=0), 512),
        (GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=40), 40),
        (DebertaConfig(**TINY, position_biased_input=False, relative_attention=True), 512),
        (T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1), 512),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_longest_input_is_the_number_of_usable_positions(settings, expected):
    class Tokenizer:
        model_max_length = int(1e30)  # transformers' value if a tokenizer does not know its limit

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)

    assert longest_input(Tokenizer(), model) == expected
    Tokenizer.model_max_length = 7
    assert longest_input(Tokenizer(), model) == 7


# ---- inputs ------------------------------------------------------------------------------------


def test_the_classifier_reads_the_response_alone_or_with_its_prompt(tiny_roberta):
    alone = Reward(RewardConfig(model=str(tiny_roberta)))
    both = Reward(RewardConfig(model=str(tiny_roberta), input="prompt+response"))

    assert call(alone, ["yes"], ["one"]).logits == call(alone, ["yes"], ["two"]).logits
    assert call(both, ["yes"], ["one"]).logits != call(both, ["yes"], ["two"]).logits
    assert call(both, ["yes"], ["one"]).logits == pytest.approx(alone.classifier(["oneyes"])[0])


def test_without_terms_the_reward_is_the_logit(tiny_roberta):
    reward = Reward(RewardConfig(model=str(tiny_roberta)))

    scores = call(reward, TEXTS)

    np.testing.assert_array_equal(scores.rewards, scores.logits)
    assert scores.terms == {}
    now = reward.submit(ScoreRequest(["p"] * 5, TEXTS, [[1]] * 5, {})).result()
    np.testing.assert_array_equal(now.rewards, scores.rewards)


# ---- extra terms -------------------------------------------------------------------------------


def with_term(folder, name, **rest):
    path = name if "." in name else path_of(name)
    return Reward(RewardConfig(model=str(folder), terms=(RewardTerm(function=path, **rest),)))


def test_a_term_is_weighted_added_and_kept_by_name(tiny_roberta):
    scores = call(with_term(tiny_roberta, "shorter_is_better", weight=0.5), TEXTS)

    lengths = np.array([len(text) for text in TEXTS], dtype=np.float32)
    np.testing.assert_allclose(scores.rewards, scores.logits - 0.5 * lengths, rtol=1e-6)
    np.testing.assert_array_equal(scores.terms["shorter_is_better"], -lengths)


def test_a_reward_function_of_trl_works_unchanged(tiny_roberta):
    reward = with_term(
        tiny_roberta,
        "trl.rewards.get_repetition_penalty_reward",
        weight=2.0,
        arguments={"ngram_size": 2, "max_penalty": -1.0},
    )

    # The penalty counts pairs of token ids: all of 3 are distinct; then 1 of 4, so 1/4 - 1.
    scores = reward(ScoreRequest(["p", "q"], ["one", "two"], [[1, 2, 3, 4], [5, 5, 5, 5, 5]], {}))

    penalties = scores.terms["get_repetition_penalty_reward"]
    assert penalties.tolist() == [0.0, -0.75]
    np.testing.assert_allclose(scores.rewards, scores.logits + 2 * penalties, rtol=1e-6)


def test_a_term_with_arguments_is_a_factory_called_with_them(tiny_roberta):
    scores = call(with_term(tiny_roberta, "scaled", arguments={"factor": 3}), ["abcd"])

    assert scores.terms["scaled"].tolist() == [12.0]


def test_a_term_gets_the_keywords_of_trls_trainers(tiny_roberta):
    reward = with_term(tiny_roberta, "recording")

    columns = {"summary": ["s", "t"], "topic": ["u", "v"]}
    reward(ScoreRequest(["p", "q"], ["a", "b"], [[3, 1], [4, 1]], columns))

    assert recording.seen == {
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "completion_ids": [[3, 1], [4, 1]],
        "summary": ["s", "t"],
        "rest": {"topic": ["u", "v"]},
    }


def test_none_from_a_term_adds_nothing_to_that_sample(tiny_roberta):
    scores = call(with_term(tiny_roberta, "sometimes_not_applicable"), ["", "x"])

    assert scores.terms["sometimes_not_applicable"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["one_too_few", "not_a_number"])
def test_a_term_without_one_finite_number_per_response_is_named(tiny_roberta, name):
    with pytest.raises(
        ValueError, match=rf"The reward term {name} returned \d values for 5 responses"
    ):
        call(with_term(tiny_roberta, name), TEXTS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".name", r"\.name cannot be imported"),
        ("..name", r"\.\.name cannot be imported"),
        ("no.such.module", r"no\.such\.module cannot be imported"),
        ("trl.rewards.no_such_function", r"trl\.rewards\.no_such_function cannot be imported"),
        (path_of("NOT_A_FUNCTION"), r"NOT_A_FUNCTION is not a function"),
    ],
)
def test_a_term_that_cannot_be_imported_is_named(path, message):
    with pytest.raises(ConfigError, match=message):
        load_reward_function(RewardTerm(function=path))


def test_arguments_that_a_term_refuses_are_named():
    term = RewardTerm(function=path_of("scaled"), arguments={"facto": 3})

    with pytest.raises(ConfigError, match=r"scaled refuses its arguments \{'facto': 3\}: .*facto"):
        load_reward_function(term)
