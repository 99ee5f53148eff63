"""What a worker may do: whom it runs as, which capabilities it keeps, and what it can reach.

Root's are left to root: nginx, haproxy, and gunicorn with `-u`, are started as root, open
what only root may, and give the rest up themselves.
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


def settle(service: Service, who: Identity) -> None:
    """Become `who`, and unless the service keeps privileges have none that are not root's.

    Raises:
        OSError: the kernel refuses.
    """
    if service.keep_privileges:
        identity.become(who)
    elif _uid(who) == 0:
        identity.become(who)
        capabilities.drop_inheritable()
    else:
        # In this order: a change of user takes away what the bounding set is lowered by.
        capabilities.drop_bounding()
        identity.become(who)
        capabilities.drop_all()


def note(service: Service) -> str:
    """What whoever starts the service is to be told of it; "" if nothing."""
    is_given = service.user is not None or not (service.app or service.command)
    if is_given or os.geteuid() != 0:
        return ""
    return "workers run as root: --user NAME runs them as somebody else"


class Barriers(msgspec.Struct, frozen=True):
    """What keeps workers from their command, and from what they import. None: nothing that is
    known of."""

    command: Barrier | None = None
    imports: Barrier | None = None

    @property
    def note(self) -> str:
        """What whoever starts the service is to be told, as a worker may need none of it."""
        if self.imports is None:
            return ""
        what = "workers may not find the application"
        return f"{what}: {self.imports}; {self.imports.cure}"


def barriers(service: Service, environment: Mapping[str, str]) -> Barriers:
    """Looked for as the user of its workers, if that is given.

    Raises:
        ConfigError: it is not ours to run as that user.
    """
    who = identity.identity(service.user, service.group)
    if who.uid is None and who.gid is None:
        return Barriers()

    def become() -> None:
        if service.chdir is not None:
            os.chdir(service.chdir)
        settle(service, who)

    given = dict(pair.split("=", 1) for pair in service.env)
    search = os.get_exec_path({**environment, **given})

    def look() -> list[Barrier | None]:
        program = service.command[0] if service.command else None
        to_command = reach.to_command(program, search) if program else None
        return [to_command, to_imports(service)]

    with suppress(OSError):  # a worker's own error will tell
        return Barriers(*reach.tried(become, look))
    return Barriers()


def to_imports(service: Service) -> Barrier | None:
    """What keeps the user that we are from where a worker finds its modules: the current
    directory, and for a callable the Python that runs us. Raises OSError."""
    if not service.app and not service.command:
        return None
    places = [os.getcwd(), *([sys.prefix, sys.base_prefix] if service.app else [])]
    return next(filter(None, map(reach.to_path, places)), None)


def _uid(who: Identity) -> int:
    return os.geteuid() if who.uid is None else who.uid
