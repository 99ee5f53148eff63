"""A controller with a guard: it does what its standard input says."""

import json
import os
import select  # noqa: F401 - tests say what is evaluated
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from steer.guard.client import GuardClient
from steer.guard.handover import Handover, adopt
from steer.guard.store import Settings
from steer.linux import stdio

control: socket.socket
guard: GuardClient
handover: Handover


def claim(path):
    global control
    control = socket.socket(socket.AF_UNIX)
    control.bind(path)
    control.listen(16)


def start(path, **more):
    global guard
    claim(path)

    def say(text, _):
        return stdio.write_stderr(text.encode() + b"\n")

    guard = GuardClient(control, Settings("test", path, **more), say)
    guard.start()
    return guard.pid


def worker(key, *command):
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = os.pipe()
    channel, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, process_group=0)
    os.close(theirs)
    assert child.stdout
    child.stdout.readline()
    fds = [os.pidfd_open(child.pid), ours, channel.detach(), listener.detach()]
    guard.put(key, b"old", fds, child.pid)
    return child.pid


def take_over(path, **more):
    global handover, guard, control
    found = adopt(Path(path))
    assert found
    handover = found
    control = handover.control
    guard = GuardClient(control, handover.settings, handover=handover)
    guard.start()
    for key, entry in handover.entries.items():
        guard.put(key, entry.value, entry.fds, entry.group)
    return guard.pid


def refuse():
    asker = control.accept()[0]
    asker.recv(4096)
    asker.sendall(b'{"ok": false, "error": "unknown command"}\n')
    asker.close()


def serials(fds):
    return [[os.fstat(fd).st_dev, os.fstat(fd).st_ino] for fd in fds]


for line in sys.stdin:
    code = json.loads(line)
    try:
        answer = eval(code)
    except BaseException:  # noqa: BLE001 - the test is told
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
