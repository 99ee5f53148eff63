"""Commands as another user, with fewer capabilities, or with system calls refused."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable

_REFUSE = """
import ctypes, os, struct, sys
calls, action, command = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3:]
ALLOW = 0x7FFF0000
code = [(0x20, 0, 0, 0)]  # the number
for number in calls:
    code += [(0x15, 0, 1, int(number)), (0x06, 0, 0, action)]
code += [(0x06, 0, 0, ALLOW)]
insns = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(insns)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
os.execvp(command[0], command)
"""


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
    return (sys.executable, "-c", _REFUSE, ",".join(map(str, calls)), str(action))
