"""The privileges of a worker: its user, its capabilities, and the files that it can reach.

A worker that runs as root keeps root's capabilities: nginx, haproxy and gunicorn with `-u` start as
root, open what only root may open, and drop the rest themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from steer.config.service import Service
from steer.linux import capabilities, identity, reach
from steer.linux.identity import Identity
from steer.linux.reach import Barrier


def apply(service: Service, who: Identity) -> None:
    """Change the user to `who`, and drop capabilities unless the service keeps them or runs as
    root.

    Raises:
        OSError: the kernel refuses.
    """
    if service.keep_privileges:
        identity.become(who)
    elif _uid(who) == 0:
        identity.become(who)
        capabilities.drop_inheritable()
    else:
        # Reduce the bounding set first: after the change of user the kernel refuses it.
        capabilities.drop_bounding()
        identity.become(who)
        capabilities.drop_all()


def note(service: Service) -> str:
    """A remark on privileges for the user who starts the service, or ""."""
    is_given = service.user is not None or not (service.app or service.command)
    if is_given or os.geteuid() != 0:
        return ""
    return "workers run as root: set user to run them as another user"


class Barriers(msgspec.Struct, frozen=True):
    """What prevents workers from reading their command and their imports. None: nothing known."""

    command: Barrier | None = None
    imports: Barrier | None = None

    @property
    def note(self) -> str:
        """A warning for the user who starts the service. It is no error, as workers may not need
        what they cannot read."""
        if self.imports is None:
            return ""
        what = "workers may not find the application"
        return f"{what}: {self.imports}; {self.imports.cure}"


def barriers(service: Service, environment: Mapping[str, str]) -> Barriers:
    """Look for barriers as the user of the workers, if the service has one.

    Raises:
        ConfigError: steer may not run a process as that user.
    """
    who = identity.identity(service.user, service.group)
    if who.uid is None and who.gid is None:
        return Barriers()

    def become() -> None:
        if service.chdir is not None:
            os.chdir(service.chdir)
        apply(service, who)

    given = dict(pair.split("=", 1) for pair in service.env)
    search = os.get_exec_path({**environment, **given})

    def look() -> list[Barrier | None]:
        program = service.command[0] if service.command else None
        to_command = reach.to_command(program, search) if program else None
        return [to_command, to_imports(service)]

    with suppress(OSError):  # a worker will report the error
        return Barriers(*reach.tried(become, look))
    return Barriers()


def described(barrier: Barrier | None) -> str:
    """A barrier with its cure, or ""."""
    return f"{barrier}; {barrier.cure}" if barrier else ""


def to_imports(service: Service) -> Barrier | None:
    """What prevents our user from reading the directories of a worker's modules: the current one,
    and for a callable also the directories of this Python. Raises OSError."""
    if not service.app and not service.command:
        return None
    places = [os.getcwd(), *([sys.prefix, sys.base_prefix] if service.app else [])]
    return next(filter(None, map(reach.to_path, places)), None)


def _uid(who: Identity) -> int:
    return os.geteuid() if who.uid is None else who.uid
