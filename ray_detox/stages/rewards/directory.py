"""The directory: where the pool of reward actors and the workers exchange what they know.

    RewardPool -- publish(list of actors) ----> RewardDirectory <---- sync(load) ---- worker
               <-------- WorkerLoad -----------                 ----- ActorList ---->

A module of its own, so that the directory's process loads neither torch nor transformers.
"""

import time

import ray

from ray_detox.rewards.messages import ActorInfo, ActorList, WorkerLoad

# A worker that dies cannot withdraw its report: without this limit, the texts that waited there
# would count for the rest of the run, and the pool would add actors for them.
REPORT_LIFETIME_S = 5.0
"""Age at which the directory forgets a worker's report of its waiting texts."""


@ray.remote(num_cpus=0)
class RewardDirectory:
    """Lists the actors for the workers, and sums up the workers' load for the pool.

    Keeps all of it in memory alone. The pool publishes its whole list several times a second and
    workers report once a second, so that a directory that Ray had to restart soon knows it again.
    """

    def __init__(self) -> None:
        self._version = 0
        self._actors: list[ActorInfo] = []
        self._reports: dict[str, tuple[float, int, int]] = {}
        """By worker: when it reported, how many texts wait there, and how many deaths they met."""
        self._resent = 0

    def publish(self, version: int, actors: list[ActorInfo]) -> WorkerLoad:
        """Take the pool's list of actors, and return what the workers have reported."""
        self._version, self._actors = version, actors
        now = time.monotonic()
        self._reports = {
            client: report
            for client, report in self._reports.items()
            if now - report[0] < REPORT_LIFETIME_S
        }
        resent, self._resent = self._resent, 0
        return WorkerLoad(
            waiting=sum(waiting for _, waiting, _ in self._reports.values()),
            resent=resent,
            deaths=max((deaths for _, _, deaths in self._reports.values()), default=0),
        )

    def sync(self, client: str, version: int, waiting: int, resent: int, deaths: int) -> ActorList:
        """Take a worker's report, and return the list of actors if it has changed.

        Args:
            client: a name of its own for every worker.
            version: of the list that the worker has; -1 without one.
            waiting: texts that no actor has room for.
            resent: chunks sent again since its last report.
            deaths: most deaths of actors in a row that texts of the worker have met.
        """
        self._reports[client] = (time.monotonic(), waiting, deaths)
        self._resent += resent
        return ActorList(self._version, self._actors if version != self._version else None)
