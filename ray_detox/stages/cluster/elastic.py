"""The number of training workers, which follows the nodes of the cluster.

    waiting --train.min_workers fit--> group of N --a worker or a node is lost or drains--> waiting
                                         |     ^
                   one more worker fits  |     |  it no longer fits
                                         v     |
                                     resources free
                                            |
                                            '--for cluster.upscale_delay_s--> resized: the group stops
                                                   after its step, and a larger one starts (waiting)

    waiting --too few fit for cluster.capacity_timeout_s--> ConfigError

`train.workers` is a number or a range; each group starts with as many workers as fit. The result of
a step does not depend on the number of workers, except for rounding.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from ray_detox.config import ConfigError, RunConfig
from ray_detox.records import UpdateStats
from ray_detox.resources import Needs, shortfall_beside, workers_that_fit
from ray_detox.stages.cluster.nodes import CAPACITY_POLL_S, free_nodes

RELEASE_TIMEOUT_S = 20.0
"""Longest wait for an earlier group to release its resources, if fewer workers could start now."""


def wait_for_workers(
    config: RunConfig,
    need: Needs,
    pool: Any,
    expected: int,
    stop_requested: threading.Event,
) -> int:
    """Wait until at least `train.min_workers` fit, and return how many fit; 0 on a stop request.

    If workers lack resources, the pool releases reward actors above its minimum. Actors below the
    minimum that wait for a node come before workers: without scores no worker gets far.

    Args:
        config: of the run.
        need: resources of workers and actors.
        pool: of reward actors.
        expected: workers that will fit once the earlier group has released its resources.
        stop_requested: set by a person.

    Raises:
        ConfigError: fewer have fitted for `cluster.capacity_timeout_s`.
    """
    least = config.train.min_workers
    began = time.monotonic()
    while True:
        nodes, unplaced = free_nodes(), _unplaced_actors(config, pool)
        fit = workers_that_fit(need.training, nodes, unplaced)
        # Not all that the earlier group held comes back to workers: reward actors of a lost node
        # may take a part of it. So the wait is for what could fit at best.
        idle = [node.when_idle() for node in nodes]
        at_best = workers_that_fit(need.training, idle, config.reward.min_actors)
        waited_s = time.monotonic() - began
        # A group that starts too small would have to be resized soon, which costs another start.
        if fit >= least and (fit >= min(expected, at_best) or waited_s > RELEASE_TIMEOUT_S):
            return fit
        if stop_requested.is_set():
            return 0
        if waited_s > max(config.cluster.capacity_timeout_s, RELEASE_TIMEOUT_S):
            sentence = shortfall_beside(need.training, nodes, unplaced)
            assert sentence is not None, "too few workers fit, so there must be a shortfall"
            raise ConfigError(sentence)
        pool.shrink()
        time.sleep(CAPACITY_POLL_S)


class UpscaleTrigger:
    """Notices that one more worker has fitted for `cluster.upscale_delay_s`.

    Args:
        config: of the run.
        need: resources of workers and actors.
        pool: of reward actors.
        workers: number in the group that runs now.
        clock: returns seconds; tests pass their own.
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
        self.more = 0
        """Workers that would fit beside those of the group, at the last look."""

    def on_step(self, stats: UpdateStats) -> None:
        """Estimate from a step how long the rest of the training will take."""
        self._left_s = (self._config.train.steps - stats.step) * stats.seconds

    def is_due(self) -> bool:
        """Whether a group with more workers should take over."""
        long_s = self._config.cluster.upscale_delay_s
        # Starting a group takes time as well: the steps that are left must be worth it.
        if self._workers == self._config.train.max_workers or self._left_s < long_s:
            return False
        now = self._clock()
        # Called several times a second, and each look connects to every node.
        if now - self._looked < CAPACITY_POLL_S:
            return False
        self._looked = now
        unplaced = _unplaced_actors(self._config, self._pool)
        self.more = workers_that_fit(self._need.training, free_nodes(), unplaced)
        if not self.more:
            # Resources that come and go, such as a reward actor that moves, start the delay anew.
            self._since = now
        return now - self._since >= long_s


def _unplaced_actors(config: RunConfig, pool: Any) -> int:
    """Number of reward actors that the run must have and that are on no node now."""
    return max(0, config.reward.min_actors - pool.metrics().actors)
