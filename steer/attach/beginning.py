"""How an attacher begins: anew, or as the successor of one that has re-executed itself."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from steer.attach import there
from steer.attach.binds import text_of
from steer.attach.groups import AttachedGroups
from steer.attach.handover import Handover, Predecessor
from steer.attach.replaced import ReplacedProgram
from steer.attach.target import Target
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.control import taken
from steer.control.claim import Claim
from steer.errors import AttachRefused

_NICE = -10


class Beginning(Protocol):
    """What differs between the two."""

    def claim(self, plan: Plan, environment: Mapping[str, str]) -> Claim:
        """The control socket. Raises AttachRefused, ControlError."""

    def sockmaps(self) -> Collection[Bind]:
        """The addresses whose sockets are in sockmaps of the server."""

    def replaced(self) -> Mapping[Bind, ReplacedProgram]:
        """The programs to put back at the end. Raises KernelError: one cannot be."""

    def begin(self, groups: AttachedGroups, replaced: Mapping[Bind, ReplacedProgram]) -> None:
        """Let the policy select. Raises SteerError: the groups are as they were."""


class Anew:
    """Steers what nobody has steered before.

    Args:
        targets: what is there now, at each address.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets

    def claim(self, plan: Plan, environment: Mapping[str, str]) -> Claim:
        with suppress(PermissionError):
            os.nice(_NICE)  # on busy CPUs, too, new listeners should be found soon
        _refuse_attached(plan, environment)
        wanted = plan.service.control_socket
        paths = taken.refuse_taken(plan.name, wanted, environment)
        return Claim(plan.name, wanted, environment, paths=paths)

    def sockmaps(self) -> Collection[Bind]:
        return [each.bind for each in self._targets if each.in_sockmap]

    def replaced(self) -> Mapping[Bind, ReplacedProgram]:
        found = {each.bind: each.present.replaced for each in self._targets}
        return {bind: stored.open() for bind, stored in found.items() if stored}

    def begin(self, groups: AttachedGroups, replaced: Mapping[Bind, ReplacedProgram]) -> None:
        groups.begin(self._targets, replaced)


class Succession:
    """Goes on with what another attacher has steered."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover

    def claim(self, _plan: Plan, _environment: Mapping[str, str]) -> Claim:
        return self._handover.claim()

    def sockmaps(self) -> Collection[Bind]:
        return self._handover.sockmaps

    def replaced(self) -> Mapping[Bind, ReplacedProgram]:
        return {each.bind: each.program.open() for each in self._handover.replaced}

    def begin(self, groups: AttachedGroups, replaced: Mapping[Bind, ReplacedProgram]) -> None:
        predecessor = Predecessor(self._handover)
        groups.succeed(predecessor.let_go(), replaced)
        predecessor.wait()


def _refuse_attached(plan: Plan, environment: Mapping[str, str]) -> None:
    """Raises AttachRefused: another service steers the address already."""
    for bind in plan.binds:
        for each in there.services_at(bind, environment):
            cause = f"service {each.name} steers it already (pid {each.pid})"
            cure = there.cure(each.name, each.pid)
            raise AttachRefused(f"attach to {text_of(bind)}", cause, cure)
