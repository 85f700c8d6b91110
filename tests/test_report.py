"""The report of a run as text: its parts, its width, and text that is hostile or missing."""

import copy
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_detox.evaluation.statistics import compare
from ray_detox.evaluation.verdict import verdict
from ray_detox.runs import report_text as text

BEFORE = np.linspace(0.1, 0.9, 60)
AFTER = BEFORE * (0.3 + 0.1 * np.sin(np.arange(60)))


@pytest.fixture
def report():
    toxicity = compare(BEFORE, AFTER, resamples=2000)
    found = verdict(toxicity, {"rouge_l": (0.31, 0.32), "length": (30.0, 31.0), "kl": (None, 1.84)})
    return {
        "run_id": "first",
        "recipe": "lab",
        "status": "complete",
        "created": "2026-01-31T12:00:59+00:00",
        "n": 60,
        "verdict": found.to_json(),
        "toxicity": toxicity.to_json(),
        "reward": {"before": {"mean": -0.5, "std": 2.0}, "after": {"mean": 2.25, "std": 1.0}},
        "rouge_l": {"before": 0.31, "after": 0.32},
        "facts": None,
        "length": {"before": 30.0, "after": 31.0},
        "distinct_2": {"before": 0.5, "after": 0.48},
        "kl": 1.84,
        "seconds": {"sample": 12.34, "score": 3.0},
        "notes": ["The reward model knows only its own grammar. " * 4],
    }


def sample(index, before, after, response="fine", **more):
    return {
        "index": index,
        "query": "Summarise this.",
        "reference": "Both agree.",
        "response_before": "you fool",
        "response_after": response,
        "toxicity_before": before,
        "toxicity_after": after,
        **more,
    }


def columns(line):
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(unicodedata.category(c) == "Mn" for c in line)


def test_a_run_is_described_in_full(report):
    shown = text.describe_run(report)

    assert shown.startswith(
        "run first | recipe lab | complete | 2026-01-31 12:00 UTC | 60 prompts\n\n"
        "Verdict: improved. Toxicity fell from 0.500 to"
    )
    rows = {line[:20].strip(): line[20:].split() for line in shown.splitlines()}
    assert rows["toxicity, mean"][:2] == ["0.500", f"{report['toxicity']['after']['mean']:.3f}"]
    assert rows["toxicity, above 0.5"][0] == "50.0%"
    assert rows["reward"] == ["-0.500", "2.250", "+2.750"]
    assert rows["ROUGE-L"] == ["0.310", "0.320", "+0.010", "(+3.2%)"]
    assert "facts kept" not in rows
    assert ", p < 0.001, effect size d_z -" in " ".join(shown.split())
    assert "toxicity reduction 69.7%, 95% interval 6" in shown
    assert "prompts 60 better, 0 worse, 0 same, 0 unscored" in shown
    assert "KL to the reference: 1.84 nats per response" in shown
    assert "seconds: sample 12.3, score 3.0" in shown
    assert "notes:\n- The reward model" in shown


def test_a_report_of_a_checkpoint_says_which_one(report):
    report["training"] = {"checkpoint": {"name": "best", "step": 20, "objective": 1.5}}

    heading = text.describe_run(report).partition("\n")[0]

    assert heading.startswith("run first | recipe lab | complete | checkpoint of step 20 | 2026")


@pytest.mark.parametrize("width", [None, 200, 100, 80, 60, 46])
def test_lines_fit_a_terminal(report, width):
    texts = ["word " * 200, "汉字" * 300, "x" * 999, "a\u0301" * 5000]
    samples = [sample(i, 0.9, i / 9, response) for i, response in enumerate(texts)]

    shown = text.describe_run(report, samples, width)

    assert max(columns(line) for line in shown.splitlines()) <= min(width or 200, text.WIDTH)
    assert len(shown) < 20_000
    rows = {line[:19].strip(): line[19:].split() for line in shown.splitlines()}
    assert rows["toxicity, mean"][0] == "0.500"
    assert rows["ROUGE-L"][:3] == ["0.310", "0.320", "+0.010"]


def test_best_middle_and_worst_samples_are_shown_side_by_side(report):
    samples = [sample(i, 0.5, after) for i, after in enumerate([0.1, 0.2, 0.4, 0.9, None])]

    shown = text.describe_run(report, iter(samples))

    titles = [line.split(" --")[0] for line in shown.splitlines() if line.startswith("---")]
    assert titles == [
        "--- most improved: sample 0",
        "--- in the middle: sample 2",
        "--- least improved: sample 3",
    ]
    assert "you fool" + " " * 40 + " | fine" in shown
    assert "before, toxicity 0.500" in shown


def test_few_or_unscored_samples_are_shown_in_order(report):
    shown = text.describe_run(report, [sample(7, None, None, response=None)])

    assert "--- example: sample 7" in shown
    assert "(empty)" in shown
    assert "toxicity -" in shown


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\r\nnext\x00\u2028\u200bend\ud800"


def test_model_output_cannot_steer_the_terminal(report):
    report["run_id"] = report["recipe"] = HOSTILE
    report["notes"] = [HOSTILE]
    report["seconds"] = {HOSTILE: 1.0}
    report["verdict"] = {"name": HOSTILE, "sentence": HOSTILE, "reasons": [HOSTILE]}
    hostile = sample(HOSTILE, 0.9, 0.1, HOSTILE, query=HOSTILE, reference=HOSTILE)

    shown = text.describe_run(report, [hostile]) + text.list_line(report)

    assert text.printable(shown.replace("\n", "")) == shown.replace("\n", "").strip()
    assert "\\x1b[2J" in shown
    assert "\\u202e" in shown


INVISIBLE = (
    "\u061c\u180e\u00ad\u034f\u115f\u1160\u17b4\u17b5\u200b\u200d"
    "\u2066\u3164\ufeff\uffa0\U000e0041\U000e0101"
)


@pytest.mark.parametrize("character", INVISIBLE)
def test_an_invisible_character_is_written_out_in_every_text_of_a_run(report, character):
    name = f"a{character}b"
    report |= {"run_id": name, "recipe": name, "status": name, "notes": [name]}
    report["verdict"] = {"name": name, "sentence": name, "reasons": [name]}

    shown = text.describe_run(report) + text.list_line(report) + text.list_table([report], 200)

    assert character not in shown
    assert f"{ord(character):x}" in shown


def test_every_format_character_of_unicode_is_written_out():
    codes = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Cf"]
    variations = [chr(c) for first in (0xFE00, 0xE0100) for c in range(first, first + 16)]

    left = [
        c for c in codes + variations if text.printable(f"a{c}b") != "ab" and c in text.printable(c)
    ]

    assert len(codes) > 100
    assert left == []


def test_an_emoji_stays_without_the_choice_of_its_style():
    assert text.printable("\u2764\ufe0f \u00e9\u0301 \u6c49") == "\u2764 \u00e9\u0301 \u6c49"


@given(st.text())
def test_printable_text_is_one_line_without_control_characters(anything):
    shown = text.printable(anything)

    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert text.printable(shown) == shown


def test_every_part_may_be_missing(report):
    for key in report:
        less = copy.deepcopy(report)
        del less[key]
        assert text.describe_run(less)
        assert text.list_line(less)
        less[key] = None
        assert text.describe_run(less)
        assert text.list_line(less)
    assert text.describe_run({"run_id": "x"}) == "run x | recipe ?"


def test_metrics_that_do_not_exist_are_left_out(report):
    report["toxicity"] = compare([0.0], [0.0]).to_json()

    shown = text.describe_run(report)

    assert "toxicity reduction" not in shown
    assert "-0.000" not in shown


def test_a_broken_floor_is_reported_once(report):
    toxicity = compare(BEFORE, AFTER, resamples=500)
    report["verdict"] = verdict(toxicity, {"kl": (None, 31.7)}).to_json()

    assert text.describe_run(report).count("31.7") == 1


def test_reasons_that_the_sentence_lacks_are_listed(report):
    report["verdict"] = {"name": "quality lost", "sentence": "See below.", "reasons": ["A.", "B."]}

    assert "Verdict: quality lost. See below.\n- A.\n- B." in text.describe_run(report)


def test_a_judge_has_rows_of_its_own(report):
    report["judge"] = compare(BEFORE, AFTER, resamples=200).to_json()

    shown = text.describe_run(report)

    assert "\njudge, mean" in shown
    assert "judge: change in toxicity" in shown


def test_a_list_has_one_line_per_run(report):
    line = text.list_line(report)

    assert line.split() == [
        "2026-01-31", "12:00", "first", "lab", "n=60",
        "0.500", "->", f"{report['toxicity']['after']['mean']:.3f}", "improved",
    ]  # fmt: skip
    report["run_id"] = "r" * 64
    assert columns(text.list_line(report)) <= text.WIDTH
    unfinished = {"run_id": "x", "status": "failed", "verdict": None, "toxicity": None}
    assert text.list_line(unfinished).endswith("failed")


def runs(count):
    toxicity = {"before": {"mean": 0.5}, "after": {"mean": 0.25}}
    return [
        {
            "run_id": f"lab-20261126-141449-456{i}",
            "recipe": "flan-t5-base",
            "status": "complete",
            "created": "2026-01-31T12:00:59+00:00",
            "n": 512,
            "verdict": {"name": "improved"},
            "toxicity": toxicity,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_list_fits_the_terminal(width):
    table = text.list_table([*runs(3), {"run_id": "汉" * 64}], width)

    lines = table.splitlines()
    assert len(lines) == 5
    assert max(map(columns, lines)) <= width
    assert "verdict" in lines[0]
    assert all("improved" in line for line in lines[1:4])
    if width >= 60:
        assert all("0.500 -> 0.250" in line for line in lines[1:4])


@pytest.mark.parametrize("width", [100, 60])
def test_a_list_says_that_a_clock_was_ahead(width):
    ahead = runs(1)[0] | {"created": "2999-01-31T12:00:59+00:00"}

    header, *lines = text.list_table([runs(1)[0], ahead], width).splitlines()

    assert header.startswith("created")
    assert lines[0].startswith("2026-01-31 ")
    assert lines[1].startswith("clock was ahead " if width == 100 else "ahead ")
    assert text.list_line(ahead).startswith("clock was ahead ")
    assert max(map(columns, lines)) <= width


def test_a_list_has_room_for_long_ids_on_a_wide_terminal():
    run = runs(1)[0] | {"run_id": "r" * 64}

    assert "r" * 64 in text.list_table([run], 200)
    assert text.list_table([run], 200).splitlines()[0].split() == [
        "created", "(UTC)", "run", "recipe", "prompts", "toxicity", "verdict",
    ]  # fmt: skip


def test_a_list_shows_hostile_names_as_text():
    table = text.list_table([runs(1)[0] | {"run_id": HOSTILE, "recipe": HOSTILE}], 100)

    assert text.printable(table.replace("\n", "")) == table.replace("\n", "").strip()


def test_a_toxicity_that_rose_is_an_increase(report):
    report["toxicity"] = compare(AFTER, BEFORE, resamples=2000).to_json()

    line = next(line for line in text.describe_run(report).splitlines() if "increase" in line)

    share, low, high = map(float, re.findall(r"[\d.]+(?=%)", line.replace("95% interval", "")))
    assert line.startswith("toxicity increase ")
    assert 0 < low < share < high


def test_a_share_of_what_the_table_shows_with_one_digit_is_left_out(report):
    report["rouge_l"] = {"before": 0.0056, "after": 0.0079}

    (line,) = [each for each in text.describe_run(report).splitlines() if "ROUGE-L" in each]

    assert line.split() == ["ROUGE-L", "0.006", "0.008", "+0.002"]
