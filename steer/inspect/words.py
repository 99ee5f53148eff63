"""Says what decides which process gets a connection, and what would be better. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import msgspec

from steer.inspect.grouping import servers
from steer.inspect.schema import Group, Process, Program, Socket
from steer.policy.cpus import cpu_list
from steer.values import plural, several

_WAKES: Mapping[str | None, str] = {
    "accept": "they block in accept(), and the kernel wakes them in turn",
    "epoll-exclusive": (
        "the kernel wakes the first idle one in its list (EPOLLEXCLUSIVE), always in the same "
        "order, so connections pile up on few"
    ),
    "epoll": "the kernel wakes all that are idle, and the quickest gets it",
    "poll": "the kernel wakes all that are idle, and the quickest gets it",
}
_ANY = "whichever takes it from the queue first gets it"
_POLICIES = {"tcp": "least-conn", "udp": "flow"}


class Known(msgspec.Struct, frozen=True):
    """What advice depends on besides the group.

    Args:
        command_lines: command lines of processes, as far as they can be read.
        attach_options: the options of `steer attach`; none if there is no such command.
    """

    command_lines: Mapping[int, Sequence[str]] = {}
    attach_options: Set[str] = frozenset()


def decides(group: Group) -> str:
    """What decides now."""
    if group.program is not None and group.program.is_abandoned:
        return f"{_hash_decides(group)}; {_abandoned(group.program)}"
    if group.program is not None:
        return _program_decides(group, group.program)
    if group.kind == "reuseport":
        return _hash_decides(group)
    if group.kind == "shared":
        return _shared(group, group.sockets[0])
    if group.kind == "unknown":
        return _unknown(group, group.sockets[0])
    return _single(group, group.sockets[0])


def advice(group: Group, known: Known) -> list[str]:
    """What would be better, with the command for it if there is one."""
    return [*_idle(group), *_full(group), *_left(group, known), *_better(group, known)]


def bind(group: Group) -> str:
    """The address as a command takes it."""
    host = f"[{group.address}]" if ":" in group.address else group.address
    host = "" if host == "0.0.0.0" else host
    return f"{'udp://' if group.protocol == 'udp' else ''}{host}:{group.port}"


# ---- what decides


def _program_decides(group: Group, program: Program) -> str:
    count = _count(group)
    if program.service is not None:
        policy = f"policy {program.policy}" if program.policy else "the policy"
        what = f"{policy} of steer's service {program.service}"
    elif program.kind == "classic":
        what = f"a classic BPF program of {plural(program.instructions or 0, 'instruction')}"
    else:
        what = f"BPF program {program.id} ({program.name or 'no name'}), loaded by {program.owner},"
    return f"{what} {count} for each {_thing(group)}"


def _abandoned(program: Program) -> str:
    leaves = f"program {program.id} of `steer attach` leaves the selection to the hash"
    if not program.processes:
        return f"{leaves}, as its attacher was killed"
    return (
        f"{leaves}, as its attacher ({pids(program.processes)}) has been stopped or hung for "
        f"{program.silent_s:g} s"
    )


def _hash_decides(group: Group) -> str:
    words = (
        f"the kernel's hash of addresses and ports {_count(group)} for each {_thing(group)}, even "
        "if its process is busy"
    )
    if group.by_cpu:
        words += (
            ", among the sockets whose SO_INCOMING_CPU is the CPU of the packet, if there are any"
        )
    if group.program_known:
        return words
    return f"{words}; unless a program is attached, which cannot be seen from here"


def _count(group: Group) -> str:
    shown = len(group.sockets)
    return "selects the only socket" if shown == 1 else f"selects one of {shown} sockets"


def _thing(group: Group) -> str:
    return "connection" if group.protocol == "tcp" else "datagram"


def _shared(group: Group, socket: Socket) -> str:
    waiting = servers(socket.processes)
    how = {each.waits for each in waiting}
    verb = "have it open" if None in how else "wait for it"
    rule = _WAKES.get(how.pop(), _ANY) if len(how) == 1 else _ANY
    count = len(waiting)
    return f"one socket, and {count} processes {verb}: {rule}"


def _single(group: Group, socket: Socket) -> str:
    thing = f"every {_thing(group)}"
    if not socket.processes:
        return f"one socket gets {thing}; it is open in no process that can be seen from here"
    waiting = servers(socket.processes)
    if not waiting:
        return f"one socket gets {thing}; no process waits for it at this moment"
    return f"one socket: {_named(waiting[0])} gets {thing}"


def _unknown(group: Group, socket: Socket) -> str:
    gets = f"one socket gets every {_thing(group)}"
    waiting = servers(socket.processes)
    if not waiting:
        return f"{gets}; which processes wait for it cannot be seen from here"
    may = "other processes that cannot be seen from here may wait for it, too"
    return f"{gets}; {_named(waiting[0])} has it open, and {may}"


def _named(process: Process) -> str:
    return f"{process.command or '?'} (pid {process.pid})"


# ---- what would be better


def _idle(group: Group) -> Iterator[str]:
    """Sockets that get connections although no process waits for them."""
    if group.kind != "reuseport" or _program_selects(group):
        return
    idle = [each for each in group.sockets if each.processes and not servers(each.processes)]
    if idle and len(idle) < len(group.sockets):
        sockets = several("socket", (each.inode for each in idle))
        yield (
            f"no process waits for {sockets} at this moment, and the hash goes on selecting "
            f"{'it' if len(idle) == 1 else 'them'}: is "
            f"{', '.join(_named(each.processes[0]) for each in idle[:3])} busy, or hung?"
        )


def _full(group: Group) -> Iterator[str]:
    if group.protocol != "tcp":
        return
    for each in group.sockets:
        if each.queued > each.backlog:
            yield (
                f"the accept queue of socket {each.inode} is full, and the kernel drops what "
                "comes: raise the backlog of the server, and net.core.somaxconn"
            )


def _program_selects(group: Group) -> bool:
    return group.program is not None and not group.program.is_abandoned


def _is_left(group: Group) -> bool:
    return group.program is not None and group.program.is_left


def _left(group: Group, known: Known) -> Iterator[str]:
    """What to do about the program of an attacher that was killed, is stopped, or hangs."""
    program = group.program
    if program is None or not (program.is_abandoned or program.is_left):
        return
    detach = f"`{_enter(group)}steer detach {bind(group)}`"
    if program.processes:
        pid = program.processes[0].pid
        yield (
            f"`kill -CONT {pid}` if the attacher is stopped; if it hangs, `kill -KILL {pid}` and "
            f"then {detach}"
        )
    else:
        yield f"{detach} removes the program that the attacher left"
        if command := _attach(group, known):
            yield f"or `{command}` takes its place, and {_gains(group)}"


def _better(group: Group, known: Known) -> Iterator[str]:
    program = group.program
    if program is not None and (program.service or program.is_abandoned or program.is_left):
        return
    if group.kind == "shared" and group.protocol == "tcp":
        yield from _own_sockets(group, known)
    elif group.kind == "reuseport" and group.program_known and (command := _attach(group, known)):
        yield f"`{command}` {_gains(group)}"


def _gains(group: Group) -> str:
    """What a policy selects: a process that has several sockets has one for each thread."""
    if group.protocol == "udp":
        return "keeps each client with its socket while other sockets come and go"
    holders = [servers(each.processes) or each.processes for each in group.sockets]
    pids = {each.pid for held in holders for each in held}
    what = "process" if len(pids) >= len(group.sockets) else "socket"
    return f"selects the {what} with the fewest open connections"


def _own_sockets(group: Group, known: Known) -> Iterator[str]:
    """How each process gets a socket of its own: from steer, or by an option of the server."""
    processes = group.sockets[0].processes
    server = next((hint for each in processes if (hint := _hint(each, known))), _Hint("COMMAND"))
    count = len(servers(processes))
    options = f"-b {bind(group)} -w {count}{server.options}"
    yield f"`steer run {options} -- {server.command}` gives each process a socket of its own"
    if server.own and (command := _attach(group, known)):
        yield f"or set {server.own}, and then `{command}` {_gains(group)}"


def _attach(group: Group, known: Known) -> str:
    """The command that steers the group as it is; "" if there is none."""
    netns = _netns(group)
    replace = ["--replace"] if _program_selects(group) and not _is_left(group) else []
    if not {"--policy", *replace, *netns[:1]} <= known.attach_options:
        return ""
    policy = _POLICIES[group.protocol]
    return " ".join(["steer attach", bind(group), *netns, "--policy", policy, *replace])


class _Hint(msgspec.Struct, frozen=True):
    """What is known of a server.

    Args:
        command: the command that runs one process of it with sockets that it inherits.
        options: options of `steer run` that it needs for that.
        own: its own setting to have a socket for each process; "" if it has none.
    """

    command: str
    options: str = ""
    own: str = ""


_HINTS = {
    "gunicorn": _Hint("gunicorn -w 1 APP", own="`--reuse-port`"),
    "uvicorn": _Hint("uvicorn APP --fd {fd}"),
    "hypercorn": _Hint("hypercorn APP --bind fd://{fd}"),
    "nginx": _Hint(
        "nginx -c FILE -g 'daemon off; pid /run/nginx-{slot}.pid;'",
        " -e 'NGINX=3;'",
        "`reuseport` behind `listen` in nginx's configuration",
    ),
    "haproxy": _Hint("haproxy -db -f FILE", own="`shards by-thread` behind `bind`"),
}


def _hint(process: Process, known: Known) -> _Hint | None:
    """Found by the name of the process, or of the script or module that it runs."""
    line = known.command_lines.get(process.pid, ())
    names = (process.command or "", *(each.rpartition("/")[2] for each in line[:3]))
    return next((_HINTS[name] for name in names if name in _HINTS), None)


def _netns(group: Group) -> list[str]:
    """The option that selects the group's network namespace."""
    if not group.is_elsewhere:
        return []
    return ["--netns", str(group.netns_name or _holder(group) or group.netns)]


def _enter(group: Group) -> str:
    """What goes before a command that has no such option."""
    if not group.is_elsewhere:
        return ""
    if group.netns_name:
        return f"ip netns exec {group.netns_name} "
    return f"nsenter --net=/proc/{_holder(group)}/ns/net "


def _holder(group: Group) -> int | None:
    return next((each.pid for socket in group.sockets for each in socket.processes), None)


def pids(processes: Sequence[Process]) -> str:
    """By command: "nginx 10-13,17"."""
    by_command: dict[str, list[int]] = {}
    for each in processes:
        by_command.setdefault(each.command or "?", []).append(each.pid)
    return ", ".join(f"{name} {cpu_list(numbers)}" for name, numbers in by_command.items()) or "-"
