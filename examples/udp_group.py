"""Threads that serve UDP, each with its own socket; a client's datagrams stay with one thread.

Run:  sudo ../.venv/bin/python udp_group.py
Try:  bash -c '(echo hello >&3; head -n 1 <&3) 3<>/dev/udp/127.0.0.1/8002'
"""

import socket
import threading
from contextlib import suppress

import steer


def serve(slot: int, sock: socket.socket) -> None:
    while True:
        data, client = sock.recvfrom(65535)
        sock.sendto(b"%d %b" % (slot, data.upper()), client)


with (
    suppress(KeyboardInterrupt),
    steer.ReuseportGroup("udp://127.0.0.1:8002", "hash", slots=2) as group,
):
    threads = [
        threading.Thread(target=serve, args=(slot, group.listen(slot)), daemon=True)
        for slot in range(2)
    ]
    for thread in threads:
        thread.start()
    group.activate(0, 1)
    threads[0].join()
