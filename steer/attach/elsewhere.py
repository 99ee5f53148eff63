"""Where else somebody serves, if nobody does at an address."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from steer.abi import PROTOCOLS
from steer.attach.binds import exact_text_of, text_of
from steer.attach.wording import BY_PROTOCOL
from steer.config.address import Bind
from steer.errors import AttachRefused, KernelError
from steer.linux import netns
from steer.loader.kernel_sockets import Look
from steer.sockets import sock_diag

_NAMESPACES_MAX = 8


def refusal(bind: Bind, act: str) -> AttachRefused:
    """Names the other addresses or network namespaces where the port is served. Raises
    KernelError."""
    nobody = BY_PROTOCOL[bind.protocol].nobody
    if others := sorted(_others(bind)):
        cause = f"{nobody} at exactly that address, but at {' and '.join(others)}"
        return AttachRefused(act, cause, " or ".join(f"`steer attach {each}`" for each in others))
    if namespaces := _namespaces(bind):
        command = f"steer attach {text_of(bind)}"
        cure = " or ".join(f"`{command} --netns {each}`" for each in namespaces)
        cause = f"{nobody} there in this network namespace, but in another"
        return AttachRefused(act, cause, cure)
    return AttachRefused(act, f"{nobody} there", "`steer inspect` shows all that serve")


def _others(bind: Bind) -> set[str]:
    return {
        exact_text_of(Bind(bind.protocol, socket.inet_ntop(family, each.address), bind.port))
        for family in (socket.AF_INET, socket.AF_INET6)
        for each in sock_diag.listeners(family, bind.port, bind.protocol)
    }


def _namespaces(bind: Bind) -> Sequence[str]:
    """Other network namespaces where somebody serves the port: their names, or a process that is
    in each."""
    found: dict[int, str] = {}
    with suppress(KernelError), Look() as look:
        for each in look.held():
            if each.port == bind.port and each.protocol == PROTOCOLS[bind.protocol]:
                found.setdefault(each.netns, str(each.pid))
    found.pop(netns.own(), None)
    names = netns.names()
    return [names.get(number, pid) for number, pid in found.items()][:_NAMESPACES_MAX]
