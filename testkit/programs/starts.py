"""Says when it starts."""

import os
import socket
import time


def note(what):
    with open(f"{what}-{os.environ['STEER_SLOT']}", "w") as file:
        print(time.monotonic(), file=file)


note("started")
path = os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
    note("ready")
    sender.sendto(b"READY=1", path)
while True:
    socket.socket(fileno=os.dup(3)).accept()
