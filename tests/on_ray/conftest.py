"""Fixtures for all tests of this folder: one local Ray cluster, and emulated S3 and DynamoDB.

Ray shuts down after the last test of the folder, so tests in other folders run without it.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Ray reads these only when it is imported. A cluster for tests needs no token, and frequent health
# checks make Ray Train return reports sooner.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

import pytest

from tests.environment import python_path

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WR_ENGINE": "python",
    # Workers import the reward functions in `on_ray`.
    "PYTHONPATH": python_path(Path(__file__).parents[1]),
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "AWS_CONFIG_FILE": "/nonexistent",
}


@pytest.fixture(scope="package")
def aws() -> Iterator[str]:
    """Start an emulated AWS, which boto3 and pyarrow use here and in all Ray workers; its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="package", autouse=True)
def cluster(aws: str) -> Iterator[None]:
    """Start Ray on this machine without GPUs, so that results are bit-identical."""
    import ray

    # A short path, because Ray's socket paths are limited to 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 * 1024 * 1024,
        _system_config={
            # A task's process keeps what it has imported (torch takes seconds) for the next task.
            "idle_worker_killing_time_threshold_ms": 600_000,
            # No process is started in advance, for each CPU.
            "enable_worker_prestart": False,
            "prestart_worker_first_driver": False,
        },
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
