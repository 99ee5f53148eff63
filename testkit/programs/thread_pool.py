"""A few threads, each busy with one connection at a time."""

import os
import queue
import socket
import threading

listener = socket.socket(fileno=3)
accepted: queue.Queue[socket.socket] = queue.Queue()


def serve():
    while True:
        with accepted.get() as client:
            client.recv(1000)
            os.close(os.open("gate", os.O_RDONLY))  # once somebody may write to it
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


for _ in range(2):
    threading.Thread(target=serve, daemon=True).start()
while True:
    accepted.put(listener.accept()[0])
