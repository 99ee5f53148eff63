"""Sixteen clients, until a line comes; then how many had which outcome."""

import collections
import socket
import struct
import sys
import threading

outcomes: collections.Counter[str] = collections.Counter()
ending = threading.Event()


def run(thread):
    number = 0
    while not ending.is_set():
        number += 1
        outcomes[once(f"{thread} {number}".encode())] += 1


def once(wanted):
    try:
        with socket.create_connection(("127.0.0.1", 8080), 60) as sock:
            # no TIME_WAIT, which would use up the ports
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(wanted)
            return "answered" if sock.recv(100) == wanted else "another's answer"
    except OSError as error:
        return str(error)


threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
for each in threads:
    each.start()
print("here", flush=True)
sys.stdin.readline()
ending.set()
for each in threads:
    each.join()
for outcome, number in outcomes.items():
    print(number, outcome, flush=True)
