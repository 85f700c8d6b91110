"""Resources: what a run needs, and how its bundles are placed on nodes; without Ray."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_detox import resources
from ray_detox.config import ConfigError
from ray_detox.recipes.loading import load_config
from ray_detox.resources import (
    Bundle,
    BundleGroup,
    Node,
    Phase,
    placement,
    shortfall,
    table,
    workers_that_fit,
)


def node(cpus, gpus=0.0, *, free=None):
    total = Bundle(cpus, gpus)
    return Node("10.0.0.1", total, free or total)


def phase(workers, worker, actors, actor):
    return Phase(
        "training",
        BundleGroup("training worker", f"train.workers={workers}", workers, workers, worker),
        BundleGroup("reward actor", f"reward.actors={actors}", actors, actors, actor),
    )


def placed(demand, nodes):
    return tuple(map(sum, zip(*placement(demand, nodes), strict=True)))


# ---- placement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "each, nodes, fitting",
    [
        (Bundle(4), [node(3), node(3), node(3)], 0),
        (Bundle(2), [node(5), node(3)], 3),
        (Bundle(0.1), [node(0.3)], 3),
        (Bundle(1, 1), [node(8, 2), node(1, 8)], 3),
        (Bundle(1, 2), [node(8, 3), node(8, 2)], 2),
        (Bundle(1), [node(8, free=Bundle(2))], 2),
        # A share of a GPU is on one device: two shares of 0.75 leave two quarters that no share fits.
        (Bundle(0, 0.75), [node(8, 2)], 2),
        (Bundle(0, 0.5), [node(8, 2)], 4),
        (Bundle(0, 0.4), [node(8, 2)], 4),
    ],
)
def test_a_worker_needs_a_single_node_and_single_devices(each, nodes, fitting):
    assert workers_that_fit(phase(99, each, 1, Bundle(1)), nodes) == fitting
    assert workers_that_fit(phase(1, each, 1, Bundle(1)), nodes) == min(1, fitting)


def test_actors_that_lost_their_node_are_placed_before_workers():
    demand = phase(4, Bundle(1), 2, Bundle(3))

    assert workers_that_fit(demand, [node(4)]) == 4
    assert workers_that_fit(demand, [node(4)], actors=1) == 1
    assert workers_that_fit(demand, [node(4)], actors=2) == 0


def test_a_placement_is_found_where_filling_nodes_one_by_one_fails():
    demand = phase(1, Bundle(3), 4, Bundle(2))

    assert placement(demand, [node(4), node(7)]) == [(0, 2), (1, 2)]


def test_workers_and_actors_share_gpus_but_a_share_never_spans_two_devices():
    demand = phase(2, Bundle(1, 0.75), 2, Bundle(1, 0.25))

    assert placed(demand, [node(8, 2)]) == (2, 2)
    assert placed(phase(2, Bundle(1, 0.75), 1, Bundle(1, 0.5)), [node(8, 2)]) == (2, 0)


SIZES = st.integers(1, 4)
NODES = st.lists(st.builds(node, st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=3)


@given(st.integers(1, 3), SIZES, st.integers(1, 3), SIZES, NODES)
def test_a_placement_is_found_whenever_one_exists(workers, worker_cpus, actors, actor_cpus, nodes):
    demand = phase(workers, Bundle(worker_cpus), actors, Bundle(actor_cpus))
    sizes = [worker_cpus] * workers + [actor_cpus] * actors

    def holds(homes):
        return all(
            sum(size for size, home in zip(sizes, homes, strict=True) if home == i) <= n.free.cpus
            for i, n in enumerate(nodes)
        )

    possible = any(map(holds, itertools.product(range(len(nodes)), repeat=len(sizes))))

    assert (placed(demand, nodes) == (workers, actors)) == possible
    assert (shortfall([demand], nodes) is None) == possible


@given(st.integers(1, 4), SIZES, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.0]), NODES)
def test_no_node_gets_more_than_it_has_and_another_node_never_hurts(workers, cpus, gpus, nodes):
    demand = phase(workers, Bundle(cpus, gpus), 1, Bundle(1, gpus / 2 if gpus <= 1 else 1))

    homes = placement(demand, nodes)

    for home, (here, beside) in zip(nodes, homes, strict=True):
        assert here * cpus + beside <= home.free.cpus
        assert here * gpus + beside * demand.actors.bundle.gpus <= home.free.gpus
    assert placed(demand, [*nodes, node(4, 2)])[0] >= placed(demand, nodes)[0]


# ---- the shortfall ---------------------------------------------------------------------------


def test_the_shortfall_names_need_and_have_for_each_kind():
    demand = phase(3, Bundle(2, 1), 2, Bundle(1, 0.25))

    sentence = shortfall([demand], [node(4, 1), node(2, free=Bundle(1))])

    assert sentence is not None
    assert sentence.startswith(
        "The run needs 8 CPUs (train.workers=3 with cpus_per_worker=2, reward.actors=2 with "
        "cpus_per_actor=1) and 3.5 GPUs (train.workers=3 with gpus_per_worker=1, reward.actors=2 "
        "with gpus_per_actor=0.25), and the cluster has 6 CPUs, of which 5 free and 1 GPU."
    )


def test_the_shortfall_names_the_largest_node_if_none_is_large_enough():
    demand = phase(2, Bundle(4), 1, Bundle(1))

    sentence = shortfall([demand], [node(3), node(5), node(3)])

    assert sentence is not None
    assert "1 of 2 training workers (train.workers=2) with 4 CPUs each" in sentence
    assert "the largest, 10.0.0.1, has 5 CPUs free" in sentence
    assert "add a node with 4 CPUs" in sentence


# ---- the needs of a run      -----------------------------------------------------------------


def needs(*settings, gpus=0.0):
    return resources.needs(load_config("lab", settings), gpus)


def test_a_run_needs_its_workers_and_actors_at_the_same_time():
    need = needs("train.workers=3", "cluster.cpus_per_worker=2", "reward.actors=2")

    assert (need.cpus, need.gpus) == (8, 0)


def test_a_range_needs_its_minimum_and_the_table_shows_its_maximum():
    need = needs("train.workers=2..4", "reward.actors=1..3")

    assert need.cpus == 3
    assert [need.phases[0].usable("CPU"), need.phases[0].needed("CPU")] == [7, 3]
    assert "used if free" in table(need.phases)


def test_data_preparation_takes_a_whole_cpu_beside_the_actors():
    need = needs("train.workers=1", "cluster.cpus_per_worker=0.25", "serving.cpus_per_actor=0.5")

    assert need.cpus == 1.5


@pytest.mark.parametrize(
    "gpus, per_worker, per_actor",
    [(0, 0, 0), (1, 0, 0), (2, 0.75, 0.25), (2.25, 1, 0.25), (8, 1, 0.25)],
)
def test_gpus_that_settings_leave_open_depend_on_the_cluster(gpus, per_worker, per_actor):
    need = needs(gpus=gpus)

    assert (need.gpus_per_worker, need.gpus_per_actor) == (per_worker, per_actor)
    assert need.gpus <= gpus


@pytest.mark.parametrize("setting", ["cluster.gpus_per_worker", "serving.gpus_per_actor"])
def test_more_than_one_gpu_must_be_a_whole_number(setting):
    with pytest.raises(ConfigError, match=f"{setting} is 1.5; expected a share of one GPU"):
        needs(f"{setting}=1.5")


def test_the_table_shows_the_sums_and_the_resources_of_the_nodes():
    need = needs("train.workers=2..4", "cluster.cpus_per_worker=3")

    lines = table(need.phases, [node(16, 1, free=Bundle(9, 1))]).splitlines()

    assert [line.split() for line in lines if line.startswith(("training", "need", "have", "free"))] == [
        ["training:", "training", "worker", "2..4", "3", "0", "6", "0"],
        ["need", "7", "0"],
        ["have", "16", "1"],
        ["free", "9", "1"],
    ]  # fmt: skip
