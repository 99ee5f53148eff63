"""What is said of a group: what decides, and what would be better."""

from __future__ import annotations

from typing import Any

import pytest

from steer.inspect import words
from steer.inspect.schema import Process, Program
from testkit.inspection import group, process, sock

KNOWN = words.Known({}, frozenset({"--policy", "--replace", "--netns"}))


TWO = (sock(process(1)), sock(process(2), inode=11))
EBPF = Program(7, "pick", "www-data", "ebpf")
CLASSIC = Program(None, None, None, "classic", instructions=3)
OURS = Program(8, "steer_hash", "root", "ebpf", service="shop", policy="hash")


@pytest.mark.parametrize(
    "program, expected",
    [
        (None, "the kernel's hash of addresses and ports selects one of 2 sockets for each"),
        (EBPF, "BPF program 7 (pick), loaded by www-data, selects one of 2 sockets"),
        (CLASSIC, "a classic BPF program of 3 instructions selects one of 2 sockets"),
        (OURS, "policy hash of steer's service shop selects one of 2 sockets for each connection"),
    ],
)
def test_what_decides_in_a_group(program: Program | None, expected: str) -> None:
    assert words.decides(group(*TWO, program=program)).startswith(expected)


def test_a_program_that_cannot_be_seen_may_be_there() -> None:
    found = words.decides(group(*TWO, program_known=False))
    assert found.endswith("; unless a program is attached, which cannot be seen from here")


def test_sockets_of_a_cpu_come_first() -> None:
    """See reuseport_select_sock_by_hash() of net/core/sock_reuseport.c, since Linux 6.2."""
    assert "SO_INCOMING_CPU" in words.decides(group(*TWO, by_cpu=2))
    assert "SO_INCOMING_CPU" not in words.decides(group(*TWO))


def test_one_that_is_alone_in_its_group() -> None:
    found = words.decides(group(TWO[0], program=EBPF))
    assert "selects the only socket for each connection" in found


def test_the_policy_of_a_service_that_cannot_be_asked() -> None:
    program = Program(8, "steer_hash", "root", "ebpf", service="shop")
    assert words.decides(group(*TWO, program=program)).startswith("the policy of steer's service")


@pytest.mark.parametrize(
    "waits, expected",
    [
        ("accept", "and 2 processes wait for it: they block in accept(), and the kernel wakes"),
        ("epoll-exclusive", "the kernel wakes the first idle one in its list (EPOLLEXCLUSIVE)"),
        ("epoll", "the kernel wakes all that are idle, and the quickest gets it"),
        ("poll", "the kernel wakes all that are idle, and the quickest gets it"),
        ("io_uring", "whichever takes it from the queue first gets it"),
        (None, "one socket, and 2 processes have it open: whichever takes it"),
    ],
)
def test_what_decides_where_a_socket_is_shared(waits: str | None, expected: str) -> None:
    shared = sock(process(1, waits), process(2, waits), process(3, "no"))
    assert expected in words.decides(group(shared, kind="shared"))


@pytest.mark.parametrize(
    "processes, expected",
    [
        ([process(4)], "one socket: server (pid 4) gets every connection"),
        ([process(4, "no")], "no process waits for it at this moment"),
        ([], "it is open in no process that can be seen from here"),
    ],
)
def test_what_decides_where_there_is_one(processes: list[Process], expected: str) -> None:
    assert words.decides(group(sock(*processes), kind="single")).endswith(expected)


@pytest.mark.parametrize(
    "processes, expected",
    [
        ([], "which processes wait for it cannot be seen from here"),
        ([process(4)], "server (pid 4) has it open, and other processes that cannot be seen from"),
    ],
)
def test_what_decides_where_processes_are_hidden(processes: list[Process], expected: str) -> None:
    assert expected in words.decides(group(sock(*processes), kind="unknown"))


@pytest.mark.parametrize("pids, what", [((1, 2), "process"), ((1, 1), "socket"), ((), "socket")])
def test_what_is_selected_is_named(pids: tuple[int, ...], what: str) -> None:
    """Threads of one process have a socket each."""
    sockets = [sock(process(pid), inode=10 + index) for index, pid in enumerate(pids)]
    found = words.advice(group(*(sockets or (sock(), sock(inode=11)))), KNOWN)
    assert f"selects the {what} with the fewest open connections" in found[-1]


def test_datagrams_are_called_so() -> None:
    assert "for each datagram" in words.decides(group(*TWO, protocol="udp"))


def test_attach_is_advised_where_the_hash_decides() -> None:
    (found,) = words.advice(group(*TWO), KNOWN)
    assert found.startswith("`steer attach :80 --policy least-conn` ")


def test_attach_is_advised_for_datagrams_as_they_have_no_connections() -> None:
    (found,) = words.advice(group(*TWO, protocol="udp"), KNOWN)
    assert found.startswith("`steer attach udp://:80 --policy flow` keeps each client with its")


def test_attach_is_not_advised_where_it_is_not_there() -> None:
    assert words.advice(group(*TWO), words.Known()) == []


@pytest.mark.parametrize(
    "changes",
    [{"program": EBPF}, {"is_elsewhere": True, "netns_name": "blue"}],
)
def test_attach_is_not_advised_where_it_could_not_do_it(changes: dict[str, Any]) -> None:
    known = words.Known({}, frozenset({"--policy"}))
    assert words.advice(group(*TWO, **changes), known) == []
    assert words.advice(group(*TWO), known) != []


def test_attach_is_not_advised_where_programs_cannot_be_seen() -> None:
    assert words.advice(group(*TWO, program_known=False), KNOWN) == []


def test_nothing_is_better_than_ours() -> None:
    assert words.advice(group(*TWO, program=OURS), KNOWN) == []


def left(*processes: Process, silent_s: float) -> Program:
    return Program(7, "steer_hash", "root", "ebpf", processes=[*processes], silent_s=silent_s)


@pytest.mark.parametrize(
    "program, decided, advised",
    [
        (
            left(silent_s=9.5),
            "; program 7 of `steer attach` leaves the selection to the hash, as its attacher was",
            "`steer detach :80` removes the program that the attacher left",
        ),
        (
            left(process(8, command="steer"), silent_s=9.5),
            "as its attacher (steer 8) has been stopped or hung for 9.5 s",
            "`kill -CONT 8` if the attacher is stopped; if it hangs, `kill -KILL 8` and then "
            "`steer detach :80`",
        ),
    ],
)
def test_program_of_a_silent_attacher_decides_nothing(
    program: Program, decided: str, advised: str
) -> None:
    found = group(*TWO, program=program)
    assert words.decides(found).startswith("the kernel's hash of addresses and ports selects")
    assert decided in words.decides(found)
    assert words.advice(found, KNOWN)[0] == advised
    assert not any("--replace" in each for each in words.advice(found, KNOWN))


def test_program_decides_until_its_attacher_has_been_silent_for_a_second() -> None:
    found = group(*TWO, program=left(silent_s=0.3))
    assert words.decides(found).startswith("BPF program 7")
    assert words.advice(found, KNOWN)[0].startswith("`steer detach :80` removes the program")
    assert not any("--replace" in each for each in words.advice(found, KNOWN))


@pytest.mark.parametrize(
    "name, command",
    [("blue", "ip netns exec blue steer"), (None, "nsenter --net=/proc/1/ns/net steer")],
)
def test_program_that_was_left_in_another_network_namespace(name: str | None, command: str) -> None:
    found = group(*TWO, program=left(silent_s=9.5), is_elsewhere=True, netns_name=name)
    assert words.advice(found, KNOWN)[0].startswith(f"`{command} detach :80` removes")


def test_a_foreign_program_is_replaced() -> None:
    (found,) = words.advice(group(*TWO, program=EBPF), KNOWN)
    assert found.startswith("`steer attach :80 --policy least-conn --replace` ")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"address": "127.0.0.1"}, "steer attach 127.0.0.1:80 --policy least-conn"),
        ({"address": "::"}, "steer attach [::]:80 --policy"),
        ({"is_elsewhere": True, "netns_name": "blue"}, "steer attach :80 --netns blue --policy"),
        ({"is_elsewhere": True}, "steer attach :80 --netns 1 --policy"),
        ({"netns_name": "blue"}, "steer attach :80 --policy"),
    ],
)
def test_the_command_finds_the_group(changes: dict[str, Any], expected: str) -> None:
    assert expected in words.advice(group(*TWO, **changes), KNOWN)[0]


SHARED = (process(1, "no", "gunicorn"), process(2), process(3))


def test_a_socket_of_its_own_is_advised_where_one_is_shared() -> None:
    shared = group(sock(*SHARED[1:]), kind="shared")
    (found,) = words.advice(shared, KNOWN)
    assert found == "`steer run -b :80 -w 2 -- COMMAND` gives each process a socket of its own"


def test_a_server_that_is_known_is_named() -> None:
    run, own = words.advice(group(sock(*SHARED), kind="shared"), KNOWN)
    assert "`steer run -b :80 -w 2 -- gunicorn -w 1 APP`" in run
    assert own.startswith("or set `--reuse-port`, and then `steer attach :80 ")


def test_a_server_is_known_by_the_script_that_it_runs() -> None:
    known = words.Known({2: ["/usr/bin/python3", "/venv/bin/uvicorn", "app:app"]})
    (found,) = words.advice(group(sock(*SHARED[1:]), kind="shared"), known)
    assert "-- uvicorn APP --fd {fd}`" in found


def test_a_socket_that_nobody_waits_for_is_named() -> None:
    idle = sock(process(2, "no"), inode=11)
    found, _ = words.advice(group(TWO[0], idle), KNOWN)
    assert found.startswith("no process waits for socket 11 at this moment")
    assert "server (pid 2)" in found


def test_sockets_of_which_that_cannot_be_seen_are_not() -> None:
    assert len(words.advice(group(TWO[0], sock(process(2, None))), KNOWN)) == 1


@pytest.mark.parametrize("queued, is_full", [(128, False), (129, True)])
def test_a_full_queue_is_named(queued: int, is_full: bool) -> None:
    """A backlog of N has room for one more, see sk_acceptq_is_full() of net/sock.h."""
    found = words.advice(group(sock(process(1), queued=queued), kind="single"), KNOWN)
    assert bool(found) == is_full
    assert not is_full or "the accept queue of socket 10 is full" in found[0]


def test_processes_are_told_by_command() -> None:
    processes = [process(pid, command="nginx") for pid in (3, 4, 5, 9)]
    assert words.pids([*processes, process(7, command="sh")]) == "nginx 3-5,9, sh 7"
    assert words.pids([]) == "-"
