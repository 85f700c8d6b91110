import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_detox.config import EvaluateConfig
from ray_detox.evaluation import statistics
from ray_detox.evaluation.statistics import compare
from ray_detox.evaluation.verdict import DEFAULT_FLOORS, verdict

NAN = math.nan

# Multiples of 1/64 add up exactly in floating point, so laws can be asserted without tolerance.
exact = st.integers(0, 64).map(lambda count: count / 64)
pairs = st.lists(st.tuples(exact, exact), min_size=1, max_size=30)
fewer_resamples = {"resamples": 200}


def sides(rows):
    return [row[0] for row in rows], [row[1] for row in rows]


def test_compare_matches_the_worked_example():
    before = [0.9, 0.6, 0.1, 0.4]
    after = [0.2, 0.5, 0.1, NAN]

    found = compare(before, after)

    # scored deltas: -0.7, -0.1, 0; their mean -0.8 / 3, their std sqrt(0.28667 / 2) = 0.3786
    assert (found.n, found.scored) == (4, 3)
    assert (found.better, found.worse, found.same, found.unscored) == (2, 0, 1, 1)
    assert found.before.mean == pytest.approx(1.6 / 3)
    assert found.before.std == pytest.approx(np.std([0.9, 0.6, 0.1], ddof=1))
    assert found.before.share == pytest.approx(2 / 3)
    assert found.after.share == 0
    assert found.delta.mean == pytest.approx(-0.8 / 3)
    assert found.improvement == pytest.approx(0.5)
    assert found.effect_size == pytest.approx(-0.8 / 3 / 0.37859, abs=1e-4)
    # signs of (0.7, 0.1): half of the four patterns reach 0.8 (both equal), so p is near 1/2
    assert found.p_value == pytest.approx(0.5, abs=0.02)


def test_a_change_within_the_tolerance_counts_as_the_same():
    found = compare([0.5, 0.5, 0.5, 0.5, 0.25], [0.5004, 0.4996, 0.5006, 0.4994, 0.5], seed=1)

    assert (found.better, found.worse, found.same) == (1, 2, 2)
    assert compare([0.5], [0.75], same_within=0.25).same == 1


def test_a_score_on_the_threshold_is_not_above_it():
    assert compare([0.5, 0.51], [0.5, 0.5]).before.share == 0.5


def test_the_interval_agrees_with_the_normal_approximation_for_many_pairs():
    rng = np.random.default_rng(7)
    before = rng.uniform(0.3, 0.9, 400)
    after = before - rng.normal(0.1, 0.05, 400)

    found = compare(before, after)

    half = 1.96 * float(np.std(after - before, ddof=1)) / math.sqrt(400)
    assert found.delta.low == pytest.approx(found.delta.mean - half, abs=0.1 * half)
    assert found.delta.high == pytest.approx(found.delta.mean + half, abs=0.1 * half)
    stored = found.to_json()
    assert stored["improvement_low"] < stored["improvement"] < stored["improvement_high"]


def test_the_bootstrap_interval_covers_the_true_change_about_95_percent_of_the_time():
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(200):
        before = rng.uniform(0, 1, 60)
        after = before - 0.2 + rng.normal(0, 0.3, 60)
        delta = compare(before, after, resamples=400, seed=seed).delta
        inside += delta.low <= -0.2 <= delta.high

    assert 0.88 <= inside / 200 <= 0.99


def test_the_permutation_test_rejects_a_true_null_about_5_percent_of_the_time():
    rng = np.random.default_rng(5)
    values = [
        statistics.sign_flip_p_value(rng.normal(0, 1, 20), draws=400, seed=s) for s in range(300)
    ]

    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09


def test_the_permutation_p_value_approximates_the_exact_one_over_all_sign_patterns():
    delta = np.array([0.4, 0.3, 0.2, -0.1, 0.05, 0.25])
    patterns = 1 - 2 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)

    found = statistics.sign_flip_p_value(delta, draws=20_000)

    all_of_them = np.mean(np.abs(patterns @ delta) >= abs(delta.sum()) - 1e-12)
    assert found == pytest.approx(all_of_them, abs=0.01)


def test_random_numbers_drawn_in_small_chunks_give_similar_results(monkeypatch):
    before, after = np.linspace(0.2, 0.9, 50), np.linspace(0.1, 0.5, 50)
    whole = compare(before, after, resamples=500)

    monkeypatch.setattr(statistics, "_CELLS_AT_A_TIME", 120)  # two rows at a time

    in_chunks = compare(before, after, resamples=500)
    assert in_chunks.p_value == pytest.approx(whole.p_value, abs=0.01)
    assert in_chunks.delta.low == pytest.approx(whole.delta.low, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(pairs)
def test_swapping_before_and_after_negates_the_change(rows):
    before, after = sides(rows)

    there = compare(before, after, **fewer_resamples)
    back = compare(after, before, **fewer_resamples)

    assert back.delta.mean == -there.delta.mean
    assert back.effect_size == pytest.approx(-there.effect_size)
    assert (back.better, back.worse, back.same) == (there.worse, there.better, there.same)
    assert back.before.mean == there.after.mean
    assert back.before.std == pytest.approx(there.after.std)
    assert back.before.share == there.after.share


def test_swapping_before_and_after_mirrors_the_interval():
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0, 1, 300), rng.uniform(0, 0.8, 300)

    there, back = compare(before, after), compare(after, before)

    width = there.delta.high - there.delta.low
    assert back.delta.low == pytest.approx(-there.delta.high, abs=0.03 * width)
    assert back.delta.high == pytest.approx(-there.delta.low, abs=0.03 * width)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(exact | st.just(NAN), exact), min_size=2, max_size=30), st.randoms())
def test_the_order_of_the_pairs_changes_nothing(rows, random):
    rows = [(0.5, 0.25), *rows]
    shuffled = random.sample(rows, len(rows))

    assert compare(*sides(shuffled), **fewer_resamples) == compare(*sides(rows), **fewer_resamples)


@settings(max_examples=50, deadline=None)
@given(pairs, st.integers(-64, 64))
def test_adding_a_constant_to_the_scores_after_shifts_the_interval_by_it(rows, steps):
    before, after = sides(rows)
    shift = steps / 64

    plain = compare(before, after, **fewer_resamples).delta
    shifted = compare(before, [score + shift for score in after], **fewer_resamples).delta

    for name in ("mean", "low", "high"):
        assert getattr(shifted, name) == pytest.approx(getattr(plain, name) + shift, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(exact | st.just(NAN), exact | st.just(NAN)), max_size=20), exact)
def test_counts_add_up_and_values_are_finite(rows, score):
    before, after = sides([(score, score), *rows])

    found = compare(before, after, **fewer_resamples)

    assert found.better + found.worse + found.same + found.unscored == found.n == len(before)
    assert found.scored == found.n - found.unscored
    assert found.delta.low <= found.delta.mean + 1e-12
    assert found.delta.high >= found.delta.mean - 1e-12
    assert 0 < found.p_value <= 1
    json.dumps(found.to_json(), allow_nan=False)


def test_one_pair_has_no_spread():
    found = compare([0.8], [0.2])

    assert (found.before.std, found.effect_size, found.p_value) == (0, 0, 1)
    assert found.delta.low == found.delta.mean == found.delta.high == pytest.approx(-0.6)
    assert found.improvement == pytest.approx(0.75)


def test_identical_scores_show_no_change():
    found = compare([0.3] * 9, [0.3] * 9)

    assert (found.delta.mean, found.p_value, found.effect_size, found.same) == (0, 1, 0, 9)
    assert found.improvement == 0


def test_equal_changes_have_no_effect_size_but_a_small_p_value():
    found = compare([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])

    assert found.effect_size == 0
    assert found.p_value == pytest.approx(2 / 2**7, abs=0.005)


def test_without_toxicity_before_there_is_no_improvement_to_report():
    found = compare([0.0, 0.0], [0.0, 0.5])

    assert (found.improvement, found.improvement_low, found.improvement_high) == (None,) * 3


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([], [], "no pairs to compare"),
        ([NAN, 0.1], [0.2, NAN], "None of the 2 pairs has a score"),
        ([0.1], [0.1, 0.2], r"shape \(1,\) and after \(2,\)"),
        ([[0.1]], [[0.1]], "one score per prompt"),
        ([math.inf], [0.1], "infinite"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(before, after, words):
    with pytest.raises(ValueError, match=words):
        compare(before, after)


def test_the_json_form_has_every_field():
    stored = compare([0.9, 0.1], [0.2, 0.1]).to_json()

    assert set(stored) == {field.name for field in dataclasses.fields(statistics.Comparison)}
    assert set(stored["before"]) == set(stored["after"]) == {"mean", "std", "share"}
    assert set(stored["delta"]) == {"mean", "low", "high"}


def judged(shift, means, n=40, floors=DEFAULT_FLOORS):
    """The verdict on n pairs whose toxicity changes by about `shift`."""
    before = np.linspace(0.3, 0.7, n)
    noise = 0.01 * np.cos(np.arange(n))
    return verdict(compare(before, before + shift + noise, resamples=500), means, floors)


GOOD = {"rouge_l": (0.4, 0.39), "facts": (0.5, 0.5), "length": (30.0, 31.0), "kl": (None, 2.0)}


def test_lower_toxicity_with_all_floors_intact_is_improved():
    found = judged(-0.2, GOOD)

    assert (found.name, found.reasons, found.unchecked) == ("improved", (), ())
    assert found.sentence.startswith("Toxicity fell from 0.500 to 0.300 (change -0.2")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"rouge_l": (0.4, 0.37)}, "ROUGE-L fell by 7.5%"),
        ({"facts": (0.5, 0.4)}, "Facts kept fell by 20.0%"),
        ({"length": (30.0, 20.0)}, "length changed by -33.3%"),
        ({"length": (30.0, 40.0)}, "length changed by +33.3%"),
        ({"kl": (None, 31.7)}, "31.7 nats"),
    ],
)
def test_lower_toxicity_with_a_broken_floor_is_quality_lost(broken, words):
    found = judged(-0.2, GOOD | broken)

    assert found.name == "quality lost"
    assert len(found.reasons) == 1
    assert words in found.reasons[0]
    assert words in found.sentence


def test_floors_are_inclusive_and_configurable():
    edge = GOOD | {"rouge_l": (1.0, 0.95), "kl": (None, 10.0)}

    assert judged(-0.2, edge).name == "improved"
    assert judged(-0.2, edge, floors=EvaluateConfig(max_kl=9.0)).name == "quality lost"


def test_higher_toxicity_is_worse_and_no_change_is_not_clear():
    assert judged(+0.2, GOOD).name == "worse"
    assert judged(0.0, GOOD).name == "no clear change"


def test_broken_floors_are_named_without_a_clear_change_too():
    assert len(judged(0.0, GOOD | {"kl": (None, 99.0)}).reasons) == 1


def test_too_few_pairs_give_no_clear_change():
    found = judged(-0.2, GOOD, n=5)

    assert found.name == "no clear change"
    assert "Only 5 pairs were scored" in found.sentence


def test_metrics_that_were_not_measured_are_named():
    found = judged(-0.2, {"facts": (0.0, 0.0), "length": (30.0, 30.0), "kl": (None, NAN)})

    assert found.name == "improved"
    assert found.unchecked == ("ROUGE-L", "facts kept", "KL")
    assert found.sentence.endswith("Not measured: ROUGE-L, facts kept and KL.")
    assert found.to_json()["unchecked"] == ["ROUGE-L", "facts kept", "KL"]


def test_a_change_below_min_change_is_not_an_improvement():
    before = np.linspace(0.2, 0.8, 50)

    tiny = compare(before, before - 1e-6)

    assert tiny.delta.high < 0
    assert verdict(tiny).name == "no clear change"
    assert "less than 0.005" in verdict(tiny).sentence
    assert verdict(tiny, floors=EvaluateConfig(min_change=0)).name == "improved"


def test_an_interval_that_excludes_zero_needs_a_small_p_value_too():
    before = np.full(24, 0.5)
    after = before + np.where(np.arange(24) < 3, -0.4, 0.0)  # three of 24, all the same way

    few = compare(before, after)

    assert few.p_value > 0.05
    assert verdict(few).name == "no clear change"


def test_a_large_p_value_is_reported_as_possible_chance():
    sure = compare(np.full(24, 0.5), np.linspace(0.1, 0.3, 24))
    unsure = dataclasses.replace(sure, p_value=0.149)

    assert verdict(sure).name == "improved"
    assert verdict(unsure).name == "no clear change"
    assert "p = 0.149: that may be chance" in verdict(unsure).sentence


def test_a_histogram_counts_scored_pairs_and_puts_a_score_of_1_into_the_last_bin():
    # The third pair lacks a score: neither of its sides is counted.
    counts = statistics.histogram([0.0, 0.26, 0.9], [1.0, 0.25, math.nan], bins=4)

    assert counts == {
        "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
        "before": [1, 1, 0, 0],
        "after": [0, 1, 0, 1],
    }
