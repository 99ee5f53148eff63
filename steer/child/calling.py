"""Calls the Python callable of a service in the process of a worker."""

from __future__ import annotations

import atexit
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from steer.child.api import SIGNAL_EVERY_S, Worker
from steer.config.service import Service


def forget_exit_functions() -> None:
    """Forget the exit functions that the fork inherited: only the controller may run them. Call
    this before the application is imported, which may register some."""
    atexit._clear()
    if "logging" in sys.modules:
        atexit.register(sys.modules["logging"].shutdown)


def call(application: Callable[[Worker], object], worker: Worker, service: Service) -> int:
    """Call the application, and wait for its threads and exit functions. Returns the exit status
    of the worker."""
    limit_s, returned = service.graceful_timeout, None
    try:
        try:
            returned = application(worker)
        except BlockingIOError:
            # This ends an accept loop, as the listener does not block any more.
            if not worker.stopping:
                raise
        except SystemExit:
            _await_threads(worker, limit_s)
            raise
        _await_threads(worker, limit_s)
    finally:
        atexit._run_exitfuncs()
    return 0 if returned is None or worker.stopping else _judge(returned, worker, service)


def _judge(returned: object, worker: Worker, service: Service) -> int:
    """The exit status of a callable that returned a value before the worker was told to finish. If
    the value shows a mistake, print what is wrong."""
    from steer.config import applications

    why = applications.why_not_returned(returned, service.app or "")
    if why:
        print(f"steer: worker {worker.slot}: {service.app}: {why}", file=sys.stderr)
    return int(bool(why))


def _await_threads(worker: Worker, limit_s: float) -> None:
    """Wait for non-daemon threads, as every Python program does at its end.

    The wait is limited: if nobody has told the worker to end, nobody will kill it after a time. A
    thread that waits for a connection gets an error, as no connection will arrive.
    """
    signal.setitimer(signal.ITIMER_REAL, max(limit_s, SIGNAL_EVERY_S))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for sock in worker.sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    if "threading" in sys.modules:
        # Not public, but it calls what concurrent.futures has registered to wake its threads.
        sys.modules["threading"]._shutdown()
