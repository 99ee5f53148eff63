"""What comes from a worker, an asker or another version of steer may be anything at all."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from steer.child import launch, main
from steer.child.launch import Message
from steer.errors import ControlError
from steer.guard import handover
from steer.guard.channel import FRAME_MAX_BYTES, Channel, Frame, NotUnderstood
from testkit.clients import http_get
from testkit.confine import NOBODY, as_user
from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S, eventually, line_of
from testkit.processes import running as running_process
from testkit.programs import source
from testkit.service import Service

PORT = 8080
APP = source("says_anything")
KINDS = ("junk", "another bind", "deep", "large", "descriptors")


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def running(service: StartService, home: Path) -> Service:
    (home / "app.py").write_text(APP)
    return service("app:serve", "-w", "4", "--policy", "hash", "-b", f"127.0.0.1:{PORT}")


def test_worker_that_writes_junk_is_replaced_and_the_service_goes_on(running: Service) -> None:
    """Whatever it is, and when it already serves."""
    before = open_descriptors(running.pid)
    said = "sent what steer does not understand: "
    for number, kind in enumerate(KINDS, 1):
        with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
            sock.sendall(kind.encode())
            with suppress(ConnectionError):  # killed before it could answer
                sock.recv(10)
        eventually(lambda number=number: running.log.count(said) >= number)
        running.wait_ready()
    assert "bug in steer" not in running.log
    assert "Traceback" not in running.log
    eventually(lambda: open_descriptors(running.pid) <= before)
    assert running.stop() == 0


@pytest.mark.parametrize("kind", ["junk", "digits", "descriptors"])
def test_worker_that_writes_junk_at_its_import_keeps_no_slot(
    running: Service, home: Path, kind: str
) -> None:
    (home / "junk").write_text(kind)
    killed = running.workers()[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: "sent what steer does not understand" in running.log)
    eventually(lambda: "backoff" in {each["state"] for each in running.workers()})
    with pytest.raises(ControlError, match="sent what steer does not understand"):
        running.ask("restart", slot=running.workers()[1]["slot"])
    (home / "junk").unlink()
    running.wait_ready()
    assert "bug in steer" not in running.log
    assert running.stop() == 0


def test_service_whose_workers_all_write_junk_does_not_start(
    service: StartService, home: Path
) -> None:
    (home / "app.py").write_text(APP)
    (home / "junk").write_text("junk")
    one = service("app:serve", "-w", "2", ready=False)
    assert one.wait() == 3
    assert "steer: worker " in one.log
    assert "sent what steer does not understand: no such message: 4 bytes" in one.log


# Pure: what is said of sockets, and why nothing could be loaded


def test_longest_reason_fits_into_a_message() -> None:
    worst = main.short("\0" * 100_000)
    data = msgspec.json.encode(Message(unloadable=worst, detail=worst))
    assert len(data) <= launch.MESSAGE_MAX_BYTES
    assert launch.read(data).detail == worst


# Frames between controller, guard and adopter


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        (FRAME_MAX_BYTES + 1).to_bytes(4, "big") + b"x",
        b"\0\0\0\4junk",
        b"\0\0\0\1\xc1",
        b"\0\0\0\0\0",
        b"\0\0\0\2\x91\x07",
    ],
)
def test_frame_that_is_none_is_not_understood(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE_S)
        theirs.sendall(data)
        with pytest.raises(NotUnderstood):
            Channel(ours).receive()


def test_descriptors_that_were_promised_and_did_not_come_are_missed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        body = msgspec.msgpack.encode(Frame("put", "key", fds=2))
        theirs.sendall(len(body).to_bytes(4, "big") + body)
        with pytest.raises(NotUnderstood):
            Channel(ours).receive()


# Adoption: what a guard hands over

SETTINGS = msgspec.msgpack.encode({"name": "test", "control": "x"})


class FakeGuard:
    """Answers at a control socket, once, as a guard does, and hands over what it is told to."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()

    def hand_over(self, frames: Iterable[Frame | bytes]) -> None:
        ours, theirs = socket.socketpair()
        asker = self._listener.accept()[0]
        with asker, ours, theirs:
            asker.recv(100)
            socket.send_fds(asker, [b'{"ok": true}\n'], [theirs.fileno()])
            theirs.close()
            for frame in frames:
                if isinstance(frame, bytes):
                    ours.sendall(frame)
                else:
                    Channel(ours).send(frame, [ours.fileno()] * max(frame.fds, 0))
            ours.settimeout(DEADLINE_S)
            with suppress(ConnectionError):
                ours.recv(100)

    def close(self) -> None:
        self._listener.close()


def _handed_over(*frames: Frame) -> tuple[Frame, ...]:
    return (Frame("configure", value=SETTINGS), *frames, Frame("control", fds=1))


@pytest.mark.parametrize(
    "frames",
    [
        (b"\xff\xff\xff\xff",),
        (Frame("configure", value=b"junk"),),
        _handed_over(),
        _handed_over(Frame("put", "service", b"junk")),
        _handed_over(Frame("put", "service", b"{}")),
        _handed_over(Frame("put", "service", b"[" * 5000), Frame("put", "generation x", b"{}")),
    ],
)
def test_handover_that_is_none_is_refused(
    steer: RunSteer, home: Path, frames: tuple[Frame | bytes, ...]
) -> None:
    path = home / "control"
    guard = FakeGuard(path)
    thread = threading.Thread(target=guard.hand_over, args=(frames,))
    thread.start()
    done = steer("run", "-w", "1", "--control-socket", str(path))
    thread.join()
    guard.close()
    assert done.returncode == 1
    assert done.stderr.startswith("steer: adopt ")
    assert "not understood" in done.stderr or "another version" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.needs("root", "nobody")
def test_nobody_elses_service_is_adopted(home: Path) -> None:
    """It could name any process for its worker, and have root's steer kill it."""
    script = (
        "import socket, sys; s = socket.socket(1); s.bind(sys.argv[1]); s.listen();"
        "print(flush=True); c = s.accept()[0]; print(c.recv(100).decode(), flush=True)"
    )
    home.chmod(0o777)
    path = home / "theirs"
    command = as_user(NOBODY, "/usr/bin/python3", "-Ic", script, str(path))
    with running_process(*command) as process:
        line_of(process)
        with pytest.raises(ControlError, match="EACCES"):
            handover.adopt(path)
        assert line_of(process) == ""


# The control socket


def test_request_of_any_kind_is_answered(service: StartService) -> None:
    running = service("-w", "1")
    chance = random.Random(28)
    values = (
        0, -1, 2**63, 10**400, 1.5, True, None, "", "x", "\0", "\uffff", [], [[]], {}, ["x=y"],
        {"a": {"b": []}}, "hash", "a" * 30_000, "./none.c",
    )  # fmt: skip
    keys = ("slot", "workers", "policy", "params", "weights", "progress", "quick", "x")
    commands = ("status", "scale", "drain", "undrain", "restart", "policy", "adopt", "", 7, None)
    for _ in range(400):
        request = {key: chance.choice(values) for key in chance.sample(keys, 3)}
        if not isinstance(request.get("policy", 0), str):
            request["weights"] = [0]  # never what could be done
        request["command"] = chance.choice(commands)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(str(running.control_socket))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as stream:
                answer = json.loads(stream.readlines()[-1])
        assert answer["ok"] is True or answer["error"], request
    assert "bug in steer" not in running.log
    assert http_get("127.0.0.1", PORT)[1]["slot"] is not None
