"""Random schedules of faults, reproducible from a seed."""

import random
from dataclasses import dataclass

PROCESSES = ("worker", "actor", "controller", "measurer", "progress", "directory")
NODES = ("node", "raylet", "drain")
DRIVERS = ("driver", "stop", "damage", "cluster", "head")
STORAGE = ("full", "slow")
KINDS = PROCESSES + NODES + DRIVERS + STORAGE


@dataclass(frozen=True)
class Fault:
    """One injected fault.

    `worker`, `actor`, `controller`, `measurer`, `progress`, `directory` and `raylet` are processes
    that get SIGKILL. `node` kills all processes of a node; `drain` announces this some seconds
    before. `driver` gets SIGKILL and `stop` SIGTERM; `damage` also truncates the newest checkpoint,
    and `cluster` also stops all of Ray. `head` kills the head node, which the driver must
    detect. `full` and `slow` break storage for a while. Three kinds are not drawn at random:
    `actor_node` kills the node with the reward actor, `worker_node` one with a training worker, and
    `return` ends all temporary faults.
    """

    kind: str
    after_step: int
    """Inject the fault after this step; the number of steps plus one means the evaluation."""
    delay_s: float

    def __str__(self) -> str:
        return f"{self.kind}@{self.after_step}+{self.delay_s:.1f}s"


def schedule(seed: int, steps: int, kinds: tuple[str, ...] = KINDS, most: int = 3) -> list[Fault]:
    """Draw one to `most` faults, in the order of their steps."""
    generator = random.Random(seed)
    faults = [
        Fault(
            generator.choice(kinds),
            generator.randint(0, steps + 1),
            round(generator.uniform(0, 1.5), 1),
        )
        for _ in range(generator.randint(1, most))
    ]
    return sorted(faults, key=lambda fault: fault.after_step)
