"""Imports the loop while the first workers start, because each takes about as long."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from steer.control.notify import Listener, Notification, is_ready
from steer.linux import fork
from steer.workers.pool import WorkerPool

_LOOK_S = 0.002
_TURN_S = 0.0002


def await_loop(listener: Listener, pool: WorkerPool, *, runs_command: bool) -> list[Notification]:
    """Import the loop. A worker that becomes ready meanwhile is activated at once.

    Args:
        runs_command: whether workers are commands.

    Returns:
        Notifications of workers that arrived meanwhile.

    Raises:
        NoThread: the machine has no room for one more.
        Exception: the import failed, for example with MemoryError.
    """
    early: list[Notification] = []
    failed: list[Exception] = []

    def load() -> None:
        try:
            importlib.import_module("steer.controller.loop")
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    from steer.linux import threads

    importing = threads.start(load)
    with _threads_in_turn(_TURN_S):
        # A command cannot be ready so soon, so leave its notifications in the socket: once a
        # message is read its sender, for example systemd-notify(1), may exit, and then steer cannot
        # tell which worker it belongs to.
        is_over = runs_command
        while importing.is_alive() and not is_over:
            fork.wait_until_readable(listener.fileno(), _LOOK_S)
            received = list(listener.receive())
            early += received
            ready = (lineage[0] for lineage, message in received if is_ready(message))
            is_over = any(map(pool.serve_early, ready))
        importing.join()
    if failed:
        raise failed[0]
    return early


@contextmanager
def _threads_in_turn(turn_s: float) -> Iterator[None]:
    """In the block, Python switches between threads every `turn_s`. The default of 5 ms is too
    long: it begins again after each system call of the importing thread."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(turn_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
