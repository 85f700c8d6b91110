"""Run PPO in one process without Ray: a few steps on the embedded models, with times and memory.

    python scripts/single_process.py --steps 3 --device cuda --dtype bfloat16

Needs only torch, transformers and peft. It shows that the core works without Ray, and is the quickest
way to try a new machine or a new version of a library.
"""

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ray_detox.data.prompts import prepare
from ray_detox.data.shards import PromptShards
from ray_detox.lab import corpus
from ray_detox.models.loading import load_policy
from ray_detox.models.sources import local_folder
from ray_detox.recipes.loading import load_config
from ray_detox.records import PreparedRow
from ray_detox.rewards.reward import Reward
from ray_detox.rl.loop import train
from ray_detox.runs.local import LocalRuntime


def main() -> None:
    """Train for a few steps and print the metrics of each as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "settings", nargs="*", help="section.name=value, overrides of the recipe lab"
    )
    args = parser.parse_args()

    config = load_config(
        "lab", [f"train.steps={args.steps}", f"policy.dtype={args.dtype}", *args.settings]
    )
    policy = load_policy(
        config.policy, config.sampling, config.seed, args.device, config.ppo.critic
    )
    folder = local_folder(config.policy.model, config.policy.revision, "policy.model")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prepared = prepare(corpus.rows("ppo", 400), config.data, tokenizer)
    rows = [row for row in prepared if isinstance(row, PreparedRow)]
    count = config.data.shards
    shards = PromptShards(
        config, {shard: rows[shard::count] for shard in range(count)}, policy.pad_id
    )
    with tempfile.TemporaryDirectory() as kept:
        runtime = LocalRuntime(Path(kept))
        train(config, runtime, policy, tokenizer, Reward(config.reward, args.device), shards)
    for stats in runtime.logged:
        print(json.dumps(dataclasses.asdict(stats)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"peak memory {peak} MB, ray imported: {sys.modules.get('ray') is not None}",
        file=sys.stderr,
    )
    if torch.cuda.is_available():
        print(f"GPU memory {torch.cuda.max_memory_allocated() >> 20} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
