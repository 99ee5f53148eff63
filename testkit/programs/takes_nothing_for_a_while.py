"""Workers that take no connections for as long as a request asks for."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl


def body():
    return json.dumps({"slot": int(os.environ["STEER_SLOT"]), "pid": os.getpid()}).encode()


def obey(query):
    """What a handler does that takes long."""
    for act, value in parse_qsl(query):
        if act == "sleep":
            time.sleep(float(value))
        if act == "block":
            Path(value).read_bytes()  # until somebody writes to it
        if act == "compute":
            while not Path(value).exists():
                pass
        if act == "tell":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(value.encode(), "\0" + os.environ["NOTIFY_SOCKET"][1:])


def accepts(worker):
    """Blocks in accept(2)."""
    while True:
        try:
            client, _ = worker.sockets[0].accept()
        except BlockingIOError:
            return
        with client:
            target = client.recv(1000).decode().split()[1]
            obey(target.partition("?")[2])
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body())


def beats(worker):
    """And goes on accepting when it is silent."""

    def beat():
        while True:
            if not Path(f"silent-{worker.slot}").exists():
                worker.beat()
            time.sleep(worker.watchdog_s / 5)

    threading.Thread(target=beat, daemon=True).start()
    accepts(worker)


def breaks(worker):
    """Is never ready while there is a file of that name."""
    if Path("broken").exists():
        raise SystemExit("out of order")
    accepts(worker)


def reads(worker):
    """Datagrams, which say how long each takes."""
    while True:
        text, client = worker.sockets[0].recvfrom(1000)
        time.sleep(float(text))
        worker.sockets[0].sendto(body(), client)


def arbiter(worker):
    """A child does the work; this wakes up now and then to look after it."""
    child = os.fork()
    if child == 0:
        accepts(worker)
        os._exit(0)
    while not worker.stopping:
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)


def wsgi(environ, start_response):
    obey(environ["QUERY_STRING"])
    found = body()
    start_response("200 OK", [("Content-Length", str(len(found)))])
    return [found]


async def asgi(scope, receive, send):
    if scope["type"] == "http":
        obey(scope["query_string"].decode())
        found = body()
        headers = [(b"content-length", b"%d" % len(found))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": found})
