"""Collecting: every answer keeps its prompt, its numbers and its score, however it was chunked."""

import zlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ray_detox import draws
from ray_detox.records import Scores
from ray_detox.rewards.reward import Ready
from ray_detox.rl.rollout import collect, decode

PER_TOKEN = ("response_ids", "response_mask", "logprobs", "ref_logprobs", "values")


def score_of(prompt, response):
    """A number that says which prompt and which response it was made from."""
    return zlib.crc32(f"{prompt}|{response}".encode()) / 2**32


class ByText:
    """Scores by text, at once; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def submit(self, prompt_texts, responses, response_ids, columns):
        self.asked.append((list(prompt_texts), list(responses), list(response_ids), columns))
        return Ready(self.scores(prompt_texts, responses))

    def scores(self, prompt_texts, responses):
        pairs = list(zip(prompt_texts, responses, strict=True))
        numbers = np.array([score_of(*pair) for pair in pairs], dtype=np.float32)
        lengths = np.array([len(response) for _, response in pairs], dtype=np.float32)
        return Scores(numbers, 2 * numbers, 1 - numbers, lengths > 20, {"length": lengths})


class Late(ByText):
    """Scores only once asked for the result, and gives out the last batch first."""

    def __init__(self):
        super().__init__()
        self.done = []

    def submit(self, prompt_texts, responses, response_ids, columns):
        number = len(self.asked)
        self.asked.append((list(prompt_texts), list(responses), list(response_ids), columns))
        late = self

        class Pending:
            def result(self):
                late.done.append((number, len(late.asked)))
                return late.scores(prompt_texts, responses)

        return Pending()


def run(policy, tokenizer, batch, scorer=None, chunk_size=4, step=0):
    return collect(
        policy, tokenizer, scorer or ByText(), batch, seed=0, step=step, chunk_size=chunk_size
    )


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy({"max_new_tokens": "3..12"})


def test_the_prompts_keep_their_order(policy, tokenizer, make_prompts):
    batch = make_prompts(11)

    rollout = run(policy, tokenizer, batch).rollout

    assert torch.equal(rollout.query_ids, batch.query_ids)
    assert torch.equal(rollout.query_mask, batch.query_mask)


def test_every_score_belongs_to_its_prompt_and_response(policy, tokenizer, make_prompts):
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


def test_the_texts_are_those_of_the_tokens(policy, tokenizer, make_prompts):
    collected = run(policy, tokenizer, make_prompts(11))
    rollout = collected.rollout

    rows = [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    assert collected.responses == decode(tokenizer, rows)
    assert not any("</s>" in text or "<pad>" in text for text in collected.responses)


def test_the_scorer_gets_texts_tokens_and_columns_of_the_same_rows(policy, tokenizer, make_prompts):
    batch, scorer = make_prompts(7), ByText()
    column = dict(zip(batch.texts, batch.columns["summary"], strict=True))

    run(policy, tokenizer, batch, scorer, chunk_size=3)

    assert [len(texts) for texts, *_ in scorer.asked] == [3, 3, 1]
    for texts, responses, ids, columns in scorer.asked:
        assert columns == {"summary": [column[text] for text in texts]}
        assert responses == decode(tokenizer, ids)
        assert all(0 not in row for row in ids), "padding is no token of a response"


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


def test_a_rollout_is_what_the_policy_says_when_called_directly(policy, tokenizer, make_prompts):
    batch = make_prompts(6)
    budgets, uniforms = draws.sampling_noise(batch.ids, policy.sampling, seed=0, step=3)
    pair = (batch.query_ids, batch.query_mask)
    sample = policy.sample(*pair, torch.from_numpy(budgets), torch.from_numpy(uniforms).float())
    direct = {
        "response_ids": sample.response_ids,
        "response_mask": sample.response_mask,
        "logprobs": sample.logprobs,
        "values": sample.values,
        "ref_logprobs": policy.ref_logprobs(*pair, sample.response_ids, sample.response_mask),
    }

    rollout = run(policy, tokenizer, batch, chunk_size=6, step=3).rollout

    for name in PER_TOKEN:
        expected = direct[name]
        if expected.is_floating_point():
            assert_close(getattr(rollout, name), expected, atol=2e-5, rtol=1e-4)
        else:
            assert torch.equal(getattr(rollout, name), expected)


def test_kept_encoder_states_are_those_of_their_prompts(make_policy, tokenizer, make_prompts):
    frozen, batch = make_policy(policy={"frozen_encoder": True}), make_prompts(7)

    rollout = run(frozen, tokenizer, batch, chunk_size=3).rollout

    expected = frozen.encode(batch.query_ids, batch.query_mask)
    mask = batch.query_mask
    assert_close(rollout.encoder_states[mask], expected[mask], atol=2e-5, rtol=1e-4)


def test_another_step_draws_other_answers_and_the_same_step_the_same(
    policy, tokenizer, make_prompts
):
    batch = make_prompts(6)

    first, again, other = (run(policy, tokenizer, batch, step=step) for step in (0, 0, 1))

    assert again.responses == first.responses
    assert other.responses != first.responses


def test_all_is_sampled_before_the_first_score_is_waited_for(policy, tokenizer, make_prompts):
    batch, late = make_prompts(9), Late()

    collected = run(policy, tokenizer, batch, late, chunk_size=2)

    assert late.done == [(number, 5) for number in range(5)], "five chunks asked, then the waits"
    assert (
        collected.rollout.scores.tolist() == run(policy, tokenizer, batch).rollout.scores.tolist()
    )


def test_the_seconds_name_what_was_done(policy, tokenizer, make_prompts):
    seconds = run(policy, tokenizer, make_prompts(3)).seconds

    assert seconds.keys() == {"sample", "reference", "score"}
    assert all(value >= 0 for value in seconds.values())
