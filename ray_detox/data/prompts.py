"""From a row of data to a prompt: length filter, text, identity, and every number drawn for it.

Plain functions of values. Randomness is never carried along: what is drawn for a prompt depends
on (seed, step, prompt) alone, so a run that is resumed, or spread over other workers, draws the
same.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray_detox.config import DataConfig


def reason_to_leave_out(row: Mapping[str, Any], config: DataConfig) -> str | None:
    """Why a row cannot become a prompt, in words that are counted and shown; None if it can."""
    dialogue = row.get(config.dialogue_column)
    if dialogue is None:
        return f"no {config.dialogue_column}"
    if not isinstance(dialogue, str):
        return f"{config.dialogue_column} is not text"
    if not dialogue.strip():
        return f"empty {config.dialogue_column}"
    try:
        dialogue.encode()
    except UnicodeEncodeError:
        return f"{config.dialogue_column} is not valid Unicode"
    if len(dialogue) <= config.min_chars:
        return f"not over {config.min_chars} characters"
    if len(dialogue) > config.max_chars:
        return f"over {config.max_chars} characters"
    return None


def prompt_text(dialogue: str, config: DataConfig) -> str:
    """The prompt that asks for a summary of `dialogue`."""
    # replace and not format: braces in a dialogue are the dialogue's.
    return config.template.replace("{dialogue}", dialogue)


def prompt_id(text: str) -> str:
    """What a prompt is called everywhere: 16 hexadecimal digits of a hash of its text."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def prepare(
    rows: Sequence[Mapping[str, Any]], data: DataConfig, tokenizer: Any
) -> list[dict[str, Any]]:
    """Raw rows as prepared ones: prompt and tokens, or the reason for leaving the row out.

    Returns:
        For each row `name` and `left_out`; where that is None also `prompt`, `prompt_id`,
        `query_ids`, and the row's own columns as JSON in `columns`.
    """
    prepared: list[dict[str, Any]] = []
    for row in rows:
        reason = reason_to_leave_out(row, data)
        entry: dict[str, Any] = {"left_out": reason, "name": _name(row, data)}
        if reason is None:
            text = prompt_text(row[data.dialogue_column], data)
            entry |= {"prompt": text, "prompt_id": prompt_id(text)}
            entry["columns"] = json.dumps(dict(row), default=str)
        prepared.append(entry)

    usable = [entry for entry in prepared if entry["left_out"] is None]
    if usable:
        tokens = tokenizer([entry["prompt"] for entry in usable], verbose=False)["input_ids"]
        for entry, query_ids in zip(usable, tokens, strict=True):
            entry["query_ids"] = query_ids
            if len(query_ids) > data.max_prompt_tokens:
                entry["left_out"] = f"over {data.max_prompt_tokens} prompt tokens"
    return prepared


def _name(row: Mapping[str, Any], config: DataConfig) -> str:
    """What to call a row in a message: its id if it has one, else how it begins."""
    name = row.get("id", row.get(config.dialogue_column))
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "..."


def unpack(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Prepared rows with their own columns back in place."""
    return [
        json.loads(row["columns"])
        | {name: row[name] for name in ("prompt_id", "prompt")}
        | {"query_ids": list(row["query_ids"])}
        for row in rows
    ]


def held_out_count(rows: int, fraction: float) -> int:
    """Rows held out of `rows`: rounded up, as scikit-learn and `datasets` split."""
    # Rounded first, or 0.07 * 100 in binary would come out just above 7 and count as 8.
    return math.ceil(round(rows * fraction, 9))
