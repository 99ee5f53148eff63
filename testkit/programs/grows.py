"""An application whose memory grows by the MiB that a client asks for. It answers its pid."""

import os

from steer.child.api import Worker

_kept: list[bytes] = []


def serve(worker: Worker) -> None:
    worker.ready()
    (listener,) = worker.sockets
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream:
            _kept.append(os.urandom(int(stream.readline()) << 20))
            stream.write(f"{os.getpid()}\n".encode())
