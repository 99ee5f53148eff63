"""What sock_diag(7), ethtool and sysfs tell of queues: those of sockets, and those of network
cards. For the short-lived commands and the tests, never the controller: importing pyroute2
costs it more than everything else together.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from steer.errors import KernelError
from steer.kernel.topology import parse_cpulist, parse_cpumask

# ---- queues of sockets


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits in a socket to be taken by its process.

    Args:
        address, port: what it is bound to.
        queued: connections not yet accepted; None for UDP.
        limit: the backlog, beyond which connections are dropped; None for UDP.
        queued_bytes: memory that received datagrams take, overhead included; None for TCP.
        limit_bytes: the receive buffer (SO_RCVBUF); None for TCP.
        drops: what was dropped since the socket was made; None from a kernel that does
            not say.
    """

    protocol: Literal["tcp", "udp"]
    address: str
    port: int
    queued: int | None
    limit: int | None
    queued_bytes: int | None
    limit_bytes: int | None
    drops: int | None


def listen_queues(netns_pid: int | None = None) -> dict[int, Queue]:
    """The TCP listeners and UDP sockets of a network namespace, by socket inode.

    UDP is missing from a kernel without CONFIG_INET_UDP_DIAG.

    Args:
        netns_pid: a process in that network namespace; None: the caller's own.

    Raises:
        KernelError: that namespace cannot be entered.
    """
    if netns_pid is None:
        return _queues()
    # setns(2) moves one thread: let it be one that ends
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_queues_in, netns_pid).result()


def _queues_in(pid: int) -> dict[int, Queue]:
    from pyroute2 import netns

    try:
        netns.setns(f"/proc/{pid}/ns/net", flags=0)
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, str(error))
        cure = "run as root" if isinstance(error, PermissionError) else ""
        raise KernelError(f"enter the network namespace of pid {pid}", cause, cure) from error
    return _queues()


_TCP_ESTABLISHED, _TCP_CLOSE, _TCP_LISTEN = 1, 7, 10  # include/net/tcp_states.h
_WAITING = {
    socket.IPPROTO_TCP: 1 << _TCP_LISTEN,
    socket.IPPROTO_UDP: 1 << _TCP_CLOSE | 1 << _TCP_ESTABLISHED,
}
_INET_DIAG_SKMEMINFO = 7  # linux/inet_diag.h


def _queues() -> dict[int, Queue]:
    from pyroute2 import DiagSocket

    found = {}
    with DiagSocket() as diag:
        diag.bind()
        for protocol, states in _WAITING.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                for message in diag.get_sock_stats(
                    family=family,
                    protocol=protocol,
                    states=states,
                    extensions=1 << (_INET_DIAG_SKMEMINFO - 1),
                ):
                    found[message["idiag_inode"]] = _queue(protocol, message)
    return found


def _queue(protocol: int, message: Any) -> Queue:
    tcp = protocol == socket.IPPROTO_TCP
    memory = _memory_info(message)
    received, room = message["idiag_rqueue"], message["idiag_wqueue"]
    return Queue(
        protocol="tcp" if tcp else "udp",
        address=message["idiag_src"],
        port=message["idiag_sport"],
        queued=received if tcp else None,
        limit=room if tcp else None,
        queued_bytes=None if tcp else received,
        limit_bytes=None if tcp else memory.get("rcvbuf"),
        drops=memory.get("drops"),
    )


def _memory_info(message: Any) -> dict[str, int]:
    """The words of linux/sock_diag.h's SK_MEMINFO_* that are of use."""
    octets = bytes.fromhex((message.get_attr("INET_DIAG_SKMEMINFO") or "").replace(":", ""))
    words = memoryview(octets).cast("I") if octets else ()
    return {name: words[at] for name, at in (("rcvbuf", 1), ("drops", 8)) if at < len(words)}


# ---- queues of network cards


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface, and where it hands in what it receives.

    Args:
        driver: None for one without a device: loopback, veth, bridges.
        channels: receive queues in use, of their own or combined; None where the driver
            does not tell.
        irq_cpus: the CPUs that take its receive interrupts; empty where none are known.
        rps: for each receive queue the CPUs that Receive Packet Steering spreads it to,
            () where it is off. Empty where sysfs shows another network namespace.
        note: what a reader should know about it, or "".
    """

    name: str
    driver: str | None
    channels: int | None
    irq_cpus: tuple[int, ...]
    rps: tuple[tuple[int, ...], ...]
    note: str = ""


def cpus_taking_packets(interface: Interface) -> frozenset[int] | None:
    """The CPUs on which packets from this interface reach the sockets, None if unknown.

    Where Receive Packet Steering is on, it and not the interrupt decides, queue by queue
    (Documentation/networking/scaling.rst).
    """
    steered = frozenset(cpu for cpus in interface.rps for cpu in cpus)
    if interface.rps and all(interface.rps):
        return steered
    if not interface.irq_cpus:
        return None
    return steered.union(interface.irq_cpus)


def receive_queues(sysfs: str = "/sys", procfs: str = "/proc") -> list[Interface]:
    """The network interfaces of the caller's network namespace."""
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


def _channels(name: str) -> int | None:
    from pyroute2.ethtool.ioctl import IoctlEthtool, NotSupportedError

    ethtool = IoctlEthtool(name)
    try:
        found = ethtool.get_channels()
    except (NotSupportedError, OSError):
        return None
    finally:
        ethtool.close()
    return int(found["rx_count"] + found["combined_count"])


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
    """Where the interrupt goes, or may go: before it was first started, and from when it is bound
    elsewhere until the next one comes, the kernel does not tell more (kernel/irq/migration.c)."""
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
    """The file's text, or "" where it is not there or may not be read."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
