"""A worker that accepts by io_uring."""

import ctypes
import mmap
import os
import socket
import struct
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
SETUP, ENTER, GETEVENTS, SQES = 425, 426, 1, 0x10000000
ACCEPT, MULTISHOT = 13, 1


class Ring:
    """With one request, over and over: a multishot accept."""

    def __init__(self, listener):
        parameters = ctypes.create_string_buffer(120)
        self.fd = libc.syscall(SETUP, 256, parameters)
        assert self.fd >= 0, os.strerror(ctypes.get_errno())
        _, self.tail, _, _, _, _, self.array = struct.unpack_from("=7I", parameters, 40)
        self.head_at, self.tail_at, _, _, _, self.cqes = struct.unpack_from("=6I", parameters, 80)
        size = max(self.cqes + 512 * 16, self.array + 4 * 256)
        self.memory = mmap.mmap(self.fd, size, offset=0)
        self.entries = mmap.mmap(self.fd, 256 * 64, offset=SQES)
        self.listener = listener
        self.arm()

    def arm(self):
        fd = self.listener.fileno()
        self.entries[:64] = struct.pack("=BBHiQQIIQ24x", ACCEPT, 0, MULTISHOT, fd, 0, 0, 0, 0, 7)
        (tail,) = struct.unpack_from("=I", self.memory, self.tail)
        struct.pack_into("=I", self.memory, self.array + 4 * (tail % 256), 0)
        struct.pack_into("=I", self.memory, self.tail, tail + 1)
        libc.syscall(ENTER, self.fd, 1, 0, 0, 0, 0)

    def accepted(self):
        libc.syscall(ENTER, self.fd, 0, 1, GETEVENTS, 0, 0)
        (head,) = struct.unpack_from("=I", self.memory, self.head_at)
        (tail,) = struct.unpack_from("=I", self.memory, self.tail_at)
        while head != tail:
            at = self.cqes + 16 * (head % 512)
            _, result, flags = struct.unpack_from("=QiI", self.memory, at)
            head += 1
            struct.pack_into("=I", self.memory, self.head_at, head)
            if not flags & 2:  # no more will come of it
                self.arm()
            if result >= 0:
                yield socket.socket(fileno=result)


def serve(worker):
    ring = Ring(worker.sockets[0])
    while not worker.stopping:
        for client in ring.accepted():
            with client:
                target = client.recv(1000).split()[1]
                if target == b"/sleeps":
                    time.sleep(1000)
                while target == b"/spins" and not Path("go").exists():
                    pass
                answer = b'{"slot":%d,"pid":%d}' % (worker.slot, os.getpid())
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + answer)
