"""What a worker may do: whom it runs as, and which capabilities it keeps.

Root's are left to root: nginx, haproxy, and gunicorn with `-u`, are started as root, open
what only root may, and give the rest up themselves.
"""

from __future__ import annotations

import os

from steer.config import Service
from steer.kernel import capabilities, process
from steer.kernel.process import Identity


def settle(service: Service, who: Identity) -> None:
    """Become `who`, and unless the service keeps privileges have none that are not root's.

    Raises:
        OSError: the kernel refuses.
    """
    if service.keep_privileges:
        process.become(who)
    elif _uid(who) == 0:
        process.become(who)
        capabilities.drop_inheritable()
    else:
        # In this order: a change of user takes away what the bounding set is lowered by.
        capabilities.drop_bounding()
        process.become(who)
        capabilities.drop_all()


def note(service: Service) -> str:
    """What whoever starts the service is to be told of it; "" if nothing."""
    is_given = service.user is not None or not (service.app or service.command)
    if is_given or os.geteuid() != 0:
        return ""
    return "workers run as root: --user NAME runs them as somebody else"


def _uid(who: Identity) -> int:
    return os.geteuid() if who.uid is None else who.uid
