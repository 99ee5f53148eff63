"""Both ends of sd_notify(3): workers tell us that they are ready, and we our own supervisor."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from steer.control import notification_buffer
from steer.control.notification_buffer import Datagram
from steer.linux import processes

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Notification = tuple[Sequence[int], Mapping[str, str]]
"""The lineage of who sent it, himself first (`mail.lineage`), and the message by key."""
Heard = Callable[[Sequence[int], Mapping[str, str]], None]

_FLOOD = 4096
"""Messages: each of as many workers may have sent one."""
_AT_ONCE = 16
"""Messages that are taken in one turn of the loop, so that what follows is done once for all."""
_KINDS_MAX = 16


class Unheard:
    """Says why READY=1 of somebody is not taken for a worker's: of each kind of sender once, and
    of very many kinds not at all, as anybody may send it.

    Args:
        warn: takes the words.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._kinds: set[tuple[str | None, str]] = set()

    def tell(self, pid: int, cause: str, cure: str) -> None:
        command = processes.command(pid)
        if (command, cause) in self._kinds or len(self._kinds) >= _KINDS_MAX:
            return
        self._kinds.add((command, cause))
        self._warn(f"READY=1 of {command or 'a process'} (pid {pid}) is not heard: {cause}; {cure}")


def is_ready(message: Mapping[str, str]) -> bool:
    """Whether it says so."""
    return message.get("READY") == "1"


class Listener:
    """The socket that workers notify.

    Its name is abstract: no file is left behind, and any user a worker has become
    can reach it. Who sent a message is told by the kernel, not by the message.

    What comes before it is watched waits in it.

    Args:
        trusted: users whose messages are looked at.
        unheard: is told of those of others.
        address, fd: of one that was made before; the descriptor becomes ours.

    Attributes:
        known: the first processes of workers: nobody is looked for beyond one of these.
    """

    def __init__(
        self, trusted: frozenset[int], unheard: Unheard, address: str = "", fd: int = -1
    ) -> None:
        self._trusted = trusted
        self._unheard = unheard
        self.known: Container[int] = ()
        self.address = address
        if address:
            self._socket = socket.socket(fileno=fd)
        else:
            self._make()

    def _make(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        name = f"steer-{os.getpid()}-{os.urandom(8).hex()}"
        self._socket.bind(f"\0{name}")
        self.address = f"@{name}"

    def fileno(self) -> int:
        return self._socket.fileno()

    def trust(self, user: int) -> None:
        """Look at the messages of this user too, from now on."""
        self._trusted |= {user}

    def watch(self, loop: AbstractEventLoop, heard: Heard) -> None:
        """Call `heard` with each message."""
        loop.add_reader(self._socket, lambda: self._pass_on(heard))

    def _pass_on(self, heard: Heard) -> None:
        for lineage, message in self.receive(_AT_ONCE):
            heard(lineage, message)

    def hear_all(self, heard: Heard) -> None:
        """Call `heard` with all that waits now, but for a flood of it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        for _ in range(_FLOOD // _AT_ONCE):
            if not poll.poll(0):
                return
            self._pass_on(heard)

    def receive(self, at_most: int = 1) -> Iterator[Notification]:
        """The next messages, as far as there are any that may be looked at, and who sent them."""
        yield from self.read(notification_buffer.receive(self._socket, self.known, at_most))

    def read(self, decoded: Iterable[Datagram]) -> Iterator[Notification]:
        """The messages in these that may be looked at, and who sent them."""
        for datagram in decoded:
            message = parse(datagram.text)
            if datagram.uid in self._trusted:
                yield datagram.lineage or (datagram.pid,), message
            elif is_ready(message):
                cause = f"user {datagram.uid} is not the one that workers are started as"
                self._unheard.tell(datagram.pid, cause, "have steer change the user: --user")

    def close(self) -> None:
        self._socket.close()


def parse(message: bytes) -> dict[str, str]:
    """The assignments in a message; other lines are passed over, as sd_notify(3) has it."""
    lines = message.decode(errors="replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def tell_supervisor(message: str, environment: Mapping[str, str]) -> None:
    """Tell whoever started us, systemd for one, if it wants to be told."""
    address = environment.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), address)
