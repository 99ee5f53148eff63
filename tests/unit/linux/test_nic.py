"""Queues and interrupts of network cards, read from a sysfs of the test's own."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from steer.linux import nic
from steer.linux.nic import Interface

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
