"""The backend that needs no privilege: a classic BPF program for each group."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from steer import abi
from steer.backends import shortfalls
from steer.backends.anchors import is_left_to_hash
from steer.backends.backup import Lend
from steer.backends.socket_order import SocketOrder, StoredOrder
from steer.backends.without_ebpf import WithoutEbpf
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import KernelError
from steer.policy import builtin, classic
from steer.policy.builtin import LayoutContext
from steer.policy.layout import Layout, Member, by_share
from steer.sockets import group_program, listeners, reuseport


class StoredCbpf(msgspec.Struct):
    """What the next controller needs to write the same programs.

    Args:
        seed: the seed of the hash.
        layout: the entries and turns of the table; None while no worker can be selected.
    """

    seed: int
    order: StoredOrder
    layout: tuple[list[int], list[int]] | None


class Cbpf(WithoutEbpf):
    """A classic program for each group, written again after every change.

    Such a program selects by the order of sockets in the kernel, which has to be known. So this
    backend holds a duplicate of each socket: a socket leaves its group when the duplicate is
    closed, one at a time, and not when its process dies.

    Args:
        empty: load nothing, because `restore` follows.
    """

    name = "cbpf"
    needs_order = True

    def __init__(self, plan: Plan, empty: bool = False) -> None:
        self._plan = plan
        self._context = LayoutContext(plan.topology, classic.HASH_LENGTH, classic.HASH_LENGTH)
        self._members: Sequence[Member] = ()
        self._layout: Layout | None = None
        self._seed = int.from_bytes(os.urandom(4))
        if not empty:
            self._try_out(plan)
        self._order = SocketOrder(plan.binds)
        self._programs: list[list[classic.Insn] | None] = [None for _ in plan.binds]
        self._held: dict[int, Sequence[int]] = {}
        self._published = self._synchronized = 0
        self._lost = shortfalls.may_be_lost(plan.binds)

    def _try_out(self, plan: Plan) -> None:
        """Attach the program for all workers, which is the longest one, to a socket of no group.

        Raises:
            KernelError: it is too long, or the kernel refuses it.
        """
        members = [Member(spec.number, spec.weight, spec.cpu) for spec in plan.specs]
        indexes = {member.slot: member.slot for member in members}
        layout = builtin.build_layout(plan.policy, members, self._context)
        try:
            if len(members) > classic.HASH_LENGTH:
                raise classic.TooLong(f"room for {classic.HASH_LENGTH} workers, not {len(members)}")
            program = _assemble(plan, layout, indexes, self._seed)
        except classic.TooLong as error:
            raise KernelError(f"assemble {plan.policy.name}", str(error)) from None
        with group_program.scratch() as sock:
            group_program.attach_cbpf(sock.fileno(), program)

    @property
    def notes(self) -> Sequence[str]:
        labels = [self._plan.binds[bind].label for bind in sorted(self._order.unknown)]
        unknown = [f"{label}: {_ORDER_UNKNOWN}" for label in labels]
        return (*self._lost, *self._sharing(), *unknown)

    def _sharing(self) -> Sequence[str]:
        if self._layout is None or not self._plan.policy.pinned:
            return ()
        has_rows = any(entry & abi.ROW for entry in self._layout.entries)
        return (_TAKES_NO_TURNS,) if has_rows else ()

    @property
    def order(self) -> Sequence[int] | None:
        return self._order.slots

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        return self._order.anchors

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        return self._order.anchors.all

    def open_anchors(self) -> None:
        self._order.open_anchors(self._plan.service)

    def renew_anchors(self, service: Service) -> None:
        if self.anchors and is_left_to_hash(service):
            self._order.close_anchors()
            self._attach(self._layout)

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        self._held[slot] = fds
        self._order.add(slot)
        # Otherwise the program stays right: the indexes of the sockets that it selects stay.
        if self._order.unknown or (self._layout is None and self.anchors):
            self._attach(self._layout)

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        self.add_member(slot, fds)

    def is_member(self, slot: int, bind: int) -> bool | None:
        """Attach the program that is attached again, through this socket. If the socket is in no
        group the kernel says EINVAL (reuseport_attach_prog() of net/core/sock_reuseport.c)."""
        program, fds = self._programs[bind], self._held.get(slot, ())
        if program is None or not fds or self._plan.binds[bind].protocol == "tcp":
            return None  # a listener is in its group as long as it listens
        if group_program.is_locked(fds[bind]):
            return None
        return _is_attached(fds[bind], program)

    def record_departure(self, slot: int, bind: int) -> None:
        self._order.remove(bind, slot)
        self._attach(self._layout)

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        self._order.move_to_end(bind, slot)
        self._attach(self._layout)

    def remove_member(self, slot: int) -> None:
        """Remove the sockets of a slot, and attach a program for the order there is then.

        The kernel moves the last socket of the group to the free place, so its index changes. It is
        not selected while it moves: its old index is past the end then, and the kernel's hash would
        select any socket, also one that is about to be closed, or an anchor. If no other worker
        could be selected meanwhile it stays where it is, and a filler moves.
        """
        if not self._held:  # the service ends
            return
        self._order.check()
        moving = {slot, *self._order.last()}
        staying = [member for member in self._members if member.slot not in moving]
        try:
            if staying and slot in self._held:
                self._attach(self._build_layout(staying))
            elif self._members and slot in self._held:
                self._order.fill_place_of(slot)
        finally:
            # Also after an error: a socket that stays open is selected, and nobody accepts there.
            self._shut_down(slot)
            self._close_sockets(slot)
        self._attach(self._layout)

    def _shut_down(self, slot: int) -> None:
        """Take the sockets of a slot out of their groups, also where another process has them open
        after the worker has ended."""
        for bind, fd in zip(self._plan.binds, self._held.get(slot, ()), strict=False):
            if bind.protocol == "tcp":
                listeners.end(fd)
            else:
                with suppress(OSError), reuseport.duplicate(fd) as sock:
                    reuseport.take_out(sock)

    def _close_sockets(self, slot: int) -> None:
        for bind, fd in enumerate(self._held.pop(slot, ())):
            os.close(fd)
            self._order.remove(bind, slot)

    def steer(self, members: Sequence[Member]) -> None:
        self._published += 1
        self._members = members
        self._layout = self._build_layout(members) if members else None
        self._attach(self._layout)

    def _build_layout(self, members: Sequence[Member]) -> Layout:
        context = msgspec.structs.replace(self._context, previous=self._layout)
        return builtin.build_layout(self._plan.policy, members, context)

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        self._try_out(plan)
        if plan.policy != self._plan.policy:
            self._layout = None  # of another policy: not to be kept as far as possible
        self._plan = plan
        self.steer(members)

    def detach(self, lend: Lend) -> None:
        self._order.close_anchors()
        self._attach(None)

    def reattach(self, lend: Lend) -> None:
        if self._layout is not None:
            self._attach(self._layout)

    def _attach(self, layout: Layout | None) -> None:
        """Attach programs that select by a layout; None while no worker can be selected: then the
        kernel's hash selects any socket."""
        if not self._held:
            return
        for bind in range(len(self._plan.binds)):
            slots = [slot for slot in self._order.indexes(bind) if slot in self._held]
            members = {slot: self._held[slot][bind] for slot in slots}
            wanted = None if bind in self._order.unknown else layout or self._anyone(bind, members)
            if members and wanted is None:
                self._programs[bind] = None
                group_program.detach(next(iter(members.values())))
            elif members and wanted is not None:
                self._attach_to(bind, members, wanted)

    def _anyone(self, bind: int, members: Mapping[int, int]) -> Layout | None:
        """A layout of all members, for a group with an anchor, which the kernel's hash would
        select, too."""
        return by_share([Member(slot) for slot in members]) if bind in self.anchors else None

    def _attach_to(self, bind: int, members: Mapping[int, int], layout: Layout) -> None:
        """Attach a program through any member. If that member turns out to have left the group,
        the order has changed: assemble the program again, and attach it through another.

        Args:
            members: descriptors by slot.
        """
        program = _assemble(self._plan, layout, self._order.indexes(bind), self._seed)
        through = group_program.unlocked(list(members.values()))
        if bind in self.anchors and group_program.is_locked(through):
            # All workers may have locked their sockets. The anchor is not locked.
            group_program.attach_cbpf(self.anchors[bind].fileno(), program)
        elif not _is_attached(through, program):
            others = {slot: fd for slot, fd in members.items() if fd != through}
            if not others:
                raise KernelError("attach classic BPF program", "EINVAL: no socket is in its group")
            self._order.remove(bind, next(slot for slot in members if slot not in others))
            self._attach_to(bind, others, layout)
            return
        self._programs[bind] = program

    def grace_period(self) -> tuple[object, int] | None:
        return None if self._synchronized == self._published else (self, self._published)

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        _, self._synchronized = publication

    def held(self, slot: int) -> Sequence[int]:
        return self._held.get(slot, ())

    def stored(self) -> tuple[object, Sequence[int]]:
        order, fds = self._order.stored()
        now = self._layout
        layout = None if now is None else (list(now.entries), list(now.turns))
        return StoredCbpf(self._seed, order, layout), fds

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        stored = msgspec.convert(value, type=StoredCbpf)
        self._seed = stored.seed
        self._held = {slot: mine for slot, mine in held.items() if mine}
        self._order.restore(stored.order, fds, held)
        if stored.layout is not None:
            entries, turns = (array("H", words) for words in stored.layout)
            self._layout = Layout(entries, turns)

    def reassert(self, sockets: Mapping[int, Mapping[int, socket.socket]]) -> None:
        self._attach(self._layout)

    def release(self) -> None:
        self._order.close_anchors()
        for slot in list(self._held):
            self._close_sockets(slot)

    def close(self) -> None:
        self.release()


def _is_attached(fd: int, program: list[classic.Insn]) -> bool:
    """Attach a program to the group of a socket.

    Returns:
        False if the socket is in no group.

    Raises:
        KernelError
    """
    try:
        group_program.attach_cbpf(fd, program)
    except group_program.NoMember:
        return False
    return True


def _assemble(
    plan: Plan, layout: Layout, indexes: Mapping[int, int], seed: int
) -> list[classic.Insn]:
    assert plan.policy.assemble is not None
    return plan.policy.assemble(layout, indexes, seed, plan.params)


_TAKES_NO_TURNS = (
    "workers that share a CPU are selected at random, because classic BPF cannot take turns"
)
_ORDER_UNKNOWN = (
    "workers have connected sockets there, as DTLS servers do, and before Linux 6.13 classic BPF "
    "cannot tell them from the sockets of workers that start later: the kernel's hash selects; use "
    "ebpf or a wildcard address"
)
