"""How many workers there is room for, on nodes that come and go; without Ray, by a clock of our own."""

import threading
from types import SimpleNamespace

import pytest

from ray_detox import resources
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.resources import Bundle, Node
from ray_detox.rewards.messages import PoolMetrics
from ray_detox.stages.cluster import elastic as workers
from ray_detox.stages.cluster import nodes as live

CONFIG = load_config(
    "lab",
    [
        "train.workers=2..4",
        "cluster.upscale_delay_s=10",
        "cluster.capacity_timeout_s=60",
        "train.steps=100",
    ],
)
NEED = resources.needs(CONFIG, cluster_gpus=0)


class Nodes:
    """Nodes with some CPUs free, and a clock that a pause moves on."""

    def __init__(self, monkeypatch, *free):
        self.free = list(free)
        self.now = 0.0
        self.shrunk = 0
        self.actors = 1
        monkeypatch.setattr(workers, "free_nodes", self.list)
        monkeypatch.setattr(workers.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(workers.time, "sleep", self.sleep)
        self.later = {}

    def list(self):
        return [Node("node", Bundle(8), Bundle(cpus)) for cpus in self.free]

    def sleep(self, seconds):
        self.now += seconds
        for when in [when for when in self.later if when <= self.now]:
            self.free = self.later.pop(when)

    def shrink(self):
        self.shrunk += 1

    def metrics(self):
        return PoolMetrics(
            actors=self.actors, wanted=1, waiting=0, in_flight=0, resent=0, restarts=0, lost=0
        )


def room(nodes, stop=None, hoped=2):
    return workers.wait_for_workers(CONFIG, NEED, nodes, hoped, stop or threading.Event())


def test_all_that_may_be_start_at_once_where_they_fit(monkeypatch):
    nodes = Nodes(monkeypatch, 3, 3)

    assert room(nodes) == 4
    assert nodes.now == 0


def test_what_an_earlier_group_held_is_given_time_to_be_free(monkeypatch):
    nodes = Nodes(monkeypatch, 2, 0)
    nodes.later = {2.0: [2, 1], 9.0: [2, 2]}

    assert room(nodes, hoped=3) == 3
    assert nodes.now == 2.0


def test_fewer_go_on_where_there_is_no_more_room(monkeypatch):
    nodes = Nodes(monkeypatch, 3, 0)

    assert room(nodes, hoped=4) == 3
    assert workers.SETTLE_S <= nodes.now <= workers.SETTLE_S + 1


def test_what_a_lost_reward_actor_will_take_is_not_hoped_for(monkeypatch):
    nodes = Nodes(monkeypatch, 4)
    monkeypatch.setattr(
        workers, "free_nodes", lambda: [Node("node", Bundle(4), Bundle(nodes.free[0]))]
    )
    nodes.actors = 0

    assert room(nodes, hoped=4) == 3
    assert nodes.now == 0


def test_a_reward_actor_that_lost_its_place_has_room_before_the_workers(monkeypatch):
    nodes = Nodes(monkeypatch, 2, 2)
    nodes.actors = 0

    assert room(nodes) == 3


def test_reward_actors_beyond_the_least_make_room_and_nodes_are_waited_for(monkeypatch):
    nodes = Nodes(monkeypatch, 1)
    nodes.later = {30.0: [1, 1]}

    assert room(nodes) == 2
    assert nodes.now == 30.0
    assert nodes.shrunk > 0


def test_no_room_is_one_sentence_once_patience_is_over(monkeypatch):
    nodes = Nodes(monkeypatch, 1)

    with pytest.raises(ConfigError) as caught:
        room(nodes)

    assert "The run needs 2 CPUs (train.workers=2..4 with cpus_per_worker=1)" in str(caught.value)
    assert "of which 1 free" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 60 < nodes.now < 62


def test_a_person_who_stops_the_run_does_not_wait_for_nodes(monkeypatch):
    nodes, stop = Nodes(monkeypatch, 1), threading.Event()
    stop.set()

    assert room(nodes, stop) == 0
    assert nodes.now == 0


# ---- one more --------------------------------------------------------------------------------


def look(nodes, until, count=2, step_s=5.0, step=10):
    """Seconds until a group of `count` workers hears that there is room for one more; or None."""
    more = workers.UpscaleTrigger(CONFIG, NEED, nodes, count, clock=lambda: nodes.now)
    more.on_step(SimpleNamespace(step=step, seconds=step_s))
    while nodes.now < until:
        nodes.sleep(1.0)
        if more.is_due():
            return nodes.now
    return None


def test_room_that_lasts_is_taken(monkeypatch):
    nodes = Nodes(monkeypatch, 0)
    nodes.later = {20.0: [1]}

    assert look(nodes, until=60) == 29.0


def test_room_that_comes_and_goes_is_not(monkeypatch):
    nodes = Nodes(monkeypatch, 0)
    for when in range(5, 60, 10):
        nodes.later |= {float(when): [1], float(when + 5): [0]}

    assert look(nodes, until=60) is None


def test_room_that_a_lost_reward_actor_needs_is_not_taken(monkeypatch):
    nodes = Nodes(monkeypatch, 1)
    nodes.actors = 0

    assert look(nodes, until=60) is None


@pytest.mark.parametrize(
    "case", [{"count": 4}, {"step": 99, "step_s": 5.0}], ids=["all are there", "nearly done"]
)
def test_a_group_that_gains_nothing_goes_on_as_it_is(monkeypatch, case):
    assert look(Nodes(monkeypatch, 8), until=60, **case) is None


# ---- where reward actors come up ---------------------------------------------------------------


def test_reward_actors_leave_the_nodes_to_the_workers_that_fit_on_no_other(monkeypatch):
    large, small = Bundle(8, 1), Bundle(4, 1)
    types = {"a": small, "b": large, "c": small, "d": large}
    nodes = [Node("", has, has, name) for name, has in types.items()]
    monkeypatch.setattr(live, "free_nodes", lambda: nodes)
    words = ["train.workers=2", "cluster.cpus_per_worker=6", "reward.actors=5..9"]
    config = load_config(
        "lab", [*words, "cluster.gpus_per_worker=1", "serving.gpus_per_actor=0.25"]
    )

    assert live.place_actors(resources.needs(config, 0)) == ["a", "a", "a", "a", "c"]
