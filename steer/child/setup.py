"""Sets a process up for the application: CPUs, directory, user, niceness and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec.structs import replace

from steer.child import privileges
from steer.child.launch import Launch, Unloadable
from steer.config.service import Service
from steer.linux import priority, services
from steer.linux.identity import Identity
from steer.policy.cpus import cpu_list, cpus_named

if TYPE_CHECKING:
    from steer.child.preload import Preload


def schedule(launch: Launch) -> Launch:
    """Apply the CPUs and the niceness of the launch to this process.

    Returns:
        The launch, with the CPUs that this process may use now.
    """
    who = f"worker {launch.slot}"
    with if_allowed(who, f"run on {cpus_named(launch.spec.cpus)}"):
        os.sched_setaffinity(0, launch.spec.cpus)
    if launch.niced:
        with if_allowed(who, "leave the CPUs to others until it is ready"):
            priority.be_nice()
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    return replace(launch, spec=replace(launch.spec, cpus=cpus))


def enter(service: Service, who: Identity) -> None:
    """Change the directory and the user of this process, and drop its privileges.

    Raises:
        Unloadable: the kernel refuses.
    """
    if service.chdir is not None:
        with needed(f"chdir {service.chdir}"):
            os.chdir(service.chdir)
    with needed(f"run as uid {who.uid}, gid {who.gid}"):
        privileges.apply(service, who)


@contextmanager
def if_allowed(who: str, act: str) -> Iterator[None]:
    """Log a failure and continue, as the process can run without the act. The cpuset may have
    changed, or seccomp may refuse."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        print(f"steer: {who}: {act}: {why}; it does without", file=sys.stderr)


@contextmanager
def needed(act: str, more: Callable[[OSError], str] = lambda _: "") -> Iterator[None]:
    """Turn a failure of the act into Unloadable.

    Args:
        more: returns details of a failure, or "".
    """
    try:
        yield
    except OSError as error:
        known = more(error)
        raise Unloadable(f"{act}: {error.strerror}{known and '; '}{known}") from None
    except ValueError as error:  # a null byte, from a configuration file
        raise Unloadable(f"{act}: {error}") from None


_NOTIFY = "NOTIFY_SOCKET"
_NOT_FOR_IT = ("LISTEN_", "WATCHDOG_")
"""Variables with this prefix are for this process, and not for the application."""


def environment(launch: Launch) -> dict[str, str]:
    """The environment of the application of a worker."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_FOR_IT)}
    return {**inherited, **_of_service(launch), **_of_worker(launch)}


def change_environment(launch: Launch) -> None:
    """Make `environment` the environment of this process. Only differences are changed: to set all
    variables takes a millisecond in a process that was just forked."""
    _forget_ours()
    os.environ.update(_of_service(launch) | _of_worker(launch))


def change_environment_before_fork(preload: Preload) -> None:
    """Make the environment of this template process the one of the service. It has the variables
    that are the same for all workers."""
    _forget_ours()
    os.environ.pop(_NOTIFY, None)
    os.environ.update(_of_service(preload))


def change_environment_after_fork(launch: Launch) -> None:
    """Add what only this worker has to the environment."""
    os.environ.update(_of_worker(launch))


def _forget_ours() -> None:
    for name in [name for name in os.environ if name.startswith(_NOT_FOR_IT)]:
        del os.environ[name]


def _of_service(launch: Launch | Preload) -> dict[str, str]:
    given = dict(pair.split("=", 1) for pair in launch.service.env)
    return {**launch.identity.environment(), **given, "STEER_NAME": launch.name}


def _of_worker(launch: Launch) -> dict[str, str]:
    return {
        "STEER_SLOT": str(launch.slot),
        "STEER_CPUS": cpu_list(launch.spec.cpus),
        services.MARK: str(os.getpid()),
        _NOTIFY: launch.notify,
        **_watchdog(launch.service),
    }


def _watchdog(service: Service) -> dict[str, str]:
    """The variables of sd_watchdog_enabled(3). WATCHDOG_PID is left out, as a child of the process
    that we start may be the one that notifies."""
    if service.watchdog is None:
        return {}
    return {"WATCHDOG_USEC": str(round(service.watchdog * 1e6))}
