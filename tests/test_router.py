"""The router's rules with scripted actors and a clock of the test: dispatch, failures, timeouts."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_detox.config import RewardConfig, ServingConfig
from ray_detox.records import RewardError, ScoreRequest, Scores
from ray_detox.rewards.messages import ActorInfo
from ray_detox.rewards.router import COOL_DOWN_S, IN_FLIGHT, PING_TIMEOUT_S, Batch, Router

REWARD = RewardConfig(batch_size=2)
CONFIG = ServingConfig(timeout_s=100.0, heartbeat_timeout_s=10.0)


class Service:
    """A router, its clock, and its open calls to actors that exist only in name."""

    def __init__(self, actors, config=CONFIG):
        self.now = 0.0
        self.config = config
        self.calls = []
        self.pings = []
        self.router = Router(config, self.calls.append, self.pings.append, lambda: self.now)
        self.publish(actors)

    def publish(self, actors, starts=0, **down):
        names = [f"actor {i}" for i in range(actors)]
        self.router.update_actors(
            [
                ActorInfo(name, "node a", None, starts + i, down.get(name[-1]))
                for i, name in enumerate(names)
            ]
        )

    def submit(self, *responses):
        n = len(responses)
        request = ScoreRequest(["p"] * n, responses, [[1]] * n, {"at": list(range(n))})
        batch = Batch(REWARD, self.config, request)
        self.router.submit(batch)
        return batch

    def answer(self, call, held=0):
        """Score a chunk: each text by its length."""
        self.calls.remove(call)
        lengths = np.array([len(text) for text in call.chunk.request.responses], dtype=np.float32)
        cut = np.zeros(len(lengths), dtype=bool)
        self.router.on_scores(call, Scores(lengths, lengths, lengths, cut, {}), held)

    def lose(self, call):
        self.calls.remove(call)
        self.router.on_call_lost(call, "it died")

    def pass_time(self, seconds):
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.router.tick()

    def held_by(self, name):
        return [call for call in self.calls if call.actor.name == name]


def test_chunks_group_texts_by_length_and_scores_keep_the_order_of_the_batch():
    service = Service(1)

    batch = service.submit("ccc", "a", "dddd", "bb", "")
    first, second = [call.chunk.request for call in service.calls]
    while service.calls:
        service.answer(service.calls[-1])

    assert first == ScoreRequest(["p", "p"], ["", "a"], [[1], [1]], {"at": [4, 1]})
    assert second.responses == ["bb", "ccc"]
    assert batch.result().rewards.tolist() == [3, 1, 4, 2, 0]


def test_an_actor_gets_at_most_two_chunks_of_a_worker_and_the_rest_waits_at_the_worker():
    service = Service(2)

    service.submit(*"abcdefghijkl")

    assert [len(service.held_by(f"actor {i}")) for i in range(2)] == [IN_FLIGHT, IN_FLIGHT]
    assert service.router.waiting == 4
    service.answer(service.calls[0])
    assert len(service.calls) == 2 * IN_FLIGHT
    assert service.router.waiting == 2


def test_chunks_go_to_the_actor_with_the_least_load_of_all_workers():
    service = Service(2)
    service.submit(*"abcd")
    busy, idle = service.calls[0], service.calls[1]
    service.answer(busy, held=50)
    service.answer(idle, held=0)

    service.submit(*"abcd")
    while_the_load_is_known = [call.actor for call in service.calls]
    for call in list(service.calls):
        service.answer(call)
    service.publish(2)
    service.submit(*"abcd")

    assert while_the_load_is_known == [idle.actor] * 2
    assert {call.actor for call in service.calls} == {busy.actor, idle.actor}


def test_deaths_in_a_row_are_those_that_one_chunk_has_met_since_the_last_scores():
    service = Service(1)
    batch = service.submit("a", "b", "cc", "dd")
    first, other = batch.chunks
    seen = [service.router.deaths]
    for start in (1, 2, 3):
        service.lose(other.calls[0])
        service.lose(first.calls[0])
        seen.append(service.router.deaths)
        service.publish(1, starts=start)  # the actor comes back
        service.pass_time(COOL_DOWN_S)

    service.answer(other.calls[0])
    seen.append(service.router.deaths)
    service.lose(first.calls[0])
    seen.append(service.router.deaths)
    batch.fail(RewardError("its caller has gone"))
    seen.append(service.router.deaths)

    assert seen == [0, 1, 2, 3, 0, 1, 0]


def test_actors_that_a_lost_node_takes_along_and_calls_out_of_reach_are_one_death():
    service = Service(4)
    (chunk,) = service.submit("a").chunks
    for _ in range(4):  # sent to each of four actors before it is known that their node is gone
        service.lose(chunk.calls[0])
    for _ in range(3):  # tried again, and not back yet
        service.pass_time(COOL_DOWN_S)
        service.lose(chunk.calls[0])

    assert service.router.deaths == 1


def test_a_timeout_after_deaths_in_a_row_advises_to_look_for_a_crash():
    service = Service(1)
    batch = service.submit("a")
    for start in (1, 2):
        service.lose(service.calls[0])
        service.publish(1, starts=start)
        service.pass_time(COOL_DOWN_S)

    message = timeout_message(service, batch)

    assert "Actors died 2 times in a row while they scored the same texts. Test the fun" in message
    assert "raise serving.timeout_s" not in message


def test_a_lost_chunk_is_redispatched_to_another_actor_and_the_failed_actor_cools_down():
    service = Service(2)
    batch = service.submit("a")
    first = service.calls[0]

    service.lose(first)
    second = service.calls[0]
    service.submit("b")

    assert second.actor is not first.actor
    assert service.router.resent == 1
    assert service.router.membership_stale
    assert {call.actor for call in service.calls} == {second.actor}
    service.pass_time(COOL_DOWN_S)
    service.submit("c")
    assert first.actor in {call.actor for call in service.calls}
    service.answer(second)
    assert batch.result().rewards.tolist() == [1]


def test_the_only_actor_gets_its_lost_chunk_again_after_the_cool_down():
    service = Service(1)
    service.submit("a")

    service.lose(service.calls[0])

    assert not service.calls
    service.pass_time(COOL_DOWN_S)
    assert len(service.calls) == 1


def test_an_actor_that_is_down_or_gone_gets_no_chunks():
    service = Service(3)
    service.publish(2, **{"0": "died"})

    service.submit(*"abcdefgh")

    assert {call.actor.name for call in service.calls} == {"actor 1"}


def test_chunks_of_an_actor_are_redispatched_when_the_pool_lists_it_as_down():
    service = Service(2)
    batch = service.submit("a")
    first = service.calls[0]

    service.publish(2, **{first.actor.name[-1]: "died"})
    service.answer(service.calls[1])

    assert batch.result().rewards.tolist() == [1]
    assert service.router.resent == 1


def test_scores_from_an_actor_that_is_gone_still_count():
    service = Service(1)
    batch = service.submit("a")

    service.publish(0)
    service.pass_time(1)
    service.answer(service.calls[0])

    assert batch.result().rewards.tolist() == [1]


def test_a_busy_actor_that_answers_pings_keeps_its_chunk():
    service = Service(2)
    service.submit("a")
    actor = service.calls[0].actor

    for _ in range(3):
        service.pass_time(CONFIG.heartbeat_timeout_s + 1)
        assert service.pings.pop() is actor
        service.router.on_heartbeat(actor, held=1, stalled_s=0.1)

    assert len(service.calls) == 1
    assert service.router.resent == 0


@pytest.mark.parametrize("reply", ["none", "stalled", "failed"])
def test_chunks_of_a_suspected_actor_are_redispatched_and_the_first_scores_count(reply):
    service = Service(2)
    batch = service.submit("a", "bb", "ccc")
    silent, other = service.calls
    service.answer(other)

    service.pass_time(CONFIG.heartbeat_timeout_s + 1)
    if reply == "none":
        service.pass_time(PING_TIMEOUT_S + 1)
    elif reply == "stalled":
        service.router.on_heartbeat(silent.actor, held=1, stalled_s=11.0)
    else:
        service.router.on_ping_failed(silent.actor, "out of reach")

    again = service.calls[-1]
    assert again.chunk is silent.chunk
    assert again.actor is other.actor
    service.submit(*"de")
    assert len(service.held_by(silent.actor.name)) == 1, "a suspected actor gets no new chunks"
    service.answer(again)
    assert batch.result().rewards.tolist() == [1, 2, 3]
    service.answer(silent)
    assert batch.result().rewards.tolist() == [1, 2, 3]
    assert service.router.resent == 1


def test_a_suspected_actor_that_returns_scores_gets_chunks_again():
    service = Service(1)
    batch = service.submit("a")
    service.pass_time(CONFIG.heartbeat_timeout_s + PING_TIMEOUT_S + 2)
    assert service.router.waiting == 1

    service.answer(service.calls[0])
    service.submit("b")

    assert batch.result().rewards.tolist() == [1]
    assert len(service.calls) == 1
    assert service.router.waiting == 0


def test_a_suspected_actor_that_died_gets_chunks_again_after_the_cool_down():
    service = Service(1)
    service.submit("a")
    service.pass_time(CONFIG.heartbeat_timeout_s + PING_TIMEOUT_S + 2)

    service.lose(service.calls[0])
    service.router.on_ping_failed(service.pings[0], "it died")
    service.pass_time(COOL_DOWN_S)

    assert len(service.calls) == 1
    assert service.router.resent == 1


def test_an_error_of_the_reward_reaches_the_caller_and_is_not_retried():
    service = Service(2)
    batch = service.submit(*"abcdefghijkl")

    service.router.on_call_failed(service.calls.pop(0), ValueError("no number"))

    with pytest.raises(ValueError, match="no number"):
        batch.result()
    assert service.router.waiting == 0
    assert service.router.resent == 0
    for call in list(service.calls):
        service.answer(call)
    assert not service.calls


def timeout_message(service, batch):
    batch.deadline_s = service.now + 5
    service.pass_time(6)
    with pytest.raises(RewardError) as caught:
        batch.scores.result(timeout=0)
    return str(caught.value)


def test_a_timeout_names_the_actor_its_node_and_its_last_event():
    service = Service(1, CONFIG.replace(timeout_s=5.0))
    batch = service.submit(*"abc")
    service.answer(service.calls[0])

    message = timeout_message(service, batch)

    assert message == (
        "No scores for 1 of 3 texts within 5 s (serving.timeout_s): "
        "actor 0 on node a returned scores (5.5 s ago). "
        "Add actors (reward.actors) or raise serving.timeout_s."
    )
    assert not service.router.busy


def test_a_timeout_says_why_no_actor_has_room():
    service = Service(2)
    service.publish(2, **{"0": "has not come up yet", "1": "died"})

    message = timeout_message(service, service.submit("a"))

    assert "actor 0 on node a has not come up yet; actor 1 on node a died." in message


def test_a_timeout_says_that_no_list_of_actors_could_be_read():
    service = Service(0)

    message = timeout_message(service, service.submit("a"))

    assert "the worker could not read the list of reward actors" in message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_text_is_scored_once_whatever_happens_to_the_actors(data):
    actors = data.draw(st.integers(1, 4))
    service = Service(actors)
    texts = data.draw(st.lists(st.text("ab", max_size=6), min_size=1, max_size=20))
    batch = service.submit(*texts)

    for _ in range(60):
        if batch.scores.done():
            break
        event = data.draw(st.sampled_from(["answer", "lose", "silence", "publish"]))
        if event == "silence":
            service.pass_time(CONFIG.heartbeat_timeout_s + PING_TIMEOUT_S + 2)
        elif event == "publish":
            service.publish(data.draw(st.integers(0, actors)))
        elif service.calls:
            call = data.draw(st.sampled_from(service.calls))
            service.answer(call) if event == "answer" else service.lose(call)
    service.publish(actors)
    for _ in range(100):
        service.pass_time(COOL_DOWN_S)
        for call in list(service.calls):
            service.answer(call)

    assert batch.result().rewards.tolist() == [len(text) for text in texts]
    assert service.router.waiting == 0
    assert not any(service.held_by(f"actor {i}") for i in range(actors))


def test_the_directory_loads_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray.train', 'ray.data'): sys.modules[name] = None\n"
        "import ray_detox.rewards.messages, ray_detox.stages.rewards.directory\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr
