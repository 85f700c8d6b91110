"""From a row of data to a prompt: length filter, prompt text, identity and tokens.

Plain functions of values: no Ray, no random numbers (`draws.py`) and no files (`files.py`).
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_detox.config import DataConfig
from ray_detox.records import LeftOutRow, PreparedRow

PROBLEM = "ray-detox: why this row is left out"
"""Key of a row that could not be read, with the reason and the place in its file."""


def unreadable_row(reason: str, place: str) -> dict[str, Any]:
    """Return a row that stands for one that could not be read.

    Args:
        reason: for messages; the same for all rows with this fault, because they are counted by it.
        place: in the file, such as `line 7`.
    """
    return {PROBLEM: [reason, place]}


def reason_to_leave_out(row: Mapping[str, Any], config: DataConfig) -> str | None:
    """Return the reason why a row cannot become a prompt, for messages; None if it can."""
    if PROBLEM in row:
        return str(row[PROBLEM][0])
    dialogue = row.get(config.dialogue_column)
    if dialogue is None:
        return f"no {config.dialogue_column}"
    if not isinstance(dialogue, str):
        return f"{config.dialogue_column} is not text"
    if not dialogue.strip():
        return f"empty {config.dialogue_column}"
    try:
        dialogue.encode()
    except UnicodeEncodeError as error:
        # Python's own marks for bytes that are not UTF-8.
        is_bytes = "\udc80" <= dialogue[error.start] <= "\udcff"
        advice = (
            " (no UTF-8; convert the file from its encoding, such as: iconv -f cp1252 -t utf-8)"
            if is_bytes
            else ""
        )
        return f"{config.dialogue_column} is not valid Unicode{advice}"
    if len(dialogue) <= config.min_chars:
        return f"not over {config.min_chars} characters"
    if len(dialogue) > config.max_chars:
        return f"over {config.max_chars} characters"
    return None


def prompt_text(dialogue: str, config: DataConfig) -> str:
    """Return the prompt that asks for a summary of `dialogue`."""
    # str.format would interpret braces in the dialogue.
    return config.template.replace("{dialogue}", dialogue)


def prompt_id(text: str) -> str:
    """Return the identity of a prompt: 16 hexadecimal digits of a hash of its text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def prepare(
    rows: Sequence[Mapping[str, Any]], data: DataConfig, tokenizer: Any
) -> list[PreparedRow | LeftOutRow]:
    """Turn each raw row into a prompt with its tokens, or into the reason for leaving it out.

    Returns:
        One record per row, in the order of `rows`.
    """
    reasons = [reason_to_leave_out(row, data) for row in rows]
    texts = {
        i: prompt_text(row[data.dialogue_column], data)
        for i, row in enumerate(rows)
        if reasons[i] is None
    }
    # One call for all prompts: a fast tokenizer works on a batch in parallel.
    tokens = tokenizer(list(texts.values()), verbose=False)["input_ids"] if texts else []
    query_ids = dict(zip(texts, tokens, strict=True))
    prepared: list[PreparedRow | LeftOutRow] = []
    for i, row in enumerate(rows):
        reason = reasons[i]
        if reason is None and len(query_ids[i]) > data.max_prompt_tokens:
            reason = f"over {data.max_prompt_tokens} prompt tokens"
        if reason is None:
            columns = _with_json_values(row)
            prepared.append(
                PreparedRow(prompt_id(texts[i]), texts[i], query_ids[i], columns, 0, ())
            )
        else:
            prepared.append(LeftOutRow(name_of(row, data), reason))
    return prepared


def _with_json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row to JSON types: other values, such as dates, become text.

    Characters that are not valid Unicode become `?`, because no other file would take them.
    """
    text = json.dumps(dict(row), default=str, ensure_ascii=False)
    columns: dict[str, Any] = json.loads(text.encode(errors="replace"))
    return columns


def name_of(row: Mapping[str, Any], config: DataConfig) -> str:
    """Return a name for a row in messages: its place, its id, or the start of its dialogue."""
    if PROBLEM in row:
        return str(row[PROBLEM][1])
    name = row.get("id", row.get(config.dialogue_column))
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."


def unpack_rows(rows: Iterable[Mapping[str, Any]]) -> list[PreparedRow]:
    """Convert rows of an ingested table back to records."""
    return [unpack_row(row) for row in rows]


def unpack_row(row: Mapping[str, Any]) -> PreparedRow:
    """Convert a row of an ingested table back to a record."""
    return PreparedRow(
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        query_ids=list(row["query_ids"]),
        columns=json.loads(row["columns"]),
        copy=row.get("copy", 0),
        more_references=(),
    )


def number_copies(prompt_ids: Iterable[str], seen: Counter[str]) -> list[int]:
    """Return for each row how many rows before it have the same prompt.

    Args:
        prompt_ids: of the rows, in order.
        seen: rows before these by prompt; the function adds these rows.
    """
    copies = []
    for name in prompt_ids:
        copies.append(seen[name])
        seen[name] += 1
    return copies


def merge_repeated(
    rows: Iterable[PreparedRow], config: DataConfig, at_most: int
) -> list[PreparedRow]:
    """Merge rows of the same prompt into one, with the summaries of all of them as references.

    A prompt that the data repeat, such as each of DialogSum's test split, is one observation: its
    responses depend on one another, so as many pairs they would make intervals too narrow.

    Args:
        rows: sorted by prompt id; no more are read than needed.
        config: names the column with the summaries.
        at_most: number of prompts to return.
    """
    merged: list[PreparedRow] = []
    for _, group in itertools.groupby(rows, key=lambda row: row.prompt_id):
        if len(merged) == at_most:
            break
        first, *others = group
        own, *more = (row.columns.get(config.summary_column or "") for row in (first, *others))
        texts = dict.fromkeys(text for text in more if isinstance(text, str) and text != own)
        merged.append(replace(first, copy=0, more_references=tuple(texts)))
    return merged


def held_out_count(rows: int, fraction: float) -> int:
    """Return how many of `rows` rows are held out: rounded up, as in scikit-learn and `datasets`."""
    # Rounded to 9 digits first: 0.07 * 100 is just above 7 in binary and would give 8.
    return math.ceil(round(rows * fraction, 9))
