"""What /proc tells of other processes: their children, their sockets, what they wait for.

Cheap to import: the controller asks on every tick while a worker starts. Where a
question may be refused, "could not look" is an answer of its own.

`root` is where proc(5) is mounted; tests put a made tree there.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import select
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec

from steer.errors import KernelError

Protocol = Literal["tcp", "udp"]

# ---- families of processes


def descendants(pid: int, root: str = "/proc") -> list[int]:
    """`pid` and all its descendants, parents first; empty if there is no such process.

    A child that starts or ends meanwhile may be missed (proc(5), "children").
    """
    if not os.path.exists(f"{root}/{pid}"):
        return []
    has_children_file = os.path.exists(f"{root}/{pid}/task/{pid}/children")
    children_of = _children if has_children_file else partial(_children_by_scan, _parents(root))
    family = [pid]
    for member in family:
        family.extend(children_of(member, root))
    return family


def is_descendant(pid: int, ancestor: int, root: str = "/proc") -> bool:
    """Whether `pid` is `ancestor` or descends from it, as far as its living parents tell."""
    walk: int | None = pid
    while walk and walk != ancestor:
        walk = parent(walk, root)
    return walk == ancestor


def group_outlives(leader: int, root: str = "/proc") -> bool:
    """Whether a process group has members beside its leader that have not ended."""
    for pid in _pids(root):
        stat = _stat(f"{root}/{pid}") if pid != leader else None
        if stat and int(stat[2]) == leader and stat[0] not in (b"Z", b"X"):
            return True
    return False


def start_time_ticks(pid: int, root: str = "/proc") -> int | None:
    """When the process started, in clock ticks since boot: with its pid this names one
    process for ever. None if there is no such process."""
    stat = _stat(f"{root}/{pid}")
    return int(stat[19]) if stat else None


def network_namespace(pid: int | Literal["self"] = "self", root: str = "/proc") -> tuple[int, int]:
    """The network namespace of a process, as (device, inode), which name it together.

    Raises:
        KernelError: the process is gone or is not ours to look at.
    """
    try:
        stat = os.stat(f"{root}/{pid}/ns/net")
    except OSError as error:
        cause = errno.errorcode.get(error.errno or 0, str(error))
        cure = "run as root" if isinstance(error, PermissionError) else ""
        raise KernelError(f"read the network namespace of pid {pid}", cause, cure) from error
    return stat.st_dev, stat.st_ino


def socket_inode(fd: int) -> int:
    """The inode number by which /proc and sock_diag(7) know an open socket."""
    return os.fstat(fd).st_ino


def open_sockets(pid: int, root: str = "/proc") -> set[int]:
    """The inodes of the sockets that `pid` and its descendants have open.

    Raises:
        KernelError: one of them is not ours to look at.
    """
    family = descendants(pid, root)
    return {inode for member in family for _, inode in sockets_by_fd(member, root)}


def sockets_by_fd(pid: int, root: str = "/proc") -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each socket that a process has open, in order; none if it has
    ended.

    Raises:
        KernelError: the process is not ours to look at.
    """
    directory = f"{root}/{pid}"
    try:
        for fd, target in _open_files(directory):
            if inode := _inode_of(target):
                yield fd, inode
    except PermissionError as error:
        if not _is_zombie(directory):
            cause, cure = errno.errorcode[error.errno or 0], "run as root, or as its user"
            raise KernelError(f"look at the open files of pid {pid}", cause, cure) from error
    except (FileNotFoundError, ProcessLookupError):
        return


def _children(pid: int, root: str) -> list[int]:
    found: list[int] = []
    with suppress(PermissionError):  # hidepid=1
        for task in _tasks(pid, root):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.extend(int(child) for child in _read(f"{task}/children").split())
    return found


def _parents(root: str) -> dict[int, int | None]:
    return {pid: parent(pid, root) for pid in _pids(root)}


def _children_by_scan(parents: dict[int, int | None], pid: int, root: str) -> list[int]:
    """For kernels without CONFIG_PROC_CHILDREN."""
    return [child for child, parent in parents.items() if parent == pid]


def parent(pid: int, root: str = "/proc") -> int | None:
    """Of a process; None if there is no such process."""
    stat = _stat(f"{root}/{pid}")
    return int(stat[1]) if stat else None


def _stat(directory: str) -> list[bytes] | None:
    """The fields of proc_pid_stat(5) from the third, the state, on."""
    try:
        # the second field is the command, which may hold spaces and brackets
        return _read(f"{directory}/stat").rpartition(b")")[2].split()
    except OSError:
        return None


def _pids(root: str) -> Iterator[int]:
    return (int(name) for name in os.listdir(root) if name.isdigit())


def _tasks(pid: int, root: str) -> list[str]:
    """The directories of its threads; none once it is gone."""
    try:
        return [f"{root}/{pid}/task/{tid}" for tid in os.listdir(f"{root}/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


# ---- signs of life

_STOPPED = (b"T", b"t")  # by a signal, by a debugger: proc_pid_stat(5)
_SWITCHES = re.compile(rb"^(?:non)?voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)


def activity(pid: int, root: str = "/proc", among: Collection[int] = ()) -> int:
    """A number that changes when `pid` or a descendant has done anything, 0 if there is no
    such process: the clock ticks they ran, and how often their threads were switched.

    It grows, but for threads and processes that end and take their share along: so compare
    for equality. That of a stopped or frozen process stays, that of one that sleeps too.

    Args:
        among: those of them to look at, as far as they are still there; if none is, all.
    """
    family = descendants(pid, root)
    members = [member for member in family if member in among] or family
    return sum(_process_activity(member, root) for member in members)


def _process_activity(pid: int, root: str) -> int:
    stat = _stat(f"{root}/{pid}")
    if stat is None:
        return 0
    utime, stime = stat[11:13]  # of all threads, also of those that have ended
    return int(utime) + int(stime) + sum(map(_switches, _tasks(pid, root)))


def _switches(task: str) -> int:
    try:
        return sum(map(int, _SWITCHES.findall(_read(f"{task}/status"))))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_stopped(pid: int, root: str = "/proc") -> bool:
    """Whether `pid` or a descendant is stopped, with all its threads, by SIGSTOP or a debugger.

    One process is enough: which of a worker takes the connections is not known, and the
    shell or arbiter above it runs on. So it explains why nobody takes them, and is no sign
    by itself that nobody does.
    """
    return any(_process_is_stopped(member, root) for member in descendants(pid, root))


def _process_is_stopped(pid: int, root: str) -> bool:
    stats = (_stat(task) for task in _tasks(pid, root))
    states = {stat[0] for stat in stats if stat} - {b"Z", b"X"}
    return bool(states) and states.issubset(_STOPPED)


# ---- waiting on a socket


class Seen(enum.IntEnum):
    """What a look at another process showed; max() of several looks is what they say together.

    Compare with `is`: UNKNOWN is true.
    """

    NO = 0
    UNKNOWN = 1  # it could not be looked at
    YES = 2


def waits_on(
    pid: int, inodes: frozenset[int], root: str = "/proc", machine: str = os.uname().machine
) -> Seen:
    """Whether a thread of `pid`, or of a descendant, is asleep until one of these sockets has
    something for it: how a server that never notifies is found to be ready.

    A thread waits on the sockets named by the system call it is blocked in: accept and the
    receiving calls, poll, select, and an epoll that has the socket registered. Being
    registered is not enough by itself: Tornado and Twisted register first and go on
    starting up. A thread caught running is seen to wait the next time.

    io_uring does not tell which socket a request is for: an accept pending in a process
    that has one of the sockets counts, other requests are UNKNOWN.

    Where the system call may not be read (kernel.yama.ptrace_scope 2) or its numbers are
    not known here, being registered with an epoll is taken for waiting.

    Args:
        inodes: of TCP listeners or UDP sockets, see `socket_inode`.
        machine: what uname(2) calls the processor: it decides the system call numbers.
    """
    return max(_waits(pid, inodes, root, machine).values(), default=Seen.NO)


def waiters(pid: int, inodes: frozenset[int], root: str = "/proc") -> frozenset[int]:
    """Those of `pid` and its descendants that wait, as `waits_on` has it."""
    seen = _waits(pid, inodes, root, os.uname().machine)
    return frozenset(member for member, look in seen.items() if look is Seen.YES)


def _waits(pid: int, inodes: frozenset[int], root: str, machine: str) -> dict[int, Seen]:
    calls = _BLOCKING_CALLS.get(machine)
    family = descendants(pid, root)
    return {member: _process_waits(member, inodes, root, calls) for member in family}


# from a thread's directory and the arguments of its call to the descriptors it waits for
_Fds = Callable[[str, list[int]], list[int]]


def _process_waits(
    pid: int, inodes: frozenset[int], root: str, calls: dict[int, _Fds] | None
) -> Seen:
    try:
        looks = [_task_waits(task, inodes, calls) for task in _tasks(pid, root)]
    except PermissionError:  # hidepid=1
        return Seen.UNKNOWN
    return max(looks, default=Seen.NO)


def _task_waits(task: str, inodes: frozenset[int], calls: dict[int, _Fds] | None) -> Seen:
    try:
        fds = _awaited_fds(task, calls) if calls else None
    except PermissionError:
        fds = None
    except OSError:  # gone, or its memory is
        return Seen.NO
    if fds is not None:
        return _look(task, fds, inodes)
    if _is_zombie(task):  # nobody but root may look at one
        return Seen.NO
    return max(Seen.UNKNOWN, _look(task, _anonymous(task, _EPOLL), inodes))


def _is_zombie(task: str) -> bool:
    stat = _stat(task)
    return stat is not None and stat[0] in (b"Z", b"X")


def _awaited_fds(task: str, calls: dict[int, _Fds]) -> list[int]:
    """The descriptors that the system call a thread is blocked in waits for."""
    number, *arguments = _read(f"{task}/syscall").split()
    if number == b"running" or int(number) not in calls:
        return []
    return calls[int(number)](task, [int(argument, 16) for argument in arguments])


def _look(task: str, fds: list[int], inodes: frozenset[int]) -> Seen:
    return max((_covers(task, fd, inodes) for fd in fds), default=Seen.NO)


def _covers(task: str, fd: int, inodes: frozenset[int]) -> Seen:
    """Whether a wait for this descriptor is a wait for one of the sockets."""
    try:
        target = os.readlink(f"{task}/fd/{fd}")
        if target == _EPOLL:
            return Seen.NO if inodes.isdisjoint(_registered(task, fd)) else Seen.YES
        if target == _RING:
            return _ring_covers(task, fd, inodes)
    except PermissionError:
        return Seen.UNKNOWN
    except OSError:
        return Seen.NO
    return Seen.YES if _inode_of(target) in inodes else Seen.NO


_EPOLL, _RING = "anon_inode:[eventpoll]", "anon_inode:[io_uring]"


def _anonymous(task: str, kind: str) -> list[int]:
    """The descriptors of one kind of file that has no name."""
    try:
        return [fd for fd, target in _open_files(task) if target == kind]
    except OSError:
        return []


def _registered(task: str, epoll: int) -> set[int]:
    """The inodes of what is registered with an epoll (proc(5), fdinfo; "ino:" since 4.13)."""
    found = re.findall(rb"^tfd:.* ino:([0-9a-f]+)", _read(f"{task}/fdinfo/{epoll}"), re.MULTILINE)
    return {int(inode, 16) for inode in found}


_IORING_OP_ACCEPT = b"13"


def _ring_covers(task: str, ring: int, inodes: frozenset[int]) -> Seen:
    """From the pending requests that io_uring/fdinfo.c lists, which name no socket."""
    pending = re.findall(rb"^\s+op=(\d+)", _read(f"{task}/fdinfo/{ring}"), re.MULTILINE)
    if not pending:
        return Seen.NO
    has_one = not inodes.isdisjoint(_sockets(task))
    return Seen.YES if has_one and _IORING_OP_ACCEPT in pending else Seen.UNKNOWN


def _sockets(directory: str) -> set[int]:
    """The inodes of the sockets that a process or thread has open."""
    return {_inode_of(target) for _, target in _open_files(directory)} - {0}


def _open_files(directory: str) -> Iterator[tuple[int, str]]:
    for fd in os.listdir(f"{directory}/fd"):
        with suppress(FileNotFoundError):  # closed since
            yield int(fd), os.readlink(f"{directory}/fd/{fd}")


def _inode_of(target: str) -> int:
    """The inode of a socket, 0 for any other file."""
    return int(target[8:-1]) if target.startswith("socket:[") else 0


def _first(task: str, arguments: list[int]) -> list[int]:
    return [_int(arguments[0])]


_IORING_ENTER_REGISTERED_RING = 1 << 4


def _entered(task: str, arguments: list[int]) -> list[int]:
    """The ring of an io_uring_enter(2); all rings where it was named by a registered index."""
    if arguments[3] & _IORING_ENTER_REGISTERED_RING:
        return _anonymous(task, _RING)
    return _first(task, arguments)


def _polled(task: str, arguments: list[int]) -> list[int]:
    """struct pollfd { int fd; short events; short revents; }, see poll(2)."""
    address, count = arguments[0], _int(arguments[1])
    array = _memory(task, address, count * 8)
    entries = struct.iter_unpack("=ihh", array[: len(array) // 8 * 8])
    return [fd for fd, events, _ in entries if events & select.POLLIN]


def _restarted(task: str, arguments: list[int]) -> list[int]:
    """A call that SIGSTOP and SIGCONT interrupted, with the arguments it had: poll(2), or one
    that sleeps or waits for a lock (restart_syscall(2))."""
    return _polled(task, arguments) if b"poll" in _read(f"{task}/wchan") else []


def _selected(task: str, arguments: list[int]) -> list[int]:
    """The fd_set of readers is an array of long with one bit for each descriptor."""
    count, address = _int(arguments[0]), arguments[1]
    if not address:
        return []
    bits = int.from_bytes(_memory(task, address, (count + 63) // 64 * 8), "little")
    return [fd for fd in range(bits.bit_length()) if bits >> fd & 1]


_MOST_BYTES = 1 << 20


def _memory(task: str, address: int, count_bytes: int) -> bytes:
    fd = os.open(f"{task}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, min(count_bytes, _MOST_BYTES), address)
    except OverflowError:  # a 32-bit process, whose calls have other numbers
        return b""
    finally:
        os.close(fd)


def _int(register: int) -> int:
    """An int argument is the lower half of its register; the upper may hold anything."""
    return register & 0xFFFFFFFF


# arch/x86/entry/syscalls/syscall_64.tbl
_X86_64: dict[int, _Fds] = {
    **dict.fromkeys((0, 19), _first),  # read, readv
    **dict.fromkeys((43, 288), _first),  # accept, accept4
    **dict.fromkeys((45, 47, 299), _first),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((232, 281, 441), _first),  # epoll_wait, epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    **dict.fromkeys((7, 271), _polled),  # poll, ppoll
    **dict.fromkeys((23, 270), _selected),  # select, pselect6
    219: _restarted,  # restart_syscall
}
# include/uapi/asm-generic/unistd.h
_GENERIC: dict[int, _Fds] = {
    **dict.fromkeys((63, 65), _first),  # read, readv
    **dict.fromkeys((202, 242), _first),  # accept, accept4
    **dict.fromkeys((207, 212, 243), _first),  # recvfrom, recvmsg, recvmmsg
    **dict.fromkeys((22, 441), _first),  # epoll_pwait, epoll_pwait2
    426: _entered,  # io_uring_enter
    73: _polled,  # ppoll
    72: _selected,  # pselect6
    128: _restarted,  # restart_syscall
}
_BLOCKING_CALLS = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}


# ---- who has a port


class Holder(msgspec.Struct, frozen=True):
    """A process that has a socket on a port.

    Args:
        pid, command: None where no process could be seen to have the socket open.
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


class _Bound(msgspec.Struct, frozen=True):
    """A socket of /proc/net, its address as inet_pton(3) packs it."""

    ip: bytes
    port: int
    waiting: bool
    uid: int
    inode: int


def holders(protocol: Protocol, address: str, port: int, root: str = "/proc") -> list[Holder]:
    """Who holds a port of this network namespace, on the address or one that overlaps it.

    The likeliest cause of an EADDRINUSE comes first: the same address before a wildcard of
    its family before one of the other family. A wildcard of the other family is listed
    though it may be IPV6_V6ONLY, which /proc does not tell. Connections (and connected UDP
    sockets) are listed only if nothing listens. A TCP socket that is bound but does not
    listen is in no list of /proc.

    Args:
        address: an IP address; "" is any.
    """
    wanted = _pack(address)
    table = [bound for bound in _bound(protocol, root) if bound.port == port and bound.inode]
    found = [bound for bound in table if _overlap(wanted, bound.ip) is not None]
    found = [bound for bound in found if bound.waiting] or found
    found.sort(key=lambda bound: _overlap(wanted, bound.ip) or 0)
    pids = _pids_of({bound.inode for bound in found}, root) if found else {}
    return [_holder(bound, pid, root) for bound in found for pid in pids.get(bound.inode, (None,))]


def _holder(bound: _Bound, pid: int | None, root: str) -> Holder:
    family = socket.AF_INET if len(bound.ip) == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, bound.ip)
    return Holder(pid, _command(pid, root) if pid else None, bound.uid, bound.inode, address)


def _command(pid: int, root: str) -> str | None:
    try:
        return _read(f"{root}/{pid}/comm").decode(errors="replace").strip()
    except OSError:
        return None


def _overlap(wanted: bytes, held: bytes) -> int | None:
    """How closely two addresses collide: 0 the same, 1 by a wildcard, 2 by a dual-stack
    wildcard, None not at all."""
    if wanted == held:
        return 0
    either_any = not any(wanted) or not any(held)
    if len(wanted) == len(held):
        return 1 if either_any else None
    six = wanted if len(wanted) == 16 else held
    return 2 if not any(six) else None


_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"  # include/net/tcp_states.h


def _bound(protocol: Protocol, root: str) -> Iterator[_Bound]:
    """The lines of /proc/net/tcp and its siblings (proc_pid_net(5))."""
    waiting = _TCP_LISTEN if protocol == "tcp" else _UDP_UNCONNECTED
    for name in (protocol, f"{protocol}6"):
        try:
            lines = _read(f"{root}/net/{name}").decode().splitlines()[1:]
        except FileNotFoundError:  # no IPv6 in this kernel
            continue
        for line in lines:
            _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
            ip, _, port = local.partition(":")
            yield _Bound(_unhex(ip), int(port, 16), state == waiting, int(uid), int(inode))


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
    for pid in sorted(_pids(root)):
        try:
            mine = inodes & _sockets(f"{root}/{pid}")
        except OSError:  # gone, or not ours to look at
            continue
        for inode in mine:
            found[inode] = (*found.get(inode, ()), pid)
    return found
