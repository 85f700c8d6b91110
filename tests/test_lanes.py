"""Lanes: the global batch of a step is the same whatever the number of workers."""

import pytest
import torch

from ray_detox.config import DataConfig, PPOConfig, RunConfig, TrainConfig
from ray_detox.data.prompts import prompt_id
from ray_detox.data.shards import Lanes, lanes_of_worker, make_batch

LANES = 8


def row(number):
    text = f"prompt {number}"
    return {
        "prompt_id": prompt_id(text),
        "prompt": text,
        "query_ids": [*range(3, 4 + number % 5), 1],
        "summary": f"summary {number}",
        "topic": number,
    }


def config(prompts_per_step=16, workers=1):
    return RunConfig(
        data=DataConfig(lanes=LANES),
        ppo=PPOConfig(prompts_per_step=prompts_per_step, minibatches=2),
        train=TrainConfig(workers=workers),
    )


def rows_by_lane(count=50):
    return {lane: [row(n) for n in range(lane, count, LANES)] for lane in range(LANES)}


def lanes_of(rank, workers, **settings):
    rows = rows_by_lane()
    mine = {lane: rows[lane] for lane in lanes_of_worker(LANES, rank, workers)}
    return Lanes(config(workers=workers, **settings), mine, pad_id=0)


def test_a_batch_holds_the_rows_and_keeps_the_datas_other_columns():
    batch = make_batch([row(2), row(0)], pad_id=0)

    assert batch.texts == ["prompt 2", "prompt 0"]
    assert batch.ids == [prompt_id("prompt 2"), prompt_id("prompt 0")]
    assert batch.query_ids.tolist() == [[3, 4, 5, 1], [3, 1, 0, 0]]
    assert batch.query_mask.sum(dim=1).tolist() == [4, 2]
    assert batch.columns == {"summary": ["summary 2", "summary 0"], "topic": [2, 0]}


def test_a_batch_of_no_rows_is_empty():
    assert len(make_batch([], pad_id=0)) == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8])
def test_workers_hold_all_lanes_in_order_and_none_twice(workers):
    held = [lane for rank in range(workers) for lane in lanes_of_worker(LANES, rank, workers)]

    assert held == list(range(LANES))


@pytest.mark.parametrize("workers", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("step", [0, 3, 17])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers, step):
    alone = lanes_of(0, 1).batch(step)
    parts = [lanes_of(rank, workers) for rank in range(workers)]

    batches = [part.batch(step) for part in parts]

    assert [name for batch in batches for name in batch.ids] == alone.ids
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 16 // LANES
    assert [part.first_row for part in parts] == [sum(sizes[:i]) for i in range(workers)]
    for part, batch in zip(parts, batches, strict=True):
        mine = slice(part.first_row, part.first_row + len(batch))
        assert batch.texts == alone.texts[mine]
        width = batch.query_ids.shape[1]
        assert torch.equal(batch.query_ids, alone.query_ids[mine, :width])


def test_every_prompt_is_answered_once_before_any_is_answered_twice():
    lanes = lanes_of(0, 1)  # 50 rows: lanes of 7, 7, 6, 6, ... and 2 rows of each a step

    seen = [text for step in range(3) for text in lanes.batch(step).texts]

    assert len(set(seen)) == len(seen) == 48
    later = {text for step in range(3, 7) for text in lanes.batch(step).texts}
    assert {f"prompt {n}" for n in range(50)} <= later | set(seen)


def test_a_step_draws_the_same_rows_whenever_it_is_asked():
    lanes, again = lanes_of(0, 1), lanes_of(0, 1)
    for step in range(5):
        lanes.batch(step)

    assert lanes.batch(2).ids == again.batch(2).ids
    assert lanes.batch(3).ids != again.batch(2).ids


def test_another_seed_draws_other_rows():
    rows = rows_by_lane()
    batches = [
        Lanes(RunConfig(seed=seed, data=DataConfig(lanes=LANES)), rows, pad_id=0).batch(0)
        for seed in (0, 1)
    ]

    assert batches[0].ids != batches[1].ids


def test_a_lane_shorter_than_its_share_of_a_step_starts_over():
    rows = {lane: [row(lane)] for lane in range(LANES)}

    batch = Lanes(config(prompts_per_step=32), rows, pad_id=0).batch(0)

    assert batch.texts == [f"prompt {lane}" for lane in range(LANES) for _ in range(4)]
