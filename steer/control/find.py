"""Finds running services, and workers whose service has neither controller nor guard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from steer.control import claim, rundir, schema, taken
from steer.control.client import ASK_AGAIN_S, Connections, listener_at, status
from steer.errors import ControlError, NotRunning, Orphaned
from steer.linux import services
from steer.linux.title import Title
from steer.values import plural, several, shown

if TYPE_CHECKING:
    from steer.control.abandoned import Abandoned


def locate(
    name: str | None,
    control_socket: str | None,
    environment: Mapping[str, str],
    connections: Connections | None = None,
) -> Path:
    """The control socket of a service. `name` may be None if only one service is running.

    Raises:
        NotRunning: no service is running, or none of that name.
        ControlError: several services match.
    """
    if control_socket:
        return Path(control_socket)
    for path in rundir.find(environment, name):
        if path.stem == name and listener_at(path, connections) is not None:
            return path
    running = _look(environment, connections).running
    named = [each for each in running if name is None or each.is_named(name)]
    if not named:
        raise _not_found(name, running, environment)
    if len(named) > 1:
        if name is None:
            cause, cure = f"several are running: {_names(named)}", "name one"
        else:
            cause = "several of that name are running"
            paths = " or ".join(str(each.path) for each in named)
            cure = f"name its control socket instead: {paths}"
        raise ControlError("find the service", cause, cure)
    return named[0].path


class _Found(msgspec.Struct, frozen=True):
    """A service at whose control socket somebody answers.

    Args:
        shown: the title of its process, if it was found by that.
    """

    path: Path
    shown: Title | None = None

    @property
    def name(self) -> str:
        return self.shown.name if self.shown else self.path.stem

    def is_named(self, name: str) -> bool:
        return self.shown.may_name(name) if self.shown else self.path.stem == name


def _not_found(
    name: str | None, running: Sequence[_Found], environment: Mapping[str, str]
) -> NotRunning:
    if not running:
        _refuse_abandoned(name, environment)
    for each in services.find(environment):
        if each.is_gone and (name is None or each.title.may_name(name)):
            return NotRunning(
                f"find service {shown(name or each.title.name)}", *_describe_lost(each)
            )
    others = of_others(environment)
    if name is not None:
        words = f"running: {_names(running)}" if running else "no service is running"
        if others:
            words += f"; of other users: {', '.join(others)}"
        return NotRunning(f"find service {shown(name)}", "not running", words)
    if others:
        return NotRunning("find a service", *none_of_ours(others))
    return NotRunning("find a service", "none is running", "start one with `steer run`")


def _describe_lost(service: services.Running) -> tuple[str, str]:
    """Cause and cure for a service that cannot be reached."""
    cause = f"its control socket {service.path} was removed, and is not made again"
    return cause, f"is pid {service.pid} stopped? see ps(1) and its log"


def _names(found: Iterable[_Found]) -> str:
    return ", ".join(each.name for each in found)


def abandoned_services(
    environment: Mapping[str, str], name: str | None = None, control_socket: str | None = None
) -> list[Abandoned]:
    """The services whose controller and guard were killed while workers go on: all of them, or
    those with this name or control socket."""
    paths = [Path(control_socket)] if control_socket else rundir.find(environment, name)
    named = (path for path in paths if name is None or control_socket or path.stem == name)
    dead = [path for path in named if listener_at(path) is None]
    found = _abandoned_at(dead, environment)
    if control_socket:
        return [each for each in found if each.control is not None]
    return [each for each in found if name in (None, each.name)]


def _abandoned_at(dead: Sequence[Path], environment: Mapping[str, str]) -> list[Abandoned]:
    """The abandoned services, wherever their control sockets were.

    Args:
        dead: control sockets at which nobody answers.
    """
    members = services.unattended(environment)
    if not (dead or members):
        return []
    from steer.control import abandoned

    return abandoned.find(dead, members)


def end_abandoned(what: Abandoned, quick: bool, directory: bool) -> None:
    """End the workers of a service whose controller and guard were killed.

    Args:
        directory: whether to remove the directory of the control socket if it is empty then.

    Raises:
        ControlError: some workers could not be ended.
    """
    from steer.control import abandoned

    if left_over := abandoned.end(what, QUICK_S if quick else FINISH_S, directory):
        pids = several("pid", left_over)
        raise ControlError(f"stop {what.name}", f"{pids} cannot be ended", "see ps(1)")


def _refuse_abandoned(name: str | None, environment: Mapping[str, str]) -> None:
    """Raises NotRunning: the service is abandoned."""
    for each in abandoned_services(environment, name):
        raise NotRunning(f"find service {shown(each.name)}", *_describe_abandoned(each))


def _describe_abandoned(what: Abandoned) -> tuple[str, str]:
    """The state of an abandoned service, and what can be done about it."""
    count = plural(len(what.workers), "worker")
    pids = several("pid", (pid for pid, _ in what.workers))
    state = f"its controller and guard were killed, and {count} ({pids}) go on, unsteered"
    return state, f"`steer stop {what.name}` ends them, and so does `steer run`"


def status_of_all(
    environment: Mapping[str, str], connections: Connections | None = None
) -> schema.Status:
    """The status of every running service, and of every service without a controller.

    Raises:
        ControlError
    """
    seen = _look(environment, connections)
    found = schema.Status(schema=1, services=[])
    for each in seen.running:
        try:
            found.services += status(each.path, connections).services
        except Orphaned as error:
            found.orphaned.append(schema.Orphan(each.path.stem, error.cause))
        except NotRunning:
            pass  # it has ended since
    for service in _abandoned_at(seen.dead, environment):
        found.orphaned.append(schema.Orphan(service.name, "; ".join(_describe_abandoned(service))))
    for lost in seen.lost:
        found.orphaned.append(schema.Orphan(lost.title.name, "; ".join(_describe_lost(lost))))
    found.others = len(of_others(environment))
    return found


def remove_dead_sockets(environment: Mapping[str, str]) -> None:
    """Remove the control sockets of this user that a killed attacher left."""
    for path in rundir.find(environment):
        claim.remove_dead(path)


class _Seen(msgspec.Struct):
    """The services of this user.

    Args:
        running: services that answer at their control socket and let this user connect.
        dead: control sockets in the usual places at which nobody answers.
        lost: services whose control socket was removed.
    """

    running: list[_Found]
    dead: list[Path]
    lost: list[services.Running]


def _look(environment: Mapping[str, str], connections: Connections | None = None) -> _Seen:
    """Look in the usual directories, then for processes: those find services with a control socket
    in another place, or with one that was removed."""
    listeners = {path: listener_at(path, connections) for path in rundir.find(environment)}
    usual = [
        path for path, pid in listeners.items() if pid is not None and os.access(path, os.W_OK)
    ]
    by_process = _by_process(environment, {pid for path in usual if (pid := listeners[path])})
    elsewhere = [_Found(each.path, each.title) for each in by_process if each.path not in usual]
    return _Seen(
        [
            *map(_Found, usual),
            *(each for each in elsewhere if _may_connect(each.path, connections)),
        ],
        [path for path, pid in listeners.items() if pid is None],
        [each for each in by_process if each.is_gone],
    )


def _by_process(environment: Mapping[str, str], known: set[int]) -> list[services.Running]:
    end_s = time.monotonic() + taken.RENEWAL_TIMEOUT_S
    while True:
        found = services.find(environment, known)
        if time.monotonic() >= end_s or not any(each.is_gone for each in found):
            return found
        time.sleep(ASK_AGAIN_S)


def _may_connect(path: Path, connections: Connections | None) -> bool:
    return os.access(path, os.W_OK) and listener_at(path, connections) is not None


def of_others(environment: Mapping[str, str]) -> list[str]:
    """The names of running services that belong to other users."""
    return [path.stem for path in rundir.of_others(environment)]


def none_of_ours(others: Sequence[str]) -> tuple[str, str]:
    """Cause and cure if only services of other users are running."""
    count = f"{plural(len(others), 'service')} of other users"
    user = "its user" if len(others) == 1 else "their users"
    return f"{count}: {', '.join(others)}; none of yours", f"ask as root or as {user}"


FINISH_S, QUICK_S = 30.0, 1.0
"""How long abandoned workers get to finish."""
