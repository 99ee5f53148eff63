"""Says who answered; some of it gets ready late, or not at all, from the second generation on."""

import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path


def until(name):
    while not Path(name).exists():
        time.sleep(0.01)


def answer(client, worker, app):
    with client:
        if b"/held" in client.recv(65536):
            Path("under-way").touch()
            until("go")
        about = {
            "slot": worker.slot,
            "pid": os.getpid(),
            "generation": worker.generation,
            "app": app,
            "A": os.environ.get("A"),
        }
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(about).encode())


def serve(worker, app="serve"):
    print("worker", worker.slot, "says", app, flush=True)
    print("worker", worker.slot, "starts", app, file=sys.stderr)
    try:
        while True:
            client, _ = worker.sockets[0].accept()
            threading.Thread(target=answer, args=(client, worker, app)).start()
    except BlockingIOError:
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()


def other(worker):
    serve(worker, "other")


def slow(worker):
    while worker.generation > 1 and not Path(f"go-{worker.slot}").exists():
        if worker.stopping:
            return
        time.sleep(0.01)
    serve(worker)


def nothing(worker):
    while not worker.stopping:
        time.sleep(0.01)


def first_two(worker):
    while worker.slot > 1 and not worker.stopping:
        time.sleep(0.01)
    serve(worker)


def exits(worker):
    if worker.generation > 1:
        print("out of order", file=sys.stderr)
        sys.exit(7)
    serve(worker)


def never_ready(worker):
    if worker.generation > 1:
        print("out of order", file=sys.stderr)
        time.sleep(1000)
    serve(worker)


def notifies(worker):
    worker.ready()
    while not worker.stopping:
        time.sleep(0.01)


def reads_slowly(worker):
    """Datagrams; and ends as soon as it is told to, whatever it leaves unread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while signal.SIGTERM not in signal.sigpending():
        if select.select(worker.sockets, [], [], 0.02)[0]:  # noqa: TID251 - one of its first descriptors
            _, client = worker.sockets[0].recvfrom(100)
            worker.sockets[0].sendto(b"%d" % worker.generation, client)
            if worker.generation == 1:
                time.sleep(0.02)
