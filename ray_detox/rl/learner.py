"""One PPO update of a policy on one rollout: targets, epochs, minibatches, optimiser.

Several workers differ from a single worker in one argument, `sum_over_workers`: token counts,
advantage moments, gradients and metrics are summed over workers, so the optimiser step equals
that of one worker holding all rows. This module knows nothing of Ray or of text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ray_detox.config import PPOConfig
from ray_detox.draws import minibatch_assignment
from ray_detox.errors import NonFiniteError
from ray_detox.models.policy import Policy
from ray_detox.records import Rollout, Targets
from ray_detox.rl import ppo


@dataclass(frozen=True, slots=True)
class Update:
    """Metrics of one update over all workers; means over its optimiser steps."""

    policy_loss: float
    value_loss: float
    approx_kl: float
    clip_fraction: float
    grad_norm: float
    """Norm of the adapter's gradient before clipping; with a shared critic also of the head's."""
    critic_grad_norm: float
    """Norm of a detached value head's gradient before clipping; else 0."""
    ratio: float
    """Mean probability ratio of the first minibatch, before any optimiser step: expected to be 1."""
    log_ratio_std: float
    """Standard deviation of the log ratio in the first minibatch, in nats: 0 but for rounding."""
    minibatches: int
    """Optimiser steps taken."""


# Sums over tokens; they share the gradient's all-reduce, which saves a round trip per minibatch.
_METRICS = (
    "policy_loss",
    "value_loss",
    "approx_kl",
    "clip_fraction",
    "ratio",
    "log_ratio",
    "log_ratio_square",
)


class Learner:
    """PPO updates of `policy`: holds the optimiser and the current KL coefficient."""

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig,
        seed: int,
        sum_over_workers: ppo.SumOverWorkers = ppo.identity,
    ) -> None:
        self.policy = policy
        self.config = config
        self.seed = seed
        self.sum_over_workers = sum_over_workers
        self.kl_coef = config.kl_coef
        self.trainable = policy.trainable()
        self.log_ratio_max = 0.0
        """Largest absolute log ratio in the last update's first minibatch, of this worker's rows."""
        detached = config.critic == "detached"
        is_critic = lambda name: detached and name.startswith("value_head.")
        self.critic_weights = [p for name, p in self.trainable.items() if is_critic(name)]
        self.policy_weights = [p for name, p in self.trainable.items() if not is_critic(name)]
        groups = [
            {"params": self.policy_weights, "lr": config.learning_rate},
            {"params": self.critic_weights, "lr": config.critic_learning_rate},
        ]
        self.optimiser = torch.optim.Adam([group for group in groups if group["params"]])

    def targets(self, rollout: Rollout) -> Targets:
        """Compute per-token KL, rewards, advantages and returns with the current KL coefficient."""
        config, mask = self.config, rollout.response_mask
        kl = torch.where(mask, ppo.reward_kl(rollout.logprobs, rollout.ref_logprobs), 0.0)
        kl_coef = self.kl_coef if config.kl_in == "reward" else 0.0
        rewards = ppo.token_rewards(rollout.scores, kl, mask, kl_coef)
        advantages, returns = ppo.gae(
            rewards, rollout.values, mask, config.gamma, config.gae_lambda
        )
        return Targets(
            kl=kl,
            rewards=rewards,
            advantages=ppo.standardise(advantages, mask, self.sum_over_workers),
            returns=returns,
        )

    def update(
        self, rollout: Rollout, targets: Targets, *, step: int, first_row: int = 0
    ) -> Update:
        """Take `minibatches` optimiser steps per epoch, for `epochs` passes over the rollout.

        Args:
            rollout: this worker's rows of the step's global batch.
            targets: from `targets(rollout)`.
            step: step of the run; determines the minibatch assignment.
            first_row: position of this worker's first row in the global batch.

        Raises:
            NonFiniteError: a loss or gradient is not finite; raised on every worker, before the
                minibatch changes the weights.
        """
        assignments = [
            self._assign_minibatches(step, epoch, first_row, len(rollout))
            for epoch in range(self.config.epochs)
        ]
        lengths = rollout.response_mask.sum(dim=1).cpu().numpy()
        sizes = lengths + rollout.query_mask.sum(dim=1).cpu().numpy()
        tokens = self.sum_over_workers(
            torch.tensor(
                [lengths[rows].sum() for assignment in assignments for rows in assignment],
                dtype=torch.float64,
            ).to(self.policy.device)
        ).tolist()

        metrics: list[dict[str, float]] = []
        for rows, token_count in zip(
            (r for assignment in assignments for r in assignment), tokens, strict=True
        ):
            self.optimiser.zero_grad(set_to_none=False)
            # Sorted by size, so that the rows of a micro-batch need little padding.
            by_size = rows[np.argsort(sizes[rows], kind="stable")]
            sums, largest = self._backward(rollout, targets, by_size, token_count)
            if not metrics:
                self.log_ratio_max = float(largest)
            measured = self._reduce_and_clip(sums)
            if not all(np.isfinite(v) for v in measured.values()):
                bad = ", ".join(name for name, v in measured.items() if not np.isfinite(v))
                raise NonFiniteError(
                    f"Not a finite number in step {step + 1}: {bad}. The weights are those before this "
                    "minibatch. Lower ppo.learning_rate or ppo.max_grad_norm, or raise ppo.kl_coef."
                )
            if self._exceeds_target_kl(measured["approx_kl"]):
                break
            self.optimiser.step()
            metrics.append(measured)

        return self._summary(metrics, measured)

    def _assign_minibatches(
        self, step: int, epoch: int, first_row: int, rows: int
    ) -> list[np.ndarray]:
        """Return this worker's rows of each minibatch of an epoch."""
        config = self.config
        assignment = minibatch_assignment(
            self.seed, step, epoch, config.prompts_per_step, config.minibatches
        )
        own = assignment[first_row : first_row + rows]
        return [np.flatnonzero(own == m) for m in range(config.minibatches)]

    def _backward(
        self, rollout: Rollout, targets: Targets, rows: np.ndarray, token_count: float
    ) -> tuple[Tensor, Tensor]:
        """Add this worker's gradient of a minibatch to `.grad`.

        Returns:
            this worker's sums of `_METRICS`, and its largest absolute log ratio.
        """
        largest = torch.zeros((), device=self.policy.device)
        sums = torch.zeros(len(_METRICS), dtype=torch.float64, device=self.policy.device)
        for start in range(0, len(rows), self.config.micro_batch_size):
            part = torch.from_numpy(rows[start : start + self.config.micro_batch_size])
            micro = rollout.select(part)
            loss, metrics, log_ratio = self._loss(
                micro, targets.select(part, micro.response_ids.shape[1])
            )
            (loss / token_count).backward()
            sums += metrics
            largest = torch.maximum(largest, log_ratio)
        return sums / token_count, largest

    def _loss(self, rollout: Rollout, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss and `_METRICS`, summed over a micro-batch, and its largest absolute log ratio."""
        config, mask = self.config, rollout.response_mask
        new = self.policy.score_tokens(rollout.tokens)
        policy_loss, clipped = ppo.policy_loss(
            new.logprobs, rollout.logprobs, targets.advantages, mask, config.clip_range
        )
        loss, value_loss = policy_loss.sum(), torch.zeros_like(policy_loss)
        if config.critic != "none":
            value_loss = ppo.value_loss(
                new.values, rollout.values, targets.returns, mask, config.value_clip_range
            )
            # The weight balances two losses on the same parameters; a detached head has its own.
            weight = config.value_coef if config.critic == "shared" else 1.0
            loss = loss + weight * value_loss.sum()
        if config.kl_in == "loss" and self.kl_coef:
            loss = loss + self.kl_coef * ppo.loss_kl(new.logprobs, rollout.ref_logprobs).sum()

        with torch.no_grad():
            log_ratio = torch.where(mask, new.logprobs - rollout.logprobs, 0.0)
            ratio = torch.where(mask, ppo.probability_ratio(new.logprobs, rollout.logprobs), 0.0)
            metrics = torch.stack(
                [
                    policy_loss.sum(),
                    value_loss.sum(),
                    torch.where(mask, ppo.approx_kl(rollout.logprobs, new.logprobs), 0.0).sum(),
                    clipped.sum(),
                    ratio.sum(),
                    log_ratio.sum(),
                    log_ratio.square().sum(),
                ]
            ).double()
        return loss, metrics, log_ratio.abs().max()

    def _reduce_and_clip(self, sums: Tensor) -> dict[str, float]:
        """Sum gradients and metrics over workers in one all-reduce, then clip the gradients.

        A detached value head is clipped by itself: a common norm would let the size of the value
        loss scale the policy's step.
        """
        parameters = list(self.trainable.values())
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [sums.to(gradients[0].dtype)])
        flat = self.sum_over_workers(flat)
        start = 0
        for parameter in parameters:
            size = parameter.numel()
            parameter.grad = flat[start : start + size].view_as(parameter).clone()
            start += size
        limit = self.config.max_grad_norm
        return dict(zip(_METRICS, flat[start:].tolist(), strict=True)) | {
            "grad_norm": float(nn.utils.clip_grad_norm_(self.policy_weights, limit)),
            "critic_grad_norm": float(nn.utils.clip_grad_norm_(self.critic_weights, limit)),
        }

    def _exceeds_target_kl(self, approx_kl: float) -> bool:
        """Return True if the update should end before its next optimiser step."""
        limit = self.config.target_kl
        return limit is not None and approx_kl > limit

    def _summary(self, metrics: list[dict[str, float]], last: dict[str, float]) -> Update:
        steps = len(metrics)
        # If the first minibatch already exceeds the target KL, only its metrics exist.
        metrics = metrics or [last]
        mean = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        del mean["log_ratio"], mean["log_ratio_square"]
        first = metrics[0]
        variance = first["log_ratio_square"] - first["log_ratio"] ** 2
        at_first = {"ratio": first["ratio"], "log_ratio_std": max(variance, 0.0) ** 0.5}
        return Update(**(mean | at_first), minibatches=steps)

    def adapt_kl_coef(self, kl: float) -> None:
        """Adapt the KL coefficient to a step's KL per response, if the controller is adaptive."""
        config = self.config
        if config.kl_controller == "adaptive":
            self.kl_coef = ppo.next_kl_coef(
                self.kl_coef,
                kl,
                config.adaptive_kl_target,
                config.adaptive_kl_horizon,
                config.prompts_per_step,
                config.kl_coef_min,
            )

    # ---- state ---------------------------------------------------------------------------------

    def optimiser_state(self) -> dict[str, Tensor]:
        """Return Adam's moments and step counts by parameter name, flat, for safetensors."""
        state = {}
        for name, parameter in self.trainable.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"{key}:{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return state

    def load_optimiser_state(self, state: dict[str, Tensor]) -> None:
        """Restore the state that `optimiser_state` returned."""
        for name, parameter in self.trainable.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {k: state[f"{k}:{name}"] for k in keys if f"{k}:{name}" in state}
            if found:
                # Adam expects its step count on the CPU and its moments on the weights' device.
                self.optimiser.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device)
                    for k, v in found.items()
                }
