"""How many training workers the cluster has room for, now that it may have lost or found nodes.

`train.workers` is a number or a range. A group is started with as many workers as fit; what a
step computes does not depend on how many they are.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.records import UpdateStats
from ray_detox.resources import Needs, shortfall_beside, workers_that_fit
from ray_detox.stages.cluster.nodes import free_nodes

RESOURCE_POLL_S = 0.5
RELEASE_TIMEOUT_S = 20.0
"""Longest wait for what an earlier group held to be free again, where fewer workers would do."""


def wait_for_workers(
    config: RunConfig,
    need: Needs,
    pool: Any,
    hoped: int,
    stop_requested: threading.Event,
) -> int:
    """Wait until at least `train.min_workers` fit, and return how many do; 0 once a stop is asked for.

    Reward actors above their least number are let go where workers lack room, and those that have
    lost their place and wait for another come first: without them no worker gets far.

    Args:
        config: of the run.
        need: what workers and actors take.
        pool: of reward actors.
        hoped: as many workers as will fit once the earlier group has let go of what it held.
        stop_requested: by a person.

    Raises:
        ConfigError: too few fit, and have not for `cluster.capacity_timeout_s`.
    """
    least = config.train.min_workers
    began = time.monotonic()
    while True:
        nodes, unplaced = free_nodes(), _unplaced_actors(config, pool)
        fit = workers_that_fit(need.training, nodes, unplaced)
        # Of what was held, reward actors from a node that was lost may take a part.
        idle = [node.when_idle() for node in nodes]
        at_best = workers_that_fit(need.training, idle, config.reward.min_actors)
        waited_s = time.monotonic() - began
        if fit >= least and (fit >= min(hoped, at_best) or waited_s > RELEASE_TIMEOUT_S):
            return fit
        if stop_requested.is_set():
            return 0
        if waited_s > max(config.cluster.capacity_timeout_s, RELEASE_TIMEOUT_S):
            sentence = shortfall_beside(need.training, nodes, unplaced)
            assert sentence is not None, "workers that fit are not short of anything"
            raise ConfigError(sentence)
        pool.shrink()
        time.sleep(RESOURCE_POLL_S)


class UpscaleTrigger:
    """Notices that another worker has had room for `cluster.upscale_delay_s`.

    Args:
        config: of the run.
        need: what workers and actors take.
        pool: of reward actors.
        workers: of the group that runs now.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        config: RunConfig,
        need: Needs,
        pool: Any,
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._need = need
        self._pool = pool
        self._workers = workers
        self._clock = clock
        self._looked = self._since = clock()
        self._left_s = float("inf")

    def on_step(self, stats: UpdateStats) -> None:
        """Estimate from a step how long the rest of the training will take."""
        self._left_s = (self._config.train.steps - stats.step) * stats.seconds

    def is_due(self) -> bool:
        """Whether a group with more workers should take over."""
        long_s = self._config.cluster.upscale_delay_s
        # Starting a group takes a while, too: what is left must be worth it.
        if self._workers == self._config.train.max_workers or self._left_s < long_s:
            return False
        now = self._clock()
        if now - self._looked < RESOURCE_POLL_S:
            return False
        self._looked = now
        unplaced = _unplaced_actors(self._config, self._pool)
        if not workers_that_fit(self._need.training, free_nodes(), unplaced):
            self._since = now
        return now - self._since >= long_s


def _unplaced_actors(config: RunConfig, pool: Any) -> int:
    """Reward actors that a run must have and that are nowhere now."""
    return max(0, config.reward.min_actors - pool.metrics().actors)
