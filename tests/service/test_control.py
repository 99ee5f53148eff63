"""The control socket: where it is, who may speak to it, and what nobody's words can do to it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from steer.control import claim, client, outcomes, peer, server
from steer.control.server import Progress
from steer.errors import ControlError, NotRunning, Refused, WorkersFailed
from steer.linux import processes
from testkit.confine import NOBODY, as_user
from testkit.fake_service import fake_service, says
from testkit.fixtures import RunSteer, StartService
from testkit.processes import DEADLINE_S, eventually, session
from testkit.programs import source
from testkit.service import STEER, Service, wound

PORT = 8080
ALONE = 40_000 + os.getpid() % 20_000
"""A user nobody else is, so that no other test is in its place in /tmp."""
HOLDS = source("holds")

MINE = """
#include "steer.h"

STEER_POLICY(ctx, table)
{
    return steer_spread(table, ctx->hash);
}
"""
ENDLESS = """
#if __INCLUDE_LEVEL__ < 60
#include "endless.h"
#include "endless.h"
#endif
"""


def connect(running: Service) -> socket.socket:
    return peer.connect(running.control_socket, DEADLINE_S)


def answer(sock: socket.socket) -> dict[str, Any]:
    with sock.makefile("rb") as stream:
        found: dict[str, Any] = json.loads(stream.readline())
        return found


def is_unharmed(running: Service) -> bool:
    return running.status()["state"] == "running" and "bug" not in running.log


# What is sent to it


@pytest.mark.parametrize(
    "request_, error",
    [
        (b"\n", "request not understood"),
        (b"hello\n", "request not understood"),
        (b"\xff\xfe\x00\n", "request not understood"),
        (b'["status"]\n', "request not understood"),
        (b'"status"\n', "request not understood"),
        (b'{"command":' + b"[" * 60_000 + b"\n", "request not understood"),
        (b"1" * 60_000 + b"\n", "request not understood"),
        (b"{}\n", "unknown command; known: "),
        (b'{"command": null}\n', "unknown command; known: "),
        (b'{"command": {"stop": 1}}\n', "unknown command; known: "),
        (b"x" * 70_000 + b"\n", "request too long: 65536 bytes at most"),
    ],
)
def test_refuses_what_is_no_request(service: StartService, request_: bytes, error: str) -> None:
    running = service("-w", "1")
    with connect(running) as sock:
        with suppress(BrokenPipeError):  # it may have read enough before the end
            sock.sendall(request_)
        found = answer(sock)
    assert found["ok"] is False
    assert found["error"].startswith(error)
    assert is_unharmed(running)


def test_refuses_a_request_that_ends_in_the_middle(service: StartService) -> None:
    running = service("-w", "1")
    with connect(running) as sock:
        sock.sendall(b'{"command": "st')
        sock.shutdown(socket.SHUT_WR)
        assert answer(sock)["error"] == "request not complete: a line of JSON is wanted"
    with connect(running) as sock:
        sock.sendall(b'{"command": "status"}')
    assert is_unharmed(running)


def test_endless_request_is_not_kept(service: StartService) -> None:
    running = service("-w", "1")
    before_kb = resident_kb(running.pid)
    with connect(running) as sock, suppress(ConnectionError):
        for _ in range(100):
            sock.sendall(bytes(1 << 20))
        pytest.fail("it took 100 MB")
    assert is_unharmed(running)
    assert resident_kb(running.pid) - before_kb < 10_000


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_silent_connections_keep_nobody_out(service: StartService) -> None:
    running = service("-w", "1")
    with ExitStack() as undo:
        for _ in range(300):
            undo.enter_context(connect(running)).send(b"{")
        assert is_unharmed(running)
        assert len(list(Path(f"/proc/{running.pid}/fd").iterdir())) < 150
        # Nor do they keep it from ending.
        assert running.stop() == 0


def test_slow_request_is_answered_all_the_same(service: StartService) -> None:
    running = service("-w", "1")
    with connect(running) as sock:
        for byte in b'{"command": "status"}\n':
            sock.send(bytes([byte]))
            running.ask("status")
        assert answer(sock)["service"]["name"] == "test"


def test_asker_who_does_not_wait_is_no_harm(service: StartService) -> None:
    running = service("-w", "1")
    for _ in range(50):
        with connect(running) as sock:
            sock.sendall(b'{"command": "status"}\n')
    assert is_unharmed(running)


# Who may


def test_is_ours_alone(service: StartService) -> None:
    running = service("-w", "1")
    found = running.control_socket.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


@pytest.mark.needs("nobody")
def test_another_user_is_told_whom_to_ask(
    service: StartService, steer: RunSteer, home: Path
) -> None:
    running = service("-w", "1")
    for command in ("status", "stop", "reload"):
        done = steer(command, "test", user=NOBODY)
        assert done.returncode == 1
        words = f"steer: {command} test: EACCES; ask as root or as the service's own user\n"
        assert done.stderr == words
    assert is_unharmed(running)


@pytest.mark.needs("nobody")
def test_another_user_is_refused_by_credentials(service: StartService) -> None:
    running = service("-w", "1")
    running.control_socket.chmod(0o666)
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        """s.sendall(b'{"command": "stop"}\\n'); print(s.makefile().readline())"""
    )
    asked = subprocess.run(
        as_user(NOBODY, "/usr/bin/python3", "-Ic", script, str(running.control_socket)),
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert json.loads(asked.stdout) == {
        "ok": False,
        "error": "not permitted: only root and the service's own user may ask",
    }
    assert is_unharmed(running)


@pytest.mark.needs("nobody")
def test_root_may_stop_another_users(
    service: StartService, environment: dict[str, str], home: Path
) -> None:
    running = service("-w", "1", user=NOBODY)
    assert running.steer("stop", "test").stdout == "stopped test\n"
    assert running.wait() == 0


# Where it is


@contextmanager
def started(
    *command: str, environment: dict[str, str], home: Path
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        env=environment,
        cwd=home,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], word: str) -> list[str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError("".join(lines))


def sees_only_others(inside: tuple[str, ...], environment: dict[str, str]) -> None:
    """Whose services they are is no secret of the kernel's; that there is none would be wrong."""

    def run(*command: str, user: int) -> subprocess.CompletedProcess[str]:
        argv = (*inside, *as_user(user, STEER, *command))
        return subprocess.run(argv, env=environment, capture_output=True, text=True)

    words = "2 services of other users: test, theirs; none of yours; ask as root or as their users"
    for command in (("status",), ("status", "--json"), ("reload",)):
        done = run(*command, user=ALONE + 1)
        act = "status" if "status" in command else "find a service"
        assert (done.returncode, done.stderr) == (1, f"steer: {act}: {words}\n")
        if "--json" in command:
            assert json.loads(done.stdout) == {
                "schema": 1,
                "services": [],
                "orphaned": [],
                "others": 2,
            }
    done = run("stop", "nothing", user=ALONE + 1)
    assert done.stderr.endswith(
        "not running; no service is running; of other users: test, theirs\n"
    )
    done = run("status", user=ALONE)
    assert done.returncode == 0
    assert done.stdout.startswith("theirs  running  ")
    assert done.stdout.endswith("\nand 1 service of other users\n")


PRIVATE_RUN = 'mount -t tmpfs none /run && install -d -o {} /run/steer && {} && exec "$@"'


@pytest.mark.needs("nobody")
@pytest.mark.parametrize(
    "prepare, runtime, why",
    [
        ("true", "/run/nowhere", "No such file or directory"),
        ("mkdir /run/ro && mount -t tmpfs -o ro none /run/ro", "/run/ro", "Read-only file system"),
        ("touch /run/file", "/run/file", "Not a directory"),
        (
            "mkdir -p /run/them/steer && chown 1 /run/them/steer",
            "/run/them",
            "/run/them/steer is another user's",
        ),
        ("true", "/run/" + "x" * 100, "AF_UNIX path too long"),
    ],
)
def test_goes_to_the_next_place_and_says_so(
    netns: object, environment: dict[str, str], home: Path, prepare: str, runtime: str, why: str
) -> None:
    del environment["STEER_RUNTIME_DIR"]
    environment["XDG_RUNTIME_DIR"] = runtime
    if len(runtime) > 100:
        prepare = f"install -d -o {ALONE} {runtime}"
    shell = ("unshare", "-m", "sh", "-c", PRIVATE_RUN.format(ALONE, prepare), "sh")
    run = (*shell, *as_user(ALONE, STEER, "run", "-w", "1", "--name", "test"))
    with started(*run, environment=environment, home=home) as process:
        lines = lines_until(process, "serving")
        where = f"control socket: /run/steer/test.sock; could not use {runtime}/steer/test.sock: "
        assert lines[0].endswith(f"{where}{why}\n")
        place = Path(f"/proc/{process.pid}/root/run/steer")
        there = sorted(each.name for each in place.iterdir())
        assert there == ["test.sock", "test.sock.workers"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.needs("nobody")
def test_root_is_found_in_one_place_and_finds_the_services_of_all(
    netns: object, environment: dict[str, str], home: Path
) -> None:
    """A login shell has XDG_RUNTIME_DIR, cron and systemd have not."""
    del environment["STEER_RUNTIME_DIR"]
    theirs = f"/run/user/{ALONE}"
    prepare = f"mkdir -p /run/user/0 && install -d -m 700 -o {ALONE} {theirs}"
    shell = ("unshare", "-m", "sh", "-c", PRIVATE_RUN.format(0, prepare), "sh")
    run = (STEER, "run", "-w", "1", "--policy", "kernel")
    login = {**environment, "XDG_RUNTIME_DIR": "/run/user/0"}
    cron = {name: value for name, value in environment.items() if name != "XDG_RUNTIME_DIR"}
    at = ("-b", "127.0.0.1:8081")
    with started(*shell, *run, "--name", "test", environment=login, home=home) as ours:
        lines_until(ours, "serving")
        inside = ("nsenter", f"--mount=/proc/{ours.pid}/ns/mnt")
        one_of_theirs = (*inside, *as_user(ALONE, *run, *at, "--name", "theirs"))
        with started(*one_of_theirs, environment=cron, home=home) as other:
            lines_until(other, "serving")
            there = Path(f"/proc/{ours.pid}/root")
            assert (there / "run/steer/test.sock").is_socket()
            assert (there / theirs[1:] / "steer/theirs.sock").is_socket()
            for shells in (login, cron):
                shown = subprocess.run(
                    (*inside, STEER, "status", "--json"), env=shells, capture_output=True
                )
                names = [each["name"] for each in json.loads(shown.stdout)["services"]]
                assert names == ["test", "theirs"], shown
            sees_only_others(inside, cron)
            for name in ("theirs", "test"):
                done = subprocess.run((*inside, STEER, "stop", name), env=cron)
                assert done.returncode == 0


@pytest.mark.needs("nobody")
def test_directory_that_somebody_else_made_in_tmp(
    netns: object, environment: dict[str, str], home: Path, steer: RunSteer
) -> None:
    del environment["STEER_RUNTIME_DIR"], environment["XDG_RUNTIME_DIR"]
    squatted = Path(f"/tmp/steer-{ALONE}")
    squatted.mkdir(mode=0o777)
    try:
        with socket.socket(socket.AF_UNIX) as trap:
            trap.bind(str(squatted / "trap.sock"))
            trap.listen()
            (squatted / "trap.sock").chmod(0o666)
            done = steer("run", "--name", "test", user=ALONE)
            assert done.returncode == 1
            assert f"{squatted}/test.sock: {squatted} is another user's; set" in done.stderr
            for command in ("status", "stop"):
                found = steer(command, "trap", user=ALONE)
                assert "find service 'trap': not running" in found.stderr
    finally:
        (squatted / "trap.sock").unlink()
        squatted.rmdir()


@pytest.mark.needs("nobody")
def test_user_without_a_run_directory_has_one_in_tmp(
    service: StartService, environment: dict[str, str]
) -> None:
    """Where /run/steer is no place for them."""
    del environment["STEER_RUNTIME_DIR"]
    environment["XDG_RUNTIME_DIR"] = "/nowhere"
    place = Path(f"/tmp/steer-{ALONE}")
    running = service("-w", "1", user=ALONE, ready=False)
    eventually(lambda: "serving" in running.log)
    assert (
        f"control socket: {place}/test.sock; could not use /nowhere/steer/test.sock: "
        in running.log
    )
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert running.stop() == 0
    assert not place.exists()


def test_path_that_no_socket_can_have_is_told_by_all_commands(
    steer: RunSteer, environment: dict[str, str]
) -> None:
    path = "/tmp/" + "x" * 100 + "/web.sock"
    environment["STEER_RUNTIME_DIR"] = os.path.dirname(path)
    for command in ("run", "check"):
        done = steer(command, "--demo", "--name", "web", "-b", "127.0.0.1:8099")
        assert done.returncode == 1
        assert f"a socket's path has 107 bytes at most, {path} has 114; set" in done.stderr
    done = steer("run", "--demo", "--control-socket", path)
    assert done.returncode == 1
    assert f"{path} has 114; set control_socket to another path" in done.stderr
    for command in ("status", "stop", "reload"):
        done = steer(command, "--control-socket", path)
        assert done.returncode == 1
        assert "AF_UNIX path too long: 107 bytes at most" in done.stderr, done.stderr


def test_what_stands_in_the_place_of_the_directory_is_named(
    steer: RunSteer, home: Path, environment: dict[str, str]
) -> None:
    environment["STEER_RUNTIME_DIR"] = str(home / "file")
    (home / "file").touch()
    done = steer("run", "--demo", "--name", "web")
    assert f"{home}/file/web.sock: {home}/file is no directory; set control_socket" in done.stderr
    assert done.returncode == 1


def test_goes_where_it_is_told_to(service: StartService, home: Path) -> None:
    place = home / "elsewhere" / "my.socket"
    place.parent.mkdir()
    running = service("-w", "1", "--control-socket", str(place), ready=False)
    eventually(lambda: "serving" in running.log)
    assert json.loads(running.steer("status", "--json", "--control-socket", str(place)).stdout)
    for named in ((), ("test",)):  # it is found by its processes
        told = json.loads(running.steer("status", "--json", *named).stdout)
        assert [each["name"] for each in told["services"]] == ["test"]
    assert "not running" in running.steer("status", "tes").stderr
    assert running.steer("reload", "test").stdout.startswith("reloaded test: ")
    assert running.steer("stop", "--control-socket", str(place)).returncode == 0
    assert running.wait() == 0
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize(
    "place, why",
    [
        ("nowhere/x", "No such file or directory"),
        ("file", "something is there that is no socket"),
        ("file/x", "Not a directory"),
        ("link", "something is there that is no socket"),
        (".", "something is there that is no socket"),
    ],
)
def test_place_where_none_can_be(steer: RunSteer, home: Path, place: str, why: str) -> None:
    (home / "file").write_text("precious")
    (home / "link").symlink_to("file")
    done = steer("run", "--name", "test", "--control-socket", place)
    assert done.returncode == 1
    assert done.stderr == (
        f"steer: make the control socket of 'test': {place}: {why}; "
        "set control_socket to another path\n"
    )
    assert (home / "file").read_text() == "precious"


@pytest.mark.needs("nobody")
def test_place_where_another_users_socket_is(steer: RunSteer, home: Path) -> None:
    home.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(home / "theirs"))
        theirs.listen()
        (home / "theirs").chmod(0o600)
        done = steer("run", "--control-socket", "theirs", user=NOBODY)
    assert done.returncode == 1
    assert "theirs: another user's socket is there" in done.stderr
    assert (home / "theirs").is_socket()


# Second services, dead ones, and those that do not answer


def test_second_of_one_name_is_told_who_has_it(service: StartService) -> None:
    running = service("-w", "1")
    done = running.steer("run", "--name", "test", "-b", "127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr == (
        f"steer: start service 'test': one of that name is running (pid {running.pid}, "
        f"{running.control_socket}); stop it with `steer stop test`, "
        "or give this one another name\n"
    )
    assert is_unharmed(running)


def test_socket_of_a_dead_service_is_no_obstacle(service: StartService) -> None:
    running = service("-w", "1", "--adopt-timeout=0")
    (worker,) = running.workers()
    (guard,) = {*processes.descendants(running.pid)} - {running.pid, worker["pid"]}
    running.send_signal(signal.SIGSTOP)
    for pid in (guard, running.pid):
        os.kill(pid, signal.SIGKILL)
    running.wait()
    assert running.control_socket.is_socket()
    for command in ("status", "stop"):
        assert "find service 'test': not running" in running.steer(command, "test").stderr
    running.leaves_nothing()
    again = service("-w", "1")
    assert again.stop() == 0
    assert not again.control_socket.exists()


def test_controller_that_stands_still_is_not_taken_for_dead(service: StartService) -> None:
    running = service("-w", "1")
    running.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ControlError, match=r"no answer within 0\.1 s"):
            running.ask("status", timeout_s=0.1)
        with ExitStack() as undo:
            with suppress(TimeoutError):
                for _ in range(1000):  # its backlog is far less
                    undo.enter_context(peer.connect(running.control_socket, 0.1))
                pytest.fail("its backlog is never full")
            done = running.steer("run", "--name", "test", "-b", "127.0.0.1:9")
        assert done.returncode == 1
        assert "one of that name is running (it does not answer, " in done.stderr
    finally:
        running.send_signal(signal.SIGCONT)
    assert is_unharmed(running)


@pytest.mark.parametrize("words", [b"", b"hello\n", b"[]\n", b'{"ok": true}\n'])
def test_somebody_elses_socket_is_not_understood(tmp_path: Path, words: bytes) -> None:
    path = tmp_path / "x.sock"
    wanted = NotRunning if not words else ControlError
    why = "not understood" if words else "ended before"
    with says(path, words), pytest.raises(wanted, match=why):
        client.status(path)


# What takes its time


CHATTY = 5000
"""More lines of progress than a socket holds: each takes 768 bytes of its buffer at least."""


async def answers_status(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
    return {}


async def counts_to_two(_request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    progress("first", 1, 2)
    progress("second", 2, 2)
    return {"workers": 2, "took_s": 0.5}


async def talks(_request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    for number in range(CHATTY):
        progress("still at it", number, CHATTY)
        await asyncio.sleep(0)
    return {}


async def fails(_request: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    progress("starting", 0, 1)
    raise WorkersFailed("scale web to 2", "exit 1", "see below", "boom\nbang")


def request(path: Path, line: str) -> list[dict[str, Any]]:
    """All that is said, until the other side closes."""
    with peer.connect(path, DEADLINE_S) as sock, sock.makefile("rb") as lines:
        sock.sendall(line.encode() + b"\n")
        return [json.loads(each) for each in lines]


@pytest.fixture
def place(home: Path) -> Path:
    """Where a service called "web" listens."""
    return home / "run" / "steer" / "web.sock"


def test_a_bug_is_told_to_whoever_asked_and_to_the_log(place: Path) -> None:
    """And the next request is answered."""

    async def broken(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        raise ZeroDivisionError("of nothing")

    async def well(_request: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        return {}

    told: list[dict[str, Any]] = []
    with fake_service(place, status=well, reload=broken) as loop:
        loop.set_exception_handler(lambda _, context: told.append(context))
        with pytest.raises(Refused, match=r"bug in steer: ZeroDivisionError: of nothing; see the"):
            client.ask(place, "reload")
        assert client.ask(place, "status") == {"ok": True}
    [context] = told
    assert context["message"] == "request reload"
    assert isinstance(context["exception"], ZeroDivisionError)


def test_progress_comes_before_the_answer(place: Path) -> None:
    with fake_service(place, scale=counts_to_two):
        assert request(place, '{"command": "scale", "progress": true}') == [
            {"progress": "first", "done": 1, "of": 2},
            {"progress": "second", "done": 2, "of": 2},
            {"ok": True, "workers": 2, "took_s": 0.5},
        ]


@pytest.mark.parametrize("wanted", ["false", "null", "1", '"yes"', "[true]"])
def test_progress_comes_to_none_who_did_not_ask_for_it(place: Path, wanted: str) -> None:
    with fake_service(place, scale=counts_to_two):
        (only,) = request(place, f'{{"command": "scale", "progress": {wanted}}}')
    assert only == {"ok": True, "workers": 2, "took_s": 0.5}


def test_failure_is_an_answer(place: Path) -> None:
    with fake_service(place, scale=fails):
        assert request(place, '{"command": "scale", "progress": true}') == [
            {"progress": "starting", "done": 0, "of": 1},
            {
                "ok": False,
                "error": "scale web to 2: exit 1; see below",
                "detail": "boom\nbang",
                "exit_code": 3,
            },
        ]


def test_act_goes_on_when_the_asker_has_gone(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scale(asked: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        progress("begun", 0, 0)
        await go.wait()
        await talks(asked, progress)
        done.set()
        return {}

    go, done = asyncio.Event(), threading.Event()
    with fake_service(place, scale=scale, status=answers_status) as loop:
        with peer.connect(place, DEADLINE_S) as sock:
            sock.sendall(b'{"command": "scale", "progress": true}\n')
            assert answer(sock)["progress"] == "begun"
        loop.call_soon_threadsafe(go.set)
        assert done.wait(DEADLINE_S)
        assert client.ask(place, "status") == {"ok": True}
    assert caplog.records == []


def test_slow_reader_holds_nobody_up_and_gets_the_answer(place: Path) -> None:
    async def scale(asked: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        await talks(asked, progress)
        done.set()
        return {"workers": 2}

    done = threading.Event()
    with fake_service(place, scale=scale), peer.connect(place, DEADLINE_S) as sock:
        sock.sendall(b'{"command": "scale", "progress": true}\n')
        assert done.wait(DEADLINE_S)
        with sock.makefile("rb") as lines:
            *told, last = [json.loads(line) for line in lines]
    assert last == {"ok": True, "workers": 2}
    assert 0 < len(told) < CHATTY
    assert [each["done"] for each in told] == list(range(len(told)))


def test_who_never_reads_is_let_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TIMEOUT_S", 0.5)
    with (
        fake_service(place, scale=talks, status=answers_status),
        peer.connect(place, DEADLINE_S) as sock,
    ):
        sock.sendall(b'{"command": "scale", "progress": true}\n')
        closed = select.poll()
        closed.register(sock, 0)  # POLLHUP
        assert closed.poll(DEADLINE_S * 1000)
        assert client.ask(place, "status") == {"ok": True}


def test_client_passes_progress_on(place: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with fake_service(place, scale=counts_to_two):
        found = client.ask(place, "scale", progress=lambda *how_far: told.append(how_far))
        assert found == {"ok": True, "workers": 2, "took_s": 0.5}
        assert client.ask(place, "scale") == found
    assert told == [("first", 1, 2), ("second", 2, 2)]


def test_client_raises_what_the_service_met(place: Path) -> None:
    with fake_service(place, scale=fails), pytest.raises(Refused) as caught:
        client.ask(place, "scale")
    assert str(caught.value) == "scale web to 2: exit 1; see below"
    assert (caught.value.detail, caught.value.exit_code) == ("boom\nbang", 3)


@pytest.mark.parametrize("code", [None, 0, -1, 256, "3", [3]])
def test_client_names_the_act_where_the_refusal_does_not(place: Path, code: object) -> None:
    words = {"ok": False, "error": "nobody steers", "exit_code": code}
    with says(place, json.dumps(words).encode() + b"\n"), pytest.raises(Refused) as caught:
        client.ask(place, "scale")
    assert str(caught.value) == "scale web: nobody steers"
    assert (caught.value.detail, caught.value.exit_code) == ("", 1)


@pytest.mark.parametrize(
    "words, error, why",
    [
        (b'{"progress": "x", "done": 1, "of": 2}\n', NotRunning, "controller ended before it"),
        (b'{"progress": "x", "do', ControlError, "not understood"),
        (b'{"progress": "x", "done": "y"}\n', ControlError, "not understood"),
        (b'{"progress": null}\n', ControlError, "not understood"),
        (b"{}\n", ControlError, "not understood"),
        (b"[]\n", ControlError, "not understood"),
    ],
)
def test_client_does_not_take_all_for_progress(
    place: Path, words: bytes, error: type[ControlError], why: str
) -> None:
    with says(place, words), pytest.raises(error, match=why) as caught:
        client.ask(place, "scale", progress=lambda *_: None)
    assert type(caught.value) is error


def test_long_acts_begin_with_whether_anybody_listens(place: Path) -> None:
    """Whoever answers for a dead controller may refuse that and do this."""
    asked: list[object] = []

    async def status(request_: Mapping[str, Any], _tell: Progress) -> Mapping[str, Any]:
        asked.append(request_)
        raise ControlError("status web", "nobody steers")

    async def scale(request_: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
        asked.append(request_)
        return await counts_to_two(request_, progress)

    with fake_service(place, scale=scale, status=status):
        assert client.perform(place, "scale", workers=2) == outcomes.Scaled(2, 0.5)
    assert asked == [{"command": "status"}, {"command": "scale", "workers": 2}]


def test_outcome_of_another_version_is_not_understood(place: Path) -> None:
    with (
        fake_service(place, scale=answers_status, status=answers_status),
        pytest.raises(ControlError, match=r"^scale web: answer not understood; .*this version"),
    ):
        client.perform(place, "scale", workers=2)


# Stop


def test_stop_returns_when_the_controller_is_gone(service: StartService, home: Path) -> None:
    (home / "holds.py").write_text(HOLDS)
    running = service("holds:serve", "-w", "1")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        eventually((home / "under-way").exists)
        stopping = subprocess.Popen(
            [STEER, "stop", "test"], env=running.environment, stdout=subprocess.PIPE, text=True
        )
        eventually(lambda: running.status()["state"], "stopping")
        assert [each["state"] for each in running.workers()] == ["stopping"]
        assert stopping.poll() is None
        (home / "go").touch()
        assert sock.recv(100) == b"done"
    assert stopping.communicate(timeout=DEADLINE_S)[0] == "stopped test\n"
    assert running.process.poll() == 0


def test_stop_waits_for_the_process_and_not_for_its_word(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "print(flush=True)\n"
        "while True:\n"
        "    c, _ = s.accept()\n"
        "    asked = c.recv(1000)\n"
        "    if asked: c.sendall(b'{\"ok\": true}\\n')\n"
        "    if b'stop' in asked: break\n"
        "c.close(); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-Ic", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        stopping = threading.Thread(target=client.stop, args=(path, False))
        stopping.start()
        process.stdout.readline()
        stopping.join(0.2)
        assert stopping.is_alive()
        process.communicate()
        stopping.join(DEADLINE_S)
        assert not stopping.is_alive()


def test_stop_quick_does_not_wait_for_what_is_under_way(service: StartService, home: Path) -> None:
    (home / "holds.py").write_text(HOLDS)
    running = service("holds:serve", "-w", "1", "--graceful-timeout", "86400")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S):
        eventually((home / "under-way").exists)
        done = running.steer("stop", "test", "--quick", "--json")
    assert json.loads(done.stdout) == {"stopped": "test"}
    assert running.process.poll() == 0


@pytest.mark.needs("bcc", "bpf")
def test_stop_quick_waits_for_no_change_either(
    service: StartService, home: Path, clients: ExitStack
) -> None:
    """A generation that never finishes, one whose turn it is and that compiles for ever,
    one that waits for its turn, and a drain that waits for a queue."""
    (home / "holds.py").write_text(HOLDS)
    (home / "endless.h").write_text(ENDLESS)
    (home / "endless.c").write_text('#include "endless.h"\n' + MINE)
    running = service(
        "holds:serve", "-w", "2", "--graceful-timeout", "86400", "--hang-timeout", "0"
    )

    def hold() -> dict[int, int]:
        clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
        return running.selected()

    while set(hold().values()) & {0, 1}:  # one that is served, and others that wait
        pass
    assert running.ask("reload")["generation"] == 2
    while set(hold().values()) & {0, 1}:
        pass
    drained = next(each["slot"] for each in running.workers() if each["generation"] == 2)
    asked = [
        {"command": "drain", "slot": drained},
        {"command": "policy", "policy": str(home / "endless.c")},
        {"command": "reload"},
    ]
    waiting = []
    for request in asked:
        waiting.append(clients.enter_context(connect(running)))
        waiting[-1].sendall(json.dumps(request).encode() + b"\n")
    eventually(lambda: compiler_of(running))
    done = running.steer("stop", "test", "--quick", "--json")
    assert json.loads(done.stdout) == {"stopped": "test"}
    assert running.process.poll() == 0
    drain, *changes = map(answer, waiting)
    assert drain["ok"], drain
    assert [each["error"].partition(": ")[2] for each in changes] == ["the service is ending"] * 2
    assert "bug in steer" not in running.log


@pytest.mark.needs("bcc", "bpf")
@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "stop", "stop --quick"])
def test_a_start_that_compiles_can_be_ended(service: StartService, home: Path, way: str) -> None:
    """It has no loop yet; what it says then is what it is at."""
    (home / "endless.h").write_text(ENDLESS)
    (home / "endless.c").write_text('#include "endless.h"\n' + MINE)
    running = service("-w", "2", "--policy", "./endless.c", ready=False)
    eventually(lambda: compiler_of(running))
    told = running.steer("status", "test")
    assert told.returncode == 1
    assert "status test: it is starting: compile policy endless" in told.stderr
    if way.startswith("stop"):
        done = running.steer(*way.split())
        assert (done.returncode, done.stdout) == (0, "stopped test\n"), done.stderr
    else:
        running.send_signal(signal.Signals[way])
    assert running.wait() == 0
    assert not running.log


def compiler_of(running: Service) -> list[int]:
    return [pid for pid in session(running.pid) if b"bcc_child" in command_line(pid)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_two_may_wait_for_the_same_stop(service: StartService) -> None:
    running = service("-w", "2")
    with connect(running) as first, connect(running) as second:
        for sock in (first, second):
            sock.sendall(b'{"command": "stop"}\n')
        assert answer(first) == answer(second) == {"ok": True, "is_in_program": False}
    assert running.wait() == 0


# One start after the other


def test_start_waits_for_its_turn_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_TURN_S", 0.1)
    environment = {"STEER_RUNTIME_DIR": str(tmp_path / "steer")}
    first = claim.Claim("a", None, environment)
    with pytest.raises(ControlError, match=r"another has been starting for 0\.1 s"):
        claim.Claim("b", None, environment)
    first.others_may_start()
    second = claim.Claim("b", None, environment)
    first.release()
    assert second.path.is_socket()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_start_that_waits_for_its_turn_can_be_ended(service: StartService, home: Path) -> None:
    (home / "run" / "steer").mkdir()
    turn = os.open(home / "run" / "steer", os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        running = service("-w", "1", ready=False)
        eventually(lambda: holds_signals(running.pid))
        running.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        assert running.log == ""
    finally:
        os.close(turn)


def holds_signals(pid: int) -> bool:
    blocked = Path(f"/proc/{pid}/status").read_text().partition("SigBlk:")[2].split()[0]
    return bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_control_socket_that_is_removed_is_made_again(service: StartService) -> None:
    """As by a logout, which removes the whole run directory."""
    running = service("-w", "1", under=wound("steer.controller.upkeep._LOOK_S=0.2"))
    directory = running.control_socket.parent
    for what in (directory, running.control_socket):
        if what.is_dir():
            shutil.rmtree(what)
        else:
            what.unlink()
        eventually(lambda: running.steer("status", "test").returncode, 0)
    assert running.log.count("was removed; now it is") == 2
    assert running.steer("reload").returncode == 0
    eventually(lambda: len(running.workers()) == 1)  # the old one has ended
    # The guard has the new one, too.
    running.send_signal(signal.SIGKILL)
    running.wait()
    running = service("-w", "1")
    assert "adopted 1 worker" in running.log
    assert running.steer("stop").returncode == 0
    assert not directory.exists()
