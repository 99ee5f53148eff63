"""A listener for each thread, in one group; each connection is told the thread's number.

python listens_in_threads.py ADDRESS PORT THREADS. Prints "here" once all of them wait.
"""

import contextlib
import socket
import sys
import threading

host, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def listener():
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    sock.listen(512)
    return sock


def serve(number, sock):
    held = []
    while True:
        client, _ = sock.accept()
        with contextlib.suppress(OSError):
            asked = client.recv(100)
            client.sendall(str(number).encode())
            if asked == b"h":  # hold
                held.append(client)
                continue
        client.close()


listeners = [listener() for _ in range(threads)]
for each in enumerate(listeners):
    threading.Thread(target=serve, args=each).start()
print("here", flush=True)
