"""Print the state of the cluster or the stored files of a run as JSON; runs on the gateway.

python -m tests.many_nodes.query prepare             create the bucket and the table
python -m tests.many_nodes.query nodes               all nodes that Ray knows
python -m tests.many_nodes.query job ID              the status of a job
python -m tests.many_nodes.query stored STORAGE RUN  a run's contents of the bucket and the table
"""

import hashlib
import json
import os
import sys
import urllib.request
from typing import Any


def prepare() -> bool:
    """Create the bucket and the table."""
    import boto3

    from ray_detox.store.dynamodb import DynamoDBStore

    boto3.client("s3").create_bucket(
        Bucket="bucket",
        CreateBucketConfiguration={"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]},
    )
    DynamoDBStore("ray-detox").create_table()
    return True


def get(path: str) -> Any:
    """Send a GET request to the dashboard at `$RAY_API_SERVER_ADDRESS`."""
    request = urllib.request.Request(
        os.environ["RAY_API_SERVER_ADDRESS"] + path,
        headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def nodes() -> list[dict[str, Any]]:
    """Return the nodes with their ids, addresses and states."""
    return list(get("/api/v0/nodes")["data"]["result"]["result"])


def stored(storage: str, run_id: str) -> dict[str, Any]:
    """Return a run's checkpoints, shards, report and samples, and the hash of its adapter."""
    from ray_detox.runs.checkpoint_store import CheckpointStore
    from ray_detox.runs.storage import Storage, join_address
    from ray_detox.store.dynamodb import DynamoDBStore

    bucket = Storage(join_address(storage, run_id))
    checkpoints = CheckpointStore(bucket)
    newest = checkpoints.newest()
    assert newest is not None, f"{storage} has no checkpoint of {run_id}"
    adapter = newest.files["adapter/adapter_model.safetensors"]
    store = DynamoDBStore("ray-detox")
    return {
        "steps": checkpoints.steps(),
        "newest": newest.step,
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "shards": [
            name
            for folder in bucket.names("evaluation")
            for name in bucket.names(f"evaluation/{folder}")
        ],
        "runs": [run["run_id"] for run in store.list_runs()],
        "report": store.get_run(run_id),
        "history": store.get_history(run_id),
        "samples": list(store.get_samples(run_id)),
    }


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "prepare":
        found: Any = prepare()
    elif what == "nodes":
        found = nodes()
    elif what == "job":
        found = get(f"/api/jobs/{arguments[0]}")
    else:
        found = stored(*arguments)
    print(json.dumps(found))
