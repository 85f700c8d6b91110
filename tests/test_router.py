"""The rules of routing, with actors that do as they are told: what is sent where, and when again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_detox.config import RewardConfig, ServingConfig
from ray_detox.records import RewardError, ScoreRequest, Scores
from ray_detox.rewards.router import COOL_S, IN_FLIGHT, PONG_S, ActorInfo, Batch, Router

REWARD = RewardConfig(batch_size=2)
CONFIG = ServingConfig(timeout_s=100.0, heartbeat_timeout_s=10.0)


class World:
    """A router, its clock, and the calls that it has made and nobody has answered."""

    def __init__(self, actors, config=CONFIG):
        self.now = 0.0
        self.config = config
        self.calls = []
        self.pings = []
        self.router = Router(config, self.calls.append, self.pings.append, lambda: self.now)
        self.list(actors)

    def list(self, actors, **down):
        names = [f"actor {i}" for i in range(actors)]
        self.router.refresh([ActorInfo(n, "node a", None, down.get(n[-1])) for n in names])

    def submit(self, *responses):
        n = len(responses)
        request = ScoreRequest(["p"] * n, responses, [[1]] * n, {"at": list(range(n))})
        batch = Batch(REWARD, self.config, request)
        self.router.submit(batch)
        return batch

    def answer(self, call, load=0):
        """Score a chunk: each text by its length."""
        self.calls.remove(call)
        lengths = np.array([len(text) for text in call.chunk.request.responses], dtype=np.float32)
        cut = np.zeros(len(lengths), dtype=bool)
        self.router.scored(call, Scores(lengths, lengths, lengths, cut, {}), load)

    def lose(self, call):
        self.calls.remove(call)
        self.router.lost(call, "it died")

    def pass_time(self, seconds):
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.router.tick()

    def held_by(self, name):
        return [call for call in self.calls if call.actor.name == name]


def texts_of(calls):
    return sorted(text for call in calls for text in call.chunk.request.responses)


def test_a_batch_is_cut_by_length_and_its_scores_come_back_in_its_order():
    world = World(1)

    batch = world.submit("ccc", "a", "dddd", "bb", "")
    cut = [call.chunk.arguments for call in world.calls]
    while world.calls:
        world.answer(world.calls[-1])

    assert cut[0] == (["p", "p"], ["", "a"], [[1], [1]], {"at": [4, 1]})
    assert cut[1][1] == ["bb", "ccc"]
    assert batch.result().rewards.tolist() == [3, 1, 4, 2, 0]


def test_no_actor_has_more_than_two_chunks_of_a_worker_and_the_rest_waits_with_it():
    world = World(2)

    world.submit(*"abcdefghijkl")

    assert [len(world.held_by(f"actor {i}")) for i in range(2)] == [IN_FLIGHT, IN_FLIGHT]
    assert world.router.waiting == 4
    world.answer(world.calls[0])
    assert len(world.calls) == 2 * IN_FLIGHT
    assert world.router.waiting == 2


def test_chunks_go_where_least_is_to_do_for_everybody():
    world = World(2)
    world.submit(*"abcd")
    busy, idle = world.calls[0], world.calls[1]
    world.answer(busy, load=50)
    world.answer(idle, load=0)

    world.submit(*"abcd")
    after_it_was_told = [call.actor for call in world.calls]
    for call in list(world.calls):
        world.answer(call)
    world.list(2)
    world.submit(*"abcd")

    assert after_it_was_told == [idle.actor] * 2
    assert {call.actor for call in world.calls} == {busy.actor, idle.actor}


def test_a_chunk_of_an_actor_that_died_goes_to_another_and_that_one_gets_a_pause():
    world = World(2)
    batch = world.submit("a")
    first = world.calls[0]

    world.lose(first)
    second = world.calls[0]
    world.submit("b")

    assert second.actor is not first.actor
    assert world.router.resent == 1
    assert world.router.doubts
    assert {call.actor for call in world.calls} == {second.actor}
    world.pass_time(COOL_S)
    world.submit("c")
    assert first.actor in {call.actor for call in world.calls}
    world.answer(second)
    assert batch.result().rewards.tolist() == [1]


def test_the_only_actor_gets_its_chunk_again_after_the_pause():
    world = World(1)
    world.submit("a")

    world.lose(world.calls[0])

    assert not world.calls
    world.pass_time(COOL_S)
    assert len(world.calls) == 1


def test_an_actor_that_is_down_or_let_go_gets_nothing():
    world = World(3)
    world.list(2, **{"0": "died"})

    world.submit(*"abcdefgh")

    assert {call.actor.name for call in world.calls} == {"actor 1"}


def test_what_an_actor_holds_is_sent_to_another_once_the_pool_says_that_it_is_down():
    world = World(2)
    batch = world.submit("a")
    first = world.calls[0]

    world.list(2, **{first.actor.name[-1]: "died"})
    world.answer(world.calls[1])

    assert batch.result().rewards.tolist() == [1]
    assert world.router.resent == 1


def test_chunks_at_an_actor_that_was_let_go_are_still_answered():
    world = World(1)
    batch = world.submit("a")

    world.list(0)
    world.pass_time(1)
    world.answer(world.calls[0])

    assert batch.result().rewards.tolist() == [1]


def test_a_busy_actor_is_asked_for_a_sign_of_life_and_keeps_its_chunk():
    world = World(2)
    world.submit("a")
    actor = world.calls[0].actor

    for _ in range(3):
        world.pass_time(CONFIG.heartbeat_timeout_s + 1)
        assert world.pings.pop() is actor
        world.router.ponged(actor, held=1, standstill_s=0.1)

    assert len(world.calls) == 1
    assert world.router.resent == 0


@pytest.mark.parametrize("sign", ["none", "standstill", "failed"])
def test_what_a_silent_actor_holds_is_sent_to_another_and_the_first_answer_counts(sign):
    world = World(2)
    batch = world.submit("a", "bb", "ccc")
    silent, other = world.calls
    world.answer(other)

    world.pass_time(CONFIG.heartbeat_timeout_s + 1)
    if sign == "none":
        world.pass_time(PONG_S + 1)
    elif sign == "standstill":
        world.router.ponged(silent.actor, held=1, standstill_s=11.0)
    else:
        world.router.ping_failed(silent.actor, "out of reach")

    again = world.calls[-1]
    assert again.chunk is silent.chunk
    assert again.actor is other.actor
    world.submit(*"de")
    assert len(world.held_by(silent.actor.name)) == 1, "it gets nothing new"
    world.answer(again)
    assert batch.result().rewards.tolist() == [1, 2, 3]
    world.answer(silent)
    assert batch.result().rewards.tolist() == [1, 2, 3]
    assert world.router.resent == 1


def test_a_silent_actor_that_speaks_again_is_used_again():
    world = World(1)
    batch = world.submit("a")
    world.pass_time(CONFIG.heartbeat_timeout_s + PONG_S + 2)
    assert world.router.waiting == 1

    world.answer(world.calls[0])
    world.submit("b")

    assert batch.result().rewards.tolist() == [1]
    assert len(world.calls) == 1
    assert world.router.waiting == 0


def test_an_actor_that_fell_silent_and_then_died_is_used_again_after_the_pause():
    world = World(1)
    world.submit("a")
    world.pass_time(CONFIG.heartbeat_timeout_s + PONG_S + 2)

    world.lose(world.calls[0])
    world.router.ping_failed(world.pings[0], "it died")
    world.pass_time(COOL_S)

    assert len(world.calls) == 1
    assert world.router.resent == 1


def test_what_the_scoring_raises_reaches_the_caller_and_is_not_tried_again():
    world = World(2)
    batch = world.submit(*"abcdefghijkl")

    world.router.failed(world.calls.pop(0), ValueError("no number"))

    with pytest.raises(ValueError, match="no number"):
        batch.result()
    assert world.router.waiting == 0
    assert world.router.resent == 0
    for call in list(world.calls):
        world.answer(call)
    assert not world.calls


def give_up(world, batch):
    batch.due_s = world.now + 5
    world.pass_time(6)
    with pytest.raises(RewardError) as caught:
        batch.scores.result(timeout=0)
    return str(caught.value)


def test_the_deadlines_sentence_names_the_actor_its_node_and_the_last_of_it():
    world = World(1, CONFIG.replace(timeout_s=5.0))
    batch = world.submit(*"abc")
    world.answer(world.calls[0])

    sentence = give_up(world, batch)

    assert sentence == (
        "No scores for 1 of 3 texts within 5 s (serving.timeout_s): "
        "actor 0 on node a gave scores (5.5 s ago). "
        "Add actors (reward.actors), or raise the deadline."
    )
    assert not world.router.busy


def test_the_deadlines_sentence_says_why_no_actor_had_the_texts():
    world = World(2)
    world.list(2, **{"0": "has not come up yet", "1": "died"})

    sentence = give_up(world, world.submit("a"))

    assert "actor 0 on node a has not come up yet; actor 1 on node a died." in sentence


def test_the_deadlines_sentence_says_that_there_is_no_list():
    world = World(0)

    sentence = give_up(world, world.submit("a"))

    assert "the list of reward actors could not be read" in sentence


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_text_is_scored_once_whatever_befalls_the_actors(data):
    actors = data.draw(st.integers(1, 4))
    world = World(actors)
    texts = data.draw(st.lists(st.text("ab", max_size=6), min_size=1, max_size=20))
    batch = world.submit(*texts)

    for _ in range(60):
        if batch.scores.done():
            break
        happening = data.draw(st.sampled_from(["answer", "lose", "silence", "list"]))
        if happening == "silence":
            world.pass_time(CONFIG.heartbeat_timeout_s + PONG_S + 2)
        elif happening == "list":
            world.list(data.draw(st.integers(0, actors)))
        elif world.calls:
            call = data.draw(st.sampled_from(world.calls))
            world.answer(call) if happening == "answer" else world.lose(call)
    world.list(actors)
    for _ in range(100):
        world.pass_time(COOL_S)
        for call in list(world.calls):
            world.answer(call)

    assert batch.result().rewards.tolist() == [len(text) for text in texts]
    assert world.router.waiting == 0
    assert not any(world.held_by(f"actor {i}") for i in range(actors))
