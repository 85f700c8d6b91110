"""The driver's side of the reward actors: starts them, watches them, and scales them with the load.

    RewardPool (a thread in the driver)
      ping ------------> actors                 hung: restarted; dead for good: replaced
      list of actors --> RewardDirectory --> workers
      waiting texts <--- RewardDirectory <-- workers

The actors outlive a restart of the worker group and end with the run.

An actor, as the pool sees it:

    starting -- first report --> up -- no longer wanted --> draining --> killed
        |                       |  ^                            it holds nothing, or
        |          died, hung,  |  | next report                30 s have passed
        |          or stalled   v  |
        |                       down: Ray restarts it
        v                        |
    forgotten <------------------'
        dead for good; a new actor takes its place

    One that is starting or down and no longer wanted is killed at once: it holds nothing that
    another actor would not score anyway. An actor that is draining and dies is killed, too.

    Workers learn of an actor from the start, with the reason why it takes no chunks yet, for the
    message of a timeout. They no longer see one that is draining: its open calls still end there.

The wanted number of actors, from `reward.min_actors` to `reward.max_actors`:

    + 1     texts have waited without a break for serving.upscale_delay_s, at workers or in
            actors, and all actors that are wanted are up
    - 1     for serving.downscale_delay_s no text has waited at a worker, and some actor held no
            text or was not up
    least   `shrink`: the training workers need the resources

A wanted actor that the cluster has no resources for stays "starting". Workers send it nothing, and
for Ray's autoscaler it is the reason to add a node.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_detox.config import ConfigError, RunConfig
from ray_detox.records import PreparedRow, RewardError
from ray_detox.rewards.messages import (
    ActorHandle,
    ActorInfo,
    ActorReport,
    PoolMetrics,
    WorkerLoad,
)
from ray_detox.rewards.router import CRASHES
from ray_detox.stages.cluster.nodes import on_this_node
from ray_detox.stages.errors import last_line
from ray_detox.stages.rewards.actor import RewardActor
from ray_detox.stages.rewards.client import REFRESH_S, is_lost
from ray_detox.stages.rewards.directory import RewardDirectory

WATCH_INTERVAL_S = 0.2
"""Time between two checks of what the actors and the directory have answered."""
PING_INTERVAL_S = 1.0
"""Longest time between two pings of an actor."""
DESCRIBE_TIMEOUT_S = 5.0
"""Longest wait for the reports of `describe`."""
# A draining actor may hang, or wait for a slow reward term. Nothing is lost when the pool kills it:
# the workers send its chunks to another actor.
DRAIN_TIMEOUT_S = 30.0
"""Longest time that a draining actor may take for the texts that it holds."""
# Loading a model mostly fails for reasons that last, such as a missing file: attempts without a
# pause would keep a node busy with nothing else.
START_RETRY_S = 30.0
"""Pause before the next attempt after an actor could not load its model."""
# Workers suspect an actor after one timeout, because that costs at most a chunk scored twice. A
# restart costs the loading of a model, so that the pool waits for more evidence.
STALL_FACTOR = 3
"""The pool restarts an actor whose model made no progress for this many heartbeat timeouts."""

NOT_STARTED = (
    "has not started yet: the cluster lacks resources for it, or it is still loading its model"
)

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _PooledActor:
    """State of one actor in the pool."""

    number: int
    handle: ActorHandle
    life: Future[None]
    """The open call of `live`. It fails when the process dies and stays open if the process hangs,
    which an open ping cannot tell apart."""
    reply: Future[ActorReport] | None = None
    """The answer to the open ping; None between two pings."""
    pinged_s: float = 0.0
    """When the last ping was sent."""
    report: ActorReport | None = None
    """Its last answer; None until it has started for the first time."""
    down_reason: str | None = NOT_STARTED
    """Why it takes no chunks; None while it is up."""
    start: int | None = None
    """See `ActorInfo`; None until its process is up."""
    draining_since_s: float | None = None
    """When it stopped to be wanted; None while it is wanted."""

    @property
    def up(self) -> bool:
        """It takes chunks."""
        return self.down_reason is None

    def ping(self, now: float) -> None:
        """Ask for a report; an actor that is starting answers once it has loaded its model."""
        self.reply, self.pinged_s = self.handle.ping.remote().future(), now

    def info(self) -> ActorInfo:
        """Return the entry in the workers' list."""
        node = f"node {self.report.node}" if self.report else "no node yet"
        name = f"reward actor {self.number}"
        start = -1 if self.start is None else self.start
        return ActorInfo(name, node, self.handle, start, self.down_reason)


@dataclass(slots=True)
class _Totals:
    """Counts since the start of the run; see `PoolMetrics`."""

    resent: int = 0
    restarts: int = 0
    lost: int = 0


class RewardPool:
    """The reward actors of a run. Workers reach them through `directory`; `close` ends them.

    Args:
        config: of the run.
        gpus_per_actor: resolved for this cluster.
        nodes: ids of the nodes for the first actors; Ray chooses for all others.
    """

    def __init__(self, config: RunConfig, gpus_per_actor: float, nodes: Sequence[str] = ()) -> None:
        self._config = config
        self._nodes = list(nodes)
        self._options = {
            "num_cpus": config.serving.cpus_per_actor,
            "num_gpus": gpus_per_actor,
            "max_restarts": -1,
            # Ray would retry a lost call on the same actor, once that is back. The workers' routers
            # send it to another one at once.
            "max_task_retries": 0,
            # Each waiting call holds one of these threads; the model runs on a separate thread.
            "max_concurrency": 64,
        }
        # On the driver's node: if that node fails, the run ends in any case. On another node, the
        # failure of that one would interrupt the run's scoring, too.
        self.directory: ActorHandle = RewardDirectory.options(  # type: ignore[attr-defined]
            scheduling_strategy=on_this_node(), max_restarts=-1, max_task_retries=0
        ).remote()
        self._lock = threading.Lock()
        """Held for each look of the thread and each question of the driver."""
        self._actors: list[_PooledActor] = []
        self._next_number = 0
        self._next_start = 0
        self._wanted = config.reward.min_actors
        self._start_error: str | None = None
        """Why an actor could not load its model."""
        self._no_start_before_s = 0.0
        self._last_death = ""
        """Why an actor died last."""
        self._failure: str | None = None
        """Why scoring cannot go on."""
        self._listed: tuple[ActorInfo, ...] = ()
        self._version = 0
        self._published: Future[WorkerLoad] | None = None
        """The directory's answer to the last list, which may be open."""
        self._load = WorkerLoad()
        self._totals = _Totals()
        self._crowded = _Lasting(config.serving.upscale_delay_s)
        self._idle = _Lasting(config.serving.downscale_delay_s)
        self._closing = threading.Event()
        self._start_missing(time.monotonic())
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()

    # ---- the driver's questions ------------------------------------------------------------------

    def wait(self, timeout_s: float) -> list[ActorReport]:
        """Wait until `reward.min_actors` actors are up, and return the report of each.

        Raises:
            RewardError: too few are up after `timeout_s`, or one could not load its model.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                up = [a.report for a in self._actors if a.up and a.report]
                start_error = self._start_error
            least = self._config.reward.min_actors
            if len(up) >= least:
                return up
            if start_error:
                raise RewardError(f"A reward actor could not start: {start_error}")
            if time.monotonic() > deadline:
                raise RewardError(
                    f"{least - len(up)} of {least} reward actors did not start within "
                    f"{timeout_s:g} s. The cluster may lack the CPUs or GPUs that they need "
                    "(serving.cpus_per_actor, serving.gpus_per_actor); free now: "
                    f"{ray.available_resources()}. Or their processes die while they load the reward; "
                    "the Ray logs of their nodes then say so."
                )
            time.sleep(0.05)

    def check(self, row: PreparedRow) -> None:
        """Let one actor try the reward on sentences; call it after `wait` and before any worker.

        Raises:
            ConfigError: the reward prefers insults, or one of its functions failed.
            RewardError: the actor did not answer within `serving.timeout_s`.
        """
        timeout_s = self._config.serving.timeout_s
        with self._lock:
            up = [a for a in self._actors if a.up]
        try:
            reason = ray.get(up[0].handle.check.remote(row), timeout=timeout_s) if up else None
        except (RayError, TimeoutError) as error:
            if is_lost(error) and not isinstance(error, TimeoutError):
                raise RewardError(
                    "A reward actor died while it tried the reward on sentences: "
                    f"{last_line(error)} {CRASHES}"
                ) from error
            raise RewardError(
                f"A reward actor could not try the reward on sentences within {timeout_s:g} s "
                f"(serving.timeout_s): {last_line(error)}"
            ) from error
        if reason is not None:
            raise ConfigError(reason)

    def check_scoring(self) -> None:
        """Check that the actors do not die again and again on the same texts.

        Raises:
            RewardError: they have, `serving.max_actor_deaths` times in a row.
        """
        with self._lock:
            failure = self._failure
        if failure is not None:
            raise RewardError(failure)

    def shrink(self) -> None:
        """Return to the least number of actors at once, to free resources for training workers.

        Actors that are not up go first, then the youngest. The workers send the chunks that one of
        them holds to another actor.
        """
        with self._lock:
            self._wanted = self._config.reward.min_actors
            draining = [a for a in self._actors if a.draining_since_s is not None]
            for actor in draining + self._surplus():
                self._kill(actor)
            # At once: the workers should not have to learn of it from calls that fail.
            self._publish()

    def describe(self) -> list[ActorReport]:
        """Return a fresh report of each actor that answers within seconds."""
        with self._lock:
            replies = [a.handle.ping.remote().future() for a in self._actors if a.up]
        answered, _ = wait_for(replies, timeout=DESCRIBE_TIMEOUT_S)
        return [one.result() for one in replies if one in answered and one.exception() is None]

    def metrics(self) -> PoolMetrics:
        """Return the pool in numbers, as of the last reports: waits for no actor."""
        with self._lock:
            up = [a.report for a in self._actors if a.up and a.report]
            return PoolMetrics(
                actors=len(up),
                wanted=self._wanted,
                waiting=self._load.waiting,
                in_flight=sum(report.state.held for report in up),
                resent=self._totals.resent,
                restarts=self._totals.restarts,
                lost=self._totals.lost,
            )

    def close(self) -> None:
        """End the thread, then the actors."""
        self._closing.set()
        self._thread.join(timeout=10)
        with self._lock:
            if ray.is_initialized():  # else they have ended with Ray
                for actor in list(self._actors):
                    self._kill(actor)
                ray.kill(self.directory)

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        # Without the second condition, a call after the end of the driver's cluster would make Ray
        # start a new one.
        while not self._closing.wait(WATCH_INTERVAL_S) and ray.is_initialized():
            try:
                with self._lock:
                    self._check(time.monotonic())
            except Exception:  # a thread that ended here would go unnoticed until an actor fails
                _log.exception("The check of the reward actors failed; the next one follows.")

    def _check(self, now: float) -> None:
        for actor in list(self._actors):
            if actor.life.done():  # first: after a death, an open ping means nothing
                self._on_death(actor, now)
            elif actor.reply is None:
                if now - actor.pinged_s >= self._ping_interval_s:
                    actor.ping(now)
            elif actor.reply.done():
                self._on_heartbeat(actor, actor.reply)
            # Only if it is up: the first ping stays open for as long as the cluster takes to find
            # resources and the actor to load its model.
            elif actor.up and now - actor.pinged_s > self._config.serving.heartbeat_timeout_s:
                self._restart(
                    actor,
                    f"gave no sign of life for {self._config.serving.heartbeat_timeout_s:g} s",
                )
        self._scale(now)
        self._start_missing(now)
        self._publish()

    def _on_heartbeat(self, actor: _PooledActor, reply: Future[ActorReport]) -> None:
        actor.reply = None
        if reply.exception() is not None:
            return  # if the process died, `life` fails; otherwise the next ping follows
        actor.report, actor.down_reason = reply.result(), None
        if actor.start is None:
            actor.start = self._next_start
            self._next_start += 1
        stalled_s = actor.report.state.stalled_s
        if stalled_s > STALL_FACTOR * self._config.serving.heartbeat_timeout_s:
            self._restart(actor, f"made no progress for {stalled_s:.0f} s")

    def _on_death(self, actor: _PooledActor, now: float) -> None:
        """Follow the death of a process: Ray restarts the actor, unless it is dead for good."""
        error = actor.life.exception()
        assert error is not None, "RewardActor.live returned"
        # ActorDiedError is for good: killed without a restart, or its __init__ raised. Any other
        # loss of the process is one that max_restarts covers.
        cause = last_line(error)
        if actor.up:  # else `_restart` has killed it, or it had not started
            self._last_death, actor.start = cause, None
        if isinstance(error, ActorDiedError) or not is_lost(error):
            self._forget(actor, cause, now)
            return
        if actor.up:  # else `_restart` has counted it
            self._mark_down(actor, f"died and is being restarted: {cause}")
        actor.life = actor.handle.live.remote().future()
        actor.ping(now)  # a new one: an answer from before the death would mark the actor as up

    def _restart(self, actor: _PooledActor, cause: str) -> None:
        self._mark_down(actor, f"{cause} and is being restarted")
        ray.kill(actor.handle, no_restart=False)

    def _mark_down(self, actor: _PooledActor, cause: str) -> None:
        _log.warning("Reward actor %d %s", actor.number, cause)
        actor.down_reason = cause
        self._totals.restarts += 1

    def _forget(self, actor: _PooledActor, cause: str, now: float) -> None:
        """Drop an actor that is dead for good; `_start_missing` replaces it."""
        _log.warning("Reward actor %d is dead for good: %s", actor.number, cause)
        self._actors.remove(actor)
        if actor.report is None:
            # It never started, so that the next one would probably fail as well.
            self._start_error, self._no_start_before_s = cause, now + START_RETRY_S
        else:
            self._totals.lost += 1

    def _scale(self, now: float) -> None:
        """Change the wanted number by at most one, and drain actors in excess of it."""
        staying = [a for a in self._actors if a.draining_since_s is None]
        up = [a.report.state for a in staying if a.up and a.report]
        waiting = self._load.waiting > 0
        # Texts also wait inside an actor: each worker may have IN_FLIGHT chunks there, so that
        # many workers can fill an actor's queue while none of them has anything left to send.
        crowded = waiting or any(state.queued for state in up)
        # An actor that is not up counts as idle: one that the cluster has no resources for is
        # removed once the load has ended.
        idle = not waiting and (len(up) < len(staying) or any(not state.held for state in up))
        # One at a time: while an actor starts, it is not known yet whether it is enough.
        all_up = len(up) == self._wanted
        if (
            self._crowded.lasts(crowded, now)
            and all_up
            and self._wanted < self._config.reward.max_actors
        ):
            self._wanted += 1
            self._crowded.restart()  # the next one needs another full delay
        if self._idle.lasts(idle, now) and self._wanted > self._config.reward.min_actors:
            self._wanted -= 1
            self._idle.restart()
        for actor in self._surplus():
            actor.draining_since_s = now
        for actor in list(self._actors):
            if actor.draining_since_s is not None:
                self._drain(actor, now - actor.draining_since_s)

    def _surplus(self) -> list[_PooledActor]:
        """Return the actors beyond the wanted number: those that are not up, then the youngest."""
        staying = [a for a in self._actors if a.draining_since_s is None]
        return sorted(staying, key=lambda a: (not a.up, a.number))[self._wanted :]

    def _drain(self, actor: _PooledActor, since_s: float) -> None:
        """Kill a draining actor once no worker can send to it and it holds nothing."""
        # Workers read the list every REFRESH_S: after three of these, none has this actor on it.
        # Before that, an actor that holds nothing may get a chunk at any moment.
        done = actor.report is not None and not actor.report.state.held and since_s > 3 * REFRESH_S
        if done or not actor.up or since_s > DRAIN_TIMEOUT_S:
            self._kill(actor)

    def _start_missing(self, now: float) -> None:
        """Ask Ray for the actors that are wanted and do not exist."""
        staying = sum(a.draining_since_s is None for a in self._actors)
        for _ in range(self._wanted - staying if now >= self._no_start_before_s else 0):
            options = self._options
            if self._next_number < len(self._nodes):
                # Soft: if the node is gone or full by then, Ray chooses another one. That also
                # holds for each restart of this actor.
                strategy = NodeAffinitySchedulingStrategy(
                    self._nodes[self._next_number], soft=True, _spill_on_unavailable=True
                )
                options = options | {"scheduling_strategy": strategy}
            handle = RewardActor.options(**options).remote(  # type: ignore[attr-defined]
                self._config, max(1, int(self._config.serving.cpus_per_actor))
            )
            actor = _PooledActor(self._next_number, handle, handle.live.remote().future())
            actor.ping(now)
            self._actors.append(actor)
            self._next_number += 1

    def _publish(self) -> None:
        """Publish the list of actors, and take the workers' load from the last answer.

        The list is sent even if it has not changed: a directory that Ray has restarted needs it,
        and the answer is the only way to the workers' load.
        """
        if self._published is not None:
            if not self._published.done():
                return  # the directory restarts: calls would only pile up
            if self._published.exception() is None:
                self._load = self._published.result()
                self._totals.resent += self._load.resent
                if self._load.deaths >= self._config.serving.max_actor_deaths:
                    self._failure = (
                        f"Reward actors died {self._load.deaths} times in a row while they scored the "
                        f"same texts (serving.max_actor_deaths); the last time: {self._last_death} "
                        f"{CRASHES}"
                    )
        listed = tuple(a.info() for a in self._actors if a.draining_since_s is None)
        if listed != self._listed:
            self._listed, self._version = listed, self._version + 1
        self._published = self.directory.publish.remote(self._version, list(listed)).future()

    def _kill(self, actor: _PooledActor) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)

    @property
    def _ping_interval_s(self) -> float:
        """Time between two pings of an actor that answers.

        A quarter of the shortest delay, so that several reports fall into it: a load that lasts as
        long as the delay is then seen to last.
        """
        serving = self._config.serving
        shortest = min(
            serving.heartbeat_timeout_s, serving.upscale_delay_s, serving.downscale_delay_s
        )
        return min(PING_INTERVAL_S, shortest / 4)


class _Lasting:
    """Whether a condition has held for `delay_s` without a break."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._since_s: float | None = None

    def lasts(self, holds: bool, now: float) -> bool:
        """Take the condition as it is now; return whether it has held for long enough."""
        if not holds:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now
        return self._since_s is not None and now - self._since_s >= self._delay_s

    def restart(self) -> None:
        """Begin a new delay at the next call."""
        self._since_s = None
