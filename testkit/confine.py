"""Commands as another user, with fewer capabilities, or with system calls refused."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable

from testkit.programs import path

_REFUSE = path("refuse_calls")


NOBODY = 65534


def as_user(uid: int | None, *command: str) -> list[str]:
    """The command as another user, with no capability and none to be had."""
    if uid is None:
        return list(command)
    drop = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all")
    return ["setpriv", *drop, "--inh-caps=-all", "--", *command]


def setpriv(*held: str) -> tuple[str, ...]:
    """Executes a command as root with no capabilities but these."""
    bounding = ",".join(["-all", *(f"+{name}" for name in held)])
    return ("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", "--")


def refusing(*calls: int) -> tuple[str, ...]:
    """Executes a command whose system calls of these numbers fail with EPERM (seccomp(2))."""
    return _filtered(calls, 0x00050000 | errno.EPERM)


def killing(*calls: int) -> tuple[str, ...]:
    """Executes a command that these system calls end, as systemd's SystemCallFilter= does."""
    return _filtered(calls, 0x80000000)


def _filtered(calls: Iterable[int], action: int) -> tuple[str, ...]:
    return (sys.executable, _REFUSE, ",".join(map(str, calls)), str(action))
