"""Recipes, overrides and the one-line errors for settings that are not valid."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_detox.config import (
    RENAMED,
    RESERVED_TERM_NAMES,
    ConfigError,
    DataConfig,
    PPOConfig,
    RewardTerm,
    RunConfig,
    Section,
)
from ray_detox.evaluation.examples import EvaluatedResponse
from ray_detox.evaluation.metrics import RATINGS
from ray_detox.recipes.loading import config_from_dict, load_config, recipe_names, split_words
from ray_detox.rl.ppo import next_kl_coef

SECTIONS = [
    field.annotation
    for field in RunConfig.model_fields.values()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
]


def refused(*overrides, recipe="lab"):
    """Return the error message for settings that are not valid."""
    with pytest.raises(ConfigError) as error:
        load_config(recipe, overrides)
    return str(error.value)


# ---- recipes and overrides ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lab", "flan-t5-base", "seed"])
def test_a_packaged_recipe_loads_and_has_a_description(name):
    config = load_config(name)

    assert config.recipe == name
    assert config.description.endswith(".")
    assert name in recipe_names()


def test_every_packaged_recipe_loads():
    for name in recipe_names():
        assert load_config(name).recipe == name


def test_the_seed_recipe_holds_the_published_settings():
    config = load_config("seed")

    assert config.ppo.learning_rate == 1.41e-5
    assert (config.ppo.prompts_per_step, config.ppo.minibatch_size, config.ppo.epochs) == (16, 4, 1)
    assert config.sampling.max_new_tokens == "100..399"
    assert (config.sampling.lowest_limit, config.sampling.highest_limit) == (100, 399)
    assert (config.train.steps, config.ppo.kl_controller) == (10, "adaptive")
    assert (config.reward.label, config.reward.input) == ("nothate", "prompt+response")
    assert (config.data.held_out_rows, config.data.held_out_fraction) == ("last", 0.2)
    # TRL's critic, whose loss trains the policy as well.
    assert (config.ppo.critic, config.ppo.value_coef, config.ppo.value_clip_range) == (
        "shared",
        0.1,
        0.2,
    )
    assert (config.ppo.gamma, config.ppo.gae_lambda) == (1.0, 0.95)


def test_a_recipe_of_ones_own_is_read_by_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 3\nppo:\n  kl_coef: 0.3\n")

    config = load_config(str(tmp_path / "mine.yaml"), ["ppo.clip_range=0.1"])

    assert config.recipe == "mine"
    assert (config.seed, config.ppo.kl_coef, config.ppo.clip_range) == (3, 0.3, 0.1)
    assert config.ppo.epochs == PPOConfig().epochs


def test_an_empty_recipe_is_the_default_run(tmp_path):
    (tmp_path / "empty.yaml").write_text("")

    config = load_config(str(tmp_path / "empty.yaml"))

    assert config.replace(recipe="lab") == RunConfig()


def test_later_overrides_win():
    assert load_config("lab", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("ppo.learning_rate=1e-3", "ppo", "learning_rate", 0.001),  # YAML 1.1 reads text here
        ("ppo.kl_coef=1", "ppo", "kl_coef", 1.0),
        ("policy.lora_targets=[q, k, v]", "policy", "lora_targets", ("q", "k", "v")),
        ("data.summary_column=null", "data", "summary_column", None),
        ("data.limit=10", "data", "limit", 10),
        ("train.storage=s3://bucket/a=b", "train", "storage", "s3://bucket/a=b"),
        ("policy.frozen_encoder=true", "policy", "frozen_encoder", True),
    ],
)
def test_an_override_is_read_as_yaml(override, section, name, value):
    found = getattr(getattr(load_config("lab", [override]), section), name)

    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "translate: {dialogue}",
        "{dialogue} In short:",
        "- {dialogue}",
        "@reader `{dialogue}` = %?",
        '"{dialogue}"',
        "'{dialogue}' # twice: '{dialogue}'",
        "  {dialogue} ",
        "[INST] {dialogue} [/INST]",
        "!important {dialogue} & *more*",
        "概括：{dialogue}\n\ttl;dr",
    ],
)
def test_a_text_setting_takes_the_text_as_it_is(text):
    assert load_config("lab", [f"data.template={text}"]).data.template == text


@pytest.mark.parametrize(
    "text",
    ["no", "null", "~", "true", "0123", "1e5", "2024-02-30", "0x1f", "12:30:00", ".inf", "a=b=c", "k: v"],
)  # fmt: skip
def test_words_that_yaml_reads_as_something_else_are_text_where_text_is_set(text):
    config = load_config("lab", [f"data.dialogue_column={text}", f"reward.toxic_label={text}x"])

    assert config.data.dialogue_column == text
    assert config.reward.toxic_label == f"{text}x"


@pytest.mark.parametrize("nothing", ["null", ""])
def test_a_text_setting_that_may_be_left_out_is_left_out_by_null_or_nothing(nothing):
    config = load_config("lab", [f"data.summary_column={nothing}", f"policy.revision={nothing}"])

    assert config.data.summary_column is None
    assert config.policy.revision is None


@pytest.mark.parametrize(
    "name",
    ["my run.v2.yaml", "lr=0.1 kl=2.yaml", "рецепт.yml", "要約.YAML", "a#b & c.yaml", "~.yaml"],
)
def test_a_recipe_may_have_any_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("seed: 5")

    recipe, settings = split_words([name, "train.steps=7"])
    config = load_config(recipe, settings)

    assert (config.seed, config.train.steps, config.recipe) == (5, 7, Path(name).stem)


def test_reward_terms_are_read_from_a_list():
    override = (
        "reward.terms=[{function: trl.rewards.get_repetition_penalty_reward, weight: 2,"
        " arguments: {ngram_size: 3, max_penalty: -1.0}}]"
    )

    (term,) = load_config("lab", [override]).reward.terms

    assert term.name == "get_repetition_penalty_reward"
    assert term.weight == 2.0
    assert term.arguments == {"ngram_size": 3, "max_penalty": -1.0}


# ---- what is unknown ---------------------------------------------------------------------------


def test_an_unknown_recipe_is_refused_with_the_nearest_or_all():
    assert "Unknown recipe 'labb'; did you mean 'lab'?" in refused(recipe="labb")
    sentence = refused(recipe="xyzzy")
    assert all(name in sentence for name in ("flan-t5-base", "lab", "seed", ".yaml"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.kl_coeff=1", "Unknown setting 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?"),
        ("kl_coef=1", "Unknown setting 'kl_coef'; did you mean 'ppo.kl_coef'?"),
        ("train.learning_rate=1", "did you mean 'ppo.learning_rate'?"),
        ("pppo.epochs=1", "Unknown setting 'pppo'; did you mean 'ppo'?"),
        ("ppo.xyzzy=1", "known in ppo: prompts_per_step, epochs, "),
        ("xyzzy=1", "known here: recipe, description, seed, data, "),
        ("sampling.tok_k=0", "Unknown setting 'sampling.tok_k'"),
        ("reward.terms=[{functoin: a.b}]", "did you mean 'reward.terms[0].function'?"),
        ("=1", "Unknown setting ''"),
    ],
)
def test_an_unknown_setting_is_refused_with_where_it_may_belong(override, sentence):
    assert sentence in refused(override)


def test_an_override_without_a_value_is_refused_with_how_to_write_it():
    assert refused("seed") == "Override 'seed' has no '='. Write it as section.name=value."


def test_an_override_that_is_no_yaml_is_refused():
    assert refused("seed=[") == "Override 'seed=[': the value is not valid YAML."


def test_an_override_into_a_value_is_refused():
    assert "'seed' is a value and not a section" in refused("seed=1", "seed.more=1")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ppo: [", "is not valid YAML"),
        ("- 1\n- 2\n", "holds a list; expected sections of settings"),
    ],
)
def test_a_recipe_that_is_no_tree_of_settings_is_refused(tmp_path, text, sentence):
    (tmp_path / "bad.yaml").write_text(text)

    assert sentence in refused(recipe=str(tmp_path / "bad.yaml"))


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xfa")

    assert "is not valid YAML" in refused(recipe=str(tmp_path / "bad.yaml"))


# ---- wrong types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=one", "seed is 'one'; expected a whole number."),
        ("seed=1.5", "seed is 1.5; expected a whole number."),
        ("seed=true", "seed is True; expected a whole number."),
        ("seed=null", "seed is None; expected a whole number."),
        ("ppo.kl_coef=much", "ppo.kl_coef is 'much'; expected a number."),
        ("ppo.kl_coef=.nan", "ppo.kl_coef is nan; expected a number."),
        ("ppo.kl_coef=inf", "ppo.kl_coef is inf; expected a number."),
        ("ppo.kl_coef=false", "ppo.kl_coef is False; expected a number."),
        ("policy.frozen_encoder=1", "policy.frozen_encoder is 1; expected true or false."),
        ("results.table=", "results.table is empty; name the DynamoDB table."),
        ("data.split=", "data.split is empty; give a value."),
        ("policy.lora_targets=q", "policy.lora_targets is 'q'; expected a list, such as [a, b]."),
        ("policy.lora_targets=[1]", "policy.lora_targets[0] is 1; expected text."),
        ("ppo=3", "ppo is 3; expected a section, such as ppo.key=value."),
        ("reward.terms=[a.b]", "reward.terms[0] is 'a.b'; expected a section"),
        ("reward.terms=[{weight: 1}]", "reward.terms[0] is incomplete"),
        (
            "reward.terms=[{function: a.b, arguments: 3}]",
            "reward.terms[0].arguments is 3; expected names with values.",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_was_expected(override, sentence):
    assert sentence in refused(override)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.kl_coef=2020-13-45", "the value is not valid YAML."),
        ("policy.lora_targets=!!set {q, v}", "expected a list, such as [a, b]."),
        ("ppo={1: 2}", "Unknown setting 'ppo.1'; known in ppo: "),
        ("data.path=\ud800", "data.path is '\\ud800'; expected text."),
        ("data.revision=\ud800", "data.revision is '\\ud800'; expected text."),
        ("results.endpoint_url=\ud800", "results.endpoint_url is '\\ud800'; expected text."),
        ('policy.lora_targets=["\\ud800"]', "policy.lora_targets is ['\\ud800']; expected text."),
        ("seed=-1", "seed is -1; expected a value from 0 to 9223372036854775807."),
        ("ppo.clip_range=2", "expected a value above 0 and at most 1."),
        ("data.held_out_fraction=1", "expected a value between 0 and 1."),
        ("reward.terms=[{function: a.b, arguments: {day: 2020-01-02}}]", "expected JSON values"),
        ("reward.terms=[{function: a.b, arguments: {x: {2: 3}}}]", "expected JSON values"),
        (
            "ppo.prompts_per_step=99999999999999999999999999",
            "Use a multiple, such as 99999999999999999999999998.",
        ),
    ],
)
def test_unusual_yaml_values_are_refused_in_one_sentence(override, sentence):
    message = refused(override)

    assert sentence in message
    assert "\n" not in message


def test_arguments_of_a_reward_term_are_stored_unchanged():
    override = "reward.terms=[{function: a.b, arguments: {x: .inf, y: [1, {z: null}]}}]"
    config = load_config("lab", [override])

    stored = json.loads(json.dumps(config.to_dict()))

    assert stored["reward"]["terms"][0]["arguments"] == {"x": math.inf, "y": [1, {"z": None}]}
    assert config_from_dict(stored) == config


def test_overrides_in_one_text_are_refused():
    with pytest.raises(ConfigError, match=r"expected a list of settings, such as \['seed=1'\]"):
        load_config("lab", "seed=1")


# ---- values that cannot work -------------------------------------------------------------------

BAD_VALUES = [
    ("seed", -1),
    ("data.path", ""),
    ("data.template", "no place"),
    ("data.min_chars", -1),
    ("data.max_chars", 200),
    ("data.max_prompt_tokens", 0),
    ("data.held_out_fraction", 0),
    ("data.held_out_fraction", 1.0),
    ("data.held_out_rows", "first"),
    ("data.limit", 1),
    ("data.shards", 0),
    ("policy.model", ""),
    ("policy.dtype", "float16"),
    ("policy.lora_rank", 0),
    ("policy.lora_alpha", 0),
    ("policy.lora_dropout", 1),
    ("policy.lora_targets", []),
    ("sampling.temperature", 0),
    ("sampling.max_new_tokens", 0),
    ("sampling.max_new_tokens", "48..47"),
    ("sampling.max_new_tokens", "many"),
    ("sampling.min_new_tokens", 48),
    ("sampling.min_new_tokens", -1),
    ("sampling.batch_size", 0),
    ("reward.model", ""),
    ("reward.input", "prompt"),
    ("reward.batch_size", 0),
    ("reward.max_tokens", 7),
    ("reward.actors", 0),
    ("serving.cpus_per_actor", -1),
    ("serving.gpus_per_actor", -0.5),
    ("serving.timeout_s", 0),
    ("ppo.prompts_per_step", 0),
    ("ppo.prompts_per_step", 65),
    ("ppo.minibatches", 0),
    ("ppo.minibatches", 3),
    ("ppo.epochs", 0),
    ("ppo.micro_batch_size", 0),
    ("ppo.learning_rate", -0.1),
    ("ppo.max_grad_norm", 0),
    ("ppo.clip_range", 0),
    ("ppo.clip_range", 1.5),
    ("ppo.critic", "wise"),
    ("ppo.critic_learning_rate", 0),
    ("ppo.value_clip_range", -1),
    ("ppo.value_coef", -1),
    ("ppo.kl_coef", -0.1),
    ("ppo.adaptive_kl_coef_min", -0.1),
    ("ppo.kl_in", "nowhere"),
    ("ppo.kl_controller", "wise"),
    ("ppo.adaptive_kl_target", 0),
    ("ppo.adaptive_kl_horizon", 0),
    ("ppo.target_kl", 0),
    ("ppo.gamma", 1.1),
    ("ppo.gae_lambda", -0.1),
    ("ppo.max_kl", 0),
    ("ppo.unfinished_penalty", -1),
    ("train.probe_prompts", -1),
    ("train.probe_every", 0),
    ("train.steps", 0),
    ("train.workers", 0),
    ("train.workers", 17),
    ("train.workers", "4..2"),
    ("train.workers", "0..2"),
    ("reward.actors", "many"),
    ("serving.heartbeat_timeout_s", 0),
    ("cluster.cpus_per_worker", 0),
    ("cluster.gpus_per_worker", -1),
    ("train.checkpoint_every", 0),
    ("train.checkpoints_kept", 0),
    ("train.unsaved_warning_s", 0),
    ("train.max_unsaved_s", 0),
    ("cluster.max_failures", -1),
    ("evaluate.prompts", 1),
    ("evaluate.batch_size", 0),
    ("evaluate.shards", 0),
    ("evaluate.toxicity_threshold", 1.5),
    ("evaluate.max_rouge_l_drop", -1),
    ("evaluate.max_facts_drop", -1),
    ("evaluate.max_length_change", -1),
    ("evaluate.max_kl", -1),
    ("results.store", "postgres"),
    ("results.table", ""),
    ("cluster.address", ""),
    ("cluster.capacity_timeout_s", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_that_cannot_work_is_refused_in_a_sentence_with_its_name_and_itself(name, value):
    section, _, key = name.rpartition(".")
    tree = {section: {key: value}} if section else {key: value}

    with pytest.raises(ConfigError) as error:
        config_from_dict(tree)

    sentence = str(error.value)
    assert name in sentence
    assert ("is empty" if value in ("", []) else str(value)) in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["ppo.prompts_per_step=66", "ppo.minibatches=4", "data.shards=2"],
            "ppo.prompts_per_step (66) does not divide into ppo.minibatches (4). "
            "Use a multiple, such as 64.",
        ),
        (
            ["train.workers=2..17"],
            "train.workers (2..17) is more than data.shards (16), and each worker holds at least one "
            "shard. Ask for fewer workers, or raise data.shards.",
        ),
        (
            ["ppo.prompts_per_step=24"],
            "ppo.prompts_per_step (24) is not a multiple of data.shards (16), so workers would get "
            "unequal shares. Set data.shards to a divisor of 24.",
        ),
        (
            ["sampling.max_new_tokens=50..48"],
            "sampling.max_new_tokens is '50..48'; expected a whole number of at least 1, or a range",
        ),
        (
            ["sampling.min_new_tokens=20", "sampling.max_new_tokens=20..30"],
            "sampling.min_new_tokens is 20; expected less than sampling.max_new_tokens (20..30).",
        ),
        (
            ["data.max_chars=100"],
            "data.max_chars (100) leaves no length above data.min_chars (200)",
        ),
        (
            ["ppo.kl_estimator=k3"],
            "Unknown setting 'ppo.kl_estimator'; did you mean 'ppo.kl_in'?",
        ),
        (
            ["ppo.kl_controller=adaptive", "ppo.adaptive_kl_horizon=12"],
            "ppo.adaptive_kl_horizon is 12; expected more than a fifth of ppo.prompts_per_step (64), "
            "or one step could take the KL coefficient to zero or below. Use at least 640.",
        ),
        (
            ["ppo.kl_controller=adaptive", "ppo.kl_coef=0.1", "ppo.adaptive_kl_coef_min=0.2"],
            "ppo.adaptive_kl_coef_min is 0.2; expected at most ppo.kl_coef (0.1), with which",
        ),
        (
            ["ppo.bootstrap_unfinished=true"],
            "ppo.bootstrap_unfinished is true with ppo.critic=none; expected a critic, whose value takes "
            "the place of the score. Set ppo.critic=detached, or ppo.bootstrap_unfinished=false.",
        ),
        (
            ["ppo.adaptive_kl_coef_min=0.01"],
            "ppo.adaptive_kl_coef_min is 0.01 with ppo.kl_controller=fixed; expected null, since "
            "only the adaptive controller uses it. Set ppo.adaptive_kl_coef_min=null, or "
            "ppo.kl_controller=adaptive.",
        ),
        (
            ["ppo.kl_controller=adaptive", "ppo.kl_coef=0"],
            "ppo.kl_coef is 0 with ppo.kl_controller=adaptive; expected a value above 0, since the "
            "controller multiplies it, and 0 stays 0. Set ppo.kl_coef=0.05, or "
            "ppo.kl_controller=fixed.",
        ),
        (
            ["reward.terms=[{function: a.f}, {function: b.f}]"],
            "reward.terms names f, f: two terms share a name. Set `name` of one of them.",
        ),
        (["reward.terms=[{function: f}]"], "'f' is not an import path; write module.function"),
    ],
)
def test_contradictory_values_are_refused_with_both_and_a_way_out(overrides, sentence):
    assert sentence in refused(*overrides)


def test_a_reward_term_cannot_have_the_name_of_a_field_of_the_results():
    fields = {field.name for field in dataclasses.fields(EvaluatedResponse)} - {"terms", "ratings"}

    assert fields | set(RATINGS) == RESERVED_TERM_NAMES
    for name in RESERVED_TERM_NAMES:
        sentence = refused(f"reward.terms=[{{function: mine.{name}}}]")
        assert f"names a function {name!r}" in sentence


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="weight is nan; expected a number"):
        RewardTerm(function="a.b", weight=float("nan"))


def test_a_config_error_is_a_value_error_so_that_libraries_may_treat_it_so():
    assert issubclass(ConfigError, ValueError)


def test_a_short_horizon_is_accepted_if_the_controller_is_fixed_or_slow_enough():
    assert load_config("lab", ["ppo.adaptive_kl_horizon=12"]).ppo.kl_controller == "fixed"
    shortest = load_config("lab", ["ppo.kl_controller=adaptive", "ppo.adaptive_kl_horizon=13"]).ppo
    assert next_kl_coef(0.2, 0.0, 6.0, shortest.adaptive_kl_horizon, responses=64) > 0


def test_the_adaptive_controller_never_goes_below_kl_coef_unless_asked():
    assert load_config("lab", ["ppo.kl_coef=0.3"]).ppo.kl_coef_min == 0.3
    assert load_config("flan-t5-base", []).ppo.kl_coef_min == 0.2
    assert load_config("seed", []).ppo.kl_coef_min == 0, "as in TRL"


# ---- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lab", "flan-t5-base", "seed"])
def test_a_run_survives_being_written_as_plain_values(name):
    override = "reward.terms=[{function: a.b, arguments: {x: [1, 2]}}]"
    config = load_config(name, [override])

    assert config_from_dict(config.to_dict()) == config


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(0, 1),
            "kl_coef": st.floats(0, 10),
            "gamma": st.floats(0, 1),
            "target_kl": st.none() | st.floats(1e-6, 10),
            "epochs": st.integers(1, 9),
            "kl_controller": st.sampled_from(["fixed", "adaptive"]),
        },
    ).filter(lambda ppo: ppo.get("kl_controller") != "adaptive" or ppo.get("kl_coef") != 0),
    st.integers(0, 2**63 - 1),
)
def test_any_settings_survive_being_written_as_plain_values(ppo, seed):
    config = config_from_dict({"ppo": ppo, "seed": seed})

    assert config_from_dict(config.to_dict()) == config


def test_a_run_cannot_be_changed_once_described():
    for section in (RunConfig, RewardTerm, *SECTIONS):
        assert section.model_config["frozen"]
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 1


def test_the_minibatch_size_follows_from_what_is_set():
    assert PPOConfig(prompts_per_step=64, minibatches=4).minibatch_size == 16


def test_every_setting_has_a_sentence_and_belongs_to_a_described_section():
    bare = [
        f"{section.__name__}.{name}"
        for section in (RunConfig, RewardTerm, *SECTIONS)
        for name, field in section.model_fields.items()
        if field.annotation not in SECTIONS and not (field.description or "").endswith(".")
    ]

    assert bare == []
    assert all((section.__doc__ or "").endswith(".") for section in SECTIONS)
    assert len(SECTIONS) == 10
    assert DataConfig in SECTIONS


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_is_refused_with_the_new_one(old, new):
    assert refused(f"{old}=1") == f"Unknown setting {old!r}; did you mean {new!r}?"
    section, _, name = new.partition(".")
    assert name in RunConfig.model_fields[section].annotation.model_fields


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("reward.cpus_per_actor", "serving.cpus_per_actor"),
        ("reward.batch_wait_ms", "serving.batch_wait_ms"),
        ("train.cpus_per_worker", "cluster.cpus_per_worker"),
        ("train.max_failures", "cluster.max_failures"),
    ],
)
def test_a_setting_that_moved_is_refused_with_its_section(old, new):
    assert refused(f"{old}=1") == f"Unknown setting {old!r}; did you mean {new!r}?"


def test_the_schema_for_editors_has_every_setting_with_its_description_and_range():
    schema = RunConfig.model_json_schema()

    for name in RunConfig.model_fields:
        assert name in schema["properties"]
    ppo = schema["$defs"]["PPOConfig"]
    assert ppo["properties"]["clip_range"]["exclusiveMinimum"] == 0
    assert ppo["properties"]["kl_in"]["enum"] == ["reward", "loss"]
    assert "KL coefficient" in ppo["properties"]["kl_coef"]["description"]
    assert ppo["additionalProperties"] is False
