"""Is told of by a helper that nothing ties to it."""

import os
import socket
import sys


def send(address):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", address)


if sys.argv[1:]:
    while os.getppid() == int(sys.argv[2]):
        pass
    send(sys.argv[1].replace("@", "\0", 1))
else:
    if os.fork() == 0:
        os.setsid()
        words = ["nameless.py", os.environ["NOTIFY_SOCKET"], str(os.getpid())]
        if os.fork() == 0:
            os.execve(sys.executable, [sys.executable, *words], {})
        os._exit(0)
    os.wait()
    os.execv(sys.executable, [sys.executable, "polls.py"])
