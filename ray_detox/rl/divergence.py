"""When a run has diverged: rules on its metrics that a healthy run never meets.

    not finite  the KL to the reference of one step is NaN or infinite
    drift       the KL to the reference of one step is above ppo.max_kl
    collapse    in three steps in a row, compared with step 1:
                    the entropy per token is below a hundredth, or
                    at least half of the responses ended then, and below a twentieth of that now

The limits are far from healthy runs, whose KL stays below about 10 nats and whose entropy and share
of finished responses change by a factor of a few. A policy without entropy gives every prompt one
response, so its advantages are zero and no later step can bring it back; a policy that only ends
its responses at once has no entropy either. The metrics are reduced over workers, so all workers
decide alike.
"""

import math
from collections.abc import Sequence

from ray_detox.config import PPOConfig
from ray_detox.records import UpdateStats

COLLAPSED_STEPS = 3
"""Steps in a row that must look collapsed: a single small batch may by chance."""
LOWEST_ENTROPY_SHARE = 0.01
"""Share of the first step's entropy per token, below which a step looks collapsed."""
LOWEST_FINISHED_SHARE = 0.05
"""Share of the first step's finished responses, below which a step looks collapsed."""


class DivergedError(RuntimeError):
    """The policy has diverged; the checkpoint of this step is not kept, earlier ones are."""


def check_divergence(history: Sequence[UpdateStats], config: PPOConfig) -> None:
    """Check the newest step of a run.

    Args:
        history: metrics of all steps so far.
        config: its `max_kl` and `stop_on_collapse` turn the rules off.

    Raises:
        DivergedError: the policy has drifted too far or has collapsed; the message is one line.
    """
    step = history[-1].step
    if not all(math.isfinite(kl) for kl in _kls(history[-1])):
        raise DivergedError(
            f"Training has diverged in step {step}: the KL to the reference is not a finite number. "
            "Lower ppo.learning_rate or ppo.max_grad_norm, or raise ppo.kl_coef."
        )
    if (reason := _drift(history[-1], config.max_kl)) is not None:
        raise DivergedError(
            f"Training has diverged in step {step}: {reason}. Lower ppo.learning_rate or raise "
            "ppo.kl_coef; a higher ppo.max_kl lets the run go on."
        )
    if config.stop_on_collapse and (reason := _collapse(history)) is not None:
        raise DivergedError(
            f"The policy has collapsed in step {step}: {reason}. Lower ppo.learning_rate or raise "
            "ppo.kl_coef; ppo.stop_on_collapse=false lets the run go on."
        )


def _kls(stats: UpdateStats) -> list[float]:
    # The probe measures the policy after the step's update, before its checkpoint is kept.
    return [stats.kl] if stats.probe_kl is None else [stats.kl, stats.probe_kl]


def _drift(stats: UpdateStats, max_kl: float | None) -> str | None:
    kl = max(_kls(stats))
    if max_kl is None or kl <= max_kl:
        return None
    return f"the KL to the reference is {kl:.1f} nats per response, above ppo.max_kl={max_kl:g}"


def _collapse(history: Sequence[UpdateStats]) -> str | None:
    first, latest = history[0], history[-COLLAPSED_STEPS:]
    if len(latest) < COLLAPSED_STEPS:
        return None
    if all(stats.entropy < LOWEST_ENTROPY_SHARE * first.entropy for stats in latest):
        return (
            f"the entropy per token is {latest[-1].entropy:.2g} nats, and was {first.entropy:.2g} "
            "in step 1"
        )
    if first.finished >= 0.5 and all(
        stats.finished < LOWEST_FINISHED_SHARE * first.finished for stats in latest
    ):
        return (
            f"{latest[-1].finished:.0%} of the responses end before their limit, and "
            f"{first.finished:.0%} did in step 1"
        )
    return None
