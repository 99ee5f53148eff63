"""What an attacher hands over to the one that it re-executes itself as."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import msgspec

from steer.attach.replaced import StoredProgram
from steer.attach.roster import State
from steer.backends.base import Counts
from steer.config.address import Bind
from steer.config.service import Service
from steer.control.claim import Claim
from steer.errors import ControlError
from steer.linux import fork

_VARIABLE = "STEER_ATTACH_HANDOVER"
_MEMORY = "memfd:steer-handover"
_ANSWER_S = 10.0
_ASKED = b"\n"


class KeptMember(msgspec.Struct, frozen=True):
    """A listener: its slot, its state, and what was counted for it."""

    slot: int
    state: State
    counts: Counts


class KeptGroup(msgspec.Struct, frozen=True):
    """What a group was when its attacher let it go.

    Args:
        retired: the counts of listeners that have left.
        members: by inode.
        pids: processes that probably hold the listeners.
    """

    retired: Counts
    members: dict[int, KeptMember]
    pids: list[int]


class Replaced(msgspec.Struct, frozen=True):
    """The program to put back at an address."""

    bind: Bind
    program: StoredProgram


class Handover(msgspec.Struct, frozen=True):
    """What survives execve(2).

    Args:
        service: as it is configured now.
        binds: the addresses of its groups.
        path, remove_directory, control: its control socket, the last as a descriptor.
        channel: a descriptor by which to ask the stand-in.
        stand_in: its process.
        sockmaps: the addresses whose groups are selected from a sockmap.
    """

    service: Service
    binds: list[Bind]
    replaced: list[Replaced]
    path: str
    remove_directory: bool
    control: int
    channel: int
    stand_in: int
    sockmaps: list[Bind] = []

    def claim(self) -> Claim:
        sock = socket.socket(fileno=self.control)
        return Claim.inherited(Path(self.path), sock, self.remove_directory)


def pass_on(handover: Handover, environment: MutableMapping[str, str]) -> None:
    """Have the program that is executed next receive it. Raises OSError."""
    fd = os.memfd_create(_MEMORY.removeprefix("memfd:"), 0)
    with open(fd, "wb", closefd=False) as file:
        file.write(msgspec.json.encode(handover))
    for each in (handover.control, handover.channel):
        os.set_inheritable(each, True)
    environment[_VARIABLE] = str(fd)


def received(environment: MutableMapping[str, str]) -> Handover | None:
    """What this process was handed over by execve(2); None: it is no successor.

    Raises:
        ControlError: another version of steer handed over what this one does not understand.
    """
    number = environment.pop(_VARIABLE, "")
    if not _is_handover(number):
        return None
    with open(int(number), "rb") as file:
        file.seek(0)
        content = file.read()
    try:
        found = msgspec.json.decode(content, type=Handover, strict=False)
    except msgspec.MsgspecError as error:
        cure = "`steer attach` again"
        raise ControlError("take over from the version before", str(error), cure) from None
    for each in (found.control, found.channel):
        os.set_inheritable(each, False)
    return found


def _is_handover(number: str) -> bool:
    try:
        return number.isdigit() and _MEMORY in os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False


class Predecessor:
    """The stand-in of the attacher that was here before: it steers until `let_go`."""

    def __init__(self, handover: Handover) -> None:
        self._channel = socket.socket(fileno=handover.channel)
        self._pid = handover.stand_in
        fork.add_started(self._pid)

    def let_go(self) -> Sequence[KeptGroup]:
        """Have it release all listeners. Its program selects none from then on, which
        leaves that to the kernel's hash. Returns the groups in the order of the addresses.

        Raises:
            ControlError: it does not.
        """
        act = "take the listeners over from the attacher before"
        try:
            with self._channel:
                self._channel.settimeout(_ANSWER_S)
                self._channel.sendall(_ASKED)
                with self._channel.makefile("rb") as answer:
                    groups = msgspec.json.decode(answer.read(), type=list[KeptGroup], strict=False)
        except (OSError, msgspec.MsgspecError) as error:
            raise ControlError(act, f"its stand-in, pid {self._pid}: {error}") from None
        return groups

    def wait(self) -> None:
        """Wait for its end, after `let_go`."""
        os.waitpid(self._pid, 0)
        fork.remove_started(self._pid)
