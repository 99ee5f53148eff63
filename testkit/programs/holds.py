"""Holds what it is given."""

import time
from pathlib import Path


def serve(worker):
    while True:
        client, _ = worker.sockets[0].accept()
        with client:
            Path("under-way").touch()
            while not Path("go").exists():
                time.sleep(0.01)
            client.sendall(b"done")
