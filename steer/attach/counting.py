"""Open connections of listeners that other services made."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping, Sequence

from steer import abi
from steer.attach import holders
from steer.attach.holders import Holder
from steer.backends.connections import Counting
from steer.errors import KernelError
from steer.linux import cgroup
from steer.loader import bpf_maps, compile, programs, tracing

TRACEPOINT = "inet_sock_set_state"
_OLDER_MAX = 2048
"""Connections that are borrowed at once."""


class CountingElsewhere(Counting):
    """Counts on a tracepoint where the kernel allows it (CAP_PERFMON and BTF), and then also
    connections that were accepted before. Else in the cgroups where the listeners were made.

    Attributes:
        sees_older: whether connections that were accepted before can be counted.
    """

    def _start(self) -> None:
        self.sees_older = False
        code = compile.load(compile.sources() / "open.c").programs["trace"]
        try:
            self._owners = bpf_maps.Map("owners")
            maps = {**self.maps, "owners": self._owners}
            target = tracing.tracepoint_number(TRACEPOINT)
            self._traced = programs.Program(
                "steer_trace", code, maps, abi.BPF_TRACE_RAW_TP, target=target
            )
            self._attached.append(self._traced)
            self.sees_older = True
        except KernelError:
            self._stop()
            super()._start()

    def _watch_ours(self) -> None:
        """Where sockets are made that this process makes is of no interest."""

    def watch_cgroups(self, cgroups: Iterable[int]) -> None:
        """Count in these, too, given by their numbers, unless a tracepoint tells. If one refuses,
        nothing is counted: otherwise the listeners that are not would get all new connections."""
        if self._owners is None or self.sees_older:
            return
        try:
            for number in cgroups:
                if number not in self._cgroups:
                    with cgroup.opened(number) as directory:
                        self._attached.append(programs.Link(self._attached[0], directory))
                    self._cgroups.append(number)
        except KernelError as error:
            self._stop()
            self.why_not = error.note

    def begin(self, older: Mapping[int, int], held: Mapping[int, Sequence[Holder]]) -> None:
        """Count from now on what the tracepoint tells.

        Args:
            older: connections that have been accepted, by inode: the slots of their listeners.
            held: the processes that have these open.

        Raises:
            KernelError: the program cannot be attached.
        """
        if not self.sees_older:
            return
        some = dict(list(older.items())[:_OLDER_MAX])
        # Borrowed until the program is there: meanwhile none of them can be closed unseen.
        with holders.borrowed({inode: held[inode] for inode in some if inode in held}) as lent:
            counted: dict[int, int] = {}
            for inode, sock in lent.items():
                if _is_open(sock):
                    self._mark(some[inode], sock)
                    counted[some[inode]] = counted.get(some[inode], 0) + 1
            for slot, number in counted.items():
                self.slots.set_open(slot, number)
            self._attached.append(tracing.Attached(self._traced))

    def _mark(self, slot: int, sock: socket.socket) -> None:
        assert self._owners is not None
        since = time.clock_gettime_ns(time.CLOCK_MONOTONIC) >> 10 & 0xFFFFFFFF | 1
        self._owners.put(sock.fileno(), abi.OWNER.pack(slot, self.slots.stamp(slot), since))


_ESTABLISHED, _CLOSE_WAIT = 1, 8


def _is_open(sock: socket.socket) -> bool:
    """By tcpi_state of struct tcp_info."""
    state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in (_ESTABLISHED, _CLOSE_WAIT)
