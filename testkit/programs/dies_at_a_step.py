"""Dies at a step of an adoption: for `sitecustomize`."""

import os
import signal
import sys

me, left = os.getpid(), int(os.environ.get("DIE_AT", "0"))


def count(event, _):
    global left
    if event in EVENTS and os.getpid() == me and (left > 1 or os.path.exists("armed")):
        left -= 1
        if left == 0:
            os.kill(me, signal.SIGKILL)


EVENTS = {"os.fork", "socket.__new__", "socket.sendmsg", "socket.bind", "os.kill", "ctypes.cdata"}
if left and "run" in sys.orig_argv:
    sys.addaudithook(count)
