"""Answers the requests at the control socket of an attached group."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

from steer.attach import refusal, status
from steer.attach.group import AttachedGroup
from steer.attach.groups import AttachedGroups
from steer.attach.roster import Member, State
from steer.config import fallback, planning
from steer.control.commands import COMMANDS
from steer.control.outcomes import Drained, Swapped
from steer.control.protocol import Request
from steer.control.server import Handler, Progress
from steer.controller.refusals import Answer, Handle, logged
from steer.controller.requested_policy import with_params_of, with_requested
from steer.controller.state import ServiceState
from steer.errors import ConfigError, ControlError
from steer.linux.background import in_background
from steer.linux.log import Log
from steer.loader import find
from steer.policy.builtin import CUSTOM_SUFFIX
from steer.values import shown


class Requests:
    """Those to one attached service.

    Args:
        stop: detaches; done when that is done.
    """

    def __init__(
        self,
        groups: AttachedGroups,
        state: ServiceState,
        log: Log,
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._groups = groups
        self._state = state
        self._log = log
        self._stop = stop
        self._started_s = time.monotonic()

    def handlers(self) -> Mapping[str, Handler]:
        """By the name of the command. Commands without a method here are refused."""
        return {
            name: logged(
                command, getattr(self, name, self._refuse(name)), self._groups.plan.name, self._log
            )
            for name, command in COMMANDS.items()
        }

    def _refuse(self, command: str) -> Handle:
        async def refuse(_request: Request, _progress: Progress) -> Answer:
            cause = "its processes are not steer's, which only selects among their sockets"
            act = f"{command} {self._groups.plan.name}"
            raise ControlError(act, cause, "use the server's own command")

        return refuse

    async def status(self, _request: Request, _progress: Progress) -> Answer:
        return {"service": status.report_of(self._groups, self._started_s, self._state.name)}

    async def stop(self, _request: Request, _progress: Progress) -> Answer:
        await self._stop()
        return {}

    async def drain(self, request: Request, _progress: Progress) -> Answer:
        group, member = self._member(request, "drain", State.READY)
        if group.roster.selected == [member]:
            act = f"drain {group.wording.socket} {member.slot}"
            raise ControlError(act, "no other is ready", "start another first")
        group.drain(member)
        return Drained(member.slot)

    async def undrain(self, request: Request, _progress: Progress) -> Answer:
        group, member = self._member(request, "undrain", State.DRAINING)
        group.undrain(member)
        return Drained(member.slot)

    def _member(self, request: Request, act: str, wanted: State) -> tuple[AttachedGroup, Member]:
        """The member in a slot, and its group. Raises ControlError: there is none, or it is in
        another state."""
        slot, what = request.get("slot"), self._groups.wording.socket
        found = self._groups.at(slot) if type(slot) is int else None
        if found is None:
            there = ", ".join(str(each.slot) for _, each in self._groups.members)
            cure = f"there are: {there}"
            raise ControlError(f"{act} {what} {shown(slot)}", "no such slot", cure)
        _, member = found
        if member.state is not wanted:
            cause = f"it is {member.state.value}"
            raise ControlError(f"{act} {what} {slot}", cause, f"has to be {wanted.value}")
        return found

    async def policy(self, request: Request, _progress: Progress) -> Answer:
        began_s = time.monotonic()
        now = self._groups.plan
        act = f"change the policy of {now.name}"
        service = with_requested(now.service, request, act)
        own = service.policy.endswith(CUSTOM_SUFFIX)
        policy = (
            await in_background(find.prepare, service.policy) if own else find.find(service.policy)
        )
        service = with_params_of(now.service, service, policy)
        wanted = planning.plan(service, now.topology, {}, policy)
        if wanted.policy.source is None:
            cause = "without steer the kernel's hash selects anyway"
            raise ConfigError(act, cause, f"`steer detach {now.name}`")
        with refusal.of_fallbacks(act):
            _, plan = fallback.first_that_works(wanted, self._groups.swap, self._log.warning)
        backend = plan.backends[0].backend
        self._log.info("%s on %s", plan.policy.name, backend)
        return Swapped(plan.policy.name, backend, _since(began_s))


def _since(began_s: float) -> float:
    return round(time.monotonic() - began_s, 3)
