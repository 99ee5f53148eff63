"""What the machine is, told by the kernel itself and not by steer; and what tests need of it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from steer.linux import topology
from steer.policy.builtin import CBPF, EBPF
from steer.policy.cpus import Topology
from testkit.harness import CPUS, PORT, Harness, pinned
from testkit.namespaces import in_network_namespace, network_namespace
from testkit.processes import eventually

PROCESSORS = Path("/sys/devices/system/cpu")
NODE_OF = {
    cpu: int(next(PROCESSORS.glob(f"cpu{cpu}/node[0-9]*"), Path("node0")).name[4:]) for cpu in CPUS
}
NODES = {
    node: [cpu for cpu in CPUS if NODE_OF[cpu] == node] for node in sorted({*NODE_OF.values()})
}

EVEN, ODD = CPUS[0::2], CPUS[1::2]

eight_cpus = pytest.mark.skipif(len(CPUS) < 8, reason=f"needs 8 CPUs: {len(CPUS)}")
both_backends = pytest.mark.parametrize("backend", [EBPF, CBPF])
two_nodes = pytest.mark.skipif(len(NODES) < 2, reason=f"needs 2 NUMA nodes: {len(NODES)}")


# CPUs


@contextmanager
def allowed(cpus: Sequence[int]) -> Iterator[Topology]:
    """The machine as a process sees it that may run on these only, as under taskset(1)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield topology.read()
    finally:
        os.sched_setaffinity(0, before)


def served_by(harness: Harness, number: int = 3) -> dict[int, int]:
    """For each CPU the one whose worker gets what comes in there, at every bind."""
    return {cpu: _served_by(harness, cpu, number) for cpu in CPUS}


def _served_by(harness: Harness, cpu: int, number: int) -> int:
    with pinned(cpu):
        counts = [harness.count(number, bind) for bind in range(len(harness.binds))]
    [slot] = {slot for each in counts for slot in each}
    return cpu_of(harness, slot)


def assert_near(served: Mapping[int, int], manned: Collection[int]) -> None:
    """Each CPU is served by its own worker; without one, by those of its node in equal parts; if
    there are none, by those that serve the fewest others."""
    strays = [cpu for cpu in served if cpu not in manned]
    load = Counter(served[cpu] for cpu in strays)
    assert {cpu: served[cpu] for cpu in manned} == {cpu: cpu for cpu in manned}
    for cpus in NODES.values():
        mine, own = set(cpus).intersection(manned), set(cpus).intersection(strays)
        if mine:
            dealt = Counter(served[cpu] for cpu in own)
            assert set(dealt) <= mine
            assert max(dealt[cpu] for cpu in mine) - min(dealt[cpu] for cpu in mine) <= 1
        else:
            assert max(load[served[cpu]] for cpu in own) - min(load[cpu] for cpu in manned) <= 1


def cpu_of(harness: Harness, slot: int) -> int:
    cpu = harness.plan.specs[slot].cpu
    assert cpu is not None
    return cpu


# Networks

SERVER = ("10.77.0.1", "fd77::1")
CLIENT = ("10.77.0.2", "fd77::2")
KINDS = {
    "tcp4": f"{SERVER[0]}:{PORT}",
    "tcp6": f"[{SERVER[1]}]:{PORT}",
    "udp4": f"udp://{SERVER[0]}:{PORT}",
    "udp6": f"udp://[{SERVER[1]}]:{PORT}",
}
"""Where the servers of these tests are: never on loopback."""
TCP_KINDS = KINDS["tcp4"], KINDS["tcp6"]


class Namespace:
    """Another network namespace, for clients. Sockets stay in the one they were made in."""

    def __init__(self, stack: ExitStack) -> None:
        with network_namespace():
            self.fd = _open_own()
        stack.callback(os.close, self.fd)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        with in_network_namespace(self.fd):
            yield


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def ip(*commands: str) -> None:
    """Commands of ip(8), in this thread's network namespace."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


def take_addresses(name: str, addresses: Sequence[str]) -> None:
    """Up, and with addresses that can be used at once."""
    four, six = addresses
    ip(
        f"address add {four}/24 dev {name}",
        f"address add {six}/64 dev {name} nodad",
        f"link set {name} up",
    )


# Connections


def count_everywhere(harness: Harness, number: int) -> dict[int, int]:
    """How many each slot gets when so many are sent to each bind."""
    return dict(sum((harness.count(number, bind) for bind in range(len(harness.binds))), Counter()))


@dataclass(frozen=True)
class Arrival:
    """A connection: the slot that got it, and the CPU that took it in, as the kernel says."""

    slot: int
    cpu: int


def arrivals(harness: Harness, number: int, bind: int = 0) -> list[Arrival]:
    """Of connections made now.

    Those that had to begin twice are not among them: what is sent again may take another way.
    """
    with ExitStack() as stack:
        clients = [stack.enter_context(harness.send(harness.binds[bind])) for _ in range(number)]
        steady = {sock.getsockname()[:2] for sock in clients if not _retransmitted(sock)}
        found: dict[tuple[str, int], Arrival] = {}
        eventually(lambda: found.update(_accepted(harness, bind)) or len(found) == number)
    return [arrival for peer, arrival in found.items() if peer in steady]


def assert_each_at_its_cpu(clients: Namespace, backend: str, cpus: Sequence[int]) -> None:
    """Nobody decides where a connection comes in, but who gets it is decided by that."""
    with Harness(backend, "cpu", *TCP_KINDS, workers=len(CPUS)).serving() as harness:
        for bind in range(len(TCP_KINDS)):
            with clients.entered():
                found = arrivals(harness, 60, bind)
            for each in found:
                assert cpu_of(harness, each.slot) == each.cpu
            seen = {each.cpu for each in found}
            assert seen <= set(cpus)
            assert len(seen) > len(cpus) // 2, "on half of them by chance: once in a million times"


def _accepted(harness: Harness, bind: int) -> Iterator[tuple[tuple[str, int], Arrival]]:
    for slot, listeners in harness.sockets.items():
        with suppress(BlockingIOError):
            while True:
                accepted, peer = listeners[bind].accept()
                with accepted:
                    cpu = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU)
                yield peer[:2], Arrival(slot, cpu)


_TOTAL_RETRANS = 100
"""Offset of tcpi_total_retrans in struct tcp_info (linux/tcp.h)."""


def _retransmitted(sock: socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANS + 4)
    (number,) = struct.unpack_from("I", info, _TOTAL_RETRANS)
    return int(number)
