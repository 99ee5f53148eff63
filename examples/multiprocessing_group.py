"""Workers of multiprocessing, selected by open connections; a worker that dies is replaced.

multiprocessing passes the socket to the worker like any other argument. Only the worker has its
socket open, so the socket closes when the worker dies, and the others get its share. Workers end
when their parent does: a worker watches it, as nobody can tell it after SIGKILL.

Run:  sudo ../.venv/bin/python multiprocessing_group.py
Try:  bash -c '(echo hello >&3; head -n 1 <&3) 3<>/dev/tcp/127.0.0.1/8001'
"""

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import steer

spawn = multiprocessing.get_context("spawn")


def work(sock: socket.socket, ready: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    assert parent is not None
    ready.close()
    while parent.sentinel not in wait([sock, parent.sentinel]):
        client, _ = sock.accept()
        with client, client.makefile("rwb") as lines:
            lines.write(b"%d %b" % (os.getpid(), lines.readline().upper()))


def start(group: steer.ReuseportGroup, slot: int) -> BaseProcess:
    waiting, ready = spawn.Pipe(duplex=False)
    with group.listen(slot) as sock, waiting:
        worker = spawn.Process(target=work, args=(sock, ready), daemon=True)
        worker.start()
        ready.close()
        wait([waiting])  # until the worker has closed its end, or has died
    group.activate(slot)
    return worker


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit())  # which ends daemonic workers
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
