"""Where else somebody listens, if nobody does at an address."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from steer.attach.binds import text_of
from steer.config.address import Bind
from steer.errors import AttachRefused, KernelError
from steer.linux import netns
from steer.loader.kernel_sockets import Look
from steer.sockets import sock_diag

_TCP, _NAMESPACES_MAX = 6, 8


def refusal(bind: Bind, act: str) -> AttachRefused:
    """Names the other addresses or network namespaces where the port is listened on. Raises
    KernelError."""
    hosts = sorted(_hosts(bind.port))
    if hosts:
        others = [f"{host}:{bind.port}" for host in hosts]
        cause = f"nobody listens at exactly that address, but at {' and '.join(others)}"
        return AttachRefused(act, cause, " or ".join(f"`steer attach {each}`" for each in others))
    if namespaces := _namespaces(bind.port):
        command = f"steer attach {text_of(bind)}"
        cure = " or ".join(f"`{command} --netns {each}`" for each in namespaces)
        cause = "nobody listens there in this network namespace, but in another"
        return AttachRefused(act, cause, cure)
    return AttachRefused(act, "nobody listens there", "`steer inspect` shows all that listen")


def _hosts(port: int) -> set[str]:
    return {
        _text(each.address)
        for family in (socket.AF_INET, socket.AF_INET6)
        for each in sock_diag.listeners(family, port)
    }


def _text(packed: bytes) -> str:
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"


def _namespaces(port: int) -> Sequence[str]:
    """Other network namespaces where somebody listens on the port: their names, or a process that
    is in each."""
    found: dict[int, str] = {}
    with suppress(KernelError), Look() as look:
        for each in look.held():
            if each.port == port and each.protocol == _TCP:
                found.setdefault(each.netns, str(each.pid))
    found.pop(netns.own(), None)
    names = netns.names()
    return [names.get(number, pid) for number, pid in found.items()][:_NAMESPACES_MAX]
