"""Open the store that a run's settings name."""

import os

from ray_detox.store.errors import StoreError
from ray_detox.store.protocol import ResultStore


def open_store(
    kind: str,
    path: str | os.PathLike[str],
    table: str,
    region: str | None = None,
    endpoint_url: str | None = None,
    *,
    hurried: bool = False,
) -> ResultStore:
    """Return the store that the settings name; it opens or creates nothing before its first use.

    Args:
        kind: `sqlite` or `dynamodb`.
        path: file of the SQLite store.
        table: DynamoDB table.
        region: AWS region; None takes AWS_REGION, AWS_DEFAULT_REGION or the AWS profile's.
        endpoint_url: another DynamoDB endpoint, for emulators.
        hurried: give up on DynamoDB after two seconds; for readers who prefer an error to waiting.

    Raises:
        StoreError: `kind` is neither.
    """
    if kind == "sqlite":
        from ray_detox.store.sqlite import SQLiteStore

        return SQLiteStore(path)
    if kind == "dynamodb":
        # Imported late: a run that stores results in SQLite needs no boto3, whose import takes a
        # second.
        from ray_detox.store.dynamodb import DynamoDBStore

        return DynamoDBStore(table, region=region, endpoint_url=endpoint_url, hurried=hurried)
    raise StoreError(f"Unknown store {kind!r}; expected sqlite or dynamodb.")
