"""What steer cannot see of its workers: why, what it does instead, and what would help."""

from __future__ import annotations

from collections.abc import Mapping

from steer.child import privileges
from steer.config.service import Service
from steer.errors import Note
from steer.linux import identity
from steer.linux.log import Log
from steer.workers import access
from steer.workers.access import Access
from steer.workers.process import WorkerProcess

WAITS, QUEUES, BORROW = "waits", "queues", "borrow"
INSTEAD: Mapping[str, str] = {
    WAITS: "what workers wait for cannot be seen, so one that never says READY=1 is taken to be "
    "ready when it has used next to no CPU for a second",
    QUEUES: "what waits at workers cannot be seen, so only a watchdog shows who hangs",
    BORROW: "workers' sockets cannot be borrowed, so what waits at one that hangs is moved only on "
    "cbpf",
}


def of(service: Service) -> Access:
    """What steer would be allowed to do to workers of a service; tried with a process that has the
    same privileges.

    Raises:
        ConfigError: steer may not start processes as that user.
        OSError: the process cannot be started.
    """
    who = identity.identity(service.user, service.group)
    return access.access_to(lambda: privileges.apply(service, who), executes=not service.app)


def notes_on(found: Access) -> list[str]:
    """The limitations that follow from the access that steer has to workers. Pure."""
    refusals = {WAITS: found.look, BORROW: found.borrow}
    return [_note(what, refusal) for what, refusal in refusals.items() if refusal]


def _note(what: str, refusal: Note) -> str:
    return f"{INSTEAD[what]}: {refusal}"


class Visibility:
    """Collects what steer was refused to see, and logs each kind once.

    Attributes:
        notes: the limitations, by what cannot be seen.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.notes: dict[str, str] = {}

    def refused(self, what: str, process: WorkerProcess) -> None:
        """WAITS, QUEUES or BORROW was refused for this worker."""
        if what in self.notes:
            return
        found = access.access(process.pid, process.inodes)
        refusal = found.look if what == WAITS else found.borrow or found.look
        if refusal is None:  # it may have ended meanwhile
            return
        self.notes[what] = _note(what, refusal)
        self._log.warning("%s", self.notes[what])

    def forget(self) -> None:
        """Forget all refusals: workers may run as another user from now on."""
        self.notes.clear()
