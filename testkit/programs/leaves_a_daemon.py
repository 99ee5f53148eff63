"""Servers whose workers leave others behind."""

import json
import os
import signal
import socket
import sys
import threading
import time


def daemon(mode="helper"):
    """Forks twice, and so is nobody's child; of what it inherited it keeps the sockets."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(sys.executable, [sys.executable, "server.py", mode], {})
        os._exit(0)
    os.wait()


def helper(on_term):
    """Has everything open, and says so."""
    signal.signal(signal.SIGTERM, on_term)
    with open("helpers", "a") as file:
        file.write(f"{os.getpid()}\n")
    while True:
        signal.pause()


def stop(number, frame):
    with open("told", "a") as file:
        file.write(f"{os.getpid()}\n")
    os._exit(0)


def serve(listener):
    while True:
        client, _ = listener.accept()
        with client:
            client.recv(1000)
            body = json.dumps({"pid": os.getpid()}).encode()
            client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)


def call(worker):
    """Starts a daemon first; the listeners are kept open in it."""
    for sock in worker.sockets:
        sock.set_inheritable(True)
    daemon()
    serve(worker.sockets[0])


def call_stubborn(worker):
    """As `call`, but the daemon does not end when it is told to."""
    for sock in worker.sockets:
        sock.set_inheritable(True)
    daemon("stubborn")
    serve(worker.sockets[0])


def orphans(worker):
    """Ten children of children that end at once, and are nobody's."""
    for _ in range(10):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.wait()
    serve(worker.sockets[0])


def forks_on(worker):
    """Orphans all the time, a hundred and more a second."""

    def leave():
        while True:
            if os.fork() == 0:
                if os.fork() == 0:
                    os._exit(0)
                os._exit(0)
            os.wait()
            time.sleep(0.005)

    threading.Thread(target=leave, daemon=True).start()
    serve(worker.sockets[0])


if __name__ == "__main__":
    if "helper" in sys.argv:
        helper(stop)
    if "stubborn" in sys.argv:
        helper(signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    serve(socket.socket(fileno=3))
