"""Random numbers of each worker."""

import json


def serve(worker):
    numbers = [sock.fileno() for sock in worker.sockets]
    found = [min(numbers), max(numbers), worker.sockets[0].proto]
    worker.ready()
    while True:
        client, _ = worker.sockets[0].accept()
        with client:
            client.recv(1000)
            body = json.dumps({"numbers": found}).encode()
            client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
