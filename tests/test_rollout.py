"""Collecting: each response keeps its prompt, metrics and score, for any chunk size."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ray_detox import draws
from ray_detox.records import Scores, TokenBatch
from ray_detox.rewards.reward import Ready
from ray_detox.rl.rollout import Collected, collect, decode, is_finished, recompute

PER_TOKEN = ("response_ids", "response_mask", "logprobs", "ref_logprobs", "values")


def score_of(prompt, response):
    """Return a number that identifies a prompt and its response."""
    return zlib.crc32(f"{prompt}|{response}".encode()) / 2**32


class ImmediateScorer:
    """Scores by text, at once; records its requests."""

    def __init__(self):
        self.requests = []

    def submit(self, request):
        self.requests.append(request)
        return Ready(self.scores(request))

    def scores(self, request):
        pairs = list(zip(request.prompts, request.responses, strict=True))
        numbers = np.array([score_of(*pair) for pair in pairs], dtype=np.float32)
        lengths = np.array([len(response) for _, response in pairs], dtype=np.float32)
        return Scores(numbers, 2 * numbers, 1 - numbers, lengths > 20, {"length": lengths})


class LazyScorer(ImmediateScorer):
    """Scores a request only when its result is read; records how many requests came before."""

    def __init__(self):
        super().__init__()
        self.done = []

    def submit(self, request):
        number = len(self.requests)
        self.requests.append(request)
        scorer = self

        class LazyScores:
            def result(self):
                scorer.done.append((number, len(scorer.requests)))
                return scorer.scores(request)

        return LazyScores()


def run(policy, tokenizer, batch, scorer=None, chunk_size=4, step=0):
    return collect(
        policy,
        tokenizer,
        scorer or ImmediateScorer(),
        batch,
        seed=0,
        step=step,
        chunk_size=chunk_size,
    )


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy({"max_new_tokens": "3..12"})


def test_the_prompts_keep_their_order(policy, tokenizer, make_prompts):
    batch = make_prompts(11)

    rollout = run(policy, tokenizer, batch).rollout

    assert torch.equal(rollout.query_ids, batch.query_ids)
    assert torch.equal(rollout.query_mask, batch.query_mask)


def test_each_score_belongs_to_its_prompt_and_response(policy, tokenizer, make_prompts):
    batch = make_prompts(11)

    collected = run(policy, tokenizer, batch)

    expected = [score_of(*pair) for pair in zip(batch.texts, collected.responses, strict=True)]
    assert len(set(expected)) == 11
    assert_close(collected.rollout.scores, torch.tensor(expected))
    assert_close(collected.scores.rewards, np.array(expected, dtype=np.float32))
    assert_close(collected.scores.logits, np.array(expected, dtype=np.float32) * 2)
    lengths = [len(response) for response in collected.responses]
    assert collected.scores.terms["length"].tolist() == lengths
    assert collected.scores.truncated.tolist() == [length > 20 for length in lengths]


def test_responses_are_the_decoded_tokens(policy, tokenizer, make_prompts):
    collected = run(policy, tokenizer, make_prompts(11))
    rollout = collected.rollout

    rows = [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    assert collected.responses == decode(tokenizer, rows)
    assert not any("</s>" in text or "<pad>" in text for text in collected.responses)


def test_a_request_has_texts_tokens_and_columns_of_the_same_rows(policy, tokenizer, make_prompts):
    batch, scorer = make_prompts(7), ImmediateScorer()
    column = dict(zip(batch.texts, batch.columns["summary"], strict=True))

    run(policy, tokenizer, batch, scorer, chunk_size=3)

    assert [len(request) for request in scorer.requests] == [3, 3, 1]
    for request in scorer.requests:
        assert request.columns == {"summary": [column[text] for text in request.prompts]}
        assert request.responses == decode(tokenizer, request.response_ids)
        assert all(0 not in row for row in request.response_ids), "token ids without padding"


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_chunk_size_changes_nothing(policy, tokenizer, make_prompts, chunk_size):
    batch = make_prompts(11)
    whole = run(policy, tokenizer, batch, chunk_size=11)

    parts = run(policy, tokenizer, batch, chunk_size=chunk_size)

    assert parts.responses == whole.responses
    assert torch.equal(parts.rollout.response_ids, whole.rollout.response_ids)
    assert torch.equal(parts.rollout.response_mask, whole.rollout.response_mask)
    assert torch.equal(parts.rollout.scores, whole.rollout.scores)
    for name in ("logprobs", "ref_logprobs", "values"):
        actual, expected = getattr(parts.rollout, name), getattr(whole.rollout, name)
        assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_a_rollout_equals_direct_calls_of_the_policy(policy, tokenizer, make_prompts):
    batch = make_prompts(6)
    max_new_tokens, noise = draws.sampling_noise(batch.ids, policy.sampling, seed=0, step=3)
    generation = policy.sample(
        batch.query_ids,
        batch.query_mask,
        torch.from_numpy(max_new_tokens),
        torch.from_numpy(noise).float(),
    )
    direct = {
        "response_ids": generation.tokens.response_ids,
        "response_mask": generation.tokens.response_mask,
        "logprobs": generation.logprobs,
        "values": generation.values,
        "ref_logprobs": policy.ref_logprobs(generation.tokens),
    }

    rollout = run(policy, tokenizer, batch, chunk_size=6, step=3).rollout

    for name in PER_TOKEN:
        expected = direct[name]
        if expected.is_floating_point():
            assert_close(getattr(rollout, name), expected, atol=2e-5, rtol=1e-4)
        else:
            assert torch.equal(getattr(rollout, name), expected)


def test_each_prompt_keeps_its_encoder_states(make_policy, tokenizer, make_prompts):
    frozen, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(7)

    rollout = run(frozen, tokenizer, batch, chunk_size=3).rollout

    expected = frozen.encode(batch.query_ids, batch.query_mask)
    mask = batch.query_mask
    assert_close(rollout.encoder_states[mask], expected[mask], atol=2e-5, rtol=1e-4)


def test_the_same_step_samples_the_same_responses_and_another_step_others(
    policy, tokenizer, make_prompts
):
    batch = make_prompts(6)

    first, again, other = (run(policy, tokenizer, batch, step=step) for step in (0, 0, 1))

    assert again.responses == first.responses
    assert other.responses != first.responses


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_the_copies_of_a_prompt_get_different_responses(
    policy, tokenizer, make_prompts, chunk_size
):
    one = make_prompts(8).select([5] * 6)
    batch = dataclasses.replace(one, occurrences=list(range(6)))

    collected = run(policy, tokenizer, batch, chunk_size=chunk_size)

    assert len(set(collected.responses)) > 3
    assert len(set(run(policy, tokenizer, one).responses)) == 1
    assert collected.responses == run(policy, tokenizer, batch, chunk_size=6).responses


def test_all_chunks_are_submitted_before_the_first_wait_for_scores(policy, tokenizer, make_prompts):
    batch, scorer = make_prompts(9), LazyScorer()

    collected = run(policy, tokenizer, batch, scorer, chunk_size=2)

    assert scorer.done == [(number, 5) for number in range(5)], "five requests, then the waits"
    assert (
        collected.rollout.scores.tolist() == run(policy, tokenizer, batch).rollout.scores.tolist()
    )


def test_a_response_is_finished_if_it_ended_before_its_limit(policy, tokenizer, make_prompts):
    batch = make_prompts(40)
    limits, _ = draws.sampling_noise(batch.ids, policy.sampling, seed=0, step=0)

    collected = run(policy, tokenizer, batch)

    rollout = collected.rollout
    lengths = rollout.response_mask.sum(dim=1)
    last = rollout.response_ids[torch.arange(40), lengths - 1]
    assert collected.finished.tolist() == (last == 1).tolist()
    assert 0 < collected.finished.sum() < 40
    assert (
        lengths[~torch.from_numpy(collected.finished)].numpy() == limits[~collected.finished]
    ).all()


def test_an_end_that_the_model_forces_at_the_limit_is_a_cut(policy, tokenizer, make_prompts):
    tokens = run(policy, tokenizer, make_prompts(40)).rollout.tokens
    lengths = tokens.response_mask.sum(dim=1)
    forced = tokens.response_ids.clone()
    forced[torch.arange(40), lengths - 1] = policy.eos_ids[0]
    limits = lengths + torch.arange(40) % 2

    finished = is_finished(
        dataclasses.replace(tokens, response_ids=forced, limits=limits), policy.eos_ids
    )

    assert finished.tolist() == [False, True] * 20


def test_an_unfinished_response_pays_its_penalty_in_the_rollout_only(
    policy, tokenizer, make_prompts
):
    batch = make_prompts(40)
    settings = {"seed": 0, "step": 0, "chunk_size": 8}

    free = collect(policy, tokenizer, ImmediateScorer(), batch, **settings)
    paid = collect(policy, tokenizer, ImmediateScorer(), batch, **settings, unfinished_penalty=1.5)

    difference = free.rollout.scores - paid.rollout.scores
    assert_close(difference, torch.from_numpy(1.5 * ~free.finished).float(), atol=1e-4, rtol=0.0)
    assert (paid.scores.rewards == free.scores.rewards).all()


def test_a_cut_response_earns_the_value_at_its_cut_in_place_of_its_score(
    make_policy, tokenizer, make_prompts
):
    policy = make_policy(critic="detached")
    torch.nn.init.normal_(policy.value_head.value.weight)
    batch = make_prompts(40)
    settings = {"seed": 0, "step": 0, "chunk_size": 8}

    scored = collect(policy, tokenizer, ImmediateScorer(), batch, **settings)
    found = collect(policy, tokenizer, ImmediateScorer(), batch, **settings, bootstrap_gamma=0.5)

    cut = ~torch.from_numpy(scored.finished)
    assert 0 < cut.sum() < 40
    assert_close(found.rollout.scores[~cut], scored.rollout.scores[~cut])
    # The value before the next token, had the limit been one token more.
    tokens = scored.rollout.tokens
    for row in cut.nonzero()[:, 0].tolist():
        n = int(tokens.response_mask[row].sum())
        ids = torch.cat([tokens.response_ids[row, :n], torch.tensor([policy.pad_id])])[None]
        one = TokenBatch(
            query_ids=tokens.query_ids[[row]],
            query_mask=tokens.query_mask[[row]],
            response_ids=ids,
            response_mask=torch.ones(1, n + 1, dtype=torch.bool),
            encoder_states=None,
            limits=None,
        )
        value = policy.score_tokens(one).values[0, n]
        assert_close(found.rollout.scores[row], 0.5 * value, atol=1e-4, rtol=1e-4)
    assert (found.scores.rewards == scored.scores.rewards).all()


def test_seconds_are_reported_per_part(policy, tokenizer, make_prompts):
    seconds = run(policy, tokenizer, make_prompts(3)).seconds

    assert seconds.keys() == {"sample", "reference", "score"}
    assert all(value >= 0 for value in seconds.values())


def test_recomputed_log_probabilities_are_those_of_the_update(make_policy, make_rollout):
    policy = make_policy()
    sampled = make_rollout(policy, 7)
    rounded = dataclasses.replace(
        sampled,
        logprobs=sampled.logprobs.bfloat16().float(),
        values=sampled.values.bfloat16().float(),
    )
    collected = Collected(rounded, scores=None, responses=[], finished=None, seconds={})

    again = recompute(policy, collected, rows_per_pass=3).rollout

    assert (rounded.logprobs - sampled.logprobs).abs().max() > 1e-3
    assert_close(again.logprobs, sampled.logprobs, atol=2e-5, rtol=1e-4)
    assert_close(again.values, sampled.values, atol=2e-5, rtol=1e-4)
    assert torch.equal(again.ref_logprobs, sampled.ref_logprobs)
