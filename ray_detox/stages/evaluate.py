"""Evaluation on Ray: tasks that measure held-out prompts before and after training.

    held-out rows --shard--> measure_shard (policy + adapter, scores from the reward actors)
                  --shard--> measure_shard --> paired examples, in the rows' order
                                   |
                                   '--> a file in the run's storage

The driver sends the adapter as bytes, so nodes need no shared file system. Measured shards are
stored, so a resumed run measures only the missing ones.
"""

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import ObjectRef

from ray_detox.bounded import DamagedError, parse_list
from ray_detox.config import PolicyConfig, RunConfig, SamplingConfig
from ray_detox.evaluation.examples import PairedExample
from ray_detox.records import PreparedRow
from ray_detox.resources import Needs, workers_that_fit
from ray_detox.rewards.messages import ActorHandle
from ray_detox.runs.checkpoint_store import unpack_folder
from ray_detox.runs.storage import Storage, StorageError
from ray_detox.stages.cluster.admission import CapacityWatchdog, has_autoscaler
from ray_detox.stages.cluster.nodes import free_nodes
from ray_detox.stages.events import PromptsMeasured
from ray_detox.stages.progress import ACTOR_TIMEOUT_S, EVENT_POLL_S, start_progress
from ray_detox.stages.rewards.pool import RewardPool

AdapterFiles = Mapping[str, bytes]
"""The files of an adapter's folder, by name."""
Examples = list[PairedExample]

_log = logging.getLogger(__name__)


@ray.remote(max_retries=5)
def measure_shard(
    config: RunConfig,
    adapter: AdapterFiles,
    rows: Sequence[PreparedRow],
    directory: ActorHandle,
    progress: ActorHandle,
) -> Examples:
    """Run `evaluation.measure` on some rows, with the trained adapter."""
    import torch
    from transformers import AutoTokenizer

    from ray_detox.evaluation.measure import measure
    from ray_detox.models.sources import local_folder
    from ray_detox.stages.rewards.client import RewardClient

    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    policy = _load_policy(config.policy, config.sampling, config.seed, device)
    unpack_folder(adapter, policy.load_adapter)
    folder_of_model = local_folder(config.policy.model, config.policy.revision, "policy.model")
    tokenizer = AutoTokenizer.from_pretrained(folder_of_model, trust_remote_code=False)
    scorer = RewardClient(directory, config)
    try:
        return measure(
            policy,
            tokenizer,
            scorer,
            rows,
            config,
            on_done=lambda count: progress.put.remote(PromptsMeasured(count)),
        )
    finally:
        scorer.close()


@functools.lru_cache(maxsize=1)
def _load_policy(policy: PolicyConfig, sampling: SamplingConfig, seed: int, device: str) -> Any:
    """Load the policy, once per process even if it measures several shards."""
    from ray_detox.models.loading import load_policy

    return load_policy(policy, sampling, seed, device)


def run_evaluation(
    config: RunConfig,
    adapter: AdapterFiles,
    rows: Sequence[PreparedRow],
    pool: RewardPool,
    need: Needs,
    on_event: Callable[[PromptsMeasured], None],
    storage: Storage | None = None,
    identity: Mapping[str, str] | None = None,
) -> Examples:
    """Measure all rows in `evaluate.shards` tasks; the examples are in the order of the rows.

    Args:
        config: of the run.
        adapter: the trained adapter.
        rows: held-out rows from `ingest`.
        pool: of the reward actors, loaded.
        need: resolved for this cluster.
        on_event: called after some prompts were measured.
        storage: of the run, for measured shards; None stores none.
        identity: fingerprints of the models and the data, by name: shards that were measured with
            others are not reused.

    Raises:
        ConfigError: the cluster had no resources for a task for `cluster.capacity_timeout_s`.
        RewardError: see `RewardPool.check_scoring`.
    """
    count = min(config.evaluate.shards, len(rows))
    # Every count-th row, so that all shards have prompts of similar lengths.
    shards = [list(range(first, len(rows), count)) for first in range(count)]
    kept = _KeptShards(storage, config, adapter, rows, identity or {})
    found: dict[int, Examples] = {}
    for number in range(count):
        if (earlier := kept.read(number, [rows[i] for i in shards[number]])) is not None:
            found[number] = earlier
            on_event(PromptsMeasured(len(earlier)))

    task = measure_shard.options(
        num_cpus=config.cluster.cpus_per_worker, num_gpus=need.gpus_per_worker
    )
    progress = start_progress()
    adapter_ref = ray.put(adapter)
    missing = [number for number in range(count) if number not in found]
    waiting: dict[ObjectRef[Examples], int] = {}
    done: list[ObjectRef[Examples]] = []
    watchdog = CapacityWatchdog(config, need.evaluation)
    try:
        while missing or waiting:
            if missing and (done or not waiting):
                room = max(0, _most_at_once(config, need, pool) - len(waiting))
                for number in missing[:room]:
                    of_shard = [rows[i] for i in shards[number]]
                    ref = task.remote(config, adapter_ref, of_shard, pool.directory, progress)
                    waiting[ref] = number
                del missing[:room]
            done, _ = ray.wait(list(waiting), timeout=EVENT_POLL_S)
            for ref in done:
                number = waiting.pop(ref)
                found[number] = ray.get(ref)
                kept.write(number, found[number])
            events = ray.get(progress.take.remote(), timeout=ACTOR_TIMEOUT_S)
            for event in events:
                on_event(event)
            pool.check_scoring()
            watchdog.check(something_happened=bool(done or events))
    finally:
        # After an error the other tasks would go on for nobody, if the caller keeps its connection. By
        # force, because one that waits for scores would notice nothing else.
        for ref in waiting:
            ray.cancel(ref, force=True)
        ray.kill(progress)
    examples: dict[int, PairedExample] = {}
    for number, shard in enumerate(shards):
        for i, example in zip(shard, found[number], strict=True):
            examples[i] = replace(example, index=i)
    return [examples[i] for i in range(len(rows))]


def _most_at_once(config: RunConfig, need: Needs, pool: RewardPool) -> int:
    """Return how many tasks may be submitted at once: those that fit beside the reward actors.

    A task that waits for resources would take those of a reward actor at the moment at which it dies.
    The actor could then not restart, and all tasks would wait for its scores.
    """
    if has_autoscaler():  # it adds nodes for tasks that wait
        return need.evaluation.main.max_count
    idle = [node.when_idle() for node in free_nodes()]
    actors = max(config.reward.min_actors, pool.metrics().actors)
    return max(1, workers_that_fit(need.evaluation, idle, actors))


class _KeptShards:
    """Measured shards in the storage of the run.

    The folder's name is a hash of everything that the result depends on, so shards that were
    measured with other settings, another adapter or other prompts are never reused.
    """

    def __init__(
        self,
        storage: Storage | None,
        config: RunConfig,
        adapter: AdapterFiles,
        rows: Sequence[PreparedRow],
        identity: Mapping[str, str],
    ) -> None:
        tree = config.to_dict()
        decisive = [tree[section] for section in ("seed", "data", "policy", "sampling")]
        decisive += [tree["evaluate"][name] for name in ("shards", "batch_size")]
        decisive += [config.reward.scoring_settings()]
        decisive += [hashlib.sha256(content).hexdigest() for _, content in sorted(adapter.items())]
        decisive += [[row.prompt_id, json.dumps(row.columns, default=str)] for row in rows]
        decisive += sorted(identity.items())
        self._storage = storage
        self._folder = (
            f"evaluation/{hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]}"
        )

    def read(self, number: int, rows: Sequence[PreparedRow]) -> Examples | None:
        """Return the examples of a stored shard; None if it is missing or damaged.

        Args:
            number: of the shard.
            rows: its held-out rows.
        """
        if self._storage is None:
            return None
        try:
            content = self._storage.read(self._name(number))
            if content is None:
                return None
            examples = [PairedExample.from_json(example) for example in parse_list(content)]
            if [example.prompt_id for example in examples] != [row.prompt_id for row in rows]:
                raise DamagedError("it does not have the prompts of this shard")
        except (StorageError, ValueError) as error:
            _log.warning("%s is damaged and will be measured again: %s", self._name(number), error)
            return None
        return examples

    def write(self, number: int, examples: Examples) -> None:
        """Store a shard; if that fails, a resumed run measures it again."""
        if self._storage is not None:
            with contextlib.suppress(StorageError):
                stored = [example.to_json() for example in examples]
                self._storage.write(self._name(number), json.dumps(stored).encode())

    def _name(self, number: int) -> str:
        return f"{self._folder}/shard-{number:05d}.json"
