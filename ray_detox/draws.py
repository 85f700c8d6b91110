"""Every random number of a run: sampling noise, minibatch assignment and the order of shards.

Each one is a pure function of the seed, the step and the prompt, so that a run that is resumed,
or that runs on another number of workers, draws the same numbers.
"""

from collections.abc import Sequence

import numpy as np

from ray_detox.config import SamplingConfig

EVALUATION = -1
"""The step under which numbers for the evaluation are drawn."""


def draw(
    ids: Sequence[str], sampling: SamplingConfig, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The response budget of each prompt, and the uniform numbers that its tokens are drawn with.

    Args:
        ids: prompt ids, as `prompt_id` gives them.
        sampling: gives the range of budgets.
        seed: of the run.
        step: of the run, or `EVALUATION`.

    Returns:
        budgets [B] int64 in budget_min..budget_max, and uniforms [B, budget_max] float64 in [0, 1).
    """
    budgets = np.empty(len(ids), dtype=np.int64)
    uniforms = np.empty((len(ids), sampling.budget_max))
    for row, name in enumerate(ids):
        # +1 because seeds are not negative and EVALUATION is.
        rng = np.random.default_rng([seed, step + 1, int(name, 16)])
        budgets[row] = rng.integers(sampling.budget_min, sampling.budget_max, endpoint=True)
        uniforms[row] = rng.random(sampling.budget_max)
    return budgets, uniforms


def minibatch_of_rows(seed: int, step: int, epoch: int, rows: int, minibatches: int) -> np.ndarray:
    """Which minibatch each row of a step's global batch belongs to, [rows] int64.

    Each run of `minibatches` consecutive rows is dealt one row to each minibatch, in random
    order. So a worker that holds consecutive rows has an equal share of every minibatch, and yet
    the deal does not depend on how many workers there are.
    """
    blocks = rows // minibatches
    rng = np.random.default_rng([seed, step + 1, epoch, 0x9E3779B9])
    deal: np.ndarray = np.argsort(rng.random((blocks, minibatches)), axis=1).reshape(-1)
    return deal


def lane_rows(
    seed: int, step: int, lane: int, rows_in_lane: int, rows_per_step: int
) -> list[tuple[int, int]]:
    """Which rows a lane gives to a step: a list of (epoch, row in the lane).

    A lane is read as an endless stream of epochs, each a fresh permutation that depends on
    (seed, epoch, lane) alone; step s takes the next `rows_per_step`. No row is skipped or seen
    twice within an epoch, and going on after an interruption needs the step and nothing else.
    """
    first = step * rows_per_step
    chosen: list[tuple[int, int]] = []
    orders: dict[int, np.ndarray] = {}
    for position in range(first, first + rows_per_step):
        epoch, offset = divmod(position, rows_in_lane)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch, lane]).permutation(rows_in_lane)
        chosen.append((epoch, int(orders[epoch][offset])))
    return chosen
