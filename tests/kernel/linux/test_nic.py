"""Network cards: real ones in namespaces of the tests' own, made sysfs trees for cards that are
not here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from steer.linux import nic
from steer.linux.nic import Interface
from testkit import ROOT


@contextmanager
def away(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a network namespace, and a sysfs, of its own; both go when it ends."""
    mount = 'mount -t sysfs sysfs /sys && exec "$@"'
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-ec", mount, "sh", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ---- which CPUs take packets

CARD = Interface("eth0", "ixgbe", 2, irq_cpus=(4, 5), rps=((), ()))
VIRTUAL = Interface("veth0", None, 2, irq_cpus=(), rps=((), ()))


@pytest.mark.parametrize(
    ("interface", "cpus"),
    [
        (CARD, {4, 5}),
        (Interface("eth0", "ixgbe", 2, (4, 5), rps=((0, 1), (1, 2))), {0, 1, 2}),
        (Interface("eth0", "ixgbe", 2, (4, 5), rps=((0,), ())), {0, 4, 5}),
        (Interface("eth0", "ixgbe", None, (4,), rps=()), {4}),
        (VIRTUAL, None),
        (Interface("veth0", None, 2, (), rps=((0,), (3,))), {0, 3}),
        (Interface("veth0", None, 2, (), rps=((0,), ())), None),
        (Interface("lo", None, None, (), rps=((),)), None),
        (Interface("eth0", "ixgbe", 2, (), rps=()), None),
    ],
)
def test_cpus_taking_packets(interface: Interface, cpus: set[int] | None) -> None:
    assert nic.cpus_taking_packets(interface) == cpus


# ---- network cards, as sysfs and /proc/interrupts show them


class Machine:
    """A made sysfs and procfs with one card, called as the first interface of this machine so
    that its index is a real one."""

    def __init__(self, at: Path) -> None:
        self.at = at
        index, self.name = socket.if_nameindex()[0]
        self.directory = at / "sys/class/net" / self.name
        self.write(self.directory / "ifindex", f"{index}\n")
        self.interrupts = ["            CPU0       CPU1"]

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def device(self, path: str, driver: str) -> Path:
        device = self.at / "sys/devices" / path
        device.mkdir(parents=True)
        (self.directory / "device").symlink_to(device)
        (device / "driver").symlink_to(f"../drivers/{driver}")
        return device

    def irq(self, number: int, action: str, cpus: str, effective: str = "") -> None:
        self.interrupts.append(f" {number:3}:          1          2  PCI-MSI  1-edge  {action}")
        self.write(self.at / f"proc/irq/{number}/smp_affinity_list", f"{cpus}\n")
        self.write(self.at / f"proc/irq/{number}/effective_affinity_list", f"{effective}\n")

    def found(self) -> Interface:
        rest = ["NMI:          0          0   Non-maskable interrupts", "ERR:          0", ""]
        self.write(self.at / "proc/interrupts", "\n".join([*self.interrupts, *rest]))
        return nic.receive_queues(str(self.at / "sys"), str(self.at / "proc"))[0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_queues_named_after_the_interface(machine: Machine) -> None:
    machine.device("0000:3b:00.0", "ixgbe")
    machine.irq(30, f"{machine.name}-TxRx-0", "0-7", effective="2")
    machine.irq(31, f"{machine.name}-TxRx-1", "0-7", effective="3")
    machine.irq(32, f"{machine.name}", "0-7", effective="6")
    machine.irq(33, f"{machine.name}1-TxRx-0", "0-7", effective="7")
    machine.irq(34, f"v{machine.name}-TxRx-0", "0-7", effective="7")
    found = machine.found()
    assert (found.driver, found.irq_cpus, found.note) == ("ixgbe", (2, 3), "")


def test_queue_bound_elsewhere_since_its_last_interrupt(machine: Machine) -> None:
    """Until the next, the kernel tells where the last one was handled."""
    machine.device("0000:3b:00.0", "igb")
    machine.irq(30, f"{machine.name}-rx-0", "5", effective="0")
    assert machine.found().irq_cpus == (5,)


def test_sending_queues_do_not_count(machine: Machine) -> None:
    machine.device("0000:3b:00.0", "igb")
    machine.irq(30, f"i40e-{machine.name}-rx-0", "1")
    machine.irq(31, f"i40e-{machine.name}-tx-0", "2")
    assert machine.found().irq_cpus == (1,)


def test_virtio_queues_are_named_after_their_device(machine: Machine) -> None:
    machine.device("0000:00:03.0/virtio2", "virtio_net")
    machine.irq(37, "virtio2-config", "0")
    machine.irq(38, "virtio2-input.0", "1")
    machine.irq(39, "virtio2-output.0", "0")
    machine.irq(40, "virtio2-input.1", "5")
    machine.irq(41, "virtio20-input.0", "6")
    found = machine.found()
    assert (found.driver, found.irq_cpus) == ("virtio_net", (1, 5))


def test_interrupts_that_sysfs_lists_for_the_device(machine: Machine) -> None:
    device = machine.device("0000:3b:00.0", "ixgbe")
    for number in (30, 31):
        machine.write(device / "msi_irqs" / str(number), "msix\n")
        machine.irq(number, f"renamed-since-TxRx-{number - 30}", f"{number - 28}")
    machine.irq(32, "another-TxRx-0", "7")
    assert machine.found().irq_cpus == (2, 3)


def test_interrupts_that_sysfs_lists_above_a_virtio_device(machine: Machine) -> None:
    device = machine.device("0000:00:03.0/virtio2", "virtio_net")
    machine.write(device.parent / "msi_irqs" / "38", "msix\n")
    machine.irq(38, "input.0", "3")
    assert machine.found().irq_cpus == (3,)


def test_queues_named_after_the_pci_address(machine: Machine) -> None:
    machine.device("0000:3b:00.0", "mlx5_core")
    machine.irq(50, "mlx5_async0@pci:0000:3b:00.0", "0")
    machine.irq(51, "mlx5_comp0@pci:0000:3b:00.0", "1")
    machine.irq(52, "mlx5_comp1@pci:0000:3b:00.0", "2")
    machine.irq(53, "mlx5_comp0@pci:0000:3b:00.1", "3")
    assert machine.found().irq_cpus == (1, 2)


def test_single_interrupt(machine: Machine) -> None:
    machine.device("0000:02:00.0", "r8169")
    machine.irq(30, machine.name, "0-1", effective="1")
    assert machine.found().irq_cpus == (1,)


def test_card_whose_interrupts_are_not_known(machine: Machine) -> None:
    machine.device("3f5c1f5e-0001-4c2d", "hv_netvsc")
    machine.irq(30, "nvme0q0", "0")
    found = machine.found()
    assert (found.driver, found.irq_cpus) == ("hv_netvsc", ())
    assert nic.cpus_taking_packets(found) is None


def test_receive_packet_steering_by_queue(machine: Machine) -> None:
    machine.device("0000:02:00.0", "r8169")
    for queue, mask in {"rx-0": "0", "rx-10": "1,00000000", "rx-2": "00000003", "tx-0": ""}.items():
        machine.write(machine.directory / "queues" / queue / "rps_cpus", f"{mask}\n")
    assert machine.found().rps == ((), (0, 1), (32,))


def test_sysfs_of_another_network_namespace_is_not_believed(machine: Machine) -> None:
    machine.write(machine.directory / "ifindex", "99999\n")
    machine.write(machine.directory / "queues" / "rx-0" / "rps_cpus", "3\n")
    found = machine.found()
    assert (found.rps, found.note) == ((), "sysfs shows another network namespace")


# ---- interfaces that are here

LOOK = """
import dataclasses, json
from steer.linux import nic
found = nic.receive_queues()
cpus = {each.name: nic.cpus_taking_packets(each) for each in found}
print(json.dumps([dataclasses.asdict(each) | {"cpus": sorted(cpus[each.name] or ())}
                  for each in found]))
"""
VETH = """
ip link add v0 numrxqueues 4 numtxqueues 4 type veth peer name v1 numrxqueues 2 numtxqueues 2
echo 1 > /sys/class/net/v0/queues/rx-2/rps_cpus
echo 1 > /sys/class/net/v1/queues/rx-0/rps_cpus
echo 1 > /sys/class/net/v1/queues/rx-1/rps_cpus
exec "$@"
"""


def told_away(*argv: str) -> Any:
    with away(*argv) as process:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return json.loads(out)


@pytest.mark.needs("netns")
def test_veth_queues_and_packet_steering() -> None:
    found = told_away("sh", "-ec", VETH, "sh", sys.executable, "-c", LOOK)
    lo, v0, v1 = sorted(found, key=lambda each: str(each["name"]))
    assert (v0["name"], v0["driver"]) == ("v0", None)
    # Linux 5.10 does not tell of a veth's.
    assert (v0["channels"], v1["channels"], lo["channels"]) in ((4, 2, None), (None, None, None))
    assert (v0["rps"], v0["irq_cpus"], v0["cpus"]) == ([[], [], [0], []], [], [])
    assert v0["note"] == "no interrupts of its own: packets stay on the CPU that brought them"
    assert (v1["rps"], v1["cpus"], v1["note"]) == ([[0], [0]], [0], "")
    assert (lo["rps"], lo["cpus"]) == ([[]], [])
    assert lo["note"] == "same-host clients arrive on the CPU they run on"


ARRIVALS = """
import json, os, socket, subprocess, sys
from steer.linux import nic

SO_INCOMING_CPU = 49
client_cpu, steered_cpu = sorted(os.sched_getaffinity(0))[:2]

def arrival(server):
    with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
        client.send(b"x")
        accepted.recv(1)
        return accepted.getsockopt(socket.SOL_SOCKET, SO_INCOMING_CPU)

def told():
    (lo,) = nic.receive_queues()
    return sorted(nic.cpus_taking_packets(lo) or ())

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
os.sched_setaffinity(0, {client_cpu})
with socket.create_server(("127.0.0.1", 0)) as server:
    unsteered = told(), arrival(server)
    with open("/sys/class/net/lo/queues/rx-0/rps_cpus", "w") as mask:
        mask.write(f"{1 << steered_cpu:x}")
    steered = told(), arrival(server)
print(json.dumps([client_cpu, steered_cpu, unsteered, steered]))
"""


@pytest.mark.needs("netns")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_packets_arrive_where_it_says() -> None:
    client_cpu, steered_cpu, unsteered, steered = told_away(sys.executable, "-c", ARRIVALS)
    assert unsteered == [[], client_cpu]
    assert steered == [[steered_cpu], steered_cpu]


def test_the_interfaces_of_this_machine() -> None:
    names = [each.name for each in nic.receive_queues()]
    assert names == [name for _, name in socket.if_nameindex()]
