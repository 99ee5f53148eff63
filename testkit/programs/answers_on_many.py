"""Answers on all the sockets that it is given."""

import select
import socket
import sys

socks = {int(fd): socket.socket(fileno=int(fd)) for fd in sys.argv[1:]}
poll = select.epoll()
for fd in socks:
    poll.register(fd, select.EPOLLIN)
print("here", flush=True)
while True:
    for fd, _ in poll.poll():
        try:
            connection, _ = socks[fd].accept()
        except OSError:  # the queue was moved meanwhile
            continue
        with connection:
            connection.setblocking(True)
            connection.sendall(connection.recv(100))
