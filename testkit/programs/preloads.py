"""An application that is loaded once for all of its workers; tells each client what a worker has.

What `IMPORT` of the environment names, separated by spaces, happens while it is imported.
"""

import json
import os
import random
import signal
import socket
import ssl
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

IMPORTED_BY = os.getpid()
IMPORTED_AS = os.getuid()
WISHES = os.environ.get("IMPORT", "").split()
LEFT: list[Any] = []
SHARED: list[int] = []

if "slowly" in WISHES:
    time.sleep(1)
if "never" in WISHES:
    time.sleep(1000)
if "dies" in WISHES:
    os.kill(os.getpid(), signal.SIGSEGV)
if "thread" in WISHES:
    threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()
if "socket" in WISHES:
    LEFT.append(socket.create_server(("127.0.0.1", 9999)))
if "file" in WISHES:
    LEFT.append(open("opened-by-import", "a"))  # noqa: SIM115
if "numpy" in WISHES:
    import numpy
if "prints" in WISHES:
    sys.stdout.write("printed by the import\n")
if "uuid" in WISHES:
    uuid.uuid1()
    ssl.RAND_bytes(8)
if "garbles" in WISHES:
    for fd in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{fd}") and int(fd) > 2:
            os.write(int(fd), b"garbage") if "socket:" in os.readlink(f"/proc/self/fd/{fd}") else 0
if "lies" in WISHES:
    import msgspec

    from steer.child import template
    from steer.child.preload import Answer

    def lie(channel, answer):
        """Every process that the controller started is a worker."""
        channel.send(msgspec.json.encode(answer))

    def children():
        return Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()

    def fork_batch(_preload, channel, _application):
        channel.recv(1 << 18)
        lie(channel, Answer(pids=(int(children()[0]),)))

    template._fork_batch = fork_batch


def steer_preload():
    SHARED.append(os.getpid())
    if "preload-fails" in WISHES:
        raise RuntimeError("no model here")


def steer_post_fork(worker):
    SHARED.append(worker.slot)
    if "post-fork-fails" in WISHES:
        raise RuntimeError("no database here")


def numbers():
    found = {
        "random": random.random(),
        "uuid1": str(uuid.uuid1()),
        "uuid4": str(uuid.uuid4()),
        "ssl": ssl.RAND_bytes(8).hex(),
        "urandom": os.urandom(8).hex(),
    }
    if "numpy" in sys.modules:
        found["numpy"] = float(numpy.random.random())
    return found


def about(worker):
    for file in LEFT:
        if hasattr(file, "write"):
            file.write(f"{worker.slot}\n")
            file.flush()
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "slot": worker.slot,
        "generation": worker.generation,
        "imported_by": IMPORTED_BY,
        "imported_as": IMPORTED_AS,
        "shared": SHARED,
        "numbers": numbers(),
        "environment": dict(os.environ),
        "fds": [sock.fileno() for sock in worker.sockets],
        "threads": threading.active_count(),
    }


def serve(worker):
    worker.ready()
    while not worker.stopping:
        client, _ = worker.sockets[0].accept()
        with client:
            client.sendall(json.dumps(about(worker)).encode())
