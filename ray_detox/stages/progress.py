"""How the driver hears of what goes on in workers and tasks, and tells them to stop.

    train_worker, measure_shard --put--> Progress --take--> driver
                                <-should_stop-    <--stop--

Apart from `train.py`, so that the actor's process loads no torch.
"""

from typing import Any

import ray

from ray_detox.stages.cluster.nodes import on_this_node

EVENT_POLL_S = 0.2
ACTOR_TIMEOUT_S = 60.0
"""Longest wait for an actor on this very node."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Progress:
    """What workers tell the driver, and what the driver tells them.

    Begins anew if it is killed: figures come with the next checkpoint again, and the driver
    repeats its wish to stop for as long as it has it.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False

    def put(self, event: dict[str, Any]) -> None:
        """Add an event for the driver."""
        self._events.append(event)

    def take(self, stop: bool = False) -> list[dict[str, Any]]:
        """Hand over all events since the last call; `stop` asks workers to end after their step."""
        self._stop = stop
        events, self._events = self._events, []
        return events

    def should_stop(self) -> bool:
        """Whether the driver wants the workers to end."""
        return self._stop


def start_progress() -> Any:
    """A `Progress` on the driver's node: it is lost with the driver only."""
    return Progress.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
