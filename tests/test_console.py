"""Progress of a run on a terminal and elsewhere, and the metrics of its steps on disk."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ray_detox.records import UpdateStats
from ray_detox.runs.console import Console, step_line, terminal_width
from ray_detox.runs.metrics_log import MetricsLog, read_metrics
from tests.environment import python_path
from tests.pseudo_terminal import on_terminal, screen


def stats(step: int, **changes: object) -> UpdateStats:
    """Return the metrics of a step, each with a value of its own."""
    fields = dataclasses.fields(UpdateStats)
    found: dict[str, object] = {f.name: i / 16 for i, f in enumerate(fields)}
    found |= {"step": step, "minibatches": 4, "truncated": 0, "terms": {}} | changes
    return UpdateStats(**found)  # type: ignore[arg-type]


def test_a_step_is_one_line_in_fixed_order_with_units():
    metrics = stats(
        7, score=2.314, toxicity=0.0349, kl=0.43, clip_fraction=0.07, explained_variance=0.62,
        length=31.2, finished=0.984, seconds=5.07,
    )  # fmt: skip

    assert step_line(metrics, 200) == (
        "step   7/200 | score +2.31 | toxicity 0.03 | kl  0.43 nat | clip   7% "
        "| explained variance +0.62 | length  31 | finished  98% | 5.1 s"
    )
    without_critic = step_line(dataclasses.replace(metrics, explained_variance=0.0), 200)
    assert "| clip   7% | length  31 |" in without_critic


def test_metrics_have_one_row_per_step_after_steps_are_repeated(tmp_path):
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


def test_metrics_keep_every_field_by_name(tmp_path):
    log = MetricsLog(tmp_path)
    log.add(stats(1, terms={"get_repetition_penalty_reward": -0.25}))
    log.close()

    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(row) == {f.name for f in dataclasses.fields(UpdateStats)}
    assert row["terms"] == {"get_repetition_penalty_reward": -0.25}


def test_a_stage_prints_its_results_and_adds_up_its_time():
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


def test_the_time_of_a_stage_that_is_stopped_counts():
    console = Console(io.StringIO())

    def stop():
        with console.stage("train", "3 steps"):
            assert console.elapsed()["train"] > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()

    assert console.elapsed() == console.seconds
    assert console.seconds["train"] > 0


def test_a_stream_that_is_not_a_terminal_gets_plain_lines():
    stream = io.StringIO()
    console = Console(stream, seconds_between=0)

    with console.bar(64, "prompts") as bar:
        bar.add(32)

    assert stream.getvalue() == "          32/64 prompts\n"


def test_a_divergence_that_rounds_to_zero_has_no_sign():
    assert "| kl  0.00 nat |" in step_line(stats(1, kl=-0.0004), 10)


@pytest.mark.parametrize("width", [200, 110, 80, 60, 40])
def test_a_step_line_fits_the_terminal(width):
    line = step_line(stats(7, score=2.314, kl=0.43, seconds=5.07), 200, width)

    assert len(line) <= width
    assert line.startswith("step   7/200 | ")
    assert "| toxicity 0.19 |" in line
    assert line.endswith("| 5.1 s")


def test_a_quiet_console_prints_nothing():
    stream = io.StringIO()
    console = Console(stream, seconds_between=0, quiet=True)

    with console.stage("train", "3 steps") as made, console.bar(3, "steps") as bar:
        made.append("adapter saved")
        bar.add(3)

    assert stream.getvalue() == ""
    assert list(console.seconds) == ["train"]


def test_lines_cannot_steer_a_terminal_or_fail_on_an_encoding():
    buffer = io.BytesIO()
    console = Console(io.TextIOWrapper(buffer, encoding="ascii"))

    console.line("left out: \x1b[2Jcaf\xe9 \u202e")

    assert buffer.getvalue() == b"left out: \\x1b[2Jcaf? \\u202e\n"


def test_a_stream_that_is_not_a_terminal_has_no_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")

    assert terminal_width(io.StringIO()) is None


# ---- on a terminal ---------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]

RUN = """
import sys, time
from ray_detox.runs.console import Console, step_line

console = Console()
with console.stage("evaluate", "40 prompts") as made, console.bar(40, "prompts") as bar:
    for i in range(4):
        bar.add(10)
        time.sleep(0.3)
        console.line(f"line {i} [bold]:smile: caf\\xe9 \\x1b[2J")
        print("a warning", i, file=sys.stderr)
    made.append("measured")
print("rich" in sys.modules)
"""


def without_colour(printed: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", printed)


@pytest.mark.parametrize("columns", [60, 200])
def test_a_bar_fits_the_terminal_and_lines_stand_above_it(columns):
    printed = on_terminal("-c", RUN, columns=columns)

    bars = re.findall(r"[^\r\n]*/40 prompts[^\r\n]*", without_colour(printed))
    frames = [re.sub(r"\x1b\[[\d?]*[A-Za-z]", "", bar) for bar in bars]
    assert frames
    assert all(len(frame) <= columns for frame in frames)
    assert any(re.search(r"/40 prompts +[\d.]+ prompts/s +\d+:\d\d left", f) for f in frames)
    lines = screen(printed)
    assert lines[0] == "evaluate  40 prompts"
    for i in range(4):
        # Neither markup nor emoji codes nor control codes of the text take effect.
        assert lines[2 * i + 1 : 2 * i + 3] == [
            f"line {i} [bold]:smile: café \\x1b[2J",
            f"a warning {i}",
        ]
    assert lines[9] == "          measured"
    assert lines[10].startswith("          done in ")
    assert lines[11] == "True"
    assert not any("/40" in line for line in lines), "the bar is gone"
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l"), "the cursor is back"


def test_no_color_leaves_the_bar_without_colours():
    colour = re.compile(r"\x1b\[[\d;]*(3[0-7]|38;|9[0-7])[\d;]*m")

    assert colour.search(on_terminal("-c", RUN))
    printed = on_terminal("-c", RUN, NO_COLOR="1")
    assert "/40 prompts" in printed
    assert not colour.search(printed)


def test_a_dumb_terminal_gets_plain_lines_and_no_rich():
    printed = on_terminal("-c", RUN, TERM="dumb")

    assert "\x1b" not in printed
    assert "line 3 [bold]:smile: café \\x1b[2J\r\n" in printed
    assert printed.endswith("False\r\n")


def test_a_terminal_with_an_ascii_encoding_gets_an_ascii_bar():
    printed = on_terminal("-c", RUN, PYTHONIOENCODING="ascii")

    assert printed.isascii()
    assert "/40 prompts" in printed
    assert "line 3 [bold]:smile: caf? \\x1b[2J" in screen(printed)


def test_a_pipe_gets_plain_lines_and_no_rich():
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=os.environ | {"PYTHONPATH": python_path(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        timeout=60,
    )

    lines = done.stdout.decode().splitlines()
    assert lines[0] == "evaluate  40 prompts"
    assert lines[1:5] == [f"line {i} [bold]:smile: café \\x1b[2J" for i in range(4)]
    assert lines[5] == "          measured"
    assert lines[-1] == "False"


def test_a_process_without_a_standard_output_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)

    assert terminal_width() is None
    Console().line("lost")


def test_a_command_goes_on_if_nobody_reads_its_output_any_more():
    """As with `ray-detox run lab | head -1`, or after a terminal was closed."""
    code = (
        "import sys\nfrom ray_detox.runs.console import Console\nconsole = Console()\n"
        "console.line('first')\nsys.stdin.readline()\n"
        "with console.stage('train', 'two steps'):\n    console.line('second')\nsys.exit(7)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "first\n"
    run.stdout.close()

    _, errors = run.communicate("go on\n", timeout=60)

    assert run.returncode == 7
    assert (
        errors == "ray-detox: nobody reads the output any more; the command goes on without it.\n"
    )


def test_a_full_disk_under_the_output_is_one_sentence():
    """Also at the exit, when Python writes what the stream still holds."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ray_detox", "schema"],
            env=os.environ | {"PYTHONPATH": python_path(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert done.returncode == 1
    expected = "No space left on device. Free some space there, and repeat the command."
    assert done.stderr == f"ray-detox: {expected}\n"


def test_another_error_of_the_output_is_raised():
    with suppress(OSError), open("/dev/full", "w") as full:  # closing it fails as well
        with pytest.raises(OSError, match="No space left"):
            Console(full).line("a line")
        assert not Console(full).quiet
