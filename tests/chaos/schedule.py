"""What happens to a run, and when: drawn from a seed, so that a failure can be seen again."""

import random
from dataclasses import dataclass

PROCESSES = ("worker", "actor", "controller", "measurer", "progress", "directory")
NODES = ("node", "raylet", "drain")
DRIVERS = ("driver", "stop", "damage", "cluster", "head")
STORAGE = ("full", "slow")
KINDS = PROCESSES + NODES + DRIVERS + STORAGE


@dataclass(frozen=True)
class Blow:
    """One thing that happens.

    `worker`, `actor`, `controller`, `measurer`, `progress`, `directory` and `raylet` are processes
    that get SIGKILL; `node` loses all its processes at once; `drain` announces that, some seconds
    ahead. `driver` gets SIGKILL and `stop` SIGTERM; after `damage` the newest checkpoint is cut
    short as well, and after `cluster` all of Ray is gone, too. `head` takes the head node from a
    driver that must notice by itself. `full` and `slow` happen to storage for a while. Beside these
    `actor_node` is a node with a reward actor, and `return` ends all that lasts a while.
    """

    kind: str
    after_step: int
    """Once the line of this step was printed; one more than there are: once it is evaluated."""
    delay_s: float

    def __str__(self) -> str:
        return f"{self.kind}@{self.after_step}+{self.delay_s:.1f}s"


def schedule(seed: int, steps: int, kinds: tuple[str, ...] = KINDS, most: int = 3) -> list[Blow]:
    """One to `most` blows in the order of their steps."""
    draw = random.Random(seed)
    blows = [
        Blow(draw.choice(kinds), draw.randint(0, steps + 1), round(draw.uniform(0, 1.5), 1))
        for _ in range(draw.randint(1, most))
    ]
    return sorted(blows, key=lambda blow: blow.after_step)
