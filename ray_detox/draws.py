"""Every random number of a run: sampling noise, minibatch assignment and the order of shards.

Each one is a pure function of the seed, the step and the prompt, so that a run that is resumed,
or that runs on another number of workers, draws the same numbers.
"""

from collections.abc import Sequence

import numpy as np

from ray_detox.config import SamplingConfig

EVALUATION = -1
"""The step under which numbers for the evaluation are drawn."""


def sampling_noise(
    ids: Sequence[str], sampling: SamplingConfig, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the response limit of each prompt, and the sampling noise of its tokens.

    Args:
        ids: prompt ids, as `prompt_id` gives them.
        sampling: gives the range of max_new_tokens.
        seed: of the run.
        step: of the run, or `EVALUATION`.

    Returns:
        Limits [B] int64 in tokens, from the range of `sampling.max_new_tokens`, and uniform noise
        [B, highest limit] float64 in [0, 1).
    """
    max_new_tokens = np.empty(len(ids), dtype=np.int64)
    noise = np.empty((len(ids), sampling.highest_limit))
    for row, name in enumerate(ids):
        # +1 because seeds are not negative and EVALUATION is.
        rng = np.random.default_rng([seed, step + 1, int(name, 16)])
        max_new_tokens[row] = rng.integers(
            sampling.lowest_limit, sampling.highest_limit, endpoint=True
        )
        noise[row] = rng.random(sampling.highest_limit)
    return max_new_tokens, noise


def minibatch_assignment(
    seed: int, step: int, epoch: int, rows: int, minibatches: int
) -> np.ndarray:
    """Which minibatch each row of a step's global batch belongs to, [rows] int64.

    Each run of `minibatches` consecutive rows is dealt one row to each minibatch, in random
    order. So a worker that holds consecutive rows has an equal share of every minibatch, and yet
    the assignment does not depend on how many workers there are.
    """
    blocks = rows // minibatches
    rng = np.random.default_rng([seed, step + 1, epoch, 0x9E3779B9])
    assignment: np.ndarray = np.argsort(rng.random((blocks, minibatches)), axis=1).reshape(-1)
    return assignment


def shard_rows(
    seed: int, step: int, shard: int, rows_in_shard: int, rows_per_step: int
) -> list[tuple[int, int]]:
    """Which rows a shard gives to a step: a list of (epoch, row in the shard).

    A shard is read as an endless stream of epochs, each a fresh permutation that depends on
    (seed, epoch, shard) alone; step s takes the next `rows_per_step`. No row is skipped or seen
    twice within an epoch, and going on after an interruption needs the step and nothing else.
    """
    first = step * rows_per_step
    chosen: list[tuple[int, int]] = []
    orders: dict[int, np.ndarray] = {}
    for position in range(first, first + rows_per_step):
        epoch, offset = divmod(position, rows_in_shard)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch, shard]).permutation(rows_in_shard)
        chosen.append((epoch, int(orders[epoch][offset])))
    return chosen
