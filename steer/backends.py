"""The door to the backends, and the one that is the kernel's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from steer import policy
from steer.classic import Cbpf
from steer.ebpf import Ebpf
from steer.plan import Plan
from steer.steering import STILL_CHOSEN, Countless, Lend, Steering, may_be_lost
from steer.table import Member


def open_backend(backend: str, plan: Plan, empty: bool = False) -> Steering:
    """Make the backend ready, before there is any socket.

    Raises:
        KernelError: this rung does not hold; the reason is in it.
    """
    return _BACKENDS[backend](plan, empty)


class Kernel(Countless):
    """No program: the kernel hashes over all sockets of a group."""

    backend = "kernel"

    def __init__(self, plan: Plan, _empty: bool = False) -> None:
        self.notes: Sequence[str] = (STILL_CHOSEN, *may_be_lost(plan))

    def joined(self, slot: int, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)

    def left(self, slot: int) -> None:
        pass

    def steer(self, members: Sequence[Member]) -> None:
        pass

    def swap(self, plan: Plan, members: Sequence[Member], lend: Lend) -> None:
        pass

    def detach(self, lend: Lend) -> None:
        pass

    def settle(self) -> None:
        pass

    def release(self) -> None:
        pass

    def held(self, slot: int) -> Sequence[int]:
        return ()

    def saved(self) -> tuple[object, Sequence[int]]:
        return None, ()

    def restore(self, value: object, fds: Sequence[int], held: Mapping[int, Sequence[int]]) -> None:
        pass

    def close(self) -> None:
        pass


_BACKENDS: dict[str, Callable[[Plan, bool], Steering]] = {
    policy.EBPF: Ebpf,
    policy.CBPF: Cbpf,
    policy.KERNEL: Kernel,
}
