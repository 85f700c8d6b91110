"""Convert a run to the items of a DynamoDB table and back; without network.

    pk           sk                     contents
    RUN#<run>    META                   the report; state WRITING, then COMPLETE
    RUN#<run>    SAMPLE#00000042        one sample: texts and numbers as attributes
    RUN#<run>    TEXT#00000042#0000     a part of a sample that is too long for one item, gzipped
    RUN#<run>    CURVES#0000            a part of the metrics of all training steps, gzipped

    index                sorted by       contains
    by_time              created_at      META of complete runs, because only COMPLETE sets its keys
    by_toxicity_diff     toxicity_diff   samples with both scores
    by_reward_diff       reward_diff     samples with both rewards

Texts and numbers are attributes, so that any tool can read and filter them. The item also has the
sample as JSON, because attributes do not keep every number exactly (1.0 becomes 1, 5e-324 becomes 0).
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from ray_detox.store.errors import StoreError
from ray_detox.store.pages import difference
from ray_detox.store.prepare import PreparedRun, to_text
from ray_detox.store.protocol import SCHEMA

Item = dict[str, dict[str, Any]]
"""An item in DynamoDB's own notation: `{"n": {"N": "512"}, "report": {"S": "{...}"}}`."""

INLINE_BYTES = 350_000
"""Size above which a sample goes into TEXT items; DynamoDB's own limit is 409,600."""
PREVIEW_CHARACTERS = 2_000
_META_BYTES = 400_000

BY_TIME = "by_time"
LIST_PK = "RUNS"

# Names of our own attributes, which no value of a run may replace.
_OWN = frozenset(
    "pk sk list_pk created_at run_id toxicity_diff reward_diff "
    "state writer writer_run writer_token attempt schema digest samples items parts expires_at "
    "sample report summary".split()
)


def table_schema(table: str) -> dict[str, Any]:
    """Return the arguments of CreateTable; `cluster/results.yaml` creates the same table."""

    def keys(partition: str, sort: str) -> list[dict[str, str]]:
        return [
            {"AttributeName": partition, "KeyType": "HASH"},
            {"AttributeName": sort, "KeyType": "RANGE"},
        ]

    kinds = {"pk": "S", "sk": "S", "list_pk": "S", "created_at": "S", "run_id": "S"}
    kinds |= {"reward_diff": "N", "toxicity_diff": "N"}
    return {
        "TableName": table,
        "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": [
            {"AttributeName": name, "AttributeType": kind} for name, kind in kinds.items()
        ],
        "KeySchema": keys("pk", "sk"),
        "GlobalSecondaryIndexes": [
            {
                "IndexName": BY_TIME,
                "KeySchema": keys("list_pk", "created_at"),
                # A list shows summaries only, and a summary is a hundredth of its report.
                "Projection": {"ProjectionType": "INCLUDE", "NonKeyAttributes": ["summary"]},
            },
            *(
                {
                    "IndexName": f"by_{name}",
                    "KeySchema": keys("run_id", name),
                    "Projection": {"ProjectionType": "ALL"},
                }
                for name in ("reward_diff", "toxicity_diff")
            ),
        ],
    }


def key(run_id: str, sk: str) -> Item:
    """Return the key of an item of a run."""
    return {"pk": {"S": f"RUN#{run_id}"}, "sk": {"S": sk}}


def sample_sk(index: int) -> str:
    """Return the sort key of a sample."""
    return f"SAMPLE#{index:08d}"


def items_of(run: PreparedRun, writer: str) -> list[Item]:
    """Return all items of a run except META, each with the token of its writer."""
    items = []
    for index, sample in run.samples.items():
        item = _sample_item(sample) | key(run.run_id, sample_sk(index))
        item |= {"run_id": {"S": run.run_id}} | _differences(sample)
        if _size(item) > INLINE_BYTES:
            parts = list(_parts(to_text(sample)))
            preview = {name: cut(value) for name, value in sample.items()}
            preview["overflow"] = [name for name in sample if preview[name] != sample[name]]
            item = _sample_item(preview) | key(run.run_id, sample_sk(index))
            item |= {"run_id": {"S": run.run_id}, "parts": {"N": str(len(parts))}}
            item |= _differences(sample)
            items += [
                key(run.run_id, f"TEXT#{index:08d}#{number:04d}") | {"part": {"B": part}}
                for number, part in enumerate(parts)
            ]
        items.append(item)
    if run.curves:
        items += [
            key(run.run_id, f"CURVES#{number:04d}") | {"part": {"B": part}}
            for number, part in enumerate(_parts(to_text(run.curves)))
        ]
    return [item | {"writer": {"S": writer}} for item in items]


def meta_of(run: PreparedRun, writer: str, attempt: str | None, items: int) -> tuple[Item, Item]:
    """Return META in the state WRITING, and META in the state COMPLETE.

    Args:
        run: checked.
        writer: token of this attempt to write it.
        attempt: name that a repeated task keeps; None if there is none.
        items: number of the other items.

    Raises:
        StoreError: the report does not fit into an item.
    """
    writing = {
        **key(run.run_id, "META"),
        "state": {"S": "WRITING"},
        "writer": {"S": writer},
        "attempt": {"S": attempt or writer},
        "schema": {"N": str(SCHEMA)},
    }
    if run.writer is not None:
        writing["writer_run"] = {"S": run.writer.run}
        writing["writer_token"] = {"N": str(run.writer.token)}
    complete = {
        **_numbers(run.report),
        **writing,
        "state": {"S": "COMPLETE"},
        "list_pk": {"S": LIST_PK},
        "created_at": {"S": f"{run.created}#{run.run_id}"},
        "digest": {"S": run.digest},
        "samples": {"N": str(len(run.samples))},
        "items": {"N": str(items)},
        "summary": {"S": to_text(run.summary)},
        "report": {"S": to_text(run.report)},
    }
    size = _size(complete)
    if size > _META_BYTES:
        raise StoreError(
            f"The report of run {run.run_id!r} takes {size:,} bytes; DynamoDB stores at most "
            f"{_META_BYTES:,}. Shorten its texts, or set results.store=sqlite."
        )
    return writing, complete


def sample_of(item: Item) -> dict[str, Any]:
    """Return the sample that an item holds, or the preview of a long sample."""
    sample = json.loads(item["sample"]["S"])
    for name, value in sample.items():
        if value is None and name not in _OWN and "S" in item.get(name, {}):
            sample[name] = item[name]["S"]
    return dict(sample)


def joined(items: Iterable[Item]) -> Any:
    """Join the parts in TEXT or CURVES items, and return the value that they encode."""
    data = b"".join(item["part"]["B"] for item in items)
    return json.loads(gzip.decompress(data)) if data else None


def number(value: float) -> dict[str, str] | None:
    """Return a number in DynamoDB's notation; None if it is too large, 0 if it is too small."""
    exact = Decimal(repr(value))
    if exact.adjusted() > 125 or len(exact.as_tuple().digits) > 38:
        return None
    return {"N": "0" if exact == 0 or exact.adjusted() < -130 else str(exact)}


def cut(value: Any) -> Any:
    """Shorten a value for a preview: long texts lose their end, other long values become None."""
    if isinstance(value, str):
        return value[:PREVIEW_CHARACTERS]
    return value if len(to_text(value)) <= PREVIEW_CHARACTERS else None


def _sample_item(sample: Mapping[str, Any]) -> Item:
    texts = {
        name: {"S": value}
        for name, value in sample.items()
        if isinstance(value, str) and name and name not in _OWN
    }
    # A text is stored once, as an attribute; the JSON has null in its place.
    rest = {name: None if name in texts else value for name, value in sample.items()}
    return {**_numbers(sample), **texts, "sample": {"S": to_text(rest)}}


def _differences(sample: Mapping[str, Any]) -> Item:
    found: Item = {}
    for name in ("toxicity", "reward"):
        value = difference(sample, name)
        if value is not None and (as_number := number(value)) is not None:
            found[f"{name}_diff"] = as_number
    return found


def _numbers(values: Mapping[str, Any]) -> Item:
    numbers: Item = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name and name not in _OWN and (as_number := number(value)) is not None:
            numbers[name] = as_number
    return numbers


def _parts(text: str) -> Iterable[bytes]:
    # mtime=0, so that equal texts give equal bytes.
    data = gzip.compress(text.encode(), mtime=0)
    return [data[start : start + INLINE_BYTES] for start in range(0, len(data), INLINE_BYTES)]


def _size(item: Item) -> int:
    """Return an upper bound of an item's size as DynamoDB counts it, in bytes."""
    return sum(
        len(name.encode()) + sum(len(value.encode()) for value in typed.values())
        for name, typed in item.items()
    )
