"""Connects again and again, and counts what is not answered.

python asks_again_and_again.py ADDRESS PORT, until a line comes. Prints "here", then how many
connections were answered and how many were not.
"""

import socket
import struct
import sys
import threading

where = (sys.argv[1], int(sys.argv[2]))
ending = threading.Event()
numbers = {True: 0, False: 0}


def is_answered():
    try:
        with socket.create_connection(where, 10) as sock:
            # no TIME_WAIT, which would use up the ports
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return bool(sock.recv(1000))
    except OSError:
        return False


def wait():
    sys.stdin.readline()
    ending.set()


threading.Thread(target=wait).start()
print("here", flush=True)
while not ending.is_set():
    numbers[is_answered()] += 1
print(numbers[True], numbers[False], flush=True)
