"""`steer attach` over UDP: sockets of servers that run already."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from steer import abi
from steer.attach.binds import listeners_at
from steer.config.address import Bind
from steer.policy import classic
from steer.sockets import group_program, members
from testkit import foreign
from testkit.attached import HOST, Attach, attaching, is_even
from testkit.fixtures import RunSteer
from testkit.harness import CPUS, PORT
from testkit.namespaces import network_namespace
from testkit.processes import DEADLINE_S, eventually, line_of, python, running
from testkit.programs import path
from testkit.service import Service

pytestmark = [
    pytest.mark.needs("bpf", "migrate", "netns", "root", "pidfd_getfd"),
    pytest.mark.usefixtures("netns"),
]

WHERE = f"udp://{HOST}:{PORT}"


@pytest.fixture
def attach(home: Path, environment: dict[str, str]) -> Iterator[Attach]:
    with attaching(home, environment) as start:
        yield lambda *options, where=WHERE, **how: start(*options, where=where, **how)


@contextmanager
def server(threads: int, *late: str, host: str = HOST) -> Iterator[subprocess.Popen[str]]:
    command = python(f"import runpy; runpy.run_path({path('answers_datagrams')!r})", host, PORT)
    with running(*command, str(threads), *late) as process:
        assert line_of(process) == "here"
        yield process


def client(host: str = HOST) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(DEADLINE_S)
    sock.connect((host, PORT))
    return sock


def ask(sock: socket.socket, what: bytes = b"x") -> str:
    """Which socket answers."""
    sock.send(what)
    return sock.recv(100).decode()


def answers(number: int, host: str = HOST) -> Counter[str]:
    """Which sockets answer so many clients, one after the other."""
    found: Counter[str] = Counter()
    for _ in range(number):
        with client(host) as sock:
            found[ask(sock)] += 1
    return found


def states(attached: Service) -> list[str]:
    return [each["state"] for each in attached.workers()]


def notes(attached: Service) -> str:
    return "\n".join(attached.status()["notes"])


@pytest.mark.parametrize("host", [HOST, "0.0.0.0", "::1", "::"])
def test_sockets_get_their_turns(attach: Attach, host: str) -> None:
    where = f"udp://[{host}]:{PORT}" if ":" in host else f"udp://{host}:{PORT}"
    to = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)
    with server(4, host=host):
        attached = attach("--policy", "round-robin", where=where)
        assert is_even(answers(200, to), 4, len(CPUS))
        (bind,) = attached.status()["binds"]
        assert (bind["protocol"], bind["address"]) == ("udp", host)
        assert sum(attached.selected().values()) == 200


@pytest.mark.parametrize("policy", ["hash", "source", "flow", "cpu", "random"])
def test_each_policy_for_datagrams_selects(attach: Attach, policy: str) -> None:
    with server(3), client() as sock:
        attached = attach("--policy", policy)
        found = {ask(sock) for _ in range(30)}
        assert len(found) == (1 if policy in ("hash", "source", "flow") else len(found))
        assert attached.status()["totals"]["selected"] == 30
        assert attached.status()["totals"]["unsteered"] == 0


def test_default_is_hash_and_what_is_lost_is_told(attach: Attach) -> None:
    with server(2):
        attached = attach()
        assert attached.status()["policy"] == "hash"
        assert "datagrams queued at a socket that closes are lost: the kernel moves none" in notes(
            attached
        )
        assert "open connections" not in notes(attached)
        assert "2 sockets of udp://" in attached.log


def test_flow_stays_with_its_socket_while_others_come(attach: Attach) -> None:
    with server(2), ExitStack() as clients:
        attached = attach("--policy", "flow")
        socks = [clients.enter_context(client()) for _ in range(40)]
        before = [ask(each) for each in socks]
        with server(6):
            eventually(lambda: states(attached), ["ready"] * 8)
            assert [ask(each) for each in socks] == before
            assert len(answers(100)) == 6  # both servers count theirs from 0


def test_new_socket_gets_nothing_until_it_is_waited_on(attach: Attach) -> None:
    with server(2):
        attached = attach("--policy", "round-robin")
        with server(1, "late") as late:
            eventually(lambda: states(attached), ["ready", "ready", "starting"])
            assert is_even(answers(60), 2, len(CPUS))
            before = attached.selected()
            assert late.stdin
            late.stdin.write("\n")
            late.stdin.flush()
            eventually(lambda: states(attached), ["ready"] * 3)
            assert before[2] == 0
            answers(60)
            assert abs(attached.selected()[2] - 20) <= len(CPUS)


def test_socket_that_closes_is_not_selected_any_more(attach: Attach) -> None:
    with server(3):
        attached = attach("--policy", "round-robin")
        with client() as sock:
            gone = ask(sock, b"close")
        assert gone not in answers(60)
        eventually(lambda: states(attached), ["ready"] * 2)


def test_drained_socket_gets_nothing_until_undrained(attach: Attach) -> None:
    with server(3):
        attached = attach("--policy", "round-robin")
        assert attached.steer("drain", "1").returncode == 0
        assert is_even(answers(60), 2, len(CPUS))
        assert attached.steer("undrain", "1").returncode == 0
        assert is_even(answers(60), 3, len(CPUS))


def test_policy_is_switched_while_attached(attach: Attach) -> None:
    with server(4):
        attached = attach("--policy", "hash")
        assert attached.steer("policy", "round-robin").returncode == 0
        assert is_even(answers(100), 4, len(CPUS))


def has_program() -> bool:
    """Whether the group has one, which is asked by taking it away."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        try:
            member.setsockopt(socket.SOL_SOCKET, abi.SO_DETACH_REUSEPORT_BPF, 0)
        except FileNotFoundError:
            return False
        return True


@pytest.mark.parametrize("how", [("detach", WHERE), ("stop",)])
def test_server_is_left_to_the_kernel(attach: Attach, how: tuple[str, ...]) -> None:
    with server(2):
        attached = attach("--policy", "round-robin")
        assert attached.steer(*how).returncode == 0
        assert attached.wait() == 0
        assert not has_program()
        attached.leaves_nothing()
        assert sum(answers(10).values()) == 10


def test_guard_leaves_the_kernel_to_select_if_the_attacher_is_killed(attach: Attach) -> None:
    with server(4):
        attached = attach("--policy", "round-robin", "--weights", "1000,1,1,1")
        assert answers(60)["0"] > 50
        attached.send_signal(signal.SIGKILL)
        attached.wait()
        eventually(lambda: not attached.control_socket.exists())
        assert not has_program()
        assert answers(60)["0"] < 40


def test_tcp_and_udp_at_one_port_are_two_services(attach: Attach) -> None:
    name = f"python-{PORT}"
    with server(2), socket.create_server((HOST, PORT), reuse_port=True):
        attach(name=name)
        attach(where=f"{HOST}:{PORT}", name=f"{name}-2")


@pytest.mark.needs("nginx-stream")
def test_workers_of_nginx_get_their_turns_also_after_reloads(attach: Attach, home: Path) -> None:
    bind = Bind("udp", HOST, PORT)
    with foreign.nginx_udp(home, f"{HOST}:{PORT}", 3) as master:
        eventually(lambda: len(listeners_at(bind)) == 3)
        attached = attach("--policy", "round-robin")
        assert is_even(answers(90), 3, len(CPUS))
        for workers in (1, 3):
            foreign.write_nginx_udp(home / "nginx.conf", f"{HOST}:{PORT}", workers)
            os.kill(master, signal.SIGHUP)
            eventually(lambda count=workers: states(attached) == ["ready"] * count)
            eventually(lambda count=workers: is_even(answers(60), count, len(CPUS)))
        assert attached.stop() == 0


# ---- connected sockets


def test_connected_sockets_are_told_of(attach: Attach) -> None:
    """At a specific address: the next socket that the server binds forms a group of its own."""
    with server(2), client() as sock:
        attached = attach("--policy", "round-robin")
        ask(sock, b"connect")
        words = "the server has connected sockets at this address"
        assert (words in notes(attached)) != members.connected_stay()
        assert is_even(answers(60), 2, len(CPUS))


@pytest.mark.needs("tracing")
def test_group_that_a_connected_socket_splits_is_told_of(attach: Attach) -> None:
    with ExitStack() as stack, server(2), client() as sock:
        attached = attach("--policy", "round-robin")
        ask(sock, b"connect")
        stack.enter_context(server(1))
        eventually(lambda: len(states(attached)) == 3)
        words = "the sockets are in 2 groups"
        assert (words in notes(attached)) != members.connected_stay()
        assert attached.steer("detach").returncode == 0
        assert attached.wait() == 0
        assert not has_program()


@pytest.mark.needs("tracing")
def test_group_that_is_split_already_is_refused(steer: RunSteer) -> None:
    with ExitStack() as stack, server(2), client() as sock:
        ask(sock, b"connect")
        stack.enter_context(server(1))
        if members.connected_stay():  # nothing is split before Linux 6.13
            return
        said = refused(steer)
        assert "the sockets are in 2 groups, as a connected socket of the server split them" in said
        assert "bound to the wildcard address" in said


def test_connected_sockets_at_a_wildcard_split_nothing(attach: Attach) -> None:
    with server(2, host="0.0.0.0"), client() as sock:
        attached = attach("--policy", "round-robin", where=f"udp://:{PORT}")
        ask(sock, b"connect")
        with server(1, host="0.0.0.0"):
            eventually(lambda: states(attached), ["ready"] * 3)
            answers(60)
            assert "connected" not in notes(attached)
            assert "groups" not in notes(attached)


def test_socket_that_is_connected_leaves(attach: Attach) -> None:
    with server(2, host="0.0.0.0"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        own.bind(("0.0.0.0", PORT))
        attached = attach("--policy", "round-robin", where=f"udp://:{PORT}")
        eventually(lambda: states(attached), ["ready"] * 3)
        own.connect((HOST, 9))
        assert sum(answers(20).values()) == 20
        eventually(lambda: states(attached), ["ready"] * 2)
        assert is_even(answers(60), 2, len(CPUS))
        eventually(lambda: "closed or connected" in attached.log)


# ---- what is refused


def refused(steer: RunSteer, *options: str) -> str:
    done = steer("attach", *(options or (WHERE,)))
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_address_where_no_socket_is_bound_is_refused(steer: RunSteer) -> None:
    assert "no unconnected socket is bound there; `steer inspect`" in refused(steer)
    with server(2):
        said = refused(steer, f"udp://:{PORT}")
    assert f"attach to udp://:{PORT}: no unconnected socket is bound at exactly that addr" in said
    assert f"but at {WHERE}; `steer attach {WHERE}`" in said


def test_group_with_a_program_of_somebody_is_refused(steer: RunSteer) -> None:
    with server(2), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as member:
        member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member.bind((HOST, PORT))
        group_program.attach_cbpf(member.fileno(), list(classic.NOTHING))
        assert "selects there already" in refused(steer)
        group_program.detach(member.fileno())


def test_socket_without_reuseport_is_refused(steer: RunSteer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, PORT))
        assert "it is one socket without SO_REUSEPORT" in refused(steer)


def test_multicast_is_refused(steer: RunSteer) -> None:
    assert "is multicast or broadcast" in refused(steer, f"udp://224.0.0.1:{PORT}")


def test_socket_in_another_network_namespace_is_named(steer: RunSteer) -> None:
    with server(2) as process, network_namespace():
        said = refused(steer)
    assert "no unconnected socket is bound there in this network namespace, but in another" in said
    assert f"--netns {os.getpid()}" in said or f"--netns {process.pid}" in said
