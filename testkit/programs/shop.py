"""An application that is served from Python, too."""


def serve(worker):
    """Says which slot answers; of the module it is in."""
    listener = worker.sockets[0]
    worker.ready()
    while not worker.stopping:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        with sock:
            sock.recv(4096)
            body = b'{"slot": %d, "module": "%s"}' % (worker.slot, __name__.encode())
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            sock.sendall(head % len(body) + body)
