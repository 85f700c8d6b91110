"""The resources that a run needs, and whether they fit on the nodes; arithmetic, without Ray.

    phase         holds at least                        CPU
    training      W workers and M reward actors         W * cpus_per_worker + M * cpus_per_actor
    preparation   1 task of Ray Data and M actors       1 + M * cpus_per_actor
    evaluation    1 evaluation task and M actors        cpus_per_worker + M * cpus_per_actor

GPUs are counted in the same way, and the run needs the largest sum. If a count is a range (`2..4`),
the run needs the minimum and uses up to the maximum; evaluation tasks take turns.

    needs(config) -> phases of bundle groups -> shortfall(phases, nodes) -> None, or one sentence
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ray_detox.config import ConfigError, RunConfig

KINDS = ("CPU", "GPU")
PER_UNIT = 10_000
"""Ray counts in ten-thousandths. Sums of these integers are exact, while 0.1 + 0.2 > 0.3."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """CPUs and GPUs that one actor, worker or task holds, all of them on one node."""

    cpus: float
    gpus: float = 0.0

    def amount(self, kind: str) -> float:
        """Return the amount of `CPU` or `GPU`."""
        return self.cpus if kind == "CPU" else self.gpus

    def __str__(self) -> str:
        amounts = [_amount(self.cpus, "CPU")] if self.cpus or not self.gpus else []
        amounts += [_amount(self.gpus, "GPU")] if self.gpus else []
        return " and ".join(amounts)


@dataclass(frozen=True, slots=True)
class Node:
    """The resources of a node, in total and free."""

    address: str
    total: Bundle
    free: Bundle
    node_id: str = ""
    """Ray's id of the node."""

    def when_idle(self) -> "Node":
        """Return the node as if nothing ran on it."""
        return replace(self, free=self.total)


@dataclass(frozen=True, slots=True)
class BundleGroup:
    """Equal bundles of a run, such as all training workers."""

    name: str
    """Singular, such as `reward actor`."""
    setting: str
    """Setting that asks for them, such as `reward.actors=1..4`; empty if none does."""
    min_count: int
    max_count: int
    bundle: Bundle

    @property
    def count(self) -> str:
        """The count, or its range."""
        if self.min_count == self.max_count:
            return f"{self.min_count}"
        return f"{self.min_count}..{self.max_count}"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run, with the two bundle groups that it holds at the same time."""

    name: str
    main: BundleGroup
    """Training workers, tasks of Ray Data or evaluation tasks."""
    actors: BundleGroup
    """Reward actors."""

    def needed(self, kind: str) -> float:
        """Return the amount of `CPU` or `GPU` that the phase must have."""
        return _sum(g.min_count * g.bundle.amount(kind) for g in (self.main, self.actors))

    def usable(self, kind: str) -> float:
        """Return the amount of `CPU` or `GPU` that the phase uses if it is free."""
        return _sum(g.max_count * g.bundle.amount(kind) for g in (self.main, self.actors))


class _FreeNode:
    """The free resources of a node while bundles are placed on it, in ten-thousandths."""

    def __init__(self, free: Bundle) -> None:
        self.cpus = _units(free.cpus)
        # Ray reports a node's free GPUs as one number, without devices. The fraction is taken as the
        # rest of one device. That is right if all shares are equal, and optimistic otherwise.
        whole, rest = divmod(_units(free.gpus), PER_UNIT)
        self.gpus = [PER_UNIT] * whole + ([rest] if rest else [])

    def take(self, bundle: Bundle) -> bool:
        """Place a bundle if it fits: a share of a GPU on one device, more as whole devices."""
        cpus, gpus = _units(bundle.cpus), _units(bundle.gpus)
        count, share = (gpus // PER_UNIT, PER_UNIT) if gpus > PER_UNIT else (1, gpus)
        # The device with the least free that suffices, so that free devices stay whole.
        devices = sorted((free, i) for i, free in enumerate(self.gpus) if free >= share)[:count]
        if cpus > self.cpus or (gpus and len(devices) < count):
            return False
        self.cpus -= cpus
        for _, i in devices if gpus else []:
            self.gpus[i] -= share
        return True

    def take_many(self, bundle: Bundle, most: int) -> int:
        """Place up to `most` bundles, and return how many fitted."""
        return next((i for i in range(most) if not self.take(bundle)), most)


def workers_that_fit(phase: Phase, nodes: Sequence[Node], actors: int = 0) -> int:
    """Return how many of a phase's main bundles fit on what is free, up to their maximum.

    Args:
        phase: of a run, usually training.
        nodes: with their free resources.
        actors: reward actors that also wait for a node. If they do not fit, the result is 0.
    """
    waiting = replace(phase.actors, min_count=actors, max_count=actors)
    for count in range(phase.main.max_count, 0, -1):
        wanted = replace(phase, main=replace(phase.main, min_count=count), actors=waiting)
        if not shortfall([wanted], nodes):
            return count
    return 0


def placement(phase: Phase, nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Distribute the minimum of a phase's bundles over the nodes.

    Finds a placement of all bundles whenever there is one. Filling the nodes one by one would not:
    with 3 CPUs for a worker and 2 for each of four actors, nodes of 7 and 4 CPUs can hold them all,
    but not with the worker on the second. So this is a dynamic program: after each node, for every
    number of workers placed so far, the largest number of actors that fits beside them.

    Returns:
        Main bundles and actors for each node.
    """
    wanted, actors = phase.main.min_count, phase.actors.min_count
    best: dict[int, int] = {0: 0}
    """Largest number of actors, by workers, on the nodes so far."""
    choices: list[dict[int, tuple[int, int]]] = []
    """For each node, by workers so far: the workers and actors to put on it."""
    for node in nodes:
        beside = []
        """Largest number of actors on this node, beside 0, 1, 2... workers."""
        for here in range(wanted + 1):
            free_node = _FreeNode(node.free)
            if free_node.take_many(phase.main.bundle, here) < here:
                break
            beside.append(free_node.take_many(phase.actors.bundle, actors))
        now: dict[int, int] = {}
        chosen: dict[int, tuple[int, int]] = {}
        for before, placed in best.items():
            for here, extra in enumerate(beside[: wanted - before + 1]):
                total = min(actors, placed + extra)
                if total > now.get(before + here, -1):
                    now[before + here] = total
                    chosen[before + here] = (here, total - placed)
        best = now
        choices.append(chosen)
    # Backwards from the largest number of workers, which comes before actors.
    count = max(best)
    placement = []
    for chosen in reversed(choices):
        placement.append(chosen[count])
        count -= chosen[count][0]
    return placement[::-1]


def shortfall(phases: Iterable[Phase], nodes: Sequence[Node]) -> str | None:
    """Describe in one line what the nodes lack for a run; None if they lack nothing.

    `ray-detox check`, the start of a run and a run that lost nodes all print this message.
    """
    for phase in phases:
        short = [
            kind
            for kind in KINDS
            if phase.needed(kind) > _sum(node.free.amount(kind) for node in nodes)
        ]
        if short:
            need = " and ".join(
                f"{_amount(phase.needed(k), k)} ({_reasons(phase, k)})" for k in short
            )
            have = " and ".join(_have(nodes, kind) for kind in short)
            return (
                f"The run needs {need}, and the cluster has {have}. Ask for fewer, or add nodes (the "
                "run waits for nodes that are busy or being added for up to "
                "cluster.capacity_timeout_s)."
            )
        # Enough in total is not enough: each bundle must fit on a single node.
        placed_on = placement(phase, nodes)
        for group, placed in (
            (phase.main, sum(main for main, _ in placed_on)),
            (phase.actors, sum(actors for _, actors in placed_on)),
        ):
            if placed < group.min_count:
                return _no_single_node(group, group.min_count - placed, nodes)
    return None


def shortfall_beside(phase: Phase, nodes: Sequence[Node], actors: int = 0) -> str | None:
    """Like `shortfall`, if all but `actors` of a phase's reward actors are on their nodes already."""
    return shortfall([replace(phase, actors=replace(phase.actors, min_count=actors))], nodes)


def _no_single_node(group: BundleGroup, unplaced: int, nodes: Sequence[Node]) -> str:
    # A bundle with GPUs needs a node with GPUs, so the largest node is the one with most GPUs.
    kind = "GPU" if group.bundle.gpus else "CPU"
    largest = max(nodes, key=lambda node: (node.free.amount(kind), node.free.cpus))
    device = " (a share of a GPU is on one device)" if 0 < group.bundle.gpus < 1 else ""
    return (
        f"The cluster has enough CPUs and GPUs in total, but {unplaced} of {group.min_count} "
        f"{group.name}{'' if group.min_count == 1 else 's'} ({group.setting or 'to prepare the data'}) "
        f"with {group.bundle} each fit on no single node{device}; the largest, {largest.address}, "
        f"has {largest.free} free. "
        f"Lower what each of them takes, ask for fewer, or add a node with {group.bundle}."
    )


def _reasons(phase: Phase, kind: str) -> str:
    reasons = []
    for group in (phase.main, phase.actors):
        if not group.min_count:
            continue
        per = f"{kind.lower()}s_per_{'actor' if group is phase.actors else 'worker'}"
        each = group.bundle.amount(kind)
        reasons.append(
            f"{group.setting} with {per}={each:g}" if group.setting else f"1 for a {group.name}"
        )
    return ", ".join(reasons)


def _have(nodes: Iterable[Node], kind: str) -> str:
    nodes = list(nodes)
    total = _sum(node.total.amount(kind) for node in nodes)
    free = _sum(node.free.amount(kind) for node in nodes)
    return _amount(total, kind) + (f", of which {free:g} free" if free < total else "")


def table(
    phases: Iterable[Phase], nodes: Sequence[Node] | None = None, width: int | None = None
) -> str:
    """Format what each phase holds, what the run needs and, if given, what the nodes have.

    Args:
        phases: the phases of a run.
        nodes: the nodes of the cluster.
        width: columns of the terminal; None if there is none. A narrow one gets each phase's name
            on a line of its own.
    """
    phases = list(phases)
    rows: list[tuple[str, ...]] = [("", "count", "CPUs each", "GPUs each", "CPUs", "GPUs")]
    narrow = width is not None and width < 77
    for phase in phases:
        if narrow:
            rows.append((f"{phase.name}:", "", "", "", "", ""))
        for group in (phase.main, phase.actors):
            sums = [f"{group.min_count * group.bundle.amount(kind):g}" for kind in KINDS]
            each = [f"{group.bundle.amount(kind):g}" for kind in KINDS]
            name = f"{phase.name + ':' if group is phase.main else '':<13}{group.name}"
            rows.append((f"  {group.name}" if narrow else name, group.count, *each, *sums))
    need = [max(phase.needed(kind) for phase in phases) for kind in KINDS]
    most = [max(phase.usable(kind) for phase in phases) for kind in KINDS]
    rows.append(("need", "", "", "", *(f"{amount:g}" for amount in need)))
    if most != need:
        rows.append(("used if free", "", "", "", *(f"{amount:g}" for amount in most)))
    if nodes is not None:
        for name, which in (("have", "total"), ("free", "free")):
            sums = [f"{_sum(getattr(n, which).amount(kind) for n in nodes):g}" for kind in KINDS]
            rows.append((name, "", "", "", *sums))
    widths = (18, 7, 10, 10, 6, 6) if narrow else (32, 7, 11, 11, 8, 8)
    return "\n".join(
        f"{name:<{widths[0]}}"
        + "".join(f"{cell:>{columns}}" for cell, columns in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    )


def _units(amount: float) -> int:
    return round(amount * PER_UNIT)


def _sum(amounts: Iterable[float]) -> float:
    return sum(_units(amount) for amount in amounts) / PER_UNIT


def _amount(amount: float, kind: str) -> str:
    return f"{amount:g} {kind}{'' if amount == 1 else 's'}"


# ---- the needs of a run ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """The resources that a run needs of the cluster."""

    cpus: float
    """Minimum over the whole run."""
    gpus: float
    """Minimum over the whole run."""
    gpus_per_worker: float
    gpus_per_actor: float
    worker: Bundle
    """One training worker, or one evaluation task."""
    actor: Bundle
    phases: tuple[Phase, ...]
    """Training, preparation and evaluation, in this order."""

    @property
    def training(self) -> Phase:
        """Training workers and reward actors."""
        return self.phases[0]

    @property
    def preparation(self) -> Phase:
        """Tasks of Ray Data and reward actors."""
        return self.phases[1]

    @property
    def evaluation(self) -> Phase:
        """Evaluation tasks and reward actors."""
        return self.phases[2]


def needs(config: RunConfig, cluster_gpus: float) -> Needs:
    """Return what a run needs, by the table at the top of this module.

        training   CPU = min_workers * cpus_per_worker + min_actors * cpus_per_actor
                   GPU = min_workers * gpus_per_worker + min_actors * gpus_per_actor

    If the settings leave the GPUs open, the cluster's GPUs decide: one for every worker and a
    quarter for every reward actor if there are enough; otherwise workers and actors share GPUs; on a
    cluster with too few for that, none are used.

    Args:
        config: of the run.
        cluster_gpus: GPUs of all nodes together.

    Raises:
        ConfigError: GPUs per worker or actor are more than one and not a whole number.
    """
    train, reward = config.train, config.reward
    serving, cluster = config.serving, config.cluster
    workers, actors = train.min_workers, reward.min_actors
    per_worker, per_actor = cluster.gpus_per_worker, serving.gpus_per_actor
    for setting, gpus in (
        ("cluster.gpus_per_worker", per_worker),
        ("serving.gpus_per_actor", per_actor),
    ):
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ConfigError(
                f"{setting} is {gpus:g}; expected a share of one GPU, or a whole number of GPUs."
            )
    if per_worker is None:
        if cluster_gpus >= workers + actors * (0.25 if per_actor is None else per_actor):
            per_worker = 1.0
        else:
            per_worker = 0.75 if cluster_gpus >= workers else 0.0
    if per_actor is None:
        per_actor = 0.0
        if per_worker:
            # If they share, each worker leaves a quarter of its GPU free for the actors, which
            # divide these quarters among them.
            per_actor = 0.25 if per_worker == 1 else int(25 * min(1, workers / actors)) / 100
    worker = Bundle(cluster.cpus_per_worker, per_worker)
    actor = Bundle(serving.cpus_per_actor, per_actor)
    actor_group = BundleGroup(
        "reward actor", f"reward.actors={reward.actors}", actors, reward.max_actors, actor
    )
    training = BundleGroup(
        "training worker", f"train.workers={train.workers}", workers, train.max_workers, worker
    )
    preparing = BundleGroup("data task", "", 1, 1, Bundle(1))
    measuring = BundleGroup(
        "evaluation task",
        f"evaluate.shards={config.evaluate.shards}",
        1,
        config.evaluate.shards,
        worker,
    )
    phases = (
        Phase("training", training, actor_group),
        Phase("preparation", preparing, actor_group),
        Phase("evaluation", measuring, actor_group),
    )
    return Needs(
        cpus=max(phase.needed("CPU") for phase in phases),
        gpus=max(phase.needed("GPU") for phase in phases),
        gpus_per_worker=per_worker,
        gpus_per_actor=per_actor,
        worker=worker,
        actor=actor,
        phases=phases,
    )
