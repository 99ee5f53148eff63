"""Workers that cannot be looked at: "could not tell" is not taken for "no", and is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.linux import activity, filtered
from testkit.clients import BIND, answer, freeze, queue, request, send
from testkit.confine import NOBODY, as_user, killing, refusing
from testkit.fixtures import StartService
from testkit.namespaces import Netns
from testkit.processes import (
    AS_IN_DOCKER,
    PIDFD_GETFD,
    WITHOUT_NETLINK,
    eventually,
    line_of,
    python,
)
from testkit.service import STEER

# Causes, without processes


@pytest.mark.needs("root")
def test_a_process_that_proc_hides_is_unknown(tmp_path: Path) -> None:
    """And one that has ended is not."""
    look = """
import os, sys
from steer.workers import access
from steer.linux import waiting as waits
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for pid in sys.argv[1:]:
    print(waits.waits_on(int(pid), frozenset({1})).name, access.read(int(pid)).is_hidden)
"""
    # 2 is the first that the shell starts, and root's
    script = f"mount -t proc -o hidepid=2 proc /proc && exec {sys.executable} -c '{look}' 2 999999"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", f"sleep 60 & {script}"],
        capture_output=True,
        text=True,
    )
    if "mount" in done.stderr:
        pytest.skip(f"needs a mount of proc: {done.stderr}")
    assert done.stdout.split("\n")[:2] == ["UNKNOWN True", "NO False"], done.stderr


LISTENS = """
import ctypes, os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
ctypes.CDLL(None).prctl(4, int(sys.argv[1]), 0, 0, 0)  # PR_SET_DUMPABLE
print(os.fstat(listener.fileno()).st_ino, flush=True)
listener.accept()
"""
LOOKS = """
import ctypes, sys
from pathlib import Path
from steer.linux import waiting as waits
pid, inode = map(int, sys.argv[1:])
while (seen := waits.waits_on(pid, frozenset({inode}))) is waits.Seen.NO:
    pass
status = Path("/proc/self/status").read_text().split()
uids, gids = (status[status.index(of) + 1 :][:4] for of in ("Uid:", "Gid:"))
print(seen.name, set(uids + gids), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


@pytest.mark.needs("netns", "nobody")
@pytest.mark.parametrize("is_dumpable, seen", [(1, "YES"), (0, "UNKNOWN")])
def test_a_process_is_looked_at_as_its_user(netns: Netns, is_dumpable: int, seen: str) -> None:
    """By root without CAP_SYS_PTRACE, which is afterwards what it was."""
    target = as_user(NOBODY, "/usr/bin/python3", "-Ic", LISTENS, str(is_dumpable))
    with subprocess.Popen(target, stdout=subprocess.PIPE, text=True) as process:
        command = [*AS_IN_DOCKER, *python(LOOKS, process.pid, line_of(process))]
        done = subprocess.run(command, capture_output=True, text=True)
        process.kill()
    assert done.stdout == f"{seen} {{'0'}} 1\n", done.stderr


# Services

SILENT = """
import socket
s = socket.socket(fileno=3)
while True:
    c, _ = s.accept()
    with c:
        c.recv(1000)
        c.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n{}")
"""
"""Never says that it is ready; the system's Python runs it, which any user may."""
COMMAND = ("--", "/usr/bin/python3", "-Ic", SILENT)
OPTIONS = ("-w", "2", "-u", "nobody", "--hang-timeout=0.3", *BIND)


@pytest.mark.needs("netns", "nobody")
def test_as_in_docker(service: StartService) -> None:
    """With its default capabilities, and workers that are somebody else: seen as their user."""
    options = (*OPTIONS, "--policy=hash", "--graceful-timeout=0.3", "--ready-timeout=20")
    running = service(*options, *COMMAND, under=AS_IN_DOCKER)
    assert running.status()["backend"] == "cbpf"
    assert "cannot be seen" not in running.log

    stopped = running.workers()[1]
    os.kill(stopped["pid"], signal.SIGSTOP)
    with ExitStack() as clients:
        while all(
            each["pid"] != stopped["pid"] or each["state"] == "ready" for each in running.workers()
        ):
            clients.enter_context(request())
    eventually(lambda: stopped["pid"] not in [each["pid"] for each in running.workers()])
    running.wait_ready(2)
    assert "worker 1 is hung" in running.log
    assert "bug in steer" not in running.log

    for command in ("doctor", "check"):
        arguments = ("--demo", "-u", "nobody", "-b", "127.0.0.1:1234", "--policy=hash", "--json")
        done = subprocess.run(
            [*AS_IN_DOCKER, STEER, command, *arguments], capture_output=True, text=True
        )
        assert "CAP_SYS_PTRACE is not held" in done.stdout, done.stderr
        json.loads(done.stdout)


@pytest.mark.needs("netns", "nobody")
def test_what_waits_is_moved_without_borrowing(
    netns: Netns, service: StartService, clients: ExitStack
) -> None:
    """On cbpf, where the controller holds the workers' sockets, and the kernel moves queues."""
    netns.sysctl("net.ipv4.tcp_migrate_req", 1)
    options = (*OPTIONS, "--policy=hash", "--hang=skip")
    running = service(*options, *COMMAND, under=AS_IN_DOCKER)
    stopped = running.workers()[1]
    freeze(stopped)
    waiting = [clients.enter_context(request()) for _ in range(32)]
    assert [answer(each) for each in waiting] == [{}] * 32
    assert "worker 1 is hung" in running.log
    send(stopped, signal.SIGCONT)
    running.wait_ready(2)


TICKS = """
import select, time
def serve(worker):
    while time.process_time() < 2:
        pass
    while not worker.stopping:
        if select.select(worker.sockets, [], [], 0.05)[0]:
            worker.sockets[0].accept()[0].close()
"""


@pytest.mark.needs("netns", "nobody")
def test_one_that_looks_at_a_clock_is_at_rest(service: StartService, home: Path) -> None:
    """As most servers do; but it is not while it computes, as one does that imports its
    application. A callable is not dumpable, and so cannot be looked at as its user either."""
    (home / "ticks.py").write_text(TICKS)
    options = (*OPTIONS, "--policy=hash", "--ready-timeout=1000", "ticks:serve")
    running = service(*options, under=AS_IN_DOCKER)
    assert all(activity.cpu_s(each["pid"]) >= 2 for each in running.workers())
    assert "taken to be ready when it has used next to no CPU" in running.log


ARBITER = """
import ctypes, os, socket, subprocess, sys, time
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody may look at it
if sys.argv[1] == "arbiter":
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1))
    subprocess.run([sys.executable, "-I", __file__, "worker"], pass_fds=[3])
while time.process_time() < 2:
    pass
socket.socket(fileno=3).accept()
"""


@pytest.mark.needs("netns", "nobody")
def test_ready_said_too_early_is_not_believed_where_nothing_is_seen(
    service: StartService, home: Path
) -> None:
    """As gunicorn's is, before its own workers have imported the application."""
    (home / "gunicorn").write_text(ARBITER)
    options = (*OPTIONS, "-w", "1", "--policy=hash", "--ready-timeout=1000", "--")
    command = ("/usr/bin/python3", "-I", str(home / "gunicorn"), "arbiter")
    running = service(*options, *command, under=AS_IN_DOCKER)
    (worker,) = running.workers()
    assert activity.cpu_s(worker["pid"]) >= 2


FILTERED = ("--policy=round-robin", "--hang-timeout=0.3", "-w", "3")


@pytest.mark.needs("netns", "bpf", "migrate")
@pytest.mark.parametrize("filtering", [refusing, killing])
def test_pidfd_getfd_is_filtered(
    service: StartService, filtering: Callable[[int], Sequence[str]]
) -> None:
    """A stopped worker is found by its queue and replaced; and the right cause is told. A filter
    that ends who makes the call does not end the service."""
    running = service(*FILTERED, "--graceful-timeout=0.3", under=filtering(PIDFD_GETFD))
    stopped = running.workers()[1]
    freeze(stopped)
    with ExitStack() as clients:
        queue(running, clients, 2, stopped)
        eventually(lambda: stopped["pid"] not in [each["pid"] for each in running.workers()])
        running.wait_ready(3)
    assert f"worker {stopped['slot']} is hung" in running.log
    (note,) = (note for note in running.status()["notes"] if "borrowed" in note)
    assert "a seccomp filter refuses pidfd_getfd(2)" in note
    assert "SystemCallFilter=pidfd_getfd" in note


@pytest.mark.needs("netns")
def test_a_filter_that_ends_who_calls_bpf(service: StartService) -> None:
    assert filtered.BPF, "not known on this machine"
    under = killing(filtered.BPF)
    running = service("-w", "2", under=under)
    assert running.status()["backend"] == "cbpf"
    assert "call bpf(2): EPERM" in running.status()["backend_reason"]
    elsewhere = ("-b", "127.0.0.1:1234", "--demo")
    for command in ("doctor", "check"):
        done = subprocess.run([*under, STEER, command, *elsewhere, "--json"], capture_output=True)
        assert b"call bpf(2): EPERM" in done.stdout, done.stderr
        assert done.returncode >= 0


@pytest.mark.needs("netns", "bpf", "pidfd_getfd")
def test_netlink_is_refused(service: StartService) -> None:
    """As by RestrictAddressFamilies=: sockets are borrowed instead."""
    running = service(*FILTERED, "--hang=skip", under=WITHOUT_NETLINK)
    stopped = running.workers()[1]
    freeze(stopped)
    with ExitStack() as clients:
        chosen = queue(running, clients, 2, stopped)
        assert stopped["slot"] not in {answer(each)["slot"] for each in chosen}
        send(stopped, signal.SIGCONT)
        running.wait_ready(3)
