"""Bad luck is not fatal: what fails is said once, tried again, and ends nobody's life."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from steer.errors import ControlError, KernelError
from steer.linux.spare import Spare
from steer.loader import compile as compiling
from testkit.confine import as_user
from testkit.fixtures import StartService
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, descriptors, eventually, line_of
from testkit.processes import running as running_process
from testkit.programs import source
from testkit.service import STEER, Service, launch

PORT = 8080
ALONE = 30_000 + os.getpid() % 10_000
"""A user nobody else is, as a limit counts all processes of a user."""


# Pure enough: what fails on the n-th call


@contextmanager
def limit_on_files(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_spare_descriptors_are_there_when_no_others_are() -> None:
    spare = Spare(3)
    with ExitStack() as taken:
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        with limit_on_files(lowest):
            with pytest.raises(OSError, match="Too many open files"):
                os.pipe()
            with spare.lent(), spare.lent():
                for fd in os.pipe():
                    taken.callback(os.close, fd)
            # Two of the three are used for longer; the last is kept again.
            with pytest.raises(OSError, match="Too many open files"):
                os.open(os.devnull, os.O_RDONLY)
            with spare.lent():
                os.close(os.open(os.devnull, os.O_RDONLY))
    spare.close()


def test_spare_descriptors_stay_open_where_there_is_room() -> None:
    if not os.stat("/proc/self/fd").st_size:
        pytest.skip("before Linux 6.2 the kernel does not tell how many are open")
    before = fds(os.getpid())
    spare = Spare(3)
    kept = [fd for fd in fds(os.getpid()) if fd not in before]
    with spare.lent():
        assert set(kept) <= set(fds(os.getpid()))
    with limit_on_files(max(kept) + 2), spare.lent():
        assert not set(kept) & set(fds(os.getpid()))
    spare.close()


# Real limits


def limit_files(pid: int, soft: int) -> tuple[int, int]:
    """The limits before."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, before[1]))
    return before


def fds(pid: int) -> list[int]:
    return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


def scarce(pid: int) -> int:
    """The limit at which a controller can open little but in place of what it keeps to spare.

    The highest of some looks: in between those are lent.
    """

    def look() -> int:
        kept = (fd for fd, target in descriptors(pid).items() if target == os.devnull)
        return max(kept, default=0)

    return 1 + max(look() for _ in range(50))


APP = """
def serve(worker):
    while not worker.stopping:
        client, _ = worker.sockets[0].accept()
        with client:
            client.recv(100)
            client.sendall(b"done")
"""


@pytest.fixture
def three(service: StartService, home: Path) -> Service:
    (home / "app.py").write_text(APP)
    return service("app:serve", "-w", "3", "--policy", "hash", "-b", f"127.0.0.1:{PORT}")


def ask() -> bytes:
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(b"?")
        return sock.recv(100)


def ready(running: Service) -> int:
    return [each["state"] for each in running.workers()].count("ready")


def test_worker_is_replaced_though_the_controller_may_open_nothing(three: Service) -> None:
    """By what it kept; and the control socket is answered."""
    limit_files(three.pid, scarce(three.pid))
    for _ in range(3):
        pid = three.workers()[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: pid not in {each["pid"] for each in three.workers()})
        eventually(lambda: ready(three), 3)
        assert ask() == b"done"
    assert "bug in steer" not in three.log
    assert three.stop() == 0


def test_hang_is_seen_though_the_controller_may_open_nothing(
    service: StartService, home: Path
) -> None:
    (home / "app.py").write_text(APP)
    running = service("app:serve", "-w", "2", "--hang-timeout", "0.2", "--graceful-timeout", "1",
                      "--policy", "round-robin", "-b", f"127.0.0.1:{PORT}")  # fmt: skip
    limit_files(running.pid, scarce(running.pid))
    stopped = running.workers()[0]["pid"]
    os.kill(stopped, signal.SIGSTOP)
    with ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(socket.create_connection(("127.0.0.1", PORT), DEADLINE_S))
        eventually(lambda: "is hung: its accept queue is not draining" in running.log)
        eventually(lambda: stopped not in {each["pid"] for each in running.workers()})
    eventually(lambda: ready(running), 2)
    assert "bug in steer" not in running.log


def test_nothing_is_lost_for_good_when_not_even_the_spare_ones_can_be_used(
    three: Service,
) -> None:
    """For a while nothing at all can be opened: no worker started, none looked at, nobody
    answered. Then all goes on."""
    pids = [each["pid"] for each in three.workers()]
    before = limit_files(three.pid, 3)
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: "Too many open files" in three.log)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(ControlError):
        three.ask("status", timeout_s=1.0)
    assert ask() == b"done"
    told = [line.split("] ", 3)[-1] for line in three.log.splitlines() if "Too many open" in line]
    assert len(told) == len(set(told)), "each is said once"
    resource.prlimit(three.pid, resource.RLIMIT_NOFILE, before)
    eventually(lambda: three.process.poll() is None and _answers(three))
    eventually(lambda: ready(three), 3)
    assert "bug in steer" not in three.log
    three.ask("reload")
    assert three.stop() == 0


def test_service_ends_though_its_controller_may_open_nothing_at_all(three: Service) -> None:
    limit_files(three.pid, 3)
    three.send_signal(signal.SIGQUIT)
    assert three.wait() == 0


def _answers(running: Service) -> bool:
    try:
        running.status()
    except ControlError:
        return False
    return True


def test_askers_that_wait_are_limited_in_number(three: Service, home: Path) -> None:
    """Each waits for its turn behind a reload that does not come to an end."""
    (home / "app.py").write_text("import time\ntime.sleep(600)")
    with ExitStack() as stack:
        refused = 0
        for _ in range(300):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(str(three.control_socket))
            with suppress(BrokenPipeError):  # it was refused before it had asked
                sock.sendall(b'{"command": "reload"}\n')
        eventually(lambda: len(fds(three.pid)) < 150)
        sock.settimeout(DEADLINE_S)
        refused = sock.recv(1000).count(b"requests are under way")
        assert refused == 1
    eventually(lambda: len(fds(three.pid)) < 150)
    assert three.stop(signal.SIGQUIT) == 0


@pytest.mark.needs("nobody")
def test_process_that_cannot_be_forked_is_forked_later(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    """The limit is on all of a user's, and others of the user's take what there is."""
    (home / "app.py").write_text(APP)
    limited = ("prlimit", "--nproc=30:30", STEER, "run", "--name", "test", "-w", "2", "app:serve")
    command = as_user(ALONE, *limited, "-b", f"127.0.0.1:{PORT}")
    process = launch(command, environment=environment, home=home, records=home)
    running = Service(process, "test", home, home, environment)
    try:
        running.wait_ready()
        others = as_user(ALONE, "sh", "-c", "for i in $(seq 30); do sleep 600 & done; echo; wait")
        with running_process(*others) as sleepers:
            line_of(sleepers)
            os.kill(running.workers()[0]["pid"], signal.SIGKILL)
            eventually(lambda: "Resource temporarily unavailable; raise the limit" in running.log)
            with pytest.raises(ControlError, match="Resource temporarily unavailable"):
                running.ask("restart", slot=1)
            assert ask() == b"done"
        eventually(lambda: ready(running), 2)
        assert "bug in steer" not in running.log
    finally:
        running.clean_up()


@pytest.mark.needs("root")
def test_full_disk_keeps_nothing_of_the_cache(tmp_path: Path) -> None:
    """In a mount namespace of its own, with a disk of 4 KiB."""
    script = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from steer.policy.bytecode import PolicyObject
        from steer.loader import compile
        cache = Path(os.environ["XDG_CACHE_HOME"], "steer")
        large = PolicyObject("0" * 64, "compiler" * 10_000, {}, {})
        for number in range(5):
            compile._store(f"{number:064x}", large)
        print(os.listdir(cache))
        compile._store("f" * 64, PolicyObject("0" * 64, "compiler", {}, {}))
        print(os.listdir(cache))
        """
    )
    mount = 'mount -t tmpfs -o size=16k none "$0" && exec "$@"'
    command = ("unshare", "-m", "sh", "-c", mount, str(tmp_path), sys.executable, "-c", script)
    done = subprocess.run(
        command,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout == f"[]\n['{'f' * 64}.json']\n", done.stderr


def test_compiler_that_cannot_be_started_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "interpreters", lambda: [str(tmp_path / "none")])
    source = tmp_path / "mine.c"
    source.write_text("int x;")
    with pytest.raises(KernelError, match=r"compile mine.c: start .*: No such file or directory"):
        compiling.compile_source(source)


# What fails inside: whatever it is, another worker is started

SITE = source("site_that_fails")
BREAKS = [
    ("steer.workers.selection Selection.remove_sockets", "OSError 1 1"),
    ("steer.workers.selection Selection.release_slot", "MemoryError 1 1"),
    ("steer.workers.selection Selection.take_slot", "OSError 1 1"),
    ("steer.workers.selection Selection.add_sockets", "ZeroDivisionError 1 1"),
    ("steer.workers.stored_selection SelectionEntry.save", "OSError 1 2"),
    ("steer.backends.ebpf Ebpf.steer", "OSError 1 2"),
    ("steer.workers.handle WorkerHandle.got_ready", "MemoryError 1 1"),
    ("steer.workers.handle WorkerHandle.lost_process", "ZeroDivisionError 1 1"),
    ("steer.workers.standard_error StandardError.read_out", "OSError 1 1"),
    ("steer.workers.process fork_all", "MemoryError 1 2"),
    ("steer.workers.process WorkerProcess.prepare", "MemoryError 1 2"),
    ("steer.workers.process WorkerProcess.forked", "MemoryError 1 2"),
    ("steer.workers.process WorkerProcess.keep", "MemoryError 1 2"),
    ("steer.workers.process WorkerProcess.watch", "OSError 1 1"),
    ("steer.linux.fork reap", "ZeroDivisionError 1 1"),
    ("steer.guard.client GuardClient.drop", "OSError 1 1"),
    ("steer.linux.family others", "OSError 1 2"),
    ("steer.workers.lifecycle backoff_s", "MemoryError 1 1"),
    ("steer.health.readiness Readiness._look_at_start", "OSError 1 3"),
]


@pytest.mark.parametrize("where, how", BREAKS, ids=[where.split()[1] for where, _ in BREAKS])
def test_another_is_started_whatever_fails(
    service: StartService, home: Path, environment: dict[str, str], where: str, how: str
) -> None:
    (home / "app.py").write_text(APP)
    (home / "sitecustomize.py").write_text(SITE)
    environment |= {"PYTHONPATH": str(home), "FAILS": f"{where} {how}"}
    running = service("app:serve", "-w", "2", "--policy", "hash", "-b", f"127.0.0.1:{PORT}")
    killed = running.workers()[0]["pid"]
    (home / "armed").write_text(str(running.pid))
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in {each["pid"] for each in running.workers()})
    eventually(lambda: ready(running), 2)
    assert {ask() for _ in range(20)} == {b"done"}
    assert (home / "failed").exists()
    if "ZeroDivisionError" not in how:
        assert "bug in steer" not in running.log
    restarted = running.ask("restart", slot=running.workers()[0]["slot"])
    assert restarted["ok"]
    assert running.stop() == 0


LACKS = {
    "memory": ("steer.controller.start Start._announce MemoryError", "out of memory"),
    "memory, in a thread": (
        "steer.controller.loop_import importlib.import_module MemoryError",
        "out of memory",
    ),
    "threads": (
        "steer.linux.threads threading.Thread.start RuntimeError",
        "no more threads; raise the limit on processes (ulimit -u, TasksMax=) or on memory",
    ),
    "something": (
        "steer.controller.controller Controller.make_pool OSError",
        "Cannot allocate memory",
    ),
}


@pytest.mark.parametrize("what, words", LACKS.values(), ids=LACKS)
def test_what_the_machine_lacks_for_a_start_is_said_in_a_line(
    service: StartService, home: Path, environment: dict[str, str], what: str, words: str
) -> None:
    (home / "sitecustomize.py").write_text(SITE)
    environment |= {"PYTHONPATH": str(home), "FAILS": f"{what} 1 1"}
    under = ("sh", "-c", 'echo $$ > armed; exec "$@"', "sh")
    running = service("-w", "1", ready=False, under=under)
    assert running.wait() == 1
    last = running.log.splitlines()[-1]
    assert (last.startswith("steer: "), last.endswith(words)) == (True, True), last
    assert "Traceback" not in running.log
