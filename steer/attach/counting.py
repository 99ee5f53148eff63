"""Counts the open connections of listeners that other servers created."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterable, Mapping, Sequence

from steer import abi
from steer.attach import holders
from steer.attach.holders import Holder
from steer.attach.refusals import is_short
from steer.backends.connections import Counting
from steer.errors import KernelError
from steer.linux import cgroup
from steer.loader import bpf_maps, compile, programs, tracing

TRACEPOINT = "inet_sock_set_state"
_OLDER_MAX = 2048
"""Connections that are borrowed at once."""


class CountingElsewhere(Counting):
    """Counts on a tracepoint if the kernel allows it (CAP_PERFMON and BTF), including connections
    that were accepted before; otherwise in the cgroups where the listeners were created.

    Attributes:
        sees_older: whether connections that were accepted before can be counted.
    """

    sees_older = False

    def _start(self) -> None:
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
        """The cgroup of this process does not matter here."""

    def watch_cgroups(self, cgroups: Iterable[int]) -> None:
        """Count in these cgroups, too, if not on a tracepoint. If the program cannot be attached to
        one of them, nothing is counted: its listeners would otherwise get all new connections.

        Raises:
            KernelError: something is short that may not be later; counting goes on.
        """
        if self._owners is None or self.sees_older:
            return
        try:
            for number in cgroups:
                if number not in self._cgroups:
                    with cgroup.opened(number) as directory:
                        self._attached.append(programs.Link(self._attached[0], directory))
                    self._cgroups.append(number)
        except KernelError as error:
            if is_short(error):
                raise
            self._stop()
            self.why_not = error.note

    @property
    def older_max(self) -> int:
        """How many connections that were accepted before can be counted: they are all borrowed at
        once."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return _OLDER_MAX if limit == resource.RLIM_INFINITY else min(_OLDER_MAX, limit // 4)

    def begin(self, older: Mapping[int, int], held: Mapping[int, Sequence[Holder]]) -> None:
        """Start to count on the tracepoint.

        Args:
            older: connections that have been accepted: inode to slot of the listener.
            held: the holders of these connections, by inode.

        Raises:
            KernelError: the program cannot be attached.
        """
        if not self.sees_older:
            return
        some = dict(list(older.items())[: self.older_max])
        # A duplicate keeps each of them from being closed before the program is attached.
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
