"""Where netfilter looks for a listener before the IP header is taken off: for TPROXY, and for the
`socket` match, which only looks, so that the packet comes again."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from steer.linux import port_holders
from steer.policy.builtin import CBPF, EBPF, POLICIES
from testkit.fixtures import RunSteer, StartService
from testkit.gateway import (
    AWAY,
    FAMILIES,
    HERE,
    HOSTS,
    PORTS,
    NewSocket,
    clients_outside,
    matched,
    put_rules,
    ruleset,
    socket_match,
    tproxy,
)
from testkit.harness import CPUS, PORT, Harness, pinned
from testkit.namespaces import Netns
from testkit.packets import segment
from testkit.processes import DEADLINE_S, eventually, tcp_count
from testkit.programs import source

pytestmark = [
    pytest.mark.needs("root", "bpf", "tproxy"),
    pytest.mark.usefixtures("netns"),
]

RULES = {
    "none": ("flush ruleset", HERE),
    "tproxy": (ruleset(tproxy()), AWAY),
    "socket": (ruleset(socket_match()), HERE),
    "socket at input": (ruleset(socket_match(), hook="input"), HERE),
    "socket, then tproxy": (ruleset(socket_match(), tproxy()), AWAY),
}
"""And where clients connect to."""
ASKED = """
/* asked - by turns, and counts how often it was asked for a connection. */
#include "steer.h"

STEER_TABLE(turns)
STEER_COUNTER(begun, "handshakes")

STEER_POLICY(ctx, table)
{
	steer_add(begun, steer_is_syn(ctx));
	return 0;
}
"""
MOMENT_S = 0.25
"""See steer_repeat_early() of bpf/steer.h."""
_IPV6_DSTOPTS, _IPV6_HOPOPTS = 59, 54  # include/uapi/linux/in6.h
_PADDING = bytes([0, 0, 1, 4, 0, 0, 0, 0])
"""An extension header of 8 bytes with nothing in it (RFC 8200, 4.2)."""

every_rule = pytest.mark.parametrize("rules", RULES)
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@pytest.fixture
def new_socket(netns: Netns) -> Iterator[NewSocket]:
    with clients_outside() as made:
        yield made


def everywhere(family: int) -> str:
    """The bind."""
    return f"[::]:{PORT}" if family == socket.AF_INET6 else f"0.0.0.0:{PORT}"


class Behind(Harness):
    """Sockets on all addresses whose clients are outside, and come by the rules of a name."""

    def __init__(
        self, policy: str, rules: str, family: int, new_socket: NewSocket, backend: str = EBPF
    ) -> None:
        text, where = RULES[rules]
        put_rules(text)
        self._rules, self._host, self._hosts = rules, where[family], HOSTS[family]
        bind, options = everywhere(family), ("transparent=yes",)
        super().__init__(backend, policy, bind, options=options, new_socket=new_socket)

    def slots(self, *ports: int, host: str = "") -> list[int]:
        """Of connections from each of the clients' hosts and ports, one after the other.

        Args:
            host: where to, if not as the rules say.
        """
        sources = [(each, port) for each in self._hosts for port in ports]
        return [self.exchange([each], host=host or self._host)[0].slot for each in sources]

    def looked_up_by_rule(self) -> bool:
        return "socket" not in self._rules or matched() > 0


@every_family
@every_rule
@pytest.mark.parametrize(
    "policy", [each.name for each in POLICIES.values() if EBPF in each.backends]
)
def test_a_connection_is_counted_once(
    policy: str, rules: str, family: int, new_socket: NewSocket
) -> None:
    with Behind(policy, rules, family, new_socket).serving() as harness:
        slots = harness.slots(*PORTS)
        assert harness.selected() == Counter(slots)
        assert harness.backend.unsteered() == 0
        assert harness.looked_up_by_rule()


@every_family
@every_rule
@pytest.mark.parametrize("policy", ["round-robin", "least-conn"])
def test_turns_are_taken_once(policy: str, rules: str, family: int, new_socket: NewSocket) -> None:
    with Behind(policy, rules, family, new_socket).serving() as harness, pinned(CPUS[0]):
        slots = harness.slots(*PORTS)
    assert slots == [(slots[0] + turn) % 4 for turn in range(len(slots))]


@every_rule
def test_a_policy_is_asked_once(rules: str, new_socket: NewSocket, tmp_path: Path) -> None:
    file = tmp_path / "asked.c"
    file.write_text(ASKED)
    with Behind(str(file), rules, socket.AF_INET, new_socket).serving() as harness:
        slots = harness.slots(*PORTS)
        assert harness.selected() == Counter(slots)
        assert harness.backend.policy_values().counters == {"begun": len(slots)}


@every_rule
@pytest.mark.parametrize("policy", ["hash", "source"])
@pytest.mark.parametrize("backend", [EBPF, CBPF])
def test_a_flow_keeps_its_worker(
    policy: str, rules: str, new_socket: NewSocket, backend: str
) -> None:
    """Also the same as without rules, if the address that it goes to plays no part."""
    with Behind(policy, rules, socket.AF_INET, new_socket, backend).serving() as harness:
        ports = range(30000, 30020)
        slots = harness.slots(*ports)
        assert harness.slots(*ports) == slots
        assert policy == "source" or len(set(slots)) > 1
        if (policy, backend) != ("hash", EBPF):
            put_rules("flush ruleset")
            assert harness.slots(*ports, host=HERE[socket.AF_INET]) == slots


@pytest.mark.parametrize("rules", ["none", "tproxy", "socket"])
@pytest.mark.parametrize("headers", [(_IPV6_DSTOPTS,), (_IPV6_DSTOPTS, _IPV6_HOPOPTS)])
def test_headers_between_those_of_ipv6_and_tcp(
    headers: tuple[int, ...], rules: str, new_socket: NewSocket
) -> None:
    def with_headers(family: int, kind: int) -> socket.socket:
        made = new_socket(family, kind)
        for header in headers:
            made.setsockopt(socket.IPPROTO_IPV6, header, _PADDING)
        return made

    with (
        Behind("round-robin", rules, socket.AF_INET6, with_headers).serving() as harness,
        pinned(CPUS[0]),
    ):
        slots = harness.slots(*PORTS)
        assert harness.selected() == Counter(slots)
    assert slots == [(slots[0] + turn) % 4 for turn in range(len(slots))]


@every_rule
def test_with_syn_cookies(rules: str, netns: Netns, new_socket: NewSocket) -> None:
    """The program runs for the SYN and for the ACK, which take turns of their own."""
    netns.sysctl("net.ipv4.tcp_syncookies", 2)
    with (
        Behind("round-robin", rules, socket.AF_INET, new_socket).serving() as harness,
        pinned(CPUS[0]),
    ):
        slots = harness.slots(*PORTS)
        assert tcp_count("SyncookiesRecv") == len(slots)
        assert set(Counter(slots).values()) == {len(slots) // 4}
        assert set(harness.selected().values()) == {len(slots) // 4}


def test_a_packet_is_known_for_a_moment_only() -> None:
    """Who sends it again does so as it was not answered: then it may go to another worker."""
    put_rules(RULES["socket"][0])
    with (
        Harness(EBPF, "round-robin", "tcp4", options=["transparent=yes"]).serving() as harness,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw,
    ):

        def chosen() -> int:
            """Of so many that are the same; the answer to each is refused, as nobody waits."""
            raw.sendto(segment(3333, PORT, 0x02), ("127.0.0.1", 0))
            return sum(harness.selected().values())

        begun_s = time.monotonic()
        assert chosen() == 1
        assert chosen() == 1 or time.monotonic() - begun_s > MOMENT_S
        eventually(lambda: chosen() > 1)


# Services

ANSWER = source("answers_early")


WAIT = """
import pathlib, time

while pathlib.Path("wait").exists():
    time.sleep(0.01)
"""


def told(sock: socket.socket) -> list[object]:
    sock.settimeout(DEADLINE_S)
    with sock.makefile("rb") as stream:
        found: list[object] = json.loads(stream.readline())
    return found


@pytest.mark.needs("migrate")
@every_family
def test_a_service_behind_tproxy(
    service: StartService, new_socket: NewSocket, clients: ExitStack, home: Path, family: int
) -> None:
    """Connections go where the client wanted, are counted while they are open, and wait in the
    backup listener while there is no worker."""
    (home / "app.py").write_text(ANSWER)
    put_rules(ruleset(tproxy(port=80)))

    def connect() -> socket.socket:
        sock = clients.enter_context(new_socket(family, socket.SOCK_STREAM))
        sock.settimeout(DEADLINE_S)
        sock.connect((AWAY[family], 80))
        return sock

    running = service(
        *("-b", everywhere(family), "-w", "4", "--policy", "least-conn", "--hang-timeout", "0"),
        *("--socket-option", "transparent=yes", "app:serve"),
    )
    held = [connect() for _ in range(20)]
    assert [tuple(told(sock)[1:]) for sock in held] == [(AWAY[family], 80)] * 20
    counted = [worker["connections"] for worker in running.workers()]
    assert [(each["selected"], each["open"]) for each in counted] == [(5, 5)] * 4

    assert running.steer("reload").returncode == 0
    assert told(connect())[1:] == [AWAY[family], 80]
    (home / "app.py").write_text(WAIT + ANSWER)
    (home / "wait").touch()
    for worker in running.workers():
        os.kill(worker["pid"], signal.SIGKILL)
    eventually(lambda: {each["state"] for each in running.workers()} == {"starting"})
    waiting = connect()
    (home / "wait").unlink()
    assert told(waiting)[1:] == [AWAY[family], 80]


# Over UDP the kernel looks a socket up for netfilter without the packet, and so asks no program.


@every_family
def test_over_udp_the_program_is_not_asked_for_tproxy(family: int, new_socket: NewSocket) -> None:
    sources = [(host, port) for host in HOSTS[family] for port in PORTS]
    bind = f"udp://{everywhere(family)}"
    options = ("transparent=yes",)
    with Harness(
        EBPF, "round-robin", bind, options=options, new_socket=new_socket
    ).serving() as harness:
        put_rules(ruleset(tproxy("udp")))
        harness.exchange(sources, host=AWAY[family])
        assert harness.selected() == {}


@every_family
@pytest.mark.parametrize("rule", ["socket", "redirect"])
def test_over_udp_others_do_no_harm(rule: str, family: int, new_socket: NewSocket) -> None:
    sources = [(host, port) for host in HOSTS[family] for port in PORTS]
    rules = {
        "socket": ruleset(socket_match("udp")),
        "redirect": ruleset(f"udp dport {PORT} counter redirect to :{PORT}", kind="nat"),
    }
    host = AWAY if rule == "redirect" else HERE
    bind = f"udp://{everywhere(family)}"
    options = ("transparent=yes",)
    with Harness(
        EBPF, "round-robin", bind, options=options, new_socket=new_socket
    ).serving() as harness:
        put_rules(rules[rule])
        taken = harness.exchange(sources, host=host[family])
        assert harness.selected() == Counter(each.slot for each in taken)
        assert matched() == len(sources)


def test_that_is_said(steer: RunSteer, service: StartService) -> None:
    asked = ("-b", f"udp://0.0.0.0:{PORT}", "--socket-option", "transparent=yes")
    words = "transparent=yes: for UDP from TPROXY the kernel's hash selects"
    assert f"note: {words}" in steer("check", *asked).stdout
    findings = json.loads(steer("doctor", *asked, "--json").stdout)["findings"]
    (found,) = (each for each in findings if each["topic"] == "socket-options")
    assert (found["verdict"], words in found["found"]) == ("warn", True)
    assert words in service("-w", "1", *asked).log
    assert "UDP" not in steer("check", *asked[2:]).stdout


@every_family
@pytest.mark.parametrize("backend", [EBPF, CBPF])
@pytest.mark.parametrize("since", ["the start", "a reload"])
def test_over_udp_all_that_tproxy_delivers_is_answered(
    since: str,
    backend: str,
    family: int,
    new_socket: NewSocket,
    service: StartService,
    clients: ExitStack,
    home: Path,
) -> None:
    """At an address that is no wildcard, too: the kernel's hash chooses among all that is there."""
    put_rules(ruleset(tproxy("udp")))
    here = f"[{HERE[family]}]" if family == socket.AF_INET6 else HERE[family]
    asked = ("-b", f"udp://{here}:{PORT}", "-w", "2", "--policy", "hash", "--backend", backend)
    if since == "the start":
        service(*asked, "--demo", "--socket-option", "transparent=yes")
    else:
        running = service(*asked, "--demo")
        (home / "steer.toml").write_text('[service]\nsocket_options = ["transparent=yes"]\n')
        assert running.steer("reload").returncode == 0
        # The old workers' sockets are not transparent, and may be chosen until they are closed.
        eventually(
            lambda: len({x.inode for x in port_holders.holders("udp", HERE[family], PORT)}), 2
        )
    waiting = []
    for _ in range(40):
        sock = clients.enter_context(new_socket(family, socket.SOCK_DGRAM))
        sock.settimeout(DEADLINE_S)
        sock.sendto(b"", (AWAY[family], PORT))
        waiting.append(sock)
    assert len({json.loads(sock.recv(65536))["slot"] for sock in waiting}) == 2
