"""What `steer inspect` shows: looks, groups the sockets, and describes each group."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress

import msgspec

from steer.control import find
from steer.errors import ConfigError, KernelError, SteerError
from steer.inspect import counting, grouping, seeing, words
from steer.inspect import target as targets
from steer.inspect.schema import Group, Inspection, Process, Program, Socket
from steer.inspect.seeing import View
from steer.inspect.seen import Seen, SeenProgram
from steer.inspect.target import Target
from steer.linux import cgroup, netns, processes, title, waiting
from steer.loader import heartbeat
from steer.values import plural

_OURS = "steer_"
"""How the names of steer's programs begin."""


class Asked(msgspec.Struct, frozen=True):
    """What is to be inspected.

    Args:
        netns: name, path or process of a network namespace; None: all that can be seen.
        count_s: how long to count connections and datagrams; None: do not count.
        attach_options: see `words.Known`.
    """

    target: Target = Target()
    netns: str | None = None
    count_s: float | None = None
    attach_options: frozenset[str] = frozenset()


def inspect(asked: Asked) -> Inspection:
    """Look, and count if that is asked for.

    Raises:
        ConfigError: there is no such network namespace, or no such socket.
        KernelError: the kernel does not tell of any socket.
    """
    path = netns.path_of(asked.netns) if asked.netns else None
    with ExitStack() as stack:
        view = seeing.see(path, stack)
        selected = _selected(view, asked.target)
        notes = [*view.notes, *_hidden(view, selected)]
        counts: Mapping[int, int] = {}
        if asked.count_s is not None:
            counted = counting.count(view, selected, asked.count_s)
            counts = counted.counts
            notes += dict.fromkeys(counted.notes)
            # Show queues and processes as they are now, not as they were before the count.
            view = seeing.see(path, stack)
            known = {each.inode for each in selected}
            selected = [each for each in view.sockets if each.inode in known]
        found = _Builder(view, selected, counts, asked)
        return Inspection(1, found.groups(), notes, asked.count_s)


def _selected(view: View, target: Target) -> list[Seen]:
    """The sockets that match. Raises ConfigError: none does."""
    found = [each for each in view.sockets if targets.matches(target, each)]
    if not found and target.number is not None:
        found = [each for each in view.sockets if target.number in view.holders.get(each.inode, ())]
        if not found:
            raise _nothing_by_number(target.number)
    if not found and target != Target():
        host = target.address or ""
        act = f"inspect [{host}]:{target.port}" if ":" in host else f"inspect {host}:{target.port}"
        raise ConfigError(act, "no socket serves there", "`steer inspect` shows all that do")
    return found


def _nothing_by_number(number: int) -> ConfigError:
    act = f"inspect {number}"
    cure = "`steer inspect` shows all sockets that serve"
    if processes.is_alive(number):
        name = processes.command(number)
        return ConfigError(act, f"no socket serves port {number}, nor is one open in {name}", cure)
    return ConfigError(act, f"no socket serves port {number}, and there is no such process", cure)


def _hidden(view: View, selected: Iterable[Seen]) -> list[str]:
    """Notes if processes that hold these sockets are hidden from us, or may be."""
    partly = [each.inode for each in selected if each.inode in view.partly_seen]
    unheld = sum(1 for inode in partly if inode not in view.holders)
    cure = "run as root" if os.geteuid() else "needs CAP_SYS_PTRACE"
    notes = []
    if unheld:
        notes.append(f"cannot see which processes hold {plural(unheld, 'socket')}; {cure}")
    if others := len(partly) - unheld:
        more = f"cannot see whether more processes hold {plural(others, 'socket')}; {cure}"
        notes.append(more)
    return notes


class _Builder:
    """Makes groups of sockets, and looks up what is shown of each."""

    def __init__(
        self, view: View, selected: Sequence[Seen], counts: Mapping[int, int], asked: Asked
    ) -> None:
        self._view = view
        self._selected = selected
        self._counts = counts
        self._asked = asked
        self._own = netns.own()
        self._names = netns.names()
        self._processes = _processes(view, selected)
        self._cgroups = cgroup.paths({each.cgroup for each in selected if each.cgroup})
        self._programs = _holders_of_programs(view, selected)
        members = [each for each in selected if each.group != 0]
        self._services, self._titled = _services(_holders(view, self._programs, members))

    def groups(self) -> list[Group]:
        return [self._group(each) for each in grouping.groups(self._selected, self._own)]

    def _group(self, sockets: Sequence[Seen]) -> Group:
        sockets = sorted(sockets, key=self._order)
        first = sockets[0]
        service = self._service(sockets)
        found = Group(
            protocol=first.protocol,
            address=first.address,
            port=first.port,
            kind=grouping.kind_of(sockets, self._processes, self._view.partly_seen),
            uid=first.uid,
            user=_user(first.uid),
            netns=first.netns,
            netns_name=self._names.get(first.netns),
            is_elsewhere=first.netns != self._own,
            device=first.device,
            program=self._program(first.program, service) if first.program else None,
            program_known=self._view.look is not None,
            sockets=[self._socket(each) for each in sockets],
            by_cpu=first.by_cpu,
            service=service.name if service else None,
        )
        found.decides = words.decides(found)
        found.advice = words.advice(found, self._known(found))
        return found

    def _order(self, seen: Seen) -> tuple[int, int]:
        """By the process that serves it; the kernel's own order means nothing."""
        serving = grouping.servers(self._processes.get(seen.inode, ()))
        return (min((each.pid for each in serving), default=0), seen.inode)

    def _service(self, sockets: Sequence[Seen]) -> _Ours | None:
        """The service whose sockets these are: as it says itself, or else as its processes show."""
        for each in sockets:
            if each.inode in self._services:
                return self._services[each.inode]
        pids = _holders(self._view, self._programs, sockets)
        return next((self._titled[pid] for pid in sorted(pids) if pid in self._titled), None)

    def _socket(self, seen: Seen) -> Socket:
        count = self._counts.get(seen.inode)
        return Socket(
            cookie=seen.cookie or None,
            inode=seen.inode,
            processes=self._processes.get(seen.inode, []),
            queued=seen.queued,
            backlog=seen.backlog,
            drops=seen.drops,
            accepted=count if seen.protocol == "tcp" else None,
            received=count if seen.protocol == "udp" else None,
            cgroup=self._cgroups.get(seen.cgroup) if seen.cgroup else None,
            is_connected=seen.is_connected,
        )

    def _program(self, seen: SeenProgram, ours: _Ours | None) -> Program:
        if seen.instructions:
            found = Program(None, None, None, "classic", instructions=seen.instructions)
        else:
            found = self._ebpf(seen)
        # Any process can show a title as steer's do; that alone makes no program steer's.
        if ours and (ours.policy or found.kind == "classic" or seen.name.startswith(_OURS)):
            found.service, found.policy = ours.name, ours.policy
        return found

    def _ebpf(self, seen: SeenProgram) -> Program:
        holders = sorted(self._programs.get(seen.address, ()))
        return Program(
            id=seen.id,
            name=seen.name,
            owner=_user(seen.uid) or f"uid {seen.uid}",
            kind="ebpf",
            tag=seen.tag,
            loaded_s=round(time.clock_gettime(time.CLOCK_BOOTTIME) - seen.loaded_ns / 1e9, 1),
            processes=[_process(pid, None) for pid in holders],
            silent_s=_silent_s(seen),
        )

    def _known(self, group: Group) -> words.Known:
        if group.kind != "shared":
            return words.Known({}, self._asked.attach_options)
        pids = {each.pid for each in group.sockets[0].processes}
        lines = {pid: processes.arguments(pid) for pid in pids}
        return words.Known(lines, self._asked.attach_options)


class _Ours(msgspec.Struct, frozen=True):
    """A service of steer's. Args: policy: None if the service cannot be asked."""

    name: str
    policy: str | None = None


def _holders(
    view: View, programs: Mapping[int, Collection[int]], sockets: Iterable[Seen]
) -> Set[int]:
    """The processes that hold a socket or its program: an attacher has only the latter."""
    pids: set[int] = set()
    for each in sockets:
        pids.update(view.holders.get(each.inode, ()))
        if each.program:
            pids.update(programs.get(each.program.address, ()))
    return pids


def _services(pids: Set[int]) -> tuple[Mapping[int, _Ours], Mapping[int, _Ours]]:
    """The services that we may ask, by the inodes of their sockets; and the services whose names
    these processes show."""
    titles = {pid: shown for pid in pids if (shown := title.of(pid))}
    titled = {pid: _Ours(shown.name) for pid, shown in titles.items()}
    if not titled:
        return {}, {}
    with suppress(SteerError):
        return {
            inode: _Ours(service.name, service.policy)
            for service in find.status_of_all(os.environ).services
            for worker in service.workers
            for inode in worker.sockets
        }, titled
    return {}, titled


def _holders_of_programs(view: View, sockets: Iterable[Seen]) -> Mapping[int, Collection[int]]:
    programs = {each.program.address for each in sockets if each.program and each.program.id}
    if view.look is None or not programs:
        return {}
    return view.look.holders(programs)


def _silent_s(seen: SeenProgram) -> float | None:
    if seen.name.startswith(_OURS):
        with suppress(KernelError):
            silent_s = heartbeat.silent_s(seen.id)
            return None if silent_s is None else round(silent_s, 1)
    return None


def _processes(view: View, sockets: Iterable[Seen]) -> dict[int, list[Process]]:
    """The processes that hold each socket, by inode."""
    by_pid: dict[int, set[int]] = {}
    for each in sockets:
        for pid in view.holders.get(each.inode, ()):
            by_pid.setdefault(pid, set()).add(each.inode)
    found: dict[int, list[Process]] = {}
    for pid, inodes in sorted(by_pid.items()):
        waits = waiting.waits(pid, frozenset(inodes))
        process = _process(pid, None if waits is None else "no")
        by_way = {how: msgspec.structs.replace(process, waits=how.value) for how in waiting.Wait}
        for inode in inodes:
            one = by_way[waits[inode]] if waits and inode in waits else process
            found.setdefault(inode, []).append(one)
    return found


def _process(pid: int, waits: str | None) -> Process:
    cpus: list[int] = []
    with suppress(OSError):
        cpus = sorted(os.sched_getaffinity(pid))
    return Process(pid, processes.command(pid), cpus, waits)


def _user(uid: int) -> str | None:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return None
