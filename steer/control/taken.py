"""Whether a name is taken: a service answers at its control socket, or is to make that again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from steer.control.peer import connect, credentials
from steer.control.rundir import places
from steer.errors import ControlError
from steer.linux import services, unix
from steer.linux.title import GUARD

PATH_MAX_BYTES = 107
"""sun_path of unix(7), less the null byte at its end."""
_ANSWER_S = 1.0
RENEWED_S, _RENEWAL_S = 4.0, 0.05
"""A control socket that was removed is made again within 2 s."""


def refuse_taken(
    name: str,
    wanted: str | None,
    environment: Mapping[str, str],
    ours: int | None = None,
    lost: Sequence[services.Running] | None = None,
) -> list[Path]:
    """Where the control socket may be, unless a service of that name is running.

    Args:
        ours: inode of a control socket that may have the name.
        lost: as `await_guard` returned them a moment ago.

    Raises:
        ControlError: one is; or no path is short enough.
    """
    found = places(name, wanted, environment)
    _refuse_too_long(name, found)
    for path in found:
        refuse_if_answering(name, path)
    for each in unreachable(found, environment) if lost is None else lost:
        if each.inode != ours:
            raise running(name, f"pid {each.pid}", each.path)
    return found


def _refuse_too_long(name: str, paths: Iterable[Path]) -> None:
    """Raises ControlError: none of them can be that of a socket."""
    lengths = {path: len(os.fsencode(path)) for path in paths}
    if all(length > PATH_MAX_BYTES for length in lengths.values()):
        causes = "; ".join(f"{path} has {length}" for path, length in lengths.items())
        cause = f"a socket's path has {PATH_MAX_BYTES} bytes at most, {causes}"
        cure = "name another place: --control-socket PATH, STEER_RUNTIME_DIR"
        raise ControlError(f"make the control socket of {name!r}", cause, cure)


def unreachable(paths: Iterable[Path], environment: Mapping[str, str]) -> list[services.Running]:
    """The services of this user whose control sockets were at one of these paths, and are gone.
    They are made again soon."""
    missing = {path.absolute() for path in paths if not os.path.lexists(path)}
    if not unix.may_listen(missing):
        return []
    found = services.find(environment)
    return [each for each in found if each.path in missing and each.is_gone]


def await_guard(
    paths: Iterable[Path], environment: Mapping[str, str]
) -> Sequence[services.Running]:
    """Where a control socket at one of these was removed while no controller is there, wait until
    the guard process has made it again: for a moment, as it may be stopped.

    Returns:
        Those that are `unreachable` then.
    """
    from steer.linux import signals

    end_s = time.monotonic() + RENEWED_S
    wanted = list(paths)
    while True:
        lost = unreachable(wanted, environment)
        if all(each.title.role != GUARD for each in lost) or time.monotonic() >= end_s:
            return lost
        signals.pause(_RENEWAL_S)


def refuse_if_answering(name: str, path: Path) -> None:
    """A socket that nobody answers at is what a killed controller left: it is no obstacle.

    Raises:
        ControlError: somebody answers.
    """
    try:
        with connect(path, _ANSWER_S) as sock:
            holder = f"pid {credentials(sock)[0]}"
    except TimeoutError:
        holder = "it does not answer"
    except OSError:
        return
    raise running(name, holder, path)


def running(name: str, holder: str, path: Path) -> ControlError:
    """What it means that somebody answers where a service's control socket is to be."""
    return ControlError(
        f"start service {name!r}",
        f"one of that name is running ({holder}, {path})",
        f"stop it with `steer stop {name}`, or give this one another --name",
    )
