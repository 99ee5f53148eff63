"""`cpu` behind a network card with a receive queue for each CPU: virtio-net, as VMs have it.

The card is the VM's first, clients are behind its second, in a network namespace of their own;
outside, the two are at one bridge. Queues are bound to CPUs by their interrupts.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.linux import nic
from steer.linux.topology import parse_cpulist
from testkit.capabilities import do_without
from testkit.harness import CPUS, Harness
from testkit.processes import eventually
from vm.tests.machine import (
    CLIENT,
    EVEN,
    KINDS,
    ODD,
    SERVER,
    Namespace,
    assert_each_at_its_cpu,
    both_backends,
    count_everywhere,
    cpu_of,
    eight_cpus,
    take_addresses,
)

pytestmark = [eight_cpus, pytest.mark.needs("bpf", "root")]

NET = Path("/sys/class/net")
IRQ = Path("/proc/irq")


def virtio_cards() -> dict[str, int]:
    """Names, and how many receive queues each has."""
    subprocess.run(["modprobe", "--quiet", "virtio_net"], check=False)
    return {
        card.parent.name: len([*card.parent.glob("queues/rx-*")])
        for card in NET.glob("*/device")
        if os.path.basename(os.readlink(card / "driver")) == "virtio_net"
    }


class Card:
    """The one with the queues; it has the servers' addresses."""

    def __init__(self, name: str, clients: Namespace) -> None:
        self.name = name
        self.clients = clients
        self.irqs = _input_irqs(os.path.basename(os.path.realpath(NET / name / "device")))

    def bind_queues(self, cpus: Sequence[int]) -> None:
        """Each to its CPU, and what that CPU sends to the same queue.

        Outside, packets of a connection go to the queue that the last answer came from
        (drivers/net/tun.c): if not the same, all but the first come in on another CPU.
        """
        for queue, (irq, cpu) in enumerate(zip(self.irqs, cpus, strict=True)):
            (IRQ / str(irq) / "smp_affinity_list").write_text(str(cpu))
            (NET / self.name / f"queues/tx-{queue}/xps_cpus").write_text(f"{1 << cpu:x}")

    def move_queues(self, cpus: Sequence[int]) -> None:
        """Bind them, and wait until that holds.

        The next interrupt still comes where it did, and moves for the time to come
        (kernel/irq/migration.c), so packets are sent until all have.
        """
        self.bind_queues(cpus)
        wanted = dict(zip(self.irqs, cpus, strict=True))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
            sink.bind((SERVER[0], 9))
            eventually(lambda: self._effective_after_packets() == wanted)

    def _effective_after_packets(self) -> Mapping[int, int]:
        """Chance has it to which queue each goes."""
        with self.clients.entered():
            for _ in range(len(CPUS)):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.sendto(b"x", (SERVER[0], 9))
        text = {irq: (IRQ / str(irq) / "effective_affinity_list").read_text() for irq in self.irqs}
        return {irq: parse_cpulist(each)[0] for irq, each in text.items()}


def _input_irqs(device: str) -> list[int]:
    """By queue. "52: 0 0 PCI-MSI 196609-edge virtio10-input.0"."""
    found = re.findall(
        rf"^ *(\d+):.* {device}-input\.(\d+)$", Path("/proc/interrupts").read_text(), re.MULTILINE
    )
    return [int(irq) for irq, _ in sorted(found, key=lambda each: int(each[1]))]


@pytest.fixture(scope="module")
def card() -> Iterator[Card]:
    queues = virtio_cards()
    many = [name for name, number in queues.items() if number >= len(CPUS)]
    if not many or len(queues) < 2:
        do_without(f"needs two virtio-net cards, one with {len(CPUS)} queues: {queues}")
    name = many[0]
    other = next(each for each in queues if each != name)
    with ExitStack() as stack:
        clients = Namespace(stack)
        subprocess.run(["ip", "link", "set", other, "netns", clients.path], check=True)
        stack.callback(subprocess.run, ["ip", "address", "flush", "dev", name], check=True)
        take_addresses(name, SERVER)
        with clients.entered():
            take_addresses(other, CLIENT)
        yield Card(name, clients)
    # The kernel puts the other back once nobody has the namespace open any more.
    eventually(lambda: (NET / other).exists())


@both_backends
def test_all_queues_bound_to_one_cpu(card: Card, backend: str) -> None:
    with Harness(backend, "cpu", *KINDS.values(), workers=len(CPUS)).serving() as harness:
        for slot in range(len(CPUS)):
            card.move_queues([cpu_of(harness, slot)] * len(card.irqs))
            with card.clients.entered():
                assert count_everywhere(harness, 10) == {slot: 40}


@pytest.mark.parametrize(
    "cpus",
    [CPUS, CPUS[::-1], EVEN * 2, ODD * 2],
    ids=["forward", "reverse", "even", "odd"],
)
@both_backends
def test_each_queue_bound_to_its_cpu(card: Card, backend: str, cpus: Sequence[int]) -> None:
    card.move_queues(cpus)
    assert_each_at_its_cpu(card.clients, backend, sorted({*cpus}))


def test_doctor_is_told_where_packets_come_in(card: Card) -> None:
    for cpus in (CPUS, CPUS[:2] * 4, CPUS[5:6] * 8):
        card.bind_queues(cpus)
        assert_doctor_is_told(card, cpus)  # before the first packet came there
        card.move_queues(cpus)
        assert_doctor_is_told(card, cpus)


def assert_doctor_is_told(card: Card, cpus: Sequence[int]) -> None:
    [found] = [each for each in nic.receive_queues() if each.name == card.name]
    assert (found.driver, found.channels) == ("virtio_net", len(CPUS))
    assert nic.cpus_taking_packets(found) == frozenset(cpus)
