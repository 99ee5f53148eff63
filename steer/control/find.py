"""Finds running services, and what is left of services, for those who ask."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from steer.control import rundir, schema, taken
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
    kept: Connections | None = None,
) -> Path:
    """The control socket of a service; NAME may be left out where one runs.

    Raises:
        NotRunning: there is none, or of that name.
        ControlError: there are several, and no name was given.
    """
    if control_socket:
        return Path(control_socket)
    for path in rundir.find(environment, name):
        if path.stem == name and listener_at(path, kept) is not None:
            return path
    there = _look(environment, kept).running
    named = [each for each in there if name is None or each.is_named(name)]
    if not named:
        raise _not_found(name, there, environment)
    if len(named) > 1:
        if name is None:
            cause, cure = f"several are running: {_names(named)}", "name one"
        else:
            cause = "several of that name are running"
            cure = " or ".join(f"--control-socket {each.path}" for each in named)
        raise ControlError("find the service", cause, cure)
    return named[0].path


class _Found(msgspec.Struct, frozen=True):
    """A service at whose control socket somebody answers.

    Args:
        shown: what its process shows, where that is how it was found.
    """

    path: Path
    shown: Title | None = None

    @property
    def name(self) -> str:
        return self.shown.name if self.shown else self.path.stem

    def is_named(self, name: str) -> bool:
        return self.shown.may_name(name) if self.shown else self.path.stem == name


def _not_found(
    name: str | None, there: Sequence[_Found], environment: Mapping[str, str]
) -> NotRunning:
    if not there:
        _tell_left(name, environment)
    for each in services.find(environment):
        if each.is_gone and (name is None or each.title.may_name(name)):
            return NotRunning(f"find service {shown(name or each.title.name)}", *_of_lost(each))
    others = of_others(environment)
    if name is not None:
        words = f"running: {_names(there)}" if there else "no service is running"
        if others:
            words += f"; of other users: {', '.join(others)}"
        return NotRunning(f"find service {shown(name)}", "not running", words)
    if others:
        return NotRunning("find a service", *none_of_ours(others))
    return NotRunning("find a service", "none is running", "start one with `steer run`")


def _of_lost(service: services.Running) -> tuple[str, str]:
    """Cause and cure where a service cannot be asked."""
    cause = f"its control socket {service.path} was removed, and is not made again"
    return cause, f"is pid {service.pid} stopped? see ps(1) and its log"


def _names(found: Iterable[_Found]) -> str:
    return ", ".join(each.name for each in found)


def left(
    environment: Mapping[str, str], name: str | None = None, control_socket: str | None = None
) -> list[Abandoned]:
    """What is left of services, or of the one of that name or control socket, whose controller
    and guard were killed while workers go on."""
    paths = [Path(control_socket)] if control_socket else rundir.find(environment, name)
    named = (path for path in paths if name is None or control_socket or path.stem == name)
    dead = [path for path in named if listener_at(path) is None]
    found = _left_at(dead, environment)
    if control_socket:
        return [each for each in found if each.control is not None]
    return [each for each in found if name in (None, each.name)]


def _left_at(dead: Sequence[Path], environment: Mapping[str, str]) -> list[Abandoned]:
    """The same, wherever they were.

    Args:
        dead: control sockets at which nobody answers.
    """
    members = services.unattended(environment)
    if not (dead or members):
        return []
    from steer.control import abandoned

    return abandoned.find(dead, members)


def end_left(what: Abandoned, quick: bool, directory: bool) -> None:
    """End the workers of a service whose controller and guard were killed.

    Args:
        directory: whether that of the control socket may go, too, if it is empty then.

    Raises:
        ControlError: some are still there.
    """
    from steer.control import abandoned

    if there := abandoned.end(what, QUICK_S if quick else FINISH_S, directory):
        pids = several("pid", there)
        raise ControlError(f"stop {what.name}", f"{pids} cannot be ended", "see ps(1)")


def _tell_left(name: str | None, environment: Mapping[str, str]) -> None:
    """Raises NotRunning: that is what there is of the service."""
    for each in left(environment, name):
        raise NotRunning(f"find service {shown(each.name)}", *_of_left(each))


def _of_left(what: Abandoned) -> tuple[str, str]:
    """What there is of such a service, and what can be done."""
    count = plural(len(what.workers), "worker")
    pids = several("pid", (pid for pid, _ in what.workers))
    state = f"its controller and guard were killed, and {count} ({pids}) go on, unsteered"
    return state, f"`steer stop {what.name}` ends them, and so does `steer run`"


def status_of_all(environment: Mapping[str, str], kept: Connections | None = None) -> schema.Status:
    """The same of every service that runs, and which go on without a controller.

    Raises:
        ControlError
    """
    seen = _look(environment, kept)
    found = schema.Status(schema=1, services=[])
    for each in seen.running:
        try:
            found.services += status(each.path, kept).services
        except Orphaned as error:
            found.orphaned.append(schema.Orphan(each.path.stem, error.cause))
        except NotRunning:
            pass  # it has ended since
    for left_over in _left_at(seen.dead, environment):
        found.orphaned.append(schema.Orphan(left_over.name, "; ".join(_of_left(left_over))))
    for lost in seen.lost:
        found.orphaned.append(schema.Orphan(lost.title.name, "; ".join(_of_lost(lost))))
    found.others = len(of_others(environment))
    return found


class _Seen(msgspec.Struct):
    """Of the services of this user.

    Args:
        running: those at whose control sockets somebody answers whom we may ask.
        dead: control sockets in the usual places at which nobody answers.
        lost: those whose control sockets were removed.
    """

    running: list[_Found]
    dead: list[Path]
    lost: list[services.Running]


def _look(environment: Mapping[str, str], kept: Connections | None = None) -> _Seen:
    """In the usual places, then for processes: they listen elsewhere, or make a socket again
    that was removed."""
    listeners = {path: listener_at(path, kept) for path in rundir.find(environment)}
    usual = [
        path for path, pid in listeners.items() if pid is not None and os.access(path, os.W_OK)
    ]
    by_process = _by_process(environment, {pid for path in usual if (pid := listeners[path])})
    elsewhere = [_Found(each.path, each.title) for each in by_process if each.path not in usual]
    return _Seen(
        [*map(_Found, usual), *(each for each in elsewhere if _may_ask(each.path, kept))],
        [path for path, pid in listeners.items() if pid is None],
        [each for each in by_process if each.is_gone],
    )


def _by_process(environment: Mapping[str, str], known: set[int]) -> list[services.Running]:
    end_s = time.monotonic() + taken.RENEWED_S
    while True:
        found = services.find(environment, known)
        if time.monotonic() >= end_s or not any(each.is_gone for each in found):
            return found
        time.sleep(ASK_AGAIN_S)


def _may_ask(path: Path, kept: Connections | None) -> bool:
    return os.access(path, os.W_OK) and listener_at(path, kept) is not None


def of_others(environment: Mapping[str, str]) -> list[str]:
    """The names of services that run and that we may not ask."""
    return [path.stem for path in rundir.of_others(environment)]


def none_of_ours(others: Sequence[str]) -> tuple[str, str]:
    """Cause and cure where only these run."""
    count = f"{plural(len(others), 'service')} of other users"
    user = "its user" if len(others) == 1 else "their users"
    return f"{count}: {', '.join(others)}; none of yours", f"ask as root or as {user}"


FINISH_S, QUICK_S = 30.0, 1.0
"""What workers get to finish that nobody looks after any more."""
