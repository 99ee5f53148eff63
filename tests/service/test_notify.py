"""Both ends of sd_notify(3), alone and in a running service."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from steer.control import notification_buffer
from steer.control.notify import IgnoredReady, Listener, Notification, notify_supervisor
from testkit.fixtures import StartService
from testkit.processes import DEADLINE_S, eventually, is_ready
from testkit.programs import source

APP = source("ready_when_told")


def encoded(address: str) -> str:
    return address.replace("@", "\0", 1)


def send(address: str, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(message, encoded(address))


def test_listener_tells_who_sent_what_and_takes_no_files() -> None:
    heard: list[Notification] = []

    async def listen() -> None:
        listener = Listener(frozenset({os.geteuid()}), IgnoredReady(pytest.fail))
        send(listener.address, b"EARLY=1")
        listener.watch(asyncio.get_running_loop(), lambda *what: heard.append(what))
        files = os.listdir("/proc/self/fd")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(encoded(listener.address))
            socket.send_fds(sock, [b"BARRIER=1"], [0])
            sock.send(b"LONG=" + b"x" * 10_000)
        while len(heard) < 3:
            await asyncio.sleep(0)
        assert os.listdir("/proc/self/fd") == files
        asyncio.get_running_loop().remove_reader(listener._socket)
        listener.close()

    asyncio.run(listen())
    assert {lineage[0] for lineage, _ in heard} == {os.getpid()}
    early, barrier, long = [message for _, message in heard]
    assert (early, barrier) == ({"EARLY": "1"}, {"BARRIER": "1"})
    assert set(long["LONG"]) == {"x"}


def test_listener_passes_over_users_it_does_not_trust_and_says_so_once() -> None:
    told: list[str] = []

    async def listen() -> None:
        heard: list[object] = []
        strict = Listener(frozenset({12345}), IgnoredReady(told.append))
        lenient = Listener(frozenset({os.geteuid()}), IgnoredReady(pytest.fail))
        for listener in (strict, lenient):
            listener.watch(asyncio.get_running_loop(), lambda *what: heard.append(what))
            send(listener.address, b"READY=1")
        for message in (b"READY=1", b"WATCHDOG=1"):
            send(strict.address, message)
        while not heard:
            await asyncio.sleep(0)
        assert len(heard) == 1
        for listener in (strict, lenient):
            asyncio.get_running_loop().remove_reader(listener._socket)
            listener.close()

    asyncio.run(listen())
    (line,) = told
    why = f"workers are not started as user {os.geteuid()}"
    assert f"(pid {os.getpid()}) is ignored: {why};" in line


def test_not_everything_that_anybody_sends_is_told() -> None:
    told: list[str] = []
    ignored_ready = IgnoredReady(told.append)
    for number in range(100):
        ignored_ready.log(os.getpid(), f"cause {number}", "cure")
        ignored_ready.log(os.getpid(), "cause 0", "cure")
    assert 1 < len(told) < 20


@contextmanager
def supervisor(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.bind(encoded(address))
        yield sock


@pytest.mark.parametrize("address", ["@steer-test-{pid}", "{home}/notify"])
def test_supervisor_is_told_wherever_it_listens(home: Path, address: str) -> None:
    address = address.format(home=home, pid=os.getpid())
    with supervisor(address) as sock:
        notify_supervisor("READY=1", {"NOTIFY_SOCKET": address})
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "@nobody-listens", "/nowhere/x", "x" * 200, "relative"])
def test_supervisor_that_cannot_be_told_is_no_error(address: str) -> None:
    notify_supervisor("READY=1", {"NOTIFY_SOCKET": address})
    notify_supervisor("READY=1", {})


def test_service_tells_its_supervisor(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    environment["NOTIFY_SOCKET"] = str(home / "notify")
    with supervisor(environment["NOTIFY_SOCKET"]) as sock:
        running = service("-w", "2")
        assert sock.recv(100) == f"READY=1\nMAINPID={running.pid}".encode()
        assert running.stop() == 0
        assert sock.recv(100) == b"STOPPING=1"
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)


def test_worker_is_ready_when_it_says_so(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(APP)
    running = service("app:tells", "-w", "1", ready=False)
    running.wait_asked()
    assert running.workers()[0]["state"] == "starting"
    (home / "tell").touch()
    running.wait_ready()


def test_worker_may_have_a_child_say_so_but_no_stranger(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(APP)
    running = service("app:has_a_child_that_tells", "-w", "1", ready=False)
    address = eventually(lambda: (home / "address").exists() and (home / "address").read_text())
    assert re.fullmatch(r"@steer-\d+-[0-9a-f]{16}", str(address))

    send(str(address), b"READY=1")
    # What was sent before a request is heard before the next one.
    assert [running.workers()[0]["state"] for _ in range(2)] == ["starting"] * 2
    assert f"(pid {os.getpid()}) is ignored: it is no process of a worker; let" in running.log

    (home / "tell").touch()
    running.wait_ready()


POLLS = """
import socket, time
listener = socket.socket(fileno=3)
listener.setblocking(False)
while True:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        pass
    time.sleep(0.01)
"""
SCRIPTS = {
    "a helper": "systemd-notify --ready",
    "a helper that does not wait": "systemd-notify --ready --no-block",
    "a helper's helper": "sh -c 'systemd-notify --ready; true'",
    "one whose parent has ended": "(systemd-notify --ready &)",
    "one whose parent has ended, which does not wait": "(systemd-notify --ready --no-block &)",
    "one in a session of its own": "setsid systemd-notify --ready",
    "one in a session of its own, whose parent has ended": "(setsid systemd-notify --ready &)",
}


@pytest.mark.needs("systemd-notify", "setsid")
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_command_is_believed_at_once_that_polls_its_socket_and_has_another_say_so(
    service: StartService, home: Path, script: str
) -> None:
    """It is never seen to wait, and would be believed after --ready-timeout."""
    (home / "polls.py").write_text(POLLS)
    (home / "start.sh").write_text(f"{script}\nexec {sys.executable} polls.py\n")
    service("-w", "2", "--ready-timeout", "3600", "--", "sh", "start.sh")


@pytest.mark.needs("systemd-notify", "setsid", "nobody")
def test_helper_of_another_user_in_a_session_of_its_own_is_known_by_its_environment(
    service: StartService, home: Path
) -> None:
    (home / "polls.py").write_text(POLLS)
    helper = SCRIPTS["one in a session of its own, whose parent has ended"]
    (home / "start.sh").write_text(f"{helper}\nexec {sys.executable} polls.py\n")
    as_nobody = ("-u", "nobody", "--ready-timeout", "3600")
    service("-w", "2", *as_nobody, "--", "sh", "start.sh")


NAMELESS = source("nameless")


@pytest.mark.parametrize("workers", [1, 2])
def test_helper_of_which_nothing_tells_whose_it_is_is_believed_where_only_one_can_be_meant(
    service: StartService, home: Path, workers: int
) -> None:
    (home / "polls.py").write_text(POLLS)
    (home / "nameless.py").write_text(NAMELESS)
    command = ("--", sys.executable, "nameless.py")
    arguments = ("-w", str(workers), "--ready-timeout", "3600", *command)
    running = service(*arguments, ready=workers == 1)
    why = "is ignored: its parent has ended, and nothing tells whose it is; let the worker"
    if workers == 1:
        assert why not in running.log
    else:
        eventually(lambda: why in running.log)
        assert {each["state"] for each in running.workers()} == {"starting"}
        assert running.log.count(why) == 1


@pytest.mark.needs("gunicorn")
def test_gunicorn_is_not_believed_before_its_own_workers_wait(
    service: StartService, home: Path
) -> None:
    (home / "slow.py").write_text(
        "import time, pathlib\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "def app(environ, start): start('200 OK', []); return [b'']\n"
    )
    gunicorn = ("--", sys.executable, "-m", "gunicorn", "slow:app")
    running = service("-w", "1", *gunicorn, ready=False)
    running.wait_asked()
    eventually(lambda: "booted" in (running.workers()[0]["said"] or ""))
    assert running.workers()[0]["state"] == "starting"
    (home / "go").touch()
    running.wait_ready()


def test_whose_process_sent_it_is_known_after_that_has_ended() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(f"\0steer-test-{os.getpid()}")
        sock.setblocking(False)
        box = notification_buffer.NotificationBuffer(sock.fileno())
        pid = os.fork()
        if pid == 0:
            send(f"@steer-test-{os.getppid()}", b"READY=1")
            os._exit(0)
        eventually(lambda: is_ready(sock))
        box.take()
        os.waitpid(pid, 0)
        (datagram,) = notification_buffer.decoded(box.contents())
        box.close()
    assert datagram.lineage[:2] == (pid, os.getpid())


def test_all_that_waits_is_taken_in_one_turn() -> None:
    """So that workers that get ready at once are one change of the table."""
    turns: list[int] = []

    async def listen() -> None:
        listener = Listener(frozenset({os.geteuid()}), IgnoredReady(pytest.fail))
        for _ in range(5):
            send(listener.address, b"READY=1")
        loop = asyncio.get_running_loop()
        turn = 0
        listener.watch(loop, lambda *_: turns.append(turn))
        while len(turns) < 5:
            await asyncio.sleep(0)
            turn += 1
        loop.remove_reader(listener.fileno())
        listener.close()

    asyncio.run(listen())
    assert len(set(turns)) == 1
