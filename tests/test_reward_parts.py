"""Parts of the reward: heads of classifiers, their sum, functions, and the trial on sentences."""

import asyncio
import gc
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_detox import lab
from ray_detox.cli import main as cli
from ray_detox.config import ClassifierConfig, ConfigError, RewardConfig, RewardTerm
from ray_detox.models.classifier import Head, read_head
from ray_detox.records import ScoreRequest, Scores
from ray_detox.rewards.functions import load_reward_function
from ray_detox.rewards.reward import Reward
from ray_detox.rewards.sentences import (
    INSULTING,
    KIND,
    SampleRow,
    check_sentences,
    refuse_wrong_order,
)

TOXIC_BERT = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
ROW = SampleRow("Summarize this.", {"summary": "They talk.", "completions": "reserved"})


def roberta(folder, labels, outputs=None, **changes):
    """Save the embedded RoBERTa (0: nothate, 1: hate) with other labels, and choose its outputs."""
    shutil.copytree(lab.ROBERTA, folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
    settings["label2id"] = {label: i for i, label in enumerate(labels)}
    settings |= changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if outputs is not None:
        weights = load_file(folder / "model.safetensors")
        for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            weights[name] = weights[name][outputs].contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def score(folder, texts, **settings):
    scores = Reward(RewardConfig(model=str(folder), **settings))(request_of(texts))
    return scores.logits, scores.toxicity


def request_of(texts, **columns):
    count = len(texts)
    return ScoreRequest(
        ["p"] * count, list(texts), [[5, 1]] * count, {k: [v] * count for k, v in columns.items()}
    )


@pytest.fixture(scope="module")
def published():
    """Logit of nothate, logit of hate, and probability of hate for the trial's sentences."""
    classifier = Reward(RewardConfig()).classifier
    rows, _ = classifier.tokenize([*KIND, *INSULTING])
    with torch.inference_mode():
        logits = classifier._logits(rows)
    return logits[:, 0].numpy(), logits[:, 1].numpy(), logits.softmax(-1)[:, 1].numpy()


# ---- heads -------------------------------------------------------------------------------------


def test_either_label_of_two_gives_the_published_score(published):
    nothate, _, hate = published
    texts = [*KIND, *INSULTING]

    for settings in ({"label": "nothate"}, {"toxic_label": "hate"}):
        logits, toxicity = score(lab.ROBERTA, texts, **settings)
        np.testing.assert_allclose(logits, nothate, atol=1e-5)
        np.testing.assert_allclose(toxicity, hate, atol=1e-6)


def test_a_multi_label_head_has_a_sigmoid_per_label(tmp_path, published):
    _, hate, _ = published
    folder = roberta(
        tmp_path / "m",
        TOXIC_BERT,
        outputs=[1, 1, 0, 0, 1, 0],
        problem_type="multi_label_classification",
    )

    logits, toxicity = score(folder, [*KIND, *INSULTING], toxic_label="toxic")

    np.testing.assert_allclose(logits, -hate, atol=1e-5)
    np.testing.assert_allclose(toxicity, 1 / (1 + np.exp(-hate)), atol=1e-6)


@pytest.mark.parametrize(
    "output, settings, sign", [(1, {"toxic_label": "LABEL_0"}, -1), (0, {"label": "LABEL_0"}, 1)]
)
def test_a_head_with_one_output_has_a_sigmoid(tmp_path, published, output, settings, sign):
    own = published[output]
    folder = roberta(tmp_path / "m", ["LABEL_0"], outputs=[output], problem_type=None)

    logits, toxicity = score(folder, [*KIND, *INSULTING], **settings)

    np.testing.assert_allclose(logits, sign * own, atol=1e-5)
    np.testing.assert_allclose(toxicity, 1 / (1 + np.exp(sign * own)), atol=1e-6)
    assert toxicity.min() < 0.2
    assert toxicity.max() > 0.8


def test_the_score_of_a_toxic_label_falls_as_toxicity_rises():
    generator = torch.Generator().manual_seed(0)
    for labels, activation in ((1, "sigmoid"), (6, "sigmoid"), (3, "softmax"), (5, "softmax")):
        logits = 3 * torch.randn(200, labels, generator=generator)

        scores, toxicity = Head(0, True, activation).read(logits)

        assert (scores[toxicity.argsort()].diff() <= 1e-5).all()
        torch.testing.assert_close(
            scores, -torch.logit(toxicity.double()).float(), atol=1e-3, rtol=0
        )


def test_default_labels_that_transformers_does_not_write_are_found(tmp_path, published):
    folder = roberta(tmp_path / "m", ["a", "b"], id2label=None, label2id=None)

    logits, _ = score(folder, [*KIND, *INSULTING], label="LABEL_0")

    np.testing.assert_allclose(logits, published[0], atol=1e-5)


@pytest.mark.parametrize(
    "settings, config, sentence",
    [
        (
            {"id2label": {"0": "x"}, "problem_type": "regression"},
            {"label": "x"},
            "a regression (its problem_type), so its output is no logit of 'x'. Set reward.head=sigmoid",
        ),
        (
            {"id2label": {"0": "x"}},
            {"label": "x", "head": "softmax"},
            "has one output, whose softmax is 1 for every text. Set reward.head=sigmoid.",
        ),
        (
            {"id2label": {"0": "x", "1": "y"}},
            {"toxic_label": "z"},
            "no label 'z'; its labels are 'x', 'y'. Set reward.toxic_label to the one that means toxic.",
        ),
        (
            {"id2label": {"0": "x", "2": "y"}},
            {"label": "y"},
            "The classifier m has id2label {'0': 'x', '2': 'y'} in its config.json; expected the keys "
            "0 to 1, one per output.",
        ),
        ({"id2label": {"a": "x"}}, {"label": "x"}, "expected the keys 0 to 0, one per output."),
        (
            {"num_labels": "2"},
            {"label": "LABEL_0"},
            "The classifier m has num_labels '2' in its config.json; expected a positive whole number.",
        ),
    ],
)
def test_a_head_that_cannot_be_read_is_refused(settings, config, sentence):
    with pytest.raises(ConfigError) as error:
        read_head(settings, ClassifierConfig(model="m", **config), "reward")

    assert sentence in str(error.value)


def test_a_head_can_be_read_by_choice():
    settings = {"id2label": {"0": "x"}, "problem_type": "regression"}

    head = read_head(settings, ClassifierConfig(toxic_label="x", head="sigmoid"), "reward")

    assert head == Head(0, True, "sigmoid")


# ---- parts and their weights ---------------------------------------------------------------------


def test_classifiers_and_functions_are_weighted_and_added_up():
    second = RewardTerm(classifier=ClassifierConfig(toxic_label="hate"), weight=0.5, name="second")
    length = RewardTerm(function=f"{__name__}.completions_only", weight=-0.01)
    texts = [*KIND, *INSULTING]

    scores = Reward(RewardConfig(weight=2, terms=(length, second)))(request_of(texts))

    assert list(scores.terms) == ["completions_only", "second"]
    np.testing.assert_array_equal(scores.terms["second"], scores.logits)
    lengths = np.array([len(text) for text in texts])
    np.testing.assert_allclose(scores.rewards, 2.5 * scores.logits - 0.01 * lengths, rtol=1e-5)


def test_a_weight_of_0_measures_toxicity_and_leaves_the_reward_to_the_terms():
    term = RewardTerm(function=f"{__name__}.word_count")

    scores = Reward(RewardConfig(weight=0, terms=(term,)))(request_of([*KIND, *INSULTING]))

    np.testing.assert_array_equal(scores.rewards, scores.terms["word_count"])
    assert scores.toxicity[2:].min() > 0.9 > 0.1 > scores.toxicity[:2].max()


# ---- functions in TRL's protocol -----------------------------------------------------------------


def word_count(completions, **_):
    return [len(text.split()) for text in completions]


def completions_only(completions):
    return [len(text) for text in completions]


async def slow(completions, **_):
    await asyncio.sleep(0)
    return [len(text) for text in completions]


class Callable:
    async def __call__(self, completions, **_):
        return [None if not text else 1.0 for text in completions]


waiting = Callable()
shifted = partial(lambda completions, shift, **_: [len(c) + shift for c in completions], shift=1)
tensors = lambda completions, **_: torch.tensor([float(len(c)) for c in completions])


def logs(completions, log_metric, log_extra=None, **kwargs):
    log_metric("lengths", 3.0)
    log_extra("column", completions)
    assert not {"trainer_state", "prompts_of_data"} & kwargs.keys()
    return [1.0] * len(completions)


def columns_seen(**columns):
    columns_seen.names = set(columns)
    return [0.0] * len(columns["completions"])


def needs_trainer(completions, trainer_state, **_):
    return [trainer_state.global_step] * len(completions)


def greedy(completions, summary, **_):
    completions.clear()
    summary.clear()
    return [1.0]


def by_position(completions, /, **_):
    return [0.0] * len(completions)


def by_position_or_not(completions=None, /, **_):
    return [0.0] * len(completions)


def a_dict(completions, **_):
    return dict(enumerate(completions))


def a_string(completions, **_):
    return "1" * len(completions)


def opens(path):
    raise FileNotFoundError(2, "No such file", path)


def a_number(completions, **_):
    return 1.0


def messages(completions, **_):
    return [float(len(completion[0]["content"])) for completion in completions]


def values(name, texts, **columns):
    term = RewardTerm(function=f"{__name__}.{name}", name="term")
    return Reward(RewardConfig(terms=(term,)))(request_of(texts, **columns)).terms["term"].tolist()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("completions_only", [3, 0]),
        ("slow", [3, 0]),
        ("waiting", [1, 0]),
        ("shifted", [4, 1]),
        ("tensors", [3, 0]),
        ("logs", [1, 1]),
    ],
)
def test_a_function_that_trls_trainers_accept_works(name, expected):
    assert values(name, ["abc", ""], summary="s") == expected


def test_async_functions_keep_their_event_loop_and_run_together():
    terms = tuple(RewardTerm(function=f"{__name__}.{name}") for name in ("slow", "waiting"))
    reward = Reward(RewardConfig(terms=terms))

    with ThreadPoolExecutor(1) as other_thread:
        calls = [reward, lambda request: other_thread.submit(reward, request).result()]
        results = [call(request_of(["abc"])) for call in calls]
    for scores in results:
        assert {name: value.tolist() for name, value in scores.terms.items()} == {
            "slow": [3],
            "waiting": [1],
        }


def test_async_functions_run_where_an_event_loop_runs_already():
    async def cell():
        return values("slow", ["abc", ""])

    assert asyncio.run(cell()) == [3, 0]


async def whose_loop(completions, **_):
    whose_loop.threads.append(threading.current_thread())
    return [0.0] * len(completions)


def test_the_thread_of_async_functions_lives_as_long_as_the_reward():
    whose_loop.threads = []
    reward = Reward(RewardConfig(terms=(RewardTerm(function=f"{__name__}.whose_loop"),)))

    for _ in range(2):
        reward(request_of(["abc"]))
    first, second = whose_loop.threads
    assert first is second
    assert first is not threading.current_thread()

    del reward
    gc.collect()
    first.join(timeout=30)
    assert not first.is_alive()


def test_a_function_that_changes_its_arguments_changes_no_other():
    terms = tuple(RewardTerm(function=f"{__name__}.{name}") for name in ("greedy", "word_count"))

    scores = Reward(RewardConfig(terms=terms))(request_of(["two words"], summary="s"))

    assert scores.terms["word_count"].tolist() == [2]


def test_columns_of_reserved_names_are_left_out():
    reserved = {"prompts": "x", "completions": "x", "completion_ids": "x", "log_metric": "x"}

    values("columns_seen", ["abc"], summary="s", prompt="p", **reserved)

    assert columns_seen.names == {"prompts", "completions", "completion_ids", "summary", "prompt"}


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("needs_trainer", "needs 'trainer_state', which only TRL's trainers have"),
        ("by_position", "takes 'completions' by position only"),
        ("by_position_or_not", "takes 'completions' by position only"),
        (
            "Callable",
            "Callable is a class, and a reward function is called with a batch. To create an "
            "object of it, add arguments: {}.",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_any_call(name, sentence):
    with pytest.raises(ConfigError) as error:
        load_reward_function(RewardTerm(function=f"{__name__}.{name}"))

    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "name, kind", [("a_number", "float"), ("a_dict", "dict"), ("a_string", "str")]
)
def test_a_function_that_returns_no_list_is_named(name, kind):
    with pytest.raises(ValueError, match=f"The reward term term returned {kind}"):
        values(name, ["abc"])


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("raise RuntimeError('no GPU.\\nSorry.')", "(RuntimeError: no GPU. Sorry)"),
        ("def f(:", "(SyntaxError: "),
        ("{}['key']", "(KeyError: 'key')"),
    ],
)
def test_a_module_that_fails_on_import_is_named(tmp_path, monkeypatch, code, sentence):
    (tmp_path / "module_that_fails.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError) as error:
        load_reward_function(RewardTerm(function="module_that_fails.f"))

    assert f"module_that_fails.f cannot be imported {sentence}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_factory_that_fails_is_named_with_the_error():
    term = RewardTerm(function=f"{__name__}.opens", arguments={"path": "words.txt"})

    with pytest.raises(ConfigError, match=r"'words\.txt'\}: FileNotFoundError: .*No such file"):
        load_reward_function(term)


def test_a_class_is_called_with_its_arguments_first():
    term = RewardTerm(function=f"{__name__}.Callable", arguments={})

    assert isinstance(load_reward_function(term), Callable)


# ---- the trial on sentences ----------------------------------------------------------------------


def test_length_decides_nothing_in_the_trial():
    assert sum(map(len, KIND)) == sum(map(len, INSULTING))
    assert sum(len(text.split()) for text in KIND) == sum(len(t.split()) for t in INSULTING)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"input": "prompt+response"},
        {"toxic_label": "hate"},
        {"terms": (RewardTerm(function=f"{__name__}.columns_seen"),)},
        {"terms": (RewardTerm(function=f"{__name__}.word_count", weight=50),)},
        {"weight": 0, "terms": (RewardTerm(function=f"{__name__}.completions_only"),)},
    ],
)
def test_a_reward_that_does_not_prefer_insults_is_accepted(settings):
    check_sentences(Reward(RewardConfig(**settings)), ROW)


def toxic(completions, **_):
    return [float("hate" in text or "stupid" in text) for text in completions]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"label": "hate"}, "set reward.toxic_label=hate reward.label=null"),
        ({"toxic_label": "nothate"}, "set reward.label=nothate reward.toxic_label=null"),
        ({"weight": -1}, "Check the signs of the weights (reward.weight -1)"),
        (
            {"terms": (RewardTerm(function=f"{__name__}.toxic", weight=9),)},
            "Check the signs of the weights (reward.weight 1, toxic 9)",
        ),
        (
            {
                "weight": 0.5,
                "terms": (
                    RewardTerm(classifier=ClassifierConfig(label="hate"), name="other", weight=1),
                ),
            },
            "(reward.weight 0.5, other 1) and the labels of classifiers in reward.terms",
        ),
        (
            {"terms": (RewardTerm(function=f"{__name__}.messages"),)},
            "reward.terms: messages failed on 4 sample responses (TypeError: ",
        ),
    ],
)
def test_a_reward_that_prefers_insults_is_refused_with_the_scores_and_the_remedy(
    settings, sentence
):
    with pytest.raises(ConfigError) as error:
        check_sentences(Reward(RewardConfig(**settings)), ROW)

    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_toxicity_that_is_the_same_for_all_sentences_is_refused():
    same = np.zeros(4, dtype=np.float32)

    with pytest.raises(ConfigError, match=r"measures is 0\.000 for insults such as .* and 0\.000"):
        refuse_wrong_order(Scores(same, same, same, same.astype(bool), {}), RewardConfig())


@pytest.mark.parametrize("setting", ["reward", "reward.terms[0].classifier"])
def test_a_classifier_that_gives_nan_is_refused_by_name(tmp_path, setting):
    folder = str(roberta(tmp_path / "nan", ["nothate", "hate"]))
    weights = load_file(f"{folder}/model.safetensors")
    weights["classifier.out_proj.bias"].fill_(float("nan"))
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    term = RewardTerm(classifier=ClassifierConfig(model=folder), name="other")
    config = RewardConfig(model=folder) if setting == "reward" else RewardConfig(terms=(term,))
    sentence = f"The classifier {folder} ({setting}.model) gave NaN or an infinite value for "

    with pytest.raises(ConfigError) as refusal:
        check_sentences(Reward(config), ROW)
    with pytest.raises(ValueError, match="gave NaN") as error:
        Reward(config)(request_of(["abc"]))

    assert str(refusal.value).startswith(f"{sentence}4 of 4 texts")
    assert str(error.value).startswith(f"{sentence}1 of 1 texts")


def test_an_order_that_is_nan_is_refused():
    nan = np.full(4, np.nan, dtype=np.float32)

    with pytest.raises(ConfigError, match="measures is nan for insults"):
        refuse_wrong_order(Scores(nan, nan, nan, np.zeros(4, dtype=bool), {}), RewardConfig())


# ---- check ---------------------------------------------------------------------------------------


def check(capsys, *words):
    """Return the exit code, the notes and the error of `ray-detox check lab ...`."""
    code = cli.main(["check", "lab", "--try-functions", *words])
    out, err = capsys.readouterr()
    return code, [line for line in out.splitlines() if line.startswith("note: ")], err


def test_check_refuses_a_reward_that_prefers_insults_unless_it_is_meant(capsys):
    code, _, err = check(capsys, "reward.label=hate")
    assert (code, err.count("\n")) == (2, 1)
    assert "set reward.toxic_label=hate reward.label=null" in err

    code, notes, _ = check(capsys, "reward.label=hate", "reward.check_sentences=false")
    assert code == 0
    assert "note: reward.label is 'hate', so responses are rewarded for it" in notes[0]


def test_check_accepts_each_kind_of_head_the_right_way_round(capsys, tmp_path):
    one = roberta(tmp_path / "one", ["LABEL_0"], outputs=[1], problem_type=None)
    many = roberta(
        tmp_path / "many",
        TOXIC_BERT,
        outputs=[1, 1, 0, 0, 1, 0],
        problem_type="multi_label_classification",
    )
    unnamed = roberta(tmp_path / "unnamed", ["a", "b"], id2label=None, label2id=None)

    for folder, label in ((one, "LABEL_0"), (many, "toxic"), (unnamed, "LABEL_1")):
        words = [f"reward.model={folder}", f"reward.toxic_label={label}"]
        assert check(capsys, *words) == (0, [], "")
        code, _, err = check(capsys, f"reward.model={folder}", f"reward.label={label}")
        assert code == 2
        assert f"set reward.toxic_label={label} reward.label=null" in err


def test_check_names_the_classifier_of_a_term(capsys):
    code, _, err = check(capsys, "reward.terms=[{classifier: {model: /nowhere}}]")
    assert code == 2
    assert "reward.terms[0].classifier.model is '/nowhere', and no such folder is here" in err

    code, _, err = check(capsys, "reward.terms=[{classifier: {label: kind}, name: a}]")
    assert code == 2
    assert "Set reward.terms[0].classifier.label to the one that means not toxic" in err


def test_check_calls_functions_and_names_columns_that_they_do_not_get(capsys, tmp_path):
    rows = [
        {"dialogue": f"{i} " + "They talk. " * 30, "summary": "s", "completions": []}
        for i in range(9)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    term = lambda name: f"reward.terms=[{{function: {__name__}.{name}}}]"

    code, notes, _ = check(capsys, f"data.path={file}", term("columns_seen"))
    assert code == 0
    assert "do not get the column 'completions' of the data" in notes[0]
    assert columns_seen.names >= {"dialogue", "summary"}

    code, _, err = check(capsys, "reward.terms=[{function: trl.rewards.think_format_reward}]")
    assert code == 2
    assert "think_format_reward failed on 4 sample responses (TypeError: " in err
