"""PromptShards: the global batch of a step is the same for any number of workers."""

import dataclasses

import pytest
import torch

from ray_detox.config import DataConfig, PPOConfig, RunConfig, TrainConfig
from ray_detox.data.prompts import prompt_id
from ray_detox.data.shards import PromptShards, make_batch, shards_of_worker
from ray_detox.records import PreparedRow

SHARDS = 8


def row(number):
    text = f"prompt {number}"
    return PreparedRow(
        prompt_id=prompt_id(text),
        prompt=text,
        query_ids=[*range(3, 4 + number % 5), 1],
        columns={"summary": f"summary {number}", "topic": number},
        copy=0,
        more_references=(),
    )


def config(prompts_per_step=16, workers=1):
    return RunConfig(
        data=DataConfig(shards=SHARDS),
        ppo=PPOConfig(prompts_per_step=prompts_per_step, minibatches=2),
        train=TrainConfig(workers=workers),
    )


def rows_by_shard(count=50):
    return {shard: [row(n) for n in range(shard, count, SHARDS)] for shard in range(SHARDS)}


def worker_shards(rank, workers, **settings):
    rows = rows_by_shard()
    own = {shard: rows[shard] for shard in shards_of_worker(SHARDS, rank, workers)}
    return PromptShards(config(workers=workers, **settings), own, pad_id=0)


def test_a_batch_has_the_prompts_and_the_columns_of_its_rows():
    batch = make_batch([row(2), row(0)], pad_id=0)

    assert batch.texts == ["prompt 2", "prompt 0"]
    assert batch.ids == [prompt_id("prompt 2"), prompt_id("prompt 0")]
    assert batch.query_ids.tolist() == [[3, 4, 5, 1], [3, 1, 0, 0]]
    assert batch.query_mask.sum(dim=1).tolist() == [4, 2]
    assert batch.columns == {"summary": ["summary 2", "summary 0"], "topic": [2, 0]}


def test_a_column_that_a_row_lacks_is_none_for_it():
    with_all, without = row(0), row(1)
    del without.columns["topic"]

    for rows in ([with_all, without], [without, with_all]):
        columns = make_batch(rows, pad_id=0).columns
        assert sorted(columns) == ["summary", "topic"]
        assert columns["topic"] == [r.columns.get("topic") for r in rows]


def test_a_batch_of_no_rows_is_empty():
    assert len(make_batch([], pad_id=0)) == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8])
def test_workers_together_hold_every_shard_once_and_in_order(workers):
    held = [shard for rank in range(workers) for shard in shards_of_worker(SHARDS, rank, workers)]

    assert held == list(range(SHARDS))


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("step", [0, 3, 17])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers, step):
    alone = worker_shards(0, 1).batch(step)
    parts = [worker_shards(rank, workers) for rank in range(workers)]

    batches = [part.batch(step) for part in parts]

    assert [name for batch in batches for name in batch.ids] == alone.ids
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 16 // SHARDS
    assert [part.first_row for part in parts] == [sum(sizes[:i]) for i in range(workers)]
    for part, batch in zip(parts, batches, strict=True):
        own = slice(part.first_row, part.first_row + len(batch))
        assert batch.texts == alone.texts[own]
        width = batch.query_ids.shape[1]
        assert torch.equal(batch.query_ids, alone.query_ids[own, :width])


def test_every_prompt_is_used_once_before_any_is_used_twice():
    shards = worker_shards(0, 1)  # 50 rows: shards of 7, 7, 6, 6, ... and 2 rows of each a step

    seen = [text for step in range(3) for text in shards.batch(step).texts]

    assert len(set(seen)) == len(seen) == 48
    later = {text for step in range(3, 7) for text in shards.batch(step).texts}
    assert {f"prompt {n}" for n in range(50)} <= later | set(seen)


def test_the_rows_of_a_step_do_not_depend_on_earlier_calls():
    shards, again = worker_shards(0, 1), worker_shards(0, 1)
    for step in range(5):
        shards.batch(step)

    assert shards.batch(2).ids == again.batch(2).ids
    assert shards.batch(3).ids != again.batch(2).ids


def test_another_seed_gives_other_rows():
    rows = rows_by_shard()
    batches = [
        PromptShards(RunConfig(seed=seed, data=DataConfig(shards=SHARDS)), rows, pad_id=0).batch(0)
        for seed in (0, 1)
    ]

    assert batches[0].ids != batches[1].ids


def test_a_shard_shorter_than_its_share_of_a_step_repeats_its_rows():
    rows = {shard: [row(shard)] for shard in range(SHARDS)}

    batch = PromptShards(config(prompts_per_step=32), rows, pad_id=0).batch(0)

    assert batch.texts == [f"prompt {shard}" for shard in range(SHARDS) for _ in range(4)]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_copies_of_a_prompt_in_a_step_have_different_occurrences_for_any_number_of_workers(workers):
    # Two prompts in eight shards of two rows, each shard giving four rows to a step.
    rows = {
        shard: [dataclasses.replace(row(shard // 4), copy=2 * (shard % 4) + i) for i in range(2)]
        for shard in range(SHARDS)
    }
    parts = [
        PromptShards(
            config(prompts_per_step=32, workers=workers),
            {shard: rows[shard] for shard in shards_of_worker(SHARDS, rank, workers)},
            pad_id=0,
        )
        for rank in range(workers)
    ]

    batches = [part.batch(step=5) for part in parts]

    found = [pair for batch in batches for pair in zip(batch.ids, batch.occurrences, strict=True)]
    assert len(set(found)) == 32
    assert len({name for name, _ in found}) == 2
    alone = PromptShards(config(prompts_per_step=32), rows, pad_id=0).batch(step=5)
    assert found == list(zip(alone.ids, alone.occurrences, strict=True))


def test_a_prompt_that_occurs_once_has_occurrence_zero():
    assert worker_shards(0, 1).batch(1).occurrences == [0] * 16


def test_selected_rows_keep_their_occurrences():
    batch = make_batch([row(0), row(0), row(1)], pad_id=0, occurrences=[0, 1, 0])

    assert batch.select([2, 1]).occurrences == [0, 1]


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("count", [5, 16, 1000])
def test_the_probe_prompts_do_not_depend_on_the_number_of_workers(workers, count):
    alone = worker_shards(0, 1).probe(count)

    parts = [worker_shards(rank, workers).probe(count) for rank in range(workers)]

    assert [name for part in parts for name in part.ids] == alone.ids
    assert len(set(alone.ids)) == min(count, 50)
