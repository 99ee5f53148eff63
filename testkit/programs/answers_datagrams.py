"""A UDP socket for each thread, in one group; each datagram is answered with the thread's number.

python answers_datagrams.py ADDRESS PORT THREADS [late]. Prints "here" once all are bound. With
"late" they are waited on once a line has come. A datagram "close" has a thread close its socket,
and "connect" has it open one beside that is connected to the client, as servers of DTLS do.
"""

import socket
import sys
import threading

host, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
connected: list[socket.socket] = []


def bound():
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


def serve(number, sock):
    while True:
        asked, client = sock.recvfrom(100)
        if asked == b"connect":
            beside = bound()
            beside.connect(client)
            connected.append(beside)
        sock.sendto(str(number).encode(), client)
        if asked == b"close":
            sock.close()
            return


sockets = [bound() for _ in range(threads)]
print("here", flush=True)
if "late" in sys.argv:
    sys.stdin.readline()
for each in enumerate(sockets):
    threading.Thread(target=serve, args=each).start()
