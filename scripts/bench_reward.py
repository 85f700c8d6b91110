"""How many texts a second the reward actors score, beside a bare loop in one process.

    python scripts/bench_reward.py --texts 512

Prints ratios to that loop, which is measured anew beside each row, on the embedded classifier with
one thread per process: on a shared machine nothing else would mean much. The last rows are what
`serving.batch_across_workers` does where every caller has few texts.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray

from ray_detox.config import RunConfig, ServingConfig
from ray_detox.lab import corpus
from ray_detox.records import Scorer, ScoreRequest
from ray_detox.rewards.reward import Reward
from ray_detox.stages.rewards.client import RewardClient
from ray_detox.stages.rewards.pool import RewardPool

ACTORS = (1, 2, 4)
CALLERS = (1, 2, 4)
BATCH = 64


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=512, help="for every caller")
    args = parser.parse_args()
    source = [str(row["summary"]) for row in corpus.rows("ppo", 512)]
    texts = (source * (args.texts // len(source) + 1))[: args.texts]
    config = RunConfig(serving=ServingConfig(cpus_per_actor=0.5))

    reward = Reward(config.reward)
    score_all(reward, texts[:BATCH], BATCH)  # the first calls are slower
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}},
        _temp_dir=folder,
    )
    try:
        print(f"{'texts/s':<34}{'loop':>8}" + "".join(f"{f'{n} caller(s)':>16}" for n in CALLERS))
        for actors in ACTORS:
            several = config.replace(reward=config.reward.replace(actors=actors))
            print(row(f"{actors} actor(s), {BATCH} texts a call", reward, several, texts, BATCH))
        for across in (False, True):
            one = config.replace(serving=config.serving.replace(batch_across_workers=across))
            name = f"1 actor, 4 a call, {'across workers' if across else 'each by itself'}"
            print(row(name, reward, one, texts, 4))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def row(name: str, reward: Reward, config: RunConfig, texts: list[str], batch: int) -> str:
    """Texts a second of the loop and of a pool, for each number of callers."""
    with closing(RewardPool(config, 0.0)) as pool:
        pool.wait(timeout_s=300)
        loop = rate([reward], texts, batch)
        found = []
        for count in CALLERS:
            clients = [RewardClient(pool.directory, config) for _ in range(count)]
            for client in clients:
                score_all(client, texts[:batch], batch)
            found.append(rate(clients, texts, batch))
            for client in clients:
                client.close()
    return f"{name:<34}{loop:>8.0f}" + "".join(
        f"{f'{one:.0f} (x{one / loop:.2f})':>16}" for one in found
    )


def rate(scorers: list[Any], texts: list[str], batch: int) -> float:
    """Texts a second that all callers together have scored, each with its own scorer."""
    with ThreadPoolExecutor(len(scorers)) as threads:
        began = time.perf_counter()
        list(threads.map(lambda scorer: score_all(scorer, texts, batch), scorers))
        return len(texts) * len(scorers) / (time.perf_counter() - began)


def score_all(scorer: Scorer, texts: list[str], batch: int) -> None:
    """Score batch after batch, as a worker does: it has the next one only once it has learnt."""
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        scorer.submit(ScoreRequest([""] * len(part), part, [[]] * len(part), {})).result()


if __name__ == "__main__":
    main()
