"""The sockets of the machine, read in the kernel by the programs of bpf/inspect.c."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from typing import NamedTuple

from steer import abi
from steer.errors import KernelError, VerifierError
from steer.loader import compile as compiler
from steer.loader import tracing
from steer.loader.bpf_maps import Map
from steer.loader.btf import TYPEDEF, KernelTypes
from steer.loader.libbpf import Closed
from steer.loader.programs import Program
from steer.policy.bytecode import Code

FIELDS: Mapping[str, str] = {
    "file_inode": "file.f_inode",
    "file_private_data": "file.private_data",
    "inode_mode": "inode.i_mode",
    "inode_number": "inode.i_ino",
    "socket_file": "socket.file",
    "socket_sk": "socket.sk",
    "socket_inode": "socket_alloc.vfs_inode",
    "family": "sock_common.skc_family",
    "state": "sock_common.skc_state",
    "reuseport_bit": "sock_common.skc_reuseport",
    "v6only_bit": "sock_common.skc_ipv6only",
    "device": "sock_common.skc_bound_dev_if",
    "netns": "sock_common.skc_net.net",
    "port": "sock_common.skc_num",
    "address4": "sock_common.skc_rcv_saddr",
    "address6": "sock_common.skc_v6_rcv_saddr",
    "cookie": "sock_common.skc_cookie",
    "protocol": "sock.sk_protocol",
    "uid": "sock.sk_uid",
    "socket": "sock.sk_socket",
    "queued": "sock.sk_ack_backlog",
    "backlog": "sock.sk_max_ack_backlog",
    "memory": "sock.sk_backlog.rmem_alloc",
    "memory_limit": "sock.sk_rcvbuf",
    "drops": "sock.sk_drops",
    "more_drops": "sock.sk_drop_counters",
    "second_drops": "numa_drop_counters.drops1",
    "group": "sock.sk_reuseport_cb",
    "cgroup": "sock.sk_cgrp_data.cgroup",
    "mptcp_first": "mptcp_sock.first",
    "netns_number": "net.ns.inum",
    "group_program": "sock_reuseport.prog",
    "group_sockets": "sock_reuseport.num_socks",
    "group_by_cpu": "sock_reuseport.incoming_cpu",
    "program_kind": "bpf_prog.type",
    "program_tag": "bpf_prog.tag",
    "program_aux": "bpf_prog.aux",
    "program_classic": "bpf_prog.orig_prog",
    "classic_length": "sock_fprog_kern.len",
    "classic_filter": "sock_fprog_kern.filter",
    "aux_id": "bpf_prog_aux.id",
    "aux_user": "bpf_prog_aux.user",
    "aux_load_time": "bpf_prog_aux.load_time",
    "aux_name": "bpf_prog_aux.name",
    "user_uid": "user_struct.uid",
    "cgroup_node": "cgroup.kn",
    "node_id": "kernfs_node.id",
    "task_signal": "task_struct.signal",
    "signal_pids": "signal_struct.pids",
    "pid_level": "pid.level",
    "pid_numbers": "pid.numbers",
}
"""Struct steer_offsets of bpf/tracing.h, in its order. The size of `_PID_NUMBER` follows."""
_PID_NUMBER = "upid"
"""The structure that holds the number of a process in one pid namespace."""
_BIT_FIELDS = ("reuseport_bit", "v6only_bit")
_OPTIONAL = ("more_drops", "second_drops", "cgroup", "mptcp_first", "group_by_cpu")
"""Fields that not every kernel has, and that can be left out."""
_NOWHERE = 0xFFFFFFFF
_TCP_END = 1
_INSN_BYTES, _CLASSIC_MOST = 8, 4064
"""The output for one socket has to fit into 32 kB, see bpf_seq_read() of kernel/bpf/bpf_iter.c."""
_ADDRESS = struct.Struct("=Q")
_HOLDER = struct.Struct("=QQ")


class KernelSocket(NamedTuple):
    """Mirrors struct steer_socket: a socket, and a process that holds it (pid 0: not looked up)."""

    address: int
    inode: int
    cookie: int
    group: int
    program: int
    loaded_ns: int
    cgroup: int
    pid: int
    fd: int
    netns: int
    uid: int
    device: int
    queued: int
    backlog: int
    memory: int
    memory_limit: int
    drops: int
    program_id: int
    program_kind: int
    program_uid: int
    family: int
    protocol: int
    port: int
    members: int
    by_cpu: int
    classic_length: int
    state: int
    is_reuseport: int
    is_v6only: int
    ip: bytes
    tag: bytes
    name: bytes


class Look(Closed):
    """Looks at sockets, until it is closed.

    Raises:
        VerifierError, KernelError: not permitted, or the kernel does not support it.
    """

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._types = stack.enter_context(KernelTypes())
            self._codes = compiler.load(compiler.sources() / "inspect.c").programs
            offsets = stack.enter_context(Map("offsets"))
            offsets.put(0, pack_offsets(self._types))
            self._maps = {"offsets": offsets}
            self._stack = stack.pop_all()

    def in_this_netns(self, known: Set[int] = frozenset()) -> Iterator[KernelSocket]:
        """The TCP listeners and bound UDP sockets of the network namespace that we are in, even
        if no process holds them.

        Args:
            known: kernel addresses of sockets to leave out.

        Raises:
            KernelError
        """
        for protocol in ("tcp", "udp"):
            if not self._addresses(protocol) <= known:
                with self._iterator(protocol, protocol) as program:
                    yield from _sockets(tracing.output(program), known)

    def _addresses(self, protocol: str) -> Set[int]:
        """The kernel addresses of all such sockets. Raises KernelError."""
        found: set[int] = set()
        with self._iterator(f"{protocol}_addresses", protocol) as program:
            for chunk in tracing.output(program):
                found.update(address for (address,) in _ADDRESS.iter_unpack(chunk))
                if _TCP_END in found:
                    break
        return found - {_TCP_END}

    def again_and_again(self, protocol: str) -> Glance:
        """Looks at those of one protocol, "tcp" or "udp", at little cost and even after this is
        closed. Raises KernelError."""
        return Glance(self._iterator(protocol, protocol))

    def held(self) -> Iterator[KernelSocket]:
        """Such sockets of every network namespace, once for each descriptor that a process has.
        Raises KernelError."""
        with self._iterator("task_file", "task_file") as program:
            yield from _sockets(tracing.output(program))

    def holders(self, programs: Collection[int]) -> Mapping[int, Set[int]]:
        """The processes that have a descriptor of a program, by the program's kernel address.
        Raises KernelError."""
        found: dict[int, set[int]] = {program: set() for program in programs}
        with ExitStack() as stack:
            wanted = stack.enter_context(Map("wanted", max(1, len(programs))))
            for program in programs:
                wanted.put(program, bytes(4))
            looking = stack.enter_context(self._iterator("holders", "task_file", wanted=wanted))
            for chunk in tracing.output(looking):
                for program, pid in _HOLDER.iter_unpack(chunk):
                    found[program].add(pid)
        return found

    def classic(self, found: KernelSocket) -> bytes:
        """The classic program of a socket's group: an array of struct sock_filter.

        No system call reads it: SO_GET_FILTER reads that of a socket (sk_get_filter() of
        net/core/filter.c), and a classic program has no number. But the kernel keeps the
        instructions that it was given (bpf_prog_store_orig_filter()).

        Raises:
            KernelError
        """
        act, length = "read a classic program", found.classic_length * _INSN_BYTES
        if found.classic_length > _CLASSIC_MOST:
            cause = f"it has {found.classic_length} instructions, {_CLASSIC_MOST} at most are read"
            raise KernelError(act, cause)
        with Map("wanted") as wanted:
            wanted.put(found.program, bytes(4))
            over = "tcp" if found.protocol == socket.IPPROTO_TCP else "udp"
            with self._iterator("classic", over, wanted=wanted) as program:
                for chunk in tracing.output(program):
                    if len(chunk) >= length:
                        return chunk[:length]
        raise KernelError(act, "the group does not have it any more", "try again")

    def count(self, protocol: str, most: int) -> Count:
        """Begin to count.

        Args:
            protocol: "tcp" or "udp".
            most: limit of sockets.

        Raises:
            KernelError
        """
        return Count(protocol, self._types, self._codes, self._maps, most)

    def _iterator(self, name: str, over: str, **maps: Map) -> Program:
        maps = {**self._maps, **maps}
        return tracing.iterator(f"steer_{name}", over, self._codes[name], maps, self._types)

    def close(self) -> None:
        self._stack.close()


class Glance(Closed):
    """Looks at sockets with a program that is loaded once.

    Args:
        program: an iterator. It is closed with this.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    def in_this_netns(self) -> Iterator[KernelSocket]:
        """As `Look.in_this_netns`, one at a time. Who has seen enough TCP listeners should stop:
        after the last one the kernel goes through the table of all connections, which takes 10 ms
        or more even if it is empty. Raises KernelError."""
        return _sockets(tracing.output(self._program, abi.SOCKET.size))

    def close(self) -> None:
        self._program.close()


class Count(Closed):
    """Counts what each socket gets, until it is closed: the connections that are established at
    each TCP listener, or the datagrams put into the receive queue of each UDP socket.

    It marks the sockets in socket storage, which connections inherit. The marks go with the map.

    Raises:
        VerifierError, KernelError
    """

    def __init__(
        self,
        protocol: str,
        types: KernelTypes,
        codes: Mapping[str, Code],
        maps: Mapping[str, Map],
        most: int,
    ) -> None:
        mark, counting = _PROGRAMS[protocol]
        with ExitStack() as stack:
            self._counts = stack.enter_context(Map("accepted", max(1, most)))
            marks = stack.enter_context(Map("marks"))
            maps = {**maps, "marks": marks, "accepted": self._counts}
            self._program = stack.enter_context(counting(codes, maps, types))
            self._marking = stack.enter_context(
                tracing.iterator(f"steer_{mark}", protocol, codes[mark], maps, types)
            )
            stack.enter_context(tracing.Attached(self._program))
            self._stack = stack.pop_all()

    def add_this_netns(self) -> None:
        """Count at the sockets of the network namespace that we are in. Raises KernelError."""
        for _ in tracing.output(self._marking):
            return  # over TCP, the first output comes after the last listener

    def so_far(self) -> Mapping[int, int]:
        """The counts by kernel address of the socket. Raises KernelError."""
        return {
            address: int.from_bytes(number, sys.byteorder)
            for address, number in self._counts.items()
        }

    def missed(self) -> int:
        """How many events were missed: the kernel does not run a program in an interrupt that comes
        while the program runs on the same CPU."""
        return self._program.missed_runs()

    def close(self) -> None:
        self._stack.close()


def _accepted(codes: Mapping[str, Code], maps: Mapping[str, Map], types: KernelTypes) -> Program:
    """Raises KernelError."""
    name = "steer_accepted"
    try:
        return tracing.tracepoint(name, "inet_sock_set_state", codes["accepted"], maps, types)
    except VerifierError as error:
        raise _uncounted("connections", error) from None


def _received(codes: Mapping[str, Code], maps: Mapping[str, Map], types: KernelTypes) -> Program:
    """The tracepoint needs no ftrace, but is not there before Linux 6.3. Since Linux 6.18 the
    function may only hand a datagram to another CPU, which may drop it. Raises KernelError."""
    try:
        if types.has(f"btf_trace_{_READABLE}", TYPEDEF):
            return tracing.tracepoint("steer_readable", _READABLE, codes["readable"], maps, types)
        return tracing.after("steer_received", _ENQUEUE, codes["received"], maps, types)
    except VerifierError as error:
        raise _uncounted("datagrams", error) from None


def _uncounted(what: str, error: VerifierError) -> KernelError:
    cause = "this kernel lets no program find the mark of a socket"
    return KernelError(f"count {what}", cause, "use Linux 5.11 or later", errno=error.errno)


_READABLE = "sk_data_ready"
"""The tracepoint of sock_def_readable(), which the kernel calls once for each datagram."""
_ENQUEUE = "__udp_enqueue_schedule_skb"
"""The function of net/ipv4/udp.c that puts a datagram into the receive queue of a socket."""
_Counting = Callable[[Mapping[str, Code], Mapping[str, Map], KernelTypes], Program]
_PROGRAMS: Mapping[str, tuple[str, _Counting]] = {
    "tcp": ("mark", _accepted),
    "udp": ("mark_udp", _received),
}
"""The iterator that marks sockets, and how the program that counts is loaded."""


def pack_offsets(types: KernelTypes) -> bytes:
    """Struct steer_offsets of this kernel.

    Raises:
        KernelError: the kernel has no such field.
    """
    numbers = [_offset(types, name, path) for name, path in FIELDS.items()]
    numbers.append(types.size_bytes(_PID_NUMBER) or _NOWHERE)
    return struct.pack(f"={abi.OFFSETS}I", *numbers)


def _offset(types: KernelTypes, name: str, path: str) -> int:
    structure, _, field = path.partition(".")
    bits = types.offset_bits(structure, field)
    if bits is None:
        if name in _OPTIONAL:
            return _NOWHERE
        act = f"find {path} in the kernel's types"
        raise KernelError(act, "ENOENT", "this kernel is not known yet", errno=errno.ENOENT)
    return bits if name in _BIT_FIELDS else bits // 8


def _sockets(chunks: Iterable[bytes], known: Container[int] = ()) -> Iterator[KernelSocket]:
    for chunk in chunks:
        for fields in abi.SOCKET.iter_unpack(chunk):
            if fields[0] == _TCP_END:
                return
            if fields[0] not in known:
                yield KernelSocket._make(fields)
