"""Handing the sockets of all workers from one backend to another."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from steer.backends.base import Backend, Counts
from steer.config.address import Bind
from steer.errors import BindError, KernelError, SteerError
from steer.policy.builtin import KERNEL
from steer.policy.layout import Member
from steer.sockets import group_program, port_checks
from steer.workers.worker_sockets import Sockets, WorkerSockets


def hand_over(
    before: Backend,
    fresh: Backend,
    members: Sequence[Member],
    binds: Sequence[Bind],
    sockets: WorkerSockets,
    count: Callable[[], Counts | None],
) -> Counts | None:
    """Have `fresh` select instead of `before`. The caller closes `before` then.

    Args:
        members: the workers that serve.
        count: returns what `before` has counted.

    Returns:
        The counts of `before` when it selected no more.

    Raises:
        KernelError: it failed, and nothing has changed.
    """
    with sockets.all() as borrowed, sockets.usable() as lent:
        if fresh.name != KERNEL:
            group_program.refuse_locked(lent.values())
        sockets_at = borrowed
        if fresh.needs_order:
            sockets_at = _in_order(borrowed, before.order, binds, sockets.inodes)
        fresh.steer(members)
        try:
            before.detach(sockets.usable)
            counted = count()
            _take_over(fresh, sockets_at, len(binds))
            fresh.steer(members)
            open_backup(fresh)
        except SteerError:
            fresh.detach(sockets.usable)
            before.reassert(sockets_at)
            open_backup(before)
            raise
    fresh.owns_counting = True
    before.owns_counting = False
    return counted


def _in_order(
    sockets_at: Mapping[int, Sockets],
    order: Sequence[int] | None,
    binds: Sequence[Bind],
    own_inodes: frozenset[int],
) -> Mapping[int, Sockets]:
    """The sockets of every worker, in the kernel's order.

    Args:
        own_inodes: inodes of all sockets of workers.

    Raises:
        KernelError: the order is not known, or the group has sockets of others.
    """
    act = "take over the sockets there are"
    whole = {slot for slot, socks in sockets_at.items() if len(socks) == len(binds)}
    if order is None or not whole == set(order) == set(sockets_at):
        cause = "classic BPF has to know in which order the kernel has them, and that is known"
        raise KernelError(
            act, f"{cause} only as long as no worker has left", "stop and start the service"
        )
    for bind in binds:
        try:
            port_checks.refuse_strangers(bind, own_inodes)
        except BindError as error:
            raise KernelError.like(error.replace(what=act)) from None
    return {slot: sockets_at[slot] for slot in order}


def _take_over(fresh: Backend, sockets_at: Mapping[int, Sockets], binds: int) -> None:
    """Give the new backend duplicates of the sockets of workers that have one for each bind. Raises
    KernelError."""
    for slot, socks in sockets_at.items():
        if len(socks) == binds:
            fresh.take_over(slot, [os.dup(socks[bind].fileno()) for bind in range(binds)])


def open_backup(backend: Backend) -> None:
    """Raises BindError, KernelError."""
    if backend.backup:
        backend.backup.open()
