"""The backend that asks for no privilege: a classic program for each group."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from steer import abi
from steer.backends import shortfalls
from steer.backends.anchors import ANCHOR, Anchors, is_left_to_hash, may_split
from steer.backends.backup import Lend
from steer.backends.without_ebpf import WithoutEbpf
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import KernelError
from steer.policy import builtin, classic
from steer.policy.builtin import LayoutContext
from steer.policy.layout import Layout, Member, by_share
from steer.sockets import listeners, members, reuseport


class Cbpf(WithoutEbpf):
    """A classic program for each group, rewritten at every change.

    Such a program speaks in the kernel's own order of sockets, and that has to be
    known. So we hold a duplicate of each socket: then a socket leaves its group
    when we close ours, one at a time, and not whenever its process dies.
    """

    name = "cbpf"
    needs_order = True

    def __init__(self, plan: Plan, empty: bool = False) -> None:
        self._plan = plan
        self._scene = LayoutContext(plan.topology, classic.HASH_LENGTH, classic.HASH_LENGTH)
        self._members: Sequence[Member] = ()
        self._layout: Layout | None = None
        self._seed = int.from_bytes(os.urandom(4))
        if not empty:
            self._try_out(plan)
        self._anchors = Anchors()
        self._upset: set[int] = set()
        self._orders = [classic.Order() for _ in plan.binds]
        self._programs: list[list[classic.Insn] | None] = [None for _ in plan.binds]
        self._held: dict[int, Sequence[int]] = {}
        self._steered = self._synchronized = 0
        self._lost = shortfalls.may_be_lost(plan)
        self._sharing: Sequence[str] = ()

    def _try_out(self, plan: Plan) -> None:
        """With all workers the program is as long as it gets: does the kernel take it?"""
        members = [Member(spec.number, spec.weight, spec.cpu) for spec in plan.specs]
        indexes = {member.slot: member.slot for member in members}
        layout = builtin.build_layout(plan.policy, members, self._scene)
        try:
            if len(members) > classic.HASH_LENGTH:
                raise classic.TooLong(f"room for {classic.HASH_LENGTH} workers, not {len(members)}")
            program = _assemble(plan, layout, indexes, self._seed)
        except classic.TooLong as error:
            raise KernelError(f"assemble {plan.policy.name}", str(error)) from None
        with reuseport.scratch() as sock:
            reuseport.attach_cbpf(sock.fileno(), program)

    @property
    def order(self) -> Sequence[int] | None:
        """As it is once the anchors have left."""
        if self._upset:
            return None
        found = {tuple(_of_workers(order).indexes()) for order in self._orders}
        return found.pop() if len(found) == 1 else None

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        return self._anchors

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        return self._anchors.all

    def open_anchors(self) -> None:
        self._anchors.open(self._plan.binds, self._plan.service)
        for index in self._anchors:
            self._orders[index].joined(ANCHOR)

    def renew_anchors(self, service: Service) -> None:
        if self._anchors and is_left_to_hash(service):
            self._close_anchors()
            self._attach(self._layout)

    @property
    def notes(self) -> Sequence[str]:
        upset = [f"{self._plan.binds[index].label}: {_UPSET}" for index in sorted(self._upset)]
        return (*self._lost, *self._sharing, *upset)

    def _see_order(self) -> None:
        """When one has come or is about to go: is it where we take it to be? A connected socket
        that a worker has at the address may stand in the order, too, and who knows where."""
        for index, bind in enumerate(self._plan.binds):
            is_known = index not in self._upset and may_split(bind)
            if is_known and members.connected_stay() and members.has_connected(bind):
                self._upset.add(index)
                if index in self._anchors:
                    self._anchors.drop(index)

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        self._held[slot] = fds
        for order in self._orders:
            order.joined(slot)
        for index, bind in enumerate(self._plan.binds):
            self._empty_one(index)
            self._anchors.renew(index, bind)
        self._see_order()
        # Indexes past its own are not touched by a newcomer: the program stays right.
        if self._upset or (self._layout is None and self._anchors):
            self._attach(self._layout)

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        self.add_member(slot, fds)

    def is_member(self, slot: int, bind: int) -> bool | None:
        """By attaching through it what is attached: to a socket that is in no group the kernel
        says EINVAL (reuseport_attach_prog() of net/core/sock_reuseport.c)."""
        program, fds = self._programs[bind], self._held.get(slot, ())
        if program is None or not fds or self._plan.binds[bind].protocol == "tcp":
            return None  # a listener is in its group as long as it listens
        if reuseport.is_locked(fds[bind]):
            return None
        return _is_attached(fds[bind], program)

    def record_departure(self, slot: int, bind: int) -> None:
        """As when one leaves: the last is in its place now."""
        _leave(self._orders[bind], slot)
        self._attach(self._layout)

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        _leave(self._orders[bind], slot)
        self._orders[bind].joined(slot)
        self._attach(self._layout)

    def remove_member(self, slot: int) -> None:
        """The last socket of a group moves into the hole, so its index has to be told anew.

        It is not chosen while it moves: its old index is past the end, and the kernel's hash
        would take any socket, also one that is about to be closed, or an anchor. Where nobody
        else could be chosen meanwhile it stays where it is, and a filler moves.
        """
        if not self._held:  # the service ends
            return
        self._see_order()
        moving = {slot, *(order.last for order in self._orders)}
        staying = [member for member in self._members if member.slot not in moving]
        try:
            if staying and slot in self._held:
                self._attach(self._lay(staying))
            elif self._members and slot in self._held:
                self._fill_hole(slot)
        finally:
            # Whatever fails: a socket that stays open is chosen, and nobody takes what waits.
            self._shut_down(slot)
            self._close_sockets(slot)
        self._attach(self._layout)

    def _fill_hole(self, slot: int) -> None:
        """Where a worker would move into it; `slot` leaves when we close its sockets."""
        for index in self._anchors:
            order = self._orders[index]
            if slot not in order or order.last in (None, slot, *_ours(order)):
                continue
            number = self._anchors.fill(index, self._plan.binds[index])
            if number is not None:
                order.joined(number)

    def _empty_one(self, index: int) -> None:
        """A newcomer, which is not chosen yet, is the last and moves into the hole."""
        number = self._anchors.empty_one(index)
        if number is not None:
            self._orders[index].left(number)

    def steer(self, members: Sequence[Member]) -> None:
        self._steered += 1
        self._members = members
        self._layout = self._lay(members) if members else None
        is_shared = self._layout and self._plan.policy.pinned
        self._sharing = _sharing(self._layout) if self._layout and is_shared else ()
        self._attach(self._layout)

    def _lay(self, members: Sequence[Member]) -> Layout:
        scene = msgspec.structs.replace(self._scene, previous=self._layout)
        return builtin.build_layout(self._plan.policy, members, scene)

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        self._try_out(plan)
        if plan.policy != self._plan.policy:
            self._layout = None  # another's is no start
        self._plan = plan
        self.steer(members)

    def detach(self, lend: Lend) -> None:
        self._close_anchors()
        self._attach(None)

    def _close_anchors(self) -> None:
        for index in self._anchors:
            for number in (ANCHOR, *self._anchors.fillers(index)):
                _leave(self._orders[index], number)
        self._anchors.close()

    def reattach(self, lend: Lend) -> None:
        if self._layout is not None:
            self._attach(self._layout)

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        self._attach(self._layout)

    def grace_period(self) -> tuple[object, int] | None:
        return None if self._synchronized == self._steered else (self, self._steered)

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        _, self._synchronized = publication

    def held(self, slot: int) -> Sequence[int]:
        return self._held.get(slot, ())

    def stored(self) -> tuple[object, Sequence[int]]:
        slots = [list(order.indexes()) for order in self._orders]
        now = self._layout
        layout = None if now is None else (list(now.entries), list(now.turns))
        upset, filled = sorted(self._upset), self._anchors.filled
        value = StoredCbpf(self._seed, slots, layout, list(self._anchors), upset, filled)
        return value, [sock.fileno() for sock in self.controller_sockets]

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        saved = msgspec.convert(value, type=StoredCbpf)
        self._seed = saved.seed
        self._orders = [classic.Order(slots) for slots in saved.slots]
        self._held = {slot: mine for slot, mine in held.items() if mine}
        anchors = len(saved.anchored)
        self._anchors.receive(saved.anchored, fds[:anchors])
        self._anchors.receive_fillers(saved.filled, fds[anchors:])
        self._upset = set(saved.upset)
        for order in self._orders:
            # Of some only the order speaks: they were about to come or go when it ended.
            unknown = [slot for slot in order.indexes() if slot > ANCHOR and slot not in held]
            for slot in (*unknown, *(slot for slot in held if slot not in self._held)):
                _leave(order, slot)
        if saved.layout is not None:
            entries, turns = (array("H", words) for words in saved.layout)
            self._layout = Layout(entries, turns)

    def _attach(self, layout: Layout | None) -> None:
        """Args: layout: None where nobody serves: all who have a socket are as good."""
        if not self._held:
            return
        for bind, order in enumerate(self._orders):
            members = {
                slot: self._held[slot][bind] for slot in order.indexes() if slot in self._held
            }
            chosen = None if bind in self._upset else layout or self._anyone(bind, members)
            if members and chosen is None:
                self._programs[bind] = None
                reuseport.detach(next(iter(members.values())))
            elif members and chosen is not None:
                self._attach_to(bind, members, chosen)

    def _anyone(self, bind: int, members: Mapping[int, int]) -> Layout | None:
        """Where the kernel's hash would choose an anchor, too."""
        return by_share([Member(slot) for slot in members]) if bind in self._anchors else None

    def _attach_to(self, bind: int, members: Mapping[int, int], layout: Layout) -> None:
        """Through any member. One that turns out to be none has left its group, and another is in
        its place there.

        Args:
            members: descriptors by slot.
        """
        order = self._orders[bind]
        program = _assemble(self._plan, layout, order.indexes(), self._seed)
        through = reuseport.unlocked(list(members.values()))
        if bind in self._anchors and reuseport.is_locked(through):
            # All of those there are so far may have locked theirs: ours is not.
            reuseport.attach_cbpf(self._anchors[bind].fileno(), program)
        elif not _is_attached(through, program):
            there = {slot: fd for slot, fd in members.items() if fd != through}
            if not there:
                raise KernelError("attach classic BPF program", "EINVAL: no socket is in its group")
            order.left(next(slot for slot, fd in members.items() if fd == through))
            self._attach_to(bind, there, layout)
            return
        self._programs[bind] = program

    def _shut_down(self, slot: int) -> None:
        """Who else has a socket of a worker that has ended takes nothing from it, and does not
        keep it in its place in the kernel's array."""
        for bind, fd in zip(self._plan.binds, self._held.get(slot, ()), strict=False):
            if bind.protocol == "tcp":
                listeners.end(fd)
            else:
                with suppress(OSError), reuseport.duplicate(fd) as sock:
                    reuseport.take_out(sock)

    def _close_sockets(self, slot: int) -> None:
        for order, fd in zip(self._orders, self._held.pop(slot, ()), strict=False):
            os.close(fd)
            _leave(order, slot)

    def release(self) -> None:
        self._close_anchors()
        for slot in list(self._held):
            self._close_sockets(slot)

    def close(self) -> None:
        self.release()


def _of_workers(order: classic.Order) -> classic.Order:
    """As it is once those of ours have left, in the order in which they do."""
    found = classic.Order(order.indexes())
    for number in _ours(order):
        found.left(number)
    return found


def _ours(order: classic.Order) -> list[int]:
    return sorted((each for each in order.indexes() if each <= ANCHOR), reverse=True)


def _leave(order: classic.Order, slot: int) -> None:
    """One whose socket left its group by itself is not there to leave again."""
    if slot in order:
        order.left(slot)


def _is_attached(fd: int, program: list[classic.Insn]) -> bool:
    """Attach it to the group of a socket; whether there is one. Raises KernelError."""
    try:
        reuseport.attach_cbpf(fd, program)
    except reuseport.NoMember:
        return False
    return True


def _assemble(
    plan: Plan, layout: Layout, indexes: Mapping[int, int], seed: int
) -> list[classic.Insn]:
    assert plan.policy.assemble is not None
    return plan.policy.assemble(layout, indexes, seed, plan.params)


class StoredCbpf(msgspec.Struct):
    """The slots of each group in the kernel's order, the seed of the hash, and entries and
    turns of the layout; bind and number of each filler."""

    seed: int
    slots: list[list[int]]
    layout: tuple[list[int], list[int]] | None
    anchored: list[int] = []
    upset: list[int] = []
    filled: list[tuple[int, int]] = []


_UPSET = (
    "workers have connected sockets there, as servers of DTLS do, and before Linux 6.13 classic "
    "BPF cannot tell them from those of workers that start later: the kernel's hash chooses; ebpf, "
    "and a wildcard address, have no such trouble"
)


def _sharing(layout: Layout) -> Sequence[str]:
    if any(entry & abi.ROW for entry in layout.entries):
        return ("workers that share a CPU are taken by chance, as classic BPF cannot take turns",)
    return ()
