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
    """The store that a run's settings name; nothing is opened or created yet.

    Args:
        kind: `sqlite` or `dynamodb`.
        path: file of the SQLite store.
        table: DynamoDB table.
        region: AWS region; None takes AWS_REGION, AWS_DEFAULT_REGION or the AWS profile's.
        endpoint_url: another DynamoDB endpoint, for emulators.
        hurried: give up on DynamoDB after two seconds, for readers who would rather be told.
    """
    # Imported here: a laptop's run needs no boto3, and its import takes a second.
    if kind == "sqlite":
        from ray_detox.store.sqlite import SQLiteStore

        return SQLiteStore(path)
    if kind == "dynamodb":
        from ray_detox.store.dynamodb import DynamoDBStore

        return DynamoDBStore(table, region=region, endpoint_url=endpoint_url, hurried=hurried)
    raise StoreError(f"Unknown store {kind!r}; expected sqlite or dynamodb.")
