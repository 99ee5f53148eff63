"""Workers that get ready only when they are told to, and wait where nobody sees it."""

import os
import subprocess
import sys
import time
from pathlib import Path

TELL = """
import os, socket, sys
address = os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", address)
sys.stdin.read()
"""


def until(name):
    while not Path(name).exists():
        time.sleep(0.01)


def until_stopped(worker):
    while not (worker and worker.stopping):
        time.sleep(0.01)


def has_a_child_that_tells(worker):
    Path("address").write_text(os.environ["NOTIFY_SOCKET"])
    until("tell")
    child = subprocess.Popen([sys.executable, "-c", TELL], stdin=subprocess.PIPE)
    until_stopped(worker)
    child.communicate()


def tells(worker):
    until("tell")
    worker.ready()
    until_stopped(worker)
