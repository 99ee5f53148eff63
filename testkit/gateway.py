"""Clients in a network namespace of their own, behind a link whose other end is ours; and rules of
netfilter for what they send (nft(8))."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from testkit.harness import PORT
from testkit.namespaces import in_network_namespace, network_namespace, this_network_namespace
from testkit.processes import running

NewSocket = Callable[[int, int], socket.socket]
"""Makes one of a family and a kind."""
FAMILIES = (socket.AF_INET, socket.AF_INET6)
HERE = {socket.AF_INET: "10.9.9.9", socket.AF_INET6: "fd00::9"}
AWAY = {socket.AF_INET: "198.51.100.7", socket.AF_INET6: "2001:db8::7"}
"""Nobody has these. What is sent there comes to us, and is for us only if a rule says so."""
HOSTS = {
    socket.AF_INET: ("10.0.0.1", "10.2.0.1"),
    socket.AF_INET6: ("fd00::1", "fd00:0:2::1"),
}
"""Of the clients. In the IP header, byte 13 is theirs: taken for a TCP header's it is no SYN of the
first, and one of the second."""
PORTS = (0x4500, 0x6000, *range(30000, 30006))
"""Of the clients. A TCP header from the first two begins as an IP header may."""
_MARK, _TABLE = 1, 100
"""What is marked is local, by a table of routes."""
_OUTSIDE, _INSIDE = "02:00:00:00:00:01", "02:00:00:00:00:02"
"""Known to each other: else the first packet would wait for an answer, and be sent by the CPU that
takes the answer in."""
_THEIRS = [
    *(f"address add {host}/8 dev outside" for host in HOSTS[socket.AF_INET]),
    *(f"address add {host}/16 dev outside nodad" for host in HOSTS[socket.AF_INET6]),
    "link set outside up",
    *(f"neigh add {HERE[family]} lladdr {_INSIDE} dev outside" for family in FAMILIES),
    *(f"route add {AWAY[family]} via {HERE[family]} dev outside" for family in FAMILIES),
]
_OURS = [
    f"address add {HERE[socket.AF_INET]}/8 dev inside",
    f"address add {HERE[socket.AF_INET6]}/16 dev inside nodad",
    "link set inside up",
    *(f"neigh add {host} lladdr {_OUTSIDE} dev inside" for host in chain(*HOSTS.values())),
]
_MARKED = [
    f"rule add fwmark {_MARK} lookup {_TABLE}",
    f"route add local default dev lo table {_TABLE}",
]


@contextmanager
def clients_outside() -> Iterator[NewSocket]:
    """Makes sockets that are the clients'; all else happens in the namespace that we are in."""
    with (
        this_network_namespace() as ours,
        running("sleep", "infinity") as one_of_ours,
        network_namespace(),
        this_network_namespace() as theirs,
    ):
        inside = f"name inside address {_INSIDE} netns {one_of_ours.pid}"
        _ip(f"link add outside address {_OUTSIDE} type veth peer {inside}")
        _ip(*_THEIRS)
        with in_network_namespace(ours):
            _ip(*_OURS)
            _ip(*_MARKED)
            _ip(*_MARKED, family="-6")

            def make(family: int, kind: int) -> socket.socket:
                with in_network_namespace(theirs):
                    return socket.socket(family, kind)

            yield make


def _ip(*commands: str, family: str = "") -> None:
    """Args: family: -6 where it is not to be seen from the command. Raises CalledProcessError."""
    command = ["ip", *filter(None, [family]), "-batch", "-"]
    subprocess.run(command, input="\n".join(commands), check=True, text=True, timeout=60)


# Rules


def tproxy(protocol: str = "tcp", port: int = PORT) -> str:
    """What is for a port, at any address, goes to PORT here."""
    match = f"{protocol} dport {port} tproxy"
    return "\n".join(
        f"{match} {ip} to :{PORT} meta mark set {_MARK} accept" for ip in ("ip", "ip6")
    )


def socket_match(protocol: str = "tcp") -> str:
    """Looks whose a packet is, and counts it."""
    return f"{protocol} dport {PORT} socket transparent 1 counter"


def ruleset(*rules: str, hook: str = "prerouting", kind: str = "filter") -> str:
    """Args: hook, kind: of the chain that they are in."""
    lines = "\n".join(rules)
    chain = f"chain test {{\ntype {kind} hook {hook} priority -150\n{lines}\n}}"
    return f"flush ruleset\ntable inet test {{\n{chain}\n}}\n"


def put_rules(text: str) -> None:
    """These and no others. Raises CalledProcessError."""
    _nft("-f", "-", text=text)


def matched() -> int:
    """Packets that rules with a counter matched."""
    return sum(map(int, re.findall(r"counter packets (\d+)", _nft("list", "ruleset"))))


def _nft(*arguments: str, text: str = "") -> str:
    command = ["nft", *arguments]
    done = subprocess.run(
        command, input=text, check=True, text=True, stdout=subprocess.PIPE, timeout=60
    )
    return done.stdout
