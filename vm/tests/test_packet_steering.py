"""`cpu` behind Receive Packet Steering: the kernel hands packets to other CPUs than took them in
(Documentation/networking/scaling.rst). What counts is the CPU that brings them to the socket.

Clients are at the other end of a veth pair, in another network namespace.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testkit.harness import CPUS, Harness
from testkit.namespaces import Netns
from vm.tests.machine import (
    CLIENT,
    KINDS,
    ODD,
    SERVER,
    Namespace,
    assert_each_at_its_cpu,
    both_backends,
    count_everywhere,
    cpu_of,
    eight_cpus,
    ip,
    take_addresses,
)

pytestmark = [eight_cpus, pytest.mark.needs("bpf", "root")]


class Link:
    """A veth pair. Its receive queues are seen in a sysfs of the namespace's own (netns(7))."""

    def __init__(self, queues: int, sysfs: Path, clients: Namespace) -> None:
        self.clients = clients
        self._queues = [sysfs / f"class/net/in0/queues/rx-{i}" for i in range(queues)]
        many = f"numrxqueues {queues} numtxqueues {queues}"
        ip(f"link add in0 {many} type veth peer name out0 {many} netns {clients.path}")
        take_addresses("in0", SERVER)
        with clients.entered():
            take_addresses("out0", CLIENT)

    def steer_packets(self, *cpus: Sequence[int]) -> None:
        """Each queue's to its CPUs."""
        for queue, mine in zip(self._queues, cpus, strict=True):
            (queue / "rps_cpus").write_text(f"{sum(1 << cpu for cpu in mine):x}")


StartLink = Callable[[int], Link]


@pytest.fixture
def link(netns: Netns, tmp_path: Path) -> Iterator[StartLink]:
    """A pair with so many queues."""
    with ExitStack() as stack:
        sysfs = stack.enter_context(_own_sysfs(tmp_path))
        clients = Namespace(stack)
        yield lambda queues: Link(queues, sysfs, clients)


@contextmanager
def _own_sysfs(at: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "sysfs", "sysfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@both_backends
def test_all_packets_to_one_cpu(link: StartLink, backend: str) -> None:
    pair = link(1)
    with Harness(backend, "cpu", *KINDS.values(), workers=len(CPUS)).serving() as harness:
        for slot in range(len(CPUS)):
            pair.steer_packets([cpu_of(harness, slot)])
            with pair.clients.entered():
                assert count_everywhere(harness, 10) == {slot: 40}


@both_backends
def test_packets_to_all_cpus(link: StartLink, backend: str) -> None:
    pair = link(1)
    pair.steer_packets(CPUS)
    assert_each_at_its_cpu(pair.clients, backend, CPUS)


@both_backends
def test_several_queues_each_to_its_cpu(link: StartLink, backend: str) -> None:
    pair = link(len(CPUS))
    pair.steer_packets(*([cpu] for cpu in reversed(CPUS)))
    assert_each_at_its_cpu(pair.clients, backend, CPUS)


@both_backends
def test_packets_to_half_of_the_cpus(link: StartLink, backend: str) -> None:
    """Several queues, each to two CPUs. A veth takes its first two for one, its last for none."""
    pair = link(4)
    pair.steer_packets(ODD[:2], ODD[2:], ODD[:2], ODD[2:])
    assert_each_at_its_cpu(pair.clients, backend, ODD)
