"""A run ends as if nothing had happened, whatever dies while it goes on."""

import re

import pytest

from tests.chaos.harness import STEPS, chaos
from tests.chaos.judge import FEWER, SAME, faults
from tests.chaos.schedule import KINDS, Blow, schedule

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CALM = "calm"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two nodes, and a run on them that nothing disturbed."""
    with chaos(tmp_path_factory.mktemp("chaos")) as found:
        ended = found.go(CALM, SAME)
        assert ended.codes == [0], ended.text
        yield found


def test_workers_and_reward_actors_that_are_killed_change_nothing(house):
    blows = [Blow("actor", 0, 0.5), Blow("worker", 2, 0.2), Blow("actor", 3, 0.0)]
    blows += [Blow("worker", 5, 0.1)]

    ended = house.go("processes", SAME, blows)

    assert [blow for blow in ended.happened if "none" in blow] == []
    assert len(re.findall(r"worker \d died|worker \d lost its connection", ended.text)) >= 2
    assert faults(house, "processes", CALM, ended, exact=True) == [], ended.text


def test_a_node_a_full_disk_a_driver_and_a_damaged_checkpoint_change_nothing(house):
    blows = [Blow("full", 1, 0.0), Blow("node", 3, 0.3), Blow("damage", 6, 0.2)]

    ended = house.go("nodes", SAME, blows)

    assert ended.codes == [-9, 0]
    assert "No space left on device" in ended.text
    assert "The run ignores it." in ended.text or "to spare" in ended.happened[-1]
    assert faults(house, "nodes", CALM, ended, exact=True) == [], ended.text


def test_a_run_goes_on_with_fewer_workers_and_grows_back(tmp_path):
    blows = [Blow("actor_node", 2, 0.3), Blow("return", 5, 0.0), Blow("controller", 14, 0.1)]

    with chaos(tmp_path, cpus=2) as small:
        small.return_s = 600.0  # or when it is told to
        ended = small.go("fewer", [*FEWER, "train.steps=20"], blows)

    assert ended.codes == [0], ended.text
    # Two nodes of 2 CPUs: the reward actor and three workers. One: the actor and one worker.
    counts = [int(n) for n in re.findall(r"going on from step \d+ with (\d) worker", ended.text)]
    assert re.search("train .* on 1..3 worker", ended.text)
    # What a controller held that was killed is free again, or there would be room for none.
    assert counts == [1, 3, 3]
    assert [row["step"] for row in small.rows("fewer")] == list(range(1, 21))


# ---- the schedule ------------------------------------------------------------------------------


def test_a_seed_gives_the_same_schedule_again_and_all_kinds_come_up():
    drawn = [schedule(seed, STEPS) for seed in range(60)]

    assert drawn == [schedule(seed, STEPS) for seed in range(60)]
    assert {blow.kind for blows in drawn for blow in blows} == set(KINDS)
    assert all(blows == sorted(blows, key=lambda blow: blow.after_step) for blows in drawn)
