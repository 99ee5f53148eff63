"""Workers that have started a program that has their sockets."""

import json
import os
import select
import signal
import subprocess
import sys


def call(worker):
    """Has started a program that has its listeners, and does not end when it is told to."""
    fds = [sock.fileno() for sock in worker.sockets]
    subprocess.Popen([sys.executable, "app.py"], pass_fds=fds)
    while True:
        try:
            client, _ = worker.sockets[0].accept()
        except BlockingIOError:
            return
        with client:
            client.recv(1000)
            body = json.dumps({"pid": os.getpid()}).encode()
            client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)


def crowd(worker):
    """Has started a dozen that do not end when they are told to."""
    fds = [sock.fileno() for sock in worker.sockets]

    def ignore():
        return signal.signal(signal.SIGTERM, signal.SIG_IGN)

    for _ in range(12):
        subprocess.Popen(["sleep", "1000"], pass_fds=fds, preexec_fn=ignore)
    while not worker.stopping:
        worker.sockets[0].accept()[0].close()


def datagrams(worker):
    """The same, over UDP."""
    (sock,) = worker.sockets
    subprocess.Popen([sys.executable, "app.py"], pass_fds=[sock.fileno()])
    while not worker.stopping:
        if select.select([sock], [], [], 0.02)[0]:  # noqa: TID251
            _, peer = sock.recvfrom(1000)
            sock.sendto(json.dumps({"pid": os.getpid()}).encode(), peer)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open("helpers", "a") as file:
        file.write(f"{os.getpid()}\n")
    signal.pause()
