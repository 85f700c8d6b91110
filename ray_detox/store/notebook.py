"""Export a run to the table of the published notebook: one flat item per prompt, by awswrangler.

    conversation_id (the key)   query   response_before   response_after      as in the notebook
    run_id  recipe  reference   toxicity_*  reward_*  kl  length_*             added by us

The table can hold only one run and cannot mark a run as complete. So this is an export; results are
kept in a `ResultStore`.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import boto3
import botocore.exceptions

from ray_detox.store import dynamodb
from ray_detox.store.backoff import MAX_ATTEMPTS, pause_before
from ray_detox.store.dynamodb import DynamoDBStore
from ray_detox.store.dynamodb_errors import to_store_error, too_busy
from ray_detox.store.dynamodb_items import number
from ray_detox.store.errors import StoreError
from ray_detox.store.pages import as_row
from ray_detox.store.prepare import prepare
from ray_detox.store.protocol import ResultStore, check_run_id

KEY = "conversation_id"

_MAX_ITEM_BYTES = 400_000  # DynamoDB's own limit is 409,600
_WRITE_BATCH, _READ_BATCH = 25, 100  # DynamoDB's limits for one request
_TEXTS = ("query", "reference", "response_before", "response_after")
_NUMBERS = ("toxicity", "reward", "length")


def is_notebook_table(
    table: str, *, region: str | None = None, endpoint_url: str | None = None
) -> bool:
    """Whether the table exists and has the notebook's key.

    Raises:
        StoreError: AWS does not answer, or refuses.
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
    """Write a stored run to the table; see `export_samples`."""
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
    """Write the samples of a run to the table, and return their number.

    Writing the same run again, for example after a failure, replaces its own items.

    Args:
        report: of the run.
        samples: of the run.
        table: with the key `conversation_id`, a number or a text.
        region: AWS region, or None for the environment's.
        endpoint_url: another endpoint, for emulators.
        overwrite: replace items of other runs and of the notebook.

    Raises:
        StoreError: the table has another key, a sample cannot be stored, or its key is taken by an
            item that is not of this run; then nothing was written. Or AWS failed.
    """
    store = DynamoDBStore(table, region=region, endpoint_url=endpoint_url)
    found = _describe(store)
    kind = found and _key_type(found)
    if kind is None:
        raise StoreError(
            f"Table {table!r} was not found, or its key is not {KEY} alone. Use a table with the "
            "published notebook's key, or publish to a table of `ray-detox table create`."
        )
    items = items_of(report, samples, kind)
    run_id = str(report["run_id"])
    if not overwrite:
        # awswrangler cannot write under a condition, so items that another export adds between this
        # check and our write are replaced.
        _check_keys_are_free(store, run_id, [item[KEY] for item in items], kind)
    _write(items, store, region, endpoint_url)
    return len(items)


def items_of(
    report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], kind: str
) -> list[dict[str, Any]]:
    """Return flat items with values that awswrangler accepts: str, int and Decimal.

    Args:
        report: of the run.
        samples: of the run.
        kind: type of the key, `N` or `S`.

    Raises:
        StoreError: a sample cannot be stored.
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
                f"Sample {index} of run {run.run_id!r} takes {size:,} bytes; an item holds at most "
                f"{_MAX_ITEM_BYTES:,}. Nothing was written."
            )
        items.append(item)
    return items


def wrangler() -> Any:
    """Import awswrangler with its Python engine.

    If Ray is installed, awswrangler would choose Ray as its engine, start a cluster of its own and
    refuse boto3 sessions. It chooses when it is imported.
    """
    os.environ["WR_ENGINE"] = "python"
    import awswrangler

    awswrangler.engine.set("python")
    return awswrangler


def _describe(store: DynamoDBStore) -> Any:
    """Return the description of the table, or None if it does not exist."""
    client = store.client
    try:
        return client.describe_table(TableName=store.table)["Table"]
    except client.exceptions.ResourceNotFoundException:
        return None
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise _to_store_error(error, "describe_table", store) from None


def _key_type(table: Mapping[str, Any]) -> str | None:
    """Return the type of the key, `N` or `S`, if it is the notebook's key; otherwise None."""
    if [key["AttributeName"] for key in table["KeySchema"]] != [KEY]:
        return None
    kinds = {a["AttributeName"]: a["AttributeType"] for a in table["AttributeDefinitions"]}
    kind = kinds.get(KEY)
    return kind if kind in ("N", "S") else None


def _check_keys_are_free(store: DynamoDBStore, run_id: str, keys: Sequence[Any], kind: str) -> None:
    others: dict[str, int] = {}
    for start in range(0, len(keys), _READ_BATCH):
        some = [{KEY: {kind: str(key)}} for key in keys[start : start + _READ_BATCH]]
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
            "pass --overwrite to replace them."
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
    for attempt in range(MAX_ATTEMPTS):
        pause_before(attempt)
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
        # awswrangler itself sends items that a busy table did not take again at once, and for ever.
        nonlocal calls
        if calls == MAX_ATTEMPTS:
            raise too_busy(store.table)
        pause_before(calls)
        calls += 1

    session.events.register("before-call.dynamodb.BatchWriteItem", slow_down)
    before = wr.config.dynamodb_endpoint_url, wr.config.botocore_config
    wr.config.dynamodb_endpoint_url = endpoint_url or before[0]
    # awswrangler would wait a minute for an answer, and try six times.
    wr.config.botocore_config = dynamodb.PATIENT
    try:
        for start in range(0, len(items), _WRITE_BATCH):
            calls = 0
            wr.dynamodb.put_items(
                items=list(items[start : start + _WRITE_BATCH]),
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
