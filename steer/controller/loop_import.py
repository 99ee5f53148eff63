"""Imports the loop while the first workers start: both take about as long."""

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
    """Import the loop. The first worker that is ready meanwhile serves at once.

    Args:
        runs_command: whether workers are commands.

    Returns:
        What workers notified meanwhile.

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
        # A command cannot be ready so soon. systemd-notify(1), which notifies for it, may exit once
        # its message is read, and then nothing tells which worker it belongs to.
        is_over = runs_command
        while importing.is_alive() and not is_over:
            fork.wait_until_readable(listener.fileno(), _LOOK_S)
            heard = list(listener.receive())
            early += heard
            ready = (lineage[0] for lineage, message in heard if is_ready(message))
            is_over = any(map(pool.serve_early, ready))
        importing.join()
    if failed:
        raise failed[0]
    return early


@contextmanager
def _threads_in_turn(turn_s: float) -> Iterator[None]:
    """Let a waiting thread run after `turn_s`, while another one imports. Python's default is 5 ms,
    which starts again after each system call."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(turn_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
