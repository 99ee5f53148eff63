"""Takes its sockets out of their groups, as it is told to."""

import contextlib
import ctypes
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path


def connect(sock):
    sock.connect(("127.0.0.1", 9))


def dissolve(sock):
    connect(sock)
    ctypes.CDLL(None).connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)


def device(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")


def alone(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def close(sock):
    sock.close()


def shutdown(sock):
    sock.shutdown(socket.SHUT_RDWR)


def relisten(sock):
    sock.shutdown(socket.SHUT_RDWR)
    sock.listen(100)


held: list[object] = []


def sleep(sock):
    Path(f"orders-{os.getpid()}").unlink()
    while not Path("go").exists():
        time.sleep(0.01)


def about(worker):
    told = int(worker.stopping)
    return b'{"slot":%d,"pid":%d,"told":%d}' % (worker.slot, os.getpid(), told)


def attach(sock, index=0):
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, index))  # return it
    head = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(program))
    sock.setsockopt(socket.SOL_SOCKET, 51, head)  # SO_ATTACH_REUSEPORT_CBPF


def insist(sock, do=lambda sock: attach(sock, 2)):
    def run():
        while not Path("go").exists():
            do(sock)
            time.sleep(0.001)

    threading.Thread(target=run).start()


def insist_on_none(sock):
    def do(sock):
        with contextlib.suppress(FileNotFoundError):  # there is none
            detach(sock)

    insist(sock, do)


def detach(sock):
    sock.setsockopt(socket.SOL_SOCKET, 68, 0)  # SO_DETACH_REUSEPORT_BPF


def answer(worker, sock):
    if sock.type == socket.SOCK_DGRAM:
        _, peer = sock.recvfrom(1000)
        sock.sendto(about(worker), peer)
        return
    client, _ = sock.accept()
    with client:
        if b"/held" in client.recv(1000, socket.MSG_PEEK):
            held.append(client.dup())
        if b"/slow" in client.recv(1000):
            sock.close()
            while not Path("go").exists():
                time.sleep(0.01)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + about(worker))


def serve(worker):
    orders = Path(f"orders-{os.getpid()}")
    always = Path("always")
    (sock,) = worker.sockets
    while Path("late").exists():
        time.sleep(0.01)
    worker.ready()
    if always.exists():
        globals()[always.read_text()](sock)
    while not worker.stopping:
        if orders.exists():
            globals()[orders.read_text()](sock)
            orders.unlink(missing_ok=True)
        if sock.fileno() >= 0 and select.select([sock], [], [], 0.02)[0]:  # noqa: TID251
            with contextlib.suppress(OSError):
                answer(worker, sock)
