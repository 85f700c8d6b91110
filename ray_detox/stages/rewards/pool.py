"""The driver's side of the reward actors: starts them, watches them, and fits their number to the load.

    RewardPool (a thread in the driver)
      ping ------------> actors                stuck: restarted; gone for good: replaced
      which are up ----> RewardDirectory ----> workers
      what waits <------ RewardDirectory <---- workers         waits long: one more; idle long: one less

The actors outlive a restart of the worker group and end with the run. One that is asked for is
listed once it has loaded its model, so that one the cluster has no room for disturbs nobody; to
Ray's autoscaler it is the reason to add a node.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox.config import RunConfig
from ray_detox.records import RewardError
from ray_detox.rewards.router import ActorInfo
from ray_detox.stages.cluster.nodes import on_this_node
from ray_detox.stages.errors import last_line
from ray_detox.stages.rewards.actor import RewardActor
from ray_detox.stages.rewards.client import REFRESH_S, is_lost
from ray_detox.stages.rewards.directory import RewardDirectory

WATCH_INTERVAL_S = 0.2
"""Between two looks at what the actors have answered."""
PING_INTERVAL_S = 1.0
"""Longest time between two questions to an actor."""
DESCRIBE_TIMEOUT_S = 5.0
"""Longest wait for what actors say of themselves."""
DRAIN_TIMEOUT_S = 30.0
"""Longest time that an actor that is let go may take for what it holds."""
START_RETRY_S = 30.0
"""Before another actor is asked for, where one could not load its model."""
STANDSTILL_FACTOR = 3
"""Silences before an actor is restarted whose model stands still. More than the one after which
workers ask another: that costs a chunk scored twice, and this the loading of a model."""

COMING = "has not come up yet: there is no room for it, or it loads its model"

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _PooledActor:
    """One actor, as the pool sees it."""

    number: int
    handle: Any
    life: Future[None]
    """Ends when the actor dies: how one that is being started again is told from one that hangs."""
    pong: Future[dict[str, Any]] | None = None
    """The answer to come; None between two questions."""
    asked_s: float = 0.0
    about: dict[str, Any] | None = None
    """Its last answer."""
    down: str | None = COMING
    """Why it takes no chunks; None while it does."""
    leaving_s: float | None = None

    @property
    def up(self) -> bool:
        """It takes chunks."""
        return self.down is None

    def ask(self, now: float) -> None:
        """Ask how it gets on; one that is still coming up answers when it has."""
        self.pong, self.asked_s = self.handle.ping.remote().future(), now

    def listing(self) -> ActorInfo:
        """What the workers are told of it."""
        node = f"node {self.about['node']}" if self.about else "no node yet"
        return ActorInfo(f"reward actor {self.number}", node, self.handle, self.down)


class RewardPool:
    """The reward actors of a run. Workers reach them through `directory`; `close` ends them.

    Args:
        config: of the run.
        gpus_per_actor: resolved for this cluster.
        nodes: ids of the nodes that the first actors should go to; Ray chooses for all others.
    """

    def __init__(self, config: RunConfig, gpus_per_actor: float, nodes: Sequence[str] = ()) -> None:
        self._config = config
        self._nodes = list(nodes)
        self._options = {
            "num_cpus": config.serving.cpus_per_actor,
            "num_gpus": gpus_per_actor,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 64,
        }
        # On the driver's node: it goes with the run, and not with a node that others lose.
        self.directory: Any = RewardDirectory.options(  # type: ignore[attr-defined]
            scheduling_strategy=on_this_node(), max_restarts=-1, max_task_retries=0
        ).remote()
        self._lock = threading.Lock()
        self._actors: list[_PooledActor] = []
        self._numbers = 0
        self._wanted = config.reward.min_actors
        self._refused: str | None = None
        self._retry_s = 0.0
        self._listed: tuple[ActorInfo, ...] = ()
        self._version = 0
        self._published: Future[dict[str, int]] | None = None
        self._told = {"waiting": 0, "resent": 0}
        self._counts = {"resent": 0, "restarts": 0, "lost": 0}
        self._crowded = _Lasting(config.serving.upscale_delay_s)
        self._idle = _Lasting(config.serving.downscale_delay_s)
        self._closing = threading.Event()
        self._fill_up(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()

    # ---- what the driver asks ------------------------------------------------------------------

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """Wait until every actor that a run always has is up, and let them say where they are.

        Raises:
            RewardError: some were not after `timeout_s`, or could not load the model.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                up = [a.about for a in self._actors if a.up and a.about]
                refused = self._refused
            least = self._config.reward.min_actors
            if len(up) >= least:
                return up
            if refused:
                raise RewardError(f"A reward actor could not start: {refused}")
            if time.monotonic() > deadline:
                raise RewardError(
                    f"{least - len(up)} of {least} reward actors did not come up within "
                    f"{timeout_s:g} s. The cluster may lack the CPUs or GPUs they ask for "
                    "(serving.cpus_per_actor, serving.gpus_per_actor); free now: "
                    f"{ray.available_resources()}."
                )
            time.sleep(0.05)

    def shrink(self) -> None:
        """Go back to the least number of actors at once, to make room for others.

        Those that are not up go first, then the youngest. What one of them holds, the workers
        send to another.
        """
        with self._lock:
            self._wanted = self._config.reward.min_actors
            leaving = [a for a in self._actors if a.leaving_s is not None]
            for actor in leaving + self._surplus():
                self._end(actor)
            self._publish()

    def describe(self) -> list[dict[str, Any]]:
        """Node, device, texts and peak_mb of each actor that answers within seconds."""
        with self._lock:
            asked = [a.handle.ping.remote().future() for a in self._actors if a.up]
        answered, _ = wait_for(asked, timeout=DESCRIBE_TIMEOUT_S)
        return [pong.result() for pong in asked if pong in answered and pong.exception() is None]

    def metrics(self) -> dict[str, float]:
        """The pool in numbers, without waiting for anybody.

        Returns:
            actors: that are up; wanted: as many there should be; waiting: texts that wait with the
            workers; in_flight: texts that actors hold; and, since the start, resent: chunks sent
            again; restarts: actors that died or were stuck, and were started again; lost: actors
            that were gone for good, and were replaced.
        """
        with self._lock:
            up = [a.about for a in self._actors if a.up and a.about]
            figures = {
                "actors": len(up),
                "wanted": self._wanted,
                "waiting": self._told["waiting"],
                "in_flight": sum(about["held"] for about in up),
            } | self._counts
        return {name: float(value) for name, value in figures.items()}

    def close(self) -> None:
        """End the thread, then the actors."""
        self._closing.set()
        self._thread.join(timeout=10)
        with self._lock:
            if ray.is_initialized():  # else they have gone with it
                for actor in list(self._actors):
                    self._end(actor)
                ray.kill(self.directory)

    # ---- what the thread does ------------------------------------------------------------------

    def _run(self) -> None:
        # Ray's calls would start a cluster of their own where the driver's has ended.
        while not self._closing.wait(WATCH_INTERVAL_S) and ray.is_initialized():
            try:
                with self._lock:
                    self._look(time.monotonic())
            except Exception:  # a watch that ends in silence would be missed only in need
                _log.exception("The watch over the reward actors stumbled, and goes on.")

    def _look(self, now: float) -> None:
        for actor in list(self._actors):
            if actor.life.done():
                self._lose(actor, now)
            elif actor.pong is None:
                if now - actor.asked_s >= self._pause_s:
                    actor.ask(now)
            elif actor.pong.done():
                self._on_heartbeat(actor, actor.pong)
            elif actor.up and now - actor.asked_s > self._config.serving.heartbeat_timeout_s:
                self._restart(
                    actor,
                    f"gave no sign of life for {self._config.serving.heartbeat_timeout_s:g} s",
                )
        self._fit(now)
        self._fill_up(now)
        self._publish()

    def _on_heartbeat(self, actor: _PooledActor, pong: Future[dict[str, Any]]) -> None:
        actor.pong = None
        if pong.exception() is not None:
            return  # `life` ends, too, where it died; else it is asked again
        actor.about, actor.down = pong.result(), None
        if (
            actor.about["standstill_s"]
            > STANDSTILL_FACTOR * self._config.serving.heartbeat_timeout_s
        ):
            self._restart(actor, f"stood still for {actor.about['standstill_s']:.0f} s")

    def _lose(self, actor: _PooledActor, now: float) -> None:
        """An actor died. Ray starts it again by itself, unless it is gone for good."""
        error = actor.life.exception()
        assert error is not None, "RewardActor.live returned"
        if isinstance(error, ActorDiedError) or not is_lost(error):
            self._forget(actor, last_line(error), now)
            return
        if actor.up:
            self._mark_down(actor, f"died and is started again: {last_line(error)}")
        actor.life = actor.handle.live.remote().future()
        actor.ask(now)  # anew: an answer from before its death would mislead

    def _restart(self, actor: _PooledActor, cause: str) -> None:
        self._mark_down(actor, f"{cause} and is started again")
        ray.kill(actor.handle, no_restart=False)

    def _mark_down(self, actor: _PooledActor, cause: str) -> None:
        _log.warning("Reward actor %d %s", actor.number, cause)
        actor.down = cause
        self._counts["restarts"] += 1

    def _forget(self, actor: _PooledActor, cause: str, now: float) -> None:
        """Forget an actor that is gone for good; another takes its place."""
        _log.warning("Reward actor %d is gone for good: %s", actor.number, cause)
        self._actors.remove(actor)
        if actor.about is None:
            # It never came up, and the next one would hardly do better.
            self._refused, self._retry_s = cause, now + START_RETRY_S
        else:
            self._counts["lost"] += 1

    def _fit(self, now: float) -> None:
        """Want one more where texts have waited for long, one less where actors have been idle."""
        staying = [a for a in self._actors if a.leaving_s is None]
        abouts = [a.about for a in staying if a.up and a.about]
        waiting = self._told["waiting"] > 0
        crowded = waiting or any(about["queued"] for about in abouts)
        # One that has not come up is idle, too: without a load it is taken back.
        idle = not waiting and (
            len(abouts) < len(staying) or any(not about["held"] for about in abouts)
        )
        all_up = len(abouts) == self._wanted
        if (
            self._crowded.lasts(crowded, now)
            and all_up
            and self._wanted < self._config.reward.max_actors
        ):
            self._wanted += 1
            self._crowded.begin_again()
        if self._idle.lasts(idle, now) and self._wanted > self._config.reward.min_actors:
            self._wanted -= 1
            self._idle.begin_again()
        for actor in self._surplus():
            actor.leaving_s = now
        for actor in list(self._actors):
            if actor.leaving_s is not None:
                self._drain(actor, now - actor.leaving_s)

    def _surplus(self) -> list[_PooledActor]:
        """More actors than are wanted: those that are not up, then the youngest."""
        staying = [a for a in self._actors if a.leaving_s is None]
        return sorted(staying, key=lambda a: (not a.up, a.number))[self._wanted :]

    def _drain(self, actor: _PooledActor, since_s: float) -> None:
        """End an actor that is let go, once no worker has it on its list and it holds nothing."""
        done = actor.about is not None and not actor.about["held"] and since_s > 3 * REFRESH_S
        if done or not actor.up or since_s > DRAIN_TIMEOUT_S:
            self._end(actor)

    def _fill_up(self, now: float) -> None:
        """Ask Ray for the actors that are wanted and not there."""
        staying = sum(a.leaving_s is None for a in self._actors)
        for _ in range(self._wanted - staying if now >= self._retry_s else 0):
            options = self._options
            if self._numbers < len(self._nodes):
                # Elsewhere, if the node has gone or is full by then: also for a later life.
                there = NodeAffinitySchedulingStrategy(
                    self._nodes[self._numbers], soft=True, _spill_on_unavailable=True
                )
                options = options | {"scheduling_strategy": there}
            handle = RewardActor.options(**options).remote(  # type: ignore[attr-defined]
                self._config, max(1, int(self._config.serving.cpus_per_actor))
            )
            actor = _PooledActor(self._numbers, handle, handle.live.remote().future())
            actor.ask(now)
            self._actors.append(actor)
            self._numbers += 1

    def _publish(self) -> None:
        """Tell the directory who is there, and hear from it what waits with the workers."""
        if self._published is not None:
            if not self._published.done():
                return
            if self._published.exception() is None:
                self._told = self._published.result()
                self._counts["resent"] += self._told["resent"]
        listed = tuple(a.listing() for a in self._actors if a.leaving_s is None)
        if listed != self._listed:
            self._listed, self._version = listed, self._version + 1
        self._published = self.directory.publish.remote(self._version, list(listed)).future()

    def _end(self, actor: _PooledActor) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)

    @property
    def _pause_s(self) -> float:
        """Between two questions: often enough to see a load that lasts as long as it must."""
        serving = self._config.serving
        shortest = min(
            serving.heartbeat_timeout_s, serving.upscale_delay_s, serving.downscale_delay_s
        )
        return min(PING_INTERVAL_S, shortest / 4)


class _Lasting:
    """Whether something has been so for a while without a break."""

    def __init__(self, long_s: float) -> None:
        self._long_s = long_s
        self._since_s: float | None = None

    def lasts(self, is_so: bool, now: float) -> bool:
        """Take what is so now; True once it has been so for long."""
        if not is_so:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now
        return self._since_s is not None and now - self._since_s >= self._long_s

    def begin_again(self) -> None:
        """Count from the next time on."""
        self._since_s = None
