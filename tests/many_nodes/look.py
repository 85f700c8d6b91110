"""What the cluster says, and what a run left behind; run at the switch, prints JSON.

python -m tests.many_nodes.look prepare           makes the bucket and the table
python -m tests.many_nodes.look nodes             every node that Ray knows, by its address
python -m tests.many_nodes.look job ID            a job
python -m tests.many_nodes.look left STORAGE RUN  in the bucket, in the table
"""

import hashlib
import json
import os
import sys
import urllib.request
from typing import Any


def prepare() -> bool:
    """Make the bucket and the table."""
    import boto3

    from ray_detox.store.dynamodb import DynamoDBStore

    boto3.client("s3").create_bucket(
        Bucket="bucket",
        CreateBucketConfiguration={"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]},
    )
    DynamoDBStore("ray-detox").create_table()
    return True


def ask(path: str) -> Any:
    """What the dashboard of `$RAY_API_SERVER_ADDRESS` answers."""
    request = urllib.request.Request(
        os.environ["RAY_API_SERVER_ADDRESS"] + path,
        headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def nodes() -> list[dict[str, Any]]:
    """The nodes with their ids, addresses and states."""
    return list(ask("/api/v0/nodes")["data"]["result"]["result"])


def left(storage: str, run_id: str) -> dict[str, Any]:
    """The checkpoints, shards, report and samples of a run, and its adapter's digest."""
    from ray_detox.runs.checkpoint_store import CheckpointStore
    from ray_detox.runs.storage import Storage
    from ray_detox.store.dynamodb import DynamoDBStore

    kept = Storage(f"{storage}/{run_id}")
    checkpoints = CheckpointStore(kept)
    newest = checkpoints.newest()
    assert newest is not None, f"no checkpoint of {run_id} is in {storage}"
    adapter = newest.files["adapter/adapter_model.safetensors"]
    store = DynamoDBStore("ray-detox")
    return {
        "steps": checkpoints.steps(),
        "newest": newest.step,
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "shards": [
            name
            for folder in kept.names("evaluation")
            for name in kept.names(f"evaluation/{folder}")
        ],
        "runs": [run["run_id"] for run in store.list_runs()],
        "report": store.get_run(run_id),
        "curves": store.get_history(run_id),
        "samples": list(store.get_samples(run_id)),
    }


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "prepare":
        found: Any = prepare()
    elif what == "nodes":
        found = nodes()
    elif what == "job":
        found = ask(f"/api/jobs/{words[0]}")
    else:
        found = left(*words)
    print(json.dumps(found))
