r"""The training loop of one worker: collect a rollout, update the policy, log, checkpoint.

    shards.batch(step) -> collect(...) -> learner.targets -> learner.update
                                                    \-> UpdateStats -> runtime.log
                               every k steps: checkpoint -> runtime.save (rank 0)

The loop reaches its surroundings through the small `Runtime` protocol. `stages/train.py`
implements it for a Ray Train worker, `runs/local.py` for a single process.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_detox.config import RunConfig
from ray_detox.data.shards import PromptShards
from ray_detox.models.policy import Policy
from ray_detox.records import Rollout, Scorer, Targets, UpdateStats
from ray_detox.rl import checkpoint, ppo
from ray_detox.rl.learner import Learner, Update
from ray_detox.rl.rollout import Collected, collect, recompute

T = TypeVar("T")

START_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.5)}
"""Largest mean and largest `START_QUANTILE`, in nats, of the difference between a token's
log-probability under the policy and under the reference before any training: sampling decodes token
by token and the reference scores all tokens at once, so the two round differently. No bound is set on
the maximum, which grows with the number of tokens."""

START_QUANTILE = 0.999


class StartError(RuntimeError):
    """The untrained policy differs from its reference."""


class Runtime(Protocol):
    """The surroundings of a worker: its rank, the other workers, the log and the checkpoints."""

    rank: int
    world_size: int

    def sum_over_workers(self, x: Tensor) -> Tensor:
        """Sum `x` over workers; every worker calls this in the same order."""

    def log(self, stats: UpdateStats) -> None:
        """Publish the metrics of a step; called on rank 0."""

    def save(
        self, step: int, write: Callable[[Path], None], objective: float | None, last: bool
    ) -> None:
        """Keep a checkpoint; called on rank 0.

        Args:
            step: steps done.
            write: fills an empty folder.
            objective: PPO's objective in the last step, score - kl_coef * kl; None before step 1.
            last: True if no step follows: return only when the checkpoint is safely stored.
        """

    def restore(self, read: Callable[[Path], T]) -> T | None:
        """Apply `read` to the newest checkpoint's folder; return None if there is none.

        Every worker gets the same checkpoint.
        """

    def should_stop(self) -> bool:
        """Return True if the run should end after this step; called on rank 0 only."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a worker's training."""

    step: int
    """Steps done in total."""
    stopped: bool
    """True if the run was stopped early."""


def train(
    config: RunConfig,
    runtime: Runtime,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    shards: PromptShards,
) -> Outcome:
    """Run PPO from the newest checkpoint, or from the start, to `train.steps`.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint is kept.
        StartError: the untrained policy differs from its reference.
    """
    learner = Learner(policy, config.ppo, config.seed, runtime.sum_over_workers)
    found = runtime.restore(lambda folder: checkpoint.read(folder, policy, learner))
    step, history = found or (0, list[UpdateStats]())
    stop = False

    def save(objective: float | None, last: bool) -> None:
        if runtime.rank == 0:
            write = lambda folder: checkpoint.write(folder, policy, learner, config, step, history)
            runtime.save(step, write, objective, last)

    if step == 0:
        save(None, last=False)

    while step < config.train.steps and not stop:
        began = time.perf_counter()
        batch = shards.batch(step)
        collected = collect(
            policy,
            tokenizer,
            scorer,
            batch,
            seed=config.seed,
            step=step,
            chunk_size=config.sampling.batch_size,
        )
        if step == 0:
            check_start(collected.rollout, policy.dtype)
        if config.ppo.recompute_logprobs:
            collected = recompute(policy, collected, config.ppo.micro_batch_size)

        update_began = time.perf_counter()
        kl_coef = learner.kl_coef
        targets = learner.targets(collected.rollout)
        update = learner.update(collected.rollout, targets, step=step, first_row=shards.first_row)
        step += 1

        now = time.perf_counter()
        seconds = collected.seconds | {"update": now - update_began, "total": now - began}
        stop_here = runtime.rank == 0 and runtime.should_stop()
        stats, stop = _reduce_stats(
            runtime,
            collected,
            targets,
            update,
            learner.log_ratio_max,
            step,
            kl_coef,
            seconds,
            stop_here,
        )
        learner.adapt_kl_coef(stats.kl)
        history.append(stats)
        if runtime.rank == 0:
            runtime.log(stats)
        last = stop or step == config.train.steps
        if last or step % config.train.checkpoint_every == 0:
            save(stats.score - kl_coef * stats.kl, last)

    return Outcome(step=step, stopped=stop and step < config.train.steps)


def check_start(rollout: Rollout, dtype: torch.dtype) -> None:
    """Check that the untrained policy equals its reference.

    Before the first update policy and reference are the same function, so the log-probabilities
    of the sampled tokens agree and the KL is 0. Otherwise every later reward would contain a KL
    penalty for a difference that training did not cause.

    Raises:
        StartError: the log-probabilities differ by more than `START_TOLERANCE`.
    """
    gaps = (rollout.logprobs - rollout.ref_logprobs)[rollout.response_mask].abs().sort().values
    high = float(gaps[math.ceil(START_QUANTILE * (len(gaps) - 1))])
    mean = float(gaps.mean())
    allowed_mean, allowed_high = START_TOLERANCE[dtype]
    if not (mean <= allowed_mean and high <= allowed_high):
        raise StartError(
            f"Before any training the policy differs from its reference by {high:.3g} nats on a token "
            f"(quantile {START_QUANTILE}) and by {mean:.3g} on average; rounding explains at most "
            f"{allowed_high} and {allowed_mean}. The base model or the adapter is not the one that "
            "sampled: check policy.model and policy.adapter."
        )


def _reduce_stats(
    runtime: Runtime,
    collected: Collected,
    targets: Targets,
    update: Update,
    log_ratio_max: float,
    step: int,
    kl_coef: float,
    seconds: dict[str, float],
    stop: bool,
) -> tuple[UpdateStats, bool]:
    """Reduce the metrics of a step over all workers, and share rank 0's wish to stop.

    One all-reduce carries all sums, so that a step waits for the other workers only once.
    """
    rollout, scores = collected.rollout, collected.scores
    mask = rollout.response_mask
    sums = {
        "rows": len(rollout),
        "score": scores.rewards.astype("float64").sum(),
        "score_square": (scores.rewards.astype("float64") ** 2).sum(),
        "toxicity": scores.toxicity.astype("float64").sum(),
        "truncated": scores.truncated.sum(),
        "kl": ppo.kl_k1(rollout.logprobs, rollout.ref_logprobs)[mask].double().sum().item(),
        "negative_logprob": -rollout.logprobs[mask].double().sum().item(),
        "tokens": mask.sum().item(),
        "workers": 1,
        "stop": float(stop),
    }
    # A sum over workers of numbers that only one of them has, so that their maximum can be taken.
    ranks = range(runtime.world_size)
    sums |= {f"max {r}": log_ratio_max if r == runtime.rank else 0.0 for r in ranks}
    sums |= {f"seconds {name}": value for name, value in seconds.items()}
    sums |= {f"term {name}": value.astype("float64").sum() for name, value in scores.terms.items()}
    packed = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64)
    total = dict(zip(sums, runtime.sum_over_workers(packed.to(mask.device)).tolist(), strict=True))

    rows, workers = total["rows"], total["workers"]
    mean = total["score"] / rows
    stats = UpdateStats(
        step=step,
        score=mean,
        score_std=max(total["score_square"] / rows - mean**2, 0.0) ** 0.5,
        toxicity=total["toxicity"] / rows,
        kl=total["kl"] / rows,
        kl_coef=kl_coef,
        entropy=total["negative_logprob"] / total["tokens"],
        length=total["tokens"] / rows,
        policy_loss=update.policy_loss,
        value_loss=update.value_loss,
        approx_kl=update.approx_kl,
        clip_fraction=update.clip_fraction,
        ratio=update.ratio,
        explained_variance=ppo.explained_variance(
            rollout.values, targets.returns, mask, runtime.sum_over_workers
        ),
        grad_norm=update.grad_norm,
        minibatches=update.minibatches,
        truncated=int(total["truncated"]),
        terms={name: total[f"term {name}"] / rows for name in scores.terms},
        seconds_sample=total["seconds sample"] / workers,
        seconds_score=total["seconds score"] / workers,
        seconds_reference=total["seconds reference"] / workers,
        seconds_update=total["seconds update"] / workers,
        seconds=total["seconds total"] / workers,
        log_ratio_std=update.log_ratio_std,
        log_ratio_max=max(total[f"max {r}"] for r in ranks),
    )
    return stats, total["stop"] > 0
