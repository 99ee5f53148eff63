"""The backend that does all there is: an eBPF program for each group."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice

import msgspec

from steer import abi
from steer.backends import backup, connections, loaded_policy, shortfalls
from steer.backends.anchors import Anchors, is_left_to_hash
from steer.backends.backup import BackupListeners
from steer.backends.base import Counts, Lend, PolicyValues
from steer.backends.bind_maps import BindMaps
from steer.backends.connections import Counting
from steer.backends.loaded_policy import LoadedPolicy
from steer.backends.policy_cache import PolicyCache
from steer.config.plan import Plan
from steer.config.service import Service
from steer.errors import KernelError
from steer.policy import layout
from steer.policy.layout import Layout, Member
from steer.sockets import listeners, reuseport


class StoredEbpf(msgspec.Struct):
    """For who goes on: how many descriptors are whose, and what was counted."""

    choice: loaded_policy.StoredPolicy
    backups: list[int]
    counting: connections.StoredCounting
    anchored: list[int] = []


class Ebpf:
    """One program for each group; the policy's table is shared by all of them."""

    name = "ebpf"
    order = None
    needs_order = False

    def __init__(self, plan: Plan, empty: bool = False, counting: Counting | None = None) -> None:
        self._plan = plan
        self._is_counted = counting is not None
        self.owns_counting = counting is None
        self._somebody = False
        self._anchors = Anchors()
        self._joined: set[int] = set()
        self._cpus = len(plan.topology.possible)
        self._choices = PolicyCache(self._load)
        over_tcp = sum(bind.protocol == "tcp" for bind in plan.binds)
        with ExitStack() as undo:
            self.counting = counting or Counting((plan.slots + backup.COUNT) * over_tcp)
            undo.callback(self._close_counting)
            self._groups: list[BindMaps] = []
            for _ in plan.binds:
                self._groups.append(BindMaps(plan))
                undo.callback(self._groups[-1].close)
            self.backup = BackupListeners(
                plan, self.counting, self._join, self._prepare_for_backup, self._synchronize
            )
            undo.callback(self.backup.close)
            undo.callback(self._anchors.close)
            undo.callback(self._choices.close)
            if not empty:
                self._choices.put_in_force(self._load(plan))
            self.close = undo.pop_all().close

    @property
    def _choice(self) -> LoadedPolicy:
        return self._choices.current

    def _load(self, plan: Plan) -> LoadedPolicy:
        groups = [{**each.maps, **self.counting.maps} for each in self._groups]
        return LoadedPolicy.load(plan, groups)

    def _close_counting(self) -> None:
        if self.owns_counting:
            self.counting.close()

    def _prepare_for_backup(self) -> bool:
        """While nobody serves the table leads to the backup listeners; and their queues can be
        moved if the program migrates."""
        if not self._somebody:
            self._choice.prepare(self.backup.slots[0])
        return self._choice.migrates

    def _synchronize(self) -> None:
        self._choice.synchronize()

    def _join(self, index: int, slot: int, fd: int) -> None:
        self._groups[index].sockets.put_socket(slot, fd)
        # Each time: with the last socket of a group its program is gone too.
        self._attach_through(index, fd)
        self._anchors.renew(index, self._plan.binds[index])

    def _attach_through(self, index: int, fd: int) -> None:
        """For the whole group; where this member is locked, through another one."""
        with suppress(reuseport.Locked):
            reuseport.attach_ebpf(fd, self._choice.programs[index].fileno())

    @property
    def notes(self) -> Sequence[str]:
        lost = shortfalls.may_be_lost(self._plan, self._choice.migrates)
        return (*lost, *shortfalls.of_load(self._plan, self.counting.why_not))

    @property
    def anchors(self) -> Mapping[int, socket.socket]:
        return self._anchors

    @property
    def controller_sockets(self) -> Sequence[socket.socket]:
        return (*self.backup.sockets, *self._anchors.values())

    def open_anchors(self) -> None:
        self._anchors.open(self._plan.binds, self._plan.service)

    def renew_anchors(self, service: Service) -> None:
        if is_left_to_hash(service):
            self._anchors.close()
        self._plan = msgspec.structs.replace(self._plan, service=service)

    def add_member(self, slot: int, fds: Sequence[int]) -> None:
        """Our copies of the sockets are closed: one that is kept would go on listening,
        and being chosen, after its worker has died."""
        try:
            self.counting.add_listeners(slot, fds, self._plan.binds)
            self._join_all(slot, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def take_over(self, slot: int, fds: Sequence[int]) -> None:
        try:
            if not self._is_counted:
                self.counting.add_listeners(slot, fds, self._plan.binds)
            self._join_all(slot, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _join_all(self, slot: int, fds: Sequence[int]) -> None:
        for index, fd in enumerate(fds):
            self._join(index, slot, fd)
        self._joined.add(slot)
        self._spare_those_there()

    def _spare_those_there(self) -> None:
        """While nobody serves, datagrams wait at workers that start. The kernel's hash would
        see to that, but it would choose anchors, too."""
        if self._anchors and not self._somebody:
            self._choice.spare(sorted(self._joined))

    def remove_member(self, slot: int) -> None:
        self.counting.remove_listeners(slot)
        self._forget_flows(slot)
        for group in self._groups:
            group.sockets.delete(slot)
        self._joined.discard(slot)
        self._spare_those_there()

    def steer(self, members: Sequence[Member]) -> None:
        if members and not self._somebody:
            # What came meanwhile is known to be where nobody is.
            self._forget_flows(self.backup.slots[0])
            self._forget_flows(abi.NO_SLOT)
        self._choice.steer(members, self._nobody())
        self._somebody = bool(members)

    def _nobody(self) -> Layout:
        slot = self.backup.slots[0] if self.backup.sockets else abi.NO_SLOT
        return layout.all_to(slot, sorted(self._joined) if self._anchors else ())

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        if self._choice.can_become(plan):
            self._plan = plan
            self._choice.become(plan)
            self.steer(members)
            return
        fresh = self._choices.for_plan(plan)
        try:
            fresh.follow(self._choice)
            fresh.become(plan)
            fresh.steer(members, self._nobody())
            self._attach(fresh, lend)
            fresh.begin()
        except BaseException:
            self._choices.forget(fresh)
            raise
        self._plan = plan
        before = self._choice
        self._choices.put_in_force(fresh)
        before.left()
        if before.remembers():
            # What it knows is soon not true any more, and may be large.
            self._choices.forget(before)

    def _attach(self, chosen: LoadedPolicy, lend: Lend) -> None:
        """To every group; a group without a socket gets it with the first."""
        with ExitStack() as undo, self._members(lend) as members:
            for index, sock in members.items():
                reuseport.attach_ebpf(sock.fileno(), chosen.programs[index].fileno())
                before = self._choice.programs[index].fileno()
                undo.callback(reuseport.attach_ebpf, sock.fileno(), before)
            undo.pop_all()

    def reattach(self, lend: Lend) -> None:
        with self._members(lend) as members:
            for index, sock in members.items():
                with suppress(reuseport.Locked, reuseport.NoMember):
                    reuseport.attach_ebpf(sock.fileno(), self._choice.programs[index].fileno())

    @contextmanager
    def _members(self, lend: Lend) -> Iterator[Mapping[int, socket.socket]]:
        """A socket of each group, as far as there are any; our own if they do."""
        ours = self.backup.by_bind
        if len(ours) == len(self._groups):
            yield ours
            return
        with lend() as lent:
            yield {**lent, **ours}

    def is_member(self, slot: int, bind: int) -> bool | None:
        """The kernel empties the entry of a socket that leaves its group."""
        return self._groups[bind].sockets.has(slot)

    def record_departure(self, slot: int, bind: int) -> None:
        """Where it is chosen all the same, another is taken (`steer_select` of bpf/steer.h)."""

    def rejoin(self, slot: int, bind: int, sock: socket.socket) -> None:
        self._rejoin(bind, slot, sock)

    def reassert(self, there: Mapping[int, Mapping[int, socket.socket]]) -> None:
        for index, slot, sock in self.backup.listen_again():
            self._rejoin(index, slot, sock)
        self._joined = set(there)
        for slot, socks in there.items():
            for index, sock in socks.items():
                self._rejoin(index, slot, sock)

    def _rejoin(self, index: int, slot: int, sock: socket.socket) -> None:
        try:
            self._groups[index].sockets.put_socket(slot, sock.fileno())
        except KernelError as error:
            if error.errno not in (errno.EBUSY, errno.EINVAL):  # it is there, or does not listen
                raise
        with suppress(reuseport.NoMember):
            self._attach_through(index, sock.fileno())

    def detach(self, lend: Lend) -> None:
        with lend() as lent:
            # Or the kernel's hash would choose them as well.
            self.backup.shut_down()
            self._anchors.close()
            for sock in lent.values():
                reuseport.detach(sock.fileno())
        # The maps may live on for a while, and a socket is in one such map only.
        for group in self._groups:
            for slot in range(self.backup.slots.stop):
                group.sockets.delete(slot)

    def grace_period(self) -> tuple[object, int] | None:
        publication = self._choice.grace_period()
        return None if publication is None else (self._choice, publication)

    def grace_period_ended(self, publication: tuple[object, int]) -> None:
        chosen, number = publication
        if chosen is self._choice:
            self._choice.grace_period_ended(number)

    @property
    def forget_flows(self) -> Callable[[int], None] | None:
        return self._forget_flows if self._choice.remembers() else None

    def _forget_flows(self, slot: int) -> None:
        self.counting.slots.forget_flows(slot)

    @property
    def tell_waiting(self) -> Callable[[int, int], None] | None:
        is_told = self._plan.policy.reads_load and self.counting.why_not
        return self.counting.slots.set_open if is_told else None

    def migrate_queue(self, slot: int, owned: Mapping[int, socket.socket]) -> None:
        if not self._choice.migrates:
            return
        for index, sock in owned.items():
            if listeners.is_waited_for(sock):
                listeners.move_queue(sock)
                self._groups[index].sockets.put_socket(slot, sock.fileno())

    def release(self) -> None:
        """What still waits at backup listeners goes to workers that have not closed yet."""
        self.backup.close()
        self._anchors.close()

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        groups = self._groups if bind is None else [self._groups[bind]]
        raw = b"".join(group.counts.per_cpu(slot, self._cpus) for group in groups)
        columns = zip(*abi.COUNT.iter_unpack(raw), strict=True)
        return Counts(*(sum(column) for column in columns))

    def take_counts(self, slot: int) -> Counts | None:
        counted = self.counts(slot)
        self.counting.slots.end(slot)
        for group in self._groups:
            group.counts.put(slot, bytes(abi.COUNT.size * self._cpus))
        return counted

    def open(self, slot: int) -> int | None:
        return self.counting.open(slot)

    def busy(self) -> Set[int] | None:
        return self.counting.busy(self._plan.slots) if self._counts_all else None

    def pulse(self) -> bytes | None:
        return self.counting.pulse(self._plan.slots) if self._counts_all else None

    @property
    def _counts_all(self) -> bool:
        return all(bind.protocol == "tcp" for bind in self._plan.binds)

    def memory_bytes(self) -> int:
        groups = (each for group in self._groups for each in group.maps.values())
        shared = self.counting.maps.values()
        return self._choice.memory_bytes() + sum(m.memory_bytes() for m in (*groups, *shared))

    def policy_values(self) -> PolicyValues:
        return self._choice.policy_values()

    def unsteered(self) -> int | None:
        raw = b"".join(group.cpus.per_cpu(0, self._cpus) for group in self._groups)
        return sum(int(last) for *_, last in abi.CPU.iter_unpack(raw))

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def stored(self) -> tuple[object, Sequence[int]]:
        chosen, choice_fds = self._choice.stored()
        counted, counting_fds = self.counting.stored()
        groups = [fd for group in self._groups for fd in group.descriptors()]
        spare = [sock.fileno() for sock in self.controller_sockets]
        value = StoredEbpf(chosen, self.backup.numbers, counted, list(self._anchors))
        return value, [*choice_fds, *groups, *spare, *counting_fds]

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        saved = msgspec.convert(value, type=StoredEbpf, strict=False)
        rest = iter(fds)
        of_choice = list(islice(rest, len(saved.choice.maps) + len(self._groups)))
        self._choices.put_in_force(LoadedPolicy.receive(self._plan, saved.choice, of_choice))
        for group in self._groups:
            group.receive(list(islice(rest, len(group.maps))))
        self.backup.receive(saved.backups, rest)
        self._anchors.receive(saved.anchored, islice(rest, len(saved.anchored)))
        self.counting.restore(saved.counting, list(rest))
        self._somebody = True
