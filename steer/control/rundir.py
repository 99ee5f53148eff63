"""The directories of control sockets, and the sockets that are found there."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from steer.linux import services, unix
from steer.linux.services import RUNTIME_DIR

_SYSTEM = Path("/run/steer")
_LOGINS = Path("/run/user")
TMP = Path("/tmp")


def directories(environment: Mapping[str, str]) -> list[Path]:
    """The directories for control sockets of this user's services, best first.

    If STEER_RUNTIME_DIR is set, it is the only one. Root uses /run/steer and ignores
    XDG_RUNTIME_DIR, which only login shells set: commands run by cron and systemd have to find the
    same services. Other users have `steer` in their XDG_RUNTIME_DIR, then /run/steer if it was made
    for them, then a directory of their own in /tmp.
    """
    override = environment.get(RUNTIME_DIR)
    if override:
        return [Path(override)]
    user = os.geteuid()
    own = [] if user == 0 else [_of_login(environment, user)]
    return [*own, _SYSTEM, TMP / f"steer-{user}"]


def _of_login(environment: Mapping[str, str], user: int) -> Path:
    """The directory in XDG_RUNTIME_DIR; if that is not set, in what a login shell would set it to
    (pam_systemd(8))."""
    return Path(environment.get("XDG_RUNTIME_DIR") or _LOGINS / str(user), "steer")


def _directories_to_look_in(environment: Mapping[str, str]) -> Iterator[Path]:
    """The directories that may hold control sockets we can connect to: for root, the directories
    of all users."""
    yield from directories(environment)
    if environment.get(RUNTIME_DIR):
        return
    user = os.geteuid()
    yield _of_login(environment, user)
    yield _LOGINS / str(user) / "steer"
    if user == 0:
        yield from sorted(_LOGINS.glob("*/steer"))
        yield from sorted(TMP.glob("steer-*"))


def find(environment: Mapping[str, str], name: str | None = None) -> list[Path]:
    """Paths of control sockets, whether or not a service answers there. This user's come first.

    Args:
        name: the name of a service; None: all services. In a directory that we cannot list, only a
            socket whose name is known can be found.

    A directory that is named after a user is skipped if another user owns it, as in /tmp anybody
    could have made it.
    """
    found: dict[Path, None] = {}
    for directory in _directories_to_look_in(environment):
        with contextlib.suppress(OSError, ValueError):
            if _has_expected_owner(directory):
                named = directory / f"{name}.sock"
                paths = [named] if name and named.exists() else sorted(directory.glob("*.sock"))
                found.update(dict.fromkeys(paths))
    return list(found)


def of_others(environment: Mapping[str, str]) -> list[Path]:
    """Control sockets of running services that belong to other users. Root may use all services,
    so for root there are none.

    The sockets are read from the kernel's table, which also has sockets in directories that we
    cannot list. The table does not name users, so our own sockets are recognized by the name of
    their directory or by the processes of the service.
    """
    user = os.geteuid()
    if user == 0:
        return []
    override = environment.get(RUNTIME_DIR)
    own = {path for path in find(environment) if os.access(path, os.W_OK)}
    listening = {path for _, path in unix.listening()} - own
    others = [
        path for path in listening if _may_be_control(path, override) and _user_of(path) != user
    ]
    unnamed = any(_user_of(path) is None for path in others)
    by_process = services.names_of_ours() if unnamed else set()
    return sorted(path for path in others if not _is_gone(path, by_process))


def _is_gone(path: Path, own: set[str]) -> bool:
    """Whether this is the removed control socket of one of our services.

    Args:
        path: in a directory that is not named after a user, or this is false.
        own: names of our services.
    """
    return _user_of(path) is None and path.stem in own and not os.path.lexists(path)


def _may_be_control(path: Path, override: str | None) -> bool:
    if path.suffix != ".sock":
        return False
    if override:
        return path.parent == Path(override)
    return path.parent == _SYSTEM or _user_of(path) is not None


def _user_of(path: Path) -> int | None:
    """The user that the directory of a control socket is named after; None: none."""
    directory = path.parent
    with contextlib.suppress(ValueError):
        if directory.name == "steer" and directory.parent.parent == _LOGINS:
            return int(directory.parent.name)
        if directory.parent == TMP and directory.name.startswith("steer-"):
            return int(directory.name.removeprefix("steer-"))
    return None


def _has_expected_owner(directory: Path) -> bool:
    """Whether a directory belongs to the user that it is named after, if it is named after one.

    Raises:
        OSError: there is no such directory.
        ValueError: the name should have a user id, and has something else.
    """
    if directory.parent == TMP and directory.name.startswith("steer-"):
        user = int(directory.name.removeprefix("steer-"))
    elif directory.parent.parent == _LOGINS:
        user = int(directory.parent.name)
    else:
        return True
    found = directory.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user


def control_socket_paths(
    name: str, wanted: str | None, environment: Mapping[str, str]
) -> list[Path]:
    """The paths that the control socket of a service may have, best first.

    Args:
        wanted: the only path, if the user chose one.
    """
    if wanted is not None:
        return [Path(wanted)]
    return [directory / f"{name}.sock" for directory in directories(environment)]
