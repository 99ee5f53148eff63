"""Who else is on a port: asked of the kernel by the port, and looked for only if there is
somebody."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack

import pytest

from steer.config import address
from steer.config.address import Bind
from steer.errors import BindError, KernelError
from steer.linux import port_holders, processes
from steer.sockets import port_checks, reuseport, sock_diag
from testkit.harness import KINDS

pytestmark = pytest.mark.usefixtures("netns")
every_kind = pytest.mark.parametrize("bind", [address.parse(text) for text in KINDS.values()])


def members(stack: ExitStack, bind: Bind, number: int) -> frozenset[int]:
    made = [stack.enter_context(reuseport.member(bind, 16)) for _ in range(number)]
    return frozenset(processes.socket_inode(sock.fileno()) for sock in made)


@every_kind
@pytest.mark.parametrize("number", [2, 50])
def test_nothing_is_looked_through_where_only_we_are(
    monkeypatch: pytest.MonkeyPatch, bind: Bind, number: int
) -> None:
    monkeypatch.setattr(
        port_holders, "holders", lambda *_, **__: pytest.fail("looked through /proc")
    )
    with ExitStack() as stack:
        ours = members(stack, bind, number)
        port_checks.refuse_strangers(bind, ours)


@every_kind
def test_stranger_is_named(bind: Bind) -> None:
    with ExitStack() as stack:
        ours = members(stack, bind, 3)
        members(stack, bind, 1)
        with pytest.raises(BindError, match=rf"\(pid {os.getpid()}\) joined it too"):
            port_checks.refuse_strangers(bind, ours)


@every_kind
def test_stranger_is_named_where_the_kernel_may_not_be_asked(
    monkeypatch: pytest.MonkeyPatch, bind: Bind
) -> None:
    def refused(*_: object) -> dict[int, object]:
        raise KernelError("ask for the queues of sockets", "EPERM", errno=errno.EPERM)

    monkeypatch.setattr(sock_diag.Ports, "at", refused)
    with ExitStack() as stack:
        ours = members(stack, bind, 3)
        port_checks.refuse_strangers(bind, ours)
        members(stack, bind, 1)
        with pytest.raises(BindError, match="joined it too"):
            port_checks.refuse_strangers(bind, ours)


def test_who_is_at_another_address_of_the_port_is_no_stranger() -> None:
    bind = address.parse(KINDS["tcp4"])
    with ExitStack() as stack:
        ours = members(stack, bind, 1)
        stack.enter_context(socket.create_server(("127.0.0.2", bind.port)))
        port_checks.refuse_strangers(bind, ours)
