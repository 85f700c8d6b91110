"""How much of a cluster a run takes, and whether there is room for it; arithmetic, without Ray.

    phase         holds at least                        CPU
    training      W workers and M reward actors         W * cpus_per_worker + M * cpus_per_actor
    preparation   1 task of Ray Data and M actors       1 + M * cpus_per_actor
    evaluation    1 of its tasks and M actors           cpus_per_worker + M * cpus_per_actor

GPUs are counted alike, and the run needs the largest sum. Where a count may move (`2..4`), the
least must be there and the most is used where there is room; evaluation tasks take turns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ray_detox.config import ConfigError, RunConfig

KINDS = ("CPU", "GPU")
PER_UNIT = 10_000
"""Ray counts in ten-thousandths, and so sums are exact here."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """CPUs and GPUs that one actor, worker or task holds, all on one node."""

    cpus: float
    gpus: float = 0.0

    def of(self, kind: str) -> float:
        """The amount of `CPU` or `GPU`."""
        return self.cpus if kind == "CPU" else self.gpus

    def __str__(self) -> str:
        amounts = [_amount(self.cpus, "CPU")] if self.cpus or not self.gpus else []
        amounts += [_amount(self.gpus, "GPU")] if self.gpus else []
        return " and ".join(amounts)


@dataclass(frozen=True, slots=True)
class Node:
    """What a node has, and how much of it is free."""

    address: str
    total: Bundle
    free: Bundle
    node_id: str = ""
    """Ray's name for it."""

    def when_idle(self) -> "Node":
        """The same node with nothing on it."""
        return replace(self, free=self.total)


@dataclass(frozen=True, slots=True)
class Part:
    """Several equal bundles of a run."""

    what: str
    """In the singular, such as `reward actor`."""
    why: str
    """The setting that asks for them, such as `reward.actors=1..4`; empty where none does."""
    least: int
    most: int
    each: Bundle

    @property
    def count(self) -> str:
        """The number, or the range that it moves in."""
        return f"{self.least}" if self.least == self.most else f"{self.least}..{self.most}"


@dataclass(frozen=True, slots=True)
class Phase:
    """Two parts that a run holds at the same time."""

    name: str
    main: Part
    actors: Part

    def least(self, kind: str) -> float:
        """The amount of `CPU` or `GPU` that must be there."""
        return _sum(part.least * part.each.of(kind) for part in (self.main, self.actors))

    def most(self, kind: str) -> float:
        """The amount of `CPU` or `GPU` that is used where there is free_node."""
        return _sum(part.most * part.each.of(kind) for part in (self.main, self.actors))


class _FreeNode:
    """What is left of a node while bundles are put on it, in ten-thousandths."""

    def __init__(self, free: Bundle) -> None:
        self.cpus = _units(free.cpus)
        # Ray tells a node's free GPUs as one number. A part of a GPU is counted as being on one
        # device, which is right where all shares are equal and hopeful otherwise.
        whole, rest = divmod(_units(free.gpus), PER_UNIT)
        self.gpus = [PER_UNIT] * whole + ([rest] if rest else [])

    def take(self, bundle: Bundle) -> bool:
        """Put a bundle here, if it fits: a share of a GPU on one device, more as whole devices."""
        cpus, gpus = _units(bundle.cpus), _units(bundle.gpus)
        count, share = (gpus // PER_UNIT, PER_UNIT) if gpus > PER_UNIT else (1, gpus)
        # The fullest device that will do, so that whole ones stay whole.
        devices = sorted((free, i) for i, free in enumerate(self.gpus) if free >= share)[:count]
        if cpus > self.cpus or (gpus and len(devices) < count):
            return False
        self.cpus -= cpus
        for _, i in devices if gpus else []:
            self.gpus[i] -= share
        return True

    def take_many(self, bundle: Bundle, most: int) -> int:
        """Put up to `most` bundles here, and return how many fitted."""
        return next((i for i in range(most) if not self.take(bundle)), most)


def workers_that_fit(phase: Phase, nodes: Sequence[Node], actors: int = 0) -> int:
    """How many of a phase's main bundles find room on what is free, at most the most of them.

    Args:
        phase: training, say.
        nodes: with what is free on them.
        actors: that still have to find room as well; where they do not, nothing fits.
    """
    beside = replace(phase.actors, least=actors, most=actors)
    for count in range(phase.main.most, 0, -1):
        if shortfall([replace(phase, main=replace(phase.main, least=count), actors=beside)], nodes):
            continue
        return count
    return 0


def placement(phase: Phase, nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """How many of a phase's main bundles and actors each node would take of the least it holds.

    All are placed wherever that is possible at all. Filling nodes one by one would not do: with
    3 CPUs for a worker and 2 for each of four actors, nodes of 7 and 4 CPUs have room for all,
    but not if the worker is on the second. So the nodes are gone through with every number of
    workers so far, each with the most actors that can stand beside them.
    """
    wanted, actors = phase.main.least, phase.actors.least
    reached: dict[int, int] = {0: 0}
    """Actors at most, by workers, on the nodes so far."""
    choices: list[dict[int, tuple[int, int]]] = []
    for node in nodes:
        beside = []
        """Actors at most on this node, beside 0, 1, 2... workers."""
        for here in range(wanted + 1):
            free_node = _FreeNode(node.free)
            if free_node.take_many(phase.main.each, here) < here:
                break
            beside.append(free_node.take_many(phase.actors.each, actors))
        now: dict[int, int] = {}
        chosen: dict[int, tuple[int, int]] = {}
        for before, placed in reached.items():
            for here, extra in enumerate(beside[: wanted - before + 1]):
                total = min(actors, placed + extra)
                if total > now.get(before + here, -1):
                    now[before + here] = total
                    chosen[before + here] = (here, total - placed)
        reached = now
        choices.append(chosen)
    count = max(reached)
    placement = []
    for chosen in reversed(choices):
        placement.append(chosen[count])
        count -= chosen[count][0]
    return placement[::-1]


def shortfall(phases: Iterable[Phase], nodes: Sequence[Node]) -> str | None:
    """The sentence for nodes without room for a run, or None where there is free_node.

    The same sentence is used before a run starts, by `ray-detox check`, and while it runs.
    """
    for phase in phases:
        short = [
            kind for kind in KINDS if phase.least(kind) > _sum(node.free.of(kind) for node in nodes)
        ]
        if short:
            need = " and ".join(
                f"{_amount(phase.least(k), k)} ({_reasons(phase, k)})" for k in short
            )
            have = " and ".join(_have(nodes, kind) for kind in short)
            return (
                f"The run needs {need}, and the cluster has {have}. Ask for fewer, or add nodes "
                "(those that are busy or being added are given time by cluster.capacity_timeout_s)."
            )
        placed_on = placement(phase, nodes)
        for part, placed in (
            (phase.main, sum(main for main, _ in placed_on)),
            (phase.actors, sum(actors for _, actors in placed_on)),
        ):
            if placed < part.least:
                return _no_single_node(part, part.least - placed, nodes)
    return None


def shortfall_beside(phase: Phase, nodes: Sequence[Node], actors: int = 0) -> str | None:
    """The same where all but `actors` of a phase's actors are on their nodes already."""
    return shortfall([replace(phase, actors=replace(phase.actors, least=actors))], nodes)


def _no_single_node(part: Part, unplaced: int, nodes: Sequence[Node]) -> str:
    # The dearest kind decides which node is the largest.
    kind = "GPU" if part.each.gpus else "CPU"
    largest = max(nodes, key=lambda node: (node.free.of(kind), node.free.cpus))
    device = " (a share of a GPU is on one device)" if 0 < part.each.gpus < 1 else ""
    return (
        f"The cluster has enough CPUs and GPUs in all, but {unplaced} of {part.least} "
        f"{part.what}(s) ({part.why or 'to prepare the data'}) with {part.each} each would find no "
        f"single node with room{device}; the largest, {largest.address}, has {largest.free} free. "
        f"Lower what each holds, ask for fewer, or add a node with {part.each}."
    )


def _reasons(phase: Phase, kind: str) -> str:
    reasons = []
    for part in (phase.main, phase.actors):
        if not part.least:
            continue
        per = f"{kind.lower()}s_per_{'actor' if part is phase.actors else 'worker'}"
        each = part.each.of(kind)
        reasons.append(f"{part.why} with {per}={each:g}" if part.why else f"1 for a {part.what}")
    return ", ".join(reasons)


def _have(nodes: Iterable[Node], kind: str) -> str:
    nodes = list(nodes)
    total = _sum(node.total.of(kind) for node in nodes)
    free = _sum(node.free.of(kind) for node in nodes)
    return _amount(total, kind) + (f", of which {free:g} free" if free < total else "")


def table(
    phases: Iterable[Phase], nodes: Sequence[Node] | None = None, width: int | None = None
) -> str:
    """Show the accounting: what each phase holds and, if nodes are given, what they have.

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
        for part in (phase.main, phase.actors):
            sums = [f"{part.least * part.each.of(kind):g}" for kind in KINDS]
            each = [f"{part.each.of(kind):g}" for kind in KINDS]
            name = f"{phase.name + ':' if part is phase.main else '':<13}{part.what}"
            rows.append((f"  {part.what}" if narrow else name, part.count, *each, *sums))
    need = [max(phase.least(kind) for phase in phases) for kind in KINDS]
    most = [max(phase.most(kind) for phase in phases) for kind in KINDS]
    rows.append(("need", "", "", "", *(f"{amount:g}" for amount in need)))
    if most != need:
        rows.append(("used if free", "", "", "", *(f"{amount:g}" for amount in most)))
    if nodes is not None:
        for name, which in (("have", "total"), ("free", "free")):
            sums = [f"{_sum(getattr(n, which).of(kind) for n in nodes):g}" for kind in KINDS]
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


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run asks of the cluster."""

    cpus: float
    gpus: float
    gpus_per_worker: float
    gpus_per_actor: float
    worker: Bundle
    """One training worker, or one evaluation task."""
    actor: Bundle
    phases: tuple[Phase, ...]
    """What is held at the same time: training, preparation, evaluation."""

    @property
    def training(self) -> Phase:
        """Workers and reward actors."""
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
    """The cluster resources a run holds, by `free_node.py`'s formula and from the least of its counts.

        CPU = min_workers * cpus_per_worker + min_actors * cpus_per_actor
        GPU = min_workers * gpus_per_worker + min_actors * gpus_per_actor

    GPUs left open in the config are settled by what the cluster has: a whole one for every worker
    and a quarter for every reward actor; else workers and actors share GPUs; else none.

    Raises:
        ConfigError: GPUs per worker or actor are more than one and not whole.
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
                f"{setting} is {gpus:g}; expected a share of one GPU, or a whole number of them."
            )
    if per_worker is None:
        if cluster_gpus >= workers + actors * (0.25 if per_actor is None else per_actor):
            per_worker = 1.0
        else:
            per_worker = 0.75 if cluster_gpus >= workers else 0.0
    if per_actor is None:
        per_actor = 0.0
        if per_worker:
            # Sharing: the quarters that workers leave free, among all actors.
            shared = 0.25 if per_worker == 1 else int(25 * min(1, workers / actors)) / 100
            per_actor = shared
    worker = Bundle(cluster.cpus_per_worker, per_worker)
    actor = Bundle(serving.cpus_per_actor, per_actor)
    actor_part = Part(
        "reward actor", f"reward.actors={reward.actors}", actors, reward.max_actors, actor
    )
    training = Part(
        "training worker", f"train.workers={train.workers}", workers, train.max_workers, worker
    )
    preparing = Part("data task", "", 1, 1, Bundle(1))
    measuring = Part(
        "evaluation task",
        f"evaluate.shards={config.evaluate.shards}",
        1,
        config.evaluate.shards,
        worker,
    )
    phases = (
        Phase("training", training, actor_part),
        Phase("preparation", preparing, actor_part),
        Phase("evaluation", measuring, actor_part),
    )
    return Needs(
        cpus=max(phase.least("CPU") for phase in phases),
        gpus=max(phase.least("GPU") for phase in phases),
        gpus_per_worker=per_worker,
        gpus_per_actor=per_actor,
        worker=worker,
        actor=actor,
        phases=phases,
    )
