"""What can go wrong around a service: ports, limits, privileges, files.

It is said in one line, with an exit status of the contract, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from steer.linux import processes
from steer.loader import libbpf
from testkit.clients import http_get, udp_ask
from testkit.confine import NOBODY, as_user
from testkit.fixtures import RunSteer, StartService
from testkit.namespaces import Netns
from testkit.processes import DEADLINE_S, eventually, session
from testkit.programs import source
from testkit.service import STEER, Service, launch

PORT = 8080
ALONE = 40_000 + os.getpid() % 20_000
"""A user nobody else is, for limits that count a user's processes."""
APP = source("unlucky")


@pytest.fixture(autouse=True)
def named(environment: dict[str, str]) -> None:
    """As no service of this machine's is, to be asked who has the name."""
    environment["STEER_NAME"] = "test"


def free(port: int = PORT) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def started(
    *command: str, environment: dict[str, str], home: Path, name: str = "test"
) -> Iterator[Service]:
    """A command that becomes `steer run`, by way of something else."""
    process = launch(command, environment=environment, home=home, records=home)
    running = Service(process, name, home, home, environment)
    try:
        yield running
    finally:
        running.clean_up()


# Ports that somebody has


@contextmanager
def holder(kind: str, address: str = "127.0.0.1", user: int | None = None) -> Iterator[int]:
    """Another program on the port; its process id."""
    udp, reuse = kind.startswith("udp"), kind.endswith("reuseport")
    script = (
        "import socket, sys;"
        f"s = socket.socket({10 if ':' in address else 2}, {2 if udp else 1});"
        f"s.setsockopt(1, 15, {int(reuse)}); s.setsockopt(1, 2, 1);"
        f"s.bind(({address!r}, {PORT})); {'pass' if udp else 's.listen()'};"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        as_user(user, "/usr/bin/python3", "-Ic", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("kind", ["tcp", "tcp, reuseport", "udp", "udp, reuseport"])
@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("127.0.0.1", f"127.0.0.1:{PORT}"),
        ("0.0.0.0", f"127.0.0.1:{PORT}"),
        ("127.0.0.1", f":{PORT}"),
        ("::1", f"[::1]:{PORT}"),
        ("::", f"[::1]:{PORT}"),
        ("::", f"127.0.0.1:{PORT}"),
    ],
)
def test_port_that_somebody_has(steer: RunSteer, kind: str, theirs: str, ours: str) -> None:
    """With SO_REUSEPORT a process of the same user would be joined without a word."""
    protocol = kind[:3]
    with holder(kind, theirs) as pid:
        for command in ("run", "check"):
            done = steer(command, "-b", f"{protocol}://{ours}")
            assert done.returncode == 1
            assert f"EADDRINUSE, in use by python3 (pid {pid}); stop it, or" in done.stderr
            assert done.stderr.startswith(f"steer: bind {protocol} ")
            assert done.stderr.count("\n") == 1


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("kind", ["tcp", "tcp, reuseport", "udp, reuseport"])
def test_port_that_another_user_has(steer: RunSteer, kind: str) -> None:
    bind = ("-b", f"{kind[:3]}://127.0.0.1:{PORT}")
    with holder(kind, user=NOBODY) as pid:
        assert f"in use by python3 (pid {pid}); " in steer("run", *bind).stderr
    with holder(kind):
        done = steer("run", *bind, user=NOBODY)
        assert done.returncode == 1
        assert "in use by a process of uid 0 that cannot be seen from here; " in done.stderr


def test_port_that_another_service_has(service: StartService) -> None:
    running = service("-w", "2")
    done = running.steer("run", "--name", "other", "-w", "2")
    named = {
        pid: Path(f"/proc/{pid}/comm").read_text() for pid in processes.descendants(running.pid)
    }
    holders = ", ".join(sorted(f"{name.strip()} (pid {pid})" for pid, name in named.items()))
    assert done.returncode == 1
    assert done.stderr == (
        f"steer: bind tcp 127.0.0.1:{PORT}: EADDRINUSE, in use by {holders}, "
        "of service 'test'; `steer stop test`, or choose another port\n"
    )
    assert {http_get("127.0.0.1", PORT)[1]["name"] for _ in range(20)} == {"test"}


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a")])
def test_of_two_that_start_at_the_same_moment_one_wins(
    service: StartService, names: tuple[str, str]
) -> None:
    for _ in range(4):
        both = [service("-w", "2", name=name, ready=False) for name in names]
        eventually(lambda both=both: [one for one in both if one.process.poll() is not None])
        loser, winner = sorted(both, key=lambda one: one.process.poll() is None)
        winner.wait_ready()
        assert loser.wait() == 1
        reason = "EADDRINUSE, in use by " if len({*names}) == 2 else "is running (pid "
        assert reason in loser.log
        assert len(winner.workers()) == 2
        assert winner.stop() == 0


def test_port_taken_while_all_workers_were_down_is_not_joined(
    service: StartService, home: Path
) -> None:
    (home / "app.py").write_text(APP)
    # On ebpf the backup listener keeps it.
    running = service("app:serve", "-w", "1", "--backend", "cbpf")
    (home / "broken").touch()
    os.kill(running.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: "another in 0.25 s" in running.log)
    with holder("tcp, reuseport") as pid:
        (home / "broken").unlink()
        eventually(lambda: f"EADDRINUSE, in use by python3 (pid {pid})" in running.log)
        assert running.workers()[0]["state"] == "backoff"
    running.wait_ready()


def test_connections_of_the_last_run_are_no_obstacle(service: StartService) -> None:
    """The side that closes first keeps the port in TIME_WAIT for a minute (RFC 9293, 3.6)."""
    first = service("-w", "1")
    with socket.create_connection(("127.0.0.1", PORT), DEADLINE_S) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with sock.makefile("rb") as stream:
            stream.read()
    first.stop()
    assert " 06 " in Path("/proc/net/tcp").read_text()
    service("-w", "1")
    assert http_get("127.0.0.1", PORT)[1]["slot"] == 0


# Addresses


@pytest.mark.needs("nobody")
def test_privileged_port_without_privilege(steer: RunSteer) -> None:
    done = steer("run", "-b", ":80", user=NOBODY)
    assert done.returncode == 1
    assert done.stderr.startswith("steer: bind tcp 0.0.0.0:80: EACCES; ports below ")
    assert "CAP_NET_BIND_SERVICE" in done.stderr


def test_address_that_is_not_on_this_machine(steer: RunSteer) -> None:
    done = steer("run", "-b", "192.0.2.1:80")
    assert done.returncode == 1
    words = "steer: bind tcp 192.0.2.1:80: EADDRNOTAVAIL; this machine has no such address\n"
    assert done.stderr == words


@pytest.mark.parametrize("form", ["udp://{}:5353", "udp://[::ffff:{}]:5353"])
def test_broadcast_address_of_a_network_of_ours(steer: RunSteer, form: str) -> None:
    for command in ("run", "check"):
        done = steer(command, "-b", form.format("127.255.255.255"))
        assert done.returncode == 1
        assert "a broadcast address of this machine: every worker would get a copy" in done.stderr
    assert steer("check", "-b", form.format("127.255.255.254")).returncode == 0


def test_ipv6_that_is_switched_off(steer: RunSteer, netns: Netns) -> None:
    netns.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    for protocol in ("tcp", "udp"):
        done = steer("run", "-b", f"{protocol}://[::1]:80")
        assert done.returncode == 1
        assert f"bind {protocol} [::1]:80: EADDRNOTAVAIL; this machine has no" in done.stderr


def test_second_of_two_addresses_that_cannot_be_had(steer: RunSteer) -> None:
    done = steer("run", "-b", f"127.0.0.1:{PORT}", "-b", "192.0.2.1:80")
    assert done.returncode == 1
    assert done.stderr.startswith("steer: bind tcp 192.0.2.1:80: EADDRNOTAVAIL")
    assert free()


# Limits


def test_limit_on_open_files_that_is_too_low(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    run = ("prlimit", "--nofile=32:32", STEER, "run", "-w", "64")
    with started(*run, environment=environment, home=home) as running:
        assert running.wait() == 1
        assert running.log.startswith("steer: open ")
        assert "the limit is 32; raise it (ulimit -Hn, LimitNOFILE=), or use fewer" in running.log
        assert running.log.count("\n") == 1


@pytest.mark.parametrize("backend", ["ebpf", "cbpf", "kernel"])
@pytest.mark.parametrize("addresses", [1, 10])
def test_what_starts_under_a_limit_on_open_files_can_be_changed(
    netns: Netns, environment: dict[str, str], home: Path, addresses: int, backend: str
) -> None:
    """The limit is what 5 workers need. The count has a second generation in it, and must not
    have the first once more when that serves."""
    binds = [word for port in range(addresses) for word in ("-b", f"127.0.0.1:{PORT + port}")]
    run = (STEER, "run", *binds, "--backend", backend, "--policy", "hash", "--name", "test")
    refused = launch(
        ("prlimit", "--nofile=32:32", *run, "-w", "5"),
        environment=environment,
        home=home,
        records=home,
    )
    assert refused.wait() == 1
    needed = (home / "stderr").read_text().split()[2]
    limited = ("prlimit", f"--nofile={needed}:{needed}", *run, "-w", "4")
    with started(*limited, environment=environment, home=home) as running:
        running.wait_ready()
        for arguments in (["reload"], ["scale", "+1"], ["reload"], ["scale", "+1"]):
            done = running.steer(*arguments)
            assert done.returncode == 0, done.stderr
        eventually(lambda: len(running.workers()), 5)
        too_many = running.steer("scale", "+1")
        assert too_many.returncode == 1
        assert f"the limit is {needed}; raise it" in too_many.stderr


def test_soft_limit_on_open_files_is_raised_for_itself_alone(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    run = ("prlimit", "--nofile=40:", STEER, "run", "-w", "16", "--name", "test")
    with started(*run, environment=environment, home=home) as running:
        running.wait_ready()
        worker = running.workers()[0]["pid"]
        assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (40, hard)
        assert resource.prlimit(running.pid, resource.RLIMIT_NOFILE)[0] > 40


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("limit", [1, 4])
def test_limit_on_processes(
    netns: Netns, environment: dict[str, str], home: Path, limit: int
) -> None:
    run = as_user(ALONE, "prlimit", f"--nproc={limit}:{limit}", STEER, "run", "-w", "8")
    with started(*run, environment=environment, home=home) as running:
        assert running.wait() == 1
        words = "steer: start a worker: Resource temporarily unavailable; raise the limit on proc"
        assert words in running.log
        assert "Traceback" not in running.log
    assert session(running.pid) == []


# Fallback


@pytest.mark.needs("nobody")
def test_without_privilege_it_stands_on_cbpf_and_says_why(service: StartService) -> None:
    running = service("-w", "2", user=NOBODY)
    found = running.status()
    assert found["backend"] == "cbpf"
    reason = found["backend_reason"]
    assert reason.startswith("ebpf: ")
    assert "EPERM" in reason
    assert running.log.count(reason) == 1
    assert http_get("127.0.0.1", PORT)[1]["slot"] in (0, 1)


@pytest.mark.needs("root")
def test_root_without_the_capability_stands_on_cbpf(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    run = ("setpriv", "--bounding-set", "-bpf,-sys_admin", STEER, "run", "--name", "test")
    with started(*run, "-w", "2", environment=environment, home=home) as running:
        running.wait_ready()
        assert running.status()["backend"] == "cbpf"
        assert "EPERM" in running.status()["backend_reason"]


@pytest.mark.needs("nobody")
def test_taking_turns_without_privilege_falls_to_the_kernel(
    service: StartService, steer: RunSteer
) -> None:
    running = service("-w", "2", "--policy", "round-robin", user=NOBODY)
    found = running.status()
    assert found["backend"] == "kernel"
    assert "ebpf: " in found["backend_reason"]
    assert "cbpf: " in found["backend_reason"]
    assert running.log.count(found["backend_reason"]) == 1

    options = ("--name", "other", "-b", ":8081", "--policy", "round-robin", "--json")
    checked = json.loads(steer("check", *options, user=NOBODY).stdout)
    assert checked["backend"] == "kernel"
    assert checked["backend_reason"] == found["backend_reason"]


@pytest.mark.needs("nobody")
@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("policy", ["cpu", "round-robin"])
def test_strict_refuses_to_fall(steer: RunSteer, command: str, policy: str) -> None:
    done = steer(command, "--strict", "--policy", policy, user=NOBODY)
    assert done.returncode == 5
    backend = "cbpf" if policy == "cpu" else "kernel"
    assert done.stderr.startswith(f"steer: use {backend}: strict is set, and ebpf: ")
    assert done.stderr.endswith("; unset strict, or see `steer doctor`\n")
    assert done.stdout == ""


@pytest.mark.parametrize("backend", ["cbpf", "kernel"])
def test_backend_that_is_asked_for_is_no_fall(service: StartService, backend: str) -> None:
    running = service("-w", "2", "--backend", backend, "--strict", "--policy", "hash")
    assert running.status()["backend"] == backend
    assert running.status()["backend_reason"] == f"backend = {backend}"


def test_backend_that_cannot_take_turns(steer: RunSteer) -> None:
    done = steer("run", "--backend", "cbpf", "--strict", "--policy", "round-robin")
    assert done.returncode == 5
    found = json.loads(steer("check", "--json", "--backend", "cbpf", "--policy", "random").stdout)
    assert found["backend"] == "cbpf"


def library() -> str:
    """Where libbpf is."""
    libbpf.libbpf()
    maps = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in maps if "libbpf.so" in line)


@pytest.mark.needs("root", "bpf")
def test_without_libbpf_it_stands_on_cbpf_and_says_why(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    hide = 'mount --bind /dev/null "$0" && exec "$@"'
    run = ("unshare", "-m", "sh", "-c", hide, library(), STEER, "run", "-w", "2", "--name", "test")
    with started(*run, environment=environment, home=home) as running:
        running.wait_ready()
        found = running.status()
        assert found["backend"] == "cbpf"
        assert "ebpf: load libbpf.so.1: " in found["backend_reason"]
        assert "install libbpf 1.0 or later (Debian: libbpf1)" in found["backend_reason"]
        assert http_get("127.0.0.1", PORT)[1]["slot"] in (0, 1)


# Privileges, directories, standard streams


@pytest.mark.needs("root")
def test_root_that_may_not_change_user(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    drop = ("setpriv", "--bounding-set", "-setuid,-setgid")
    run = (*drop, STEER, "run", "-w", "1", "-u", str(NOBODY))
    with started(*run, environment=environment, home=home) as running:
        assert running.wait() == 4
        assert f"run as uid {NOBODY}, gid {NOBODY}: Operation not permitted" in running.log
        assert "Traceback" not in running.log


def test_current_directory_that_is_gone(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    (home / "gone").mkdir()
    leave = ("sh", "-c", 'cd gone && rmdir ../gone && exec "$@"', "sh", STEER, "run", "-w", "1")
    with started(*leave, "app:serve", environment=environment, home=home) as running:
        assert running.wait() == 4
        assert "steer: load app:serve: FileNotFoundError: " in running.log
        assert "Traceback" not in running.log
    (home / "gone").mkdir()
    with started(*leave, "--name", "test", environment=environment, home=home) as running:
        running.wait_ready()


def test_output_that_nobody_reads_ends_neither_controller_nor_worker(
    netns: Netns, environment: dict[str, str], home: Path
) -> None:
    """A child that fails to flush at its end must not go on as a second controller."""
    (home / "app.py").write_text(APP)
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.Popen(
        [STEER, "run", "app:serve", "-w", "2", "--name", "test"],
        env=environment,
        cwd=home,
        stdout=write_end,
        stderr=write_end,
        start_new_session=True,
    )
    os.close(write_end)
    (home / "stderr").touch()
    running = Service(process, "test", home, home, environment)
    with ExitStack() as undo:
        undo.callback(running.clean_up)
        running.wait_ready()
        first, second = running.workers()
        os.kill(second["pid"], signal.SIGTERM)
        eventually(lambda: running.workers()[1]["pid"] not in (None, second["pid"]))
        running.wait_ready()
        assert running.workers()[0]["pid"] == first["pid"]
        assert running.stop() == 0


def test_worker_with_much_to_say_costs_no_memory(service: StartService, home: Path) -> None:
    (home / "app.py").write_text(APP)
    running = service("app:chatters", "-w", "1")
    assert len(running.log) > 32_000_000
    status = Path(f"/proc/{running.pid}/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kb < 60_000


def test_datagrams_for_a_port_without_a_service(service: StartService) -> None:
    """A UDP service that has ended is gone at once: nothing keeps its socket."""
    running = service("-w", "2", "-b", f"udp://127.0.0.1:{PORT}")
    assert udp_ask("127.0.0.1", PORT)["slot"] in (0, 1)
    running.stop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(("127.0.0.1", PORT))
        sock.send(b"")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)
