"""Ends on a signal."""

import contextlib
import pathlib
import signal


def serve(worker):
    signal.signal(signal.SIGTERM, lambda *_: pathlib.Path("terminated").touch())
    worker.sockets[0].settimeout(0.02)
    worker.ready()
    while not worker.stopping:
        with contextlib.suppress(TimeoutError, BlockingIOError):
            worker.sockets[0].accept()[0].close()
    pathlib.Path(f"finished-{worker.slot}").touch()
