"""Addresses as `steer attach` takes them, and the listeners at one."""

from __future__ import annotations

import socket

from steer.config import address
from steer.config.address import Bind
from steer.errors import AttachRefused
from steer.sockets import sock_diag
from steer.sockets.sock_diag import Listener


def listeners_at(bind: Bind) -> dict[int, Listener]:
    """The TCP listeners at exactly this address, by inode. Raises KernelError."""
    family = socket.AF_INET6 if bind.is_v6 else socket.AF_INET
    host = socket.inet_pton(family, bind.address)
    return {
        each.inode: each
        for each in sock_diag.listeners(family, bind.port)
        if each.address == host and not each.device
    }


def binds_of(text: str) -> list[Bind]:
    """The addresses that a user names. A wildcard without a host is that of both families, each of
    which has a group of its own in the kernel: those at which somebody listens.

    Raises:
        ConfigError: it is none.
        AttachRefused: UDP.
        KernelError
    """
    bind = address.parse(text)
    if bind.protocol == "udp":
        cause = "attach is over TCP: datagrams that wait at a closing socket cannot be moved"
        raise AttachRefused(f"attach to {text}", cause, "see `steer run`")
    if not text.startswith((":", "*:")):
        return [bind]
    both = (bind, Bind(bind.protocol, "::", bind.port))
    return [each for each in both if listeners_at(each)] or [bind]


def text_of(bind: Bind) -> str:
    """An address of TCP as the commands take it."""
    label = bind.label.removeprefix("tcp ")
    return label.removeprefix("0.0.0.0") if bind.address == "0.0.0.0" else label
