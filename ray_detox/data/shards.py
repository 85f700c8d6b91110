"""The prompts that a worker holds, and those it takes in a step.

Ingest splits all prompts into a fixed number of shards of equal length (give or take one row). A
worker holds some consecutive shards, and every step takes the same number of rows from each
shard. So the global batch of a step is the same for any number of workers, the workers' shares
are disjoint and differ by at most one shard, and the position in the data is one integer: the
step.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ray_detox.config import RunConfig
from ray_detox.draws import shard_rows
from ray_detox.records import PreparedRow, PromptBatch


def make_batch(
    rows: Sequence[PreparedRow], pad_id: int, occurrences: Sequence[int] | None = None
) -> PromptBatch:
    """Collect prepared rows into a batch of prompts, padded with `pad_id`.

    A column that a row does not have is None for it: rows of one file may differ in their keys.

    Args:
        rows: of the batch.
        pad_id: token id that pads the prompts.
        occurrences: of each row, see `PromptBatch`; None if no prompt repeats.
    """
    query_ids, query_mask = pad_rows([row.query_ids for row in rows], pad_id)
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return PromptBatch(
        ids=[row.prompt_id for row in rows],
        texts=[row.prompt for row in rows],
        query_ids=query_ids,
        query_mask=query_mask,
        columns={name: [row.columns.get(name) for row in rows] for name in names},
        occurrences=list(occurrences or [0] * len(rows)),
    )


def shards_of_worker(shards: int, rank: int, workers: int) -> range:
    """Return the consecutive shards that worker `rank` of `workers` holds.

    There must be at most `shards` workers.
    """
    return range(rank * shards // workers, (rank + 1) * shards // workers)


class PromptShards:
    """The prompt shards of one worker, in memory.

    Args:
        config: settings of the run: seed, number of shards and prompts per step.
        rows: rows of each shard that this worker holds, by shard number; no shard is empty.
        pad_id: token id that pads the prompts of a batch.
    """

    def __init__(
        self, config: RunConfig, rows: Mapping[int, Sequence[PreparedRow]], pad_id: int
    ) -> None:
        self.seed = config.seed
        self.shards = config.data.shards
        self.rows_per_shard = config.ppo.prompts_per_step // config.data.shards
        self.rows = dict(sorted(rows.items()))
        self.pad_id = pad_id
        self.first_row = min(self.rows) * self.rows_per_shard
        """Position of this worker's first row in every step's global batch."""

    def batch(self, step: int) -> PromptBatch:
        """Return this worker's prompts of a step, in the order of the global batch."""
        chosen, occurrences = [], []
        for shard, rows in self.rows.items():
            # A shard with few rows gives a row to a step more than once.
            repeats: Counter[int] = Counter()
            for _, index in shard_rows(self.seed, step, shard, len(rows), self.rows_per_shard):
                chosen.append(rows[index])
                # Unique for a prompt within the step: a row repeats less than `rows_per_shard` times.
                occurrences.append(rows[index].copy * self.rows_per_shard + repeats[index])
                repeats[index] += 1
        return make_batch(chosen, self.pad_id, occurrences)

    def probe(self, prompts: int) -> PromptBatch:
        """Return this worker's part of the run's first `prompts` prompts; it may be empty.

        Each shard gives its first rows, an equal number of them, so the prompts do not depend on
        the step or on the number of workers. They are fewer if the shards hold fewer rows.
        """
        chosen: list[PreparedRow] = []
        for shard, rows in self.rows.items():
            count = prompts * (shard + 1) // self.shards - prompts * shard // self.shards
            chosen += rows[:count]
        return make_batch(chosen, self.pad_id, [row.copy for row in chosen])


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids on the right; return ids and mask, both [B, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(np.asarray(row), dtype=torch.long)
    return ids, torch.arange(width) < lengths[:, None]
