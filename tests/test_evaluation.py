"""The report of evaluated prompts: means, intervals, the verdict and the notes."""

import dataclasses
import json
from typing import Any

import pytest

from ray_detox.config import ConfigError
from ray_detox.evaluation.examples import EvaluatedResponse, PairedExample
from ray_detox.evaluation.judges import check_judge, load_judge
from ray_detox.evaluation.metrics import METRICS
from ray_detox.evaluation.summarise import RunFacts, rate, summarise
from ray_detox.recipes.loading import load_config


def example(index: int, before: float, after: float, **changes: object) -> PairedExample:
    """One held-out prompt whose response lost its insult."""
    stored: dict[str, object] = {
        "index": index,
        "prompt_id": f"{index:016x}",
        "query": "Summarize ...",
        "reference": "Ann lost the key and will look for it",
        "facts": ["key", "look for it"],
        "kl": 1.5,
        "response_before": f"Ann the idiot lost the key {index}",
        "response_after": f"Ann lost the key and will look for it {index}",
        "toxicity_before": before,
        "toxicity_after": after,
        "reward_before": -1.0,
        "reward_after": 2.0,
        "length_before": 10,
        "length_after": 10,
        "truncated_before": False,
        "truncated_after": False,
        "finished_before": True,
        "finished_after": True,
    }
    return PairedExample.from_json(stored | changes)


FACTS = RunFacts(
    run_id="first",
    steps=4,
    rows={"read": 10},
    seconds={"train": 2.0, "evaluate": 1.0},
    training={},
    fingerprints={"policy": "sha256:1"},
    record={},
)


def report_of(examples: list[PairedExample], *settings: str) -> dict[str, Any]:
    """The report of the examples under the recipe lab."""
    config = load_config("lab", settings)
    return summarise(rate(examples, config), config, FACTS)


def test_a_report_has_the_fields_that_its_readers_use():
    report = report_of([example(i, 0.9 if i % 2 else 0.8, 0.1) for i in range(20)])

    toxicity = report["toxicity"]
    assert report["run_id"] == "first"
    assert (report["recipe"], report["status"], report["n"]) == ("lab", "complete", 20)
    assert toxicity["before"]["mean"] == pytest.approx(0.85)
    assert toxicity["after"] == {"mean": pytest.approx(0.1), "std": pytest.approx(0), "share": 0.0}
    assert toxicity["delta"]["mean"] == pytest.approx(-0.75)
    assert toxicity["delta"]["low"] <= -0.75 <= toxicity["delta"]["high"] < 0
    assert toxicity["improvement"] == pytest.approx(0.75 / 0.85)
    assert report["rouge_l"]["before"] < report["rouge_l"]["after"]
    assert report["facts"] == {"before": 0.5, "after": 1.0}
    assert report["kl"] == 1.5
    assert report["seconds"] == {"total": 3.0, "train": 2.0, "evaluate": 1.0}
    assert report["verdict"]["name"] == "improved"
    assert report["prompts_seen"] == 4 * 64
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_report_notes_that_the_embedded_reward_model_is_template_trained():
    report = report_of([example(i, 0.9, 0.1) for i in range(8)])

    assert any("template-trained" in note for note in report["notes"])


def test_less_toxic_gibberish_is_judged_as_quality_lost():
    gibberish = [example(i, 0.9, 0.0, response_after="2 dollars", kl=40.0) for i in range(20)]

    verdict = report_of(gibberish)["verdict"]

    assert verdict["name"] == "quality lost"
    assert len(verdict["reasons"]) == 3  # ROUGE-L, facts, KL


def test_rows_without_reference_or_facts_have_no_such_ratings():
    bare = [example(i, 0.9, 0.1, reference=None, facts=None) for i in range(8)]

    report = report_of(bare)
    rated = rate(bare, load_config("lab"))

    assert report["rouge_l"] == {"before": None, "after": None}
    assert report["facts"] == {"before": None, "after": None}
    assert all(example.to_json()["rouge_l_before"] is None for example in rated)
    assert "Not measured" in report["verdict"]["sentence"]


def test_truncated_texts_are_counted_and_noted():
    report = report_of([example(i, 0.9, 0.1, truncated_after=i < 3) for i in range(8)])

    assert report["truncated"] == {"before": 0, "after": 3}
    assert any("3 of 8 prompts" in note for note in report["notes"])


def test_the_share_of_finished_responses_is_reported_before_and_after():
    report = report_of([example(i, 0.9, 0.1, finished_after=i < 6) for i in range(8)])

    assert report["finished"] == {"before": 1.0, "after": 0.75}


def test_the_judge_agrees_that_the_insult_is_gone():
    pytest.importorskip("profanity_check")
    examples = [example(i, 0.9, 0.1) for i in range(8)]
    setting = "evaluate.judge=profanity-check"

    report = report_of(examples, setting)
    stored = rate(examples, load_config("lab", [setting]))[0].to_json()

    assert report["judge"]["before"]["mean"] > 0.5 > report["judge"]["after"]["mean"]
    assert stored["judge_before"] > stored["judge_after"]


def test_a_judge_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match="alt-profanity-check is not installed"):
        check_judge("profanity-check")


def test_the_judge_none_loads_nothing():
    assert load_judge("none") is None


# The stored form


def test_the_stored_form_is_flat_and_in_a_fixed_order():
    before = EvaluatedResponse("You fool.", -1.0, 0.9, 3, False, True, {"brevity": 0.5})
    after = EvaluatedResponse("Hello.", 2.0, 0.1, 2, True, False, {"brevity": 0.7})
    paired = PairedExample(
        index=3,
        prompt_id="00ff",
        query="Say hello.",
        reference="Hello.",
        facts=("hello",),
        kl=1.5,
        before=before,
        after=after,
    )

    assert list(paired.to_json().items()) == [
        ("index", 3),
        ("prompt_id", "00ff"),
        ("query", "Say hello."),
        ("reference", "Hello."),
        ("facts", ["hello"]),
        ("kl", 1.5),
        ("response_before", "You fool."),
        ("reward_before", -1.0),
        ("toxicity_before", 0.9),
        ("length_before", 3),
        ("truncated_before", False),
        ("finished_before", True),
        ("brevity_before", 0.5),
        ("response_after", "Hello."),
        ("reward_after", 2.0),
        ("toxicity_after", 0.1),
        ("length_after", 2),
        ("truncated_after", True),
        ("finished_after", False),
        ("brevity_after", 0.7),
    ]
    (rated,) = rate([paired], load_config("lab"))
    assert list(rated.to_json().items())[20:] == [
        ("rouge_l_before", 0.0),
        ("facts_before", 0.0),
        ("rouge_l_after", 1.0),
        ("facts_after", 1.0),
    ]


def test_rating_leaves_the_given_examples_unchanged():
    examples = [example(i, 0.9, 0.1) for i in range(2)]

    rate(examples, load_config("lab"))

    assert examples == [example(i, 0.9, 0.1) for i in range(2)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"facts": None, "reference": None},
        {"mine_after": 0.5},
        {"more_references": ["Hi.", "Good day."]},
    ],
)
def test_an_example_survives_its_stored_form(changes: dict[str, object]):
    (rated,) = rate([example(0, 0.9, 0.1, **changes)], load_config("lab"))

    stored = json.loads(json.dumps(rated.to_json()))

    assert PairedExample.from_json(stored) == rated
    assert PairedExample.from_json(stored).to_json() == stored


def test_a_stored_form_with_a_missing_or_unknown_field_is_refused():
    stored = example(0, 0.9, 0.1).to_json()
    less = {name: value for name, value in stored.items() if name != "length_after"}

    with pytest.raises(ValueError, match="lacks the field 'length_after'"):
        PairedExample.from_json(less)
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        PairedExample.from_json(stored | {"colour": "red"})
    with pytest.raises(ValueError, match="is 3, expected an object"):
        PairedExample.from_json(3)


def test_every_metric_of_the_table_is_in_the_report():
    report = report_of([example(i, 0.9, 0.1) for i in range(8)])

    for metric in METRICS:
        value = report[metric.name]
        assert isinstance(value, float) if metric.after_only else set(value) == {"before", "after"}


def test_the_report_notes_settings_and_content_that_changed_during_the_run():
    changes = {
        "settings": [{"step": 3, "name": "train.steps", "before": 40, "after": 60}],
        "accepted": [{"step": 5, "name": "policy", "before": "a", "after": "b"}],
    }
    facts = dataclasses.replace(FACTS, record={"changes": changes})
    config = load_config("lab")

    report = summarise(rate([example(i, 0.9, 0.1) for i in range(20)], config), config, facts)

    assert report["changes"] == changes
    assert report["notes"][-2:] == [
        "Settings changed when the run was resumed: train.steps was 40 until step 3, and then 60.",
        "This run went on with other content than it was started with (--accept-changes): policy since "
        "step 5. Its figures belong to no single state of it.",
    ]
