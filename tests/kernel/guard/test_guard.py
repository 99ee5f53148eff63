"""What a controller leaves to its guard, and who gets it when the controller is gone.

Controllers here are puppets: processes that do what a test tells them, with a guard, a control
socket and workers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from steer.control import peer
from steer.control.claim import Claim
from steer.errors import ControlError
from steer.guard import handover
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.guard.handover import Handover
from steer.guard.store import Settings
from steer.linux import fork
from testkit.confine import NOBODY, as_user
from testkit.processes import DEADLINE_S, eventually, is_ready, is_running, session
from testkit.programs import path

PUPPET = path("guards_puppet")
PLAIN = ("sh", "-c", "echo; exec sleep 600")
STUBBORN = ("sh", "-c", "trap '' TERM; echo; while :; do sleep 600; done")
IN_SHELL = ("sh", "-c", "sleep 600 & echo $!; exec sleep 600")
"""Others of its group outlive its first process."""
FLOOD = "import os, sys; print(flush=True); [os.write(2, b'%09d\\n' % i) for i in range(30_000)]"
ON_AND_ON = "import sys\nprint(flush=True)\nwhile 1: sys.stderr.write('x' * 1000)"


class Puppet:
    """A controller that does as it is told."""

    def __init__(self, home: Path, stderr: int | None = None) -> None:
        self.path = str(home / "test.sock")
        self.errors = home / "stderr"
        with self.errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, PUPPET],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors if stderr is None else stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def do(self, code: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if isinstance(answer, dict) and "error" in answer:
            pytest.fail(answer["error"])
        return answer

    def start(self, **settings: object) -> int:
        """With a guard; the guard's process id."""
        pid: int = self.do(f"start({self.path!r}, **{settings!r})")
        return pid

    def worker(self, key: str, *command: str) -> int:
        pid: int = self.do(f"worker({key!r}, *{command!r})")
        return pid

    def die(self) -> None:
        self._process.kill()
        self._process.wait()

    def clean_up(self) -> None:
        for pid in session(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()


MakePuppet = Callable[[], Puppet]


@pytest.fixture
def make(home: Path) -> Iterator[MakePuppet]:
    with ExitStack() as undo:

        def puppet() -> Puppet:
            made = Puppet(home)
            undo.callback(made.clean_up)
            return made

        yield puppet


@pytest.fixture
def puppet(make: MakePuppet) -> Puppet:
    return make()


def adopt(puppet: Puppet) -> Handover:
    found = handover.adopt(Path(puppet.path))
    assert found is not None
    return found


def ask(puppet: Puppet, request: bytes) -> dict[str, Any]:
    with peer.connect(Path(puppet.path), DEADLINE_S) as sock:
        with suppress(BrokenPipeError):  # it may have read enough before the end
            sock.sendall(request)
        return answer(sock)


def answer(sock: socket.socket) -> dict[str, Any]:
    with sock.makefile("rb") as lines:
        found: dict[str, Any] = json.loads(lines.readline())
        return found


def serials(fds: tuple[int, ...]) -> list[list[int]]:
    """Which files they are."""
    return [[os.fstat(fd).st_dev, os.fstat(fd).st_ino] for fd in fds]


def port(puppet: Puppet, key: str) -> int:
    """Of the listener among a worker's descriptors."""
    found: int = puppet.do(
        f"socket.socket(fileno=os.dup(guard.entries[{key!r}].fds[3])).getsockname()[1]"
    )
    return found


def is_listening(port: int) -> bool:
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), DEADLINE_S):
        return True
    return False


def gone(*pids: int) -> bool:
    return not any(map(is_running, pids))


# Adoption


def test_another_process_adopts_what_a_killed_one_left(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker 0", *PLAIN)
    puppet.do("guard.put('state', bytes(1_000_000))")
    puppet.do("guard.put('pipe', b'', os.pipe())")
    puppet.do("guard.update('worker 0', b'new')")
    wanted = puppet.do("{key: serials(entry.fds) for key, entry in guard.entries.items()}")
    puppet.die()
    found = adopt(puppet)
    assert {key: serials(entry.fds) for key, entry in found.entries.items()} == wanted
    assert found.entries["worker 0"].value == b"new"
    assert found.entries["worker 0"].group == worker
    assert found.entries["state"] == Entry(bytes(1_000_000))
    assert found.settings == Settings("test", puppet.path, adopt_timeout_s=600)
    assert found.control.getsockname() == puppet.path
    fds = [fd for entry in found.entries.values() for fd in entry.fds]
    assert not any(os.get_inheritable(fd) for fd in (*fds, found.control.fileno()))
    assert is_running(worker)
    found.abandon()


def test_adoption_goes_on_and_on(make: MakePuppet) -> None:
    last = make()
    guard = last.start(adopt_timeout_s=600)
    worker = last.worker("worker", *PLAIN)
    wanted = last.do("serials(guard.entries['worker'].fds)")
    for _ in range(3):
        last.die()
        last = make()
        new_guard = last.do(f"take_over({last.path!r})")
        assert last.do("handover.guard_pid") == guard
        assert is_running(guard)
        last.do("handover.taken(guard)")
        assert gone(guard)
        assert last.do("serials(guard.entries['worker'].fds)") == wanted
        guard = new_guard
    assert is_running(worker)
    last.do("guard.close()")
    assert gone(guard)
    assert is_running(worker)


def test_process_that_executes_itself_adopts(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *PLAIN)
    puppet.do("[print('null', flush=True), os.execv(sys.executable, sys.orig_argv)]")
    puppet.do(f"take_over({puppet.path!r})")
    puppet.do("handover.taken(guard)")
    assert not Path(f"/proc/{guard}").exists()  # our child: we have waited for it
    assert is_running(worker)
    assert puppet.do("guard.alive")


def test_name_stays_taken(puppet: Puppet) -> None:
    """From one controller to the next, and not after the last."""
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    found = adopt(puppet)
    claim = Claim.inherited(Path(puppet.path), found.control, remove_directory=False)
    with peer.connect(Path(puppet.path)):
        pass
    claim.release()
    assert not Path(puppet.path).exists()
    found.abandon()


def test_more_descriptors_than_one_message_takes(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600)
    puppet.do("guard.put('many', b'value', [os.dup(0) for _ in range(600)])")
    puppet.worker("worker", *PLAIN)
    puppet.die()
    found = adopt(puppet)
    assert len(found.entries["many"].fds) == 600
    assert len(set(map(tuple, serials(found.entries["many"].fds)))) == 1
    found.abandon()


def test_one_is_adopted_by_one(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    found = adopt(puppet)
    with pytest.raises(ControlError, match=f"pid {os.getpid()} adopts it"):
        adopt(puppet)
    stop, status = (ask(puppet, b'{"command": "%s"}\n' % act) for act in (b"stop", b"status"))
    assert "adopts it" in stop["error"]
    assert "adopts it" in status["error"]
    assert (stop.get("again"), status.get("again")) == (True, None), "who asks, asks again"
    found.abandon()
    adopt(puppet).abandon()


def test_adopter_that_is_killed_has_adopted_nothing(make: MakePuppet) -> None:
    first, second = make(), make()
    guard = first.start(adopt_timeout_s=600)
    worker = first.worker("worker", *PLAIN)
    first.die()
    heir = second.do(f"take_over({first.path!r})")
    second.die()
    eventually(lambda: gone(heir))
    found = adopt(first)
    assert found.guard_pid == guard
    assert found.entries["worker"].group == worker
    found.abandon()
    assert is_running(worker)


def test_adopter_that_is_killed_when_all_is_taken_has_adopted(make: MakePuppet) -> None:
    first, second = make(), make()
    guard = first.start(adopt_timeout_s=600)
    worker = first.worker("worker", *PLAIN)
    first.die()
    heir = second.do(f"take_over({first.path!r})")
    second.do("guard.commit(has_all=True)")
    second.die()
    eventually(lambda: gone(guard))
    found = adopt(first)
    assert found.guard_pid == heir
    assert found.entries["worker"].group == worker
    found.abandon()


def test_adoption_may_take_longer_than_the_timeout(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=0.5)
    worker = puppet.worker("worker", *PLAIN)
    puppet.die()
    found = adopt(puppet)
    assert not fork.wait_for_end(found.entries["worker"].fds[0], 1.0)
    found.abandon()
    eventually(lambda: gone(worker, guard))


def test_there_is_nothing_to_adopt(home: Path) -> None:
    assert handover.adopt(home / "none.sock") is None
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(home / "left.sock"))
    assert handover.adopt(home / "left.sock") is None


def test_living_controller_is_not_adopted(puppet: Puppet) -> None:
    puppet.start()
    refusing = threading.Thread(target=puppet.do, args=["refuse()"])
    refusing.start()
    with pytest.raises(ControlError, match=rf"one of that name is running \(pid {puppet.pid},"):
        adopt(puppet)
    refusing.join()


def test_controller_that_does_not_answer_is_not_adopted(puppet: Puppet) -> None:
    puppet.start()
    with pytest.raises(ControlError, match=r"is running \(it does not answer,"):
        handover.adopt(Path(puppet.path), timeout_s=0.2)


def test_asked_while_the_controller_was_dying(puppet: Puppet) -> None:
    """Its connection waits with the guard's socket; or was taken and is lost: asked again."""
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    dying = threading.Thread(target=puppet.do, args=["[control.accept(), guard.put('x', b'')][1]"])
    dying.start()
    killing = threading.Thread(target=lambda: [dying.join(), puppet.die()])
    killing.start()
    adopt(puppet).abandon()
    killing.join()


# Without a controller


def test_what_workers_say_is_passed_on(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", sys.executable, "-c", FLOOD)
    puppet.die()
    lines = "".join(f"{number:09}\n" for number in range(30_000))
    eventually(lambda: lines in puppet.errors.read_text())


def test_nobody_reads_what_workers_say(home: Path) -> None:
    """The guard does not wait for anybody."""
    ours, theirs = os.pipe()
    puppet = Puppet(home, stderr=theirs)
    try:
        puppet.start(adopt_timeout_s=600)
        workers = [puppet.worker(key, sys.executable, "-c", ON_AND_ON) for key in "ab"]
        puppet.die()
        eventually(lambda: not is_writable(theirs))
        assert "2 workers still serving" in ask(puppet, b'{"command": "status"}\n')["error"]
        assert ask(puppet, b'{"command": "stop"}\n')["ok"]
        assert gone(*workers)
    finally:
        puppet.clean_up()
        os.close(ours)
        os.close(theirs)


def is_writable(fd: int) -> bool:
    return is_ready(fd, event=select.POLLOUT)


def test_what_belonged_to_a_dead_worker_is_closed(puppet: Puppet) -> None:
    """Or its listener would go on taking connections that nobody answers."""
    puppet.start(adopt_timeout_s=600)
    dead, living = puppet.worker("dead", *PLAIN), puppet.worker("living", *PLAIN)
    ports = [port(puppet, "dead"), port(puppet, "living")]
    puppet.die()
    os.kill(dead, signal.SIGKILL)
    eventually(lambda: not is_listening(ports[0]))
    found = adopt(puppet)
    assert found.entries["dead"] == Entry(b"old")
    assert found.entries["living"].group == living
    found.abandon()
    assert is_listening(ports[1])


def test_what_is_left_of_a_group_is_not_forgotten(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *IN_SHELL)
    puppet.die()
    os.kill(worker, signal.SIGKILL)

    def entry() -> Entry:
        found = adopt(puppet)
        found.abandon()
        return found.entries["worker"]

    eventually(lambda: not entry().fds)
    assert entry() == Entry(b"old", group=worker)
    os.killpg(worker, signal.SIGKILL)
    eventually(entry, Entry(b"old"))


def test_what_is_left_of_a_group_is_ended_too(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *IN_SHELL)
    family = [pid for pid in session(puppet.pid) if pid not in (puppet.pid, guard)]
    assert len(family) == 2
    puppet.die()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: gone(worker))
    assert not gone(*family)
    assert ask(puppet, b'{"command": "stop"}\n')["ok"]
    assert gone(*family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_signals_are_none_of_its_business(puppet: Puppet, number: signal.Signals) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    os.kill(guard, number)
    puppet.die()
    os.kill(guard, number)
    adopt(puppet).abandon()


# The end


@pytest.mark.parametrize("adopt_timeout_s", [0.0, 0.5])
def test_workers_that_nobody_adopts_end(puppet: Puppet, adopt_timeout_s: float) -> None:
    pid_file = Path(puppet.path).with_suffix(".pid")
    pid_file.write_text(f"{puppet.pid}\n")
    guard = puppet.start(adopt_timeout_s=adopt_timeout_s, pid_file=str(pid_file))
    workers = [puppet.worker("0", *PLAIN), puppet.worker("1", *IN_SHELL)]
    family = [pid for pid in session(puppet.pid) if pid not in (puppet.pid, guard)]
    assert len(family) == 3
    assert not gone(*workers)
    puppet.die()
    eventually(lambda: gone(*family, guard))
    assert not Path(puppet.path).exists()
    assert not pid_file.exists()
    assert "ending 2 workers" in puppet.errors.read_text()


def test_workers_that_do_not_end_are_killed(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=0, graceful_timeout_s=0.5)
    puppet.worker("worker", *STUBBORN)
    family = session(puppet.pid)
    puppet.die()
    eventually(lambda: gone(*family))
    assert guard in family
    assert not Path(puppet.path).exists()


def test_directory_goes_if_it_is_ours(puppet: Puppet) -> None:
    own = Path(puppet.path).parent / "own"
    own.mkdir()
    puppet.path = str(own / "test.sock")
    puppet.start(adopt_timeout_s=0, remove_directory=True)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    eventually(lambda: not own.exists())


def test_what_is_another_s_stays(puppet: Puppet) -> None:
    """Somebody has taken the places of ours."""
    pid_file, path = Path(puppet.path).with_suffix(".pid"), Path(puppet.path)
    guard = puppet.start(adopt_timeout_s=0, pid_file=str(pid_file))
    pid_file.write_text(f"{os.getpid()}\n")
    path.unlink()
    path.touch()
    puppet.die()
    eventually(lambda: gone(guard))
    assert pid_file.exists()
    assert path.exists()


def test_stop_ends_what_has_no_controller(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600, graceful_timeout_s=600)
    workers = [puppet.worker(key, *PLAIN) for key in "ab"]
    puppet.die()
    assert ask(puppet, b'{"command": "stop"}\n') == {"ok": True}
    assert gone(*workers)
    assert not Path(puppet.path).exists()
    eventually(lambda: gone(guard))


def test_quick_stop_does_not_wait_for_long(puppet: Puppet) -> None:
    puppet.start(adopt_timeout_s=600, graceful_timeout_s=600)
    worker = puppet.worker("worker", *STUBBORN)
    puppet.die()
    with peer.connect(Path(puppet.path), DEADLINE_S) as patient:
        patient.sendall(b'{"command": "stop"}\n')
        eventually(lambda: "ending" in ask(puppet, b'{"command": "status"}\n')["error"])
        with pytest.raises(ControlError, match="ending 1 worker"):
            adopt(puppet)
        assert ask(puppet, b'{"command": "stop", "quick": true}\n') == {"ok": True}
        assert answer(patient) == {"ok": True}
    assert gone(worker)


def test_nothing_left_is_nothing_to_wait_for(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.do("guard.drop('worker')")
    puppet.die()
    eventually(lambda: gone(guard))


# Who asks, and how


@pytest.mark.parametrize(
    "request_, error",
    [
        (b'{"command": "reload"}\n', "the controller is gone; 1 worker still serving, for "),
        (b"{}\n", "the controller is gone"),
        (b"\n", "request not understood"),
        (b"\xff\xfe\x00\n", "request not understood"),
        (b'["adopt"]\n', "request not understood"),
        (b'{"command":' + b"[" * 60_000 + b"\n", "request not understood"),
        (b"x" * 70_000 + b"\n", "request too long: 65536 bytes at most"),
        (bytes(200_000), "request too long: 65536 bytes at most"),
    ],
)
def test_refuses_what_it_cannot_do(puppet: Puppet, request_: bytes, error: str) -> None:
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    found = ask(puppet, request_)
    assert found["ok"] is False
    assert found["error"].startswith(error)
    adopt(puppet).abandon()


def test_silent_connections_keep_nobody_out(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    with ExitStack() as undo:
        for _ in range(300):
            undo.enter_context(peer.connect(Path(puppet.path), DEADLINE_S)).send(b"{")
        adopt(puppet).abandon()
        assert len(os.listdir(f"/proc/{guard}/fd")) < 100


def test_silent_connection_is_let_go(puppet: Puppet) -> None:
    puppet.do("setattr(sys.modules['steer.guard.requests'], 'TIMEOUT_S', 0.5)")
    puppet.start(adopt_timeout_s=600)
    puppet.worker("worker", *PLAIN)
    puppet.die()
    with peer.connect(Path(puppet.path), DEADLINE_S) as silent:
        assert answer(silent)["error"].startswith("request not complete")


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("command", ["stop", "adopt"])
def test_another_user_is_refused(puppet: Puppet, home: Path, command: str) -> None:
    """Even one whom the file's mode lets in."""
    puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *PLAIN)
    puppet.die()
    os.chmod(puppet.path, 0o666)
    code = (
        "import socket, sys; sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]);"
        "sock.sendall(sys.argv[2].encode()); print(sock.makefile().readline())"
    )
    request = json.dumps({"command": command}) + "\n"
    asked = subprocess.run(
        as_user(NOBODY, "/usr/bin/python3", "-c", code, puppet.path, request),
        capture_output=True,
        text=True,
    )
    assert "not permitted" in asked.stdout, asked.stderr
    assert is_running(worker)


# With a controller


def test_what_is_dropped_is_closed(puppet: Puppet) -> None:
    """By the time drop() returns: nobody takes connections for a listener that was closed."""
    puppet.start()
    for _ in range(50):
        puppet.do("guard.put('x', b'', [socket.create_server(('127.0.0.1', 0)).detach()])")
        listener = puppet.do("guard.entries['x'].fds[0]")
        number = puppet.do(f"socket.socket(fileno=os.dup({listener})).getsockname()[1]")
        puppet.do("guard.drop('x')")
        puppet.do(f"os.close({listener})")
        assert not is_listening(number)


def test_what_is_replaced_is_closed(puppet: Puppet) -> None:
    puppet.start()
    puppet.do("guard.put('x', b'', [socket.create_server(('127.0.0.1', 0)).detach()])")
    listener = puppet.do("guard.entries['x'].fds[0]")
    number = puppet.do(f"socket.socket(fileno=os.dup({listener})).getsockname()[1]")
    assert is_listening(number)
    puppet.do("guard.put('x', b'')")
    puppet.do(f"os.close({listener})")
    assert not is_listening(number)


def test_sockets_of_workers_that_are_let_go_are_closed(puppet: Puppet) -> None:
    """And what tells the guard of their ends is not."""
    puppet.start()
    keys = ["a", "b"]
    for key in keys:
        puppet.worker(key, *PLAIN)
    listeners = [puppet.do(f"guard.entries[{key!r}].fds[3]") for key in keys]
    ports = [puppet.do(f"socket.socket(fileno=os.dup({fd})).getsockname()[1]") for fd in listeners]
    puppet.do("guard.let_go('a', 'b', 'unknown')")
    for fd in listeners:
        puppet.do(f"os.close({fd})")
    assert not any(map(is_listening, ports))
    puppet.die()
    adopted = adopt(puppet)
    assert [len(adopted.entries[key].fds) for key in keys] == [3, 3]
    adopted.abandon()


def test_what_is_replaced_together_is_closed(puppet: Puppet) -> None:
    puppet.start()
    listen = "guard.put({!r}, b'', [socket.create_server(('127.0.0.1', 0)).detach()])"
    for key in ("a", "b"):
        puppet.do(listen.format(key))
    listeners = [puppet.do(f"guard.entries[{key!r}].fds[0]") for key in ("a", "b")]
    ports = [puppet.do(f"socket.socket(fileno=os.dup({fd})).getsockname()[1]") for fd in listeners]
    puppet.do('exec(\'with guard.together(): [guard.put(k, b"") for k in ("a", "b")]\')')
    for fd in listeners:
        puppet.do(f"os.close({fd})")
    assert not any(map(is_listening, ports))


def test_close_ends_the_keeper_and_nobody_else(puppet: Puppet) -> None:
    guard = puppet.start()
    worker = puppet.worker("worker", *PLAIN)
    puppet.do("guard.close()")
    assert not Path(f"/proc/{guard}").exists()
    assert is_running(worker)
    assert Path(puppet.path).exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_keeper_that_is_gone_or_stopped_is_replaced(puppet: Puppet, number: signal.Signals) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *PLAIN)
    puppet.do("guard.put('dropped', b'', [0])")
    os.kill(guard, number)
    puppet.do("guard.drop('dropped')")
    assert puppet.do("guard.alive") is False
    assert puppet.do("select.select([guard], [], [], 60)[0] == [guard]")
    puppet.do("guard.put('while there is none', b'here')")
    puppet.do("guard.revive()")
    assert not Path(f"/proc/{guard}").exists()
    puppet.do("guard.update('worker', b'new')")
    puppet.die()
    found = adopt(puppet)
    assert found.entries.keys() == {"worker", "while there is none"}
    assert found.entries["worker"].value == b"new"
    found.abandon()
    assert is_running(worker)


def test_settings_change(puppet: Puppet) -> None:
    guard = puppet.start(adopt_timeout_s=600)
    worker = puppet.worker("worker", *PLAIN)
    puppet.do(f"guard.configure(Settings('test', {puppet.path!r}, adopt_timeout_s=0))")
    puppet.die()
    eventually(lambda: gone(worker, guard))


def test_descriptor_that_is_not_open_is_a_mistake(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        guard = GuardClient(sock, Settings("test", str(home / "test.sock")))
        guard.start()
        with pytest.raises(OSError, match="Bad file descriptor"):
            guard.put("x", b"", [987_654])
        assert not guard.entries
        guard.close()


def test_log_goes_where_ours_goes(puppet: Puppet, home: Path) -> None:
    puppet.start(adopt_timeout_s=0)
    puppet.worker("worker", *PLAIN)
    new = home / "new"
    puppet.do(f"os.dup2(os.open({str(new)!r}, os.O_WRONLY | os.O_CREAT), 2)")
    puppet.do("guard.reopen()")
    puppet.die()
    eventually(lambda: new.exists() and "ending 1 worker\n" in new.read_text())


def test_what_is_put_together_is_adopted(puppet: Puppet) -> None:
    puppet.start()
    for key in ("a", "b"):
        puppet.worker(key, *PLAIN)
    puppet.do('exec(\'with guard.together(): [guard.update(k, k.encode()) for k in ("a", "b")]\')')
    puppet.die()
    adopted = adopt(puppet)
    assert {key: entry.value for key, entry in adopted.entries.items()} == {"a": b"a", "b": b"b"}
    adopted.abandon()


def test_more_descriptors_put_together_are_adopted(puppet: Puppet) -> None:
    """With the latest value of each."""
    puppet.start()
    for key in ("a", "b"):
        puppet.worker(key, *PLAIN)
    put = """
with guard.together():
    for key in ("a", "b"):
        guard.update(key, b"older")
        entry = guard.entries[key]
        guard.put(key, key.encode(), [*entry.fds, control.fileno()], entry.group)
"""
    puppet.do(f"exec({put!r})")
    serials = {key: puppet.do(f"serials(guard.entries[{key!r}].fds)") for key in ("a", "b")}
    puppet.die()
    adopted = adopt(puppet)
    for key, entry in adopted.entries.items():
        assert entry.value == key.encode()
        found = [os.fstat(fd) for fd in entry.fds]
        assert [[each.st_dev, each.st_ino] for each in found] == serials[key]
    adopted.abandon()
