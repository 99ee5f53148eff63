"""Both ends of sd_notify(3): workers notify the controller, which notifies its own supervisor."""

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
"""The lineage of the sender, which comes first itself (`notification_buffer.lineage`), and the
assignments of the message."""
OnNotification = Callable[[Sequence[int], Mapping[str, str]], None]

_FLOOD = 4096
"""How many messages `receive_all` reads at most: some for each of the workers there may be."""
_AT_ONCE = 16
"""How many messages to read in one turn of the loop. What follows from several messages is then
done once."""
_KINDS_MAX = 16


class IgnoredReady:
    """Logs why a READY=1 was ignored: once for each kind of sender, and only for a limited
    number of kinds, as any process may send one.

    Args:
        warn: logs a line.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._kinds: set[tuple[str | None, str]] = set()

    def log(self, pid: int, cause: str, cure: str) -> None:
        command = processes.command(pid)
        if (command, cause) in self._kinds or len(self._kinds) >= _KINDS_MAX:
            return
        self._kinds.add((command, cause))
        self._warn(f"READY=1 of {command or 'a process'} (pid {pid}) is ignored: {cause}; {cure}")


def is_ready(message: Mapping[str, str]) -> bool:
    """Whether a message is READY=1."""
    return message.get("READY") == "1"


class Listener:
    """The socket that workers notify.

    Its name is abstract: it leaves no file behind, and workers of any user can reach it. The kernel
    says who sent a message. Messages wait in the socket until it is watched.

    Args:
        trusted: users whose messages are read.
        ignored_ready: logs that messages of other users are ignored.
        address, fd: the address and descriptor of a socket that an earlier controller made; the
            listener closes `fd`.

    Attributes:
        known: the first processes of workers. A lineage ends at one of these.
    """

    def __init__(
        self, trusted: frozenset[int], ignored_ready: IgnoredReady, address: str = "", fd: int = -1
    ) -> None:
        self._trusted = trusted
        self._ignored_ready = ignored_ready
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
        """Read the messages of this user, too."""
        self._trusted |= {user}

    def watch(self, loop: AbstractEventLoop, on_notification: OnNotification) -> None:
        """Call `on_notification` with each message."""
        loop.add_reader(self._socket, lambda: self._pass_on(on_notification))

    def _pass_on(self, on_notification: OnNotification) -> None:
        for lineage, message in self.receive(_AT_ONCE):
            on_notification(lineage, message)

    def receive_all(self, on_notification: OnNotification) -> None:
        """Call `on_notification` with all messages that wait, up to a limit."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        for _ in range(_FLOOD // _AT_ONCE):
            if not poll.poll(0):
                return
            self._pass_on(on_notification)

    def receive(self, at_most: int = 1) -> Iterator[Notification]:
        """The next messages of trusted users, and who sent them; at most `at_most`."""
        yield from self.read(notification_buffer.receive(self._socket, self.known, at_most))

    def read(self, decoded: Iterable[Datagram]) -> Iterator[Notification]:
        """The messages of trusted users among these datagrams, and who sent them."""
        for datagram in decoded:
            message = parse(datagram.text)
            if datagram.uid in self._trusted:
                yield datagram.lineage or (datagram.pid,), message
            elif is_ready(message):
                cause = f"workers are not started as user {datagram.uid}"
                self._ignored_ready.log(datagram.pid, cause, "have steer change the user: set user")

    def close(self) -> None:
        self._socket.close()


def parse(message: bytes) -> dict[str, str]:
    """The assignments in a message. Other lines are ignored, as sd_notify(3) says."""
    lines = message.decode(errors="replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def notify_supervisor(message: str, environment: Mapping[str, str]) -> None:
    """Notify the supervisor that started us, for example systemd, if it wants notifications."""
    address = environment.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), address)
