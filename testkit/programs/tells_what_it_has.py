"""Answers every connection with what it could get hold of, as JSON."""

import ctypes
import errno
import json
import os
import socket
import sys


def refused(act):
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def bpf(command, attribute):
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321}.get(os.uname().machine, 280)
    data = ctypes.create_string_buffer(attribute, 128)
    if libc.syscall(number, command, data, len(data)) < 0:
        raise OSError(ctypes.get_errno(), "bpf")


def attempts(controller, map_id):
    a_map = int(map_id).to_bytes(4, sys.byteorder)
    stolen = ctypes.CDLL(None, use_errno=True)

    def steal():
        pidfd = os.pidfd_open(controller)
        if stolen.syscall(438, pidfd, 3, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")

    return {
        "map by its id": refused(lambda: bpf(14, a_map)),
        "memory": refused(lambda: open(f"/proc/{controller}/mem", "r+b").close()),
        "descriptors": refused(lambda: os.listdir(f"/proc/{controller}/fd")),
        "one descriptor": refused(steal),
    }


def about():
    lines = (line.partition(":") for line in open("/proc/self/status"))  # noqa: SIM115
    return {name: value.strip() for name, _, value in lines}


def serve(listener):
    while True:
        client, _ = listener.accept()
        with client:
            asked = client.recv(100).decode().split()
            found = attempts(*map(int, asked)) if asked else about()
            client.sendall(json.dumps(found).encode())


def call(worker):
    serve(worker.sockets[0])


if __name__ == "__main__":
    serve(socket.socket(fileno=3))
