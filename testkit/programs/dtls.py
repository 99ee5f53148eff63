"""A connected socket for each peer beside the one of the group, as DTLS servers have."""

import json
import os
import pathlib
import select
import socket
import time


def serve(worker):
    while pathlib.Path("wait").exists() and not worker.stopping:
        time.sleep(0.01)
    if pathlib.Path("fail").exists() and worker.generation > 1:
        raise SystemExit(1)
    (listener,) = worker.sockets
    waits = select.poll()
    of_clients: dict[int, socket.socket] = {}
    waits.register(listener, select.POLLIN)
    worker.ready()
    while not worker.stopping or of_clients:  # those say good bye
        if worker.stopping and listener.fileno() >= 0:
            waits.unregister(listener)
            listener.close()
        for fd, _ in waits.poll(50):
            sock = of_clients.get(fd, listener)
            data, peer = sock.recvfrom(100)
            if data == b"connect":
                sock = connected(listener, peer)
                of_clients[sock.fileno()] = sock
                waits.register(sock, select.POLLIN)
            if data == b"bye":
                waits.unregister(sock)
                of_clients.pop(fd).close()
            else:
                answer(worker, sock, sock in of_clients.values(), peer)


def connected(listener, peer):
    here = listener.getsockname()
    sock = socket.socket(listener.family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((peer[0], *here[1:]) if here[0] in ("0.0.0.0", "::") else here)
    sock.connect(peer)
    return sock


def answer(worker, sock, is_connected, peer):
    told = {"slot": worker.slot, "pid": os.getpid(), "connected": is_connected}
    data = json.dumps(told).encode()
    sock.send(data) if is_connected else sock.sendto(data, peer)
