"""The groups of one service: one for each of its addresses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing

import msgspec

from steer.attach.group import AttachedGroup, lend_none
from steer.attach.handover import KeptGroup, KeptMember
from steer.attach.replaced import ReplacedProgram
from steer.attach.roster import Member, Slots
from steer.attach.target import Target
from steer.attach.wording import BY_PROTOCOL
from steer.backends.base import Counts
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.linux.log import Log


class AttachedGroups:
    """They have the same policy, each with a table of its own, and no slot in common.

    Args:
        plan: on the backend ebpf; all its addresses have the same protocol.
        sockmaps: the addresses whose sockets are in sockmaps of the server.

    Raises:
        KernelError: the kernel refuses; nothing is attached.
    """

    def __init__(self, plan: Plan, log: Log, sockmaps: Collection[Bind] = ()) -> None:
        self.plan = plan
        self.wording = BY_PROTOCOL[plan.binds[0].protocol]
        slots = Slots(plan.slots)
        with ExitStack() as undo:
            self._groups: Sequence[AttachedGroup] = [
                undo.enter_context(
                    closing(AttachedGroup(each, log, slots, each.binds[0] in sockmaps))
                )
                for each in _by_bind(plan)
            ]
            self.close = undo.pop_all().close

    def __iter__(self) -> Iterator[AttachedGroup]:
        return iter(self._groups)

    def begin(self, targets: Sequence[Target], replaced: Mapping[Bind, ReplacedProgram]) -> None:
        """Add all listeners, and let the policy select among them.

        Args:
            targets: what was found at each address.
            replaced: by address, the program that its group has, to be put back at the end.

        Raises:
            KernelError: one cannot be added; the groups are as they were.
        """
        there = {each.bind: each for each in targets}
        try:
            for group in self._groups:
                found = there[group.bind]
                group.begin(found.pids, found.present.left, replaced.get(group.bind))
        except BaseException:
            self.detach()
            raise

    def succeed(self, kept: Sequence[KeptGroup], replaced: Mapping[Bind, ReplacedProgram]) -> None:
        """Begin with what another attacher has let go. Args and Raises as `AttachedGroup.succeed`
        and `begin`."""
        try:
            for group, each in zip(self._groups, kept, strict=True):
                group.succeed(each, replaced.get(group.bind))
        except BaseException:
            self.detach()
            raise

    def let_go(self) -> Sequence[KeptGroup]:
        """Release all listeners, for `succeed` of another process. Our programs, which are still
        attached, select none."""
        return [_let_go(each) for each in self._groups]

    def close_programs(self) -> None:
        """Close the descriptors of our programs, in a process that is about to end."""
        for each in self._groups:
            each.backend.close()

    @property
    def sockmaps(self) -> list[Bind]:
        """The addresses whose groups are selected from a sockmap."""
        return [each.bind for each in self._groups if each.in_sockmap]

    @property
    def members(self) -> list[tuple[AttachedGroup, Member]]:
        """By slot."""
        found = [(group, each) for group in self._groups for each in group.roster]
        return sorted(found, key=lambda each: each[1].slot)

    def at(self, slot: int) -> tuple[AttachedGroup, Member] | None:
        return next((found for found in self.members if found[1].slot == slot), None)

    def beat(self) -> None:
        """Renew all heartbeats."""
        for each in self._groups:
            each.attachment.beat()

    def swap(self, plan: Plan) -> None:
        """Raises KernelError: nothing has changed."""
        with ExitStack() as undo:
            for group, wanted in zip(self._groups, _by_bind(plan), strict=True):
                before = group.plan
                group.swap(wanted)
                undo.callback(group.swap, before)
            undo.pop_all()
        self.plan = plan

    @property
    def is_detached(self) -> bool:
        return all(each.is_detached for each in self._groups)

    def detach(self) -> None:
        """Detach all, even if one cannot be detached. Raises KernelError."""
        with ExitStack() as stack:
            for each in self._groups:
                stack.callback(each.detach)


def _let_go(group: AttachedGroup) -> KeptGroup:
    members = {
        each.listener.inode: KeptMember(each.slot, each.state, group.counts(each))
        for each in group.roster
    }
    pids = {holder.pid for each in group.roster for holder in each.holders}
    unsteered = Counts(fallback=group.backend.unsteered() or 0)
    group.backend.detach(lend_none)
    return KeptGroup(group.joining.retired + unsteered, members, sorted(pids))


def _by_bind(plan: Plan) -> list[Plan]:
    return [msgspec.structs.replace(plan, binds=(each,)) for each in plan.binds]
