"""Re-executes an attacher, for example after an upgrade of steer, while its policy goes on.

A forked child, the stand-in, does what the attacher did until the new attacher asks it to let go.
If that one ends before it asks, the stand-in gives the listeners back as the guard would.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import NoReturn

import msgspec

from steer.attach import handover
from steer.attach.attachment import Heartbeat
from steer.attach.groups import AttachedGroups
from steer.attach.guard import Guard
from steer.attach.handover import Handover, Replaced
from steer.attach.replaced import ReplacedProgram
from steer.attach.restore import Restore
from steer.config.address import Bind
from steer.control.claim import Claim
from steer.errors import ConfigError, KernelError
from steer.linux import fork, output, signals, title
from steer.linux.log import Log
from steer.linux.retry import Retry
from steer.linux.spare import Spare
from steer.loader import bpf_maps

_LOOK_S = 0.05
_SPARE_DESCRIPTORS = 8
_LAST_LINES_S = 1.0
_STARTS_WITHIN_S = 60.0
_IMPORTS = "import sys; sys.path[:] = {!r}; import steer.attach.service, steer.cli.attach"


def check_would_start() -> None:
    """Import the installed version in another process. Raises ConfigError: that fails."""
    code = _IMPORTS.format(sys.path)
    done = fork.run([sys.executable, "-c", code], _STARTS_WITHIN_S)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        _, _, last = words.rpartition("\n")
        raise ConfigError("re-execute", f"the installed version does not start: {last}")


class Attacher(msgspec.Struct, frozen=True):
    """What re-executes itself."""

    groups: AttachedGroups
    replaced: Mapping[Bind, ReplacedProgram]
    claim: Claim
    guard: Guard
    restore: Restore
    log: Log


def reexecute(attacher: Attacher) -> NoReturn:
    """Execute steer again in this process.

    Raises:
        KernelError: the kernel refuses.
    """
    attacher.log.info("re-executing")
    ours, theirs = socket.socketpair()
    try:
        with bpf_maps.inherited():
            pid, _ = fork.fork(lambda: _StandIn(attacher, ours, theirs).run(), signals.OURS)
        theirs.close()
        attacher.guard.end()
        handover.pass_on(_handover(attacher, ours.fileno(), pid), os.environ)
        output.stderr.finish(_LAST_LINES_S)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        raise KernelError.from_oserror("re-execute", error) from None


def _handover(attacher: Attacher, channel: int, stand_in: int) -> Handover:
    plan, claim = attacher.groups.plan, attacher.claim
    return Handover(
        msgspec.structs.replace(plan.service, name=plan.name),
        list(plan.binds),
        [Replaced(bind, each.stored) for bind, each in attacher.replaced.items()],
        str(claim.path),
        claim.remove_directory,
        claim.socket.fileno(),
        channel,
        stand_in,
        attacher.groups.sockmaps,
    )


class _StandIn:
    """The forked child."""

    def __init__(self, attacher: Attacher, ours: socket.socket, theirs: socket.socket) -> None:
        self._attacher = attacher
        self._others = (ours, attacher.claim.socket)
        self._channel = theirs
        self._groups = attacher.groups

    def run(self) -> int:
        """Returns the exit status."""
        fork.rename("reuseport-guard")
        title.show(f"steer: guard {self._groups.plan.name}")
        output.stderr.reset()
        for each in self._others:
            each.close()
        is_asked = self._steer()
        if is_asked:
            self._channel.sendall(msgspec.json.encode(self._groups.let_go()))
            self._channel.close()
            return 0
        self._groups.close_programs()
        is_done = self._attacher.restore()
        output.stderr.finish(_LAST_LINES_S)
        return 0 if is_done else 1

    def _steer(self) -> bool:
        """Steer until the new attacher asks for the listeners, or has ended. Whether it asks."""
        beating = Heartbeat(self._groups.beat)
        retry = Retry(self._attacher.log, Spare(_SPARE_DESCRIPTORS))
        while not fork.wait_until_readable(self._channel.fileno(), _LOOK_S):
            for each in self._groups:
                retry.attempt("look for listeners", each.look)
        beating.close()
        return bool(self._channel.recv(1))
