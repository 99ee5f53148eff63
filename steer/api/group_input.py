"""Checks the input of a group: the address, the number of slots, sockets of other code."""

from __future__ import annotations

import socket

from steer import values
from steer.api import arguments
from steer.config import address
from steer.config.address import Bind
from steer.config.service import MAX_WORKERS
from steer.errors import GroupError
from steer.sockets import members, port_checks


def bind_of(text: str) -> Bind:
    """The address of the group. Port 0 becomes a free port.

    Raises:
        ConfigError: the text is not an address.
        BindError: no port is free there.
    """
    arguments.string("address", text, "ReuseportGroup", address.ALLOWED)
    return port_checks.with_port(address.parse(text, any_port=True))


def text_of(bind: Bind) -> str:
    """The address as text that `address.parse` reads."""
    return bind.label.replace(" ", "://")


def count_of(slots: int) -> int:
    """The number of slots. Raises ConfigError: it is not one."""
    return arguments.whole_number("slots", slots, "ReuseportGroup", least=1, most=MAX_WORKERS)


def check_socket(sock: object, bind: Bind, act: str) -> socket.socket:
    """The socket.

    Raises:
        GroupError: it cannot be in the group at this address.
    """
    if not isinstance(sock, socket.socket):
        raise GroupError(act, f"{values.kind_of(sock)}, not a socket", "give a socket.socket")
    if why_not := _why_not(sock, bind):
        raise GroupError(act, *why_not)
    return sock


def _why_not(sock: socket.socket, bind: Bind) -> tuple[str, str] | None:
    """Why the socket cannot join the group, and what would help; None if it can."""
    if sock.fileno() < 0:
        return "the socket is closed", "make another"
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    kind = socket.SOCK_DGRAM if bind.protocol == "udp" else socket.SOCK_STREAM
    if (sock.family, sock.type) != (family, kind):
        return f"it is {sock.family.name} {sock.type.name}", f"give {family.name} {kind.name}"
    host, port = sock.getsockname()[:2]
    if (host, port) != (bind.address, bind.port):
        return f"it is bound to {host}:{port}", f"bind it to {bind.address}:{bind.port}"
    if not members.shares(sock):
        return "it has no SO_REUSEPORT", "set that before bind(2)"
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if bind.protocol == "tcp" and not listens:
        return "it does not listen", "call its listen() first"
    return None
