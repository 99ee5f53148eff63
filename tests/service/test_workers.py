"""Workers from start to end: what they are given, how they stop, what follows when they fail."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from steer.workers.lifecycle import Event
from testkit import ROOT
from testkit.clients import udp_ask
from testkit.confine import NOBODY
from testkit.fixtures import RunSteer, StartService
from testkit.harness import CPUS
from testkit.processes import DEADLINE_S, channel_of, descriptors, eventually, is_running
from testkit.programs import source
from testkit.service import STEER, Service

PORT = 8080
EXAMPLES = ROOT / "examples"
APP = source("workers_of_all_kinds")


@pytest.fixture(autouse=True)
def application(home: Path) -> None:
    (home / "app.py").write_text(APP)


def ask(port: int = PORT) -> dict[str, Any]:
    sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    with sock, sock.makefile("rb") as stream:
        found: dict[str, Any] = json.loads(stream.read())
        return found


def proc_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def freeze(pid: int) -> None:
    """Until it stands still: of two signals on their way the later could come first."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: proc_status(pid)["State"][0], "T")


def is_pending(pid: int, number: int) -> bool:
    return bool(int(proc_status(pid)["ShdPnd"], 16) >> (number - 1) & 1)


# What a worker is given


def test_callable_gets_the_worker(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "1", "--policy", "hash", "-b", f"127.0.0.1:{PORT}",
                      "-b", "127.0.0.1:8081", name="two")  # fmt: skip
    found, (worker,) = ask(), running.workers()
    assert found["pid"] == worker["pid"]
    assert (found["slot"], found["name"], found["generation"]) == (0, "two", 1)
    assert found["cpus"] == list(CPUS) == worker["cpus"]
    assert found["stopping"] is False
    assert found["names"] == [["127.0.0.1", PORT], ["127.0.0.1", 8081]]


def test_command_gets_the_protocol_of_systemd(service: StartService, home: Path) -> None:
    script = str(home / "app.py")
    running = service("-w", "1", "-b", f"127.0.0.1:{PORT}", "-b", "udp://127.0.0.1:53", "--",
                      sys.executable, script, "{fd}", "slot={slot}", "{port}", "{fd1}", "{port1}",
                      "{other}")  # fmt: skip
    found, (worker,) = ask(), running.workers()
    assert found["pid"] == worker["pid"]
    assert found["argv"] == [script, "3", "slot=0", str(PORT), "4", "53", "{other}"]
    environment = found["env"]
    assert environment["LISTEN_FDS"] == "2"
    assert environment["LISTEN_PID"] == str(worker["pid"])
    assert environment["LISTEN_FDNAMES"] == f"tcp-{PORT}:udp-53"


def test_everyone_gets_the_environment(service: StartService, environment: dict[str, str]) -> None:
    environment |= {"LISTEN_FDS": "7", "LISTEN_PID": "1", "NOTIFY_SOCKET": "/nowhere", "KEPT": "1"}
    arguments = ("-w", "1", "--policy", "cpu", "-e", "A=b=c", "-e", "STEER_SLOT=99")
    running = service("app:serve", *arguments)
    found = ask()["env"]
    (worker,) = running.workers()
    assert found["STEER_SLOT"] == "0"
    assert found["STEER_NAME"] == "test"
    assert found["STEER_CPUS"] == str(worker["cpus"][0])
    assert found["NOTIFY_SOCKET"].startswith("@steer-")
    assert (found["A"], found["KEPT"]) == ("b=c", "1")
    assert not {"LISTEN_FDS", "LISTEN_PID"} & found.keys()


def test_each_is_pinned_to_its_cpu(service: StartService) -> None:
    running = service("app:serve", "-w", str(len(CPUS)), "--policy", "cpu")
    workers = running.workers()
    assert [each["cpus"] for each in workers] == [[cpu] for cpu in CPUS]
    assert [sorted(os.sched_getaffinity(each["pid"])) for each in workers] == [[c] for c in CPUS]


def test_chdir_comes_before_the_application(service: StartService, home: Path) -> None:
    (home / "elsewhere").mkdir()
    (home / "app.py").rename(home / "elsewhere" / "app.py")
    service("app:serve", "-w", "1", "--chdir", "elsewhere")
    assert ask()["cwd"] == str(home / "elsewhere")


@pytest.mark.parametrize("way", ["callable", "command"])
def test_inherits_no_descriptor_but_its_sockets_and_channel(
    service: StartService, home: Path, way: str
) -> None:
    command = ("--", sys.executable, str(home / "app.py"), "{fd}")
    what = command if way == "command" else ("app:serve",)
    running = service("-w", "3", "-b", f"127.0.0.1:{PORT}", "-b", "[::1]:8081", *what)
    for worker in running.workers():
        files = descriptors(worker["pid"])
        sockets = {files.pop(fd) for fd in list(files) if fd > 2}
        listeners = {f"socket:[{inode}]" for inode in worker["sockets"]}
        assert sockets == {*listeners, channel_of(worker["pid"])}
        assert set(files) == {0, 1, 2}


@pytest.mark.needs("root")
@pytest.mark.parametrize("way", ["callable", "command"])
def test_runs_as_another_user_on_a_privileged_port(
    service: StartService, home: Path, way: str
) -> None:
    command = ("--", sys.executable, str(home / "app.py"), "{fd}")
    what = command if way == "command" else ("app:serve",)
    bind = ("-b", "127.0.0.1:80", "--adopt-timeout=0")
    running = service("-u", str(NOBODY), "-w", "2", *bind, *what)
    pids = [each["pid"] for each in running.workers()]
    for pid in pids:
        found = proc_status(pid)
        assert found["Uid"].split() == [str(NOBODY)] * 4
        assert found["Gid"].split() == [str(NOBODY)] * 4
        assert set(found["Groups"].split()) <= {str(NOBODY)}
        assert int(found["CapEff"], 16) == int(found["CapPrm"], 16) == 0
    assert ask(80)["pid"] in pids
    assert proc_status(running.pid)["Uid"].split()[0] == "0"

    # prctl(2): a change of user takes back the wish to be told when the parent ends.
    running.send_signal(signal.SIGKILL)
    for pid in pids:
        eventually(lambda pid=pid: not is_running(pid))


@pytest.mark.needs("nobody")
def test_another_user_needs_root(steer: RunSteer) -> None:
    done = steer("run", "--user", "root", user=NOBODY)
    assert done.returncode == 1
    assert done.stderr == "steer: run workers as another user: EPERM; run steer as root\n"


# How it stops


def arguments_of(example: str) -> list[str]:
    """As its head comment says."""
    text = (EXAMPLES / f"{example}.py").read_text()
    match = re.search(r"Run: +cd examples && steer run (.+)", text)
    assert match
    return [*shlex.split(match[1]), "--chdir", str(EXAMPLES)]


def test_loop_of_accept_serves_what_is_queued_before_it_ends(service: StartService) -> None:
    running = service(*arguments_of("upper_tcp"), "-w", "1")
    (worker,) = running.workers()
    freeze(worker["pid"])
    clients = [socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) for _ in range(3)]
    for client in clients:
        client.sendall(b"hello\n")
        client.shutdown(socket.SHUT_WR)
    running.send_signal(signal.SIGTERM)
    eventually(lambda: is_pending(worker["pid"], signal.SIGTERM))
    os.kill(worker["pid"], signal.SIGCONT)

    for client in clients:
        with client, client.makefile("rb") as stream:
            assert stream.read() == b"HELLO\n"
    assert running.wait() == 0
    assert "WARNING" not in running.log


def test_loop_of_recvfrom_answers_what_is_queued_before_it_ends(service: StartService) -> None:
    running = service(*arguments_of("upper_udp"), "-w", "1")
    (worker,) = running.workers()
    freeze(worker["pid"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(DEADLINE_S)
        client.connect(("127.0.0.1", 8053))
        for text in (b"one", b"two", b"three"):
            client.send(text)
        running.send_signal(signal.SIGTERM)
        eventually(lambda: is_pending(worker["pid"], signal.SIGTERM))
        os.kill(worker["pid"], signal.SIGCONT)
        assert [client.recv(100) for _ in range(3)] == [b"ONE", b"TWO", b"THREE"]
    assert running.wait() == 0
    assert "WARNING" not in running.log


def worker_pids(running: Service) -> list[int]:
    return [each["pid"] for each in running.workers()]


@pytest.mark.parametrize("numbers", [("SIGTERM", "SIGTERM"), ("SIGINT",), ("SIGQUIT",)])
def test_ends_quickly(service: StartService, numbers: tuple[str, ...]) -> None:
    running = service("app:stays", "-w", "2", "--graceful-timeout", "86400")
    for number in numbers:
        running.send_signal(signal.Signals[number])
        eventually(lambda: "stopping " in running.log)
    assert running.wait() == 0
    assert "stopping quickly" in running.log
    assert ("stopping gracefully" in running.log) == (len(numbers) == 2)


def test_is_killed_when_its_time_to_finish_is_over(service: StartService) -> None:
    running = service("app:stays", "-w", "2", "--graceful-timeout", "0.2")
    assert running.stop() == 0
    assert running.log.count(Event.OVERDUE.value) == 2


def test_answers_the_request_under_way(service: StartService, home: Path) -> None:
    running = service("app:holds", "-w", "1")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        eventually((home / "under-way").exists)
        running.send_signal(signal.SIGTERM)
        eventually((home / "stopping").exists)
        assert running.process.poll() is None
        (home / "go").touch()
        assert sock.recv(100) == b"done"
    assert running.wait() == 0
    assert "WARNING" not in running.log


def test_stop_while_most_have_not_started_yet(service: StartService) -> None:
    running = service("-w", "100", ready=False)
    eventually(lambda: "100 workers" in running.log)
    assert running.stop() == 0


def test_controller_that_is_killed_takes_its_workers_with_it(
    service: StartService, home: Path
) -> None:
    a = service("app:serve", "-w", "2", "--adopt-timeout=0", name="a")
    bind = ("-b", "127.0.0.1:8081", "--adopt-timeout=0")
    b = service("-w", "2", *bind, "--", sys.executable, str(home / "app.py"),
                "{fd}", name="b")  # fmt: skip
    pids = worker_pids(a) + worker_pids(b)
    for running in (a, b):
        running.send_signal(signal.SIGKILL)
        running.wait()
    eventually(lambda: not any(map(is_running, pids)))

    again = service("app:serve", "-w", "1", name="a")
    assert ask()["pid"] in worker_pids(again)


# When it fails


def test_one_that_dies_is_started_again_in_a_fresh_socket_and_slot(service: StartService) -> None:
    running = service("app:serve", "-w", "2", "--policy", "hash")
    dead, other = running.workers()
    os.kill(dead["pid"], signal.SIGKILL)
    eventually(lambda: not is_running(dead["pid"]))
    running.wait_ready()

    fresh, same = running.workers()
    assert same["pid"] == other["pid"]
    assert fresh["pid"] != dead["pid"]
    assert fresh["slot"] not in (dead["slot"], other["slot"])
    assert fresh["sockets"] != dead["sockets"]
    assert (fresh["restarts"], same["restarts"]) == (1, 0)
    assert f"worker 0 (pid {dead['pid']}): killed by SIGKILL" in running.log
    assert {ask()["slot"] for _ in range(40)} == {fresh["slot"], other["slot"]}


def test_one_killed_by_a_signal_without_a_name_is_started_again(service: StartService) -> None:
    running = service("app:serve", "-w", "1")
    (dead,) = running.workers()
    os.kill(dead["pid"], signal.SIGRTMIN + 5)
    eventually(lambda: not is_running(dead["pid"]))
    running.wait_ready()
    assert f"killed by signal {signal.SIGRTMIN + 5}" in running.log


def test_failing_again_and_again_waits_longer_each_time(service: StartService, home: Path) -> None:
    running = service("app:dies_where_broken", "-w", "2", "--policy", "hash")
    dead, other = running.workers()
    (home / "broken").touch()
    os.kill(dead["pid"], signal.SIGKILL)

    eventually(lambda: "another in 1 s" in running.log)
    waited = re.findall(r"failed again; another in (\S+) s", running.log)
    assert waited[:3] == ["0.25", "0.5", "1"]
    assert "out of order" in running.log
    assert eventually(lambda: running.workers()[0]["state"], "backoff") == "backoff"
    assert running.workers()[0]["pid"] is None
    assert {ask()["pid"] for _ in range(20)} == {other["pid"]}

    (home / "broken").unlink()
    running.wait_ready()
    assert running.workers()[0]["restarts"] >= 4


def test_one_that_cannot_be_loaded_again_says_why(service: StartService, home: Path) -> None:
    running = service("app:serve", "-w", "2")
    (home / "app.py").write_text("import no_such_module\n")
    os.kill(running.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: "No module named 'no_such_module'" in running.log)
    assert ask()["pid"] == running.workers()[1]["pid"]


def test_all_that_fail_to_start_are_heard(service: StartService) -> None:
    script = "echo first words >&2; echo last words >&2; exit 7"
    running = service("-w", "3", "--", "sh", "-c", script, ready=False)
    assert running.wait() == 3
    end = running.log[running.log.index("steer: ") :]
    assert end == "steer: start workers: exit status 7\n  | first words\n  | last words\n"


def test_one_that_is_not_ready_in_time_is_said_so(service: StartService) -> None:
    running = service("-w", "1", "--ready-timeout", "0.3", "--", "sh", "-c",
                      "echo waiting >&2; exec sleep 1000", ready=False)  # fmt: skip
    assert running.wait() == 3
    assert "steer: start workers: not ready within 0.3 s; see ready_timeout" in running.log
    assert "  | waiting" in running.log


def test_its_children_do_not_outlive_it(service: StartService) -> None:
    running = service("app:has_children", "-w", "1")
    found = ask()
    os.kill(found["pid"], signal.SIGKILL)
    eventually(lambda: not any(map(is_running, found["children"])))
    running.wait_ready()


def test_client_that_is_gone_does_not_end_it(service: StartService) -> None:
    """Python's own servers rely on EPIPE, and on SIGPIPE being ignored."""
    running = service("app:chatters", "-w", "1")
    for _ in range(3):
        socket.create_connection(("127.0.0.1", PORT), DEADLINE_S).close()
    eventually(lambda: running.output.count("Error\n"), 3)
    assert "BrokenPipeError" in running.output
    assert running.workers()[0]["restarts"] == 0


def test_command_is_started_with_signals_as_they_should_be(service: StartService) -> None:
    """A command that does not look for EPIPE would never end."""
    command = ("grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status")
    running = service("-w", "1", "--", *command, ready=False)
    assert running.wait() == 3
    assert set(re.findall(r"\w{16}", running.output)) == {"0" * 16}


@pytest.mark.parametrize("policy", ["hash", "cpu"])
def test_application_that_raises_shows_its_own_traceback(
    service: StartService, home: Path, policy: str
) -> None:
    (home / "raises.py").write_text("def serve(worker):\n    worker.no_such_attribute\n")
    running = service("raises:serve", "-w", "1", "--policy", policy, ready=False)
    assert running.wait() == 3
    assert "AttributeError: 'Worker' object has no attribute 'no_such_attribute'" in running.log
    assert f'File "{home}/raises.py", line 2, in serve' in running.log


# When it cannot be loaded

UNLOADABLE = {
    "no_such_module:app": "ModuleNotFoundError: No module named 'no_such_module'\n",
    "app:missing": "AttributeError: module 'app' has no attribute 'missing'\n",
    "app:Path.missing": "AttributeError: type object 'Path' has no attribute 'missing'\n",
    "app:APP": "APP is not callable\n",
    "raises:app": "ZeroDivisionError: division by zero\n"
    "  | {home}/raises.py:4: broken()\n  | {home}/raises.py:3: 1 / 0\n",
    "imports:app": "ModuleNotFoundError: No module named 'no_such_module'\n"
    "  | {home}/imports.py:1: import no_such_module\n",
    "exits:app": "SystemExit: 3\n  | {home}/exits.py:2: sys.exit(3)\n",
    "syntax:app": "SyntaxError: invalid syntax (syntax.py, line 2)\n"
    "  | {home}/syntax.py:2: 1 +* 1\n",
    "huge:app": "ValueError: " + "x" * 1000,
    "odd:app": "ValueError: \\udcff\n",
}


@pytest.mark.parametrize("app", UNLOADABLE)
def test_application_that_cannot_be_loaded(service: StartService, home: Path, app: str) -> None:
    (home / "app.py").write_text(APP + "\nAPP = 1\n")
    (home / "raises.py").write_text("\ndef broken():\n    1 / 0\nbroken()\n")
    (home / "imports.py").write_text("import no_such_module\n")
    (home / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (home / "syntax.py").write_text("\n1 +* 1\n")
    (home / "huge.py").write_text("raise ValueError('x' * 1_000_000)\n")
    (home / "odd.py").write_text("raise ValueError('\\udcff')\n")
    running = service(app, "-w", "2", ready=False)
    assert running.wait() == 4
    assert f"steer: load {app}: {UNLOADABLE[app].format(home=home)}" in running.log
    assert "Traceback" not in running.log
    assert "bug" not in running.log


@pytest.mark.parametrize(
    "command, why",
    [
        ("no-such-command", "No such file or directory"),
        ("./directory", "Permission denied"),
        (
            "./not-executable",
            "Permission denied; {user} may not execute {home}/not-executable (mode 0644); "
            "chmod a+x {home}/not-executable",
        ),
        ("./garbage", "Exec format error"),
    ],
)
def test_command_that_cannot_be_run(
    service: StartService, home: Path, command: str, why: str
) -> None:
    (home / "directory").mkdir()
    (home / "not-executable").touch(mode=0o644)
    (home / "garbage").write_bytes(b"\x00\x01")
    (home / "garbage").chmod(0o755)
    running = service("-w", "2", "--", command, ready=False)
    assert running.wait() == 4
    why = why.format(home=home, user=pwd.getpwuid(os.geteuid()).pw_name)
    assert f"steer: start test: run {command}: {why}\n" in running.log
    assert "Traceback" not in running.log


@pytest.mark.needs("uvicorn")
def test_command_that_is_only_beside_steer(
    service: StartService, steer: RunSteer, environment: dict[str, str]
) -> None:
    """In its virtual environment, which is not activated."""
    directory = Path(STEER).parent
    elsewhere = [each for each in environment["PATH"].split(":") if each != str(directory)]
    environment["PATH"] = ":".join(elsewhere)
    running = service("-w", "2", "--", "uvicorn", "app:app", ready=False)
    assert running.wait() == 4
    cure = f"; it is in {directory}, which is not on PATH: write {directory}/uvicorn\n"
    assert f"steer: start test: run uvicorn: No such file or directory{cure}" in running.log
    done = steer("check", "--", "uvicorn", "app:app")
    assert (done.returncode, done.stderr) == (4, f"steer: run uvicorn: no such command{cure}")


@pytest.mark.needs("nobody")
def test_steer_that_its_workers_cannot_reach(
    service: StartService, home: Path, environment: dict[str, str]
) -> None:
    """As where it is installed below /root: what a worker imports is imported before."""
    (home / "answers.py").write_text("def serve(worker): worker.sockets[0].accept()")
    private = home / "private"
    private.mkdir(mode=0o700)
    shutil.copytree(ROOT / "steer", private / "steer")
    environment["PYTHONPATH"] = str(private)
    running = service("answers:serve", "-w", "1", "--user", "nobody", "--policy=kernel")
    assert len(running.workers()) == 1


@pytest.mark.parametrize("where", ["nowhere", "app.py"])
def test_directory_that_cannot_be_entered(service: StartService, where: str) -> None:
    running = service("app:serve", "-w", "1", "--chdir", where, ready=False)
    assert running.wait() == 4
    assert f"steer: load app:serve: chdir {where}: No" in running.log


def test_callable_found_below_an_attribute(service: StartService, home: Path) -> None:
    (home / "nested.py").write_text("class Site:\n    from app import serve\n")
    service("nested:Site.serve", "-w", "1")
    assert ask()["slot"] == 0


def test_demo_over_udp(service: StartService) -> None:
    running = service("-w", "1", "-b", f"udp://127.0.0.1:{PORT}")
    assert udp_ask("127.0.0.1", PORT)["pid"] == worker_pids(running)[0]
