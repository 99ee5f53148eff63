"""What /proc tells of other processes: their children, their sockets, signs of life.

Cheap to import: the controller asks on every tick while a worker starts. Where a
question may be refused, "could not look" is an answer of its own. What a worker can make
large is read through `procfs.Files`, which bounds a look.

`root` is where proc(5) is mounted; tests put a made tree there.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec

from steer.errors import KernelError
from steer.kernel.procfs import EVERYTHING, Files, TooMuch

Protocol = Literal["tcp", "udp"]

# ---- families of processes


def descendants(pid: int, root: str = "/proc") -> list[int]:
    """`pid` and all its descendants, parents first; empty if there is no such process.

    A child that starts or ends meanwhile may be missed (proc(5), "children"). All of them,
    however many: for acts. Looks use `family`.
    """
    files = Files(root, most_bytes=EVERYTHING)
    found = family(pid, files, EVERYTHING)
    # Of thousands of threads each has its own list of children: then all processes are fewer.
    return found if files.whole else _family_by_scan(pid, root)


def may_have_children(pid: int, root: str = "/proc") -> bool:
    """Whether it is worth listing its descendants: no of one that has ended, or has a single
    thread (proc(5): directories are links to their parent) and started nobody who is there."""
    try:
        is_single = os.stat(f"{root}/{pid}/task").st_nlink <= _LINKS_OF_ONE
        return not is_single or bool(_read(f"{root}/{pid}/task/{pid}/children"))
    except (FileNotFoundError, ProcessLookupError):
        return os.path.exists(f"{root}/{pid}")
    except OSError:
        return True


_LINKS_OF_ONE = 3
"""Of a directory with one directory in it."""
MOST_OF_FAMILY = 64


def family(pid: int, files: Files, most: int = MOST_OF_FAMILY) -> list[int]:
    """`pid` and its descendants, parents first, as far as one look goes; see `Files.whole`.

    Args:
        most: processes, and threads of each of them.
    """
    root = files.root
    if not os.path.exists(f"{root}/{pid}"):
        return []
    if not os.path.exists(f"{root}/{pid}/task/{pid}/children"):
        return _family_by_scan(pid, root)
    found = [pid]
    with suppress(TooMuch):
        for member in found:
            found.extend(_children(member, files, most))
            if len(found) > most:
                files.whole = False
                return found[:most]
    return found


def _family_by_scan(pid: int, root: str) -> list[int]:
    """By the parents of all processes; also for kernels without CONFIG_PROC_CHILDREN."""
    children: dict[int | None, list[int]] = {}
    for each in all_pids(root):
        children.setdefault(parent(each, root), []).append(each)
    found = [pid]
    for member in found:
        found.extend(children.get(member, ()))
    return found


_MOST_ANCESTORS = 64


def lineage(pid: int, known: Container[int] = ()) -> tuple[int, ...]:
    """The process itself, its living ancestors, and who leads its process group and session, as
    far as that can be told: of a zombie it can, of one that was waited for it cannot.

    Args:
        known: nobody is looked for beyond the first of these.
    """
    found: dict[int, None] = {}
    walk: int | None = pid
    while walk and walk not in found and len(found) < _MOST_ANCESTORS:
        found[walk] = None
        if walk in known:
            return tuple(found)
        walk = parent(walk)
    with suppress(ProcessLookupError):
        found |= dict.fromkeys((os.getpgid(pid), os.getsid(pid)))
    return tuple(found)


def arguments(pid: int, root: str = "/proc") -> list[str]:
    """The command line of a process, as far as anybody reads it; empty if there is no such
    process."""
    line = command_line(pid, root)
    if line is None:
        return []
    return line.decode(errors="replace").removesuffix("\0").split("\0")


def command_line(pid: int, root: str = "/proc") -> bytes | None:
    """The same with a null byte behind each; None if there is no such process. As quickly as can
    be, as all processes of the machine are asked."""
    try:
        fd = os.open(f"{root}/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, MOST_ARGUMENT_BYTES)
    except OSError:
        return None
    finally:
        os.close(fd)


MOST_ARGUMENT_BYTES = 1 << 12
MOST_ENVIRONMENT_BYTES = 1 << 18


def environment(pid: int, root: str = "/proc") -> dict[str, str]:
    """What a process was started with; empty if there is no such process, or it is not ours to
    look at, or there is very much of it."""
    try:
        text = Files(root, most_bytes=MOST_ENVIRONMENT_BYTES).read(f"{root}/{pid}/environ")
    except OSError:
        return {}
    pairs = (pair.partition("=") for pair in text.decode(errors="replace").split("\0"))
    return {name: value for name, sign, value in pairs if sign}


def is_alive(pid: int, root: str = "/proc") -> bool:
    """Whether there is such a process and it has not ended: a zombie has."""
    stat = _stat(f"{root}/{pid}")
    return stat is not None and stat[0] not in (b"Z", b"X")


def children(pid: int, root: str = "/proc") -> list[int]:
    """Of a process, zombies among them."""
    if os.path.exists(f"{root}/{pid}/task/{pid}/children"):
        return _children(pid, Files(root, EVERYTHING, EVERYTHING), EVERYTHING)
    return [each for each in all_pids(root) if parent(each, root) == pid]


def only_child(pid: int, root: str = "/proc") -> int | None:
    """That of a process which has started one, as wrappers have; None of one with more, or with
    none, or where that cannot be seen. Threads but the first are not looked at."""
    try:
        found = Files(root).read(f"{root}/{pid}/task/{pid}/children").split()
    except (OSError, TooMuch):
        return None
    return int(found[0]) if len(found) == 1 else None


def start_time_ticks(pid: int, root: str = "/proc") -> int | None:
    """When the process started, in clock ticks since boot: with its pid this names one
    process for ever. None if there is no such process."""
    stat = _stat(f"{root}/{pid}")
    return int(stat[19]) if stat else None


def is_still(pid: int, began_ticks: int) -> bool:
    """Whether the process that started then has not ended."""
    stat = _stat(f"/proc/{pid}")
    return stat is not None and stat[0] not in (b"Z", b"X") and int(stat[19]) == began_ticks


def socket_inode(fd: int) -> int:
    """The inode number by which /proc and sock_diag(7) know an open socket."""
    return os.fstat(fd).st_ino


def open_sockets(pid: int, root: str = "/proc") -> set[int]:
    """The inodes of the sockets that `pid` and its descendants have open.

    Raises:
        KernelError: one of them is not ours to look at, or they have more open than one
            look goes through.
    """
    files = Files(root, MOST_OPEN)
    members = family(pid, files)
    found = {inode for member in members for _, inode in sockets_by_fd(member, root, files)}
    if not files.whole:
        raise KernelError(f"look at the open files of pid {pid}", f"more than {MOST_OPEN}")
    return found


MOST_OPEN = 2048


def sockets_by_fd(
    pid: int, root: str = "/proc", files: Files | None = None
) -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each socket that a process has open, in order; none if it has
    ended, and no more than one look goes through.

    Raises:
        KernelError: the process is not ours to look at.
    """
    directory = f"{root}/{pid}"
    files = files or Files(root, MOST_OPEN)
    try:
        for fd, target in files.open_files(directory):
            if inode := inode_of(target):
                yield fd, inode
    except PermissionError as error:
        if not is_zombie(directory):
            cause, cure = errno.errorcode[error.errno or 0], "run as root, or as its user"
            raise KernelError(f"look at the open files of pid {pid}", cause, cure) from error
    except (FileNotFoundError, ProcessLookupError, TooMuch):
        return


def _children(pid: int, files: Files, most_threads: int) -> list[int]:
    found: list[int] = []
    with suppress(PermissionError):  # hidepid=1
        for task in files.tasks(pid, most_threads):
            with suppress(FileNotFoundError, ProcessLookupError):
                found.extend(int(child) for child in files.read(f"{task}/children").split())
    return found


def parent(pid: int, root: str = "/proc") -> int | None:
    """Of a process; None if there is no such process."""
    stat = _stat(f"{root}/{pid}")
    return int(stat[1]) if stat else None


def _stat(directory: str, read: Callable[[str], bytes] | None = None) -> list[bytes] | None:
    """The fields of proc_pid_stat(5) from the third, the state, on. Raises TooMuch."""
    try:
        # the second field is the command, which may hold spaces and brackets
        return (read or _read)(f"{directory}/stat").rpartition(b")")[2].split()
    except TooMuch:
        raise
    except OSError:
        return None


def all_pids(root: str = "/proc") -> Iterator[int]:
    """Of the processes that can be seen."""
    return (int(name) for name in os.listdir(root) if name.isdigit())


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
    for equality. That of a stopped or frozen process stays, that of one that sleeps too. Of
    very many threads only the ticks are seen, and how often the first were switched.

    Args:
        among: those of them to look at, as far as they are still there; if none is, all.
    """
    files = Files(root)
    there = family(pid, files)
    members = [member for member in there if member in among] or there
    ticks = sum(map(partial(_ticks, root=root), members))
    switches = 0
    with suppress(TooMuch, PermissionError):
        for member in members:
            switches += sum(_switches(task, files) for task in files.tasks(member))
    return ticks + switches


def cpu_s(pid: int) -> float:
    """CPU time that `pid` and its descendants have had so far; of a process that /proc hides,
    its own."""
    return sum(map(_cpu_clock_s, family(pid, Files()) or [pid]))


def _cpu_clock_s(pid: int) -> float:
    """0 once it is gone. Anybody may read it, hidepid or not (clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h


def is_asleep(pid: int) -> bool:
    """Whether `pid` and its descendants sleep until something happens: none of them runs, waits
    for a CPU or a disk, or is stopped. Of a process that /proc hides nothing else is known."""
    return _states(pid).issubset(_ASLEEP)


def is_runnable(pid: int) -> bool:
    """Whether `pid` or a descendant runs, or waits for a CPU to run on."""
    return b"R" in _states(pid)


def _states(pid: int) -> set[bytes]:
    stats = (_stat(f"/proc/{member}") for member in family(pid, Files()))
    return {stat[0] for stat in stats if stat}


_ASLEEP = (b"S", b"I", b"Z", b"X")


def _ticks(pid: int, root: str) -> int:
    """Of CPU time, by all its threads, also those that have ended."""
    stat = _stat(f"{root}/{pid}")
    return int(stat[11]) + int(stat[12]) if stat else 0


def _switches(task: str, files: Files) -> int:
    try:
        return sum(map(int, _SWITCHES.findall(files.read(f"{task}/status"))))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_stopped(pid: int, root: str = "/proc") -> bool:
    """Whether `pid` or a descendant is stopped, with all its threads, by SIGSTOP or a debugger.

    One process is enough: which of a worker takes the connections is not known, and the
    shell or arbiter above it runs on. So it explains why nobody takes them, and is no sign
    by itself that nobody does. Of very many threads the first are looked at.
    """
    files = Files(root)
    with suppress(TooMuch, PermissionError):
        return any(_process_is_stopped(member, files) for member in family(pid, files))
    return False


def _process_is_stopped(pid: int, files: Files) -> bool:
    stats = (_stat(task, files.read) for task in files.tasks(pid))
    states = {stat[0] for stat in stats if stat} - {b"Z", b"X"}
    return bool(states) and states.issubset(_STOPPED)


def is_hidden(pid: int) -> bool:
    """Whether the process runs, and /proc does not show it to us (hidepid=2)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not os.path.exists(f"/proc/{pid}")


def is_zombie(task: str) -> bool:
    stat = _stat(task)
    return stat is not None and stat[0] in (b"Z", b"X")


def inode_of(target: str) -> int:
    """Of a socket, by what the link of a descriptor says; 0 of any other file."""
    return int(target[8:-1]) if target.startswith("socket:[") else 0


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


class Bound(msgspec.Struct, frozen=True):
    """A socket of /proc/net, its address as inet_pton(3) packs it."""

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
    ours: frozenset[int] = frozenset(),
) -> list[Holder]:
    """Who holds a port of this network namespace, on the address or one that overlaps it.

    The likeliest cause of an EADDRINUSE comes first: the same address before a wildcard of
    its family before one of the other family. A wildcard of the other family is listed
    though it may be IPV6_V6ONLY, which /proc does not tell. Connections (and connected UDP
    sockets) are listed only if nothing listens. A TCP socket that is bound but does not
    listen is in no list of /proc.

    Args:
        address: an IP address; "" is any.
        ours: inodes of sockets to leave out. Looking for the process that has a socket takes
            far longer than to find the socket.
    """
    wanted = _pack(address)
    table = [bound for bound in bound_sockets(protocol, root) if bound.port == port and bound.inode]
    found = [bound for bound in table if _overlap(wanted, bound.ip) is not None]
    found = [bound for bound in found if bound.waiting] or found
    found = [bound for bound in found if bound.inode not in ours]
    found.sort(key=lambda bound: _overlap(wanted, bound.ip) or 0)
    pids = _pids_of({bound.inode for bound in found}, root) if found else {}
    return [_holder(bound, pid, root) for bound in found for pid in pids.get(bound.inode, (None,))]


def _holder(bound: Bound, pid: int | None, root: str) -> Holder:
    family = socket.AF_INET if len(bound.ip) == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, bound.ip)
    return Holder(pid, command(pid, root) if pid else None, bound.uid, bound.inode, address)


def command(pid: int, root: str = "/proc") -> str | None:
    """The name of a process, as ps(1) has it; None if there is no such process. It says of itself
    what that is: what could not be printed is left out."""
    try:
        name = _read(f"{root}/{pid}/comm").decode(errors="replace")
    except OSError:
        return None
    return "".join(filter(str.isprintable, name)).strip()


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


def bound_sockets(protocol: Protocol, root: str) -> Iterator[Bound]:
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
        except OSError:  # gone, or not ours to look at
            continue
        for inode in mine:
            found[inode] = (*found.get(inode, ()), pid)
    return found


def _all_sockets(directory: str) -> Iterator[tuple[int, int]]:
    """However many: once, where a port is taken, to say by whom. Raises OSError."""
    for fd, target in Files(most_reads=EVERYTHING).open_files(directory):
        yield fd, inode_of(target)
