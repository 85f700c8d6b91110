"""Records reject shapes that do not fit, and selecting rows keeps exactly those rows."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from ray_detox.data.shards import pad_rows
from ray_detox.records import (
    Generation,
    LeftOutRow,
    PreparedRow,
    PromptBatch,
    Rollout,
    Scores,
    Targets,
    TokenBatch,
)


def number(*shape):
    """A tensor whose entries all differ."""
    return torch.arange(1.0, 1 + np.prod(shape)).view(*shape)


def token_batch(rows=2, queries=3, responses=4, **changes):
    fields = {
        "query_ids": number(rows, queries).long(),
        "query_mask": torch.ones(rows, queries, dtype=torch.bool),
        "response_ids": number(rows, responses).long(),
        "response_mask": torch.ones(rows, responses, dtype=torch.bool),
        "encoder_states": number(rows, queries, 5),
        "limits": None,
    }
    return TokenBatch(**(fields | changes))


def rollout(tokens=None, **changes):
    tokens = tokens or token_batch()
    rows, responses = tokens.response_ids.shape
    fields = {
        "logprobs": -number(rows, responses),
        "ref_logprobs": -2 * number(rows, responses),
        "values": 3 * number(rows, responses),
        "scores": number(rows),
    }
    return Rollout(tokens=tokens, **(fields | changes))


def scores(count, start=0):
    numbers = np.arange(start, start + count, dtype=np.float32)
    return Scores(numbers, numbers + 0.5, numbers / 100, numbers % 2 == 0, {"term": -numbers})


# ---- padding -----------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right():
    ids, mask = pad_rows([[71, 8, 1], [5]], pad_id=9)

    assert ids.tolist() == [[71, 8, 1], [5, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=6))
def test_the_mask_recovers_the_unpadded_rows(rows):
    ids, mask = pad_rows(rows, pad_id=0)

    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == rows
    assert mask.any(dim=0).all(), "no wider than the longest"


def test_padding_no_rows_gives_empty_tensors():
    ids, mask = pad_rows([], pad_id=0)

    assert ids.shape == mask.shape == (0, 0)


def test_rows_may_be_arrays_or_tuples():
    ids, _ = pad_rows([np.array([1, 2], dtype=np.int32), (3,)], pad_id=0)

    assert ids.tolist() == [[1, 2], [3, 0]]


# ---- prompts -----------------------------------------------------------------------------------


def test_selected_prompts_keep_their_order_and_their_columns(make_prompts):
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


def test_prompts_and_ids_of_different_numbers_are_rejected():
    with pytest.raises(
        ValueError, match=r"query_ids has shape \(2, 3\).* for 1 ids; expected \[1, Q\]"
    ):
        PromptBatch(["a"], ["a"], torch.zeros(2, 3), torch.zeros(2, 3), {}, [0])
    with pytest.raises(ValueError, match=r"query_mask \(1, 2\) for 1 ids"):
        PromptBatch(["a"], ["a"], torch.zeros(1, 3), torch.zeros(1, 2), {}, [0])


# ---- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "letter"), [("query_mask", "Q"), ("response_mask", "R")], ids=["query", "response"]
)
def test_a_mask_of_another_shape_than_its_ids_is_rejected(name, letter):
    with pytest.raises(
        ValueError, match=rf"TokenBatch\.{name} has shape \(2, 5\) and .*expected \[2, {letter}\]"
    ):
        token_batch(**{name: torch.ones(2, 5, dtype=torch.bool)})


def test_prompts_of_another_number_than_the_responses_are_rejected():
    with pytest.raises(ValueError, match=r"query_ids has shape \(3, 3\); expected \[2, Q\]"):
        token_batch(
            query_ids=torch.ones(3, 3, dtype=torch.long),
            query_mask=torch.ones(3, 3, dtype=torch.bool),
        )


def test_encoder_states_of_another_shape_than_the_prompts_are_rejected():
    with pytest.raises(
        ValueError, match=r"encoder_states has shape \(2, 4, 5\); expected \[2, 3, D\]"
    ):
        token_batch(encoder_states=torch.zeros(2, 4, 5))


def test_a_response_without_a_token_is_rejected():
    mask = tensor([[True, False, False, False], [False, False, False, False]])

    with pytest.raises(ValueError, match="empty row; every response has a token"):
        token_batch(response_mask=mask)


def test_selected_tokens_are_cut_to_the_longest_prompt_and_response():
    whole = token_batch(
        rows=3,
        query_mask=tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool(),
        response_mask=tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).bool(),
    )

    part = whole.select(tensor([2, 1]))

    assert len(whole) == 3
    assert len(part) == 2
    for name in ("query_ids", "query_mask", "encoder_states"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[2, 1], :2])
    for name in ("response_ids", "response_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[2, 1], :3])


# ---- rollouts ----------------------------------------------------------------------------------


def test_a_rollout_of_fitting_shapes_is_accepted():
    assert len(rollout()) == 2


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values"])
def test_a_per_token_field_of_another_shape_is_rejected(name):
    with pytest.raises(
        ValueError, match=rf"Rollout\.{name} has shape \(2, 5\).*every per-token field is \[B, R\]"
    ):
        rollout(**{name: torch.ones(2, 5)})


def test_scores_of_another_shape_are_rejected_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"shape \(2, 1\), expected \(2,\): one score per response\. Sum or index"
    ):
        rollout(scores=torch.zeros(2, 1))


def test_selected_rows_of_a_rollout_are_cut_to_the_longest_of_them():
    whole = rollout(
        token_batch(
            rows=3,
            query_mask=tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool(),
            response_mask=tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
        )
    )

    part = whole.select(tensor([2, 1]))

    assert part.query_ids.tolist() == whole.query_ids[[2, 1], :2].tolist()
    assert part.query_mask.tolist() == [[True, True], [True, False]]
    assert part.encoder_states.tolist() == whole.encoder_states[[2, 1], :2].tolist()
    assert part.scores.tolist() == whole.scores[[2, 1]].tolist()
    for name in ("response_ids", "response_mask", "logprobs", "ref_logprobs", "values"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[2, 1], :2])


def test_selecting_every_row_of_a_rollout_changes_nothing():
    whole = rollout(token_batch(encoder_states=None))

    same = whole.select(torch.arange(2))

    assert same.encoder_states is None
    names = [field.name for field in dataclasses.fields(whole) if field.name != "tokens"]
    names += ["query_ids", "query_mask", "response_ids", "response_mask"]
    for name in names:
        assert torch.equal(getattr(same, name), getattr(whole, name))


def test_selected_targets_are_cut_to_the_given_length():
    targets = Targets(*(torch.arange(8.0).view(2, 4) + 10 * n for n in range(4)))

    part = targets.select(tensor([1]), responses=2)

    assert part.kl.tolist() == [[4.0, 5.0]]
    assert part.returns.tolist() == [[34.0, 35.0]]


# ---- scores ------------------------------------------------------------------------------------


def test_scores_are_concatenated_in_the_given_order():
    joined = Scores.concatenate([scores(2), scores(3, start=7)])

    for name in ("rewards", "logits", "toxicity", "truncated"):
        parts = [getattr(scores(2), name), getattr(scores(3, start=7), name)]
        assert getattr(joined, name).tolist() == np.concatenate(parts).tolist()
    assert joined.terms["term"].tolist() == [0, -1, -7, -8, -9]


@given(st.permutations(range(5)))
def test_reordering_scores_and_back_changes_nothing(order):
    whole = scores(5)

    back = whole.select(order).select(np.argsort(order))

    for name in ("rewards", "logits", "toxicity", "truncated"):
        assert getattr(back, name).tolist() == getattr(whole, name).tolist()
    assert back.terms["term"].tolist() == whole.terms["term"].tolist()


@pytest.mark.parametrize(
    "record",
    [
        PreparedRow,
        LeftOutRow,
        PromptBatch,
        TokenBatch,
        Rollout,
        Targets,
        Scores,
        Generation,
    ],
)
def test_a_record_is_frozen_and_has_no_default_values(record):
    assert record.__dataclass_params__.frozen
    for field in dataclasses.fields(record):
        assert field.default is dataclasses.MISSING
        assert field.default_factory is dataclasses.MISSING
