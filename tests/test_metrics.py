import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_detox.evaluation import metrics

texts = st.text(alphabet="ab c.", max_size=12)


def test_rouge_l_matches_the_worked_example():
    # "the cat sat" against "the cat lay down": the longest common subsequence is "the cat",
    # P = 2/3, R = 2/4, F = 2 * (1/3) / (7/6) = 4/7
    assert metrics.rouge_l(["The cat sat"], [["the cat lay down."]]) == [pytest.approx(4 / 7)]


def test_rouge_l_compares_stems():
    assert metrics.rouge_l(["cats walking"], [["cat walked"]]) == [pytest.approx(1.0)]


def test_rouge_l_takes_the_best_of_several_references():
    references = [["a dog", None, "the cat lay down.", ""], ["a dog", "the end"]]

    assert metrics.rouge_l(["The cat sat", "an end"], references) == [
        pytest.approx(4 / 7),
        pytest.approx(1 / 2),
    ]


def test_rouge_l_is_nan_if_the_reference_has_no_words():
    scores = metrics.rouge_l(["a", "a", "a", "", "a"], [[""], [None], [" ... "], ["a"], ["b"]])

    assert [math.isnan(score) for score in scores] == [True, True, True, False, False]
    assert scores[3:] == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(texts, texts)
def test_rouge_l_is_symmetric_and_one_for_itself(first, second):
    (there,), (back,) = metrics.rouge_l([first], [[second]]), metrics.rouge_l([second], [[first]])
    (same,) = metrics.rouge_l([first], [[first]])

    assert math.isnan(there) or math.isnan(back) or there == pytest.approx(back)
    assert math.isnan(same) or same == pytest.approx(1.0)


def test_facts_are_found_regardless_of_case():
    shares = metrics.facts_share(
        ["ANNA meets Tom at 10:30.", "Nobody came.", "x", "STRASSE"],
        [["Anna", "Tom", "10:30", "Paris"], ["Anna"], [], ["straße", " "]],
    )

    assert shares[:2] == [0.75, 0.0]
    assert math.isnan(shares[2])
    assert shares[3] == 1.0


def test_different_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="2 responses and 1 references"):
        metrics.rouge_l(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="1 responses and 2 facts"):
        metrics.facts_share(["a"], [[], []])


def test_distinct_n_matches_the_worked_example():
    # bigrams: (a b) (b a) (a b) | (a b), so 2 different ones of 4
    assert metrics.distinct_n(["a b a b", "A B"]) == 0.5
    assert metrics.distinct_n(["a b", "b a"], n=1) == 0.5
    assert metrics.distinct_n(["one", ""]) == 0.0
    assert metrics.distinct_n([]) == 0.0


@given(st.lists(texts, min_size=1, max_size=6))
def test_repeating_all_responses_halves_distinct_n(responses):
    once, twice = metrics.distinct_n(responses), metrics.distinct_n(responses * 2)

    assert twice == pytest.approx(once / 2)


def test_unique_share_ignores_white_space_at_the_ends():
    assert metrics.unique_share(["a", "a ", "b", "a"]) == 0.5
    assert metrics.unique_share([]) == 0.0


def test_mean_scored_leaves_out_nan():
    assert metrics.mean_scored([1.0, math.nan, 2.0]) == 1.5
    assert metrics.mean_scored([math.nan]) is None


def test_every_metric_has_one_source_of_its_value():
    for metric in metrics.METRICS:
        sources = (metric.measured, metric.rating, metric.over_all)
        assert sum(source is not None for source in sources) == 1, metric.name


def test_metric_names_are_unique():
    names = [metric.name for metric in metrics.METRICS]

    assert len(set(names)) == len(names)
