"""Finds out which CPUs process the packets of each network card, by sysfs, /proc and ethtool."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from steer.linux.topology import parse_cpulist, parse_cpumask


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface, and the CPUs that process the packets it receives.

    Args:
        driver: None if it has no device, as loopback, veth and bridges.
        channels: receive queues in use, separate or combined; None if the driver does not say.
        irq_cpus: the CPUs that handle its receive interrupts; empty if none are known.
        rps: for each receive queue, the CPUs that Receive Packet Steering spreads it to, () if that
            is off. Empty if sysfs shows another network namespace.
        note: a remark for the reader, or "".
    """

    name: str
    driver: str | None
    channels: int | None
    irq_cpus: tuple[int, ...]
    rps: tuple[tuple[int, ...], ...]
    note: str = ""


def cpus_taking_packets(interface: Interface) -> frozenset[int] | None:
    """The CPUs on which packets from this interface reach the sockets; None if unknown.

    If Receive Packet Steering is on for a queue, it decides, and not the interrupt
    (Documentation/networking/scaling.rst).
    """
    steered = frozenset(cpu for cpus in interface.rps for cpu in cpus)
    if interface.rps and all(interface.rps):
        return steered
    if not interface.irq_cpus:
        return None
    return steered.union(interface.irq_cpus)


def receive_queues(sysfs: str = "/sys", procfs: str = "/proc") -> list[Interface]:
    """The interfaces of the network namespace of this process."""
    return [_interface(index, name, sysfs, procfs) for index, name in socket.if_nameindex()]


_LOOPBACK = "same-host clients arrive on the CPU they run on"
_NO_DEVICE = "no interrupts of its own: packets stay on the CPU that brought them"
_OTHER_SYSFS = "sysfs shows another network namespace"


def _interface(index: int, name: str, sysfs: str, procfs: str) -> Interface:
    directory = f"{sysfs}/class/net/{name}"
    if _read(f"{directory}/ifindex").strip() != str(index):
        return Interface(name, None, _channels(name), (), (), _OTHER_SYSFS)
    rps = _rps(f"{directory}/queues")
    if not os.path.exists(f"{directory}/device"):
        everywhere = rps and all(rps)
        note = "" if everywhere else _LOOPBACK if name == "lo" else _NO_DEVICE
        return Interface(name, None, _channels(name), (), rps, note)
    driver = _link_name(f"{directory}/device/driver")
    return Interface(name, driver, _channels(name), _irq_cpus(name, directory, procfs), rps)


_SIOCETHTOOL = 0x8946  # linux/sockios.h
_GET_CHANNELS = 0x3C  # ETHTOOL_GCHANNELS of linux/ethtool.h
_CHANNELS = struct.Struct("=9I")
"""struct ethtool_channels of linux/ethtool.h; its last are rx, tx, other and combined."""
_REQUEST = struct.Struct("16sP16x")
"""struct ifreq of netdevice(7), with a pointer to what is asked for."""


def _channels(name: str) -> int | None:
    wanted = _CHANNELS.pack(_GET_CHANNELS, *[0] * 8)
    answer = ctypes.create_string_buffer(wanted, _CHANNELS.size)
    request = _REQUEST.pack(os.fsencode(name), ctypes.addressof(answer))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            fcntl.ioctl(asking, _SIOCETHTOOL, request)
    except OSError:
        return None
    *_, receiving, _sending, _other, combined = _CHANNELS.unpack(answer.raw)
    return int(receiving + combined)


def _rps(directory: str) -> tuple[tuple[int, ...], ...]:
    try:
        names = [name for name in os.listdir(directory) if name.startswith("rx-")]
    except OSError:
        return ()
    names.sort(key=lambda name: int(name[3:]))
    return tuple(parse_cpumask(_read(f"{directory}/{name}/rps_cpus") or "0") for name in names)


# Drivers name an interrupt as they like: "eth0-TxRx-0", "virtio2-input.0",
# "mlx5_comp0@pci:0000:3b:00.0". Those that name no receive queue may all be one.
_RECEIVES = re.compile(r"rx|input|comp\d|ntfy", re.IGNORECASE)


def _irq_cpus(name: str, directory: str, procfs: str) -> tuple[int, ...]:
    device = os.path.realpath(f"{directory}/device")
    listed = _msi_irqs(device)
    named = re.compile(rf"(?<!\w)({re.escape(name)}|{re.escape(os.path.basename(device))})(?!\w)")
    actions = dict(_interrupts(procfs))
    mine = {irq for irq, action in actions.items() if irq in listed or named.search(action)}
    receiving = {irq for irq in mine if _RECEIVES.search(actions[irq])} or mine
    return tuple(sorted({cpu for irq in receiving for cpu in _affinity(irq, procfs)}))


def _msi_irqs(device: str) -> set[str]:
    """A virtio device's interrupts belong to the PCI device above it."""
    owner = os.path.dirname(device) if os.path.basename(device).startswith("virtio") else device
    try:
        return set(os.listdir(f"{owner}/msi_irqs"))
    except OSError:
        return set()


def _interrupts(procfs: str) -> Iterator[tuple[str, str]]:
    """Numbers and actions of /proc/interrupts: "38: 0 1245 PCI-MSIX 1-edge virtio2-input.0"."""
    for line in _read(f"{procfs}/interrupts").splitlines()[1:]:
        irq, _, rest = line.partition(":")
        if irq.strip().isdigit() and rest.split():
            yield irq.strip(), rest.lstrip(" 0123456789")


def _affinity(irq: str, procfs: str) -> tuple[int, ...]:
    """The CPUs that an interrupt goes to, or may go to. Before its first use, and after a change
    until the next interrupt, the kernel does not say more (kernel/irq/migration.c)."""
    directory = f"{procfs}/irq/{irq}"
    effective = parse_cpulist(_read(f"{directory}/effective_affinity_list"))
    wanted = parse_cpulist(_read(f"{directory}/smp_affinity_list"))
    return effective if effective and set(effective) <= set(wanted) else wanted


def _link_name(path: str) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return None


def _read(path: str) -> str:
    """The text of a file, or "" if it cannot be read."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
