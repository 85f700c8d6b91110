"""A run in the table of the published notebook: one flat item per prompt, through awswrangler.

    conversation_id (the key)   query   response_before   response_after      as the notebook has them
    run_id  recipe  reference   toxicity_*  reward_*  kl  length_*             what it threw away

The table has no room for more than one run, and no way to say that a run is whole: results live
in a `ResultStore`, this is an export of one.
"""

import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import boto3
import botocore.exceptions

from ray_detox.store import dynamodb
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.dynamodb_errors import to_store_error, too_busy
from ray_detox.store.dynamodb_items import number
from ray_detox.store.errors import StoreError
from ray_detox.store.pages import as_row
from ray_detox.store.prepare import prepare
from ray_detox.store.protocol import ResultStore, check_run_id

KEY = "conversation_id"

_MAX_ITEM_BYTES = 400_000  # DynamoDB's own limit is 409,600
_WRITTEN, _LOOKED_AT = 25, 100  # DynamoDB takes no more in one request
_ROUNDS = 8
_TEXTS = ("query", "reference", "response_before", "response_after")
_NUMBERS = ("toxicity", "reward", "length")


def is_notebook_table(
    table: str, *, region: str | None = None, endpoint_url: str | None = None
) -> bool:
    """Whether the table has the notebook's one key; False where there is no table.

    Raises:
        StoreError: AWS cannot be asked.
    """
    found = _describe(DynamoDBStore(table, region=region, endpoint_url=endpoint_url))
    return found is not None and _key_type(found) is not None


def export(
    store: ResultStore,
    run_id: str,
    table: str,
    *,
    region: str | None = None,
    endpoint_url: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a stored run into the table; see `export_samples`."""
    report = store.get_run(check_run_id(run_id))
    if report is None:
        raise StoreError(f"No result of a run {run_id!r} is stored.")
    samples = list(store.get_samples(run_id))
    return export_samples(
        report, samples, table, region=region, endpoint_url=endpoint_url, overwrite=overwrite
    )


def export_samples(
    report: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    table: str,
    *,
    region: str | None = None,
    endpoint_url: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write the samples of a run into the table, and return how many there are.

    Writing the same run again, after a failure for example, replaces its own items.

    Args:
        report: of the run.
        samples: of the run.
        table: with the key `conversation_id`, a number or a text.
        region: AWS region, or None for the environment's.
        endpoint_url: another endpoint, for emulators.
        overwrite: replace items of other runs, and of the notebook.

    Raises:
        StoreError: the table is another, an item cannot be stored, or items of others are in the
            way; then nothing was written. Or AWS failed.
    """
    store = DynamoDBStore(table, region=region, endpoint_url=endpoint_url)
    found = _describe(store)
    kind = found and _key_type(found)
    if kind is None:
        raise StoreError(
            f"Table {table!r} was not found, or its key is not {KEY} alone. Name a table with the "
            "published notebook's key, or publish to a table of `ray-detox table create`."
        )
    items = items_of(report, samples, kind)
    run_id = str(report["run_id"])
    if not overwrite:
        # A look and a write: what another export puts there in between is replaced. awswrangler
        # writes without conditions.
        _check_nothing_is_in_the_way(store, run_id, [item[KEY] for item in items], kind)
    _write(items, store, region, endpoint_url)
    return len(items)


def items_of(
    report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], kind: str
) -> list[dict[str, Any]]:
    """Flat items with the values that awswrangler takes: str, int and Decimal.

    Args:
        report: of the run.
        samples: of the run.
        kind: of the key, `N` or `S`.

    Raises:
        StoreError: something cannot be stored.
    """
    run = prepare(report, samples)
    items = []
    for index, sample in run.samples.items():
        row = as_row(sample)
        item: dict[str, Any] = {KEY: index if kind == "N" else str(index), "run_id": run.run_id}
        item["recipe"] = str(run.report["recipe"])
        item |= {name: row[name] for name in _TEXTS if isinstance(row.get(name), str)}
        names = [f"{name}_{part}" for name in _NUMBERS for part in ("before", "after", "diff")]
        for name in [*names, "kl"]:
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                exact = number(value)
                if exact is not None:
                    item[name] = Decimal(exact["N"])
        size = sum(len(name.encode()) + len(str(value).encode()) for name, value in item.items())
        if size > _MAX_ITEM_BYTES:
            raise StoreError(
                f"Sample {index} of run {run.run_id!r} takes {size:,} bytes; an item holds "
                f"{_MAX_ITEM_BYTES:,}. Nothing was written."
            )
        items.append(item)
    return items


def wrangler() -> Any:
    """The module awswrangler, with its own engine.

    Where Ray is installed it would take Ray for its engine: start a cluster of its own, and
    refuse sessions. It decides that when it is imported.
    """
    os.environ["WR_ENGINE"] = "python"
    import awswrangler

    awswrangler.engine.set("python")
    return awswrangler


def _describe(store: DynamoDBStore) -> Any:
    """DescribeTable's answer, or None where there is no table."""
    client = store.client
    try:
        return client.describe_table(TableName=store.table)["Table"]
    except client.exceptions.ResourceNotFoundException:
        return None
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise _to_store_error(error, "describe_table", store) from None


def _key_type(table: Mapping[str, Any]) -> str | None:
    """`N` or `S` if the key is the notebook's."""
    if [key["AttributeName"] for key in table["KeySchema"]] != [KEY]:
        return None
    kinds = {a["AttributeName"]: a["AttributeType"] for a in table["AttributeDefinitions"]}
    kind = kinds.get(KEY)
    return kind if kind in ("N", "S") else None


def _check_nothing_is_in_the_way(
    store: DynamoDBStore, run_id: str, keys: Sequence[Any], kind: str
) -> None:
    others: dict[str, int] = {}
    for start in range(0, len(keys), _LOOKED_AT):
        some = [{KEY: {kind: str(key)}} for key in keys[start : start + _LOOKED_AT]]
        for item in _get(store, some):
            owner = item.get("run_id", {}).get("S", "")
            if owner != run_id:
                others[owner] = others.get(owner, 0) + 1
    if others:
        whose = ", ".join(
            f"{count} of {f'run {owner!r}' if owner else 'no run, such as the notebook writes'}"
            for owner, count in sorted(others.items())
        )
        raise StoreError(
            f"Table {store.table!r} has items under the same {KEY}: {whose}. Nothing was written; "
            "say --overwrite to replace them."
        )


def _get(store: DynamoDBStore, keys: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    wanted = {
        store.table: {
            "Keys": keys,
            "ConsistentRead": True,
            "ProjectionExpression": "#run_id",
            "ExpressionAttributeNames": {"#run_id": "run_id"},
        }
    }
    for attempt in range(_ROUNDS):
        if attempt:
            _pause(attempt)
        try:
            answer = store.client.batch_get_item(RequestItems=wanted)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise _to_store_error(error, "batch_get_item", store) from None
        yield from answer["Responses"].get(store.table, [])
        wanted = answer.get("UnprocessedKeys") or {}
        if not wanted:
            return
    raise too_busy(store.table)


def _write(
    items: Sequence[dict[str, Any]],
    store: DynamoDBStore,
    region: str | None,
    endpoint_url: str | None,
) -> None:
    wr = wrangler()
    session = boto3.session.Session(region_name=region or os.environ.get("AWS_REGION") or None)
    calls = 0

    def slow_down(**_: Any) -> None:
        # awswrangler sends what a busy table left again, at once and for ever.
        nonlocal calls
        calls += 1
        if calls > _ROUNDS:
            raise too_busy(store.table)
        if calls > 1:
            _pause(calls - 1)

    session.events.register("before-call.dynamodb.BatchWriteItem", slow_down)
    before = wr.config.dynamodb_endpoint_url, wr.config.botocore_config
    wr.config.dynamodb_endpoint_url = endpoint_url or before[0]
    # awswrangler would wait a minute for an answer, six times over.
    wr.config.botocore_config = dynamodb.PATIENT
    try:
        for start in range(0, len(items), _WRITTEN):
            calls = 0
            wr.dynamodb.put_items(
                items=list(items[start : start + _WRITTEN]),
                table_name=store.table,
                boto3_session=session,
                use_threads=False,
            )
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise _to_store_error(error, "batch_write_item", store) from None
    finally:
        wr.config.dynamodb_endpoint_url, wr.config.botocore_config = before


def _to_store_error(error: Exception, operation: str, store: DynamoDBStore) -> StoreError:
    region = store.client.meta.region_name
    return to_store_error(error, operation, store.table, region, store.client.meta.endpoint_url)


def _pause(attempt: int) -> None:
    longest = min(5.0, 0.05 * 2**attempt)
    time.sleep(random.uniform(longest / 2, longest))
