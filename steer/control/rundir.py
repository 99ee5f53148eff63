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
    """Where the control socket of a service of ours may be, best first.

    STEER_RUNTIME_DIR is the only place if it is set. Root's is always the system's, whatever
    a login shell has in XDG_RUNTIME_DIR: cron and systemd have to find it, too. Another user's
    is their run directory, the system's if it was made for them, else one of their own in /tmp.
    """
    override = environment.get(RUNTIME_DIR)
    if override:
        return [Path(override)]
    user = os.geteuid()
    own = [] if user == 0 else [_of_login(environment, user)]
    return [*own, _SYSTEM, TMP / f"steer-{user}"]


def _of_login(environment: Mapping[str, str], user: int) -> Path:
    """Where XDG_RUNTIME_DIR is, or would be in a login shell (pam_systemd(8))."""
    return Path(environment.get("XDG_RUNTIME_DIR") or _LOGINS / str(user), "steer")


def _directories_to_look_in(environment: Mapping[str, str]) -> Iterator[Path]:
    """All in which a service that we may ask can be: for root, those of all users."""
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
    """Control sockets, whether anybody answers there or not; our own services' first.

    Another user's directory does not let us list it, but one that we can name is found
    there. Where anybody could have made the directory it is passed over unless its owner is
    whom it is named after.
    """
    found: dict[Path, None] = {}
    for directory in _directories_to_look_in(environment):
        with contextlib.suppress(OSError, ValueError):
            if _is_whose_it_says(directory):
                named = directory / f"{name}.sock"
                there = [named] if name and named.exists() else sorted(directory.glob("*.sock"))
                found.update(dict.fromkeys(there))
    return list(found)


def of_others(environment: Mapping[str, str]) -> list[Path]:
    """Control sockets at which somebody listens, of services that we may not ask; for root there
    are none.

    Where a directory does not let us list it, the kernel's table of sockets still names them. That
    tells no user: what is ours is known by its directory's name, or by its processes.
    """
    user = os.geteuid()
    if user == 0:
        return []
    override = environment.get(RUNTIME_DIR)
    ours = {path for path in find(environment) if os.access(path, os.W_OK)}
    there = {path for _, path in unix.listening()} - ours
    others = [path for path in there if _may_be_control(path, override) and _user_of(path) != user]
    unnamed = any(_user_of(path) is None for path in others)
    by_process = services.names_of_ours() if unnamed else set()
    return sorted(path for path in others if not _is_gone(path, by_process))


def _is_gone(path: Path, ours: set[str]) -> bool:
    """Whether it was the socket of one of our services, in a directory that is no user's."""
    return _user_of(path) is None and path.stem in ours and not os.path.lexists(path)


def _may_be_control(path: Path, override: str | None) -> bool:
    if path.suffix != ".sock":
        return False
    if override:
        return path.parent == Path(override)
    return path.parent == _SYSTEM or _user_of(path) is not None


def _user_of(path: Path) -> int | None:
    """Whose control socket it is, where its directory is named after a user."""
    directory = path.parent
    with contextlib.suppress(ValueError):
        if directory.name == "steer" and directory.parent.parent == _LOGINS:
            return int(directory.parent.name)
        if directory.parent == TMP and directory.name.startswith("steer-"):
            return int(directory.name.removeprefix("steer-"))
    return None


def _is_whose_it_says(directory: Path) -> bool:
    """Raises OSError, ValueError: there is none, or its name tells of no user."""
    if directory.parent == TMP and directory.name.startswith("steer-"):
        user = int(directory.name.removeprefix("steer-"))
    elif directory.parent.parent == _LOGINS:
        user = int(directory.parent.name)
    else:
        return True
    found = directory.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user


def places(name: str, wanted: str | None, environment: Mapping[str, str]) -> list[Path]:
    """Where the control socket of a service may be, best first."""
    if wanted is not None:
        return [Path(wanted)]
    return [directory / f"{name}.sock" for directory in directories(environment)]
