"""How the sockets of a group, and what they get, are called. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Wording(msgspec.Struct, frozen=True):
    """Args:
    socket: what a member of the group is called.
    traffic: what it gets.
    gone: what happened to one that is not there any more.
    nobody: that there is none.
    unserved: what the kernel does as long as there is none.
    """

    socket: str
    traffic: str
    gone: str
    nobody: str
    unserved: str


BY_PROTOCOL: Mapping[str, Wording] = {
    "tcp": Wording(
        "listener",
        "connections",
        "closed",
        "nobody listens",
        "the kernel refuses connections until somebody does",
    ),
    "udp": Wording(
        "socket",
        "datagrams",
        "closed or connected",
        "no unconnected socket is bound",
        "the kernel refuses datagrams until one is",
    ),
}
