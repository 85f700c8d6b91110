"""Results in one DynamoDB table: the store that a cluster and the results page share.

`dynamodb_items.py` describes the items. A run has a META item with a state:

    (no run) --claim--> WRITING --items, check, delete others' items--> COMPLETE
                         ^   |                                             |
                         |   '--the writer dies: any writer may claim it   |
                         '---------------claim with overwrite--------------'

DynamoDB has no transaction of this size, so the state takes its place. Each item carries the token of
its writer, and readers use only items of the writer that META names: items of a dead or concurrent
writer are never mixed in. Only COMPLETE sets the keys of the index `by_time`, so lists contain no
incomplete run.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import boto3
import botocore.exceptions
from botocore.config import Config

from ray_detox.store.backoff import MAX_ATTEMPTS, pause_before
from ray_detox.store.dynamodb_errors import TableExists, to_store_error, too_busy
from ray_detox.store.dynamodb_items import (
    BY_TIME,
    LIST_PK,
    Item,
    items_of,
    joined,
    key,
    meta_of,
    number,
    sample_of,
    sample_sk,
    table_schema,
)
from ray_detox.store.errors import BadCursor, StoreError
from ray_detox.store.pages import (
    BAD_CURSOR,
    Page,
    SampleQuery,
    as_row,
    decode_cursor,
    decode_place,
    encode_cursor,
    future_from,
    limits_of,
    matches,
)
from ray_detox.store.prepare import PreparedRun, prepare
from ray_detox.store.protocol import SCHEMA, check_run_id

_BATCH = 25  # DynamoDB's limit for one request
_QUERIES_PER_PAGE = 4  # each reads up to 1 MB; bounds the cost of one page of samples

PATIENT = Config(
    connect_timeout=3, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 4}
)
# A web page shows "busy, try again" rather than hanging.
_HURRIED = Config(
    connect_timeout=0.5, read_timeout=1.4, retries={"mode": "standard", "total_max_attempts": 1}
)


class _ConditionFailed(Exception):
    """The condition of a write does not hold."""


class DynamoDBStore:
    """A `ResultStore` in a table that has the keys of `create_table`.

    Args:
        table: its name.
        region: AWS region, or None for the environment's.
        endpoint_url: another endpoint, for emulators.
        hurried: give up after two seconds, without retries.
    """

    def __init__(
        self,
        table: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        hurried: bool = False,
    ) -> None:
        self.table = table
        self._region = region
        self._endpoint_url = endpoint_url
        self._hurried = hurried

    def __repr__(self) -> str:
        return f"DynamoDBStore({self.table!r})"

    @cached_property
    def client(self) -> Any:
        """The boto3 client, created on first use."""
        try:
            return boto3.session.Session().client(
                "dynamodb",
                # boto3 reads only AWS_DEFAULT_REGION, while most other tools use AWS_REGION.
                region_name=self._region or os.environ.get("AWS_REGION") or None,
                endpoint_url=self._endpoint_url,
                config=_HURRIED if self._hurried else PATIENT,
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise to_store_error(
                error, "the connection", self.table, self._region, self._endpoint_url
            ) from None

    # ---- writing -----------------------------------------------------------------------------

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        *,
        overwrite: bool = False,
        attempt: str | None = None,
    ) -> bool:
        """Store a run; see `ResultStore.put_run`.

        Claims a run that another writer left unfinished. A run that is being overwritten cannot be
        read until it is complete again.
        """
        run = prepare(report, samples, curves)
        # A new token for each attempt, so that items of an earlier attempt are not taken for ours.
        writer = secrets.token_hex(8)
        items = items_of(run, writer)
        writing, complete = meta_of(run, writer, attempt, len(items))

        stored = self._meta(run.run_id)
        if (
            stored is not None
            and stored.get("digest", {}).get("S") == run.digest
            # An unchanged run is written again only if a concurrent writer's late batch has
            # replaced some of its items.
            and not (overwrite and self._is_damaged(stored))
        ):
            return False
        self._claim(run, writing, overwrite)
        for batch in _batches(items):
            # Before each batch: another writer may have claimed the run since the last one, and a
            # batch write cannot have a condition.
            self._check_writer(run, writer)
            self._write_batch([{"PutRequest": {"Item": item}} for item in batch])
        self._delete_others_items(run, writer, len(items))
        self._complete(run, complete, writer)
        return True

    def _claim(self, run: PreparedRun, writing: Item, overwrite: bool) -> None:
        """Put META in the state WRITING, which makes us the run's writer."""
        conditions, values = list[str](), Item()
        if not overwrite:
            # The same attempt may replace its own COMPLETE run: its task is running again because
            # the answer to the first one was lost.
            conditions.append(
                "(attribute_not_exists(#pk) OR #state = :writing OR #attempt = :attempt)"
            )
            values |= {":writing": {"S": "WRITING"}, ":attempt": writing["attempt"]}
        if run.writer is not None:
            # WRITING as well: a later process that has not finished has taken the run all the same.
            conditions.append(
                "(attribute_not_exists(#writer_token) OR #writer_run <> :run "
                "OR #writer_token <= :token)"
            )
            values |= {":run": writing["writer_run"], ":token": writing["writer_token"]}
        try:
            self._call("put_item", TableName=self.table, Item=writing, **_if(conditions, values))
        except _ConditionFailed:
            self._refuse_if_lost(run)
            raise StoreError(
                f"Another run {run.run_id!r} is already in table {self.table!r}. "
                "Choose another id, or pass --overwrite."
            ) from None

    def _check_writer(self, run: PreparedRun, writer: str) -> None:
        """Check that no other writer has claimed the run; raises `StoreError` if one has."""
        if self._refuse_if_lost(run).get("writer") != {"S": writer}:
            raise _overtaken(run.run_id)

    def _refuse_if_lost(self, run: PreparedRun) -> Item:
        """Return the writer in META; raises `StoreError` if it is a later process of the run."""
        names = ("writer", "writer_run", "writer_token")
        answer = self._call(
            "get_item",
            TableName=self.table,
            Key=key(run.run_id, "META"),
            ConsistentRead=True,
            ProjectionExpression=", ".join(f"#{name}" for name in names),
            ExpressionAttributeNames={f"#{name}": name for name in names},
        )
        item: Item = answer.get("Item", {})
        if "writer_token" in item:
            token = int(item["writer_token"]["N"])
            run.refuse_if_lost({"run": item["writer_run"]["S"], "token": token})
        return item

    def _delete_others_items(self, run: PreparedRun, writer: str, expected: int) -> None:
        """Delete items of other writers, and check that all `expected` items of ours are there."""
        ours, others = self._by_writer(run.run_id, writer)
        self._check_writer(run, writer)
        for keys in _batches(others):
            self._write_batch([{"DeleteRequest": {"Key": key}} for key in keys])
        if ours != expected:
            raise StoreError(
                f"Of {expected} items of run {run.run_id!r}, {ours} are in table {self.table!r}: "
                "another process is writing this run. Publish it again."
            )

    def _is_damaged(self, meta: Item) -> bool:
        run_id = meta["pk"]["S"].partition("#")[2]
        found, _ = self._by_writer(run_id, meta["writer"]["S"])
        return found != int(meta["items"]["N"])

    def _by_writer(self, run_id: str, writer: str) -> tuple[int, list[Item]]:
        """Count a writer's items of a run, and return the keys of all other items but META."""
        ours, others = 0, []
        for item in self._query(
            ConsistentRead=True,
            KeyConditionExpression="#pk = :pk",
            ProjectionExpression="#pk, #sk, #writer",
            ExpressionAttributeNames={"#pk": "pk", "#sk": "sk", "#writer": "writer"},
            ExpressionAttributeValues={":pk": {"S": f"RUN#{run_id}"}},
        ):
            if item["sk"]["S"] == "META":
                continue
            if item.get("writer") == {"S": writer}:
                ours += 1
            else:
                others.append({"pk": item["pk"], "sk": item["sk"]})
        return ours, others

    def _complete(self, run: PreparedRun, complete: Item, writer: str) -> None:
        # The condition is on the writer and not on the state: if the answer is lost, boto3 sends the
        # request again, which then finds our own COMPLETE. A later process of the run that has claimed
        # it since our claim is another writer, too.
        ours = _if(["#writer = :writer"], {":writer": {"S": writer}})
        try:
            self._call("put_item", TableName=self.table, Item=complete, **ours)
        except _ConditionFailed:
            self._refuse_if_lost(run)
            raise _overtaken(run.run_id) from None

    def _write_batch(self, requests: list[dict[str, Any]]) -> None:
        """Write up to 25 items; sends items again that a busy table did not take."""
        for attempt in range(MAX_ATTEMPTS):
            pause_before(attempt)
            answer = self._call("batch_write_item", RequestItems={self.table: requests})
            requests = answer.get("UnprocessedItems", {}).get(self.table, [])
            if not requests:
                return
        raise too_busy(self.table)

    # ---- reading -----------------------------------------------------------------------------

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """Return the report of a complete run, or None."""
        meta = self._meta(check_run_id(run_id))
        return None if meta is None else dict(json.loads(meta["report"]["S"]))

    def list_runs(self) -> list[dict[str, Any]]:
        """Return summaries of all complete runs, newest first; those from the future are last.

        A new run may take a second to appear, because DynamoDB updates indexes asynchronously.
        """
        future = future_from()
        parts = [self._query(**_by_time(part, future)) for part in ("<", ">=")]
        return [json.loads(item["summary"]["S"]) for part in parts for item in part]

    def list_page(self, limit: int = 50, cursor: str | None = None) -> Page:
        """Return one page of summaries of complete runs, newest first; those from the future are last."""
        future, start, parts = future_from(), dict[str, Any](), ["<", ">="]
        if cursor is not None:
            future, created, run_id = decode_place(cursor)
            place = {"list_pk": {"S": LIST_PK}, "created_at": {"S": f"{created}#{run_id}"}}
            start = {"ExclusiveStartKey": key(run_id, "META") | place}
            parts = parts if created < future else [">="]
        items: list[Item] = []
        for part in parts:
            arguments = _by_time(part, future) | start | {"Limit": limit - len(items)}
            answer = self._call("query", TableName=self.table, **arguments)
            items += answer["Items"]
            has_more = "LastEvaluatedKey" in answer or part != parts[-1]
            if "LastEvaluatedKey" in answer or len(items) == limit:
                break
            start = {}
        more = None
        if has_more and items:
            last = items[-1]["created_at"]["S"].partition("#")
            more = encode_cursor([future, last[0], last[2]], "runs")
        return Page([json.loads(item["summary"]["S"]) for item in items], more)

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """Return the samples of a complete run by index.

        Raises:
            StoreError: while the samples are read, if another process overwrites the run.
        """
        return self._samples(check_run_id(run_id))

    def _samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        meta = self._meta(run_id)
        if meta is None:
            return
        count = 0
        for item in self._query(**_part_of(run_id, "SAMPLE#", meta)):
            count += 1
            yield self._full_sample(run_id, item, meta)
        if count != int(meta["samples"]["N"]):
            raise StoreError(
                f"Run {run_id!r} has {meta['samples']['N']} samples, but {count} could be read: "
                "another process is writing it, or wrote some of its items. Read it again; if that "
                "does not help, publish it again with --overwrite."
            )

    def get_sample(self, run_id: str, index: int) -> dict[str, Any] | None:
        """Return one sample of a complete run in full, or None."""
        meta = self._meta(check_run_id(run_id))
        if meta is None:
            return None
        sample = key(run_id, sample_sk(index))
        answer = self._call("get_item", TableName=self.table, Key=sample, ConsistentRead=True)
        item = answer.get("Item")
        return self._full_sample(run_id, item, meta) if item and _is_of(item, meta) else None

    def _full_sample(self, run_id: str, item: Item, meta: Item) -> dict[str, Any]:
        if "parts" not in item:
            return sample_of(item)
        texts = f"TEXT#{item['sk']['S'].partition('#')[2]}#"
        parts = list(self._query(**_part_of(run_id, texts, meta)))
        if len(parts) != int(item["parts"]["N"]):
            raise StoreError(f"A text of run {run_id!r} is incomplete; publish the run again.")
        return dict(joined(parts))

    def get_history(self, run_id: str) -> list[dict[str, Any]]:
        """Return the metrics of each training step of a complete run."""
        meta = self._meta(check_run_id(run_id))
        if meta is None:
            return []
        return list(joined(self._query(**_part_of(run_id, "CURVES#", meta))) or [])

    def sample_page(
        self,
        run_id: str,
        query: SampleQuery = SampleQuery(),  # noqa: B008 - frozen
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page | None:
        """Return one page of samples that match a query; see `ResultStore.sample_page`.

        When sorted by a difference, samples of a new run may take a second to appear, and samples
        with equal differences come in any order: both are properties of DynamoDB's indexes.
        """
        start: dict[str, Any] = {}
        if cursor is not None:
            place = decode_cursor(cursor, [(int, float), int], check_run_id(run_id), query)
            start = {"ExclusiveStartKey": _place(run_id, query, *place)}
        meta = self._meta(check_run_id(run_id))
        if meta is None:
            return None
        if query.key == "index":
            arguments = _part_of(run_id, "SAMPLE#", meta)
        else:
            arguments = _by_difference(run_id, query.key, meta)
        if query.show == "all" and not query.search:
            arguments["Limit"] = limit  # no filter: read no more samples than the page shows
        limits = limits_of(json.loads(meta["summary"]["S"]))
        rows: list[dict[str, Any]] = []
        for _ in range(_QUERIES_PER_PAGE):
            answer = self._call(
                "query",
                TableName=self.table,
                ScanIndexForward=not query.descending,
                **arguments,
                **start,
            )
            for item in answer["Items"]:
                row = as_row(sample_of(item))
                if "parts" in item:  # a preview may lack the scores that a difference needs
                    row |= {
                        name: float(item[name]["N"]) if name in item else None
                        for name in ("toxicity_diff", "reward_diff")
                    }
                if not matches(row, query, limits):
                    continue
                rows.append(row)
                if len(rows) == limit:
                    at_end = item is answer["Items"][-1] and "LastEvaluatedKey" not in answer
                    position = 0 if query.key == "index" else float(row[query.key])
                    place = [position, row["index"]]
                    return Page(rows, None if at_end else encode_cursor(place, run_id, query))
            if "LastEvaluatedKey" not in answer:
                return Page(rows, None)
            start = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}
        return Page(rows, encode_cursor(_of_place(start, query), run_id, query))

    def _meta(self, run_id: str) -> Item | None:
        """Return META of a complete run, or None."""
        answer = self._call(
            "get_item", TableName=self.table, Key=key(run_id, "META"), ConsistentRead=True
        )
        item: Item | None = answer.get("Item")
        if item is None or item["state"]["S"] != "COMPLETE":
            return None
        if int(item["schema"]["N"]) > SCHEMA:
            raise StoreError(
                f"Run {run_id!r} in table {self.table!r} was written by a newer version (schema "
                f"{item['schema']['N']}, this one knows {SCHEMA}). Upgrade ray-detox."
            )
        return item

    def _query(self, **arguments: Any) -> Iterator[Item]:
        """Query all pages. An empty page need not be the last: filters apply after reading."""
        while True:
            page = self._call("query", TableName=self.table, **arguments)
            yield from page["Items"]
            if "LastEvaluatedKey" not in page:
                return
            arguments["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    # ---- the table ---------------------------------------------------------------------------

    def check(self) -> None:
        """Check that the table is active and has the expected keys."""
        described = self._call("describe_table", TableName=self.table)["Table"]
        if described["TableStatus"] in ("CREATING", "DELETING"):
            raise StoreError(
                f"Table {self.table!r} is {described['TableStatus'].lower()}; "
                "wait until it is active."
            )
        found = _keys(described)
        for name, keys in _keys(table_schema(self.table)).items():
            if found.get(name) != keys:
                what = f"index {name}" if name else "table itself"
                raise StoreError(
                    f"Table {self.table!r} cannot hold results: the {what} has the keys "
                    f"{found.get(name, '(there is none)')}; expected {keys}. Create a table with "
                    "ray-detox table create, or set results.table to another one."
                )

    def create_table(self) -> bool:
        """Create the table, billed per request and with backups, and wait until it is active.

        Returns:
            True, or False if it exists already and can hold results.

        Raises:
            StoreError: a table of this name cannot hold results, or AWS refuses to create it.
        """
        try:
            self._call(
                "create_table",
                **table_schema(self.table),
                SSESpecification={"Enabled": True},
                DeletionProtectionEnabled=True,
            )
        except TableExists:
            self.check()
            return False
        try:
            waiter = self.client.get_waiter("table_exists")
            waiter.wait(TableName=self.table, WaiterConfig={"Delay": 2, "MaxAttempts": 60})
        except botocore.exceptions.WaiterError as error:
            if "Error" in error.last_response:
                refusal = botocore.exceptions.ClientError(error.last_response, "DescribeTable")
                raise self._to_store_error(refusal, "describe_table") from None
            raise StoreError(
                f"Table {self.table!r} was not active after two minutes; look at it in AWS."
            ) from None
        self._call(
            "update_time_to_live",
            or_unknown=True,
            TableName=self.table,
            TimeToLiveSpecification={"Enabled": True, "AttributeName": "expires_at"},
        )
        self._call(
            "update_continuous_backups",
            or_unknown=True,
            TableName=self.table,
            PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True},
        )
        return True

    def close(self) -> None:
        """Close the client's connections, if there are any."""
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _call(
        self, operation: str, *, or_unknown: bool = False, **arguments: Any
    ) -> dict[str, Any]:
        """Call AWS; with `or_unknown`, ignore that an emulator does not know the operation."""
        call = getattr(self.client, operation)
        try:
            answer: dict[str, Any] = call(**arguments)
        except botocore.exceptions.BotoCoreError as error:
            raise self._to_store_error(error, operation) from None
        except botocore.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "ConditionalCheckFailedException":
                raise _ConditionFailed from None
            if or_unknown and code in ("UnknownOperationException", "404"):
                return {}
            raise self._to_store_error(error, operation) from None
        return answer

    def _to_store_error(self, error: Exception, operation: str) -> StoreError:
        region = self.client.meta.region_name
        return to_store_error(error, operation, self.table, region, self._endpoint_url)


def _by_time(part: str, future: str) -> dict[str, Any]:
    """Arguments of a query for the runs before (part `<`) or from the moment `future` on (`>=`)."""
    return {
        "IndexName": BY_TIME,
        "KeyConditionExpression": f"#list_pk = :runs AND #created_at {part} :future",
        "ProjectionExpression": "#summary, #created_at",
        "ExpressionAttributeNames": {
            "#list_pk": "list_pk",
            "#summary": "summary",
            "#created_at": "created_at",
        },
        "ExpressionAttributeValues": {":runs": {"S": LIST_PK}, ":future": {"S": future}},
        "ScanIndexForward": False,
    }


def _if(conditions: Sequence[str], values: Item) -> dict[str, Any]:
    """Arguments of a write that all conditions must allow; names in them have the form `#name`."""
    if not conditions:
        return {}
    expression = " AND ".join(conditions)
    return {
        "ConditionExpression": expression,
        "ExpressionAttributeNames": {name: name[1:] for name in re.findall(r"#\w+", expression)},
        "ExpressionAttributeValues": values,
    }


def _part_of(run_id: str, prefix: str, meta: Item) -> dict[str, Any]:
    """Arguments of a query for the items of a run whose sort key begins with `prefix`."""
    return {
        "ConsistentRead": True,
        "KeyConditionExpression": "#pk = :pk AND begins_with(#sk, :prefix)",
        "FilterExpression": "#writer = :writer",
        "ExpressionAttributeNames": {"#pk": "pk", "#sk": "sk", "#writer": "writer"},
        "ExpressionAttributeValues": {
            ":pk": {"S": f"RUN#{run_id}"},
            ":prefix": {"S": prefix},
            ":writer": meta["writer"],
        },
    }


def _by_difference(run_id: str, name: str, meta: Item) -> dict[str, Any]:
    return {
        "IndexName": f"by_{name}",
        "KeyConditionExpression": "#run_id = :run_id",
        "FilterExpression": "#writer = :writer",
        "ExpressionAttributeNames": {"#run_id": "run_id", "#writer": "writer"},
        "ExpressionAttributeValues": {":run_id": {"S": run_id}, ":writer": meta["writer"]},
    }


def _place(run_id: str, query: SampleQuery, value: float, index: int) -> Item:
    """Return the key after which a page continues.

    Raises:
        BadCursor: the values are outside what a store ever puts into a cursor.
    """
    as_number = number(value)
    if not 0 <= index < 10**8 or as_number is None:
        raise BadCursor(BAD_CURSOR)
    place = key(run_id, sample_sk(index))
    if query.key != "index":
        place |= {"run_id": {"S": run_id}, query.key: as_number}
    return place


def _of_place(start: Mapping[str, Any], query: SampleQuery) -> list[Any]:
    last = start["ExclusiveStartKey"]
    index = int(last["sk"]["S"].partition("#")[2])
    return [0 if query.key == "index" else float(last[query.key]["N"]), index]


def _is_of(item: Item, meta: Item) -> bool:
    return item.get("writer") == meta["writer"]


def _keys(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a table (named "") and of its indexes, such as `pk (S), sk (S)`."""
    kinds = {a["AttributeName"]: a["AttributeType"] for a in table["AttributeDefinitions"]}
    schemas = {"": table["KeySchema"]}
    for index in table.get("GlobalSecondaryIndexes", []):
        schemas[index["IndexName"]] = index["KeySchema"]
    return {
        name: ", ".join(
            f"{part['AttributeName']} ({kinds.get(part['AttributeName'])})"
            for part in sorted(schema, key=lambda part: str(part["KeyType"]))
        )
        for name, schema in schemas.items()
    }


def _overtaken(run_id: str) -> StoreError:
    return StoreError(
        f"Run {run_id!r} was written by another process at the same time. "
        "Look at the stored run, and publish yours again with --overwrite if it should replace it."
    )


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
