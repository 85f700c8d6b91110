r"""The training loop of one worker: collect a rollout, update the policy, log, checkpoint.

    shards.batch(step) -> collect(...) -> learner.targets -> learner.update
                                                    \-> UpdateStats -> runtime.log
      every probe_every steps: shards.probe() -> collect(...) -> objective of the checkpoint
                 every checkpoint_every steps: checkpoint -> runtime.save (rank 0)

The loop reaches its surroundings through the small `Runtime` protocol. `stages/train.py`
implements it for a Ray Train worker, `runs/local.py` for a single process.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_detox.config import RunConfig, TrainConfig
from ray_detox.data.shards import PromptShards
from ray_detox.draws import EVALUATION
from ray_detox.errors import NonFiniteError
from ray_detox.models.policy import Policy
from ray_detox.records import Objective, PromptBatch, Rollout, Scorer, Targets, UpdateStats
from ray_detox.rl import checkpoint, ppo
from ray_detox.rl.divergence import check_divergence
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
        self,
        step: int,
        write: Callable[[Path], None],
        objective: Objective | None,
        last: bool,
    ) -> None:
        """Keep a checkpoint; called on rank 0.

        Args:
            step: steps done.
            write: fills an empty folder.
            objective: of the saved policy on the probe prompts, see `Probe`; None if not measured.
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


@dataclass(frozen=True, slots=True)
class Probe:
    """The policy on the probe prompts: always the same prompts and the same sampling noise."""

    score: float
    """Mean reward of a response."""
    kl: float
    """KL to the reference per response, in nats."""
    seconds: float
    """Duration, mean over workers."""

    def objective(self, kl_coef: float) -> float:
        """Return the score less the KL penalty, by which checkpoints are compared.

        Args:
            kl_coef: the same for all checkpoints of a run, whatever an adaptive controller does.
        """
        return self.score - kl_coef * self.kl


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
        NonFiniteError: a loss, gradient or log-probability is NaN or infinite; the last checkpoint
            is kept.
        DivergedError: the policy has drifted too far or collapsed; the last checkpoint is that of
            an earlier step. A resumed run repeats the steps since, and stops again.
        StartError: the untrained policy differs from its reference.
    """
    learner = Learner(policy, config.ppo, config.seed, runtime.sum_over_workers)
    found = runtime.restore(lambda folder: checkpoint.read(folder, policy, learner))
    step, history = found or (0, list[UpdateStats]())
    stop = False

    def respond(batch: PromptBatch, position: int, gamma: float | None = None) -> Collected:
        return collect(
            policy,
            tokenizer,
            scorer,
            batch,
            seed=config.seed,
            step=position,
            chunk_size=config.sampling.batch_size,
            unfinished_penalty=config.ppo.unfinished_penalty,
            bootstrap_gamma=gamma,
        )

    def rollout_of_step() -> Collected:
        gamma = config.ppo.gamma if config.ppo.bootstrap_unfinished else None
        collected = respond(shards.batch(step), step, gamma)
        if step == 0:
            check_start(collected.rollout, policy.dtype)
        return collected

    def probe() -> Probe | None:
        if not is_probed(step, config.train):
            return None
        batch = shards.probe(config.train.probe_prompts)
        return measure_probe(runtime, batch, respond, policy.device)

    def save(probed: Probe | None, last: bool) -> None:
        if runtime.rank == 0:
            write = lambda folder: checkpoint.write(folder, policy, learner, config, step, history)
            # The coefficient of the settings, not the controller's: one price for all checkpoints.
            objective = None
            if probed is not None:
                value = probed.objective(config.ppo.kl_coef)
                objective = Objective(value, objective_key(config))
            runtime.save(step, write, objective, last)

    if step == 0:
        save(probe(), last=False)

    while step < config.train.steps and not stop:
        began = time.perf_counter()
        collected = on_all_workers(runtime, policy.device, rollout_of_step)
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
            learner,
            step,
            kl_coef,
            seconds,
            stop_here,
        )
        learner.adapt_kl_coef(stats.kl)
        probed = probe()
        if probed is not None:
            stats = replace(
                stats,
                probe_score=probed.score,
                probe_kl=probed.kl,
                seconds_probe=probed.seconds,
            )
        history.append(stats)
        if runtime.rank == 0:
            runtime.log(stats)
        # Before the checkpoint: that of a diverged policy must not replace an earlier one.
        check_divergence(history, config.ppo)
        last = stop or step == config.train.steps
        if last or step % config.train.checkpoint_every == 0:
            save(probed, last)

    return Outcome(step=step, stopped=stop and step < config.train.steps)


def on_all_workers(runtime: Runtime, device: torch.device, work: Callable[[], T]) -> T:
    """Return the result of `work`, or raise on every worker if it fails on one of them.

    Otherwise the others would wait for the one that failed in their next sum, until that times out.

    Args:
        runtime: sums over workers; every worker calls this.
        device: of the policy, on which workers exchange sums.
        work: its part on this worker.

    Raises:
        NonFiniteError, StartError: `work` raised it, here or on another worker.
    """
    failure: NonFiniteError | StartError | None = None
    try:
        result = work()
    except (NonFiniteError, StartError) as error:
        failure = error
    failed = [isinstance(failure, kind) for kind in (NonFiniteError, StartError)]
    packed = torch.tensor(failed, dtype=torch.float64, device=device)
    not_finite, not_equal = runtime.sum_over_workers(packed).tolist()
    if failure is not None:
        raise failure
    if not_finite:
        raise NonFiniteError(
            "The policy's log-probabilities are not finite numbers on another worker, so it cannot "
            "sample. If the weights of policy.model have no NaN, set policy.dtype=float32."
        )
    if not_equal:
        raise StartError(
            "Before any training the policy differs from its reference on another worker. The base "
            "model or the adapter is not the same on every node: check policy.model and policy.adapter."
        )
    return result


def is_probed(step: int, train: TrainConfig) -> bool:
    """Return True if the policy after `step` steps is measured on the probe prompts.

    It is at the start, at the end, and at the first regular checkpoint after each `probe_every`
    steps. This depends on the step alone, so a resumed run measures the same checkpoints; the one
    that a stopped run writes early is measured only if its step is due.
    """
    if train.probe_prompts == 0:
        return False
    if step in (0, train.steps):
        return True
    before, off = step - train.checkpoint_every, step % train.checkpoint_every
    return off == 0 and step // train.probe_every > before // train.probe_every


def objective_key(config: RunConfig) -> str:
    """Return a hash of the settings on which an objective depends.

    Objectives of the same key are comparable. Settings that cost or save only time and memory are
    left out, so a run that is resumed with other ones keeps its best checkpoint.
    """
    reward = config.reward.scoring_settings()
    del reward["batch_size"]
    settings = {
        "seed": config.seed,
        "data": config.data.model_dump(mode="json"),
        "sampling": config.sampling.model_dump(mode="json", exclude={"batch_size"}),
        "reward": reward,
        "kl_coef": config.ppo.kl_coef,
        "unfinished_penalty": config.ppo.unfinished_penalty,
        "probe_prompts": config.train.probe_prompts,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def measure_probe(
    runtime: Runtime,
    batch: PromptBatch,
    respond: Callable[[PromptBatch, int], Collected],
    device: torch.device,
) -> Probe:
    """Measure the policy on the probe prompts of all workers.

    Args:
        runtime: sums over workers; every worker calls this.
        batch: this worker's probe prompts, maybe none.
        respond: `collect` with the policy, from a batch and the position of its sampling noise.
        device: of the policy, on which workers exchange sums.
    """
    began = time.perf_counter()
    score = kl = 0.0
    collect_probe = lambda: respond(batch, EVALUATION) if len(batch) else None
    collected = on_all_workers(runtime, device, collect_probe)
    if collected is not None:
        rollout = collected.rollout
        score, kl = rollout.scores.double().sum().item(), _kl_sum(rollout)
    seconds = time.perf_counter() - began
    packed = torch.tensor([len(batch), score, kl, seconds, 1], dtype=torch.float64)
    rows, score, kl, seconds, workers = runtime.sum_over_workers(packed.to(device)).tolist()
    return Probe(score / rows, kl / rows, seconds / workers)


def _kl_sum(rollout: Rollout) -> float:
    """Sum the KL to the reference over all tokens, in nats."""
    kl = ppo.reward_kl(rollout.logprobs, rollout.ref_logprobs)[rollout.response_mask]
    return kl.double().sum().item()


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
    learner: Learner,
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
        "score": rollout.scores.double().sum().item(),
        "score_square": (rollout.scores.double() ** 2).sum().item(),
        "finished": collected.finished.sum(),
        "toxicity": scores.toxicity.astype("float64").sum(),
        "truncated": scores.truncated.sum(),
        "kl": _kl_sum(rollout),
        "negative_logprob": -rollout.logprobs[mask].double().sum().item(),
        "tokens": mask.sum().item(),
        "workers": 1,
        "stop": float(stop),
    }
    # A sum over workers of numbers that only one of them has, so that their maximum can be taken.
    ranks = range(runtime.world_size)
    sums |= {f"max {r}": learner.log_ratio_max if r == runtime.rank else 0.0 for r in ranks}
    sums |= {f"seconds {name}": value for name, value in seconds.items()}
    sums |= {f"term {name}": value.astype("float64").sum() for name, value in scores.terms.items()}
    packed = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64)
    total = dict(zip(sums, runtime.sum_over_workers(packed.to(mask.device)).tolist(), strict=True))

    explained_variance = 0.0
    if learner.policy.value_head is not None:
        explained_variance = ppo.explained_variance(
            rollout.values, targets.returns, mask, runtime.sum_over_workers
        )
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
        finished=total["finished"] / rows,
        policy_loss=update.policy_loss,
        value_loss=update.value_loss,
        approx_kl=update.approx_kl,
        clip_fraction=update.clip_fraction,
        ratio=update.ratio,
        log_ratio_std=update.log_ratio_std,
        log_ratio_max=max(total[f"max {r}"] for r in ranks),
        explained_variance=explained_variance,
        grad_norm=update.grad_norm,
        minibatches=update.minibatches,
        truncated=int(total["truncated"]),
        terms={name: total[f"term {name}"] / rows for name in scores.terms},
        seconds_sample=total["seconds sample"] / workers,
        seconds_score=total["seconds score"] / workers,
        seconds_reference=total["seconds reference"] / workers,
        seconds_update=total["seconds update"] / workers,
        seconds=total["seconds total"] / workers,
        seconds_probe=0.0,
        probe_score=None,
        probe_kl=None,
    )
    return stats, total["stop"] > 0
