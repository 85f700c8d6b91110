"""The report of a run as text for a terminal.

Pure functions from stored values to `str`. Text that a model wrote is untrusted: `printable`
removes from it what could move the cursor, change colours or reverse the reading order. Reports
are kept by `store/`; `evaluation/` computes their metrics.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ray_detox.evaluation.metrics import METRICS, Kind
from ray_detox.runs.printable import printable as printable  # also imported from here
from ray_detox.store.pages import is_from_future

WIDTH = 100
"""Columns of a report in a file, and most columns on a terminal: longer lines are hard to read."""

CLOCK_AHEAD = "clock was ahead"
"""In a list, in place of a time that lies in the future."""

_NARROWEST = 46
_MOST_COLUMNS_OF_TEXT = 600


def describe_run(
    report: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]] = (),
    width: int | None = None,
) -> str:
    """Describe a run in full: verdict, before and after, intervals, costs, notes and examples.

    Args:
        report: as in `ResultStore.put_run`. Parts that are missing or None are left out. A
            metric is `{"before": x, "after": y}`, where x is a number or has a `mean`.
        samples: if given, three of them are shown side by side: the one that gained most, the
            middle one and the one that lost most.
        width: columns of the terminal; None takes `WIDTH`, which is also the most that is used.
    """
    width = max(_NARROWEST, min(WIDTH, width or WIDTH))
    blocks = [
        _heading(report, width),
        _verdict(report.get("verdict"), width),
        _table(report, width),
        _metrics(report, width),
        _seconds(report.get("seconds"), width),
        _notes(report.get("notes"), width),
        _examples(samples, width),
    ]
    return "\n\n".join(block for block in blocks if block)


def describe_result(report: Mapping[str, Any]) -> str:
    """Describe the verdict and the measurements of a run, without its prompts, in a file's width."""
    blocks = [
        _verdict(report.get("verdict"), WIDTH),
        _table(report, WIDTH),
        _metrics(report, WIDTH),
    ]
    return "\n\n".join(block for block in blocks if block)


def list_line(summary: Mapping[str, Any]) -> str:
    """Describe a run in one line: when, which, how many prompts, toxicity, verdict."""
    created, run_id, recipe, prompts, toxicity, verdict = _cells(summary)
    cells = (
        _fit(created, 16),
        _fit(run_id, 24),
        _fit(recipe, 14),
        _fit(f"n={prompts}" if prompts else "", 8),
        _fit(toxicity, 16),
        _fit(verdict, 15),
    )
    return " ".join(cells).rstrip()


def list_table(summaries: Sequence[Mapping[str, Any]], width: int) -> str:
    """Describe runs in a table with a header that fits a terminal.

    Columns are as wide as their content. If that is too much, the table does without the number
    of prompts, the recipe and the time of day, and cuts long run ids; if even that is too much,
    without the date and the toxicity.
    """
    names = ("created (UTC)", "run", "recipe", "prompts", "toxicity", "verdict")
    cells = zip(names, *map(_cells, summaries), strict=True)
    columns = {name: [name, *texts] for name, *texts in cells}

    def excess(longest_id: int | None = None) -> int:
        widths = {name: max(map(_columns, texts)) for name, texts in columns.items()}
        widths["run"] = min(widths["run"], longest_id or widths["run"])
        return sum(widths.values()) + 2 * (len(widths) - 1) - width

    for name in ("prompts", "recipe"):
        if excess() > 0:
            del columns[name]
    if excess() > 0:
        date = columns["created (UTC)"]
        short = ("ahead" if text == CLOCK_AHEAD else text[:10] for text in date[1:])
        columns["created (UTC)"] = ["created", *short]
    for name in ("created (UTC)", "toxicity"):
        if excess(longest_id=12) > 0:
            del columns[name]
    widths = {name: max(map(_columns, texts)) for name, texts in columns.items()}
    widths["run"] = max(4, widths["run"] - max(0, excess()))
    rows = zip(*columns.values(), strict=True)
    return "\n".join("  ".join(map(_fit, row, widths.values())).rstrip() for row in rows)


def _heading(report: Mapping[str, Any], width: int) -> str:
    n = report.get("n")
    parts = [
        f"run {report.get('run_id', '?')}",
        f"recipe {report.get('recipe', '?')}",
        report.get("status"),
        _checkpoint(_mapping(report.get("training")).get("checkpoint")),
        _moment(report.get("created"), zone=" UTC"),
        None if n is None else f"{n} prompts",
    ]
    return _paragraph(" | ".join(printable(part) for part in parts if part), width)


def _checkpoint(found: Any) -> str | None:
    """Name the checkpoint that a report measured, if it is not the run's final adapter."""
    return f"checkpoint of step {found.get('step')}" if isinstance(found, Mapping) else None


def _cells(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """When, run, recipe, prompts, toxicity and verdict of a run, for a list."""
    toxicity = _mapping(summary.get("toxicity"))
    before, after = _mean(toxicity.get("before")), _mean(toxicity.get("after"))
    created = summary.get("created")
    return (
        CLOCK_AHEAD if is_from_future(created) else _moment(created),
        printable(summary.get("run_id", "?")),
        printable(summary.get("recipe", "?")),
        printable("" if summary.get("n") is None else summary["n"]),
        f"{_number(before)} -> {_number(after)}" if toxicity else "",
        _standing(summary),
    )


def _standing(summary: Mapping[str, Any]) -> str:
    """Return the name of the verdict, or the run's status if it has none."""
    verdict = summary.get("verdict")
    name = verdict.get("name") if isinstance(verdict, Mapping) else verdict
    return printable(name or summary.get("status") or "")


def _verdict(verdict: Any, width: int) -> str:
    if not verdict:
        return ""
    if not isinstance(verdict, Mapping):
        return _paragraph(f"Verdict: {printable(verdict)}", width)
    sentence = printable(verdict.get("sentence") or "")
    name = printable(verdict.get("name", "?"))
    lines = [_paragraph(f"Verdict: {name}. {sentence}".rstrip(), width)]
    # A sentence usually has them already.
    reasons = _texts(verdict.get("reasons"))
    lines += [_bullet(reason, width) for reason in reasons if reason not in sentence]
    return "\n".join(lines)


def _table(report: Mapping[str, Any], width: int) -> str:
    rows: list[tuple[str, Any, Any, Kind]] = []
    kinds: dict[str, Kind] = {"mean": "amount", "std": "level", "share": "share"}
    for name in ("toxicity", "judge"):
        scores = _mapping(report.get(name))
        before, after = _mapping(scores.get("before")), _mapping(scores.get("after"))
        above = scores.get("toxic_above")
        above = above if _is_number(above) else 0.5
        for label, part in (("mean", "mean"), ("std", "std"), (f"above {above:g}", "share")):
            rows.append((f"{name}, {label}", before.get(part), after.get(part), kinds[part]))
    for metric in METRICS:
        if not metric.after_only:  # those have a line of their own below the table
            pair = _mapping(report.get(metric.name))
            name = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
            rows.append((name, _mean(pair.get("before")), _mean(pair.get("after")), metric.kind))
    rows = [row for row in rows if row[1] is not None or row[2] is not None]
    if not rows:
        return ""
    lines = [("", "before", "after", "change", ""), *(_row(*row) for row in rows)]
    first, column, gap = (20, 11, 3) if width >= 67 else (19, 9, 1)
    texts = []
    for name, *cells, percent in lines:
        line = f"{name:<{first}}{''.join(f'{cell:>{column}}' for cell in cells)}"
        # On a narrow terminal the percentage is what a reader can do without.
        fits = percent and len(line) + gap + len(percent) <= width
        texts.append(f"{line}{' ' * gap}{percent}" if fits else line)
    return "\n".join(text.rstrip() for text in texts)


def _row(name: str, before: Any, after: Any, kind: Kind) -> tuple[str, str, str, str, str]:
    """Return the cells of a row: name, before, after, change, and the change in percent.

    Kinds: a `level` (a logit, a spread) has no zero that a percentage could refer to, an `amount`
    has one, and a `share` changes in points.
    """
    show = _percent if kind == "share" else _number
    if not (_is_number(before) and _is_number(after)):
        return name, show(before), show(after), "", ""
    change = after - before
    if kind == "share":
        return name, show(before), show(after), f"{_signed(100 * change, 1)} pt", ""
    # A percentage of a value of which the table shows one digit would not be that of what it shows.
    relative = kind == "amount" and before >= 0.01
    percent = f"({_signed(100 * change / before, 1)}%)" if relative else ""
    return name, show(before), show(after), _signed(change), percent


def _metrics(report: Mapping[str, Any], width: int) -> str:
    lines = []
    for name, key in (("", "toxicity"), ("judge: ", "judge")):
        for line in _comparison(_mapping(report.get(key))):
            lines.append(_paragraph(f"{name}{line}", width))
    kl = report.get("kl")
    kl = _mean(_mapping(kl).get("after", kl))
    if _is_number(kl):
        lines.append(_paragraph(f"KL to the reference: {kl:.2f} nats per response", width))
    return "\n".join(lines)


def _comparison(metrics: Mapping[str, Any]) -> Iterator[str]:
    delta = _mapping(metrics.get("delta"))
    if _is_number(delta.get("mean")):
        line = f"change in toxicity {_signed(delta['mean'])}"
        if _is_number(delta.get("low")) and _is_number(delta.get("high")):
            line += f", 95% interval {_signed(delta['low'])} to {_signed(delta['high'])}"
        if _is_number(metrics.get("p_value")):
            p = metrics["p_value"]
            line += ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
        if _is_number(metrics.get("effect_size")):
            line += f", effect size d_z {_signed(metrics['effect_size'], 2)}"
        yield line
    if _is_number(metrics.get("improvement")):
        name, sign = "reduction", 1
        low, high = metrics.get("improvement_low"), metrics.get("improvement_high")
        if round(metrics["improvement"], 3) < 0:  # it rose
            name, sign = "increase", -1
            low, high = high, low
        line = f"toxicity {name} {_percent(sign * metrics['improvement'])}"
        if _is_number(low) and _is_number(high):
            ends = [_percent(sign * end) for end in (low, high)]  # type: ignore[operator]
            line += f", 95% interval {' to '.join(ends)}"
        yield line
    counts = [
        f"{printable(metrics[word])} {word}"
        for word in ("better", "worse", "same", "unscored")
        if metrics.get(word) is not None
    ]
    if counts:
        yield f"prompts {', '.join(counts)}"


def _seconds(seconds: Any, width: int) -> str:
    if _is_number(seconds):
        return f"seconds: {seconds:.1f}"
    phases = [
        f"{printable(phase)} {value:.1f}"
        for phase, value in _mapping(seconds).items()
        if _is_number(value)
    ]
    return _paragraph(f"seconds: {', '.join(phases)}", width) if phases else ""


def _notes(notes: Any, width: int) -> str:
    sentences = _texts(notes)
    return "\n".join(["notes:", *(_bullet(note, width) for note in sentences)] if sentences else [])


def _examples(samples: Iterable[Mapping[str, Any]], width: int) -> str:
    return "\n\n".join(_example(title, sample, width) for title, sample in _pick(list(samples)))


def _pick(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Pick the best, middle and worst sample: the best alone would flatter the run."""
    scored = [sample for sample in samples if _change(sample) is not None]
    if len(scored) < 3:
        return [("example", sample) for sample in samples[:3]]
    scored.sort(key=lambda sample: (_change(sample), str(sample.get("index"))))
    picked = [scored[0], scored[len(scored) // 2], scored[-1]]
    return list(zip(("most improved", "in the middle", "least improved"), picked, strict=True))


def _change(sample: Mapping[str, Any]) -> float | None:
    before, after = sample.get("toxicity_before"), sample.get("toxicity_after")
    return after - before if _is_number(before) and _is_number(after) else None  # type: ignore[operator]


def _example(title: str, sample: Mapping[str, Any], width: int) -> str:
    lines = [_rule(f"{title}: sample {printable(sample.get('index', '?'))}", width)]
    for name, key in (("prompt", "query"), ("reference", "reference")):
        if sample.get(key):
            lines += _wrap(f"{name}: {_text(sample[key])}", width)
    half = (width - 3) // 2
    columns = []
    for side in ("before", "after"):
        toxicity = _number(sample.get(f"toxicity_{side}"))
        text = _text(sample.get(f"response_{side}") or "(empty)")
        columns.append([*_wrap(f"{side}, toxicity {toxicity}", half), *_wrap(text, half)])
    for i in range(max(map(len, columns))):
        left, right = (column[i] if i < len(column) else "" for column in columns)
        lines.append(f"{left}{' ' * (half - _columns(left))} | {right}".rstrip())
    return "\n".join(lines)


def _text(text: object) -> str:
    """Make text of a model or a data set harmless and not too long."""
    return _cut(printable(text), _MOST_COLUMNS_OF_TEXT)


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break text into lines of at most `width` terminal columns, between words where possible."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line.strip() and _columns(line) + 1 + _columns(word) <= width:
            line += f" {word}"
            continue
        if line.strip():
            lines.append(line)
            line = indent
        while _columns(line) + _columns(word) > width:
            head = _head(word, width - _columns(line))
            lines.append(line + head)
            line, word = indent, word[len(head) :]
        line += word
    return [*lines, line]


def _columns(text: str) -> int:
    """Count the terminal columns of a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_column(character) for character in text)


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _head(text: str, width: int) -> str:
    """Return the longest beginning of `text` that fits into `width` columns."""
    taken = 0
    for i, character in enumerate(text):
        taken += _column(character)
        if taken > width:
            return text[:i]
    return text


def _cut(text: str, width: int) -> str:
    # Combining characters take no columns; a bound on characters keeps a tower of them short.
    head = _head(text[: 4 * width], width)
    return text if len(head) == len(text) else f"{_head(head, width - 3)}..."


def _fit(text: str, width: int) -> str:
    text = _cut(text, width)
    return text + " " * (width - _columns(text))


def _paragraph(text: str, width: int) -> str:
    return "\n".join(_wrap(text, width))


def _bullet(text: str, width: int) -> str:
    return "\n".join(_wrap(f"- {text}", width, indent="  "))


def _rule(title: str, width: int) -> str:
    return _cut(f"--- {title} {'-' * max(3, width - 5 - _columns(title))}", width)


def _moment(created: Any, zone: str = "") -> str:
    """Shorten `2026-01-31T12:00:59+00:00` to `2026-01-31 12:00`."""
    text = printable(created or "")
    return f"{text[:10]} {text[11:16]}{zone}" if len(text) >= 16 else text


def _texts(value: Any) -> list[str]:
    """Return a text, or the texts of a list, made harmless; none for other values."""
    texts = [value] if isinstance(value, str) else value
    return [printable(text) for text in texts if text] if isinstance(texts, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, Mapping) else value


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{_zero(value, 3):.3f}" if _is_number(value) else "-"


def _percent(value: Any) -> str:
    return f"{_zero(100 * value, 1):.1f}%" if _is_number(value) else "-"


def _signed(value: float, digits: int = 3) -> str:
    return f"{_zero(value, digits):+.{digits}f}"


def _zero(value: float, digits: int) -> float:
    # Keeps "-0.000" out of tables.
    return 0.0 if round(value, digits) == 0 else value
