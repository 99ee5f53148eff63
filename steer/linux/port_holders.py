"""Finds the processes that hold a port of this network namespace, by /proc."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

from steer.linux.processes import all_pids, command, inode_of, read_bytes
from steer.linux.procfs import EVERYTHING, Files

Protocol = Literal["tcp", "udp"]


class Holder(msgspec.Struct, frozen=True):
    """A process that has a socket on a port.

    Args:
        pid, command: None if the process could not be found.
        uid: the user who made the socket.
        address: what the socket is bound to, without the port.
    """

    pid: int | None
    command: str | None
    uid: int
    inode: int
    address: str

    def __str__(self) -> str:
        if self.pid is None:
            return f"a process of uid {self.uid} that cannot be seen from here"
        return f"{self.command or '?'} (pid {self.pid})"


class Bound(msgspec.Struct, frozen=True):
    """A line of /proc/net/tcp or udp, with the address as inet_pton(3) packs it."""

    ip: bytes
    port: int
    waiting: bool
    uid: int
    inode: int


def holders(
    protocol: Protocol,
    address: str,
    port: int,
    root: str = "/proc",
    except_inodes: frozenset[int] = frozenset(),
) -> list[Holder]:
    """The processes that hold a port, at this address or one that overlaps it.

    The likeliest cause of an EADDRINUSE comes first: the same address, then a wildcard of its
    family, then a wildcard of the other family. The last is listed even if it is IPV6_V6ONLY,
    which /proc does not show. Connections and connected UDP sockets are listed only if no other
    socket is there. /proc does not list TCP sockets that are bound but do not listen.

    Args:
        address: an IP address; "" for any.
        except_inodes: inodes of sockets to leave out. Finding the process of a socket takes far
            longer than finding the socket.
    """
    wanted = _pack(address)
    table = [bound for bound in bound_sockets(protocol, root) if bound.port == port and bound.inode]
    found = [bound for bound in table if _overlap(wanted, bound.ip) is not None]
    found = [bound for bound in found if bound.waiting] or found
    found = [bound for bound in found if bound.inode not in except_inodes]
    found.sort(key=lambda bound: _overlap(wanted, bound.ip) or 0)
    pids = _pids_of({bound.inode for bound in found}, root) if found else {}
    return [_holder(bound, pid, root) for bound in found for pid in pids.get(bound.inode, (None,))]


def _holder(bound: Bound, pid: int | None, root: str) -> Holder:
    family = socket.AF_INET if len(bound.ip) == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, bound.ip)
    return Holder(pid, command(pid, root) if pid else None, bound.uid, bound.inode, address)


def _overlap(wanted: bytes, held: bytes) -> int | None:
    """How two addresses overlap. 0: they are equal; 1: one is a wildcard; 2: one is a dual-stack
    wildcard; None: they do not overlap."""
    if wanted == held:
        return 0
    either_any = not any(wanted) or not any(held)
    if len(wanted) == len(held):
        return 1 if either_any else None
    six = wanted if len(wanted) == 16 else held
    return 2 if not any(six) else None


_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"  # include/net/tcp_states.h


def bound_sockets(protocol: Protocol, root: str) -> Iterator[Bound]:
    """The lines of /proc/net/tcp and tcp6, or udp and udp6 (proc_pid_net(5))."""
    waiting = _TCP_LISTEN if protocol == "tcp" else _UDP_UNCONNECTED
    for name in (protocol, f"{protocol}6"):
        try:
            lines = read_bytes(f"{root}/net/{name}").decode().splitlines()[1:]
        except FileNotFoundError:  # no IPv6 in this kernel
            continue
        for line in lines:
            _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
            ip, _, port = local.partition(":")
            yield Bound(_unhex(ip), int(port, 16), state == waiting, int(uid), int(inode))


def _unhex(ip: str) -> bytes:
    """The kernel prints each 32 bits of the address as a number of its own byte order."""
    words = (int(ip[at : at + 8], 16) for at in range(0, len(ip), 8))
    return _unmapped(b"".join(struct.pack("=I", word) for word in words))


def _pack(address: str) -> bytes:
    if ":" not in address:
        return socket.inet_pton(socket.AF_INET, address or "0.0.0.0")
    return _unmapped(socket.inet_pton(socket.AF_INET6, address.partition("%")[0]))


def _unmapped(ip: bytes) -> bytes:
    """An IPv4-mapped IPv6 address (RFC 4291, 2.5.5.2) is an IPv4 one to bind(2)."""
    return ip.removeprefix(bytes(10) + b"\xff\xff") if len(ip) == 16 else ip


def _pids_of(inodes: set[int], root: str) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for pid in sorted(all_pids(root)):
        try:
            mine = inodes & {inode for _, inode in _all_sockets(f"{root}/{pid}")}
        except OSError:  # the process has ended, or may not be examined
            continue
        for inode in mine:
            found[inode] = (*found.get(inode, ()), pid)
    return found


def _all_sockets(directory: str) -> Iterator[tuple[int, int]]:
    """All sockets of a process, without a limit, as this runs only if a port is taken. Raises
    OSError."""
    for fd, target in Files(most_reads=EVERYTHING).open_files(directory):
        yield fd, inode_of(target)
