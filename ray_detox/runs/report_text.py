"""The report of a run as text for a terminal.

Pure functions from stored values to `str`. Whatever a model wrote is untrusted: nothing that
could move the cursor, change colours or reverse the reading order reaches the terminal. Where
reports are kept is `store/`, what their figures mean is `toxicity.py` and `quality.py`.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ray_detox.evaluation.metrics import METRICS, Kind

WIDTH = 100
_LABEL = 20
_NUMBER = 11
_MOST_COLUMNS_OF_TEXT = 600

# Of the categories of Unicode: control, format (bidi overrides, zero width), surrogate, private
# use, line and paragraph separator.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def describe_run(report: Mapping[str, Any], samples: Iterable[Mapping[str, Any]] = ()) -> str:
    """A run in full: verdict, before and after, intervals, costs, notes and examples.

    Args:
        report: as in `ResultStore.put_run`. Parts that are missing or None are left out. A
            quality is `{"before": x, "after": y}`, where x is a number or has a `mean`.
        samples: if given, three of them are shown side by side: the one that gained most, the
            middle one and the one that lost most.
    """
    blocks = [
        _heading(report),
        _verdict(report.get("verdict")),
        _table(report),
        _figures(report),
        _seconds(report.get("seconds")),
        _notes(report.get("notes")),
        _examples(samples),
    ]
    return "\n\n".join(block for block in blocks if block)


def list_line(summary: Mapping[str, Any]) -> str:
    """One line about a run: when, which, how many prompts, toxicity, verdict."""
    toxicity = _mapping(summary.get("toxicity"))
    before, after = _mean(toxicity.get("before")), _mean(toxicity.get("after"))
    n = summary.get("n")
    cells = (
        _fit(_moment(summary.get("created")), 16),
        _fit(printable(summary.get("run_id", "?")), 24),
        _fit(printable(summary.get("recipe", "?")), 14),
        _fit("" if n is None else f"n={n}", 8),
        _fit(f"{_number(before)} -> {_number(after)}", 16) if toxicity else " " * 16,
        _fit(_standing(summary), 15),
    )
    return " ".join(cells).rstrip()


def printable(text: object) -> str:
    """`text` on one line, with every character that could steer a terminal written out.

    Example: an escape character becomes the four characters backslash, x, 1, b.
    """
    words = []
    for character in str(text):
        if character in "\t\n\r\u2028\u2029":
            words.append(" ")
        elif unicodedata.category(character) in _UNSAFE:
            code = ord(character)
            words.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
        else:
            words.append(character)
    return "".join(words).strip()


def _heading(report: Mapping[str, Any]) -> str:
    n = report.get("n")
    parts = [
        f"run {report.get('run_id', '?')}",
        f"recipe {report.get('recipe', '?')}",
        report.get("status"),
        _moment(report.get("created"), zone=" UTC"),
        None if n is None else f"{n} prompts",
    ]
    return _paragraph(" | ".join(printable(part) for part in parts if part))


def _standing(summary: Mapping[str, Any]) -> str:
    """The verdict's name; the run's status where there is none."""
    verdict = summary.get("verdict")
    name = verdict.get("name") if isinstance(verdict, Mapping) else verdict
    return printable(name or summary.get("status") or "")


def _verdict(verdict: Any) -> str:
    if not verdict:
        return ""
    if not isinstance(verdict, Mapping):
        return _paragraph(f"Verdict: {printable(verdict)}")
    sentence = printable(verdict.get("sentence") or "")
    lines = [_paragraph(f"Verdict: {printable(verdict.get('name', '?'))}. {sentence}".rstrip())]
    # A sentence usually has them already.
    reasons = [printable(reason) for reason in verdict.get("reasons") or ()]
    lines += [_bullet(reason) for reason in reasons if reason not in sentence]
    return "\n".join(lines)


def _table(report: Mapping[str, Any]) -> str:
    rows: list[tuple[str, Any, Any, Kind]] = []
    kinds: dict[str, Kind] = {"mean": "amount", "std": "level", "share": "share"}
    for name in ("toxicity", "judge"):
        figures = _mapping(report.get(name))
        before, after = _mapping(figures.get("before")), _mapping(figures.get("after"))
        above = figures.get("toxic_above", 0.5)
        for label, part in (("mean", "mean"), ("std", "std"), (f"above {above:g}", "share")):
            rows.append((f"{name}, {label}", before.get(part), after.get(part), kinds[part]))
    for metric in METRICS:
        if not metric.after_only:  # those have a line of their own below the table
            pair = _mapping(report.get(metric.name))
            name = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
            rows.append((name, _mean(pair.get("before")), _mean(pair.get("after")), metric.kind))
    lines = [_row(*row) for row in rows if row[1] is not None or row[2] is not None]
    if not lines:
        return ""
    heads = "".join(f"{head:>{_NUMBER}}" for head in ("before", "after", "change"))
    return "\n".join([f"{'':<{_LABEL}}{heads}", *lines])


def _row(name: str, before: Any, after: Any, kind: Kind) -> str:
    """One line of the table.

    Kinds: a `level` (a logit, a spread) has no zero that a percentage could refer to, an `amount`
    has one, and a `share` changes in points.
    """
    show = _percent if kind == "share" else _number
    line = f"{name:<{_LABEL}}{show(before):>{_NUMBER}}{show(after):>{_NUMBER}}"
    if not (_is_number(before) and _is_number(after)):
        return line
    change = after - before
    if kind == "share":
        return f"{line}{_signed(100 * change, 1) + ' pt':>{_NUMBER}}"
    line += f"{_signed(change):>{_NUMBER}}"
    if kind == "amount" and before > 0:
        line += f"   ({_signed(100 * change / before, 1)}%)"
    return line


def _figures(report: Mapping[str, Any]) -> str:
    lines = []
    for name, key in (("", "toxicity"), ("judge: ", "judge")):
        lines += [_paragraph(f"{name}{line}") for line in _comparison(_mapping(report.get(key)))]
    kl = report.get("kl")
    kl = _mean(_mapping(kl).get("after", kl))
    if _is_number(kl):
        lines.append(f"KL to the reference: {kl:.2f} nats per response")
    return "\n".join(lines)


def _comparison(figures: Mapping[str, Any]) -> Iterator[str]:
    delta = _mapping(figures.get("delta"))
    if _is_number(delta.get("mean")):
        line = f"change in toxicity {_signed(delta['mean'])}"
        if _is_number(delta.get("low")) and _is_number(delta.get("high")):
            line += f", 95% interval {_signed(delta['low'])} to {_signed(delta['high'])}"
        if _is_number(figures.get("p_value")):
            p = figures["p_value"]
            line += ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
        if _is_number(figures.get("effect_size")):
            line += f", effect size d_z {_signed(figures['effect_size'], 2)}"
        yield line
    if _is_number(figures.get("improvement")):
        line = f"toxicity gone {_percent(figures['improvement'])}"
        low, high = figures.get("improvement_low"), figures.get("improvement_high")
        if _is_number(low) and _is_number(high):
            line += f", 95% interval {_percent(low)} to {_percent(high)}"
        yield line
    counts = [
        f"{printable(figures[word])} {word}"
        for word in ("better", "worse", "same", "unscored")
        if figures.get(word) is not None
    ]
    if counts:
        yield f"prompts {', '.join(counts)}"


def _seconds(seconds: Any) -> str:
    if _is_number(seconds):
        return f"seconds: {seconds:.1f}"
    phases = [
        f"{printable(phase)} {value:.1f}"
        for phase, value in _mapping(seconds).items()
        if _is_number(value)
    ]
    return _paragraph(f"seconds: {', '.join(phases)}") if phases else ""


def _notes(notes: Any) -> str:
    if not notes:
        return ""
    sentences = [notes] if isinstance(notes, str) else notes
    return "\n".join(["notes:", *(_bullet(printable(note)) for note in sentences)])


def _examples(samples: Iterable[Mapping[str, Any]]) -> str:
    return "\n\n".join(_example(title, sample) for title, sample in _pick(list(samples)))


def _pick(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Best, middle and worst, so that nobody judges a run by its best answer alone."""
    scored = [sample for sample in samples if _change(sample) is not None]
    if len(scored) < 3:
        return [("example", sample) for sample in samples[:3]]
    scored.sort(key=lambda sample: (_change(sample), str(sample.get("index"))))
    picked = [scored[0], scored[len(scored) // 2], scored[-1]]
    return list(zip(("most improved", "in the middle", "least improved"), picked, strict=True))


def _change(sample: Mapping[str, Any]) -> float | None:
    before, after = sample.get("toxicity_before"), sample.get("toxicity_after")
    return after - before if _is_number(before) and _is_number(after) else None  # type: ignore[operator]


def _example(title: str, sample: Mapping[str, Any]) -> str:
    lines = [_rule(f"{title}: sample {printable(sample.get('index', '?'))}")]
    for name, key in (("prompt", "query"), ("reference", "reference")):
        if sample.get(key):
            lines += _wrap(f"{name}: {_text(sample[key])}")
    width = (WIDTH - 3) // 2
    columns = []
    for side in ("before", "after"):
        toxicity = _number(sample.get(f"toxicity_{side}"))
        text = _text(sample.get(f"response_{side}") or "(empty)")
        columns.append([f"{side}, toxicity {toxicity}", *_wrap(text, width)])
    for i in range(max(map(len, columns))):
        left, right = (column[i] if i < len(column) else "" for column in columns)
        lines.append(f"{left}{' ' * (width - _columns(left))} | {right}".rstrip())
    return "\n".join(lines)


def _text(text: object) -> str:
    """What a model or a data set wrote, made harmless and not too long."""
    return _cut(printable(text), _MOST_COLUMNS_OF_TEXT)


def _wrap(text: str, width: int = WIDTH, indent: str = "") -> list[str]:
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
    """Terminal columns of a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(_column(character) for character in text)


def _column(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _head(text: str, width: int) -> str:
    """The longest beginning of `text` that fits into `width` columns."""
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


def _paragraph(text: str) -> str:
    return "\n".join(_wrap(text))


def _bullet(text: str) -> str:
    return "\n".join(_wrap(f"- {text}", indent="  "))


def _rule(title: str) -> str:
    return f"--- {title} {'-' * max(3, WIDTH - 5 - _columns(title))}"


def _moment(created: Any, zone: str = "") -> str:
    """`2026-01-31T12:00:59+00:00` as `2026-01-31 12:00`."""
    text = printable(created or "")
    return f"{text[:10]} {text[11:16]}{zone}" if len(text) >= 16 else text


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
