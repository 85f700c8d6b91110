"""A run with injected faults has the same result as an undisturbed one."""

import re

import pytest

from tests.chaos.compare import FEWER, SAME, differences
from tests.chaos.harness import STEPS, chaos
from tests.chaos.schedule import KINDS, Fault, schedule

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

CALM = "calm"
QUICK = ["evaluate.shards=1"]  # the faults below come before the evaluation
# All runs share two nodes of 2 CPUs. One of them fits two workers and two reward actors of half a CPU.
SMALL = ["cluster.cpus_per_worker=0.5", "serving.cpus_per_actor=0.5"]
# Both fit a reward actor and two workers of this size; one of them, the actor and one worker.
LARGE = ["cluster.cpus_per_worker=1.5", "serving.cpus_per_actor=0.5"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes, on which an undisturbed run has finished."""
    with chaos(tmp_path_factory.mktemp("chaos"), cpus=2) as found:
        # The scores do not depend on the number of actors.
        outcome = found.run(CALM, [*SAME, *SMALL, *QUICK, "reward.actors=1"])
        assert outcome.codes == [0], outcome.text
        yield found


def test_faults_of_every_kind_in_one_run_do_not_change_the_result(nodes):
    faults = [Fault("actor", 0, 0.5), Fault("full", 1, 0.0), Fault("worker", 2, 0.2)]
    faults += [Fault("actor", 3, 0.0), Fault("worker_node", 3, 0.3), Fault("damage", 6, 0.2)]

    outcome = nodes.run("disturbed", [*SAME, *SMALL, *QUICK], faults)

    assert [fault for fault in outcome.injected if "no such process" in fault] == []
    assert len(re.findall(r"worker \d died|worker \d lost its connection", outcome.text)) >= 2
    assert outcome.codes == [-9, 0]
    assert "No space left on device" in outcome.text
    assert "The run ignores it." in outcome.text or "only one checkpoint" in outcome.injected[-1]
    assert differences(nodes, "disturbed", CALM, outcome, exact=True) == [], outcome.text


def test_a_run_continues_with_fewer_workers_and_grows_back(nodes, monkeypatch):
    faults = [Fault("actor_node", 2, 0.3), Fault("controller", 4, 0.0), Fault("return", 9, 0.0)]
    monkeypatch.setattr(nodes, "return_s", 600.0)  # until the fault `return`

    outcome = nodes.run("fewer", [*FEWER, *LARGE, *QUICK, "train.steps=32"], faults)

    assert outcome.codes == [0], outcome.text
    counts = [int(n) for n in re.findall(r"resuming from step \d+ with (\d) worker", outcome.text)]
    assert re.search("train .* on 1..3 worker", outcome.text)
    assert outcome.text.count("worker 1 on node") == 2  # at first, and at the end
    # The resources of a killed controller are released; otherwise no worker would fit.
    assert counts == [1, 1, 2]
    assert [row["step"] for row in nodes.rows("fewer")] == list(range(1, 33))


# ---- the schedule ------------------------------------------------------------------------------


def test_a_schedule_is_reproducible_and_schedules_cover_all_kinds_of_faults():
    drawn = [schedule(seed, STEPS) for seed in range(60)]

    assert drawn == [schedule(seed, STEPS) for seed in range(60)]
    assert {fault.kind for faults in drawn for fault in faults} == set(KINDS)
    assert all(faults == sorted(faults, key=lambda fault: fault.after_step) for faults in drawn)
