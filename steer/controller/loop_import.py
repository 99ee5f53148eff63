"""Imports the loop while the first workers start, as it takes as long as they do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from steer.control.notify import is_ready
from steer.controller.controller import Controller
from steer.linux import fork

_LOOK_S = 0.002
_TURN_S = 0.0002


def await_loop(service: Controller) -> None:
    """Import it. The first worker that is ready meanwhile does not wait for that.

    Raises:
        Exception: as an import does, MemoryError for one.
    """
    failed: list[Exception] = []

    def load() -> None:
        try:
            importlib.import_module("steer.controller.loop")
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    import threading

    importing = threading.Thread(target=load)
    importing.start()
    with _threads_in_turn(_TURN_S):
        # Of a command nobody can serve yet, and who says so in its place, as systemd-notify(1),
        # may end once that is read: then nothing tells whose it was.
        is_over = bool(service.plan.service.command)
        while importing.is_alive() and not is_over:
            fork.wait_until_readable(service.listener.fileno(), _LOOK_S)
            heard = list(service.listener.receive())
            service.early += heard
            ready = (lineage[0] for lineage, message in heard if is_ready(message))
            is_over = any(map(service.pool.serve_early, ready))
        importing.join()
    if failed:
        raise failed[0]


@contextmanager
def _threads_in_turn(turn_s: float) -> Iterator[None]:
    """While one imports, another that waits gets its turn after so long: by default after 5 ms,
    and after each system call again."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(turn_s)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
