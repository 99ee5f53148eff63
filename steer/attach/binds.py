"""Addresses as `steer attach` takes them, and the sockets at one."""

from __future__ import annotations

import socket

from steer.config import address
from steer.config.address import Bind
from steer.errors import AttachRefused
from steer.sockets import sock_diag
from steer.sockets.sock_diag import Listener


def listeners_at(bind: Bind) -> dict[int, Listener]:
    """The TCP listeners, or the UDP sockets that are not connected, at exactly this address, by
    inode. Raises KernelError."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    host = socket.inet_pton(family, bind.address)
    return {
        each.inode: each
        for each in sock_diag.listeners(family, bind.port, bind.protocol)
        if each.address == host and not each.device
    }


def named_by(text: str) -> list[Bind]:
    """The addresses that a user names. A wildcard without a host is that of both families, each of
    which has a group of its own in the kernel. Raises ConfigError: it is none."""
    bind = address.parse(text)
    if not address.is_of_any_host(text):
        return [bind]
    return [bind, Bind(bind.protocol, "::", bind.port)]


def binds_of(text: str) -> list[Bind]:
    """Those that a user names; of a wildcard without a host those that have sockets.

    Raises:
        ConfigError: it is none.
        AttachRefused: multicast or broadcast.
        KernelError
    """
    named = named_by(text)
    if named[0].is_multicast:
        cause = "its address is multicast or broadcast: every socket gets a copy of each datagram"
        raise AttachRefused(f"attach to {text}", cause)
    if len(named) == 1:
        return named
    return [each for each in named if listeners_at(each)] or named[:1]


def text_of(bind: Bind) -> str:
    """An address as the commands take it, as short as it can be."""
    return exact_text_of(bind).replace("0.0.0.0:", ":") if bind.is_wildcard else exact_text_of(bind)


def exact_text_of(bind: Bind) -> str:
    """The same, so that it names one family even if it is a wildcard."""
    host = f"[{bind.address}]" if bind.is_v6 else bind.address
    return f"{'udp://' if bind.protocol == 'udp' else ''}{host}:{bind.port}"
