"""What a person sees of a run, and the same figures on disk."""

import dataclasses
import io
import json

from ray_detox.records import UpdateStats
from ray_detox.runs.console import Console, step_line
from ray_detox.runs.metrics_log import MetricsLog, read_metrics


def stats(step: int, **changes: object) -> dict[str, object]:
    """Figures of a step, each its own number."""
    fields = dataclasses.fields(UpdateStats)
    found: dict[str, object] = {f.name: i / 16 for i, f in enumerate(fields)}
    return found | {"step": step, "minibatches": 4, "truncated": 0, "terms": {}} | changes


def test_a_step_is_one_line_in_fixed_order_with_units():
    figures = stats(
        7, score=2.314, toxicity=0.0349, kl=0.43, clip_fraction=0.07, explained_variance=0.62,
        length=31.2, seconds=5.07,
    )  # fmt: skip

    assert step_line(figures, 200) == (
        "step   7/200 | score +2.31 | toxicity 0.03 | kl  0.43 nat | clip   7% "
        "| explained variance +0.62 | length  31 | 5.1 s"
    )


def test_metrics_hold_one_row_per_step_also_where_steps_are_done_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.add(stats(step, score=float(step)))
    log.close()

    resumed = MetricsLog(tmp_path)
    for step in (2, 3, 4):
        resumed.add(stats(step, score=10.0 * step))
    resumed.close()

    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["score"]) for row in rows] == [(1, 1), (2, 20), (3, 30), (4, 40)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_metrics_keep_every_figure_by_name(tmp_path):
    log = MetricsLog(tmp_path)
    log.add(stats(1, terms={"get_repetition_penalty_reward": -0.25}))
    log.close()

    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(row) == {f.name for f in dataclasses.fields(UpdateStats)}
    assert row["terms"] == {"get_repetition_penalty_reward": -0.25}


def test_a_stage_says_what_it_made_and_its_time_adds_up():
    stream = io.StringIO()
    console = Console(stream)

    for _ in range(2):
        with console.stage("train", "3 steps") as made:
            made.append("adapter saved")

    lines = stream.getvalue().splitlines()
    assert lines[0] == "train     3 steps"
    assert lines[1] == "          adapter saved"
    assert lines[2].startswith("          done in ")
    assert list(console.seconds) == ["train"]


def test_without_a_terminal_a_long_stage_prints_no_cursor_codes():
    stream = io.StringIO()
    console = Console(stream, seconds_between=0)

    with console.bar(64, "prompts") as bar:
        bar.add(32)

    assert stream.getvalue() == "          32/64 prompts\n"
