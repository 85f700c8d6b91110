"""Results in one DynamoDB table: the store that a cluster and a page share.

    pk           sk                what
    RUN#<run>    META              the report; state WRITING, then COMPLETE
    RUN#<run>    SAMPLE#00000042   one sample

A run is written in this order: META as WRITING, the samples, META as COMPLETE. Only the last
write sets the keys of the index `by_time`, so a list never shows a run that is not whole. Each
sample carries the token of its writer, and readers take only those of META's writer: what a
dead or rival writer left is never mixed in.

Texts are JSON beside native numbers: JSON gives floats back to the last bit and has no range,
numbers can be filtered and indexed.
"""

import json
import os
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from botocore.config import Config

from ray_detox.store import SCHEMA, PreparedRun, StoreError, check_run_id, prepare, to_text

Item = dict[str, dict[str, Any]]
"""An item in DynamoDB's own notation: `{"n": {"N": "512"}, "report": {"S": "{...}"}}`."""

_BATCH = 25  # DynamoDB takes no more in one request
_MAX_ITEM_BYTES = 400_000  # DynamoDB's own limit is 409,600
_ROUNDS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
_INDEX = "by_time"
_OWN = frozenset({"pk", "sk", "gsi1pk", "gsi1sk", "state", "writer", "schema", "samples"})

_NAMES = {"#pk": "pk", "#sk": "sk", "#writer": "writer"}


class _ConditionFailed(Exception):
    """A conditional write found another state than it asked for."""


class DynamoDBStore:
    """A `ResultStore` in a table with the keys of `create_table`."""

    def __init__(
        self, table: str, *, region: str | None = None, endpoint_url: str | None = None
    ) -> None:
        self.table = table
        self._region = region
        self._endpoint_url = endpoint_url

    def __repr__(self) -> str:
        return f"DynamoDBStore({self.table!r})"

    @cached_property
    def client(self) -> Any:
        """The boto3 client, made on first use."""
        try:
            return boto3.session.Session().client(
                "dynamodb",
                # boto3 reads AWS_DEFAULT_REGION only; most other tools set and read AWS_REGION.
                region_name=self._region or os.environ.get("AWS_REGION") or None,
                endpoint_url=self._endpoint_url,
                config=Config(
                    connect_timeout=3,
                    read_timeout=10,
                    retries={"mode": "standard", "total_max_attempts": 4},
                ),
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise self._in_words(error, "the connection") from None

    def put_run(
        self,
        report: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]],
        *,
        overwrite: bool = False,
    ) -> None:
        """Store a run; see `ResultStore.put_run`.

        A run that another writer left unfinished is taken over. One that is being overwritten
        cannot be read until it is whole again.
        """
        run = prepare(report, samples)
        # A new token per attempt: what an earlier attempt left can be told from what is ours.
        writer = secrets.token_hex(8)
        writing, complete = _meta(run, writer)
        items = [_sample_item(run.run_id, writer, i, row) for i, row in run.samples.items()]
        for item in (complete, *items):
            _check_size(run.run_id, item)

        replaced = self._claim(run.run_id, writing, overwrite)
        for batch in _batches(items):
            self._check_writer(run.run_id, writer)
            self._write_batch([{"PutRequest": {"Item": item}} for item in batch])
        if replaced:
            self._delete_orphans(run.run_id, writer)
        self._complete(run.run_id, complete, writer)

    def get_run(self, run_id: str) -> dict[str, Any] | None:
        """The report of a finished run, or None."""
        meta = self._meta(check_run_id(run_id))
        return None if meta is None else dict(json.loads(meta["report"]["S"]))

    def list_runs(self) -> list[dict[str, Any]]:
        """Summaries of all finished runs, newest first; a new run may take a second to appear."""
        items = self._query(
            IndexName=_INDEX,
            KeyConditionExpression="#gsi1pk = :run",
            ProjectionExpression="#summary",
            ExpressionAttributeNames={"#gsi1pk": "gsi1pk", "#summary": "summary"},
            ExpressionAttributeValues={":run": {"S": "RUN"}},
            ScanIndexForward=False,
        )
        return [json.loads(item["summary"]["S"]) for item in items]

    def get_samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The samples of a finished run by index.

        Raises:
            StoreError: while reading, if the run is overwritten meanwhile.
        """
        return self._samples(check_run_id(run_id))

    def check(self) -> None:
        """Look at the table and its keys."""
        described = self._call("describe_table", TableName=self.table)["Table"]
        if described["TableStatus"] in ("CREATING", "DELETING"):
            raise StoreError(
                f"Table {self.table!r} is {described['TableStatus'].lower()}; "
                "wait until it is active."
            )
        types = {a["AttributeName"]: a["AttributeType"] for a in described["AttributeDefinitions"]}
        self._check_keys("", described["KeySchema"], types, ("pk", "sk"))
        indexes = {
            index["IndexName"]: index for index in described.get("GlobalSecondaryIndexes", [])
        }
        if _INDEX not in indexes:
            raise StoreError(
                f"Table {self.table!r} lacks the index {_INDEX}. "
                "Make a table with create_table, or set results.store=sqlite."
            )
        keys = indexes[_INDEX]["KeySchema"]
        self._check_keys(f"index {_INDEX} of ", keys, types, ("gsi1pk", "gsi1sk"))

    def create_table(self) -> None:
        """Make the table, paid per request, and wait until it can be used.

        Raises:
            StoreError: it exists, or may not be created.
        """
        self._call(
            "create_table",
            TableName=self.table,
            BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=[
                {"AttributeName": name, "AttributeType": "S"}
                for name in ("pk", "sk", "gsi1pk", "gsi1sk")
            ],
            KeySchema=_key_schema("pk", "sk"),
            GlobalSecondaryIndexes=[
                {
                    "IndexName": _INDEX,
                    "KeySchema": _key_schema("gsi1pk", "gsi1sk"),
                    # A list needs summaries, and each is a hundredth of its report.
                    "Projection": {"ProjectionType": "INCLUDE", "NonKeyAttributes": ["summary"]},
                }
            ],
        )
        try:
            waiter = self.client.get_waiter("table_exists")
            waiter.wait(TableName=self.table, WaiterConfig={"Delay": 2, "MaxAttempts": 60})
        except botocore.exceptions.WaiterError:
            raise StoreError(
                f"Table {self.table!r} was not ready after two minutes; look at it in AWS."
            ) from None

    def close(self) -> None:
        """Close the client's connections, if there are any."""
        client = self.__dict__.pop("client", None)
        if client is not None:
            client.close()

    def _claim(self, run_id: str, writing: Item, overwrite: bool) -> bool:
        """Announce a run as being written; True where something of that id was there before."""
        condition: dict[str, Any] = {}
        if not overwrite:
            condition = {
                "ConditionExpression": "attribute_not_exists(#pk) OR #state = :writing",
                "ExpressionAttributeNames": {"#pk": "pk", "#state": "state"},
                "ExpressionAttributeValues": {":writing": {"S": "WRITING"}},
            }
        try:
            answer = self._call(
                "put_item", TableName=self.table, Item=writing, ReturnValues="ALL_OLD", **condition
            )
        except _ConditionFailed:
            raise StoreError(
                f"Run {run_id!r} is already in table {self.table!r}. "
                "Choose another id, or overwrite it on purpose."
            ) from None
        return bool(answer.get("Attributes"))

    def _check_writer(self, run_id: str, writer: str) -> None:
        """Stop before writing over the samples of somebody who took this run over."""
        answer = self._call(
            "get_item",
            TableName=self.table,
            Key=_key(run_id, "META"),
            ConsistentRead=True,
            ProjectionExpression="#writer",
            ExpressionAttributeNames={"#writer": "writer"},
        )
        if answer.get("Item", {}).get("writer") != {"S": writer}:
            raise _overtaken(run_id)

    def _complete(self, run_id: str, complete: Item, writer: str) -> None:
        try:
            # On the writer alone: if the answer is lost and the request is sent again, it must
            # find its own COMPLETE acceptable.
            self._call(
                "put_item",
                TableName=self.table,
                Item=complete,
                ConditionExpression="#writer = :writer",
                ExpressionAttributeNames={"#writer": "writer"},
                ExpressionAttributeValues={":writer": {"S": writer}},
            )
        except _ConditionFailed:
            raise _overtaken(run_id) from None

    def _delete_orphans(self, run_id: str, writer: str) -> None:
        """Delete the samples that an earlier, longer attempt left."""
        orphans = self._query(
            ConsistentRead=True,
            KeyConditionExpression="#pk = :pk AND begins_with(#sk, :sample)",
            FilterExpression="#writer <> :writer",
            ProjectionExpression="#pk, #sk",
            ExpressionAttributeNames=_NAMES,
            ExpressionAttributeValues=_of(run_id, writer),
        )
        for keys in _batches(list(orphans)):
            self._write_batch([{"DeleteRequest": {"Key": key}} for key in keys])

    def _meta(self, run_id: str) -> Item | None:
        answer = self._call(
            "get_item",
            TableName=self.table,
            Key=_key(run_id, "META"),
            ConsistentRead=True,
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

    def _samples(self, run_id: str) -> Iterator[dict[str, Any]]:
        meta = self._meta(run_id)
        if meta is None:
            return
        count = 0
        for item in self._query(
            ConsistentRead=True,
            KeyConditionExpression="#pk = :pk AND begins_with(#sk, :sample)",
            FilterExpression="#writer = :writer",
            ProjectionExpression="#sample",
            ExpressionAttributeNames={**_NAMES, "#sample": "sample"},
            ExpressionAttributeValues=_of(run_id, meta["writer"]["S"]),
        ):
            count += 1
            yield json.loads(item["sample"]["S"])
        if count != int(meta["samples"]["N"]):
            raise StoreError(
                f"Run {run_id!r} has {meta['samples']['N']} samples, but {count} could be read: "
                "another process is writing it, or wrote into it. Read it again; if that does not "
                "help, publish it again and overwrite it."
            )

    def _query(self, **arguments: Any) -> Iterator[Item]:
        """Query, page by page; a page may be empty and still not the last."""
        while True:
            page = self._call("query", TableName=self.table, **arguments)
            yield from page["Items"]
            if "LastEvaluatedKey" not in page:
                return
            arguments["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    def _write_batch(self, requests: list[dict[str, Any]]) -> None:
        """Write up to 25 items, resending what a busy table left, a bounded number of times."""
        for attempt in range(_ROUNDS):
            if attempt:
                # Jitter, so that several writers do not come back at the same moment.
                longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
                _pause(random.uniform(longest / 2, longest))
            answer = self._call("batch_write_item", RequestItems={self.table: requests})
            requests = answer.get("UnprocessedItems", {}).get(self.table, [])
            if not requests:
                return
        raise StoreError(
            f"Table {self.table!r} is too busy: {len(requests)} items were still unwritten after "
            f"{_ROUNDS} rounds. Raise its capacity, or publish again later."
        )

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        call = getattr(self.client, operation)
        try:
            answer: dict[str, Any] = call(**arguments)
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] == "ConditionalCheckFailedException":
                raise _ConditionFailed from None
            raise self._in_words(error, operation) from None
        except botocore.exceptions.BotoCoreError as error:
            raise self._in_words(error, operation) from None
        return answer

    def _in_words(self, error: Exception, operation: str) -> StoreError:
        """One sentence for what went wrong.

        The service's own message stays out, and callers raise `from None`: a refused signature
        is answered with the whole request, session token included, and a URL may hold a password.
        """
        known = botocore.exceptions
        if isinstance(error, known.NoRegionError):
            return StoreError(
                "No AWS region is set. Set results.region, AWS_REGION or AWS_DEFAULT_REGION."
            )
        if isinstance(
            error,
            known.NoCredentialsError
            | known.PartialCredentialsError
            | known.CredentialRetrievalError,
        ):
            return StoreError(
                "No AWS credentials were found, or they are incomplete. Sign in (aws configure, or "
                "a role), or set results.store=sqlite to keep results locally."
            )
        if isinstance(error, known.ProfileNotFound):
            return StoreError("The profile in AWS_PROFILE does not exist in the AWS configuration.")
        if isinstance(error, known.ParamValidationError):
            return StoreError(f"{self.table!r} is no name that a DynamoDB table can have.")
        if isinstance(error, known.ClientError):
            return self._refusal_in_words(error.response["Error"]["Code"], operation)
        if isinstance(error, known.ConnectionError | known.HTTPClientError):
            return StoreError(
                f"DynamoDB could not be reached{self._where()}. Check the network, the region and "
                "results.endpoint_url."
            )
        if isinstance(error, ValueError):
            return StoreError(
                f"results.endpoint_url is no address{self._where()}; "
                "expected one such as http://127.0.0.1:8000."
            )
        return StoreError(f"DynamoDB could not be used ({operation}: {type(error).__name__}).")

    def _refusal_in_words(self, code: str, operation: str) -> StoreError:
        region = self.client.meta.region_name
        if code == "ResourceNotFoundException":
            return StoreError(
                f"Table {self.table!r} was not found in {region}. Create it, "
                "or set results.store=sqlite to keep results locally."
            )
        if code == "ResourceInUseException":
            return StoreError(f"Table {self.table!r} exists in {region}, or is being changed.")
        if code in ("AccessDeniedException", "AccessDenied"):
            return StoreError(
                f"AWS allows no {operation} on table {self.table!r} in {region}. "
                "Add it to the role or user that runs this."
            )
        if code in (
            "ExpiredToken",
            "ExpiredTokenException",
            "UnrecognizedClientException",
            "InvalidSignatureException",
            "IncompleteSignatureException",
            "InvalidClientTokenId",
            "MissingAuthenticationTokenException",
        ):
            return StoreError(f"AWS refused the credentials ({code}). Sign in again.")
        if code == "ValidationException":
            return StoreError(
                f"DynamoDB refused {operation} on table {self.table!r} as invalid. "
                "Check its name and its keys."
            )
        return StoreError(f"DynamoDB refused {operation} on table {self.table!r} ({code}).")

    def _where(self) -> str:
        """The endpoint without user name and password, if one was set."""
        if not self._endpoint_url:
            return ""
        try:
            host = urlsplit(self._endpoint_url).netloc.rpartition("@")[2]
        except ValueError:
            return ""
        return f" at {host}" if host else ""

    def _check_keys(
        self,
        of: str,
        schema: Sequence[Mapping[str, str]],
        types: Mapping[str, str],
        wanted: tuple[str, str],
    ) -> None:
        keys = {key["KeyType"]: key["AttributeName"] for key in schema}
        found = tuple(keys.get(kind) for kind in ("HASH", "RANGE"))
        if found != wanted or any(types.get(name) != "S" for name in wanted):
            has = ", ".join(f"{name} ({types.get(name)})" for name in found if name)
            raise StoreError(
                f"The {of}table {self.table!r} has the keys {has}; expected {wanted[0]} and "
                f"{wanted[1]}, both S. Make a table with create_table, or name another one."
            )


def _meta(run: PreparedRun, writer: str) -> tuple[Item, Item]:
    """The META item of a run while it is written, and when it is whole."""
    key = _key(run.run_id, "META")
    writing = key | {
        "state": {"S": "WRITING"},
        "writer": {"S": writer},
        "schema": {"N": str(SCHEMA)},
    }
    complete = {
        **_columns(run.report),
        **writing,
        "state": {"S": "COMPLETE"},
        "gsi1pk": {"S": "RUN"},
        "gsi1sk": {"S": f"{run.created}#{run.run_id}"},
        "samples": {"N": str(len(run.samples))},
        "summary": {"S": to_text(run.summary)},
        "report": {"S": to_text(run.report)},
    }
    return writing, complete


def _sample_item(run_id: str, writer: str, index: int, sample: Mapping[str, Any]) -> Item:
    return {
        **_columns(sample),
        **_key(run_id, f"SAMPLE#{index:08d}"),
        "writer": {"S": writer},
        "sample": {"S": to_text(sample)},
    }


def _columns(values: Mapping[str, Any]) -> Item:
    """The numbers among `values` as attributes; JSON alone keeps those out of DynamoDB's range."""
    columns: Item = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        number = Decimal(repr(value))
        small_enough = len(number.as_tuple().digits) <= 38 and number.adjusted() <= 125
        large_enough = number == 0 or number.adjusted() >= -130
        if name and name not in _OWN and small_enough and large_enough:
            columns[name] = {"N": str(number)}
    return columns


def _key(run_id: str, sk: str) -> Item:
    return {"pk": {"S": f"RUN#{run_id}"}, "sk": {"S": sk}}


def _key_schema(partition: str, sort: str) -> list[dict[str, str]]:
    return [
        {"AttributeName": partition, "KeyType": "HASH"},
        {"AttributeName": sort, "KeyType": "RANGE"},
    ]


def _of(run_id: str, writer: str) -> Item:
    return {":pk": {"S": f"RUN#{run_id}"}, ":sample": {"S": "SAMPLE#"}, ":writer": {"S": writer}}


def _overtaken(run_id: str) -> StoreError:
    return StoreError(
        f"Run {run_id!r} was written by another process at the same time. "
        "See what is stored, then publish again and overwrite it if need be."
    )


def _check_size(run_id: str, item: Item) -> None:
    size = sum(
        len(name.encode()) + sum(len(text.encode()) for text in value.values())
        for name, value in item.items()
    )
    if size > _MAX_ITEM_BYTES:
        what = item["sk"]["S"]
        part = "report" if what == "META" else f"sample {int(what.partition('#')[2])}"
        raise StoreError(
            f"The {part} of run {run_id!r} takes {size:,} bytes; "
            f"DynamoDB holds {_MAX_ITEM_BYTES:,}. Shorten its texts, or set results.store=sqlite."
        )


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _pause(seconds: float) -> None:
    time.sleep(seconds)
