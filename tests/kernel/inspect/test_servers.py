"""Real servers that share a port, as they are seen: who has which socket, and who waits for it."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer import abi
from steer.features import kernel_version
from steer.inspect.inspection import Asked, inspect
from steer.inspect.schema import Group
from steer.inspect.target import Target, parse
from steer.linux import netns, processes
from steer.loader.programs import Program
from steer.policy import classic
from steer.policy.bytecode import Code
from steer.sockets import group_program
from testkit import foreign
from testkit.capabilities import do_without
from testkit.foreign import HOST, PORT
from testkit.namespaces import network_namespace
from testkit.processes import eventually, stopped

pytestmark = [
    pytest.mark.needs("tracing", "netns", "root"),
    pytest.mark.usefixtures("netns"),
]

IPPROTO_MPTCP = 262
PASS = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""


def look(target: str = f":{PORT}") -> list[Group]:
    """What is in the test's network namespace."""
    return [each for each in inspect(Asked(parse(target))).groups if not each.is_elsewhere]


def group_once(is_so: Callable[[Group], bool]) -> Group:
    """The only group on the port, once it is as it is to be."""

    def found() -> Group | None:
        here = inspect(Asked()).groups
        groups = [each for each in here if each.port == PORT and not each.is_elsewhere]
        return groups[0] if len(groups) == 1 and is_so(groups[0]) else None

    group = eventually(found)
    assert group is not None
    return group


def waiting(group: Group) -> list[list[int]]:
    """Who waits for each socket."""
    return [
        [each.pid for each in sock.processes if each.waits not in (None, "no")]
        for sock in group.sockets
    ]


def ways(group: Group) -> set[str | None]:
    return {each.waits for sock in group.sockets for each in sock.processes}


def all_wait(count: int) -> Callable[[Group], bool]:
    """Whether so many processes wait."""
    return lambda group: len({pid for pids in waiting(group) for pid in pids}) == count


@pytest.mark.needs("haproxy")
def test_processes_of_haproxy_have_a_socket_each(home: Path) -> None:
    with foreign.haproxy(home, processes=3) as pids:
        group = group_once(all_wait(3))
    assert (group.kind, group.address, group.program) == ("reuseport", "0.0.0.0", None)
    assert sorted(waiting(group)) == [[pid] for pid in sorted(pids)]
    assert {each.command for sock in group.sockets for each in sock.processes} == {"haproxy"}
    assert group.decides.startswith("the kernel's hash of addresses and ports selects one of 3")


@pytest.mark.needs("haproxy")
def test_threads_of_haproxy_have_a_socket_each(home: Path) -> None:
    bind = f"{HOST}:{PORT} shards by-thread"
    with foreign.haproxy(home, threads=4, bind=bind) as pids:
        group = group_once(lambda group: len(group.sockets) == 4 and all_wait(1)(group))
    assert group.kind == "reuseport"
    assert waiting(group) == [pids] * 4


@pytest.mark.needs("nginx")
def test_workers_of_nginx_share_a_socket_that_the_master_has_too(home: Path) -> None:
    with foreign.nginx(home, f"{PORT}") as master:
        group = group_once(all_wait(3))
        workers = processes.children(master)
    (sock,) = group.sockets
    assert group.kind == "shared"
    assert waiting(group) == [sorted(workers)]
    assert {each.pid for each in sock.processes} == {master, *workers}
    assert ways(group) == {"no", "epoll-exclusive"}
    assert (
        "3 processes wait for it: the kernel wakes the first idle one in its list" in group.decides
    )
    assert group.advice[0].startswith(f"`steer run -b :{PORT} -w 3 -e 'NGINX=3;' -- nginx -c FILE")


@pytest.mark.needs("nginx")
def test_workers_of_nginx_with_reuseport_wait_for_one_each(home: Path) -> None:
    """All of them have all sockets."""
    with foreign.nginx(home, f"{PORT} reuseport") as master:
        group = group_once(all_wait(3))
        workers = processes.children(master)
    assert group.kind == "reuseport"
    assert sorted(waiting(group)) == [[pid] for pid in sorted(workers)]
    for sock in group.sockets:
        assert {each.pid for each in sock.processes} == {master, *workers}


@pytest.mark.needs("gunicorn")
def test_workers_of_gunicorn_share_a_socket(home: Path) -> None:
    with foreign.gunicorn(home) as arbiter:
        group = group_once(all_wait(2))
        workers = processes.children(arbiter)
    assert (group.kind, ways(group)) == ("shared", {"no", "poll"})
    assert waiting(group) == [sorted(workers)]
    assert "the kernel wakes all that are idle" in group.decides


@pytest.mark.needs("mptcp")
def test_a_listener_of_mptcp_is_one_of_tcp() -> None:
    """Go's are that, from 1.24 on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as sock:
        sock.bind((HOST, PORT))
        sock.listen(7)
        (group,) = look()
    (seen,) = group.sockets
    assert (group.protocol, group.kind, seen.backlog) == ("tcp", "single", 7)
    assert [each.pid for each in seen.processes] == [os.getpid()]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host", [HOST, "::1"])
def test_a_group_of_processes(host: str, kind: int) -> None:
    with foreign.members(3, host, kind) as pids:
        group = group_once(all_wait(3))
    assert group.protocol == ("tcp" if kind == socket.SOCK_STREAM else "udp")
    assert (group.kind, group.address, group.uid) == ("reuseport", host, os.getuid())
    assert sorted(waiting(group)) == [[pid] for pid in sorted(pids)]
    assert ways(group) == {"poll"}


def test_sockets_of_a_cpu_are_told(listener_in_group: socket.socket) -> None:
    if kernel_version(os.uname().release) < (6, 2):
        do_without("Linux 6.2: until then the hash does not look at SO_INCOMING_CPU")
    listener_in_group.setsockopt(socket.SOL_SOCKET, socket.SO_INCOMING_CPU, 0)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((HOST, PORT))
        other.listen()
        (group,) = look()
    assert (group.by_cpu, len(group.sockets)) == (1, 2)
    assert "SO_INCOMING_CPU" in group.decides


def test_a_server_of_one_process_is_single() -> None:
    with foreign.members(1) as (pid,):
        group = group_once(all_wait(1))
    assert group.kind == "single"
    assert group.decides.endswith(f"(pid {pid}) gets every connection")
    assert group.advice == []


def test_connections_that_wait_are_told() -> None:
    with ExitStack() as stack:
        (pid,) = stack.enter_context(foreign.members(1))
        group_once(all_wait(1))
        stack.enter_context(stopped(pid))
        for _ in range(3):
            stack.enter_context(socket.create_connection((HOST, PORT)))
        eventually(lambda: look()[0].sockets[0].queued, 3)
        assert look()[0].sockets[0].backlog == 100


def test_the_cpus_are_those_of_the_process() -> None:
    with foreign.members(1) as (pid,):
        os.sched_setaffinity(pid, {0})
        (group,) = look()
    assert group.sockets[0].processes[0].cpus == [0]


# ---- programs


@pytest.fixture
def listener_in_group() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((HOST, PORT))
        sock.listen()
        yield sock


@pytest.mark.needs("bpf")
def test_a_program_of_somebody_else(listener_in_group: socket.socket) -> None:
    with Program("others", PASS, {}, abi.BPF_SK_REUSEPORT_SELECT) as program:
        group_program.attach_ebpf(listener_in_group.fileno(), program.fileno())
        (group,) = look()
        info = Path(f"/proc/self/fdinfo/{program.fileno()}").read_text()
    found = group.program
    assert found is not None
    assert group.kind == "reuseport"
    assert (found.kind, found.name, found.owner) == ("ebpf", "others", "root")
    assert f"prog_id:\t{found.id}\n" in info
    assert f"prog_tag:\t{found.tag}\n" in info
    assert found.loaded_s is not None
    assert 0 <= found.loaded_s < 60
    assert [each.pid for each in found.processes] == [os.getpid()]
    assert group.decides.startswith(f"BPF program {found.id} (others), loaded by root, selects")


@pytest.mark.needs("bpf")
def test_a_program_whose_descriptor_nobody_has(listener_in_group: socket.socket) -> None:
    with Program("others", PASS, {}, abi.BPF_SK_REUSEPORT_SELECT) as program:
        group_program.attach_ebpf(listener_in_group.fileno(), program.fileno())
    (group,) = look()
    assert group.program is not None
    assert group.program.processes == []


@pytest.mark.needs("bpf")
def test_a_title_makes_no_program_steers(listener_in_group: socket.socket) -> None:
    """Anybody can show one."""
    with Program("others", PASS, {}, abi.BPF_SK_REUSEPORT_SELECT) as program:
        group_program.attach_ebpf(listener_in_group.fileno(), program.fileno())
    fd = listener_in_group.fileno()
    argv = ["steer: worker 0 shop", "-c", "import sys; print('here', flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        argv,
        executable=sys.executable,
        pass_fds=(fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"here\n"
        (group,) = look()
        process.kill()
    assert group.service == "shop"
    assert group.program is not None
    assert group.program.service is None


def test_a_classic_program(listener_in_group: socket.socket) -> None:
    group_program.attach_cbpf(listener_in_group.fileno(), list(classic.NOTHING))
    (group,) = look()
    assert group.program is not None
    assert (group.program.kind, group.program.id) == ("classic", None)
    assert group.program.instructions == len(classic.NOTHING)


# ---- where


def test_sockets_of_other_network_namespaces_are_told_apart() -> None:
    here = netns.own()
    with foreign.members(2) as ours, network_namespace():
        there = netns.own()
        with foreign.members(1) as (pid,):
            both = {each.netns: each for each in inspect(Asked(parse(f":{PORT}"))).groups}
            (only,) = inspect(Asked(netns=str(pid))).groups
            (others,) = inspect(Asked(netns=str(ours[0]))).groups
    assert both[here].is_elsewhere
    assert not both[there].is_elsewhere
    assert len(both[here].sockets) == 2
    assert only.netns == there
    assert others.netns == here


def test_a_process_is_asked_for_by_its_number() -> None:
    """It is no port that anything serves."""
    with foreign.members(2) as pids:
        found = inspect(Asked(Target(number=pids[0])))
    assert [each.pid for sock in found.groups[0].sockets for each in sock.processes] == [pids[0]]
    assert found.groups[0].kind == "reuseport"


def test_an_address_is_asked_for_with_all_that_serve_it() -> None:
    with foreign.members(1, "0.0.0.0"), foreign.members(1, "127.0.0.2"):
        assert {each.address for each in look(f"127.0.0.2:{PORT}")} == {
            "0.0.0.0",
            "127.0.0.2",
        }
        assert {each.address for each in look(f"127.0.0.1:{PORT}")} == {"0.0.0.0"}


# ---- with less


@pytest.fixture
def no_bpf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel refuses, or has no such programs."""

    def refuse(_: object) -> None:
        from steer.errors import KernelError

        raise KernelError("load program", "EPERM", "needs CAP_BPF", errno=errno.EPERM)

    monkeypatch.setattr("steer.inspect.seeing.Look.__init__", refuse)


def seen_of(group: Group) -> Mapping[int, tuple[object, ...]]:
    """What both ways can tell."""
    return {
        each.inode: (each.processes, each.queued, each.backlog, each.drops, each.cgroup)
        for each in group.sockets
    }


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("host", [HOST, "::1", "0.0.0.0"])
def test_without_bpf_the_same_is_seen_but_for_programs(
    request: pytest.FixtureRequest, host: str, kind: int
) -> None:
    with foreign.members(3, host, kind):
        group_once(all_wait(3))
        (full,) = look()
        request.getfixturevalue("no_bpf")
        found = inspect(Asked(parse(f":{PORT}")))
    (group,) = found.groups
    assert seen_of(group) == seen_of(full)
    assert (group.kind, group.address, group.uid) == (full.kind, full.address, full.uid)
    assert (group.program, group.program_known) == (None, False)
    assert found.notes == [
        "cannot see BPF programs or other network namespaces: load program: EPERM; needs CAP_BPF"
    ]
