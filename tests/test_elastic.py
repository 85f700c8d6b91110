"""The number of workers on nodes that come and go; without Ray, with a clock of our own."""

import threading
from types import SimpleNamespace

import pytest

from ray_detox import resources
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.resources import Bundle, Node
from ray_detox.rewards.messages import PoolMetrics
from ray_detox.stages.cluster import elastic
from ray_detox.stages.cluster import nodes as cluster_nodes

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
    """Nodes with some free CPUs, a reward pool, and a clock that `sleep` moves forward."""

    def __init__(self, monkeypatch, *free):
        self.free = list(free)
        self.now = 0.0
        self.shrunk = 0
        self.actors = 1
        monkeypatch.setattr(elastic, "free_nodes", self.list)
        monkeypatch.setattr(elastic.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(elastic.time, "sleep", self.sleep)
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


def wait(nodes, stop=None, expected=2):
    return elastic.wait_for_workers(CONFIG, NEED, nodes, expected, stop or threading.Event())


def test_the_maximum_of_workers_starts_at_once_if_they_fit(monkeypatch):
    nodes = Nodes(monkeypatch, 3, 3)

    assert wait(nodes) == 4
    assert nodes.now == 0


def test_an_earlier_group_gets_time_to_release_its_resources(monkeypatch):
    nodes = Nodes(monkeypatch, 2, 0)
    nodes.later = {2.0: [2, 1], 9.0: [2, 2]}

    assert wait(nodes, expected=3) == 3
    assert nodes.now == 2.0


def test_fewer_workers_start_if_no_more_fit_after_the_release_timeout(monkeypatch):
    nodes = Nodes(monkeypatch, 3, 0)

    assert wait(nodes, expected=4) == 3
    assert elastic.RELEASE_TIMEOUT_S <= nodes.now <= elastic.RELEASE_TIMEOUT_S + 1


def test_resources_for_a_lost_reward_actor_are_not_waited_for(monkeypatch):
    nodes = Nodes(monkeypatch, 4)
    monkeypatch.setattr(
        elastic, "free_nodes", lambda: [Node("node", Bundle(4), Bundle(nodes.free[0]))]
    )
    nodes.actors = 0

    assert wait(nodes, expected=4) == 3
    assert nodes.now == 0


def test_a_reward_actor_that_lost_its_node_comes_before_the_workers(monkeypatch):
    nodes = Nodes(monkeypatch, 2, 2)
    nodes.actors = 0

    assert wait(nodes) == 3


def test_the_pool_releases_actors_above_its_minimum_while_workers_wait(monkeypatch):
    nodes = Nodes(monkeypatch, 1)
    nodes.later = {30.0: [1, 1]}

    assert wait(nodes) == 2
    assert nodes.now == 30.0
    assert nodes.shrunk > 0


def test_too_few_resources_are_one_sentence_after_the_capacity_timeout(monkeypatch):
    nodes = Nodes(monkeypatch, 1)

    with pytest.raises(ConfigError) as caught:
        wait(nodes)

    assert "The run needs 2 CPUs (train.workers=2..4 with cpus_per_worker=1)" in str(caught.value)
    assert "of which 1 free" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 60 < nodes.now < 62


def test_a_stop_request_ends_the_wait_for_nodes(monkeypatch):
    nodes, stop = Nodes(monkeypatch, 1), threading.Event()
    stop.set()

    assert wait(nodes, stop) == 0
    assert nodes.now == 0


# ---- upscaling --------------------------------------------------------------------------------


def seconds_until_due(nodes, until, count=2, step_s=5.0, step=10):
    """Seconds until the trigger reports that one more worker fits beside `count`; or None."""
    trigger = elastic.UpscaleTrigger(CONFIG, NEED, nodes, count, clock=lambda: nodes.now)
    trigger.on_step(SimpleNamespace(step=step, seconds=step_s))
    while nodes.now < until:
        nodes.sleep(1.0)
        if trigger.is_due():
            return nodes.now
    return None


def test_a_group_grows_once_one_more_worker_has_fitted_for_the_delay(monkeypatch):
    nodes = Nodes(monkeypatch, 0)
    nodes.later = {20.0: [1]}

    assert seconds_until_due(nodes, until=60) == 29.0


def test_a_group_grows_by_all_workers_that_fit_at_once(monkeypatch):
    nodes = Nodes(monkeypatch, 0)
    nodes.later = {20.0: [1], 24.0: [1, 1]}
    trigger = elastic.UpscaleTrigger(CONFIG, NEED, nodes, 2, clock=lambda: nodes.now)
    trigger.on_step(SimpleNamespace(step=10, seconds=5.0))

    while not trigger.is_due():
        nodes.sleep(1.0)

    assert nodes.now == 29.0
    assert trigger.more == 2


def test_a_group_does_not_grow_on_resources_that_come_and_go(monkeypatch):
    nodes = Nodes(monkeypatch, 0)
    for when in range(5, 60, 10):
        nodes.later |= {float(when): [1], float(when + 5): [0]}

    assert seconds_until_due(nodes, until=60) is None


def test_a_group_does_not_grow_on_resources_that_a_lost_actor_needs(monkeypatch):
    nodes = Nodes(monkeypatch, 1)
    nodes.actors = 0

    assert seconds_until_due(nodes, until=60) is None


@pytest.mark.parametrize(
    "case", [{"count": 4}, {"step": 99, "step_s": 5.0}], ids=["all are there", "nearly done"]
)
def test_a_group_that_would_gain_nothing_does_not_grow(monkeypatch, case):
    assert seconds_until_due(Nodes(monkeypatch, 8), until=60, **case) is None


# ---- placement of reward actors ---------------------------------------------------------------


def test_reward_actors_leave_large_nodes_to_workers_that_fit_on_no_other(monkeypatch):
    large, small = Bundle(8, 1), Bundle(4, 1)
    types = {"a": small, "b": large, "c": small, "d": large}
    nodes = [Node("", has, has, name) for name, has in types.items()]
    monkeypatch.setattr(cluster_nodes, "free_nodes", lambda: nodes)
    words = ["train.workers=2", "cluster.cpus_per_worker=6", "reward.actors=5..9"]
    config = load_config(
        "lab", [*words, "cluster.gpus_per_worker=1", "serving.gpus_per_actor=0.25"]
    )

    assert cluster_nodes.place_actors(resources.needs(config, 0)) == ["a", "a", "a", "a", "c"]
