"""What is the same on backends that run no eBPF program."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Set

from steer.backends.backup import BackupListeners
from steer.backends.base import Counts, Members, PolicyValues
from steer.backends.connections import Counting
from steer.backends.shortfalls import kernel_migrates
from steer.sockets import listeners


class WithoutEbpf:
    """Nothing is counted, no flow is remembered, and nobody would move what waits at backup
    listeners."""

    backup: BackupListeners | None = None
    forget_flows = None
    tell_waiting = None
    counting: Counting | None = None
    owns_counting = False

    def is_member(self, slot: int, bind: int) -> bool | None:
        return None

    def migrate_queue(self: Members, slot: int, owned: Mapping[int, socket.socket]) -> None:
        """The kernel's hash moves the queues, if it was told to. Where it was not, or that is not
        known, they stay: to close the listener would reset what waits."""
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
