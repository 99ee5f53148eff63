"""A server that knows nothing of steer."""

import os
import pathlib
import signal
import socket
import sys
import time

listener = socket.socket(fileno=3)
done: list[int] = []


def finish(number, _):
    with open(f"told-{os.getpid()}", "a") as file:
        file.write(f"{number}\n")
    done.append(number)
    listener.setblocking(False)


for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, finish)
pathlib.Path(f"hears-{os.getpid()}").touch()
if "closes" in sys.argv:
    os.closerange(4, 256)
while not done:
    try:
        client, _ = listener.accept()
    except BlockingIOError:
        break
    with client:
        asked = client.recv(1000)
        while b"wait" in asked and not os.path.exists("go"):
            time.sleep(0.01)
        body = b'{"pid": %d}' % os.getpid()
        client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
while "lingers" in sys.argv and not os.path.exists("go"):
    time.sleep(0.01)
