"""What backends without eBPF programs have in common."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Set

from steer.backends.backup import BackupListeners
from steer.backends.base import Counts, Members, PolicyValues
from steer.backends.connections import Counting
from steer.backends.shortfalls import kernel_migrates
from steer.sockets import listeners


class WithoutEbpf:
    """Counts nothing, remembers no flows, and has no backup listeners, because their queues could
    not be moved."""

    backup: BackupListeners | None = None
    forget_flows = None
    write_waiting = None
    counting: Counting | None = None
    owns_counting = False

    def is_member(self, slot: int, bind: int) -> bool | None:
        return None

    def migrate_queue(self: Members, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """The kernel moves a queue if net.ipv4.tcp_migrate_req is 1. Otherwise, or if that is not
        known, nothing is moved: the kernel would reset the connections."""
        if kernel_migrates():
            for index, sock in owned.items():
                if listeners.is_waited_for(sock):
                    listeners.move_queue(sock)
                    self.rejoin(slot, index, sock)

    def counts(self, slot: int, bind: int | None = None) -> Counts | None:
        return None

    def take_counts(self, slot: int) -> Counts | None:
        return None

    def unsteered(self) -> int | None:
        return None

    def open(self, slot: int) -> int | None:
        return None

    def busy(self) -> Set[int] | None:
        return None

    def pulse(self) -> bytes | None:
        return None

    def policy_values(self) -> PolicyValues:
        return PolicyValues()

    def memory_bytes(self) -> int:
        return 0
