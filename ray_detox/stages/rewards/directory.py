"""What the pool of reward actors and the workers tell each other.

Apart from `score.py`, so that the actor's process loads no torch.
"""

import time

import ray

from ray_detox.rewards.router import ActorInfo

REPORT_S = 5.0
"""A worker's word about what waits there is forgotten after this."""


@ray.remote(num_cpus=0)
class RewardDirectory:
    """Which actors there are, for the workers; how much waits with the workers, for the pool.

    The pool tells all it knows again and again, so that a directory that Ray had to restart
    is soon what it was.
    """

    def __init__(self) -> None:
        self._version = 0
        self._listings: list[ActorInfo] = []
        self._waiting: dict[str, tuple[float, int]] = {}
        self._resent = 0

    def publish(self, version: int, listings: list[ActorInfo]) -> dict[str, int]:
        """Take the list of actors.

        Returns:
            waiting: texts that wait with workers now; resent: chunks that workers have sent again
            since the last call.
        """
        self._version, self._listings = version, listings
        now = time.monotonic()
        self._waiting = {
            client: (at, waiting)
            for client, (at, waiting) in self._waiting.items()
            if now - at < REPORT_S
        }
        resent, self._resent = self._resent, 0
        return {
            "waiting": sum(waiting for _, waiting in self._waiting.values()),
            "resent": resent,
        }

    def sync(
        self, client: str, version: int, waiting: int, resent: int
    ) -> tuple[int, list[ActorInfo] | None]:
        """Take a worker's word and give it the list, unless it has that version already.

        Args:
            client: a name of its own for every worker.
            version: of the list that it has.
            waiting: texts that no actor had room for.
            resent: chunks sent again since its last word.
        """
        self._waiting[client] = (time.monotonic(), waiting)
        self._resent += resent
        return self._version, self._listings if version != self._version else None
