"""`cpu` on 8 CPUs, over loopback, where a packet comes in on the CPU that its sender runs on.

The orders are those of the kernel's own test of such programs
(tools/testing/selftests/net/reuseport_bpf_cpu.c).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from steer.linux import topology
from steer.policy.cpus import Topology
from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import CPUS, KINDS, PORT, Harness, pinned
from vm.tests.machine import (
    EVEN,
    ODD,
    allowed,
    assert_near,
    both_backends,
    eight_cpus,
    served_by,
)

pytestmark = [eight_cpus, pytest.mark.needs("bpf"), pytest.mark.usefixtures("netns")]

ORDERS = {
    "forward": CPUS,
    "reverse": CPUS[::-1],
    "even-then-odd": EVEN + ODD,
    "odd-then-even": ODD + EVEN,
}
all_orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


@all_orders
@both_backends
def test_each_cpu_has_its_worker(backend: str, order: Sequence[int]) -> None:
    """Whatever the order of workers, of their sockets, and of clients."""
    real = topology.read()
    machine = Topology(tuple(order), real.possible, dict.fromkeys(real.possible, 0))
    with Harness(backend, "cpu", *KINDS, workers=len(order), machine=machine) as harness:
        assert [spec.cpu for spec in harness.plan.specs] == list(order)
        harness.join(*order)
        harness.steer()
        for slot, cpu in enumerate(order):
            with pinned(cpu):
                for bind in range(len(KINDS)):
                    assert harness.count(5, bind) == {slot: 5}


@pytest.mark.parametrize("cpus", [EVEN, ODD, CPUS[:4], CPUS[3:4]], ids=str)
@both_backends
def test_cpus_that_may_not_be_used_are_served_by_the_others(
    backend: str, cpus: Sequence[int]
) -> None:
    with (
        allowed(cpus) as machine,
        Harness(backend, "cpu", *KINDS, workers=len(cpus), machine=machine).serving() as harness,
    ):
        assert_near(served_by(harness), cpus)


@pytest.mark.parametrize("cpus", [EVEN, ODD], ids=["even", "odd"])
def test_service_on_half_of_the_cpus(service: StartService, cpus: Sequence[int]) -> None:
    with allowed(cpus):
        running = service("--policy", "cpu", "-b", f"127.0.0.1:{PORT}")
    cpu_of = {worker["slot"]: worker["cpus"][0] for worker in running.workers()}
    answers = {cpu: ask(cpu) for cpu in CPUS}
    assert_near({cpu: cpu_of[answer["slot"]] for cpu, answer in answers.items()}, cpus)
    for answer in answers.values():
        assert answer["cpu"] == cpu_of[answer["slot"]], "where its process runs"


def ask(cpu: int) -> dict[str, int]:
    with pinned(cpu):
        _, found = http_get("127.0.0.1", PORT)
    return found
