"""Carries a policy out on one rung of the ladder: three doors of one shape.

A backend is told which sockets join and leave and which members may be chosen;
what it has to do to the kernel for that is its own affair.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import msgspec

from steer import abi, cbpf, policy
from steer.errors import KernelError, VerifierError
from steer.kernel import bpf, compile, sockets
from steer.plan import Plan
from steer.policy import Scene
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

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """Take in the sockets of a new worker, one for each bind; the fds become ours."""

    def left(self, slot: int) -> None:
        """The worker in `slot` has ended, or lost its sockets."""

    def steer(self, members: Sequence[Member]) -> None:
        """From now on choose among these, and these only."""

    def release(self) -> None:
        """The service ends: hold no socket open that its worker closes."""

    def counts(self, slot: int) -> Counts | None:
        """What was selected so far; None where nobody counts."""

    def retire(self, slot: int) -> Counts | None:
        """The same, and begin anew at nothing: the slot is somebody else's from now on."""

    def unsteered(self) -> int | None:
        """Selections that were left to the kernel's hash, as no live slot was found."""

    def close(self) -> None:
        """Let go of everything."""


def open_backend(backend: str, plan: Plan) -> Steering:
    """Make the backend ready, before there is any socket.

    Raises:
        KernelError: this rung does not hold; the reason is in it.
    """
    return _BACKENDS[backend](plan)


class Kernel:
    """No program: the kernel hashes over all sockets of a group."""

    backend = "kernel"
    notes: Sequence[str] = ()

    def __init__(self, plan: Plan) -> None:
        pass

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)

    def left(self, slot: int) -> None:
        pass

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def release(self) -> None:
        pass

    def counts(self, slot: int) -> Counts | None:
        return None

    def retire(self, slot: int) -> Counts | None:
        return None

    def unsteered(self) -> int | None:
        return None

    def close(self) -> None:
        pass


class Cbpf:
    """A classic program for each group, rewritten at every change.

    Such a program speaks in the kernel's own order of sockets, and that has to be
    known. So we hold a duplicate of each socket: then a socket leaves its group
    when we close ours, one at a time, and not whenever its process dies.
    """

    backend = "cbpf"

    def __init__(self, plan: Plan) -> None:
        assert plan.policy.assemble is not None
        self._policy = plan.policy
        self._assemble = plan.policy.assemble
        self._scene = Scene(plan.topology, cbpf.HASH_LENGTH, cbpf.HASH_LENGTH)
        self._layout: Layout | None = None
        self._seed = int.from_bytes(os.urandom(4))
        self._try_out(plan)
        self._orders = [cbpf.Order() for _ in plan.binds]
        self._held: dict[int, Sequence[int]] = {}
        self.notes: Sequence[str] = ()

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

    def left(self, slot: int) -> None:
        """The last socket of a group moves into the hole, so its index has to be told anew."""
        self._close_sockets(slot)
        self._attach()

    def steer(self, members: Sequence[Member]) -> None:
        scene = msgspec.structs.replace(self._scene, previous=self._layout)
        self._layout = policy.lay(self._policy, members, scene) if members else None
        self.notes = _sharing(self._layout) if self._layout and self._policy.pinned else ()
        self._attach()

    def _attach(self) -> None:
        if not self._held:
            return
        for order, fd in zip(self._orders, next(iter(self._held.values())), strict=True):
            if self._layout is None:
                sockets.detach(fd)
            else:
                program = self._assemble(self._layout, order.indexes(), self._seed)
                sockets.attach_cbpf(fd, program)

    def _close_sockets(self, slot: int) -> None:
        for order, fd in zip(self._orders, self._held.pop(slot, ()), strict=False):
            os.close(fd)
            order.left(slot)

    def counts(self, slot: int) -> Counts | None:
        return None

    def retire(self, slot: int) -> Counts | None:
        return None

    def unsteered(self) -> int | None:
        return None

    def release(self) -> None:
        for slot in list(self._held):
            self._close_sockets(slot)

    def close(self) -> None:
        self.release()


def _sharing(layout: Layout) -> Sequence[str]:
    if any(entry & abi.ROW for entry in layout.entries):
        return ("workers that share a CPU are taken by chance, as classic BPF cannot take turns",)
    return ()


class _Group:
    """One bind's own maps and program.

    The turn counters of the CPUs start apart: were they together, the first
    connections of every CPU would all go to the first slot.
    """

    def __init__(self, plan: Plan, table: bpf.Map) -> None:
        cpus = len(plan.topology.possible)
        with ExitStack() as undo:
            self.sockets = undo.enter_context(bpf.Map("sockets", plan.slots))
            self.counts = undo.enter_context(bpf.Map("counts", plan.slots))
            self.cpus = undo.enter_context(bpf.Map("cpus"))
            starts = (len(plan.seats) * cpu // cpus for cpu in range(cpus))
            self.cpus.put(0, b"".join(abi.CPU.pack(at, at, _seed(), 0, 0) for at in starts))
            maps = {"table": table, "sockets": self.sockets, "counts": self.counts}
            self.program, self.migrates = _load(plan, {**maps, "cpus": self.cpus})
            undo.callback(self.program.close)
            self.close = undo.pop_all().close


class Ebpf:
    """One program for each group; the table is shared by all of them."""

    backend = "ebpf"

    def __init__(self, plan: Plan) -> None:
        self._policy = plan.policy
        self._scene = Scene(plan.topology, plan.hash_length)
        self._layout: Layout | None = None
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
        self.notes: Sequence[str] = () if self._groups[0].migrates else (_NO_MIGRATION,)

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        """Our copies of the sockets are closed: one that is kept would go on listening,
        and being chosen, after its worker has died."""
        try:
            for group, fd in zip(self._groups, fds, strict=True):
                group.sockets.put_socket(slot, fd)
                # Each time: with the last socket of a group its program is gone too.
                sockets.attach_ebpf(fd, group.program.fileno())
        finally:
            for fd in fds:
                os.close(fd)

    def left(self, slot: int) -> None:
        for group in self._groups:
            group.sockets.delete(slot)

    def steer(self, members: Sequence[Member]) -> None:
        scene = msgspec.structs.replace(self._scene, previous=self._layout)
        self._layout = policy.lay(self._policy, members, scene)
        self._table.flip(self._layout.parts())

    def release(self) -> None:
        """None is held."""

    def counts(self, slot: int) -> Counts | None:
        raw = b"".join(group.counts.per_cpu(slot, self._cpus) for group in self._groups)
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


_NO_MIGRATION = "queued connections of a closing worker are lost: migration needs Linux 5.14"


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
