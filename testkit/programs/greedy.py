"""Has as many threads and files as it is told to."""

import ctypes
import mmap
import threading
import time

libc = ctypes.CDLL(None)


def serve(worker):
    # all but the first are greedy
    try:
        open("first", "x").close()
    except FileExistsError:
        wait_greedily()
    while True:
        worker.sockets[0].accept()[0].close()


def wait_greedily():
    threading.stack_size(65536)
    for _ in range(2000):
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    bits = mmap.mmap(-1, 256 << 20)
    bits[: 8 << 20] = b"\xff" * (8 << 20)
    bits[:8] = bytes(8)
    memory = (ctypes.c_char * len(bits)).from_buffer(bits)
    while True:  # on a descriptor that is not open EBADF, so none that is
        bits[:8192] = bytes(8192)
        limit = ctypes.byref((ctypes.c_long * 2)(1000, 0))
        libc.select(0x7FFFFFFF, memory, None, None, limit)
