"""Listens at once, and accepts only once a line has come: as a server that loads its application.

python listens_before_it_waits.py ADDRESS PORT. Prints "here" once it listens.
"""

import socket
import sys

sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
sock.bind((sys.argv[1], int(sys.argv[2])))
sock.listen(512)
print("here", flush=True)
sys.stdin.readline()
while True:
    client, _ = sock.accept()
    client.recv(100)
    client.sendall(b"late")
    client.close()
