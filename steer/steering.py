"""Carries a policy out on one rung of the ladder: three doors of one shape.

A backend is told which sockets join and leave and which members may be chosen;
what it has to do to the kernel for that is its own affair.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Protocol

import msgspec

from steer import abi, cbpf, policy, reserve, table
from steer.errors import KernelError, VerifierError
from steer.kernel import bpf, compile, listeners, sockets
from steer.plan import Plan
from steer.policy import Scene
from steer.reserve import Reserve
from steer.table import Layout, Member


class Counts(msgspec.Struct, frozen=True):
    """Of one slot: selections in all, those of them in place of a slot that was gone,
    and those of them taken over from a closing listener."""

    selected: int = 0
    fallback: int = 0
    migrated: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.selected + other.selected,
            self.fallback + other.fallback,
            self.migrated + other.migrated,
        )


class Steering(Protocol):
    """One service's groups, on one backend."""

    backend: str
    notes: Sequence[str]
    """What this backend cannot do here, in words."""
    migrates: bool
    """Whether what waits at a listener that closes goes to another."""

    @property
    def reserve(self) -> Sequence[socket.socket]:
        """Listeners of our own, where connections wait while there is no worker."""

    def open_reserve(self) -> None:
        """Make the reserve, where it is of use.

        Raises:
            BindError, KernelError
        """

    def empty_reserve(self) -> None:
        """Move what waits there to workers."""

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """Take in the sockets of a new worker, one for each bind; the fds become ours."""

    def left(self, slot: int) -> None:
        """The worker in `slot` has ended, or lost its sockets."""

    def steer(self, members: Sequence[Member]) -> None:
        """From now on choose among these, and these only."""

    def settle(self) -> None:
        """Return once all that was chosen before the last `steer` is in its queue."""

    def rescue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """Move what waits at these sockets of `slot`, by bind, to others; it must be no member."""

    def release(self) -> None:
        """The service ends: hold no socket open that its worker closes."""

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        """What was selected so far, for one bind or for all; None where nobody counts."""

    def retire(self, slot: int) -> Counts | None:
        """The same, and begin anew at nothing: the slot is somebody else's from now on."""

    def unsteered(self) -> int | None:
        """Selections that were left to the kernel's hash, as no live slot was found."""

    def held(self, slot: int) -> Sequence[int]:
        """Descriptors of the slot's sockets that are held here."""

    def saved(self) -> tuple[object, Sequence[int]]:
        """What `restore` makes the same of again: a value for JSON, and descriptors."""

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        """Go on where one that is gone stopped, with what it saved; the fds become ours.

        Args:
            held: what it held of each slot that it knew of; none of those whose workers
                have ended since, in that order.
        """

    def close(self) -> None:
        """Let go of everything."""


def open_backend(backend: str, plan: Plan) -> Steering:
    """Make the backend ready, before there is any socket.

    Raises:
        KernelError: this rung does not hold; the reason is in it.
    """
    return _BACKENDS[backend](plan)


class _Countless:
    """What is the same on backends that run no program of ours."""

    reserve: Sequence[socket.socket] = ()

    def open_reserve(self) -> None:
        """Nobody would move what waits there."""

    def empty_reserve(self) -> None:
        pass

    def rescue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """By the kernel's hash, if that was told to move queues."""
        if sockets.tcp_migrate_req():
            for index, sock in owned.items():
                if listeners.is_waited_for(sock):
                    listeners.move_queue(sock)
                    self._rejoined(index, slot)

    def _rejoined(self, bind: int, slot: int) -> None:
        """The slot's socket left its group for a moment."""

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        return None

    def retire(self, slot: int) -> Counts | None:
        return None

    def unsteered(self) -> int | None:
        return None


class Kernel(_Countless):
    """No program: the kernel hashes over all sockets of a group."""

    backend = "kernel"

    def __init__(self, plan: Plan) -> None:
        self.migrates = sockets.tcp_migrate_req() is True
        self.notes: Sequence[str] = (STILL_CHOSEN, *_may_be_lost(plan))

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)

    def left(self, slot: int) -> None:
        pass

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def saved(self) -> tuple[object, Sequence[int]]:
        return None, ()

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        pass

    def close(self) -> None:
        pass


STILL_CHOSEN = "a worker that is to end gets connections until it closes its socket"
_LOST = "queued at a worker that crashes or hangs are lost"
DATAGRAMS_LOST = f"datagrams {_LOST}: the kernel moves none"


def _may_be_lost(plan: Plan, migrates: bool | None = None) -> Sequence[str]:
    """What is gone with a worker that crashes or hangs.

    Args:
        migrates: whether our program moves queues; None where there is none that could.
    """
    protocols = {bind.protocol for bind in plan.binds}
    told = sockets.tcp_migrate_req()
    notes = []
    if "tcp" in protocols and not migrates and not told:
        by_sysctl = "ebpf would move them, and so would sysctl net.ipv4.tcp_migrate_req=1"
        too_old = told is None or migrates is False
        why = "migration needs Linux 5.14" if too_old else by_sysctl
        notes.append(f"connections {_LOST}: {why}")
    if "udp" in protocols:
        notes.append(DATAGRAMS_LOST)
    return tuple(notes)


class Cbpf(_Countless):
    """A classic program for each group, rewritten at every change.

    Such a program speaks in the kernel's own order of sockets, and that has to be
    known. So we hold a duplicate of each socket: then a socket leaves its group
    when we close ours, one at a time, and not whenever its process dies.
    """

    backend = "cbpf"
    migrates = False
    """Not while we hold a duplicate, which keeps a queue where it is."""

    def __init__(self, plan: Plan) -> None:
        assert plan.policy.assemble is not None
        self._policy = plan.policy
        self._assemble = plan.policy.assemble
        self._scene = Scene(plan.topology, cbpf.HASH_LENGTH, cbpf.HASH_LENGTH)
        self._members: Sequence[Member] = ()
        self._layout: Layout | None = None
        self._seed = int.from_bytes(os.urandom(4))
        self._try_out(plan)
        self._orders = [cbpf.Order() for _ in plan.binds]
        self._held: dict[int, Sequence[int]] = {}
        self._lost = _may_be_lost(plan)
        self.notes: Sequence[str] = self._lost

    def _try_out(self, plan: Plan) -> None:
        """With all workers the program is as long as it gets: does the kernel take it?"""
        members = [Member(seat.number, seat.weight, seat.cpu) for seat in plan.seats]
        indexes = {member.slot: member.slot for member in members}
        layout = policy.lay(self._policy, members, self._scene)
        try:
            if len(members) > cbpf.HASH_LENGTH:
                raise cbpf.TooLong(f"room for {cbpf.HASH_LENGTH} workers, not {len(members)}")
            program = self._assemble(layout, indexes, self._seed)
        except cbpf.TooLong as error:
            raise KernelError(f"assemble {self._policy.name}", str(error)) from None
        with sockets.scratch() as sock:
            sockets.attach_cbpf(sock.fileno(), program)

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        self._held[slot] = fds
        for order in self._orders:
            order.joined(slot)
        # Indexes past its own are not touched by a newcomer: the program stays right.

    def _rejoined(self, bind: int, slot: int) -> None:
        self._orders[bind].left(slot)
        self._orders[bind].joined(slot)
        self._attach(self._layout)

    def left(self, slot: int) -> None:
        """The last socket of a group moves into the hole, so its index has to be told anew.

        It is not chosen while it moves: its old index is past the end, and the kernel's hash
        would take any socket, also one that is about to be closed.
        """
        moving = {slot, *(order.last for order in self._orders)}
        staying = [member for member in self._members if member.slot not in moving]
        if staying and slot in self._held:
            self._attach(self._lay(staying))
        self._close_sockets(slot)
        self._attach(self._layout)

    def steer(self, members: Sequence[Member]) -> None:
        self._members = members
        self._layout = self._lay(members) if members else None
        sharing = _sharing(self._layout) if self._layout and self._policy.pinned else ()
        self.notes = (*self._lost, *sharing)
        self._attach(self._layout)

    def _lay(self, members: Sequence[Member]) -> Layout:
        scene = msgspec.structs.replace(self._scene, previous=self._layout)
        return policy.lay(self._policy, members, scene)

    def settle(self) -> None:
        bpf.wait_for_programs()

    def held(self, slot: int) -> Sequence[int]:
        return self._held.get(slot, ())

    def saved(self) -> tuple[object, Sequence[int]]:
        slots = [list(order.indexes()) for order in self._orders]
        now = self._layout
        layout = None if now is None else (list(now.entries), list(now.turns))
        return _Orders(self._seed, slots, layout), ()

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        saved = msgspec.convert(value, type=_Orders)
        self._seed = saved.seed
        self._orders = [cbpf.Order(slots) for slots in saved.slots]
        self._held = {slot: mine for slot, mine in held.items() if mine}
        for order in self._orders:
            # Of some only the order speaks: they were about to come or go when it ended.
            unknown = [slot for slot in order.indexes() if slot not in held]
            for slot in (*unknown, *(slot for slot in held if slot not in self._held)):
                order.left(slot)
        if saved.layout is not None:
            self._layout = Layout(*(array("H", words) for words in saved.layout))

    def _attach(self, layout: Layout | None) -> None:
        if not self._held:
            return
        for order, fd in zip(self._orders, next(iter(self._held.values())), strict=True):
            if layout is None:
                sockets.detach(fd)
            else:
                program = self._assemble(layout, order.indexes(), self._seed)
                sockets.attach_cbpf(fd, program)

    def _close_sockets(self, slot: int) -> None:
        for order, fd in zip(self._orders, self._held.pop(slot, ()), strict=False):
            os.close(fd)
            order.left(slot)

    def release(self) -> None:
        for slot in list(self._held):
            self._close_sockets(slot)

    def close(self) -> None:
        self.release()


class _Orders(msgspec.Struct):
    """The slots of each group in the kernel's order, the seed of the hash, and entries and
    turns of the layout."""

    seed: int
    slots: list[list[int]]
    layout: tuple[list[int], list[int]] | None


def _sharing(layout: Layout) -> Sequence[str]:
    if any(entry & abi.ROW for entry in layout.entries):
        return ("workers that share a CPU are taken by chance, as classic BPF cannot take turns",)
    return ()


class _Group:
    """One bind's own maps and program.

    The turn counters of the CPUs start apart: were they together, the first
    connections of every CPU would all go to the first slot.
    """

    def __init__(self, plan: Plan, shared: bpf.Map) -> None:
        cpus = len(plan.topology.possible)
        with ExitStack() as undo:
            self.sockets = undo.enter_context(bpf.Map("sockets", plan.slots + reserve.COUNT))
            self.counts = undo.enter_context(bpf.Map("counts", plan.slots + reserve.COUNT))
            self.cpus = undo.enter_context(bpf.Map("cpus"))
            starts = (len(plan.seats) * cpu // cpus for cpu in range(cpus))
            self.cpus.put(0, b"".join(abi.CPU.pack(at, at, _seed(), 0, 0) for at in starts))
            maps = {"table": shared, "sockets": self.sockets, "counts": self.counts}
            self.program, self.migrates = _load(plan, {**maps, "cpus": self.cpus})
            undo.callback(self.program.close)
            self.reserve = Reserve(lambda place, fd: self.join(plan.slots + place, fd))
            undo.callback(self.reserve.close)
            self.close = undo.pop_all().close

    def join(self, slot: int, fd: int) -> None:
        self.sockets.put_socket(slot, fd)
        # Each time: with the last socket of a group its program is gone too.
        sockets.attach_ebpf(fd, self.program.fileno())

    def descriptors(self) -> Sequence[int]:
        return [each.fileno() for each in (self.sockets, self.counts, self.cpus, self.program)]

    def receive(self, fds: Sequence[int]) -> None:
        """Go on with the maps and program of one that is gone."""
        for each, fd in zip((self.sockets, self.counts, self.cpus, self.program), fds, strict=True):
            each.become(fd)


class Ebpf:
    """One program for each group; the table is shared by all of them."""

    backend = "ebpf"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._policy = plan.policy
        self._scene = Scene(plan.topology, plan.hash_length)
        self._layout: Layout | None = None
        self._has_served = False
        self._cpus = len(plan.topology.possible)
        with ExitStack() as undo:
            table_map = undo.enter_context(bpf.Map("table"))
            self._table = bpf.Table(table_map)
            undo.callback(self._table.close)
            self._groups = []
            for _ in plan.binds:
                self._groups.append(_Group(plan, table_map))
                undo.callback(self._groups[-1].close)
            self.close = undo.pop_all().close
        self.migrates = self._groups[0].migrates
        self.notes: Sequence[str] = _may_be_lost(plan, self.migrates)

    @property
    def reserve(self) -> Sequence[socket.socket]:
        return [sock for group in self._groups for sock in group.reserve.sockets]

    def open_reserve(self) -> None:
        """Over TCP only, and only where what waits there can be moved."""
        self._table.fill(table.all_to(self._plan.slots).parts())
        for group, bind in zip(self._groups, self._plan.binds, strict=True):
            if bind.protocol == "tcp" and self.migrates:
                group.reserve.open(bind, self._plan.service.backlog)

    def empty_reserve(self) -> None:
        # A handshake that still goes there would find it not listening, and be reset. Not
        # while a service starts, which that would delay: who comes so early may come again.
        if self._has_served:
            self._table.settle()
        self._has_served = True
        for group in self._groups:
            group.reserve.empty()

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """Our copies of the sockets are closed: one that is kept would go on listening,
        and being chosen, after its worker has died."""
        try:
            for group, fd in zip(self._groups, fds, strict=True):
                group.join(slot, fd)
        finally:
            for fd in fds:
                os.close(fd)

    def left(self, slot: int) -> None:
        for group in self._groups:
            group.sockets.delete(slot)

    def steer(self, members: Sequence[Member]) -> None:
        if members:
            scene = msgspec.structs.replace(self._scene, previous=self._layout)
            self._layout = layout = policy.lay(self._policy, members, scene)
        else:
            # Not remembered: when somebody is there again, only what must move does.
            layout = table.all_to(self._plan.slots) if self.reserve else table.EMPTY
        self._table.flip(layout.parts())

    def settle(self) -> None:
        self._table.settle()

    def rescue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        if not self.migrates:
            return
        for index, sock in owned.items():
            if listeners.is_waited_for(sock):
                listeners.move_queue(sock)
                self._groups[index].sockets.put_socket(slot, sock.fileno())

    def release(self) -> None:
        """What still waits in the reserve goes to workers that have not closed yet."""
        for group in self._groups:
            group.reserve.close()

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        groups = self._groups if bind is None else [self._groups[bind]]
        raw = b"".join(group.counts.per_cpu(slot, self._cpus) for group in groups)
        columns = zip(*abi.COUNT.iter_unpack(raw), strict=True)
        return Counts(*(sum(column) for column in columns))

    def retire(self, slot: int) -> Counts | None:
        counted = self.counts(slot)
        for group in self._groups:
            group.counts.put(slot, bytes(abi.COUNT.size * self._cpus))
        return counted

    def unsteered(self) -> int | None:
        raw = b"".join(group.cpus.per_cpu(0, self._cpus) for group in self._groups)
        return sum(int(last) for *_, last in abi.CPU.iter_unpack(raw))

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def saved(self) -> tuple[object, Sequence[int]]:
        fds = [self._table.map.fileno()]
        for group in self._groups:
            fds += group.descriptors()
        counts = [len(group.reserve.sockets) for group in self._groups]
        return counts, [*fds, *(sock.fileno() for sock in self.reserve)]

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        counts = msgspec.convert(value, type=list[int])
        rest = iter(fds)
        self._table.become(next(rest))
        for group in self._groups:
            group.receive(list(islice(rest, 4)))
        for group, count in zip(self._groups, counts, strict=True):
            group.reserve.receive(list(islice(rest, count)))
        self._layout = table.read(self._table.active())
        self._has_served = True


def _load(plan: Plan, maps: dict[str, bpf.Map]) -> tuple[bpf.Program, bool]:
    """The policy's program, and whether it migrates: not where the kernel cannot."""
    assert plan.policy.source is not None
    code = compile.load(compile.sources() / f"{plan.policy.source}.c").programs
    name = f"steer_{plan.policy.name}"
    try:
        kind = abi.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE
        return bpf.Program(name, code["migrate"], maps, kind), True
    except VerifierError:
        raise
    except KernelError as error:
        if error.cause != "EINVAL":
            raise
    return bpf.Program(name, code["plain"], maps, abi.BPF_SK_REUSEPORT_SELECT), False


def _seed() -> int:
    """For steer_random(), which never leaves 0."""
    return int.from_bytes(os.urandom(4)) | 1


_BACKENDS: dict[str, Callable[[Plan], Steering]] = {
    policy.EBPF: Ebpf,
    policy.CBPF: Cbpf,
    policy.KERNEL: Kernel,
}
