"""The user and group of a worker."""

from __future__ import annotations

import grp
import os
import pwd

import msgspec

from steer.errors import ConfigError
from steer.values import shown, whole_number


class Identity(msgspec.Struct, frozen=True):
    """The user and group of a worker; None keeps that of the controller."""

    uid: int | None = None
    gid: int | None = None
    name: str | None = None
    home: str = "/"

    def environment(self) -> dict[str, str]:
        """The variables HOME, USER and LOGNAME; none if the user stays the same."""
        if self.name is None:
            return {}
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}


def identity(user: str | None, group: str | None) -> Identity:
    """Look a user and a group up, by name or number.

    Raises:
        ConfigError: there is no such user or group, or only root may change to it.
    """
    uid, gid, name, home = None, None, None, "/"
    try:
        if user is not None:
            entry = pwd.getpwuid(_number(user)) if user.isdecimal() else pwd.getpwnam(user)
            uid, gid, name, home = entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir
    except (KeyError, ValueError):
        raise ConfigError(f"run workers as user {shown(user)}", "no such user") from None
    try:
        if group is not None:
            gid = _number(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(f"run workers as group {shown(group)}", "no such group") from None
    changes = (uid not in (None, os.geteuid())) or (gid not in (None, os.getegid()))
    if changes and os.geteuid() != 0:
        raise ConfigError("run workers as another user", "EPERM", "run steer as root")
    return Identity(uid, gid, name, home)


def _number(text: str) -> int:
    """A uid or gid. Raises Invalid, also for (uid_t)-1, which is "unchanged" to setreuid(2)."""
    return whole_number(text, 0, 2**32 - 2)


def become(who: Identity) -> None:
    """Change to this user and group for good. Raises OSError as setuid(2) does."""
    if who.gid is not None:
        os.setgroups([who.gid])
        if who.name is not None:
            os.initgroups(who.name, who.gid)
        os.setgid(who.gid)
    if who.uid is not None:
        os.setuid(who.uid)
