"""A server with a listener for each of its threads: `listens_in_threads.py HOST PORT THREADS`."""

import contextlib
import socket
import sys
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"


def serve(listener: socket.socket) -> None:
    while True:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(ANSWER)


def main(host: str, port: int, threads: int) -> None:
    for _ in range(threads):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(1024)
        threading.Thread(target=serve, args=(listener,)).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
