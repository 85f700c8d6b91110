"""All random numbers of a run: sampling noise, minibatch assignment and the order of shards.

Each one is a pure function of the seed and its position (step, prompt and its occurrence, step and
epoch, or epoch and shard), so a resumed run, or a run on another number of workers, draws the same numbers.
"""

from collections.abc import Sequence

import numpy as np

from ray_detox.config import SamplingConfig

EVALUATION = -1
"""The step number that the evaluation passes to `sampling_noise`."""


def sampling_noise(
    ids: Sequence[str],
    sampling: SamplingConfig,
    seed: int,
    step: int,
    occurrences: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the response limit of each prompt and the sampling noise of its tokens.

    Args:
        ids: prompt ids, as `data.prompts.prompt_id` returns them.
        sampling: settings with the range of `max_new_tokens`.
        seed: seed of the run.
        step: step of the run, or `EVALUATION`.
        occurrences: numbers that give the copies of a prompt in one step different noise; None if
            no prompt repeats.

    Returns:
        max_new_tokens [B] int64, uniform on the range of `sampling.max_new_tokens`, and noise
        [B, highest limit] float64, uniform on [0, 1).
    """
    max_new_tokens = np.empty(len(ids), dtype=np.int64)
    noise = np.empty((len(ids), sampling.highest_limit))
    pairs = zip(ids, occurrences or [0] * len(ids), strict=True)
    for row, (name, occurrence) in enumerate(pairs):
        # +1 because EVALUATION is negative and numpy accepts no negative seeds. The noise of a
        # prompt that occurs once does not depend on whether others repeat.
        key = [seed, step + 1, int(name, 16), *([occurrence] if occurrence else [])]
        rng = np.random.default_rng(key)
        max_new_tokens[row] = rng.integers(
            sampling.lowest_limit, sampling.highest_limit, endpoint=True
        )
        noise[row] = rng.random(sampling.highest_limit)
    return max_new_tokens, noise


def minibatch_assignment(
    seed: int, step: int, epoch: int, rows: int, minibatches: int
) -> np.ndarray:
    """Assign each row of a step's global batch to a minibatch, [rows] int64.

    Of each block of `minibatches` consecutive rows, every minibatch gets one row, in random order.
    A worker holds consecutive rows and so has an equal share of every minibatch, while the
    assignment does not depend on the number of workers.
    """
    blocks = rows // minibatches
    rng = np.random.default_rng([seed, step + 1, epoch, 0x9E3779B9])
    assignment: np.ndarray = np.argsort(rng.random((blocks, minibatches)), axis=1).reshape(-1)
    return assignment


def shard_rows(
    seed: int, step: int, shard: int, rows_in_shard: int, rows_per_step: int
) -> list[tuple[int, int]]:
    """Choose the rows of a shard for a step: a list of (epoch, row in the shard).

    A shard is read as an endless stream of epochs, each a new permutation that depends on
    (seed, epoch, shard) alone; each step takes the next `rows_per_step` rows of the stream. Every
    row occurs exactly once per epoch, and a resumed run needs only the step.
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
