"""What a service tells of its workers: queues as the kernel has them, and at what cost."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from steer.sockets import sock_diag
from testkit.clients import BIND, freeze
from testkit.fixtures import StartService
from testkit.harness import PORT
from testkit.processes import WITHOUT_NETLINK, eventually

# Real workers that stand still

CONNECTIONS, DATAGRAMS = 7, 3
STAND_STILL = ("--hang-timeout=0", "--graceful-timeout=0.5")
"""The workers, and a stop waits no longer for them."""


@pytest.mark.needs("netns", "pidfd_getfd")
@pytest.mark.parametrize("under", [(), WITHOUT_NETLINK], ids=["asked", "borrowed"])
def test_what_waits_is_told_exactly(service: StartService, under: Sequence[str]) -> None:
    over_udp = ("-b", f"udp://127.0.0.1:{PORT}")
    running = service(*BIND, *over_udp, "-w", "2", *STAND_STILL, under=under)
    workers = running.workers()
    assert [each["connections"]["queued"] for each in workers] == [0, 0]
    assert [each["connections"]["queued_bytes"] for each in workers] == [0, 0]
    for each in workers:
        freeze(each)
    with ExitStack() as clients:
        for _ in range(CONNECTIONS):
            at = ("127.0.0.1", PORT)
            clients.enter_context(socket.create_connection(at))
        sender = clients.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        for _ in range(DATAGRAMS):
            sender.sendto(bytes(100), at)

        def by_kernel(protocol: str) -> dict[int, int]:
            found = sock_diag.waiting(protocol, socket.AF_INET, PORT)
            return {inode: each.queued for inode, each in found.items()}

        eventually(lambda: sum(by_kernel("tcp").values()), CONNECTIONS)
        eventually(lambda: sum(by_kernel("udp").values()) >= DATAGRAMS * 100)
        bytes_by_inode, by_inode = by_kernel("udp"), by_kernel("tcp")
        for each in running.workers():
            told = each["connections"]
            mine = set(each["sockets"])
            assert told["queued"] == sum(by_inode[at] for at in mine & by_inode.keys())
            assert told["queued_bytes"] == sum(
                bytes_by_inode[at] for at in mine & bytes_by_inode.keys()
            )
        assert sum(each["connections"]["queued"] for each in running.workers()) == CONNECTIONS
