"""Records refuse what does not fit, and choosing rows loses and invents nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from ray_detox.data.shards import pad_rows
from ray_detox.records import Generation, PromptBatch, Rollout, Scores, Targets


def rollout(rows=2, queries=3, responses=4, **changes):
    """A rollout whose numbers all differ."""
    number = lambda *shape: torch.arange(1.0, 1 + np.prod(shape)).view(*shape)
    filled = lambda width: torch.ones(rows, width, dtype=torch.bool)
    fields = {
        "query_ids": number(rows, queries).long(),
        "query_mask": filled(queries),
        "response_ids": number(rows, responses).long(),
        "response_mask": filled(responses),
        "logprobs": -number(rows, responses),
        "ref_logprobs": -2 * number(rows, responses),
        "values": 3 * number(rows, responses),
        "scores": number(rows),
        "encoder_states": number(rows, queries, 5),
    }
    return Rollout(**(fields | changes))


def scores(count, start=0):
    numbers = np.arange(start, start + count, dtype=np.float32)
    return Scores(numbers, numbers + 0.5, numbers / 100, numbers % 2 == 0, {"term": -numbers})


# ---- padding -----------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right():
    ids, mask = pad_rows([[71, 8, 1], [5]], pad_id=9)

    assert ids.tolist() == [[71, 8, 1], [5, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=6))
def test_padding_is_undone_by_the_mask(rows):
    ids, mask = pad_rows(rows, pad_id=0)

    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == rows
    assert mask.any(dim=0).all(), "no wider than the longest"


def test_no_rows_make_an_empty_batch():
    ids, mask = pad_rows([], pad_id=0)

    assert ids.shape == mask.shape == (0, 0)


def test_rows_may_be_arrays():
    ids, _ = pad_rows([np.array([1, 2], dtype=np.int32), (3,)], pad_id=0)

    assert ids.tolist() == [[1, 2], [3, 0]]


# ---- prompts -----------------------------------------------------------------------------------


def test_chosen_prompts_keep_their_order_and_their_columns(make_prompts):
    batch = make_prompts(5)

    chosen = batch.select([4, 0, 4])

    assert chosen.ids == [batch.ids[i] for i in (4, 0, 4)]
    assert chosen.texts == [batch.texts[i] for i in (4, 0, 4)]
    assert chosen.columns == {"summary": ["summary 4", "summary 0", "summary 4"]}
    for row, source in enumerate((4, 0, 4)):
        kept = chosen.query_ids[row][chosen.query_mask[row]]
        assert torch.equal(kept, batch.query_ids[source][batch.query_mask[source]])
    assert chosen.query_mask.any(dim=0).all(), "no wider than the longest"
    assert len(chosen) == 3


def test_prompts_of_another_number_than_their_ids_are_refused():
    with pytest.raises(
        ValueError, match=r"query_ids has shape \(2, 3\).* for 1 ids; expected \[1, Q\]"
    ):
        PromptBatch(["a"], ["a"], torch.zeros(2, 3), torch.zeros(2, 3), {})
    with pytest.raises(ValueError, match=r"query_mask \(1, 2\) for 1 ids"):
        PromptBatch(["a"], ["a"], torch.zeros(1, 3), torch.zeros(1, 2), {})


# ---- rollouts ----------------------------------------------------------------------------------


def test_a_rollout_that_fits_is_made():
    assert len(rollout()) == 2


@pytest.mark.parametrize("name", ["response_mask", "logprobs", "ref_logprobs", "values"])
def test_a_per_token_field_of_another_shape_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"Rollout\.{name} has shape \(2, 5\).*every per-token field is \[B, R\]"
    ):
        rollout(**{name: torch.ones(2, 5, dtype=torch.bool)})


def test_scores_of_another_shape_are_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"shape \(2, 1\), expected \(2,\): one score per response"
    ):
        rollout(scores=torch.zeros(2, 1))


def test_a_response_without_a_token_is_refused():
    mask = tensor([[True, False, False, False], [False, False, False, False]])

    with pytest.raises(ValueError, match="empty row; every response has a token"):
        rollout(response_mask=mask)


def test_chosen_rows_of_a_rollout_are_cut_to_the_longest_of_them():
    whole = rollout(
        rows=3,
        query_mask=tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool(),
        response_mask=tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
    )

    part = whole.select(tensor([2, 1]))

    assert part.query_ids.tolist() == whole.query_ids[[2, 1], :2].tolist()
    assert part.query_mask.tolist() == [[True, True], [True, False]]
    assert part.encoder_states.tolist() == whole.encoder_states[[2, 1], :2].tolist()
    assert part.scores.tolist() == whole.scores[[2, 1]].tolist()
    for name in ("response_ids", "response_mask", "logprobs", "ref_logprobs", "values"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[2, 1], :2])


def test_choosing_every_row_of_a_rollout_changes_nothing():
    whole = rollout(encoder_states=None)

    same = whole.select(torch.arange(2))

    assert same.encoder_states is None
    for field in dataclasses.fields(whole):
        if field.name != "encoder_states":
            assert torch.equal(getattr(same, field.name), getattr(whole, field.name))


def test_targets_are_cut_like_their_rollout():
    targets = Targets(*(torch.arange(8.0).view(2, 4) + 10 * n for n in range(4)))

    part = targets.select(tensor([1]), responses=2)

    assert part.kl.tolist() == [[4.0, 5.0]]
    assert part.returns.tolist() == [[34.0, 35.0]]


# ---- scores ------------------------------------------------------------------------------------


def test_scores_join_in_the_order_given():
    joined = Scores.concatenate([scores(2), scores(3, start=7)])

    for name in ("rewards", "logits", "toxicity", "truncated"):
        parts = [getattr(scores(2), name), getattr(scores(3, start=7), name)]
        assert getattr(joined, name).tolist() == np.concatenate(parts).tolist()
    assert joined.terms["term"].tolist() == [0, -1, -7, -8, -9]


@given(st.permutations(range(5)))
def test_scores_put_in_another_order_and_back_are_the_same(order):
    whole = scores(5)

    back = whole.select(order).select(np.argsort(order))

    for name in ("rewards", "logits", "toxicity", "truncated"):
        assert getattr(back, name).tolist() == getattr(whole, name).tolist()
    assert back.terms["term"].tolist() == whole.terms["term"].tolist()


@pytest.mark.parametrize("record", [PromptBatch, Rollout, Targets, Scores, Generation])
def test_a_record_is_complete_when_made_and_stays_so(record):
    assert record.__dataclass_params__.frozen
    for field in dataclasses.fields(record):
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
