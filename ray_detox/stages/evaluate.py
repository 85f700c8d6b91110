r"""Ray tasks that measure before and after, and the final one that stores the result.

    held-out rows --shard--> measure_shard (policy + adapter, scores from the reward actors)
                  --shard--> measure_shard                  \
                                                             store_result: deltas, report, store

The adapter travels as bytes, so that no file system has to be shared.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from ray_detox.config import RunConfig
from ray_detox.run_folder import RunFolder
from ray_detox.stages.train import POLL_S, Progress

AdapterFiles = dict[str, bytes]


def pack_adapter(folder: Path) -> AdapterFiles:
    """The files of an adapter's folder by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


@ray.remote
def measure_shard(
    config: RunConfig,
    adapter: AdapterFiles,
    rows: Sequence[Mapping[str, Any]],
    directory: Any,
    progress: Any,
) -> list[dict[str, Any]]:
    """`evaluation.measure` of some rows, with the trained adapter."""
    import torch
    from transformers import AutoTokenizer

    from ray_detox.evaluation import measure
    from ray_detox.policy import load_policy
    from ray_detox.sources import local_folder
    from ray_detox.stages.score import RewardClient

    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    policy = load_policy(config.policy, config.sampling, config.seed, device)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in adapter.items():
            (Path(folder) / name).write_bytes(content)
        policy.load_adapter(Path(folder))
    folder_of_model = local_folder(config.policy.model, config.policy.revision, "policy.model")
    tokenizer = AutoTokenizer.from_pretrained(folder_of_model)
    with contextlib.closing(RewardClient(directory, config.reward)) as scorer:
        return measure(
            policy,
            tokenizer,
            scorer,
            rows,
            config,
            on_done=lambda count: progress.put.remote({"kind": "measured", "prompts": count}),
        )


def run_evaluation(
    config: RunConfig,
    adapter: AdapterFiles,
    rows: Sequence[Mapping[str, Any]],
    directory: Any,
    gpus_per_worker: float,
    on_event: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Measure all rows on `evaluate.shards` tasks; samples come back in the rows' order."""
    shards = min(config.evaluate.shards, len(rows))
    progress = Progress.remote()  # type: ignore[attr-defined]
    task = measure_shard.options(
        num_cpus=config.train.cpus_per_worker, num_gpus=gpus_per_worker, max_retries=2
    )
    adapter_ref = ray.put(adapter)
    # Dealt out in turn: the shards then have prompts of all lengths alike.
    waiting = [
        task.remote(config, adapter_ref, list(rows[shard::shards]), directory, progress)
        for shard in range(shards)
    ]
    refs = list(waiting)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
        for event in ray.get(progress.take.remote()):
            on_event(event)
    ray.kill(progress)
    samples: list[dict[str, Any]] = [{} for _ in rows]
    for shard, found in enumerate(ray.get(refs)):
        for i, sample in enumerate(found):
            index = i * shards + shard
            samples[index] = sample | {"index": index}
    return samples


@ray.remote(num_cpus=0, max_retries=3)
def store_result(
    config: RunConfig,
    folder: RunFolder,
    samples: list[dict[str, Any]],
    facts: Mapping[str, Any],
    *,
    attempt: str,
    overwrite: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
    """The final task: deltas, report, both written to the run's folder and then to the store.

    A store that fails must not lose a run: the report comes back all the same, with the store's
    sentence as the third value.

    Args:
        config: of the run.
        folder: of the run, on this machine.
        samples: from `run_evaluation`.
        facts: further arguments of `summarise`.
        attempt: a name that is the same when Ray runs this task again after a crash; a store lets
            an attempt write again what it had begun, and nobody else.
        overwrite: replace a stored run of the same id; for runs that were resumed.
    """
    from ray_detox.evaluation import summarise
    from ray_detox.publish import publish
    from ray_detox.store import StoreError

    report = summarise(samples, config, **facts)
    folder.write_result(report, samples)
    try:
        publish(config.results, folder, attempt=attempt, overwrite=overwrite)
    except StoreError as error:
        return report, samples, str(error)
    return report, samples, None
