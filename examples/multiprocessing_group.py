"""Workers of multiprocessing, selected by open connections; a worker that dies is replaced.

multiprocessing passes the socket to the worker like any other argument. Only the worker has its
socket open, so the socket closes when the worker dies, and the others get its share.

Run:  sudo ../.venv/bin/python multiprocessing_group.py
Try:  echo hello | nc -N 127.0.0.1 8001
"""

import multiprocessing
import os
import socket
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import steer

spawn = multiprocessing.get_context("spawn")


def work(sock: socket.socket, ready: Event) -> None:
    ready.set()
    while True:
        client, _ = sock.accept()
        with client, client.makefile("rwb") as lines:
            lines.write(b"%d %b" % (os.getpid(), lines.readline().upper()))


def start(group: steer.ReuseportGroup, slot: int) -> BaseProcess:
    ready = spawn.Event()
    with group.listen(slot) as sock:
        worker = spawn.Process(target=work, args=(sock, ready), daemon=True)
        worker.start()
        ready.wait()
    group.activate(slot)
    return worker


def main() -> None:
    with steer.ReuseportGroup("127.0.0.1:8001", "least-conn", slots=2) as group:
        workers = {slot: start(group, slot) for slot in range(2)}
        while True:
            wait([worker.sentinel for worker in workers.values()])
            for slot, worker in workers.items():
                if not worker.is_alive():
                    group.remove(slot)
                    workers[slot] = start(group, slot)


if __name__ == "__main__":
    main()
