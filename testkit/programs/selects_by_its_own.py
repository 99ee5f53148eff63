"""Listeners in a group with a program of its owner's: each connection is told its slot.

python selects_by_its_own.py HOST PORT. Two of three slots are active. Prints "here".
"""

import contextlib
import sys
import threading

import steer

group = steer.ReuseportGroup(f"{sys.argv[1]}:{sys.argv[2]}", "round-robin", slots=3)


def serve(slot, sock):
    while True:
        client, _ = sock.accept()
        with client, contextlib.suppress(OSError):
            client.recv(100)
            client.sendall(str(slot).encode())


for slot in range(3):
    threading.Thread(target=serve, args=(slot, group.listen(slot))).start()
group.activate(0, 1)
print("here", flush=True)
