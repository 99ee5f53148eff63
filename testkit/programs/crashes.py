"""Workers that wait in all ways there are, and crash when they are told to."""

import json
import os
import socket
import sys
from pathlib import Path


def accepts(worker):
    """Blocks in accept(2)."""
    while True:
        try:
            client, _ = worker.sockets[0].accept()
        except BlockingIOError:
            return
        with client:
            request = client.recv(1000)
            if request.startswith(b"GET /stopping "):
                tell(b"STOPPING=1")
            body = json.dumps({"slot": worker.slot, "pid": os.getpid()}).encode()
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)
            if request.startswith(b"GET /exit "):
                os._exit(0)


def tell(message):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message, "\0" + os.environ["NOTIFY_SOCKET"][1:])


def breaks(worker):
    """Is never ready while there is a file of that name."""
    if Path("broken").exists():
        sys.exit("out of order")
    accepts(worker)


def says(environ, start_response):
    """WSGI."""
    body = json.dumps({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


async def answers(scope, receive, send):
    """ASGI."""
    if scope["type"] == "http":
        body = json.dumps({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
