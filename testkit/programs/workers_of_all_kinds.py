"""Answers every connection with what there is to know of the worker, as JSON."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def about(**more):
    env = dict(os.environ)
    return {"pid": os.getpid(), "env": env, "cwd": os.getcwd(), "argv": sys.argv, **more}


def answer(listener, found):
    while True:
        client, _ = listener.accept()
        with client:
            client.sendall(json.dumps(found).encode())


def serve(worker):
    answer(
        worker.sockets[0],
        about(
            slot=worker.slot,
            cpus=worker.cpus,
            name=worker.name,
            generation=worker.generation,
            stopping=worker.stopping,
            names=[each.getsockname() for each in worker.sockets],
        ),
    )


def dies_where_broken(worker):
    if Path("broken").exists():
        sys.exit("out of order")
    serve(worker)


def holds(worker):
    while True:
        client, _ = worker.sockets[0].accept()
        with client:
            Path("under-way").touch()
            while not Path("go").exists():
                if worker.stopping:
                    Path("stopping").touch()
                time.sleep(0.01)
            client.sendall(b"done")


def stays(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serve(worker)


def chatters(worker):
    """To clients that do not listen any more."""
    while True:
        client, _ = worker.sockets[0].accept()
        with client:
            while client.recv(100):
                pass
            try:
                while True:
                    client.sendall(b"do you hear?")
            except OSError as error:
                print(type(error).__name__, flush=True)


def has_children(worker):
    children = [subprocess.Popen(["sleep", "1000"]).pid]
    answer(worker.sockets[0], about(children=children))


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[1]))
    answer(listener, about(names=[listener.getsockname()]))
