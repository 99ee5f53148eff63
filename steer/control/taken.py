"""Checks whether a name is taken.

It is if a service answers at the control socket of that name, or if the control socket of a running
service was removed: the service will make it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from steer.control.peer import connect, credentials
from steer.control.rundir import control_socket_paths
from steer.errors import ControlError
from steer.linux import services, unix
from steer.linux.title import GUARD

PATH_MAX_BYTES = 107
"""The size of sun_path of unix(7), without the null byte at its end."""
_ANSWER_S = 1.0
_NAMES_MAX = 100
RENEWAL_TIMEOUT_S, _LOOK_AGAIN_S = 4.0, 0.05
"""How long to wait for a removed control socket, which its service makes again within 2 s."""


def refuse_taken(
    name: str,
    wanted: str | None,
    environment: Mapping[str, str],
    own_inode: int | None = None,
    lost: Sequence[services.Running] | None = None,
) -> list[Path]:
    """The paths that the control socket of a new service may have.

    Args:
        wanted: the only path, if the user chose one.
        own_inode: inode of a control socket that may have the name, as it is the caller's own.
        lost: the result of `await_guard`, if it was called a moment ago.

    Raises:
        ControlError: a service of that name is running, or all paths are too long.
    """
    found = control_socket_paths(name, wanted, environment)
    _refuse_too_long(name, found)
    for path in found:
        refuse_if_answering(name, path)
    for each in unreachable(found, environment) if lost is None else lost:
        if each.inode != own_inode:
            raise already_running(name, f"pid {each.pid}", each.path)
    return found


def free_name(name: str, environment: Mapping[str, str]) -> str:
    """The name, or one with a number behind it that no service of this user has."""
    for candidate in (name, *(f"{name}-{number}" for number in range(2, _NAMES_MAX))):
        with suppress(ControlError):
            refuse_taken(candidate, None, environment)
            return candidate
    return name


def _refuse_too_long(name: str, paths: Iterable[Path]) -> None:
    """Raises ControlError: each path is too long for a socket."""
    lengths = {path: len(os.fsencode(path)) for path in paths}
    if all(length > PATH_MAX_BYTES for length in lengths.values()):
        causes = "; ".join(f"{path} has {length}" for path, length in lengths.items())
        cause = f"a socket's path has {PATH_MAX_BYTES} bytes at most, {causes}"
        cure = "set control_socket to another path, or STEER_RUNTIME_DIR"
        raise ControlError(f"make the control socket of {name!r}", cause, cure)


def unreachable(paths: Iterable[Path], environment: Mapping[str, str]) -> list[services.Running]:
    """The services of this user whose control socket had one of these paths and was removed. Such
    a service makes its control socket again soon."""
    missing = {path.absolute() for path in paths if not os.path.lexists(path)}
    if not unix.may_listen(missing):
        return []
    found = services.find(environment)
    return [each for each in found if each.path in missing and each.is_gone]


def await_guard(
    paths: Iterable[Path], environment: Mapping[str, str]
) -> Sequence[services.Running]:
    """Wait until guard processes have made removed control sockets again.

    A guard process makes the control socket again while there is no controller. It may be stopped,
    so the wait has a limit.

    Args:
        paths: the paths of control sockets.

    Returns:
        The services that are `unreachable` after the wait.
    """
    from steer.linux import signals

    end_s = time.monotonic() + RENEWAL_TIMEOUT_S
    wanted = list(paths)
    while True:
        lost = unreachable(wanted, environment)
        if all(each.title.role != GUARD for each in lost) or time.monotonic() >= end_s:
            return lost
        signals.pause(_LOOK_AGAIN_S)


def refuse_if_answering(name: str, path: Path) -> None:
    """Refuse to use a path if a service answers there. A socket at which nobody answers was left by
    a controller that was killed, and may be replaced.

    Raises:
        ControlError: a service answers, or holds the socket and does not answer.
    """
    try:
        with connect(path, _ANSWER_S) as sock:
            holder = f"pid {credentials(sock)[0]}"
    except TimeoutError:
        holder = "it does not answer"
    except OSError:
        return
    raise already_running(name, holder, path)


def already_running(name: str, holder: str, path: Path) -> ControlError:
    """The error that a service of that name is running.

    Args:
        holder: which process answers at its control socket, in words.
    """
    return ControlError(
        f"start service {name!r}",
        f"one of that name is running ({holder}, {path})",
        f"stop it with `steer stop {name}`, or give this one another name",
    )
