"""What a backend cannot do on this machine, in words for `status`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from steer import features
from steer.config.address import Bind
from steer.config.plan import Plan
from steer.errors import KernelError, Note
from steer.sockets import listeners

NO_EXCLUSION = (
    "a worker that hangs, is at capacity or is draining gets connections until it closes its socket"
)
STILL_SELECTED = "the kernel's hash still selects it"
NO_SPARES = "no spares are started: the kernel's hash would select them as well"
NO_CONNECTIONS = (
    "only TCP connections are counted, so for datagrams all workers are equal and take turns"
)
NOT_COUNTED = "open connections are not counted"
SAMPLED = "the policy uses the accept queues instead, which are sampled"
_LOST = "queued at a worker that crashes or hangs are lost"
_MAY_BE_LOST = "queued at a worker that crashes or hangs may be lost"
_NOT_KNOWN = "steer could not find out whether the kernel moves them"
DATAGRAMS_LOST = f"datagrams {_LOST}: the kernel moves none"


def may_be_lost(binds: Iterable[Bind], migrates: bool | None = None) -> Sequence[str]:
    """What is lost when a worker crashes or hangs.

    Args:
        migrates: whether steer's program moves queues; None if the backend has no such program.
    """
    protocols = {bind.protocol for bind in binds}
    notes = []
    if "tcp" in protocols and not migrates and (note := _connections_lost(migrates)):
        notes.append(note)
    if "udp" in protocols:
        notes.append(DATAGRAMS_LOST)
    return tuple(notes)


def _connections_lost(migrates: bool | None) -> str:
    """Why connections are lost if no program moves them; "" if the kernel does."""
    try:
        setting = listeners.tcp_migrate_req()
    except KernelError as error:
        return f"connections {_MAY_BE_LOST}: {_NOT_KNOWN} ({error})"
    if setting:
        return ""
    if setting is None or migrates is False:
        return f"connections {_LOST}: migration needs Linux {features.MIGRATE.version}"
    by_sysctl = "ebpf would move them, and so would sysctl net.ipv4.tcp_migrate_req=1"
    return f"connections {_LOST}: {by_sysctl}"


def kernel_migrates() -> bool:
    """Whether the kernel moves queues without a program; False if that is not known."""
    with suppress(KernelError):
        return bool(listeners.tcp_migrate_req())
    return False


def of_load(plan: Plan, why_not: Note | None) -> Sequence[str]:
    """What a policy that reads open connections cannot see.

    Args:
        why_not: why open connections are not counted; None if they are.
    """
    if plan.policy.reads_load:
        datagrams = [bind.label for bind in plan.binds if bind.protocol == "udp"]
        return (*(f"{label}: {NO_CONNECTIONS}" for label in datagrams), *_uncounted(plan, why_not))
    return _uncounted(plan, why_not)


def _uncounted(plan: Plan, why_not: Note | None) -> Sequence[str]:
    if not why_not or all(bind.protocol == "udp" for bind in plan.binds):
        return ()
    if plan.is_uncounted:  # `policy_reason` says so
        return ()
    instead = f"; {SAMPLED}" if plan.policy.reads_load else ""
    return (f"{NOT_COUNTED}: {why_not}{instead}",)
