"""The actor through which workers and tasks report to the driver and the driver stops them.

    train_worker, measure_shard --put--> Progress --take--> driver
                                <-should_stop-    <--stop--

This module is separate from `train.py` so that the actor's process loads no torch.
"""

import ray

from ray_detox.rewards.messages import ActorHandle
from ray_detox.stages.cluster.nodes import on_this_node
from ray_detox.stages.events import PromptsMeasured, WorkerEvent

EVENT_POLL_S = 0.2
ACTOR_TIMEOUT_S = 60.0
"""Longest wait for an actor on the driver's own node."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Progress:
    """Buffers events for the driver, and holds the driver's request to stop.

    If the actor is killed, Ray restarts it without events. This loses no results: the next
    checkpoint contains the metrics of all steps, and every `take` repeats the driver's request.
    """

    def __init__(self) -> None:
        self._events: list[WorkerEvent | PromptsMeasured] = []
        self._stop = False

    def put(self, event: WorkerEvent | PromptsMeasured) -> None:
        """Add an event for the driver."""
        self._events.append(event)

    def take(self, stop: bool = False) -> list[WorkerEvent | PromptsMeasured]:
        """Return all events since the last call; `stop` asks the workers to end after their step."""
        self._stop = stop
        events, self._events = self._events, []
        return events

    def should_stop(self) -> bool:
        """Return whether the driver has asked the workers to stop."""
        return self._stop


def start_progress() -> ActorHandle:
    """Start a `Progress` on the driver's node, so that no other node's failure affects it."""
    return Progress.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
