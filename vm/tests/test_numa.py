"""`cpu` on NUMA nodes: a CPU without a worker goes to its own node's, over loopback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from steer.linux import topology
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import CPUS, KINDS, PORT, Harness, pinned
from vm.tests.machine import (
    NODE_OF,
    NODES,
    allowed,
    assert_near,
    both_backends,
    cpu_of,
    served_by,
    two_nodes,
)

pytestmark = [two_nodes, pytest.mark.needs("bpf"), pytest.mark.usefixtures("netns")]

Pick = Callable[[Sequence[int]], int]


def test_the_nodes_are_known() -> None:
    found = topology.read()
    assert {cpu: found.node(cpu) for cpu in CPUS} == NODE_OF


@pytest.mark.parametrize(
    "pick", [min, max, lambda cpus: cpus[len(cpus) // 2]], ids=["first", "last", "other"]
)
@both_backends
def test_one_worker_on_each_node(backend: str, pick: Pick) -> None:
    served_at = {node: pick(cpus) for node, cpus in NODES.items()}
    with (
        allowed([*served_at.values()]) as machine,
        Harness(backend, "cpu", *KINDS, workers=len(NODES), machine=machine).serving() as harness,
    ):
        assert served_by(harness) == {cpu: served_at[NODE_OF[cpu]] for cpu in CPUS}


@pytest.mark.parametrize("workers", [2, 3, 4, 6])
@both_backends
def test_fewer_workers_than_cpus(backend: str, workers: int) -> None:
    """Each node gets its share of them, and serves itself."""
    with Harness(backend, "cpu", *KINDS, workers=workers).serving() as harness:
        manned = [cpu_of(harness, slot) for slot in range(workers)]
        taken = Counter(NODE_OF[cpu] for cpu in manned)
        for node, cpus in NODES.items():
            assert taken[node] in (len(cpus), max(taken.values()), max(taken.values()) - 1)
        assert_near(served_by(harness), manned)


@both_backends
def test_node_without_a_worker_is_dealt_over_the_others(backend: str) -> None:
    _, *others = NODES.values()
    manned = [cpu for cpus in others for cpu in cpus]
    with (
        allowed(manned) as machine,
        Harness(backend, "cpu", *KINDS, workers=len(manned), machine=machine).serving() as harness,
    ):
        assert_near(served_by(harness), manned)


@both_backends
def test_workers_of_a_node_go_and_come_back(backend: str) -> None:
    """It serves itself while it has one, and again as soon as it has."""
    with Harness(backend, "cpu", *KINDS, workers=len(CPUS)).serving() as harness:
        node, *_ = NODES
        cpus = [cpu_of(harness, slot) for slot in range(len(CPUS))]
        *going, last = [slot for slot, cpu in enumerate(cpus) if NODE_OF[cpu] == node]
        harness.leave(*going)
        harness.steer()
        at_last = cpus[last]
        assert served_by(harness) == {cpu: at_last if NODE_OF[cpu] == node else cpu for cpu in CPUS}
        harness.leave(last)
        harness.steer()
        assert all(NODE_OF[home] != node for home in served_by(harness).values())
        harness.join(last)
        harness.steer()
        assert served_by(harness) == {cpu: at_last if NODE_OF[cpu] == node else cpu for cpu in CPUS}


def test_service_with_a_worker_for_each_node(service: StartService) -> None:
    running = service("--policy", "cpu", "-w", str(len(NODES)), "-b", f"127.0.0.1:{PORT}")
    slots = {NODE_OF[worker["cpus"][0]]: worker["slot"] for worker in running.workers()}
    assert set(slots) == set(NODES)
    for cpu in CPUS:
        with pinned(cpu):
            _, found = http_get("127.0.0.1", PORT)
        assert found["slot"] == slots[NODE_OF[cpu]]
