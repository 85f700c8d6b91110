"""Measure how many texts per second the reward actors score, compared with a loop in one process.

    python scripts/bench_reward.py --texts 512

Prints a table of texts per second and of ratios to the loop. Absolute rates depend on what else the
machine does, so that each row measures the loop again, beside the actors. All processes use the
embedded classifier and one thread. The last two rows show the effect of
`serving.batch_across_workers` if every caller has few texts.
"""

import argparse
import logging
import os
import secrets
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if "RAY_AUTH_MODE" not in os.environ:  # as in a local run
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray

from ray_detox.config import RunConfig, ServingConfig
from ray_detox.lab import corpus
from ray_detox.records import Scorer, ScoreRequest
from ray_detox.rewards.reward import Reward
from ray_detox.stages.cluster.private import LOOPBACK, loopback_allowed, private_folder
from ray_detox.stages.rewards.client import RewardClient
from ray_detox.stages.rewards.pool import RewardPool

ACTORS = (1, 2, 4)
CALLERS = (1, 2, 4)
BATCH = 64


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=512, help="texts per caller")
    args = parser.parse_args()
    source = [str(row["summary"]) for row in corpus.rows("ppo", 512)]
    texts = (source * (args.texts // len(source) + 1))[: args.texts]
    config = RunConfig(serving=ServingConfig(cpus_per_actor=0.5))

    reward = Reward(config.reward)
    score_all(reward, texts[:BATCH], BATCH)  # warm up: the first calls are slower
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        with loopback_allowed():
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=0,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}},
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder),
            )
        stack.callback(ray.shutdown)
        print(f"{'texts/s':<34}{'loop':>8}" + "".join(f"{f'{n} caller(s)':>16}" for n in CALLERS))
        for actors in ACTORS:
            several = config.replace(reward=config.reward.replace(actors=actors))
            print(row(f"{actors} actor(s), {BATCH} texts per call", reward, several, texts, BATCH))
        for across in (False, True):
            one = config.replace(serving=config.serving.replace(batch_across_workers=across))
            name = f"1 actor, 4 per call, {'across workers' if across else 'call by call'}"
            print(row(name, reward, one, texts, 4))


def row(name: str, reward: Reward, config: RunConfig, texts: list[str], batch: int) -> str:
    """Measure the loop and one pool, and format a row with each number of callers."""
    with closing(RewardPool(config, 0.0)) as pool:
        pool.wait(timeout_s=300)
        loop = rate([reward], texts, batch)
        rates = []
        for count in CALLERS:
            clients = [RewardClient(pool.directory, config) for _ in range(count)]
            for client in clients:
                score_all(client, texts[:batch], batch)
            rates.append(rate(clients, texts, batch))
            for client in clients:
                client.close()
    return f"{name:<34}{loop:>8.0f}" + "".join(
        f"{f'{one:.0f} (x{one / loop:.2f})':>16}" for one in rates
    )


def rate(scorers: Sequence[Scorer], texts: list[str], batch: int) -> float:
    """Return the texts per second of all callers together, each with its own scorer."""
    with ThreadPoolExecutor(len(scorers)) as threads:
        start_s = time.perf_counter()
        list(threads.map(lambda scorer: score_all(scorer, texts, batch), scorers))
        return len(texts) * len(scorers) / (time.perf_counter() - start_s)


def score_all(scorer: Scorer, texts: list[str], batch: int) -> None:
    """Score one batch after another, as a worker does: it samples the next one after an update."""
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        scorer.submit(ScoreRequest([""] * len(part), part, [[]] * len(part), {})).result()


if __name__ == "__main__":
    main()
