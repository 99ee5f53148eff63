"""Which worker gets which CPUs, and who serves a CPU without a worker, on machines of any shape."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.policy.cpus import (
    Topology,
    cpu_list,
    cpu_of_each,
    cpu_of_each_slot,
    cpus_named,
    nearest,
)

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    possible = sorted(draw(st.sets(st.integers(0, 500), min_size=1, max_size=48)))
    allowed = sorted(draw(st.sets(st.sampled_from(possible), min_size=1)))
    nodes = {cpu: draw(st.integers(0, 3)) for cpu in possible}
    return Topology(tuple(allowed), tuple(possible), nodes)


def machine(*nodes: int, allowed: tuple[int, ...] = ()) -> Topology:
    """A topology with CPU i on node nodes[i]."""
    possible = tuple(range(len(nodes)))
    return Topology(allowed or possible, possible, dict(enumerate(nodes)))


def spread(counts: Counter[int], over: set[int]) -> int:
    return max(counts[one] for one in over) - min(counts[one] for one in over)


def test_a_cpu_of_no_known_node_is_on_node_0() -> None:
    assert Topology((0, 1), (0, 1), {1: 2}).node(0) == 0
    assert Topology((0, 1), (0, 1), {1: 2}).node(1) == 2


@pytest.mark.parametrize(
    "workers, topology, expected",
    [
        (2, machine(0, 0), [0, 1]),
        (5, machine(0, 0), [0, 1, 0, 1, 0]),
        (1, machine(0, 0, 1, 1), [0]),
        (2, machine(0, 0, 1, 1), [0, 2]),
        (6, machine(0, 0, 1, 1), [0, 2, 1, 3, 0, 2]),
        (4, machine(0, 1, 1, 1), [0, 1, 2, 3]),
        (3, machine(0, 0, 1, 1, allowed=(2, 3)), [2, 3, 2]),
        (3, Topology((5, 70), (5, 6, 70), {}), [5, 70, 5]),
        (0, machine(0), []),
    ],
)
def test_cpus_of_workers(workers: int, topology: Topology, expected: list[int]) -> None:
    assert cpu_of_each(workers, topology) == expected


@quick
@given(machines(), st.integers(1, 100))
def test_workers_get_allowed_cpus_evenly(topology: Topology, workers: int) -> None:
    taken = Counter(cpu_of_each(workers, topology))
    assert taken.total() == workers
    assert set(taken) <= set(topology.allowed)
    assert spread(taken, set(topology.allowed)) <= 1


@quick
@given(machines(), st.integers(1, 100))
def test_no_node_is_crowded_while_another_has_a_free_cpu(topology: Topology, workers: int) -> None:
    workers = min(workers, len(topology.allowed))
    taken = cpu_of_each(workers, topology)
    manned = Counter(topology.node(cpu) for cpu in taken)
    for free in set(topology.allowed) - set(taken):
        assert manned[topology.node(free)] >= max(manned.values()) - 1


@quick
@given(machines(), st.integers(1, 100))
def test_one_more_worker_moves_nobody(topology: Topology, workers: int) -> None:
    assert cpu_of_each(workers + 1, topology)[:workers] == cpu_of_each(workers, topology)


@pytest.mark.parametrize(
    "manned, topology, expected",
    [
        ({0, 1}, machine(0, 0), {0: 0, 1: 1}),
        ({0, 1}, machine(0, 0, 0, 0), {0: 0, 1: 1, 2: 0, 3: 1}),
        ({0, 2}, machine(0, 0, 1, 1), {0: 0, 1: 0, 2: 2, 3: 2}),
        ({2}, machine(0, 0, 1, 1), {0: 2, 1: 2, 2: 2, 3: 2}),
        # The one with nobody on its node goes to 3: 0 already has one of its own.
        ({0, 3}, machine(0, 0, 2, 1), {0: 0, 1: 0, 2: 3, 3: 3}),
        ({0, 3}, machine(0, 2, 0, 1), {0: 0, 1: 3, 2: 0, 3: 3}),
        ({4, 9}, Topology((4, 9), (4, 5, 9, 11), {}), {4: 4, 5: 4, 9: 9, 11: 9}),
    ],
)
def test_nearest(manned: set[int], topology: Topology, expected: dict[int, int]) -> None:
    assert nearest(manned, topology) == expected


@quick
@given(machines(), st.data())
def test_every_cpu_is_served_from_its_own_node_if_it_can_be(
    topology: Topology, data: st.DataObject
) -> None:
    manned = data.draw(st.sets(st.sampled_from(topology.allowed), min_size=1))
    home = nearest(manned, topology)
    assert set(home) == set(topology.possible)
    assert set(home.values()) == manned
    nodes = {topology.node(cpu) for cpu in manned}
    for cpu, served_by in home.items():
        if cpu in manned:
            assert served_by == cpu
        elif topology.node(cpu) in nodes:
            assert topology.node(served_by) == topology.node(cpu)


@quick
@given(machines(), st.data())
def test_cpus_without_a_worker_are_distributed_evenly(
    topology: Topology, data: st.DataObject
) -> None:
    """Evenly on each node. A CPU whose node has no worker goes to a CPU that serves the fewest."""
    manned = data.draw(st.sets(st.sampled_from(topology.allowed), min_size=1))
    home = nearest(manned, topology)
    strays = [cpu for cpu in home if cpu not in manned]
    nodes = {topology.node(cpu) for cpu in manned}
    own = Counter(home[cpu] for cpu in strays if topology.node(cpu) in nodes)
    for node in nodes:
        assert spread(own, {cpu for cpu in manned if topology.node(cpu) == node}) <= 1
    load = Counter(home[cpu] for cpu in strays)
    for cpu in strays:
        if topology.node(cpu) not in nodes:
            assert load[home[cpu]] - 1 <= min(load[other] for other in manned)


def test_a_worker_pinned_to_a_cpu_that_is_not_in_the_topology() -> None:
    """It may have been plugged in after the topology was read."""
    assert nearest({0, 7}, machine(0, 0)) == {0: 0, 1: 0, 7: 7}


def test_the_topology_is_not_changed() -> None:
    manned = [1, 0]
    nearest(manned, machine(0, 0, 0))
    assert manned == [1, 0]


@pytest.mark.parametrize(
    "cpus, shown",
    [
        ([], "-"),
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 3, 8], "0-3,8"),
        ([8, 2, 0, 1], "0-2,8"),
        ([1, 3, 5], "1,3,5"),
    ],
)
def test_cpu_list(cpus: list[int], shown: str) -> None:
    assert cpu_list(cpus) == shown


def test_cpus_named() -> None:
    assert [cpus_named(cpus) for cpus in ([3], [0, 1, 8], [])] == ["CPU 3", "CPUs 0-1,8", "CPUs -"]


@quick
@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_cpu_list_reads_back_as_the_kernel_reads_it(cpus: set[int]) -> None:
    read = set()
    for part in cpu_list(list(cpus)).split(","):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == cpus


@pytest.mark.parametrize(
    "affinities, expected",
    [
        ({0: {3}, 1: {2}, 2: {1}, 3: {0}}, {0: 3, 1: 2, 2: 1, 3: 0}),
        ({4: (), 5: (), 6: (), 7: ()}, {4: 0, 5: 1, 6: 2, 7: 3}),
        ({0: (), 1: {0}, 2: {0, 1}}, {0: 2, 1: 0, 2: 1}),
        ({0: {1}, 1: {1}, 2: {1, 2}}, {0: 1, 1: 1, 2: 2}),
        ({0: {9}}, {0: 9}),
    ],
    ids=["pinned", "not known", "who has the least choice first", "shared", "not ours"],
)
def test_slot_serves_a_cpu_of_its_thread(
    affinities: dict[int, set[int]], expected: dict[int, int]
) -> None:
    assert cpu_of_each_slot(affinities, machine(0, 0, 0, 0)) == expected


@quick
@given(machines(), st.data())
def test_each_slot_gets_a_cpu_that_its_thread_may_run_on(
    topology: Topology, data: st.DataObject
) -> None:
    some = st.sets(st.sampled_from(topology.possible))
    affinities = data.draw(st.dictionaries(st.integers(0, 40), some, max_size=20))
    found = cpu_of_each_slot(affinities, topology)
    assert found.keys() == affinities.keys()
    assert all(cpu in (affinities[slot] or topology.allowed) for slot, cpu in found.items())
