"""Workers that run out, leave nothing as it was, or end in other ways of their own."""

import atexit
import io
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class NoFlush:
    def write(self, text):
        return len(text)


class Raises(NoFlush):
    def flush(self):
        raise RuntimeError("out of order")


class Exits(NoFlush):
    def flush(self):
        sys.exit(3)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "without flush": NoFlush,
    "None": lambda: None,
    "raises": Raises,
    "exits": Exits,
    "closed": closed,
}


def serve(worker):
    while not worker.stopping:
        client, _ = worker.sockets[0].accept()
        with client:
            client.recv(100)
            client.sendall(b"done")


def replaces(worker):
    sys.stdout = STREAMS[os.environ["STREAM"]]()
    serve(worker)


def closes_descriptors(worker):
    os.closerange(0, 3)
    serve(worker)


def closes_its_socket(worker):
    """By the descriptor, as a server that took it over may."""
    with socket.socket(fileno=worker.sockets[0].fileno()) as listener:

        def stop(*_):
            listener.close()
            assert callable(own)
            own(*_)

        own = signal.signal(signal.SIGTERM, stop)
        worker.ready()
        while not worker.stopping:
            signal.pause()


def leaves_nothing_as_it_was(worker):
    os.environ.clear()
    os.chdir("/")
    sys.excepthook = None  # type: ignore[assignment]
    sys.modules.clear()
    serve(worker)


def raises_unseen(worker):
    sys.stderr, sys.excepthook = None, lambda *_: 1 / 0
    raise LookupError("what went wrong")


def exits(worker):
    sys.stderr = NoFlush if os.environ["CODE"] == "words" else None
    codes: dict[str, str | int] = {"huge": 2**70, "words": "in words", "minus": -1}
    sys.exit(codes[os.environ["CODE"]])


@atexit.register
def _registered_by_the_import():
    Path("registered-by-import").touch()


def registers(worker):
    atexit.register(lambda: Path("registered").touch())
    serve(worker)


def slowly(client):
    with client:
        client.recv(100)
        Path("under-way").touch()
        while not Path("go").exists():
            pass
        client.sendall(b"done")


def in_threads(worker):
    """One thread a connection, and one that waits for the next; neither is a daemon."""

    def take():
        while True:
            threading.Thread(target=slowly, args=worker.sockets[0].accept()[:1]).start()

    threading.Thread(target=take).start()
    while not worker.stopping:
        signal.pause()


def in_a_pool(worker):
    pool = ThreadPoolExecutor(2)
    while not worker.stopping:
        pool.submit(slowly, worker.sockets[0].accept()[0])


def never_ends(worker):
    threading.Thread(target=threading.Event().wait).start()
    sys.exit(7)
