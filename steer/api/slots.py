"""The slots of a group: which have a socket, which may be selected, and by which policy.

A service has `workers.selection` for this. In a group the caller decides when a socket joins, is
ready and leaves.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from steer.api import arguments
from steer.backends import anchors
from steer.backends.base import Backend
from steer.backends.open import open_first, refuse_uncounted
from steer.backends.shortfalls import NOT_COUNTED
from steer.config import fallback, plan_change, planning
from steer.config.plan import Plan
from steer.config.service import MAX_WEIGHT, Service
from steer.config.sources import changed
from steer.errors import ConfigError, GroupError, KernelError
from steer.loader import shared_memory
from steer.policy.builtin import Policy
from steer.policy.layout import Member
from steer.sockets import listeners, port_checks, reuseport


class SlotCounts(msgspec.Struct, frozen=True):
    """The kernel's counts for one slot since its socket joined; None if it does not count.

    Args:
        selected: connections (UDP: datagrams) for which the slot was selected.
        fallback: how many of them the slot got in place of a slot without a socket.
        migrated: how many of them came from a listener that closed.
        open: connections that are open now.
    """

    selected: int | None = None
    fallback: int | None = None
    migrated: int | None = None
    open: int | None = None


class _Joined(msgspec.Struct, frozen=True):
    """The socket of a slot.

    Args:
        cookie: see `reuseport.cookie`.
        cpu: the CPU that the caller gave, if any.
    """

    cookie: int
    cpu: int | None


class Slots:
    """The backend, and the slots that have a socket.

    Args:
        wanted: a plan with one address, and a spec for each slot.

    Attributes:
        active: the slots that may be selected.
        reason: why no better backend is used; None: there is no better one.

    Raises:
        KernelError: no backend works, or a custom policy does not compile or load.
    """

    def __init__(self, wanted: Plan) -> None:
        self.backend, self.plan = fallback.first_that_works(wanted, _open, _ignore)
        (self.bind,) = wanted.binds
        self.reason = self.plan.backends[0].reason
        self.active: frozenset[int] = frozenset()
        self._was_joined = False
        self._joined: dict[int, _Joined] = {}

    def label(self, slot: int) -> str:
        return f"slot {slot} of {self.bind.label}"

    def notes(self) -> Iterator[str]:
        """See `ReuseportGroup.notes`."""
        if self.plan.became:
            yield self.plan.became
        yield from self.backend.notes
        yield from map(str, anchors.notes([self.bind], {}))

    def counts(self) -> dict[int, SlotCounts]:
        """The counts of the slots that have a socket. Raises KernelError."""
        return {slot: self._counts(slot) for slot in sorted(self._joined)}

    def _counts(self, slot: int) -> SlotCounts:
        counted, now_open = self.backend.counts(slot), self.backend.open(slot)
        if counted is None:
            return SlotCounts(open=now_open)
        return SlotCounts(counted.selected, counted.fallback, counted.migrated, now_open)

    def check_taken(self, slots: Collection[int]) -> None:
        """Raises GroupError: there is no such slot, or it has no socket."""
        for slot in slots:
            act = f"use {self.label(slot)}"
            self._check_exists(slot, act)
            if slot not in self._joined:
                raise GroupError(act, "no socket has joined there", "listen() or add() first")

    def _check_exists(self, slot: object, act: str) -> None:
        """Raises GroupError: there is no such slot."""
        count = len(self.plan.specs)
        if type(slot) is not int or slot not in range(count):
            raise GroupError(act, "no such slot", f"allowed: 0 to {count - 1}")

    def make_free(self, slot: int, weight: int, cpu: int | None) -> None:
        """Check that a socket may join the slot, with that weight and for that CPU. If the slot's
        socket has been closed, remove it.

        Raises:
            GroupError: there is no such slot, or it is taken.
            ConfigError: the weight is not allowed, or there is no such CPU.
        """
        act = f"join {self.label(slot)}"
        self._check_exists(slot, act)
        arguments.whole_number("weight", weight, act, least=1, most=MAX_WEIGHT)
        if cpu is not None:
            last = max(self.plan.topology.possible)
            arguments.whole_number("cpu", cpu, act, least=0, most=last)
            if cpu not in self.plan.topology.possible:
                cure = "see /sys/devices/system/cpu/possible"
                raise ConfigError(act, f"there is no CPU {cpu}", cure)
        if slot in self._joined:
            if self.backend.is_member(slot, 0) is not False:
                raise GroupError(act, "it is taken", "close its socket and remove() it first")
            self.leave(slot)

    def new_socket(self, backlog: int) -> socket.socket:
        """Make a socket at the address of the group.

        Raises:
            BindError: bind(2) failed, or another process had the port before the first socket.
        """
        settings = self.plan.service.settings
        if not self._was_joined:
            port_checks.check_free(self.bind, settings)
        try:
            return reuseport.member(self.bind, backlog, settings=settings)
        except OSError as error:
            raise port_checks.bind_error(self.bind, error) from None

    def join(self, slot: int, sock: socket.socket, weight: int, cpu: int | None) -> None:
        """Add the socket to the backend.

        Raises:
            GroupError: the socket is already in another slot.
            ConfigError: the weight is wrong.
            KernelError
        """
        cookie = reuseport.cookie(sock.fileno())
        self._check_new(slot, cookie)
        self._set_weight(slot, weight)
        self.backend.take_counts(slot)
        try:
            self.backend.add_member(slot, [reuseport.duplicate(sock.fileno()).detach()])
        except BaseException:
            self.backend.remove_member(slot)
            raise
        self._joined[slot] = _Joined(cookie, cpu)
        self._was_joined = True

    def _check_new(self, slot: int, cookie: int) -> None:
        """Raises GroupError: the socket is already in a slot. The kernel has a socket only once in
        a group, so two slots cannot share it."""
        for other, joined in self._joined.items():
            if joined.cookie == cookie:
                cause = f"the socket is in slot {other} already"
                cure = f"add another socket, or remove({other}) first"
                raise GroupError(f"join {self.label(slot)}", cause, cure)

    def _set_weight(self, slot: int, weight: int) -> None:
        weights = [spec.weight for spec in self.plan.specs]
        if weights[slot] == weight:
            return
        weights[slot] = weight
        act = f"set the weight of {self.label(slot)}"
        asked = weights if max(weights) > 1 else ()
        service = changed(self.plan.service, {"weights": asked}, act)
        self._swap(plan_change.reloaded(self.plan, service, self.plan.topology, act))

    def leave(self, slot: int) -> None:
        """Remove the slot's socket from the backend. Raises KernelError."""
        if slot in self.active:
            self.select_from(self.active - {slot})
        del self._joined[slot]
        self.backend.remove_member(slot)

    def select_from(self, slots: frozenset[int]) -> None:
        """Select these slots and no others from now on. Raises KernelError."""
        self.backend.steer(self._members(self.plan, slots))
        self.active = slots

    def _members(self, plan: Plan, slots: Collection[int]) -> list[Member]:
        return [self._member(plan, slot) for slot in sorted(slots)]

    def _member(self, plan: Plan, slot: int) -> Member:
        spec, given = plan.specs[slot], self._joined[slot].cpu
        is_given = plan.policy.pinned and given is not None
        return Member(slot, spec.weight, given if is_given else spec.cpu)

    def migrate(self, slot: int, sock: socket.socket) -> int:
        """Move connections that wait at the slot to active slots; return how many still wait.

        Raises:
            GroupError: the slot is active, no slot is active, the group is UDP, or the socket is
                not that of the slot.
            KernelError
        """
        act = f"migrate {self.label(slot)}"
        if reuseport.cookie(sock.fileno()) != self._joined[slot].cookie:
            raise GroupError(act, "the socket is not that of this slot", "pass the slot's socket")
        if self.bind.protocol == "udp":
            raise GroupError(act, "datagrams cannot be moved")
        if slot in self.active or not self.active:
            cause = "it is active" if slot in self.active else "no other slot is active"
            raise GroupError(act, cause, "activate another and drain this one first")
        self._synchronize()
        self.backend.migrate_queue(slot, {0: sock})
        return listeners.waiting(sock).queued

    def _synchronize(self) -> None:
        """Wait until programs that still read the old table have put their connections into
        queues: some 20 ms if the table was just published."""
        publication = self.backend.grace_period()
        if publication is not None:
            shared_memory.wait_for_programs()
            self.backend.grace_period_ended(publication)

    def set_policy(self, service: Service, policy: Policy, act: str) -> None:
        """Change the policy on the backend in force. After an error nothing has changed.

        Args:
            service: the configuration with the new policy, without weights: these stay.

        Raises:
            ConfigError: the policy does not run on this backend, or a parameter is wrong.
            KernelError: the kernel refuses the policy.
        """
        backend, cpus = self.backend.name, self.plan.topology
        here = [
            msgspec.structs.replace(each, backends=backends)
            for each in planning.plan(service, cpus, {}, policy).candidates
            if (
                backends := tuple(
                    candidate for candidate in each.backends if candidate.backend == backend
                )
            )
        ]
        if not here:
            why_not = policy.no_cbpf or f"it runs on {', '.join(policy.backends)} only"
            raise ConfigError(act, f"not on {backend}: {why_not}", "make another group for it")
        service = changed(service, {"weights": self.plan.service.weights}, act)
        plan = plan_change.with_candidates(self.plan, service, here, cpus, act)
        fallback.first_that_works(plan, self._swap, _ignore)

    def _swap(self, plan: Plan) -> None:
        """Raises KernelError: nothing has changed."""
        _refuse_unseen_load(plan, self.backend)
        self.backend.swap(plan, self._members(plan, self.active), self._lend)
        self.plan = plan

    @contextmanager
    def _lend(self) -> Iterator[Mapping[int, socket.socket]]:
        """Open a socket of the group for a moment, as a program is attached through any socket of
        the group and the others may be in other processes. While a slot is active, the program in
        force does not select it."""
        if not self._joined:
            yield {}
            return
        try:
            own = reuseport.member(self.bind, 1)
        except OSError as error:
            raise KernelError.like(port_checks.bind_error(self.bind, error)) from None
        with own:
            yield {0: own}


def _open(plan: Plan) -> Backend:
    """Raises KernelError."""
    opened = open_first(plan)
    try:
        _refuse_unseen_load(plan, opened)
    except KernelError:
        opened.close()
        raise
    return opened


def _refuse_unseen_load(plan: Plan, backend: Backend) -> None:
    """Refuse a policy that reads load if connections cannot be counted. A service then reads the
    lengths of accept queues at intervals; a group has no process that could.

    Raises:
        KernelError: the policy reads load, and nothing would measure it.
    """
    refuse_uncounted(plan, backend.counting)
    counting = backend.counting
    if plan.policy.reads_load and counting and counting.why_not:
        cause, cure, number = counting.why_not
        act = f"use {plan.policy.name}"
        raise KernelError(act, f"{NOT_COUNTED}: {cause}", cure, errno=number)


def _ignore(_failure: str) -> None:
    """Ignore a failed backend: the reason of the fallback names it."""
