"""From samples to a report: means, intervals, the verdict and what a reader must know."""

import json

import pytest

from ray_detox.config import ConfigError
from ray_detox.evaluation.judges import check_judge, load_judge
from ray_detox.evaluation.summarise import summarise
from ray_detox.recipes.loading import load_config


def sample(index: int, before: float, after: float, **changes: object) -> dict[str, object]:
    """One held-out prompt whose response lost its insult."""
    found: dict[str, object] = {
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
    }
    return found | changes


def report_of(samples: list[dict[str, object]], *settings: str) -> dict[str, object]:
    """The report of samples under the recipe lab."""
    return summarise(
        samples,
        load_config("lab", settings),
        run_id="first",
        steps=4,
        rows={"read": 10},
        seconds={"train": 2.0, "evaluate": 1.0},
        training={},
        fingerprints={"policy": "sha256:1"},
    )


def test_a_report_has_what_its_readers_rely_on():
    samples = [sample(i, 0.9 if i % 2 else 0.8, 0.1) for i in range(20)]

    report = report_of(samples)

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


def test_a_report_says_that_the_embedded_reward_model_is_template_trained():
    report = report_of([sample(i, 0.9, 0.1) for i in range(8)])

    assert any("template-trained" in note for note in report["notes"])


def test_quality_that_was_sold_for_toxicity_is_called_so():
    gibberish = [sample(i, 0.9, 0.0, response_after="2 dollars", kl=40.0) for i in range(20)]

    verdict = report_of(gibberish)["verdict"]

    assert verdict["name"] == "quality lost"
    assert len(verdict["reasons"]) == 3  # ROUGE-L, facts, KL


def test_rows_without_reference_or_facts_leave_those_figures_out():
    bare = [sample(i, 0.9, 0.1, reference=None, facts=None) for i in range(8)]

    report = report_of(bare)

    assert report["rouge_l"] == {"before": None, "after": None}
    assert report["facts"] == {"before": None, "after": None}
    assert all(s["rouge_l_before"] is None for s in bare)
    assert "Not measured" in report["verdict"]["sentence"]


def test_truncated_texts_are_counted_and_noted():
    samples = [sample(i, 0.9, 0.1, truncated_after=i < 3) for i in range(8)]

    report = report_of(samples)

    assert report["truncated"] == {"before": 0, "after": 3}
    assert any("3 of 8 prompts" in note for note in report["notes"])


def test_a_judge_of_another_family_sees_the_insult_go():
    pytest.importorskip("profanity_check")
    samples = [sample(i, 0.9, 0.1) for i in range(8)]

    report = report_of(samples, "evaluate.judge=profanity-check")

    assert report["judge"]["before"]["mean"] > 0.5 > report["judge"]["after"]["mean"]
    assert samples[0]["judge_before"] > samples[0]["judge_after"]


def test_a_judge_that_is_not_installed_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match="alt-profanity-check is not installed"):
        check_judge("profanity-check")


def test_no_judge_is_no_judge():
    assert load_judge("none") is None
